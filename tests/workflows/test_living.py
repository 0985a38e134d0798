"""What a monitor that learns remembers of a stream without an end."""

from pathlib import Path

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
