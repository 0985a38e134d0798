import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detguard.detections import Candidates, Detections
from detguard.objectives import Degrade, Mislabel, Outrank, Vanish
from detguard.objectives.base import outcomes
from detguard.photos import frames_tensor

PERSON, BUS, TRAIN = 0, 1, 2


def detections(*rows):
    """Rows of (class, score, x1, y1, x2, y2)."""
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 6)
    return Detections(table[:, 2:], table[:, 1], table[:, 0].long())


CLEAN = detections((PERSON, 0.9, 0, 0, 50, 100), (BUS, 0.8, 100, 0, 300, 100))


def test_vanish_fails_while_a_person_is_found_anywhere():
    assert not Vanish((PERSON,)).success(CLEAN, detections((PERSON, 0.3, 400, 0, 450, 90)))


def test_vanish_succeeds_when_only_other_classes_are_found():
    assert Vanish((PERSON,)).success(CLEAN, detections((BUS, 0.8, 100, 0, 300, 100)))


def test_strict_vanish_fails_if_the_person_is_relabelled():
    relabelled = detections((BUS, 0.8, 0, 0, 48, 99))
    assert Vanish((PERSON,)).success(CLEAN, relabelled)
    assert not Vanish((PERSON,), strict=True).success(CLEAN, relabelled)


def test_mislabel_wants_the_new_class_in_the_same_place():
    goal = Mislabel((BUS,), TRAIN)
    assert goal.success(CLEAN, detections((TRAIN, 0.5, 105, 0, 300, 100)))
    assert not goal.success(CLEAN, detections((TRAIN, 0.5, 250, 0, 450, 100)))
    assert not goal.success(CLEAN, detections())


def test_mislabel_fails_while_the_old_class_is_found():
    found = detections((TRAIN, 0.9, 100, 0, 300, 100), (BUS, 0.3, 100, 0, 300, 100))
    assert not Mislabel((BUS,), TRAIN).success(CLEAN, found)


def test_mislabel_wants_every_object():
    clean = detections((BUS, 0.9, 0, 0, 50, 50), (BUS, 0.9, 100, 100, 150, 150))
    found = detections((TRAIN, 0.9, 0, 0, 50, 50))
    assert not Mislabel((BUS,), TRAIN).success(clean, found)


def test_outcomes_tell_kept_vanished_and_relabelled_apart():
    clean = detections((PERSON, 0.9, 0, 0, 50, 50), (PERSON, 0.9, 100, 0, 150, 50), (PERSON, 0.9, 200, 0, 250, 50))
    found = detections((PERSON, 0.4, 1, 0, 51, 50), (BUS, 0.9, 100, 0, 151, 50))
    assert outcomes(clean, found) == ["kept", "relabelled", "vanished"]


def loss_and_gradient(objective, logits, boxes, objects):
    logits = logits.clone().requires_grad_()
    loss = objective.loss(Candidates(logits, boxes), objects, 0.25)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), gradient


def some_candidates(seed=0, batch=2, n=30, classes=4):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, n, 2, generator=generator) * 100
    boxes = torch.cat([corner, corner + 40], 2)
    return torch.randn(batch, n, classes, generator=generator) * 3, boxes


OBJECTS = [torch.tensor([[20.0, 20.0, 60.0, 60.0]])] * 2


def test_vanish_does_not_fade_on_a_saturated_sigmoid():
    logits, boxes = some_candidates()
    logits[0, 0, PERSON] = 30.0
    _, gradient = loss_and_gradient(Vanish((PERSON,)), logits, boxes, OBJECTS)
    assert gradient[0, 0, PERSON] > 0.99


def test_vanish_leaves_the_background_alone():
    logits = torch.full((1, 50, 3), -9.0)
    logits[0, 7, PERSON] = 0.0
    _, gradient = loss_and_gradient(Vanish((PERSON,)), logits, torch.zeros(1, 50, 4), [])
    assert gradient[0, 7, PERSON] > 0
    assert gradient.count_nonzero() == 1


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([Vanish((PERSON,)), Vanish((PERSON, BUS), True), Mislabel((BUS,), TRAIN)])
)
def test_stepping_against_the_gradient_lowers_the_loss(seed, objective):
    logits, boxes = some_candidates(seed)
    loss, gradient = loss_and_gradient(objective, logits, boxes, OBJECTS)
    lower, _ = loss_and_gradient(objective, logits - 1e-3 * gradient, boxes, OBJECTS)
    assert (lower <= loss + 1e-5).all()
    assert (lower < loss).any() or gradient.abs().sum() == 0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_loss_of_a_frame_does_not_depend_on_its_neighbours(seed):
    logits, boxes = some_candidates(seed)
    objective = Mislabel((BUS,), TRAIN)
    both, _ = loss_and_gradient(objective, logits, boxes, OBJECTS)
    one, _ = loss_and_gradient(objective, logits[:1], boxes[:1], OBJECTS[:1])
    assert torch.allclose(both[0], one[0])


def test_mislabel_gradient_raises_the_new_class_and_lowers_the_old_on_the_object():
    logits, boxes = (
        torch.full((1, 3, 4), -2.0),
        torch.tensor([[[20, 20, 60, 60], [22, 20, 60, 60], [300, 0, 310, 9.0]]]),
    )
    logits[0, :2, BUS] = 4.0
    _, gradient = loss_and_gradient(Mislabel((BUS,), TRAIN), logits, boxes, OBJECTS[:1])
    assert gradient[0, 0, TRAIN] < 0 < gradient[0, 0, BUS]


def test_vanish_gradient_is_numerically_right():
    logits, boxes = some_candidates(5, batch=1, n=6)
    x = logits.double().requires_grad_()
    objective = Vanish((PERSON,))
    assert torch.autograd.gradcheck(lambda v: objective.loss(Candidates(v, boxes.double()), [], 0.25), x)


def test_only_strict_lowers_what_else_is_found_on_the_object_and_there_alone():
    logits = torch.full((1, 2, 3), -9.0)
    logits[0, :, BUS] = 2.0
    boxes = torch.tensor([[[20.0, 20.0, 60.0, 60.0], [200.0, 20.0, 240.0, 60.0]]])
    _, gradient = loss_and_gradient(Vanish((PERSON,), strict=True), logits, boxes, OBJECTS[:1])
    assert gradient[0, 0, BUS] > 0
    assert gradient[0, 1, BUS] == 0
    _, gradient = loss_and_gradient(Vanish((PERSON,)), logits, boxes, OBJECTS[:1])
    assert gradient.count_nonzero() == 0


def test_mislabel_gradient_lowers_a_third_class_under_the_new_one():
    logits = torch.full((1, 1, 4), -2.0)
    logits[0, 0, 3] = 4.0
    _, gradient = loss_and_gradient(Mislabel((BUS,), TRAIN), logits, OBJECTS[0][None], OBJECTS[:1])
    assert gradient[0, 0, 3] > 0


def degrade_gradients(objective, gate=None):
    """Gradients of the loss on two candidates, of which the first lies on a person: of logits, boxes and gate."""
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    boxes = torch.tensor([[[20.0, 22.0, 60.0, 60.0], [200.0, 20.0, 240.0, 60.0]]], requires_grad=True)
    gate = None if gate is None else torch.tensor([gate], requires_grad=True)
    candidates = Candidates(logits, boxes, gate=gate)
    objects = detections((PERSON, 1, 20, 20, 60, 60), (BUS, 1, 200, 20, 240, 60))
    loss = objective.loss(candidates, [objective.aim(candidates, objects)], 0.25)
    wanted = [logits, boxes] + ([] if gate is None else [gate])
    return [g if g is None else g[0] for g in torch.autograd.grad(loss.sum(), wanted, allow_unused=True)]


def test_degrade_goes_by_the_parts_of_the_loss_that_it_is_of():
    logits, boxes = degrade_gradients(Degrade((PERSON,), ("class",)))
    assert logits.abs().sum() > 0
    assert boxes is None or boxes.abs().sum() == 0
    logits, boxes = degrade_gradients(Degrade((PERSON,), ("box",)))
    assert logits is None or logits.abs().sum() == 0
    assert boxes.abs().sum() > 0


def test_degrade_takes_the_objects_of_its_classes_alone():
    _, boxes = degrade_gradients(Degrade((PERSON,), ("box",)))
    assert boxes[0].abs().sum() > 0
    assert boxes[1].abs().sum() == 0


def test_degrade_lowers_what_it_is_told_is_there():
    logits, _ = degrade_gradients(Degrade((PERSON,), ("class",)))
    assert logits[0, PERSON] > 0 > logits[0, BUS]


def test_degrade_turns_the_gate_away_from_its_robust_expert_to_the_best_other():
    *_, gate = degrade_gradients(Degrade((PERSON,), gate=10.0, robust=2), gate=[1.0, 3.0, 2.0])
    assert gate.tolist() == [0, -10, 10]


def test_degrade_wants_every_assigned_candidate_whole(bundled, bus):
    box = bundled.letterbox(bus.shape[:2])
    with torch.no_grad():
        candidates = bundled.candidates(frames_tensor([box(bus)]))
    seen = bundled.detect([bus], 0.25)[0]
    objects = Detections(box.boxes_to_frame(seen.boxes), seen.scores, seen.classes)
    assert set(Degrade((PERSON,)).aim(candidates, objects).weights.tolist()) == {1.0}


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
