import json
import sys
from pathlib import Path

import cv2
import pytest
import torch
from typing_extensions import override

import detguard
from detguard import DetguardError
from detguard.cli import main
from detguard.cli.app import out
from detguard.detections import Candidates
from detguard.detectors.contract import PROMISES, check_contract
from detguard.detectors.custom import is_custom
from detguard.detectors.load import detector_config, load_configured, load_detector
from detguard.detectors.ultralytics import UltralyticsDetector

EXAMPLES = Path(detguard.__file__).parent.parent / "examples"
SHAPES, SOMETHING, GRADIENT, PATHS, STATE, BATCH, SETTINGS = PROMISES


@pytest.fixture(scope="module")
def small(bus):
    return cv2.resize(bus, (240, 320), interpolation=cv2.INTER_AREA)


class Fewer(UltralyticsDetector):
    @override
    def candidates(self, frames):
        found = super().candidates(frames)
        return Candidates(found.logits[..., :-1], found.boxes)


class Shy(UltralyticsDetector):
    @override
    def candidates(self, frames):
        found = super().candidates(frames)
        return Candidates(found.logits - 30, found.boxes)

    @override
    def predict(self, source, conf, iou=None):
        return self.detect([source], conf, iou)[0]


class Detached(UltralyticsDetector):
    @override
    def candidates(self, frames):
        found = super().candidates(frames.detach())
        return Candidates(found.logits + 0 * frames.mean(), found.boxes)


class Cut(UltralyticsDetector):
    @override
    def candidates(self, frames):
        return super().candidates(frames.detach())


class Shares(Shy):
    """Confidences for logits and shares of the frame for boxes, of which its own two paths say the same."""

    @override
    def candidates(self, frames):
        found = UltralyticsDetector.candidates(self, frames)
        return Candidates(found.logits.sigmoid(), found.boxes / 320)


class Shifted(UltralyticsDetector):
    @override
    def predict(self, source, conf, iou=None):
        found = super().predict(source, conf, iou)
        found.boxes.add_(2)
        return found


class Learning(UltralyticsDetector):
    @override
    def candidates(self, frames):
        next(self.model.buffers()).add_(1e-6)
        return super().candidates(frames)


class Sociable(UltralyticsDetector):
    @override
    def candidates(self, frames):
        found = super().candidates(frames)
        return Candidates(found.logits - found.logits.mean((0, 1)), found.boxes)


class Named(UltralyticsDetector):
    """Keeps of its device what the function that makes it is told."""

    def __init__(self, *args):
        super().__init__(*args)
        self.device = str(self.device)


class Stubborn(UltralyticsDetector):
    @override
    def predict(self, source, conf, iou=None):
        return super().predict(source, conf, 0.7)


@pytest.mark.parametrize(
    ("kind", "broken"),
    [
        (Fewer, SHAPES), (Shy, SOMETHING), (Detached, GRADIENT), (Shifted, PATHS), (Learning, STATE),
        (Sociable, BATCH), (Stubborn, SETTINGS), (Named, SHAPES), (UltralyticsDetector, None),
    ],
)  # fmt: skip
def test_each_promise_is_missed_where_it_is_broken(bundled, small, kind, broken):
    detector = kind(bundled.model, "one", 320)
    wrong = {promise.name: promise.seen for promise in check_contract(detector, small) if promise.state == "BROKEN"}
    assert (broken in wrong) if broken else not wrong


def test_a_cut_gradient_breaks_one_promise_and_an_attack_says_so(bundled, small):
    cut = Cut(bundled.model, "cut", 320)
    assert [promise.name for promise in check_contract(cut, small) if promise.state == "BROKEN"] == [GRADIENT]
    with pytest.raises(DetguardError, match=r"cut: .*check-detector"):
        list(detguard.attack(cut, small))


def test_what_is_kept_by_comparing_a_detector_with_itself_is_told(bundled, small):
    kept = {promise.name: promise for promise in check_contract(Shares(bundled.model, "one", 320), small)}
    assert kept[SHAPES].state == kept[SOMETHING].state == "DOUBTFUL"
    assert "sigmoid" in kept[SHAPES].seen
    assert "2 px" in kept[SOMETHING].seen
    assert kept[PATHS].state == "skipped"
    assert "itself" in kept[PATHS].seen
    fine = {promise.name: promise for promise in check_contract(UltralyticsDetector(bundled.model, "one", 320), small)}
    assert {promise.state for promise in fine.values()} == {"kept"}
    assert "person" in fine[SOMETHING].seen
    assert not fine[PATHS].seen


class Blind(UltralyticsDetector):
    differentiable = False

    @override
    def candidates(self, frames):
        return super().candidates(frames.detach())


def test_what_has_no_gradient_need_not_promise_one(bundled, small):
    promises = list(check_contract(Blind(bundled.model, "one", 320), small))
    assert [p.name for p in promises if p.state == "skipped"] == [GRADIENT]
    assert "BROKEN" not in {p.state for p in promises}


def run(*arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["detguard", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0, capsys.readouterr().out


@pytest.fixture
def example(monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    yield "adapter:make"
    sys.modules.pop("adapter", None)


def test_the_example_keeps_all_promises_and_is_attacked(example, monkeypatch, capsys, tmp_path, small):
    code, shown = run("check-detector", example, "--trust", "--conf", 0.2, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, shown
    assert "6 kept, 1 skipped: it can be attacked and judged" in " ".join(shown.split())
    file, folder = tmp_path / "bus.png", tmp_path / "run"
    cv2.imwrite(str(file), small[..., ::-1])
    options = ("--model", example, "--trust", "--conf", 0.2, "--steps", 2, "--transforms", "none", "--out", folder)
    code, shown = run("attack", file, *options, monkeypatch=monkeypatch, capsys=capsys)
    assert code in (0, 1), shown
    assert (folder / "adversarial/bus.png").is_file() or "no person found" in shown


def test_the_example_is_as_sure_as_its_network(example, small):
    detector = load_detector(example, trust=True)
    (theirs,) = detector.model([torch.from_numpy(small).permute(2, 0, 1) / 255])
    assert detector.predict(small, 0.01).scores.max() == pytest.approx(theirs["scores"].max().item(), abs=1e-3)


def test_json_is_one_object_of_all_promises(monkeypatch, capsys):
    monkeypatch.setattr(out, "quiet", False)
    line = ("check-detector", "detguard-n", "--imgsz", 96, "--json")
    code, shown = run(*line, monkeypatch=monkeypatch, capsys=capsys)
    told = json.loads(shown)
    assert (code, told["model"], told["passed"]) == (0, "detguard-n", True)
    assert [(one["promise"], one["state"]) for one in told["promises"]] == [(name, "kept") for name in PROMISES]
    code, shown = run(*line, "--conf", 0.999, monkeypatch=monkeypatch, capsys=capsys)
    told = json.loads(shown)
    assert (code, told["passed"]) == (1, False)
    (broken,) = (one for one in told["promises"] if one["state"] == "BROKEN")
    assert broken["promise"] == SOMETHING
    assert "another --photo" in broken["seen"]
    assert "class names" in broken["remedy"]


def test_a_module_is_not_imported_without_trust_not_even_by_a_run(example):
    with pytest.raises(DetguardError, match="`trust`"):
        load_detector(example)
    assert "adapter" not in sys.modules
    detector = load_detector(example, trust=True)
    config = detector_config(detector, example)
    sys.modules.pop("adapter")
    with pytest.raises(DetguardError, match="`trust`"):
        load_configured(config)
    assert "adapter" not in sys.modules
    assert load_configured(config, trust=True).class_names == detector.class_names


@pytest.mark.parametrize(
    ("name", "told"),
    [("nowhere:make", f"looked in .*{EXAMPLES.name}"), ("examples/adapter.py:make", "is named examples.adapter:make")],
)
def test_where_a_module_is_looked_for_is_told(example, name, told):
    with pytest.raises(DetguardError, match=told):
        load_detector(name, trust=True)


@pytest.mark.parametrize("name", ["adapter:nothing", "adapter:torch", "adapter:Path"])
def test_what_makes_no_detector_is_refused(example, name):
    with pytest.raises(DetguardError, match=name):
        load_detector(name, trust=True)


@pytest.mark.parametrize("name", ["yolo11n", "a/b.pt", "adapter", "adapter:", ":make", "a b:make", "weights/x:y.pt"])
def test_names_of_weights_are_no_modules(name):
    assert not is_custom(name)
