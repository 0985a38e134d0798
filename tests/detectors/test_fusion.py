import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detguard import DetguardError
from detguard.detectors.fusion import Average, Bounded, average, parse_fusion
from detguard.detectors.load import load_detector

ROBUST = 2


def answers(seed=0, batch=2, classes=3, anchors=7, spread=6.0):
    """Raw outputs of three experts that have nothing in common."""
    generator = torch.Generator().manual_seed(seed)

    def one():
        scores = spread * torch.randn(batch, classes, anchors, generator=generator)
        return {"scores": scores, "boxes": torch.randn(batch, 16, anchors, generator=generator), "feats": []}

    return [(None, one()) for _ in range(3)], torch.randn(batch, 3, generator=generator).log_softmax(1)


def test_distances_lean_on_the_expert_that_is_sure():
    sure, unsure = torch.full((1, 1, 1), 6.0), torch.full((1, 1, 1), -6.0)
    near, far = torch.zeros(1, 16, 1), torch.zeros(1, 16, 1)
    near[:, 1::4], far[:, 3::4] = 20, 20
    outputs = [
        (None, {"scores": sure, "boxes": near, "feats": []}),
        (None, {"scores": unsure, "boxes": far, "feats": []}),
    ]
    raw = average(outputs, torch.tensor([[0.5, 0.5]]).log())
    distribution = raw["boxes"].unflatten(1, (4, -1)).softmax(2)[0, :, :, 0]
    assert (distribution[:, 1] > 0.99).all()
    assert raw["scores"].sigmoid().item() == pytest.approx(
        (torch.tensor(6.0).sigmoid() + torch.tensor(-6.0).sigmoid()) / 2
    )


def test_distances_without_a_distribution_are_averaged_themselves():
    scores = torch.zeros(1, 1, 1)
    outputs = [(None, {"scores": scores, "boxes": torch.full((1, 4, 1), value), "feats": []}) for value in (2.0, 6.0)]
    raw = average(outputs, torch.tensor([[0.75, 0.25]]).log())
    assert torch.allclose(raw["boxes"], torch.full((1, 4, 1), 3.0))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 99), st.floats(0, 0.9))
def test_the_robust_expert_keeps_its_share_of_an_average(rows, seed, floor):
    gate = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed)).log_softmax(1)
    weights = Average(floor).log_weights(gate, ROBUST).exp()
    assert torch.allclose(weights.sum(1), torch.ones(rows), atol=1e-5)
    assert (weights[:, ROBUST] >= floor - 1e-6).all()
    assert torch.allclose(Average(0).log_weights(gate, ROBUST), gate)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 999), st.floats(0, 20), st.floats(0.1, 100))
def test_no_logit_is_further_from_the_robust_one_than_the_bound(seed, bound, spread):
    outputs, weights = answers(seed, spread=spread)
    mean, led = average(outputs, weights)["scores"], outputs[ROBUST][1]["scores"]
    fused = Bounded(bound).fuse(outputs, weights, ROBUST)
    assert ((fused["scores"] - led).abs() <= bound + 1e-4 * spread).all()  # of sums in floats
    inside = (mean - led).abs() < bound
    assert torch.equal(fused["scores"][inside], mean[inside])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 999), st.floats(0.01, 5))
def test_no_probability_of_a_distance_is_further_from_the_robust_one_than_the_bound(seed, bound):
    outputs, weights = answers(seed)
    of_all, led = (x["boxes"].unflatten(1, (4, -1)).softmax(2) for x in (average(outputs, weights), outputs[ROBUST][1]))
    fused = Bounded(bound).fuse(outputs, weights, ROBUST)["boxes"].unflatten(1, (4, -1))
    apart = (fused - led.log()).abs()
    assert (apart <= bound + 1e-4).all()
    assert apart.max() > 0.99 * min(bound, (of_all.log() - led.log()).abs().max())
    # Once they sum to 1 as probabilities do, it may be twice that.
    assert ((fused.log_softmax(2) - led.log()).abs() <= 2 * bound + 1e-4).all()


def test_distances_without_a_distribution_are_those_of_the_robust_expert():
    outputs, weights = answers()
    for _, raw in outputs:
        raw["boxes"] = raw["boxes"][:, :4]
    assert torch.equal(Bounded(0.5).fuse(outputs, weights, ROBUST)["boxes"], outputs[ROBUST][1]["boxes"])


def test_where_the_bound_holds_the_gradient_is_that_of_the_robust_expert():
    outputs, weights = answers()
    led = outputs[ROBUST][1]["scores"].requires_grad_()
    other = outputs[0][1]["scores"].requires_grad_()
    fused = Bounded(0.01).fuse(outputs, weights, ROBUST)["scores"]
    bounded = (average(outputs, weights)["scores"] - led).abs() > 0.01
    assert bounded.float().mean() > 0.9
    of_led, of_other = torch.autograd.grad(fused.sum(), (led, other))
    assert (of_led[bounded] == 1).all()
    assert (of_other[bounded] == 0).all()


@pytest.mark.parametrize("text", ["average:0", "average:0.5", "bounded:0.5", "bounded:20"])
def test_a_rule_is_written_as_it_is_read(text):
    assert str(parse_fusion(text)) == text


@pytest.mark.parametrize("text", ["", "sum:1", "bounded", "bounded:", "bounded:-1", "bounded:21", "bounded:nan"])
def test_no_such_rule(text):
    with pytest.raises(DetguardError, match="bounded"):
        parse_fusion(text)


def test_a_detector_is_loaded_with_another_rule(bus):
    averaged, bounded = (load_detector("detguard-n-hard", fusion=rule) for rule in ("average:0", "bounded:0"))
    alone = averaged.through(averaged.model.robust)
    (fused,), (robust,) = bounded.detect([bus], 0.1), alone.detect([bus], 0.1)
    assert torch.allclose(fused.scores, robust.scores, atol=1e-5)
    assert averaged.state_hash() != bounded.state_hash()
    assert not math.isclose(float(averaged.detect([bus], 0.1)[0].scores[0]), float(robust.scores[0]), abs_tol=1e-3)


def test_only_ensembles_have_one():
    with pytest.raises(DetguardError, match="`fusion`"):
        load_detector("detguard-n", fusion="average:0")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 999), st.floats(0, 20), st.floats(0.01, 0.99))
def test_leaders_share_the_lead_by_the_weight_that_the_gate_gives_them(seed, bound, share):
    outputs, _ = answers(seed)
    weights = torch.tensor([[(1 - share) / 2, share, (1 - share) / 2]]).log().expand(2, 3)
    fused = Bounded(bound).fuse(outputs, weights, ROBUST, [1])["scores"]
    both = [outputs[1], outputs[ROBUST]]
    led = average(both, torch.tensor([[share, 1 - share]]).log().expand(2, 2))["scores"]
    assert ((fused - led).abs() <= bound + 1e-3).all()
    assert torch.allclose(Bounded(0).fuse(outputs, weights, ROBUST, [1])["scores"], led, atol=1e-3)


def test_an_average_with_a_floor_has_a_gradient_where_an_expert_is_not_asked():
    weights = torch.tensor([[0.0, -torch.inf, -torch.inf]]).requires_grad_()
    log_weights = Average(0.25).log_weights(weights, ROBUST)
    assert log_weights.exp()[0].tolist() == pytest.approx([0.75, 0, 0.25])
    (gradient,) = torch.autograd.grad(log_weights[0, 0], weights)
    assert gradient.tolist() == [[1, 0, 0]]


def test_a_leader_that_nobody_asks_leaves_all_to_the_robust_expert():
    outputs, _ = answers()
    weights = torch.tensor([[0.0, -torch.inf, -torch.inf]]).expand(2, 3)
    alone = Bounded(0.25).fuse(outputs, weights, ROBUST)
    asked = [outputs[0], (torch.zeros(0, dtype=torch.int64), None), outputs[2]]
    led = Bounded(0.25).fuse(asked, weights, ROBUST, [1])
    assert all(torch.allclose(led[key], alone[key], atol=1e-4) for key in ("scores", "boxes"))


def test_where_only_a_leader_is_asked_the_gradient_is_a_number():
    outputs, _ = answers()
    weights = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(2, 3).clone().requires_grad_()
    fused = Bounded(0.25).fuse(outputs, weights, ROBUST, [1])
    (gradient,) = torch.autograd.grad(fused["scores"].sum(), weights)
    assert torch.isfinite(gradient).all()
    assert torch.allclose(fused["scores"], outputs[1][1]["scores"], atol=1e-3)
