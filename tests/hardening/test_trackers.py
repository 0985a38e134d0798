import pytest

from detguard import DetguardError
from detguard.hardening.trackers import check_tracker, track
from detguard.runs import Run


@pytest.mark.parametrize(("name", "message"), [("paper", "expected one of"), ("aim", "not installed; pip install aim")])
def test_trackers_that_are_not_there_are_refused(name, message):
    with pytest.raises(DetguardError, match=f"^`log` {name}: {message}"):
        check_tracker(name)


@pytest.mark.parametrize("part", ["start", "log"])
def test_a_tracker_that_fails_is_told_once_and_ends_no_training(tmp_path, monkeypatch, part):
    def without_network(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(f"accelerate.tracking.TensorBoardTracker.{part}", without_network)
    run, told = Run(tmp_path, {"command": "adapt"}), []
    track(run, "tensorboard", told.append)
    for batch in (1, 2):
        run.append({"stage": "adapt", "batch": batch, "loss": 0.5, "photos_per_second": 1.0})
    assert [record["batch"] for record in run.records()] == [1, 2]
    (once,) = told
    assert once.startswith("`log` tensorboard: fails (no network)")
