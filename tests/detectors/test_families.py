import ast
import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from detguard import DetguardError
from detguard.detectors import families
from detguard.detectors.base import KNOWN_LAYERS, Detector, Family
from detguard.detectors.load import build_model, load_detector
from detguard.runs import LIBRARIES

# What files of families import that does not decide what a detector finds.
BESIDE = {"huggingface_hub", "onnx", "packaging", "safetensors", "typing_extensions"}


class Dots(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.classes = classes
        self.weight = nn.Parameter(torch.zeros(1))


class DotsDetector(Detector):
    def __init__(self, model, name, imgsz, device):
        self.model, self.name, self.imgsz = model, name, imgsz
        self.class_names = dict(enumerate(model.classes))

    letterbox = candidates = predict = None


class DotsFamily(Family):
    """A family with one architecture and one official name."""

    runs = DotsDetector
    names, built = ("dots1",), "dots"
    file = Path()

    def owns(self, network):
        return isinstance(network, Dots)

    def build(self, architecture, classes):
        return Dots(classes) if architecture == "dots" else None

    def fetch(self, name):
        return self.file if name == "dots1" else None

    def read(self, name, file, trust):
        return Dots(["dot"]), 96


@pytest.fixture
def dots(monkeypatch, tmp_path):
    family = DotsFamily()
    family.file = tmp_path / "official.bin"
    family.file.touch()
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES[:-1], family, families.FAMILIES[-1]))


def test_a_family_is_its_line_in_the_list(dots, tmp_path):
    save_file(Dots([]).state_dict(), tmp_path / "own.safetensors")
    (tmp_path / "own.json").write_text(json.dumps({"architecture": "dots", "classes": ["a", "b"], "imgsz": 64}))
    own, official = load_detector(tmp_path / "own.safetensors"), load_detector("dots1")
    assert isinstance(own, DotsDetector)
    assert (own.name, own.imgsz, own.class_names) == ("own", 64, {0: "a", 1: "b"})
    assert (official.name, official.imgsz, official.class_names) == ("dots1", 96, {0: "dot"})
    with pytest.raises(DetguardError, match=r"nowhere: .*, dots1, yolo11n\)"):
        load_detector("nowhere")
    with pytest.raises(DetguardError, match=r"nowhere: .*, dots, yolo11n"):
        build_model("nowhere", ["a"])


@pytest.mark.parametrize("option", [{"top_k": 1}, {"fusion": "average:0"}, {"end_to_end": True}], ids=str)
def test_options_that_a_family_does_not_take_are_refused(dots, option):
    with pytest.raises(DetguardError, match=f"`{next(iter(option))}`: dots1"):
        load_detector("dots1", **option)


def test_a_gated_ensemble_has_no_head_without_nms():
    with pytest.raises(DetguardError, match="`end_to_end`: detguard-n-hard"):
        load_detector("detguard-n-hard", end_to_end=True)


def test_libraries_of_families_are_known_to_runs_and_to_hashes():
    files = {Path(inspect.getfile(type(family))) for family in families.FAMILIES}
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    named = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    libraries = {name.partition(".")[0] for name in named} - sys.stdlib_module_names - BESIDE - {"detguard"}
    assert libraries >= {"torchvision", "transformers", "ultralytics"}
    assert libraries <= set(LIBRARIES)
    assert libraries - {"numpy", "onnxruntime"} <= KNOWN_LAYERS  # these two have none
