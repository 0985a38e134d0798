import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from detguard import DetguardError
from detguard.detectors.load import build_model
from detguard.detectors.ultralytics import UltralyticsDetector
from detguard.objectives import Vanish
from detguard.photos import PhotoError, encode_png, frames_tensor, photo_size, read_photo

ARCHITECTURES = [
    "yolov3-tiny.yaml", "yolov5n.yaml", "yolov6n.yaml", "yolov8n.yaml", "yolov9t.yaml", "yolov10n.yaml",
    "yolo11n.yaml", "yolo12n.yaml", "yolo26n.yaml", "rtdetr-l.yaml",
]  # fmt: skip


@pytest.fixture(scope="module", params=ARCHITECTURES)
def untrained(request):
    torch.manual_seed(0)
    model = build_model(request.param, ["person", "bus", "train"])
    return UltralyticsDetector(model, request.param, 128)


def test_the_gradient_reaches_the_photo_in_every_family(untrained, bus):
    letterbox = untrained.letterbox(bus.shape[:2])
    frames = frames_tensor([letterbox(bus)]).requires_grad_()
    candidates = untrained.candidates(frames)
    # Untrained scores are all far under any threshold that matters: one under them all brings all into reach.
    loss = Vanish((0,)).loss(candidates, [], conf=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), frames)
    at_photo = letterbox.pull_back(gradient[0])
    assert at_photo.shape == (3, *bus.shape[:2])
    assert torch.isfinite(at_photo).all()
    assert at_photo.abs().max() > 0


def test_the_tensor_path_is_the_public_predict_path_in_every_family(untrained, bus, bus_file):
    conf = float(untrained.detect([bus], conf=0.0)[0].scores.quantile(0.5))
    ours, theirs = untrained.detect([bus], conf)[0], untrained.predict(bus_file, conf)
    assert len(theirs) > 0
    assert abs(len(ours) - len(theirs)) <= 1
    n = min(len(ours), len(theirs))
    assert torch.allclose(ours.scores[:n], theirs.scores[:n], atol=1e-4)


def test_predicted_boxes_end_where_the_photo_does(bus):
    model = build_model("rtdetr-l.yaml", ["person"])
    for layer in model.model[-1].dec_bbox_head:
        layer.layers[-1].bias.data[2:] += 5  # as wide and as high as the frame
    found = UltralyticsDetector(model, "rtdetr", 128).predict(bus, 1e-6)
    height, width = bus.shape[:2]
    assert len(found) > 9
    assert found.boxes.min() == 0
    assert (found.boxes <= torch.tensor([width, height, width, height])).all()


def test_attacked_networks_are_frozen_and_in_eval_mode(untrained):
    assert not any(p.requires_grad for p in untrained.model.parameters())
    assert not any(m.training for m in untrained.model.modules())


@pytest.mark.parametrize("architecture", ["yolov10n.yaml", "yolo26n.yaml"])
def test_end_to_end_heads_are_attacked_and_predicted_through_the_same_head(architecture, bus, bus_file):
    torch.manual_seed(0)
    model = build_model(architecture, ["person", "bus"])
    with_nms, without = (UltralyticsDetector(model, architecture, 128, end_to_end=e) for e in (False, True))
    frames = frames_tensor([without.letterbox(bus.shape[:2])(bus)]).requires_grad_()
    candidates = without.candidates(frames)
    assert candidates.end_to_end
    assert not with_nms.candidates(frames).end_to_end
    (gradient,) = torch.autograd.grad(candidates.logits.sum(), frames)
    assert gradient.abs().max() > 0
    ours, theirs = without.detect([bus], 1e-6)[0], without.predict(bus_file, 1e-6)
    assert torch.allclose(ours.scores[:50], theirs.scores[:50], atol=1e-4)
    assert ours.scores[:20].tolist() != with_nms.detect([bus], 1e-6)[0].scores[:20].tolist()


def test_a_detector_with_one_head_has_no_end_to_end_head():
    with pytest.raises(DetguardError, match="`end_to_end`"):
        UltralyticsDetector(build_model("yolov8n.yaml", ["person"]), "yolov8n", 128, end_to_end=True)


def test_tensor_path_and_yolo_predict_agree_on_photos_of_eight_shapes(yolo11n, yolo11n_file, val_photos):
    from ultralytics import YOLO

    public = YOLO(str(yolo11n_file))
    chosen = list({photo_size(file): file for file in val_photos}.values())[:8]
    assert len(chosen) == 8
    for file in chosen:
        ours = yolo11n.detect([read_photo(file)], conf=0.1)[0]
        boxes = public.predict(str(file), conf=0.1, imgsz=640, verbose=False)[0].boxes
        assert len(ours) == len(boxes)
        if not len(ours):
            continue
        same = box_iou(ours.boxes, boxes.xyxy).argmax(1)
        assert torch.equal(ours.classes, boxes.cls[same].long())
        assert (ours.scores - boxes.conf[same]).abs().max() < 0.01
        assert (ours.boxes - boxes.xyxy[same]).abs().max() < 1


def test_frames_are_whole_strides_as_the_predictor_makes_them(bundled_model, bus, bus_file):
    detector = UltralyticsDetector(bundled_model, "detguard-n", 300)
    assert detector.imgsz == 320
    assert torch.allclose(detector.detect([bus])[0].boxes, detector.predict(bus_file, 0.25).boxes, atol=0.1)


def test_predicting_leaves_state_and_threads_as_they_were(yolo11n, bus):
    before, threads = yolo11n.state_hash(), torch.get_num_threads()
    yolo11n.predict(np.ascontiguousarray(bus), 0.25)
    assert yolo11n.state_hash() == before
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("name", ["a*.png", "list.txt", "film.mp4", "pages.tif", "cameras.streams", "scan.pdf"])
def test_a_file_of_any_name_is_read_as_the_photo_that_it_is(bundled, bus, tmp_path, name):
    (tmp_path / "a!.png").write_bytes(encode_png(np.zeros((64, 64, 3), np.uint8)))  # what the pattern finds first
    (tmp_path / name).write_bytes(encode_png(bus[:400:4, ::4].copy()))
    ours, theirs = bundled.predict(tmp_path / name, 0.01), bundled.predict(bus[:400:4, ::4].copy(), 0.01)
    assert len(theirs) > 0
    assert torch.equal(ours.boxes, theirs.boxes)


@pytest.mark.parametrize("content", [b"", b"no photo", None])
def test_a_file_that_is_no_photo_is_an_error_that_names_it(bundled, tmp_path, content):
    file = tmp_path / "a.jpg"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PhotoError, match=re.escape(str(file))):
        bundled.predict(file, 0.25)


def test_a_file_that_is_not_one_whole_photo_is_refused_by_either_path(bundled, tmp_path, bus, bus_file):
    (tmp_path / "cut.jpg").write_bytes(bus_file.read_bytes()[:40_000])
    first, second = (Image.fromarray(frame) for frame in (bus, 255 - bus))
    first.save(tmp_path / "moving.png", save_all=True, append_images=[second])
    for name, reason in (("cut.jpg", "cut short"), ("moving.png", "animated")):
        for find in (lambda file: bundled.predict(file, 0.25), lambda file: bundled.detect([file])):
            with pytest.raises(PhotoError, match=rf"{name}: .*{reason}"):
                find(tmp_path / name)


def test_a_folder_that_is_called_like_a_photo_is_none(bundled, tmp_path, bus_file):
    (tmp_path / "a.jpg").mkdir()
    shutil.copy(bus_file, tmp_path / "a.jpg" / "b.jpg")
    with pytest.raises(PhotoError):
        bundled.predict(tmp_path / "a.jpg", 0.25)
