import io
import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch

from detguard import DetguardError
from detguard.detectors.load import build_model, load_detector, weights_folder


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
    with pytest.raises(DetguardError, match=r"refused.*--trust"):
        load_detector(file)
    assert not proof.exists()


def test_the_hostile_checkpoint_of_these_tests_is_hostile(tmp_path):
    file, proof = tmp_path / "evil.pt", tmp_path / "ran"
    hostile_checkpoint(file, f"touch {proof}")
    with pytest.raises(DetguardError):
        load_detector(file, trust=True)
    assert proof.exists()


def test_a_network_recipe_that_would_run_code_is_not_evaluated(tmp_path):
    proof = tmp_path / "ran"
    recipe = {"nc": 1, "activation": f"open({str(proof)!r}, 'w')", "backbone": [], "head": []}

    class Build:
        def __reduce__(self):
            from ultralytics.nn.tasks import DetectionModel

            return DetectionModel, (recipe,)

    torch.save({"model": Build()}, tmp_path / "evil.pt")
    with pytest.raises(DetguardError):
        load_detector(tmp_path / "evil.pt")
    assert not proof.exists()


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


def test_both_shared_checkpoints_load(yolo11n_file):
    for file in yolo11n_file.parent.glob("*.pt"):
        assert len(load_detector(file).class_names) == 80


def test_the_bundled_detector_knows_people_and_vehicles(bundled):
    assert {"person", "bicycle", "car", "motorcycle", "bus", "train", "truck"} <= set(bundled.class_names.values())
    assert bundled.imgsz == 320


@pytest.fixture
def own_copy(tmp_path):
    for suffix in (".safetensors", ".json"):
        shutil.copy(weights_folder() / f"detguard-n{suffix}", tmp_path / f"own{suffix}")
    return tmp_path / "own.safetensors"


def test_safetensors_load_from_any_folder_to_the_same_weights(own_copy, bundled):
    assert load_detector(own_copy).state_hash() == bundled.state_hash()


@pytest.mark.parametrize("architecture", ["../../evil.yaml", "evil.yaml", "yolo11n-cls.yamlx", ""])
def test_only_architectures_that_ultralytics_ships_are_built(own_copy, architecture):
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


def test_segmentation_models_are_refused(tmp_path):
    from ultralytics.nn.tasks import SegmentationModel

    model = SegmentationModel("yolov8n-seg.yaml", nc=2, verbose=False)
    model.task = "segment"
    buffer = io.BytesIO()
    torch.save({"model": model}, buffer)
    (tmp_path / "seg.pt").write_bytes(buffer.getvalue())
    with pytest.raises(DetguardError, match="only box detection"):
        load_detector(tmp_path / "seg.pt")


def test_scales_are_told_by_the_name():
    small, large = (sum(p.numel() for p in build_model(f"yolo11{s}.yaml", ["a"]).parameters()) for s in "ns")
    assert large > 2 * small
