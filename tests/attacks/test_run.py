"""Runs of attacks: what is judged is what was saved."""

import cv2
import pytest

from detguard.attacks.group import AttackOptions
from detguard.attacks.run import Job, attack_photos, judge, verify_run
from detguard.objectives import Vanish
from detguard.photos import encode_png, read_photo
from detguard.runs import Run
from detguard.transforms.parse import parse_transforms

PERSONS = Vanish((0,))
OPTIONS = AttackOptions(steps=40)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory, bundled, bus):
    """The run of an attack on a small photo, and its one record."""
    folder = tmp_path_factory.mktemp("attacked")
    (folder / "bus.png").write_bytes(encode_png(cv2.resize(bus, (240, 320), interpolation=cv2.INTER_AREA)))
    run = Run.create("attack", folder / "run", {"attack": {"conf": OPTIONS.conf, "iou": OPTIONS.iou}})
    job = Job(bundled, PERSONS, parse_transforms("median:3"), OPTIONS, run)
    (record,) = attack_photos(job, {"bus": folder / "bus.png"})
    assert record["status"] == "fooled"
    return run, record


def test_further_transforms_are_judged_on_the_adversarial_photo(attacked, bundled):
    run, record = attacked
    (jpeg,) = parse_transforms("jpeg:95")
    (verified,) = verify_run(run, bundled, PERSONS, [jpeg])
    original, saved = read_photo(record["photo"]), read_photo(run.path(record["files"]["photo"]))
    clean = bundled.predict(original, 0.05)
    of_saved, of_original = (judge(PERSONS, clean, bundled.predict(jpeg(p), 0.05), 0.25) for p in (saved, original))
    assert of_saved != of_original
    assert verified["members"]["jpeg:95"] == of_saved


def test_verifying_again_says_what_the_run_said(attacked, bundled):
    run, record = attacked
    (verified,) = verify_run(run, bundled, PERSONS, [])
    assert verified["members"] == record["members"]
    assert verified["group"] == ["photo", "median:3"]
    assert verified["difference"] == record["difference"] == 4


def test_every_member_is_judged_from_its_own_file(attacked, bundled):
    run, record = attacked
    clean = bundled.predict(read_photo(record["photo"]), 0.05)
    for name, file in record["files"].items():
        found = bundled.predict(run.path(file), 0.05)
        assert record["members"][name] == judge(PERSONS, clean, found, 0.25), name
