import torch
from scenes import BUS, PERSON, detections

from detguard.detections import Candidates, Detections
from detguard.objectives import Degrade
from detguard.photos import frames_tensor


def degrade_gradients(objective, gate=None):
    """Gradients of the loss on two candidates, of which the first lies on a person: of logits, boxes and gate."""
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    boxes = torch.tensor([[[20.0, 22.0, 60.0, 60.0], [200.0, 20.0, 240.0, 60.0]]], requires_grad=True)
    gate = None if gate is None else torch.tensor([gate], requires_grad=True)
    candidates = Candidates(logits, boxes, gate=gate)
    objects = detections((PERSON, 1, 20, 20, 60, 60), (BUS, 1, 200, 20, 240, 60))
    loss = objective.loss(candidates, [objective.aim(candidates, objects, objective.attacked(objects))], 0.25)
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
    objective = Degrade((PERSON,))
    assert set(objective.aim(candidates, objects, objective.attacked(objects)).weights.tolist()) == {1.0}
