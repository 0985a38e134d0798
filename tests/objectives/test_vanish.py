import pytest
import torch
from scenes import BUS, CLEAN, PERSON, SCENE, detections, loss_and_gradient, some_candidates

from detguard.detections import Candidates
from detguard.objectives import Untargeted, Vanish
from detguard.objectives.base import Selection


def test_vanish_fails_while_a_person_is_found_anywhere():
    assert not Vanish((PERSON,)).success(CLEAN, detections((PERSON, 0.3, 400, 0, 450, 90)))


def test_vanish_succeeds_when_only_other_classes_are_found():
    assert Vanish((PERSON,)).success(CLEAN, detections((BUS, 0.8, 100, 0, 300, 100)))


def test_strict_vanish_fails_if_the_person_is_relabelled():
    relabelled = detections((BUS, 0.8, 0, 0, 48, 99))
    assert Vanish((PERSON,)).success(CLEAN, relabelled)
    assert not Vanish((PERSON,), strict=True).success(CLEAN, relabelled)


def test_vanish_does_not_fade_on_a_saturated_sigmoid():
    logits, boxes = some_candidates()
    logits[0, 0, PERSON] = 30.0
    _, gradient = loss_and_gradient(Vanish((PERSON,)), logits, boxes, [SCENE] * 2)
    assert gradient[0, 0, PERSON] > 0.99


def test_vanish_leaves_the_background_alone():
    logits = torch.full((1, 50, 3), -9.0)
    logits[0, 7, PERSON] = 0.0
    _, gradient = loss_and_gradient(Vanish((PERSON,)), logits, torch.zeros(1, 50, 4), [])
    assert gradient[0, 7, PERSON] > 0
    assert gradient.count_nonzero() == 1


def test_vanish_gradient_is_numerically_right():
    logits, boxes = some_candidates(5, batch=1, n=6)
    x = logits.double().requires_grad_()
    objective = Vanish((PERSON,))
    assert torch.autograd.gradcheck(lambda v: objective.loss(Candidates(v, boxes.double()), [], 0.25), x)


def test_only_strict_lowers_what_else_is_found_on_the_object_and_there_alone():
    logits = torch.full((1, 2, 3), -9.0)
    logits[0, :, BUS] = 2.0
    boxes = torch.tensor([[[20.0, 20.0, 60.0, 60.0], [200.0, 20.0, 240.0, 60.0]]])
    _, gradient = loss_and_gradient(Vanish((PERSON,), strict=True), logits, boxes, [SCENE])
    assert gradient[0, 0, BUS] > 0
    assert gradient[0, 1, BUS] == 0
    _, gradient = loss_and_gradient(Vanish((PERSON,)), logits, boxes, [SCENE])
    assert gradient.count_nonzero() == 0


def test_where_one_is_selected_it_alone_must_go():
    clean = detections((PERSON, 0.9, 0, 0, 50, 100), (PERSON, 0.8, 200, 0, 250, 100))
    only_second = Vanish((PERSON,), only=Selection((2,)))
    assert only_second.success(clean, clean[:1])
    assert not only_second.success(clean, clean[1:])
    assert not Vanish((PERSON,)).success(clean, clean[:1])


@pytest.mark.parametrize("goal", [Vanish((BUS,), only=Selection(objects=(1,))), Untargeted((BUS,))])
def test_where_each_class_has_its_own_box_an_object_is_found_by_that_of_its_class(goal):
    boxes = torch.tensor([[[[0.0, 0, 9, 9], [20, 20, 60, 60], [0, 0, 9, 9]]]])  # of person, bus, train
    logits = torch.tensor([[[3.0, 1.0, -9.0]]], requires_grad=True)
    loss = goal.loss(Candidates(logits, boxes, multi_label=True), [SCENE], 0.25)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss > 1
    assert gradient[0, 0, BUS] > 0.5


def test_where_some_are_selected_candidates_elsewhere_are_left_alone():
    logits = torch.full((1, 2, 3), -9.0)
    logits[0, :, BUS] = 2.0
    boxes = torch.tensor([[[20.0, 20.0, 60.0, 60.0], [200.0, 20.0, 240.0, 60.0]]])
    _, gradient = loss_and_gradient(Vanish((BUS,), only=Selection((1,))), logits, boxes, [SCENE])
    assert gradient[0, 0, BUS] > 0 == gradient[0, 1, BUS]
