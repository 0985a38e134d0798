"""What a monitor that learns remembers of a stream without an end."""

from pathlib import Path

import pytest

from detguard import DetguardError
from detguard.detectors.gated import GatedDetector, GatedNetwork
from detguard.detectors.load import fused, save_gated
from detguard.hardening.monitor import MOST_WINDOWS
from detguard.runs import Run
from detguard.workflows.living import Living

KEEP = 5


def test_photos_that_may_be_learned_from_outlast_the_camera_and_are_bounded(tmp_path, bundled):
    config = {"command": "monitor", "monitor": {"window": 1}, "on_drift": "adapt", "detector": {"model": "m"}}
    run = Run(tmp_path, config | {"living": {"gather": 3, "keep": KEEP, "adapt": []}})
    living, photo, last = Living(run, bundled), tmp_path / "camera.png", MOST_WINDOWS + 60
    for number in range(1, last + 1):
        photo.write_bytes(str(number).encode())
        record = {"number": number, "photo": str(photo), "objects": []}
        record |= {"f1": 1.0, "confidence": 0.5, "entropy": None, "began": None}
        run.append(record)
        living.saw(record)
        photo.unlink()
    copies = {int(file.stem) for file in (tmp_path / "photos").iterdir()}
    assert copies == living.seen.keys() == {*range(last - MOST_WINDOWS + 1, last + 1), *living.reservoir}
    assert len(living.reservoir) == KEEP
    assert min(living.reservoir) <= 60  # some are of long ago
    assert all(Path(one["photo"]).read_text() == str(number) for number, one in living.seen.items())
    again = Living(run, bundled)
    assert (again.seen, again.reservoir) == (living.seen, living.reservoir)
    again.saw(record)  # resumed, a run goes through its last window once more
    assert (again.judged, again.reservoir) == (living.judged, living.reservoir)


@pytest.fixture
def living(tmp_path, bundled_model):
    network = GatedNetwork(fused(bundled_model), split=11, fusion="bounded:0.25")
    config = {"command": "monitor", "monitor": {"window": 1}, "on_drift": "adapt", "detector": {"model": "first"}}
    run = Run(tmp_path, config | {"living": {"gather": 3, "keep": KEEP, "adapt": []}})
    return Living(run, GatedDetector(network, "first", 320))


def note(living, event, model):
    event = {"event": event, "number": living.number, "model": model, "why": "", "before": {}, "after": {}}
    living.run.append(event, "events.jsonl")
    living.events.append(event)


def test_each_roll_back_goes_to_what_was_there_before_and_never_to_what_was_taken_back(living):
    note(living, "deployed", "a")
    living.roll_back()
    assert living.model(1) == "first"
    note(living, "deployed", "b")
    note(living, "deployed", "c")
    for expected in ("b", "first"):
        living.roll_back()
        assert living.model(1) == expected
    with pytest.raises(DetguardError, match="nothing that could be taken back"):
        living.roll_back()


def test_what_is_deployed_answers_by_the_rule_that_was_asked_for(living, tmp_path, bundled):
    made = tmp_path / "made.safetensors"
    card = {"architecture": "yolo11n.yaml", "classes": list(bundled.class_names.values()), "imgsz": 320}
    save_gated(living.first.model, card, made)
    living.first.model.fusion, living.first.model.top_k = "average:0.5", 2
    note(living, "deployed", str(made))
    deployed = living.at(1).model
    assert (deployed.fusion, deployed.top_k) == ("average:0.5", 2)
    living._loaded = ("", living.first)
    living.first.model.top_k = None
    assert living.at(1).model.top_k is None
