from dataclasses import replace

import numpy as np
import pytest
import supervision as sv
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import batched_nms
from ultralytics.utils.nms import non_max_suppression

from detguard import DetguardError
from detguard.detections import Candidates, Detections, _load_operators, suppress
from detguard.detectors.base import to_photo
from detguard.photos import Letterbox


def test_a_torchvision_made_for_another_torch_is_told(monkeypatch):
    def missing(file):
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(torch.ops, "load_library", missing)
    with pytest.raises(DetguardError, match=r"_C.*: made for another torch.*both from one index \(libcudart"):
        _load_operators()


def candidates(seed, end_to_end=False, batch=1, boxes=400, classes=7):
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers: exact in both libraries' box formats, so that a borderline IoU falls on the same side.
    corner = torch.randint(300, (batch, boxes, 2), generator=generator).float()
    size = torch.randint(3, 60, (batch, boxes, 2), generator=generator).float() * 2
    logits = torch.randn(batch, boxes, classes, generator=generator) * 2 - 2
    return Candidates(logits, torch.cat([corner, corner + size], 2), end_to_end)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.001, 0.25, 0.6]), st.sampled_from([0.45, 0.7]))
def test_suppress_is_ultralytics_nms(seed, conf, iou):
    c = candidates(seed, batch=2)
    middle, size = (c.boxes[..., :2] + c.boxes[..., 2:]) / 2, c.boxes[..., 2:] - c.boxes[..., :2]
    raw = torch.cat([middle, size, c.logits.sigmoid()], 2).transpose(1, 2)
    for ours, theirs in zip(suppress(c, conf, iou), non_max_suppression(raw, conf, iou), strict=True):
        assert torch.allclose(ours.boxes, theirs[:, :4], atol=1e-3)
        assert torch.allclose(ours.scores, theirs[:, 4], atol=1e-6)
        assert torch.equal(ours.classes, theirs[:, 5].long())


def test_an_end_to_end_head_keeps_overlapping_boxes_and_two_classes_of_one_box():
    boxes = torch.tensor([[[0, 0, 10, 10.0]] * 3])
    logits = torch.tensor([[[3.0, 2.0], [1.0, -5.0], [-5.0, -5.0]]])
    both = Candidates(logits, boxes, end_to_end=True, multi_label=True)
    assert len(suppress(both, 0.25, 0.7)[0]) == 3
    assert len(suppress(replace(both, multi_label=False), 0.25, 0.7)[0]) == 2
    assert len(suppress(Candidates(logits, boxes), 0.25, 0.7)[0]) == 1


def test_an_end_to_end_head_finds_no_more_than_it_has_candidates():
    boxes, logits = torch.zeros(1, 2, 4), torch.tensor([[[3.0, 2.0], [1.0, 0.5]]])
    (found,) = suppress(Candidates(logits, boxes, end_to_end=True, multi_label=True), 0.25, 0.7)
    assert found.classes.tolist() == [0, 1]


def test_detections_above_and_of_select_by_confidence_and_class():
    found = suppress(candidates(3), 0.25, 0.7)[0]
    assert (found.above(0.5).scores > 0.5).all()
    assert len(found.above(0.5)) == int((found.scores > 0.5).sum())
    assert set(found.of([2, 4]).classes.tolist()) == {2, 4}


@pytest.mark.parametrize("whole", [True, False])
def test_a_family_that_shows_every_class_over_the_threshold_shows_both_classes_of_one_box(whole):
    boxes = torch.tensor([[[0.0, 0, 10, 10]]])
    candidates = Candidates(torch.tensor([[[2.0, 1.0, -5.0]]]), boxes, multi_label=True)
    (found,) = suppress(candidates if whole else candidates[:1], 0.25, 0.7)
    assert found.classes.tolist() == [0, 1]
    (best,) = suppress(replace(candidates, multi_label=False), 0.25, 0.7)
    assert best.classes.tolist() == [0]


def test_evaluation_may_ask_any_family_for_every_class_over_the_threshold():
    candidates = Candidates(torch.tensor([[[2.0, 1.0, -5.0]]]), torch.tensor([[[0.0, 0, 10, 10]]]))
    (found,) = suppress(candidates, 0.25, 0.7, multi_label=True)
    assert found.classes.tolist() == [0, 1]
    assert [len(suppress(candidates, conf, 0.7, multi_label=True)[0]) for conf in (0, 1)] == [3, 0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([100.0, 9000.0, 60000.0]))
def test_classes_are_kept_apart_on_photos_of_any_size(seed, size):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(1, 60, 2, generator=generator) * size - 0.1 * size
    boxes = torch.cat([corners, corners + size * (0.1 + 0.3 * torch.rand(1, 60, 2, generator=generator))], 2)
    logits = 4 * torch.rand(1, 60, 5, generator=generator) - 2
    (found,) = suppress(Candidates(logits, boxes), 0.3, 0.5, multi_label=True)
    scores = logits[0].sigmoid()
    index, classes = (scores > 0.3).nonzero(as_tuple=True)
    kept = batched_nms(boxes[0, index], scores[index, classes], classes, 0.5)
    ours, wanted = sorted(zip(found.classes.tolist(), found.scores.tolist(), strict=True)), scores[index, classes]
    theirs = sorted(zip(classes[kept].tolist(), wanted[kept].tolist(), strict=True))
    assert [one for one, _ in ours] == [one for one, _ in theirs]
    assert torch.allclose(torch.tensor([one for _, one in ours]), torch.tensor([one for _, one in theirs]))


@pytest.mark.parametrize("multi_label", [True, False])
@pytest.mark.parametrize("end_to_end", [True, False])
def test_where_each_class_has_its_own_box_a_detection_has_that_of_its_class(multi_label, end_to_end):
    boxes = torch.tensor([[[[0.0, 0, 10, 10], [20, 0, 30, 10]], [[0, 1, 10, 11], [40, 0, 50, 10]]]])
    logits, none = torch.tensor([[[2.0, 1.0], [1.5, 3.0]]]), torch.full((1, 2, 2), -9.0)
    # As many more candidates of nothing: an end-to-end head finds no more than it has.
    logits, boxes = torch.cat([logits, none], 1), torch.cat([boxes, boxes], 1)
    candidates = Candidates(logits, boxes, end_to_end, multi_label=multi_label)
    (found,) = suppress(candidates, 0.25, 0.7)
    kept = [(1, [40, 0, 50, 10]), (0, [0, 0, 10, 10])]  # best first
    if end_to_end and multi_label:
        kept += [(0, [0, 1, 10, 11]), (1, [20, 0, 30, 10])]
    elif multi_label:
        kept += [(1, [20, 0, 30, 10])]
    assert list(zip(found.classes.tolist(), found.boxes.tolist(), strict=True)) == kept
    assert candidates.best_boxes[0, :2].tolist() == [[0, 0, 10, 10], [40, 0, 50, 10]]


def test_they_go_to_supervision_and_back(bus, bundled):
    found = bundled.detect([bus])[0]
    theirs = found.to_supervision(bundled.class_names)
    assert isinstance(theirs, sv.Detections)
    assert theirs["class_name"].tolist() == [bundled.class_names[c] for c in found.classes.tolist()]
    assert sv.BoxAnnotator().annotate(bus.copy(), theirs).shape == bus.shape
    back = Detections.from_supervision(theirs[theirs.confidence > 0.5])
    kept = found.above(0.5)
    assert 0 < len(kept) == len(back)
    assert all(torch.equal(getattr(kept, name), getattr(back, name)) for name in ("boxes", "scores", "classes"))


def test_those_of_supervision_come_best_first():
    boxes = np.array([[0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 3, 3]])
    found = sv.Detections(boxes, confidence=np.array([0.2, 0.9, 0.2]), class_id=np.arange(3))
    back = Detections.from_supervision(found)
    assert back.classes.tolist() == [1, 0, 2]
    assert back.boxes[:, 3].tolist() == [2, 1, 3]
    assert back.scores.tolist() == pytest.approx([0.9, 0.2, 0.2])


def test_none_go_to_supervision_and_back():
    none = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert len(Detections.from_supervision(none.to_supervision({}))) == 0


def test_labels_of_supervision_are_sure_and_need_classes():
    labels = sv.Detections(xyxy=torch.tensor([[1.0, 2, 3, 4]]).numpy(), class_id=torch.tensor([5]).numpy())
    assert Detections.from_supervision(labels).scores.tolist() == [1]
    labels.class_id = None
    with pytest.raises(DetguardError, match="no class_id"):
        Detections.from_supervision(labels)


def test_what_lies_behind_a_thousand_boxes_of_one_object_is_found_too():
    boxes = torch.tensor([[[0.0, 0, 10, 10]] * 2000 + [[50.0, 50, 60, 60]]])
    logits = torch.cat([torch.linspace(3, 1, 2000), torch.tensor([0.0])])[None, :, None]
    assert suppress(Candidates(logits, boxes), 0.25, 0.7)[0].boxes.tolist() == [[0, 0, 10, 10], [50, 50, 60, 60]]


@pytest.mark.parametrize("end_to_end", [True, False])
def test_candidates_of_another_precision_are_found_as_floats(end_to_end):
    logits, boxes = torch.tensor([[[2.0]]]), torch.tensor([[[1.0, 1, 9, 9]]])
    for kind in (torch.float64, torch.bfloat16):
        (found,) = suppress(Candidates(logits.to(kind), boxes.to(kind), end_to_end=end_to_end), 0.25, 0.7)
        assert found.boxes.dtype == found.scores.dtype == torch.float32


@pytest.mark.parametrize("end_to_end", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_box_that_is_none_is_not_found_and_hides_no_other(bundled, end_to_end, value):
    boxes = torch.tensor([[0.0, 0, 10, 10], [value, 0, 10, 10], [50, 50, 80, 80], [50, 50, 80, 81]])
    found = Candidates(torch.tensor([[[3.0], [4.0], [2.0], [1.0]]]), boxes[None], end_to_end)
    (kept,) = suppress(found, 0.25, 0.7)
    kept = to_photo(kept, Letterbox.whole((100, 100)))
    assert torch.equal(kept.boxes, boxes[[0, 2, 3] if end_to_end else [0, 2]])  # NMS works on
