import torch
from scenes import BUS, CLEAN, PERSON, SCENE, TRAIN, detections, loss_and_gradient

from detguard.detections import Candidates
from detguard.objectives import Untargeted

GOAL = Untargeted((PERSON, BUS))


def test_every_object_is_gone_or_of_another_class():
    assert GOAL.success(CLEAN, detections())
    assert GOAL.success(CLEAN, detections((BUS, 0.9, 0, 0, 50, 100), (PERSON, 0.9, 100, 0, 300, 100)))
    assert not GOAL.success(CLEAN, CLEAN[1:])


def test_an_object_elsewhere_does_not_count():
    assert GOAL.success(CLEAN, detections((PERSON, 0.9, 400, 0, 450, 100)))


def two_ways(logit_of_other):
    logits = torch.full((1, 2, 4), -9.0)
    logits[0, :, BUS], logits[0, :, TRAIN] = 3.0, logit_of_other
    return logits, torch.tensor([[[20.0, 20.0, 60.0, 60.0], [200.0, 20.0, 240.0, 60.0]]])


def test_the_objects_class_is_lowered_on_it_and_the_best_other_raised_where_it_is_nearer_than_the_threshold():
    _, gradient = loss_and_gradient(GOAL, *two_ways(2.0), [SCENE])
    assert gradient[0, 0, BUS] > 0 > gradient[0, 0, TRAIN]
    assert gradient[0, 1].abs().sum() == 0
    _, gradient = loss_and_gradient(GOAL, *two_ways(-4.0), [SCENE])
    assert gradient[0, 0, BUS] > 0 == gradient[0, 0, TRAIN]


def test_a_candidate_that_counts_for_every_class_must_lose_the_objects_own():
    logits, boxes = two_ways(2.0)
    logits.requires_grad_()
    loss = GOAL.loss(Candidates(logits, boxes, multi_label=True), [SCENE], 0.25)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient[0, 0, BUS] > 0 == gradient[0, 0, TRAIN]
