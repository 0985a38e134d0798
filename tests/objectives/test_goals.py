"""What all goals share: losses that can be gone down, what is selected and kept; and that each is reached."""

from dataclasses import replace

import cv2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import BUS, CLEAN, PERSON, TRAIN, detections, loss_and_gradient, some_candidates

from detguard.attacks.budgets import Linf
from detguard.attacks.group import AttackOptions, attack_group
from detguard.detections import Candidates
from detguard.objectives import Fabricate, Flood, Mislabel, Untargeted, Vanish
from detguard.objectives.base import Selection, new, outcomes
from detguard.objectives.mislabel import ANY
from detguard.objectives.parse import GOALS

GOALS_OF_ALL_KINDS = [
    Vanish((PERSON,)),
    Vanish((PERSON, BUS), True),
    Vanish((PERSON, BUS), only=Selection((1,))),
    Mislabel((BUS,), (TRAIN,)),
    Mislabel((PERSON, BUS), (ANY, PERSON), only=Selection((1, 2))),
    Untargeted((PERSON, BUS)),
    Fabricate((PERSON, TRAIN), 2),
    Flood((PERSON, BUS)),
]
OBJECTS = detections((BUS, 0.9, 20, 20, 60, 60), (PERSON, 0.8, 70, 70, 110, 110), (TRAIN, 0.7, 70, 10, 110, 50))
goals = st.builds(
    lambda goal, measure, keep: replace(goal, measure=measure, keep_others=keep),
    st.sampled_from(GOALS_OF_ALL_KINDS),
    st.sampled_from(["logit", "confidence"]),
    st.booleans(),
)


def aims(goal, logits, boxes):
    candidates = Candidates(logits, boxes)
    return [goal.aim(candidates[i : i + 1], OBJECTS, goal.attacked(OBJECTS)) for i in range(len(logits))]


def test_every_goal_is_tested_here():
    assert {goal.kind for goal in GOALS_OF_ALL_KINDS} == set(GOALS)


def test_outcomes_tell_kept_vanished_and_relabelled_apart():
    clean = detections((PERSON, 0.9, 0, 0, 50, 50), (PERSON, 0.9, 100, 0, 150, 50), (PERSON, 0.9, 200, 0, 250, 50))
    found = detections((PERSON, 0.4, 1, 0, 51, 50), (BUS, 0.9, 100, 0, 151, 50))
    assert outcomes(clean, found) == ["kept", "relabelled", "vanished"]
    assert new(clean, found).tolist() == [False, True]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), goals)
def test_stepping_against_the_gradient_lowers_the_loss(seed, goal):
    logits, boxes = (part.double() for part in some_candidates(seed))
    aimed = aims(goal, logits, boxes)
    loss, gradient = loss_and_gradient(goal, logits, boxes, aimed)
    # A short step: a long one changes which candidates of an object are its best.
    lower, _ = loss_and_gradient(goal, logits - 1e-6 * gradient, boxes, aimed)
    assert (lower <= loss + 1e-9).all()
    assert (lower < loss).any() or gradient.abs().sum() < 1e-2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), goals)
def test_loss_of_a_frame_does_not_depend_on_its_neighbours(seed, goal):
    logits, boxes = some_candidates(seed)
    aimed = aims(goal, logits, boxes)
    both, _ = loss_and_gradient(goal, logits, boxes, aimed)
    one, _ = loss_and_gradient(goal, logits[:1], boxes[:1], aimed[:1])
    assert torch.allclose(both[0], one[0])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), goals)
def test_gradients_are_numerically_right(seed, goal):
    logits, boxes = some_candidates(seed, batch=1, n=5)
    aimed = aims(goal, logits, boxes)
    x = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: goal.loss(Candidates(v, boxes.double()), aimed, 0.25), x, eps=1e-7)


@pytest.mark.parametrize(("goal", "sure"), [(Vanish((PERSON,)), 30.0), (Fabricate((PERSON,)), -25.0)])
def test_plain_confidence_fades_where_logits_do_not(goal, sure):
    logits, boxes = torch.full((1, 1, 3), sure), torch.tensor([[[300.0, 0, 340, 40]]])
    aimed = aims(goal, logits, boxes)
    _, by_logit = loss_and_gradient(goal, logits, boxes, aimed)
    _, by_confidence = loss_and_gradient(replace(goal, measure="confidence"), logits, boxes, aimed)
    assert by_logit[0, 0, PERSON].abs() > 0.99
    assert by_confidence[0, 0, PERSON].abs() < 1e-6


def test_plain_confidence_is_the_mean_of_those_within_reach():
    logits = torch.tensor([[[0.0], [2.0], [-9.0]]])
    loss, _ = loss_and_gradient(Vanish((PERSON,), measure="confidence"), logits, torch.zeros(1, 3, 4), [])
    assert loss.item() == pytest.approx(torch.tensor([0.0, 2.0]).sigmoid().mean().item())


def test_only_keep_others_minds_the_rest_of_the_scene():
    gone, moved = CLEAN[:0], detections((BUS, 0.8, 250, 0, 450, 100))
    for found in (gone, moved, detections((TRAIN, 0.8, 100, 0, 300, 100))):
        assert Vanish((PERSON,)).success(CLEAN, found)
        assert not Vanish((PERSON,), keep_others=True).success(CLEAN, found)
    assert Vanish((PERSON,), keep_others=True).success(CLEAN, CLEAN[1:])


def test_keep_others_raises_their_class_on_them():
    logits = torch.full((1, 2, 4), -6.0)
    logits[0, :, TRAIN] = -5.0
    boxes = torch.stack([OBJECTS.boxes[1], torch.tensor([300.0, 0, 340, 40])])[None]
    goal = Vanish((BUS,), keep_others=True)
    _, gradient = loss_and_gradient(goal, logits, boxes, aims(goal, logits, boxes))
    assert gradient[0, 0, PERSON] < 0
    _, gradient = loss_and_gradient(Vanish((BUS,)), logits, boxes, aims(goal, logits, boxes))
    assert gradient.abs().sum() == 0


@pytest.mark.parametrize("goal", [Mislabel((BUS,), (TRAIN,)), Fabricate((TRAIN,)), Flood((TRAIN,))])
def test_what_is_to_be_found_is_raised_over_the_confidence_that_is_wanted(goal):
    on, off = [20.0, 20, 60, 60], [70.0, 70, 110, 110]
    logits, boxes = torch.full((1, 9, 4), -4.0), torch.tensor([[on] * 5 + [off] * 4])
    logits[..., TRAIN] = 1.5  # .82
    aims = [goal.aim(Candidates(logits, boxes), detections((BUS, 0.9, 20, 20, 60, 60)), torch.tensor([True]))]
    slopes = []
    for sure in (0.25, 0.95):
        x = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(goal.loss(Candidates(x, boxes), aims, 0.025, sure).sum(), x)
        slopes.append(-gradient[..., TRAIN].min())
    assert slopes[1] > slopes[0] + 0.2


def test_objects_are_selected_by_number_and_by_where_their_middle_lies():
    assert Selection().of(OBJECTS).tolist() == [True, True, True]
    assert Selection((1, 3)).of(OBJECTS).tolist() == [True, False, True]
    assert Selection(box=(60.0, 0.0, 100.0, 100.0)).of(OBJECTS).tolist() == [False, True, True]
    assert Selection((2,), (0.0, 0.0, 50.0, 50.0)).of(OBJECTS).tolist() == [False, False, False]
    assert Untargeted((PERSON, BUS), only=Selection((1, 3))).attacked(OBJECTS).tolist() == [True, False, False]


@pytest.fixture(scope="module")
def small(bus):
    return cv2.resize(bus, (240, 320), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize(
    "goal",
    [
        Vanish((0,), only=Selection((2,)), keep_others=True),
        Vanish((0,), measure="confidence"),
        Mislabel((0,), (1,)),
        Mislabel((0,), (ANY,), only=Selection((1,))),
        Untargeted((0, 1, 2, 3, 4)),
        Fabricate((0,), 2, keep_others=True),
        Flood((0, 1, 2, 3, 4), 40),
    ],
    ids=["vanish one", "vanish by confidence", "mislabel", "mislabel as other", "untargeted", "fabricate", "flood"],
)
def test_the_goal_is_reached_on_a_photo(bundled, small, goal):
    clean = bundled.predict(small, 0.25)
    options = AttackOptions(budget=Linf(12), steps=40, step=2)
    (attempt,) = attack_group(bundled, [("bus", small, clean)], goal, [], options)
    assert attempt.done
    found = bundled.predict(attempt.adversarial, 0.25)
    assert goal.success(clean, found)
    assert not goal.success(clean, clean)


def test_what_is_to_be_found_is_found_by_the_margin_over_the_confidence(bundled, small):
    clean = bundled.predict(small, 0.25)
    scores = []
    for margin in (0.0, 0.6):
        options = AttackOptions(budget=Linf(12), step=1, steps=40, margin=margin)
        (attempt,) = attack_group(bundled, [("bus", small, clean)], Fabricate((0,)), [], options)
        assert attempt.done
        found = bundled.detect([attempt.adversarial], 0.25)[0]
        scores.append(found[new(clean, found)].of([0]).scores.max().item())
    assert scores[1] > 0.7 > scores[0]
