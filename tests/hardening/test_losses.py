import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from detguard.data.stream import Labelled
from detguard.detections import Anchors, Candidates, Detections
from detguard.hardening.losses import (
    LEARN,
    Goal,
    feature_loss,
    feature_variances,
    gate_margin,
    imitation_loss,
    js_divergence,
    label_loss,
    retention_loss,
)

PROBABILITY = st.floats(0, 1, width=32)


def candidates(seed, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    anchors = Anchors(torch.zeros(6, 2), torch.ones(6, 1), torch.randn(2, 6, 4, 16, generator=g))
    return Candidates(scale * torch.randn(2, 6, 3, generator=g), torch.zeros(2, 6, 4), anchors=anchors)


def test_imitating_oneself_costs_nothing_and_anything_else_costs_something():
    a, b = candidates(0), candidates(1)
    assert torch.allclose(imitation_loss(a, a), torch.zeros(2), atol=1e-6)
    assert (imitation_loss(b, a) > 0.1).all()


def test_boxes_matter_only_where_the_teacher_sees_something():
    a = candidates(0)
    other = Anchors(a.anchors.points, a.anchors.strides, candidates(1).anchors.bins)
    blind = Candidates(torch.full_like(a.logits, -20.0), a.boxes, anchors=a.anchors)
    moved = Candidates(blind.logits, a.boxes, anchors=other)
    assert imitation_loss(moved, blind).max() < 1e-6
    assert imitation_loss(Candidates(a.logits, a.boxes, anchors=other), a).min() > 0.1


@pytest.mark.parametrize("loss", [imitation_loss, retention_loss])
def test_boxes_without_a_distribution_are_held_by_how_they_overlap(loss):
    a = candidates(0)
    boxes = torch.tensor([10.0, 10, 50, 90]).expand(2, 6, 4)
    bare = replace(a, boxes=boxes, anchors=replace(a.anchors, bins=None))
    moved = (boxes + torch.tensor([4.0, 0, 0, 0])).requires_grad_()
    assert loss(bare, bare).max() < 1e-5
    (gradient,) = torch.autograd.grad(loss(replace(bare, boxes=moved), bare).sum(), moved)
    assert (gradient[..., 0] > 0).all()
    assert Goal(bare).loss(replace(bare, boxes=moved), aim="box").min() > 0


def test_its_gradient_is_the_slope():
    teacher, student = candidates(0), candidates(1)
    logits = student.logits.double().requires_grad_()

    def loss(x):
        return imitation_loss(Candidates(x.float(), student.boxes, anchors=student.anchors), teacher).sum()

    (gradient,) = torch.autograd.grad(loss(logits), logits)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        slope = (loss(logits + 0.01 * direction) - loss(logits - 0.01 * direction)) / 0.02
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=0.01)


@given(PROBABILITY, PROBABILITY)
def test_the_js_divergence_is_symmetric_and_bounded(p, q):
    a, b = torch.tensor(p), torch.tensor(q)
    value = float(js_divergence(a, b))
    assert value == pytest.approx(float(js_divergence(b, a)), abs=1e-6)
    assert -1e-6 <= value <= math.log(2) + 1e-6
    assert float(js_divergence(a, a)) == pytest.approx(0, abs=1e-6)


def test_the_js_divergence_has_a_gradient_where_something_is_certain():
    p, q = torch.tensor([0.0, 0.3, 1.0, 0.0, 1.0]).requires_grad_(), torch.tensor([0.3, 0.0, 0.3, 1.0, 1.0])
    (gradient,) = torch.autograd.grad(js_divergence(p, q).sum(), p)
    assert gradient.isfinite().all()


def test_the_js_divergence_of_certain_opposites_is_ln_2():
    assert float(js_divergence(torch.tensor(0.0), torch.tensor(1.0))) == pytest.approx(math.log(2))


def labelled(known=None):
    objects = Detections(torch.tensor([[10.0, 10, 40, 40]]), torch.ones(1), torch.tensor([1]))
    return [Labelled(None, objects, known)] * 2


def proposed(seed):
    made = candidates(seed)
    anchors = Anchors(torch.full((6, 2), 25.0), torch.full((6, 1), 8.0), made.anchors.bins)
    return Candidates(made.logits, torch.tensor([8.0, 12, 41, 39]).expand(2, 6, 4), anchors=anchors)


def test_classes_that_a_photo_is_not_labelled_for_are_not_learned():
    found = proposed(1)
    for known, silent in ((None, []), ((1,), [0, 2])):
        logits = found.logits.clone().requires_grad_()
        goal = Goal.of("labels", found, labelled(known))
        goal.loss(Candidates(logits, found.boxes, anchors=found.anchors)).sum().backward()
        learned = logits.grad.abs().sum((0, 1)) > 0
        assert [number for number in range(3) if not learned[number]] == silent


def test_classes_that_a_photo_is_not_labelled_for_stay_what_a_teacher_says():
    found, said = proposed(0), proposed(1)
    found.logits.requires_grad_()
    labels = [labelled((1,))[0], labelled()[0]]
    alone, by_teacher = (label_loss(found, labels, of) for of in (None, said))
    assert by_teacher[0] > alone[0] + 0.1
    assert by_teacher[1] == alone[1]  # all of them are labelled
    (gradient,) = torch.autograd.grad((by_teacher - alone)[0], found.logits)
    assert (gradient[0, :, [0, 2]] != 0).all()
    assert (gradient[0, :, 1] == 0).all()
    assert torch.allclose(label_loss(found, labels, found), alone, atol=1e-5)


def test_the_parts_that_attacks_aim_at_sum_to_the_loss_and_both_to_that_of_each():
    said, found = proposed(0), proposed(1)
    whole = {learn: Goal.of(learn, said, labelled()).loss(found) for learn in LEARN}
    for learn, loss in whole.items():
        goal = Goal.of(learn, said, labelled())
        assert (loss > 0.1).all()
        assert torch.allclose(goal.loss(found, aim="class") + goal.loss(found, aim="box"), loss)
    assert torch.allclose(whole["teacher"] + whole["labels"], whole["both"])


def test_which_candidate_answers_for_an_object_is_told_by_what_is_said_of_the_clean_photo():
    said = proposed(0)
    fooled = Candidates(said.logits, said.boxes + 500, anchors=said.anchors)
    goal = Goal.of("labels", said, labelled())
    assert goal.loss(fooled, aim="box").min() > goal.loss(said, aim="box").max()
    assert goal.assigned.weights.sum() > 1
    assert Goal.of("labels", fooled, labelled()).assigned.weights.sum() == 0


def test_the_gates_margin_does_not_fade_where_its_weights_do():
    sure = torch.tensor([[60.0, 0.0, -60.0]], requires_grad=True)
    (by_loss,) = torch.autograd.grad(cross_entropy(sure, torch.tensor([0])), sure, retain_graph=True)
    (by_margin,) = torch.autograd.grad(gate_margin(sure, 0, -1).sum(), sure)
    assert by_loss.abs().max() < 1e-6
    assert by_margin.tolist() == [[1, 0, -1]]


def test_feature_maps_are_compared_by_layer_each_channel_in_its_own_units():
    teacher = {4: torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)), 6: torch.ones(3, 1, 4, 4)}
    teacher[4] *= torch.tensor([1.0, 100.0])[None, :, None, None]
    variances = feature_variances(teacher, lambda mean: mean)
    assert feature_loss(teacher, teacher, variances).tolist() == [0, 0, 0]
    moved = {4: teacher[4] + torch.tensor([0.0, 100.0])[None, :, None, None], 9: torch.zeros(3, 1, 4, 4)}
    moved[4][1:] = teacher[4][1:]
    error = feature_loss(moved, teacher, variances)
    assert error[0] == pytest.approx(0.5, rel=0.2)
    assert error[1:].tolist() == [0, 0]


def test_an_expert_that_says_the_same_has_lost_nothing_and_one_that_does_not_has():
    before, other = candidates(0), candidates(1)
    assert retention_loss(before, before).abs().max() < 1e-6
    assert (retention_loss(other, before) > 0.01).all()
    assert torch.allclose(retention_loss(other, before), retention_loss(before, other))


def test_what_neither_is_sure_of_may_change():
    before = candidates(0)
    unsure = Candidates(before.logits - 12, before.boxes, anchors=before.anchors)
    turned = Candidates(unsure.logits.flip(1), before.boxes, anchors=candidates(1).anchors)
    assert retention_loss(turned, unsure).max() < 0.05 * retention_loss(candidates(1), before).min()


def test_the_retention_loss_has_the_gradient_of_its_value():
    now = candidates(1)
    # Where the weight is that of before, it does not move with what is said now.
    before = Candidates(now.logits.amax(2, keepdim=True) + candidates(0).logits.abs(), now.boxes, anchors=now.anchors)

    def value(x):
        return retention_loss(Candidates(x.float(), now.boxes, anchors=now.anchors), before).sum()

    x = now.logits.double().requires_grad_()
    (gradient,) = torch.autograd.grad(value(x), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    step = 1e-3
    with torch.no_grad():
        slope = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=0.02)
