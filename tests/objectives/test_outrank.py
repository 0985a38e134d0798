import pytest
import torch
from scenes import BUS, CLEAN, PERSON, TRAIN, detections

from detguard.detections import Candidates
from detguard.objectives import Outrank


def ranked():
    """Three candidates: one on the only person, one beside it, and one on it whose class is another."""
    boxes = torch.tensor([[[0.0, 0, 50, 100], [200, 0, 250, 100], [0, 0, 50, 98]]])
    logits = torch.tensor([[[2.0, -9, -9], [-3.0, -9, -9], [-9.0, 1.0, -9]]], requires_grad=True)
    return logits, boxes, CLEAN.of([PERSON])


def test_rank_lowers_what_is_found_and_raises_what_is_not_there():
    logits, boxes, person = ranked()
    loss = Outrank((PERSON, BUS)).loss(Candidates(logits, boxes), [person], 0.25)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient[0, 0, PERSON] > 0 > gradient[0, 1, PERSON]
    assert gradient[0, 2, PERSON] >= 0
    assert (gradient[0, :, BUS:] == 0).all()  # a class that the photo does not hold cannot outrank it


def test_rank_counts_a_candidate_whose_box_left_the_object_as_false():
    logits, boxes, person = ranked()
    boxes[0, 0] += 100
    loss = Outrank((PERSON,)).loss(Candidates(logits, boxes), [person], 0.25)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient[0, 0, PERSON] < 0


@pytest.mark.parametrize(("logit", "lowered"), [(-6.5, True), (-7.5, False)])
def test_rank_lowers_nothing_that_is_hardly_found_any_more(logit, lowered):
    logits, boxes, person = ranked()
    logits.data[0, :, PERSON] = torch.tensor([logit, -3.0, -20.0])
    loss = Outrank((PERSON,)).loss(Candidates(logits, boxes), [person], 0.25)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert (gradient[0, 0, PERSON] > 0) == lowered


@pytest.mark.parametrize(("logit", "raised"), [(3.9, True), (4.1, False)])
def test_rank_raises_nothing_that_is_nearly_certain(logit, raised):
    logits, boxes, person = ranked()
    logits.data[0, 1, PERSON] = logit
    loss = Outrank((PERSON,)).loss(Candidates(logits, boxes), [person], 0.25)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert (gradient[0, 1, PERSON] < 0) == raised


def test_rank_of_a_photo_without_objects_raises_any_target():
    logits, boxes, _ = ranked()
    loss = Outrank((PERSON, BUS)).loss(Candidates(logits, boxes), [detections()], 0.25)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert (gradient[0, :, :2] <= 0).all()
    assert (gradient[0, :, TRAIN] == 0).all()


def test_rank_gradient_is_numerically_right():
    logits, boxes, person = ranked()
    x = logits.detach().double().requires_grad_()
    objective = Outrank((PERSON,))
    assert torch.autograd.gradcheck(lambda v: objective.loss(Candidates(v, boxes.double()), [person], 0.25), x)
