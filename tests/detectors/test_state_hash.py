"""What a detector is known by, in the cache and in the folders of runs."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.nn.modules.block import Bottleneck

from detguard.detectors.gated import GatedDetector, GatedNetwork
from detguard.detectors.load import build_model, detector_config, fused, load_configured, load_detector
from detguard.detectors.torchvision import TorchvisionDetector
from detguard.detectors.ultralytics import UltralyticsDetector


def changed(detector, change):
    """A copy of the detector after `change` of its network; every tensor stays as it is."""
    other = copy.copy(detector)
    other.model = copy.deepcopy(detector.model)
    change(other.model)
    before, after = detector.model.state_dict(), other.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    return other


def one_activation(model):
    model.model[0].act = nn.ReLU()


def one_shortcut(model):
    layer = next(m for m in model.modules() if isinstance(m, Bottleneck) and m.add)
    layer.add = False


def strides_of_the_head(model):
    model.model[-1].stride = model.model[-1].stride * 2


def stride_of_a_convolution(model):
    model.model[0].conv.stride = (1, 1)


def where_a_layer_gets_its_input(model):
    layer = next(layer for layer in model.model if isinstance(layer.f, list))
    layer.f = layer.f[::-1]


@pytest.mark.parametrize(
    "change",
    [one_activation, one_shortcut, strides_of_the_head, stride_of_a_convolution, where_a_layer_gets_its_input],
)
def test_another_network_of_the_same_tensors_has_another_hash(bundled, change):
    assert changed(bundled, change).state_hash() != bundled.state_hash()


class Threshold(nn.Identity):
    """A layer of one's own: what its attributes are called says nothing of what they do."""

    def __init__(self, score_thresh):
        super().__init__()
        self.score_thresh = score_thresh


def test_every_plain_attribute_of_a_layer_of_ones_own_counts(bundled):
    def with_threshold(value):
        return changed(bundled, lambda model: model.add_module("mine", Threshold(value))).state_hash()

    assert with_threshold(0.1) == with_threshold(0.1) != with_threshold(0.2)


def test_what_a_layer_of_ones_own_does_counts_in_detectors_of_every_family(bundled):
    def with_layer(code):
        cell = {"__name__": "__main__"}
        exec(f"from torch import nn\nclass Mine(nn.Identity):\n    def forward(self, x):\n        return {code}", cell)
        return changed(bundled, lambda model: model.add_module("mine", cell["Mine"]())).state_hash()

    assert with_layer("x") == with_layer("x") != with_layer("0 * x")


def test_it_does_not_change_while_the_detector_is_used(bundled_model, bus):
    detector = UltralyticsDetector(bundled_model, "used", 320)
    before = detector.state_hash()
    detector.candidates(torch.rand(2, 3, 64, 96).requires_grad_())
    detector.detect([bus])
    detector.model(torch.rand(2, 3, 64, 96))
    detector.predict(bus, 0.25)
    detector.model.train()
    assert detector.state_hash() == before


@pytest.mark.parametrize("architecture", ["ssdlite320_mobilenet_v3_large", "rtdetr-l.yaml", "yolo26n.yaml"])
def test_nor_in_other_families(architecture):
    model = build_model(architecture, ["__background__", "a", "b"])
    family = TorchvisionDetector if hasattr(model, "outputs") else UltralyticsDetector
    detector = family(model, "used", 320)
    before = detector.state_hash()
    detector.predict(np.zeros((64, 64, 3), np.uint8), 0.25)
    with torch.no_grad():
        detector.model(torch.zeros(1, 3, 320, 320))
    assert detector.state_hash() == before


def test_it_is_the_same_of_a_checkpoint_and_of_its_tensors_in_a_new_network(bundled, bundled_model, tmp_path):
    model = copy.deepcopy(bundled_model)
    model.model[1].act = copy.deepcopy(model.model[1].act)  # shared no more, as unpickling may leave it
    torch.save({"model": model}, tmp_path / "saved.pt")
    assert load_detector(tmp_path / "saved.pt", 320).state_hash() == bundled.state_hash()


def test_each_expert_and_each_way_to_put_them_together_has_its_own(bundled_model):
    torch.manual_seed(0)
    network = GatedNetwork(fused(bundled_model), 22, top_k=2)
    detector = GatedDetector(network, "three", 320)
    others = [detector, detector.through(0), detector.through(1), detector.dense()]
    others.append(changed(detector, lambda model: setattr(model, "fusion", "average:0.5")))
    assert len({other.state_hash() for other in others}) == len(others)


OWN = """
from detguard.detectors.ultralytics import UltralyticsDetector
from detguard.detectors.load import load_model

class Mine(UltralyticsDetector):
    SIDE = 64

    def candidates(self, frames):
        return helped(super().candidates(frames))

def helped(found):
    return found if found.end_to_end in {"any", "of", "these"} else found

def one(device):
    return Mine(load_model("detguard-n")[0], "mine", Mine.SIDE, device)

def two(device):
    return one(device)
"""


def test_it_is_the_same_in_every_process(bundled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "same_own.py").write_text(OWN)
    code = (
        "from detguard.detectors.load import load_detector as load; "
        "print(load().state_hash(), load('same_own:two', trust=True).state_hash())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = load_detector("same_own:two", trust=True)
    assert other.stdout.split() == [bundled.state_hash(), own.state_hash()]


def test_of_a_detector_of_ones_own_the_code_counts_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hashes = []
    edited = OWN.replace("else found", "else None")
    for function, text in (("one", OWN), ("one", OWN + "# more"), ("two", OWN), ("one", edited)):
        (tmp_path / "own_detector.py").write_text(text)
        sys.modules.pop("own_detector", None)
        detector = load_detector(f"own_detector:{function}", trust=True)
        (tmp_path / "own_detector.py").write_text("# edited, and not loaded again")
        hashes.append(detector.state_hash())
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


CELL = """
import copy
from functools import lru_cache
from detguard.detectors.ultralytics import UltralyticsDetector

SCALE = 1

@lru_cache
def scaled(x):
    return x * SCALE

class Mine(UltralyticsDetector):
    def __init__(self, like, shift=0):
        vars(self).update(vars(like))
        self._settings = {"shift": shift}

    @property
    def factor(self):
        return scaled(2)
"""


@pytest.mark.parametrize(
    ("edit", "shift", "same"),
    [
        (("", ""), 0, True),
        (("SCALE = 1", "OTHER = 3; SCALE = 1"), 0, True),
        (("SCALE = 1", "SCALE = 3"), 0, False),
        (("scaled(2)", "scaled(4)"), 0, False),
        (("x * SCALE", "x / SCALE"), 0, False),
        (("", ""), 1000, False),
    ],
)
def test_of_a_notebook_what_its_cells_say_now_and_what_the_detector_was_made_with(bundled, edit, shift, same):
    before, after = {"__name__": "__main__"}, {"__name__": "__main__"}
    exec(CELL, before)
    exec(CELL.replace(*edit), after)
    hashes = before["Mine"](bundled).state_hash(), after["Mine"](bundled, shift).state_hash()
    assert (hashes[0] == hashes[1]) is same


def test_a_run_of_a_detector_of_ones_own_is_gone_on_with_whatever_it_says_of_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ended.py").write_text(
        OWN.removesuffix("    return one(device)\n")
        + "    found = one(device)\n    found.end_to_end = True\n    return found\n"
    )
    config = detector_config(load_detector("ended:two", trust=True), "ended:two")
    assert config["end_to_end"]
    assert load_configured(config, trust=True).state_hash() == config["sha256"]


def test_numbers_of_any_precision_have_a_hash(bundled_model):
    half = copy.deepcopy(bundled_model).bfloat16()
    hashes = {UltralyticsDetector(model, "n", 320).state_hash() for model in (bundled_model, half, half)}
    assert len(hashes) == 2
