import copy
import io
import json
import shutil
import zipfile
from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st
from mutations import mutated, odd_tree
from ultralytics.nn.tasks import DetectionModel

from detguard.detectors.checkpoint import read_state
from detguard.detectors.load import load_model
from detguard.files import shipped

RECIPE = {
    "nc": 2, "channels": 3, "scale": "n", "scales": {"n": [1.0, 1.0, 64]}, "yaml_file": "tiny.yaml",
    "backbone": [[-1, 1, "Conv", [16, 3, 4]], [-1, 1, "C2f", [16, True]], [-1, 1, "Conv", [16, 3, 2]]],
    "head": [
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]], [[-1, 1], 1, "Concat", [1]], [[2, 4], 1, "Detect", ["nc"]],
    ],
}  # fmt: skip
WORDS = [
    b"cos\nsystem\n", b"cbuiltins\ngetattr\n", b"ctorch.hub\nload\n", b"ctorch.nn.modules.linear\nLinear\n",
    b"cultralytics.nn.tasks\nDetectionModel\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n",
    b"(", b"t", b"R", b"\x81", b"b", b"Q", b"]", b"}", b"u", b"s", b"a", b"e", b"0", b"2", b"1", b".", b"\x85", b"\x93",
    b"r\xff\xff\xff\x7f", b"j\x00\x00\x00\x00", b"\x8a\xff", b"M\xff\xff", b"N", b"X\xff\xff\x00\x00", b"h\x00",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = DetectionModel(copy.deepcopy(RECIPE), verbose=False).half()
    model.names, model.args = {0: "person", 1: "bus"}, {"imgsz": 64}
    return model


def saved(model):
    data = io.BytesIO()
    torch.save({"model": None, "ema": model}, data)
    return data.getvalue()


@pytest.fixture
def load(tmp_path):
    def load(data):
        (tmp_path / "fuzzed.pt").write_bytes(data)
        load_model(tmp_path / "fuzzed.pt")

    return load


def test_checkpoints(fuzz, tiny, load):
    load(saved(tiny))
    fuzz(mutated([saved(tiny)], [b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"]), load)


def test_pickles_of_checkpoints(fuzz, tiny, load):
    with zipfile.ZipFile(io.BytesIO(saved(tiny))) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in parts if name.endswith("data.pkl"))

    def repack(data):
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, data if name == pickled else part)
        load(made.getvalue())

    repack(parts[pickled])
    fuzz(mutated([parts[pickled]], WORDS), repack)


def test_recipes_of_checkpoints(fuzz, tiny, load):
    def save(said):
        changed = copy.copy(tiny)
        vars(changed).update(said if isinstance(said, dict) else {"yaml": said})
        load(saved(changed))

    odd = ["C3k2", "Conv", "nn.Upsample", "TorchVision", "torch.hub.load", "nc", [-1, 1, "Conv", [8, 3, 2]], 64, 4096]
    said = {"yaml": RECIPE, "names": tiny.names, "args": tiny.args, "save": [1, 2, 4], "stride": [8, 8]}
    save({})
    fuzz(odd_tree(said, odd).map(without_odd_keys), save)


def without_odd_keys(said):
    """As attributes of a module are called."""
    return {k: v for k, v in said.items() if isinstance(k, str)} if isinstance(said, dict) else said


def test_training_states(fuzz, tmp_path):
    state = {"number": 3, "network": {"a": torch.zeros(4, 2)}, "optimizer": {"state": {0: {"step": torch.ones(())}}}}
    data = io.BytesIO()
    torch.save(state, data)

    def read(data):
        (tmp_path / "state.pt").write_bytes(data)
        read_state(tmp_path / "state.pt")

    read(data.getvalue())
    fuzz(mutated([data.getvalue()], WORDS), read)


@pytest.fixture
def bundled(tmp_path):
    """Bundled weights by name, in a folder where a card beside them may be changed."""

    def place(name):
        for suffix in (".safetensors", ".json"):
            shutil.copy(shipped("weights") / f"{name}{suffix}", tmp_path / f"fuzzed{suffix}")
        return SimpleNamespace(file=tmp_path / "fuzzed.safetensors", card=tmp_path / "fuzzed.json")

    return place


@pytest.mark.parametrize("name", ["detguard-n", "detguard-n-hard"])
def test_cards(fuzz, bundled, name):
    at = bundled(name)
    card = json.loads(at.card.read_text())
    kept = {key: card[key] for key in ("architecture", "classes", "imgsz", "gated") if key in card}

    def load(said):
        at.card.write_bytes(said if isinstance(said, bytes) else json.dumps(said).encode())
        load_model(at.file)

    load(kept)
    odd = ["yolov8n.yaml", "ssdlite320_mobilenet_v3_large", "rtdetr-l.yaml", "yolo11x.yaml", ["a"] * 64, 64, 12]
    fuzz(odd_tree(kept, odd) | mutated([json.dumps(kept).encode()]), load)


def test_safetensors(fuzz, bundled):
    at = bundled("detguard-n")
    data = at.file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")

    def load(start):
        at.file.write_bytes(start + data[header:])
        load_model(at.file)

    load(data[:header])
    words = [
        b'"dtype":"F64"',
        b'"dtype":"F8_E4M3"',
        b'"shape":[',
        b"0,",
        b"999999999999",
        b"{",
        b"}",
        b'"F16"',
        b'"I64"',
    ]
    fuzz(mutated([data[:header]], words) | st.binary(max_size=64), load)
