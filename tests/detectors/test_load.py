import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint

from detguard import DetguardError
from detguard.detectors.load import (
    build_model,
    detector_config,
    find_weights,
    fused,
    load_configured,
    load_detector,
    load_model,
)
from detguard.detectors.pickles import Record
from detguard.detectors.recipe import frame_size
from detguard.detectors.ultralytics import check_official
from detguard.files import shipped
from detguard.ranks import Ranks

# What the card of an ensemble says.
GATED = {
    "split": 0, "experts": ["a"], "top_k": None, "fusion": "average:0", "sparse": [], "shared": {}, "grown": 0,
}  # fmt: skip


class Command:
    """Unpickled without an allow-list, this runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def hostile_checkpoint(file, command):
    """A torch.save archive whose pickle runs `command` when it is loaded."""
    torch.save({"model": torch.zeros(1)}, file)
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, pickle.dumps({"model": Command(command)}, 2) if name.endswith("data.pkl") else data)


def test_a_pickle_that_would_run_a_command_is_refused_and_does_not_run(tmp_path):
    file, proof = tmp_path / "evil.pt", tmp_path / "ran"
    hostile_checkpoint(file, f"touch {proof}")
    with pytest.raises(DetguardError, match=r"refused.*`trust`"):
        load_detector(file)
    assert not proof.exists()


def test_the_hostile_checkpoint_of_these_tests_is_hostile(tmp_path):
    file, proof = tmp_path / "evil.pt", tmp_path / "ran"
    hostile_checkpoint(file, f"touch {proof}")
    with pytest.raises(DetguardError):
        load_detector(file, trust=True)
    assert proof.exists()


@pytest.mark.parametrize(
    ("name", "data"), [("cut.pt", b"PK\x03\x04 cut short"), ("empty.pt", b""), ("text.pt", b"hello")]
)
def test_damaged_checkpoints_are_one_line_errors(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DetguardError, match=name) as caught:
        load_detector(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_a_network_are_an_error(tmp_path):
    torch.save({"model": {"a": torch.zeros(3)}}, tmp_path / "state.pt")
    with pytest.raises(DetguardError, match="holds no Ultralytics model"):
        load_detector(tmp_path / "state.pt")


@pytest.mark.parametrize("name", ["nowhere.pt", "yolo99z", "../weights/detguard-n"])
def test_unknown_names_are_errors_that_list_what_there_is(name):
    with pytest.raises(DetguardError, match="detguard-n"):
        load_detector(name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("yolo11", "yolo11n"), ("yolov11s", "yolo11s"), ("yolo8m.pt", "yolov8m"), ("rtdetr", "rtdetr-l"),
     ("retinanet_resnet50", "retinanet_resnet50_fpn")],
)  # fmt: skip
def test_a_name_that_is_nearly_official_is_answered_by_that_one(name, meant):
    with pytest.raises(DetguardError, match=rf"^{name}: no such \w+; did you mean {meant}\?$"):
        load_detector(name)


def test_only_an_architecture_in_a_json_is_told_how_it_is_written_there():
    with pytest.raises(DetguardError) as named:
        load_detector("nowhere")
    assert "in a json" not in str(named.value)
    assert len(str(named.value)) < 300
    with pytest.raises(DetguardError, match=r"in a json yolo11n\.yaml") as built:
        build_model("nowhere", ["a"])
    assert "PekingU" in str(named.value)
    assert "PekingU" not in str(built.value)  # no json can ask for one of a hub


def as_ultralytics_saves(model, file, size=320):
    """Write a model as Ultralytics' trainer does: its half-precision average alone, without the optimizer."""
    model.args, model.task = {"imgsz": size, "task": "detect"}, "detect"
    torch.save({"epoch": -1, "model": None, "ema": copy.deepcopy(model).half(), "updates": None}, file)


# Of each family the smallest, and each kind of layer.
OFFICIAL = [
    "yolov3-tiny.yaml", "yolov5n.yaml", "yolov5n-p6.yaml", "yolov6n.yaml", "yolov8n-ghost-p2.yaml", "yolov8n.yaml",
    "yolov9t.yaml", "yolov10n.yaml", "yolo11n.yaml", "yolo12n.yaml", "yolo26n.yaml", "rtdetr-resnet50.yaml",
]  # fmt: skip


@pytest.mark.parametrize("architecture", OFFICIAL)
def test_checkpoints_give_the_network_that_was_saved(tmp_path, architecture):
    torch.manual_seed(0)
    model = build_model(architecture, ["person", "bus", "train"])
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    as_ultralytics_saves(model, tmp_path / "best.pt")
    found, size = load_model(tmp_path / "best.pt")
    saved = copy.deepcopy(model).half().float()
    assert size == 320
    assert found.names == model.names
    assert found.save == model.save
    assert list(found.stride) == list(model.stride)
    theirs = saved.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in found.state_dict().items())
    frames = torch.rand(1, 3, 192, 192)
    with torch.no_grad():
        ours, expected = (fused(network)(frames)[0] for network in (found, saved))
    assert torch.equal(ours, expected)


def test_a_checkpoint_of_the_training_so_far_is_read_too(tmp_path):
    model = build_model("yolov8n.yaml", ["person"])
    optimizer = torch.optim.AdamW(model.parameters())
    (model(torch.rand(1, 3, 64, 64))["boxes"].sum()).backward()
    optimizer.step()
    state = {"epoch": 3, "model": model, "ema": None, "optimizer": optimizer.state_dict(), "train_args": {"lr0": 0.01}}
    torch.save(state, tmp_path / "last.pt")
    assert load_detector(tmp_path / "last.pt", 64).class_names == {0: "person"}


def test_shared_checkpoints_find_what_unpickled_ones_find(yolo11n_file, bus):
    for file in yolo11n_file.parent.glob("*.pt"):
        ours, theirs = load_detector(file), load_detector(file, trust=True)
        assert ours.state_hash() == theirs.state_hash()
        assert ours.imgsz == theirs.imgsz
        ours, theirs = (detector.detect([bus])[0] for detector in (ours, theirs))
        assert ours.boxes.equal(theirs.boxes)
        assert ours.scores.equal(theirs.scores)


def test_neither_ultralytics_nor_its_settings_decide_how_files_are_read(tmp_path):
    file, proof = tmp_path / "evil.pt", tmp_path / "ran"
    hostile_checkpoint(file, f"touch {proof}")
    code = f"import ultralytics; from detguard.detectors.load import load_detector; load_detector({str(file)!r})"
    environment = os.environ | {"ULTRALYTICS_SAFE_LOAD": "0", "YOLO_AUTOINSTALL": "true"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "refused" in done.stderr
    assert not proof.exists()


def test_a_file_by_an_official_name_must_be_that_network(tmp_path, monkeypatch):
    from ultralytics.utils import SETTINGS

    monkeypatch.setitem(SETTINGS, "weights_dir", str(tmp_path))
    as_ultralytics_saves(build_model("yolo11n.yaml", ["person"]), tmp_path / "yolo11n.pt")
    with pytest.raises(DetguardError, match=r"yolo11n\.pt: its classes are not COCO's"):
        load_detector("yolo11n")
    shutil.copy(tmp_path / "yolo11n.pt", tmp_path / "yolo11x.pt")
    with pytest.raises(DetguardError, match=r"yolo11x\.pt: its network is of size n"):
        load_detector("yolo11x")


def test_a_folder_that_is_called_like_official_weights_does_not_hide_them(tmp_path, monkeypatch):
    from ultralytics.utils import SETTINGS

    monkeypatch.setitem(SETTINGS, "weights_dir", str(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)
    for folder in ("weights", "yolo11n"):
        Path(folder).mkdir()
    Path("weights/yolo11n.pt").touch()
    assert find_weights("yolo11n") == tmp_path / "weights/yolo11n.pt"
    Path("yolo11n/config.json").touch()  # as save_pretrained writes it: the user's own
    with pytest.raises(DetguardError, match=r"yolo11n: (has no model\.safetensors|needs transformers)"):
        find_weights("yolo11n")


@pytest.mark.parametrize(
    ("name", "classes"),
    [("yolov8x-pose-p6.pt", {0: "person"}), ("yolo26n-objv1-150.pt", {0: "a"}), ("yolov8n-oiv7.pt", {0: "a"})],
)
def test_official_names_of_other_data_have_other_classes(name, classes):
    check_official(Path(name), SimpleNamespace(names=classes, yaml={}))
    with pytest.raises(DetguardError, match="its classes are not COCO's"):
        check_official(Path(name.split("-")[0]), SimpleNamespace(names=classes, yaml={}))


def test_the_bundled_detector_knows_people_and_vehicles(bundled):
    assert {"person", "bicycle", "car", "motorcycle", "bus", "train", "truck"} <= set(bundled.class_names.values())
    assert bundled.imgsz == 320


@pytest.mark.parametrize("given", [{"imgsz": 160}, SimpleNamespace(imgsz=160), Record("args", state={"imgsz": 160})])
def test_the_frame_size_is_that_of_the_training(given):
    assert frame_size(given) == 160


@pytest.mark.parametrize("given", [None, "imgsz=160", 7, [160], object(), SimpleNamespace(), Record("args", state="x")])
def test_without_arguments_that_can_be_read_frames_are_as_usual(given):
    assert frame_size(given) == 640


@pytest.fixture
def own_copy(tmp_path):
    for suffix in (".safetensors", ".json"):
        shutil.copy(shipped("weights") / f"detguard-n{suffix}", tmp_path / f"own{suffix}")
    return tmp_path / "own.safetensors"


def test_safetensors_load_from_any_folder_to_the_same_weights(own_copy, bundled):
    assert load_detector(own_copy).state_hash() == bundled.state_hash()


@pytest.mark.parametrize(
    "entry",
    [
        {"imgsz": float("inf")}, {"imgsz": float("nan")}, {"imgsz": 10**400}, {"imgsz": 0}, {"imgsz": "320"},
        {"imgsz": True}, {"classes": 3}, {"classes": [["person"]] * 13}, {"classes": ["x" * 10**6] * 13},
        {"classes": []}, {"architecture": ["yolo11n.yaml"]}, {"architecture": None}, {"gated": {}}, {"gated": 1},
        {"gated": GATED | {"experts": ["a"] * 64}},
        {"gated": GATED | {"split": float("inf")}},
        {"gated": GATED | {"fusion": "average:nan"}},
    ],
    ids=str,
)  # fmt: skip
def test_a_card_that_says_something_odd_is_one_line(own_copy, entry):
    card = json.loads(own_copy.with_suffix(".json").read_text()) | entry
    own_copy.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(DetguardError, match=r"own\.(json|safetensors)") as caught:
        load_detector(own_copy)
    assert "\n" not in str(caught.value)


def test_a_card_may_give_both_sides_of_a_frame_as_ultralytics_does(own_copy):
    card = json.loads(own_copy.with_suffix(".json").read_text()) | {"imgsz": [256, 320]}
    own_copy.with_suffix(".json").write_text(json.dumps(card))
    assert load_detector(own_copy).imgsz == 320


def test_weights_that_are_not_finite_are_an_error(own_copy):
    tensors = load_file(own_copy)
    tensors["model.0.conv.weight"].view(-1)[0] = float("inf")
    save_file(tensors, own_copy)
    with pytest.raises(DetguardError, match="not finite"):
        load_detector(own_copy)


@pytest.mark.parametrize(
    "architecture",
    ["../../evil.yaml", "evil.yaml", "yolo11n-cls.yamlx", "", "yolo11n-obb.yaml", "yolo11-cls-resnet18.yaml"],
)
def test_only_detectors_that_ultralytics_ships_are_built(own_copy, architecture):
    card = json.loads(own_copy.with_suffix(".json").read_text()) | {"architecture": architecture}
    own_copy.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(DetguardError, match="not an architecture"):
        load_detector(own_copy)


def test_weights_of_another_architecture_are_an_error(own_copy):
    card = json.loads(own_copy.with_suffix(".json").read_text()) | {"architecture": "yolov8n.yaml"}
    own_copy.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(DetguardError, match=r"not the weights of yolov8n\.yaml"):
        load_detector(own_copy)


def test_cut_safetensors_are_an_error(own_copy):
    own_copy.write_bytes(own_copy.read_bytes()[:1000])
    with pytest.raises(DetguardError, match="damaged"):
        load_detector(own_copy)


def test_a_missing_card_is_an_error(own_copy):
    own_copy.with_suffix(".json").unlink()
    with pytest.raises(DetguardError, match=r"own\.json"):
        load_detector(own_copy)


def test_unknown_classes_suggest_the_nearest(bundled):
    with pytest.raises(DetguardError, match="did you mean 'person'"):
        bundled.class_index("persn")
    assert bundled.class_index("PERSON") == 0


def test_scales_are_told_by_the_name():
    small, large = (sum(p.numel() for p in build_model(f"yolo11{s}.yaml", ["a"]).parameters()) for s in "ns")
    assert large > 2 * small


def test_an_overlap_of_nms_is_kept_with_the_run_and_changes_what_is_found(bus):
    loose, usual = load_detector(iou=0.95), load_detector()
    assert len(loose.predict(bus, 0.25)) > len(usual.predict(bus, 0.25)) == len(usual.predict(bus, 0.25, 0.7))
    assert len(loose.detect([bus], 0.25)[0]) == len(loose.predict(bus, 0.25))
    again = load_configured(detector_config(loose, "detguard-n"))
    assert again.iou == 0.95
    with pytest.raises(DetguardError, match="iou"):
        load_configured(detector_config(usual, "detguard-n") | {"iou": 7})


def test_a_yolo_object_is_taken_as_it_is_in_memory_and_left_alone(bus):
    yolo = YOLO("yolo11n.yaml")
    first = load_detector(yolo, imgsz=320)
    with torch.no_grad():
        next(yolo.model.parameters()).mul_(2)
    second = load_detector(yolo, imgsz=320)
    assert first.state_hash() != second.state_hash()
    assert not yolo.model.is_fused()
    theirs = yolo.predict(bus[..., ::-1], imgsz=320, conf=0.0001, verbose=False)[0].boxes  # which fuses it
    found = second.predict(bus, 0.0001)
    assert len(found)
    assert torch.allclose(found.boxes, theirs.xyxy.cpu(), atol=0.01)
    assert load_detector(yolo, imgsz=320).state_hash() == second.state_hash()


def test_a_yolo_object_is_called_as_the_weights_that_it_has_now(tmp_path):
    yolo = YOLO("yolo11n.yaml")
    yolo.save(tmp_path / "best.pt")
    yolo.model, yolo.ckpt = load_checkpoint(tmp_path / "best.pt")  # as its `train` ends
    detector = load_detector(yolo, imgsz=320)
    assert (detector.name, detector.source) == ("best", str(tmp_path / "best.pt"))


@pytest.mark.parametrize(
    "option",
    [
        {"iou": 2.0}, {"iou": -1}, {"imgsz": -5}, {"imgsz": 0}, {"imgsz": "320"}, {"top_k": -1}, {"top_k": 0},
        {"top_k": 1.5}, {"device": "meta"}, {"device": None}, {"fusion": ""},
    ],
)  # fmt: skip
def test_options_out_of_their_range_are_named(option):
    with pytest.raises(DetguardError, match=f"`{next(iter(option))}`"):
        load_detector("detguard-n-hard", **option)


def test_a_device_may_be_one_of_torch_and_one_that_is_not_there_is_named_everywhere():
    assert load_detector(device=torch.device("cpu")).device == torch.device("cpu")
    for device in (77, "77", torch.device("cuda:77")):
        with pytest.raises(DetguardError, match="`device` cuda:77: cannot be used"):
            load_detector(device=device)
    with pytest.raises(DetguardError, match="`device` gpu: cannot be used"):
        Ranks.start("gpu")


def test_a_network_with_a_layer_called_fusion_is_no_ensemble(bundled):
    detector = copy.copy(bundled)
    detector.model = torch.nn.ModuleDict({"fusion": torch.nn.Identity()})
    assert detector_config(detector, "mine:make")["fusion"] is None


def test_of_other_objects_it_says_what_it_takes():
    with pytest.raises(DetguardError, match="dict: expected a name, a file, or a YOLO object"):
        load_detector({})


def test_training_does_not_begin_with_a_function_of_ones_own():
    with pytest.raises(DetguardError, match="adapter:make: is made by your own function; training begins with"):
        load_model("adapter:make")


def test_a_function_of_ones_own_may_change_the_working_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moves_away.py").write_text("import os\n\ndef make(device):\n    os.chdir('/')\n    return None\n")
    before = list(sys.path)
    with pytest.raises(DetguardError, match="returned NoneType"):
        load_detector("moves_away:make", trust=True)
    assert sys.path == before
