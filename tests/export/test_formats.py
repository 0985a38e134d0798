"""Files of each format find what the detector finds, at other sizes and batches than they were traced with."""

import ast
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics import YOLO

from detguard import DetguardError
from detguard.detections import suppress
from detguard.detectors.gated import GatedDetector, GatedNetwork, detail
from detguard.detectors.load import build_model, fused, load_detector, save_gated
from detguard.detectors.ultralytics import UltralyticsDetector
from detguard.export.base import Deployment
from detguard.export.check import frames_of
from detguard.export.pt import unfused
from detguard.export.run import FORMATS, export, plan_export
from detguard.photos import frames_tensor

SIZE, NECK = 96, 11


def hardened(bundled_model, folder, split=0, names=("adversarial",), sparse=0.0, grown=(), **options):
    """The file of a network as `harden` leaves it, of experts that differ a little, and in full precision; grown: by
    `adapt`, asked about all.
    """
    torch.manual_seed(0)
    made = GatedNetwork(fused(bundled_model), split, names, **options).eval().requires_grad_(False)
    for name, parameter in made.experts.named_parameters():
        if "dfl" not in name:
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    if sparse:
        made.sparsen([torch.rand(2, 3, SIZE, SIZE)], sparse)
    if grown:
        made.grow(grown, 0, "head")
        made.requires_grad_(False).kinds.bias.fill_(0.5)
    card = {"architecture": "yolo11n.yaml", "classes": list(bundled_model.names.values()), "imgsz": SIZE}
    save_gated(made, card, folder / "hard.safetensors")
    return folder / "hard.safetensors"


@pytest.fixture(scope="module")
def single(bundled_model, tmp_path_factory):
    return hardened(bundled_model, tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def ensemble(bundled_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble")
    return hardened(bundled_model, folder, NECK, ("normal", "hard", "adversarial"), 0.2, fusion="bounded:0.5")


@pytest.fixture(scope="module")
def photos(bus):
    return [np.ascontiguousarray(photo) for photo in (bus, bus[:, ::-1], bus[200:700])]


@pytest.fixture
def batch():
    """Three frames of another shape than any that is traced; the last one is noise."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 64, 128, generator=generator)


def made(model, kind, folder, photos, **options):
    """What was wanted, the file, its runtime, and the verdict on it."""
    wanted = plan_export(str(model), kind, photos, **options)
    file = folder / f"made{FORMATS[kind].suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict = export(wanted, kind, file)
    return wanted, file, FORMATS[kind].read(file), verdict


@pytest.fixture(scope="module")
def exported(request, photos, tmp_path_factory):
    """`made` without options, of a network by the name of its fixture: once for all that look at it."""

    @cache
    def once(of, kind):
        return made(request.getfixturevalue(of), kind, tmp_path_factory.mktemp(kind), photos)

    return once


def test_a_hardened_network_becomes_a_checkpoint_that_yolo_and_our_own_reader_take(exported, bus):
    wanted, file, _, verdict = exported("single", "pt")
    assert verdict.passed
    again, known = load_detector(file), wanted.detector.predict(bus, 0.05)
    assert isinstance(again, UltralyticsDetector)
    assert (again.imgsz, again.class_names) == (SIZE, wanted.detector.class_names)
    (theirs,) = YOLO(file).predict(bus[..., ::-1], imgsz=SIZE, conf=0.05, verbose=False, device="cpu")
    assert len(known) > 1
    for boxes, scores in (
        (theirs.boxes.xyxy, theirs.boxes.conf),
        (again.predict(bus, 0.05).boxes, again.predict(bus, 0.05).scores),
    ):
        assert torch.allclose(boxes, known.boxes, atol=0.05)
        assert torch.allclose(scores, known.scores, atol=1e-5)


def test_a_checkpoint_of_a_checkpoint_is_read_again(bundled, photos, tmp_path):
    _, first, _, _ = made("detguard-n", "pt", tmp_path, photos, imgsz=SIZE)
    _, second, _, verdict = made(first, "pt", tmp_path / "again", photos)
    assert verdict.passed
    assert load_detector(second).imgsz == SIZE
    assert load_detector(second).state_hash() == bundled.state_hash()


@pytest.mark.parametrize("architecture", ["yolov8n.yaml", "yolov9c.yaml", "yolo12n.yaml"])
def test_batch_norms_that_were_folded_in_come_back(architecture):
    """Shown the frames of its statistics, a network in training says what it says when it is used."""
    torch.manual_seed(0)
    given = build_model(architecture, ["a", "b"])
    for layer in given.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    network = GatedNetwork(fused(given), 0, ("adversarial",)).eval().requires_grad_(False)
    frames = torch.rand(4, 3, 64, 64)
    model = unfused(network, architecture, [frames])
    with torch.no_grad():
        wanted = network(frames, 0)[0]
        for found in (model.eval()(frames)[1], model.train()(frames)):
            for key in ("scores", "boxes"):
                assert torch.allclose(found[key], wanted[key], atol=1e-3)


def test_a_second_head_that_hardening_dropped_is_told(tmp_path):
    network = GatedNetwork(fused(build_model("yolov10n.yaml", ["a"])), 0, ("adversarial",))
    with pytest.raises(DetguardError, match=r"yolov10n\.yaml has a second head"):
        unfused(network, "yolov10n.yaml", [torch.rand(1, 3, 64, 64)])


def test_yolo_trains_and_validates_a_checkpoint(exported, bundled, tmp_path, tiny_data):
    _, file, _, _ = exported("single", "pt")
    folder = tmp_path / "data"
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for photo in (tiny_data.parent / "images").iterdir():
        (folder / "images" / photo.name).write_bytes(photo.read_bytes())
        (folder / "labels" / f"{photo.stem}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    names = "\n".join(f"  {number}: {name}" for number, name in bundled.class_names.items())
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images\nval: images\nnames:\n{names}\n")
    options = {"data": folder / "data.yaml", "imgsz": 64, "device": "cpu", "workers": 0, "plots": False}
    options |= {"verbose": False, "project": str(tmp_path), "exist_ok": True}
    YOLO(file).val(**options)
    model = YOLO(file)
    model.train(epochs=1, batch=4, optimizer="SGD", lr0=1e-3, amp=False, **options)
    trained = load_detector(tmp_path / "train" / "weights" / "last.pt")
    assert trained.class_names == bundled.class_names


@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
@pytest.mark.parametrize("of", ["single", "ensemble"])
def test_a_graph_says_what_the_network_says_for_any_batch_and_size(kind, of, exported, batch):
    wanted, _, run, verdict = exported(of, kind)
    assert verdict.passed
    assert verdict.compared > 10
    assert ("normal expert alone" in verdict.milliseconds) == (of == "ensemble")
    with torch.no_grad():
        ours, found = wanted.detector.candidates(batch), run(batch)
    assert found.shape == (3, 4 + 13, 168)
    assert torch.allclose(found[:, 4:].transpose(1, 2), ours.logits.sigmoid(), atol=1e-5)
    centres = (ours.boxes[..., :2] + ours.boxes[..., 2:]) / 2
    seen = ours.logits.sigmoid().amax(2) > 1e-3
    assert torch.allclose(found[:, :2].transpose(1, 2)[seen], centres[seen], atol=0.05)


@pytest.mark.parametrize("fusion", ["bounded:0.5", "average:0.5"])
def test_an_ensemble_that_has_grown_becomes_a_graph(fusion, bundled_model, photos, batch, tmp_path):
    names = ("normal", "adversarial")
    model = hardened(bundled_model, tmp_path, NECK, names, grown=("fog",), fusion=fusion)
    for kind in ("onnx", "torchscript"):
        wanted, _, run, verdict = made(model, kind, tmp_path, photos)
        assert verdict.passed
        with torch.no_grad():
            ours, found = wanted.detector.candidates(batch), run(batch)
        assert torch.allclose(found[:, 4:].transpose(1, 2), ours.logits.sigmoid(), atol=1e-5)


@pytest.mark.parametrize("of", ["single", "ensemble"])
def test_no_device_is_written_into_a_torchscript_file(of, exported):
    _, file, *_ = exported(of, "torchscript")
    assert "Device = prim::Constant" not in str(torch.jit.load(file).inlined_graph)


def test_yolo_runs_an_onnx_by_its_metadata(exported, bus):
    import onnx

    wanted, file, _, _ = exported("ensemble", "onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert ast.literal_eval(metadata["names"]) == wanted.detector.class_names
    assert (metadata["imgsz"], metadata["stride"], metadata["task"]) == (f"[{SIZE}, {SIZE}]", "32", "detect")
    (found,) = YOLO(file).predict(bus[..., ::-1], imgsz=SIZE, conf=0.05, verbose=False, device="cpu")
    known = wanted.detector.predict(bus, 0.05)
    assert found.names == wanted.detector.class_names
    assert torch.allclose(found.boxes.xyxy, known.boxes, atol=0.05)
    assert torch.allclose(found.boxes.conf, known.scores, atol=1e-4)


@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_nms_inside_keeps_what_nms_here_keeps(kind, ensemble, photos, batch, tmp_path):
    wanted, _, run, verdict = made(ensemble, kind, tmp_path, photos, nms=True, conf=0.02, iou=0.5)
    assert verdict.passed
    frames = [*frames_of(wanted.detector, photos, square=False), batch, torch.zeros(1, 3, 32, 32)]
    counts = []
    for shown in frames:
        found = run(shown)
        assert found.shape == (len(shown), 300, 6)
        with torch.no_grad():
            known = suppress(wanted.detector.candidates(shown), 0.02, 0.5)
        for rows, ours in zip(found, known, strict=True):
            counts.append(len(ours))
            listed = torch.cat([ours.boxes, ours.scores[:, None], ours.classes[:, None]], 1)
            assert torch.allclose(rows[: len(ours)], listed, atol=0.05)
            assert not rows[len(ours) :].any()
    assert max(counts) > 3
    assert min(counts) == 0


def test_top_k_of_a_graph_decides_for_each_frame_what_is_found(bundled_model, photos, tmp_path):
    file = hardened(bundled_model, tmp_path, NECK, ("normal", "hard"), top_k=1, fusion="average:0.25")
    detector = load_detector(file)
    noise = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    frames = torch.cat([noise, torch.zeros_like(noise)])
    with torch.no_grad():  # a gate that asks one expert for noise and the other for an empty frame
        noisy, plain = detector.model.gate.features(detail(frames))
        turn = noisy - plain
        weight = detector.model.gate.out.weight
        weight.copy_(torch.stack([turn, -turn]))
        detector.model.gate.out.bias.copy_(torch.stack([-turn @ (noisy + plain), turn @ (noisy + plain)]) / 2)
        ours = detector.candidates(frames)
    assert torch.allclose(ours.experts, torch.tensor([[1, 0], [0.25, 0.75]]), atol=1e-5)
    wanted = Deployment(detector, detector.model, "yolo11n.yaml", [frames[:1], frames[1:]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert export(wanted, "onnx", tmp_path / "made.onnx").passed
    found = FORMATS["onnx"].read(tmp_path / "made.onnx")(frames)
    assert torch.allclose(found[:, 4:].transpose(1, 2), ours.logits.sigmoid(), atol=1e-5)


def test_a_static_graph_takes_one_square_frame(single, photos, tmp_path):
    import onnxruntime

    _, file, run, verdict = made(single, "onnx", tmp_path, photos, dynamic=False)
    assert verdict.passed
    (shown,) = onnxruntime.InferenceSession(str(file)).get_inputs()
    assert shown.shape == [1, 3, SIZE, SIZE]
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        run(torch.zeros(1, 3, 64, 64))


def test_a_head_without_nms_lists_its_best(tmp_path):
    torch.manual_seed(0)
    model = build_model("yolo26n.yaml", ["a", "b"])
    detector = UltralyticsDetector(model, "plain", 64, end_to_end=True)
    shown = torch.rand(1, 3, 64, 64)
    wanted = Deployment(detector, model, "yolo26n.yaml", [shown], conf=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict = export(wanted, "onnx", tmp_path / "made.onnx")
    assert verdict.passed
    assert wanted.metadata["end2end"] is True
    assert FORMATS["onnx"].read(tmp_path / "made.onnx")(shown).shape == (1, 300, 6)


@pytest.mark.parametrize("nms", [False, True])
def test_openvino_finds_the_same(nms, ensemble, photos, tmp_path):
    pytest.importorskip("openvino")
    _, file, _, verdict = made(ensemble, "openvino", tmp_path, photos, nms=nms, conf=0.02)
    assert verdict.passed
    assert {one.suffix for one in file.iterdir()} == {".xml", ".bin", ".yaml"}


def test_frames_have_the_strides_of_the_detector(bundled, photos):
    for photo, frames in zip(photos, frames_of(bundled, photos, square=False), strict=True):
        frame = bundled.letterbox(photo.shape[:2])(photo)
        assert torch.equal(frames, frames_tensor([frame]))
    assert {frames.shape for frames in frames_of(bundled, photos, square=True)} == {(1, 3, 320, 320)}


def test_an_ensemble_is_no_checkpoint(ensemble):
    with pytest.raises(DetguardError, match=r"ensemble of 3 experts.* `format` onnx"):
        plan_export(str(ensemble), "pt")
    assert isinstance(load_detector(ensemble), GatedDetector)
