"""Ultralytics' segment and pose models, of which the boxes are attacked; those of turned boxes are refused."""

import copy

import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import OBBModel, PoseModel, SegmentationModel

from detguard import DetguardError
from detguard.detectors.contract import check_contract
from detguard.detectors.load import build_model, load_detector, load_model
from detguard.photos import frames_tensor

KINDS = {
    "yolov8n-seg": SegmentationModel, "yolo11n-seg": SegmentationModel, "yolo26n-seg": SegmentationModel,
    "yolo11n-pose": PoseModel, "yolo26n-pose": PoseModel, "yolo11n-obb": OBBModel,
}  # fmt: skip


@pytest.fixture(scope="module")
def photo(bus):
    return bus[300:620:2, :320:2].copy()


@pytest.fixture(scope="module")
def files(tmp_path_factory, photo):
    """Checkpoints with random weights, of which the scores vary as of trained ones."""
    root, made = tmp_path_factory.mktemp("tasks"), {}

    def file(name):
        if name not in made:
            torch.manual_seed(0)
            model = KINDS[name](f"{name}.yaml", nc=2, verbose=False)
            model.names, model.args = {0: "person", 1: "bus"}, {"imgsz": 160}
            model.task = {"seg": "segment"}.get(name[8:], name[8:])
            head = model.model[-1]
            feats, frames = [], frames_tensor([photo, photo[::-1].copy()])
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = None
            hook = head.register_forward_pre_hook(lambda _, inputs: feats.append(inputs[0]))
            with torch.no_grad():
                for mode in (True, False):
                    model.train(mode)(frames)
                hook.remove()
                for parts in (head.cv3, getattr(head, "one2one_cv3", [])):
                    for part, seen in zip(parts, feats[-1], strict=False):
                        part[-1].bias.zero_()
                        scale = 2 / part(seen).std()
                        part[-1].weight *= scale
                        part[-1].bias -= part(seen).mean() + 3
            made[name] = root / f"{name}.pt"
            torch.save({"model": copy.deepcopy(model), "ema": None}, made[name])
        return made[name]

    return file


@pytest.mark.parametrize("name", [name for name in KINDS if "obb" not in name])
def test_boxes_are_those_that_come_with_masks_or_keypoints(files, photo, name):
    detector = load_detector(files(name))
    conf = float(detector.detect([photo], 0.01)[0].scores[:20].median())
    assert {p.name: p.seen for p in check_contract(detector, photo, conf) if p.state == "BROKEN"} == {}
    public = YOLO(files(name))
    options = {"nms": True} if "26" in name else {}
    whole = public.predict(photo[..., ::-1].copy(), conf=conf, iou=0.7, imgsz=160, verbose=False, **options)[0]
    assert (whole.masks if "seg" in name else whole.keypoints) is not None
    ours = detector.predict(photo, conf)
    # Ultralytics leaves out a box in which no pixel is of its mask.
    assert 3 < len(whole.boxes) <= len(ours)
    apart = (ours.boxes[:, None] - whole.boxes.xyxy).abs().amax(2) + (ours.scores[:, None] - whole.boxes.conf).abs()
    assert apart.min(0).values.max() < 0.05
    if "pose" in name:
        assert len(whole.boxes) == len(ours)


def test_what_is_read_is_a_network_of_boxes(files):
    network, size = load_model(files("yolo11n-seg"))
    plain = build_model("yolo11n-seg.yaml", ["person", "bus"])
    assert size == 160
    assert network.yaml["yaml_file"] == plain.yaml["yaml_file"] == "yolo11n.yaml"
    assert network.state_dict().keys() == plain.state_dict().keys()
    assert type(network.model[-1]).__name__ == "Detect"


def test_what_is_hardened_of_it_is_that_network(files, photo):
    from detguard.hardening.run import check_teacher

    file = files("yolo11n-seg")
    check_teacher(load_model(file)[0], load_detector(file), str(file), "gated", pretrain=False)


def test_models_of_turned_boxes_are_refused(files):
    with pytest.raises(DetguardError, match="of the kind OBBModel; only upright boxes"):
        load_detector(files("yolo11n-obb"))


def test_a_trusted_one_is_asked_for_without_trust(files):
    with pytest.raises(DetguardError, match="without --trust"):
        load_detector(files("yolo11n-seg"), trust=True)
