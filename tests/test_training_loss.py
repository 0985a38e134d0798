from dataclasses import replace

import pytest
import torch

from detguard.detections import Anchors, Candidates, Detections
from detguard.photos import frames_tensor
from detguard.training_loss import GAINS, Assignment, assign, detection_loss


@pytest.fixture(scope="module")
def scene(bundled, bus):
    """Candidates of the bus photo, and what the detector finds there as its labels, in frame pixels."""
    box = bundled.letterbox(bus.shape[:2])
    with torch.no_grad():
        candidates = bundled.candidates(frames_tensor([box(bus)]))
    found = bundled.detect([bus], 0.25)[0]
    return candidates, Detections(box.boxes_to_frame(found.boxes), torch.ones(len(found)), found.classes)


def test_every_object_gets_candidates_that_lie_in_it(scene):
    candidates, objects = scene
    assignment = assign(candidates, [objects])
    assert len(objects) >= 3
    for box, index in zip(objects.boxes, objects.classes, strict=True):
        mine = (assignment.boxes == box).all(1)
        assert mine.any()
        assert (assignment.classes[mine] == index).all()
        points = candidates.anchors.points[assignment.candidates[mine]]
        assert ((points >= box[:2] - 8) & (points <= box[2:] + 8)).all()
    assert ((assignment.weights > 0) & (assignment.weights <= 1)).all()


def test_it_equals_the_training_loss_of_ultralytics(bundled_model, bundled, bus, scene):
    from types import SimpleNamespace

    from ultralytics.utils.loss import v8DetectionLoss
    from ultralytics.utils.ops import xyxy2xywhn

    candidates, objects = scene
    box = bundled.letterbox(bus.shape[:2])
    bundled_model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)
    bundled_model.eval()
    with torch.no_grad():
        _, raw = bundled.model(frames_tensor([box(bus)]))
    batch = {
        "batch_idx": torch.zeros(len(objects)),
        "cls": objects.classes.float(),
        "bboxes": xyxy2xywhn(objects.boxes, w=box.frame[1], h=box.frame[0]),
    }
    _, parts = v8DetectionLoss(bundled_model).loss(raw, batch)
    ours = detection_loss(candidates, assign(candidates, [objects]))
    wanted = {"box": parts["box_loss"], "class": parts["cls_loss"], "distance": parts["dfl_loss"]}
    assert {k: pytest.approx(float(v), rel=1e-3) for k, v in wanted.items()} == {k: float(v) for k, v in ours.items()}


def test_a_batch_is_its_frames_one_by_one(scene):
    candidates, objects = scene
    anchors = candidates.anchors
    twice = Candidates(
        candidates.logits.repeat(2, 1, 1),
        candidates.boxes.repeat(2, 1, 1),
        anchors=Anchors(anchors.points, anchors.strides, anchors.bins.repeat(2, 1, 1, 1)),
    )
    few = objects[:1]
    both = detection_loss(twice, assign(twice, [objects, few]))
    stacked = detection_loss(twice, Assignment.stack([assign(candidates, [objects]), assign(candidates, [few])]))
    for part in GAINS:
        alone = [detection_loss(candidates, assign(candidates, [o]))[part] for o in (objects, few)]
        assert torch.allclose(both[part], torch.cat(alone), rtol=1e-4)
        assert torch.allclose(both[part], stacked[part], rtol=1e-4)


def test_a_frame_without_objects_has_background_loss_only(scene):
    candidates, objects = scene
    losses = detection_loss(candidates, assign(candidates, [objects[:0]]))
    assert losses["class"] > 0
    assert losses["box"] == losses["distance"] == 0


def test_heads_without_anchors_are_assigned_by_their_boxes(scene):
    candidates, objects = scene
    bare = Candidates(candidates.logits, candidates.boxes, end_to_end=True)
    losses = detection_loss(bare, assign(bare, [objects]))
    assert losses["class"] > 0
    assert losses["box"] > 0
    assert losses["distance"] == 0


def test_its_gradient_is_the_slope(scene):
    candidates, objects = scene
    assignment = assign(candidates, [objects])
    torch.manual_seed(0)
    direction = torch.randn_like(candidates.logits, dtype=torch.float32)

    def loss(logits):
        losses = detection_loss(Candidates(logits, candidates.boxes, anchors=candidates.anchors), assignment)
        return sum(losses.values()).sum()

    logits = candidates.logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    step = 1e-2
    with torch.no_grad():
        slope = (loss(logits + step * direction) - loss(logits - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=2e-2)


def test_classes_that_are_not_labelled_do_not_count(scene):
    candidates, objects = scene
    known = torch.ones(1, candidates.logits.shape[2])
    known[0, 5] = 0
    logits = candidates.logits.clone()
    logits[..., 5] += 20  # sure of what nobody labelled
    sure = replace(candidates, logits=logits)
    kept = objects[objects.classes != 5]
    masked = (detection_loss(c, assign(candidates, [kept]), known)["class"] for c in (candidates, sure))
    whole = [detection_loss(c, assign(candidates, [kept]))["class"] for c in (candidates, sure)]
    assert len({float(value) for value in masked}) == 1
    assert whole[1] > whole[0] + 1


def test_where_each_class_has_its_own_box_that_of_the_object_counts(scene):
    candidates, objects = scene
    assignment = assign(candidates, [objects])
    wanted = detection_loss(candidates, assignment)
    own = candidates.boxes[:, :, None].repeat(1, 1, candidates.logits.shape[2], 1)
    each = replace(candidates, boxes=own)
    assert torch.equal(assign(each, [objects]).candidates, assignment.candidates)
    own[..., [c for c in range(own.shape[2]) if c not in objects.classes.tolist()], :] += 50
    for name, loss in detection_loss(each, assignment).items():
        assert torch.equal(loss, wanted[name])
