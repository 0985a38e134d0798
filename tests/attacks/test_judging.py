"""Runs of attacks: what is judged is what was saved."""

import copy
import math
import time
import weakref
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

import detguard
from detguard import DetguardError
from detguard.attacks.budgets import Linf, parse_budget
from detguard.attacks.group import AttackOptions, Member, NoRoomError, Victim, attack_group
from detguard.attacks.run import Job, attack_photos, judge, plan_attack, save_attempt, verify_run
from detguard.detections import Detections
from detguard.objectives import Fabricate, Flood, Outrank, Vanish
from detguard.objectives.base import Selection
from detguard.photos import encode_png, frames_tensor, read_photo
from detguard.reports.attack import attack_page
from detguard.runs import Run
from detguard.transforms.parse import parse_transforms

PERSONS = Vanish((0,))
OPTIONS = AttackOptions(steps=40)
NAMES = {0: "person", 1: "bus"}
CONFIG = {
    "goal": "vanish", "target": "person", "to": None, "strict": False, "object": None, "box": None,
    "keep_others": False, "loss": "logit", "count": None, "transforms": "none", "also": [],
    "attack": AttackOptions(budget=Linf(16)).config(), "arguments": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def attacked(tmp_path_factory, bundled, bus):
    """The run of an attack on a small photo, and its one record."""
    folder = tmp_path_factory.mktemp("attacked")
    (folder / "bus.png").write_bytes(encode_png(cv2.resize(bus, (240, 320), interpolation=cv2.INTER_AREA)))
    run = Run.create("attack", folder / "run", {"attack": {"conf": OPTIONS.conf}})
    job = Job([Victim(bundled, PERSONS)], parse_transforms("median:3"), OPTIONS, run)
    (record,) = attack_photos(job, {"bus": folder / "bus.png"})
    assert record["status"] == "fooled"
    return run, record


def test_further_transforms_are_judged_on_the_adversarial_photo(attacked, bundled):
    run, record = attacked
    (jpeg,) = parse_transforms("jpeg:95")
    (verified,) = verify_run(run, bundled, PERSONS, [jpeg], OPTIONS.budget)
    original, saved = read_photo(record["photo"]), read_photo(run.path(record["files"]["photo"]))
    clean = bundled.predict(original, 0.05)
    of_saved, of_original = (
        judge(PERSONS, clean, bundled.predict(jpeg(p), 0.05), 0.25, bundled.class_names) for p in (saved, original)
    )
    assert of_saved != of_original
    assert verified["members"]["jpeg:95"] == of_saved


def test_verifying_again_says_what_the_run_said(attacked, bundled):
    run, record = attacked
    (verified,) = verify_run(run, bundled, PERSONS, [], OPTIONS.budget)
    assert verified["members"] == record["members"]
    assert verified["group"] == ["photo", "median:3"]
    assert verified["used"] == record["used"] == 4


def test_every_member_is_judged_from_its_own_file(attacked, bundled):
    run, record = attacked
    clean = bundled.predict(read_photo(record["photo"]), 0.05)
    for name, file in record["files"].items():
        found = bundled.predict(run.path(file), 0.05)
        assert record["members"][name] == judge(PERSONS, clean, found, 0.25, bundled.class_names), name


def test_a_photo_that_fools_only_before_it_is_filtered_has_failed(attacked, bundled, tmp_path):
    _, record = attacked
    photo = read_photo(record["photo"])
    clean = bundled.predict(photo, 0.05)
    (attempt,) = attack_group(bundled, [("bus", photo, clean.above(0.25))], PERSONS, [], OPTIONS)
    job = Job([Victim(bundled, PERSONS)], parse_transforms("median:5,jpeg:40"), OPTIONS, Run(tmp_path, {}))
    attempt.members += [
        Member.of(attempt.members[0].victim, transform, photo, attempt.clean, 0.25) for transform in job.transforms
    ]
    saved = save_attempt(job, attempt, tmp_path / "bus.png", [clean])
    assert [saved["members"][name]["fooled"] for name in ("photo", "median:5", "jpeg:40")].count(False) in (1, 2)
    assert saved["members"]["photo"]["fooled"]
    assert saved["status"] == "failed"


def test_what_breaks_the_budget_is_an_error_not_a_result(attacked, bundled, tmp_path):
    _, record = attacked
    photo = read_photo(record["photo"])
    (attempt,) = attack_group(
        bundled, [("bus", photo, bundled.predict(photo, 0.25))], PERSONS, [], AttackOptions(steps=1)
    )
    attempt.x = (attempt.x + 9).clamp(0, 255)
    attempt.best = None
    job = Job([Victim(bundled, PERSONS)], [], OPTIONS, Run(tmp_path, {}))
    with pytest.raises(DetguardError, match="over the budget of 4"):
        save_attempt(job, attempt, tmp_path / "bus.png", attempt.clean)


def test_what_is_found_below_the_confidence_is_no_target(attacked, bundled, tmp_path):
    _, record = attacked
    run = Run.create("attack", tmp_path / "run", {})
    job = Job([Victim(bundled, PERSONS)], [], AttackOptions(conf=0.99, steps=1), run)
    (other,) = attack_photos(job, {"bus": Path(record["photo"])})
    assert other["status"] == "no-target"


def test_something_is_made_of_nothing_where_there_is_no_target(bundled, tmp_path):
    (tmp_path / "grey.png").write_bytes(encode_png(np.full((96, 96, 3), 128, np.uint8)))
    config = CONFIG | {"goal": "fabricate", "count": 2}
    run = Run.create("attack", tmp_path / "run", config)
    options = AttackOptions(budget=Linf(16), step=2, steps=60, margin=0)
    victims, _, _ = plan_attack(config, [bundled])
    assert victims == [Victim(bundled, Fabricate((0,), 2))]
    (record,) = attack_photos(Job(victims, [], options, run), {"grey": tmp_path / "grey.png"})
    assert record["status"] == "fooled"
    assert not record["clean"]
    assert not record["objects"]
    found = record["members"]["photo"]["detections"]
    assert sum(d["wrong"] for d in found) == len(found) >= 2
    assert "candidates" not in record
    unread = {"key": "b", "photo": "b.png", "status": "error", "error": "b.png: no photo"}
    page = attack_page(run, [record, unread], [bundled]).decode()
    assert "1 not attacked, see the errors" in page
    assert "b.png: no photo" in page
    assert "Attack. Goal: person found where there is none (at least 2)" in page
    assert f"0 before, {len(found)} after, {len(found)} of them wrong" in page
    assert "objects" not in page.partition("<body>")[2].partition("<script>")[0]


def found(*rows):
    """Rows of (class, score, x1, y1, x2, y2)."""
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 6)
    return Detections(table[:, 2:], table[:, 1], table[:, 0].long())


def test_a_member_is_judged_at_each_threshold_over_what_was_found_there():
    clean = found((0, 0.4, 0, 0, 50, 50), (0, 0.2, 100, 0, 150, 50))
    after = found((1, 0.3, 0, 0, 50, 50), (0, 0.15, 100, 0, 150, 50))
    judged = judge(PERSONS, clean, after, 0.25, NAMES)
    assert judged == {
        "fooled": True,
        "confidence": 0.15,
        "success": {"0.05": False, "0.1": False, "0.25": True, "0.5": None},
        "objects_not_kept": {"0.05": [1, 2], "0.1": [1, 2], "0.25": [1, 1], "0.5": [0, 0]},
        "detections": [{"class": "bus", "confidence": 0.3, "box": [0, 0, 50, 50], "wrong": True}],
    }
    assert not judge(PERSONS, clean, after, 0.12, NAMES)["fooled"]


def test_a_copy_that_does_not_show_the_object_is_judged_at_each_threshold_too():
    (crop,) = parse_transforms("crop:0.5")
    clean = found((0, 0.4, 0, 0, 20, 20))  # outside of the middle
    judged = judge(PERSONS, clean, found((0, 0.3, 10, 10, 40, 40)), 0.25, NAMES, crop, (100, 100))
    assert judged["fooled"] is judged["success"]["0.25"] is False
    assert judged["success"]["0.5"] is None


def test_nothing_is_said_of_confidences_that_a_detector_does_not_tell():
    clean = found((0, 0.4, 0, 0, 50, 50))
    judged = judge(PERSONS, clean, found(), 0.25, NAMES, least=0.2)
    assert judged["success"] == {"0.05": None, "0.1": None, "0.25": True, "0.5": None}


def test_a_photo_with_as_many_objects_as_a_flood_wants_is_left_out(attacked, bundled, tmp_path):
    file, wanted = Path(attacked[1]["photo"]), len(attacked[1]["clean"])
    for count, status in ((wanted, "no-target"), (wanted + 50, "failed")):
        run = Run.create("attack", tmp_path / str(count), CONFIG | {"goal": "flood", "target": "all"})
        job = Job([Victim(bundled, Flood(tuple(range(13)), count))], [], AttackOptions(steps=1), run)
        (record,) = attack_photos(job, {"bus": file})
        assert record["status"] == status
        told = attack_page(run, [record], [bundled]).decode().count("flooded already")
        assert told == 3 * (status == "no-target")  # in the verdict and two tables


def test_a_copy_too_small_to_detect_on_is_an_error_at_once(bundled, bus, tmp_path):
    (tmp_path / "small.png").write_bytes(encode_png(np.ascontiguousarray(bus[:80, :60])))
    run = Run.create("attack", tmp_path / "run", {})
    job = Job([Victim(bundled, PERSONS)], parse_transforms("crop:0.1"), AttackOptions(steps=1), run)
    (record,) = attack_photos(job, {"small": tmp_path / "small.png"})
    assert "after crop:0.1 it has 6 x 8 px" in record["error"]


@pytest.mark.parametrize(
    ("options", "most", "status"),
    [({}, 0, "error"), ({"smallest": True}, 0, "error"), ({"batch": 2}, 0, "error"), ({"batch": 2}, 1, "failed")],
)
def test_a_photo_too_large_for_its_device_is_an_error_and_the_others_go_on(
    attacked, bundled, bus, tmp_path, options, most, status
):
    small, wide, held, short = Path(attacked[1]["photo"]), tmp_path / "wide.png", [], copy.copy(bundled)
    wide.write_bytes(encode_png(cv2.resize(bus[350:900], (320, 224), interpolation=cv2.INTER_AREA)))

    def candidates(frames):
        assert not any(one() is not None for one in held)  # what did not fit is free
        if frames.shape[3] > frames.shape[2] and len(frames) > most:
            held.append(weakref.ref(frames))
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB")
        return bundled.candidates(frames)

    short.candidates = candidates
    run = Run.create("attack", tmp_path / "run", {})
    job = Job([Victim(short, PERSONS)], [], AttackOptions(steps=1, **options), run)
    files = {"a": small, "b": small, "none": tmp_path / "none.png", "c": wide, "d": wide, "e": small}
    found = {record["key"]: record for record in attack_photos(job, files)}
    assert held
    assert sorted(record["key"] for record in run.each()) == sorted(files)
    wanted = dict.fromkeys(files, "failed") | {"none": "error", "c": status, "d": status}
    assert {key: record["status"] for key, record in found.items()} == wanted
    if status == "error":
        told = f"{wide}: out of memory on cpu (Tried to allocate 9 GiB); make it smaller, or try `device` cpu"
        assert found["c"]["error"] == found["d"]["error"] == told
        assert [record["error"] for record in attack_photos(job, {"f": wide})] == [told]  # as where a run goes on
        with pytest.raises(NoRoomError, match="9 GiB"):  # as where nothing fits
            list(attack_photos(replace(job, run=Run.create("attack", tmp_path / "other", {})), files | {"a": wide}))


def test_a_least_budget_is_not_searched_for_in_fewer_steps_than_random_members_take(bundled):
    config = CONFIG | {"transforms": "noise:2", "attack": AttackOptions(smallest=True, steps=3).config()}
    with pytest.raises(DetguardError, match=r"`steps` 3: with `smallest`, random transforms .* 4 or more"):
        plan_attack(config, [bundled])
    plan_attack(config | {"transforms": "median:3"}, [bundled])


def test_a_photo_that_is_another_by_now_is_left_out_of_the_page(attacked, bundled, tmp_path):
    run, record = attacked
    config = CONFIG | {"detector": {"model": "detguard-n", "imgsz": 320}}
    (tmp_path / "bus.png").write_bytes(encode_png(np.zeros((64, 64, 3), np.uint8)))
    page = attack_page(Run(run.folder, config), [record | {"photo": str(tmp_path / "bus.png")}], [bundled]).decode()
    assert "1 photos are not shown here" in page


@pytest.mark.parametrize("name", ["none", "network", "median:4"])
def test_a_record_whose_member_is_called_by_no_transform_is_an_error_of_that_photo(attacked, bundled, tmp_path, name):
    run, record = attacked
    forged = Run(tmp_path, run.config)
    for file in record["files"].values():
        forged.write(file, run.path(file).read_bytes())
    forged.append(record | {"files": {"photo": record["files"]["photo"], name: record["files"]["median:3"]}})
    (verified,) = verify_run(forged, bundled, PERSONS, [], OPTIONS.budget)
    assert name in verified["error"]


def test_a_range_of_the_group_is_drawn_anew_and_a_photo_that_is_gone_is_told(attacked, bundled, tmp_path):
    run, record = attacked
    copy, name = Run(tmp_path, run.config), "rotate:-8..8"
    for file in record["files"].values():
        copy.write(file, run.path(file).read_bytes())
    files = {"photo": record["files"]["photo"], name: record["files"]["median:3"]}
    copy.append(record | {"files": files, "draws": {name: "rotate:1"}})
    copy.append(record | {"photo": "bus.png", "key": "gone"})
    transforms = parse_transforms(f"{name},median:3")
    judged, gone = verify_run(copy, bundled, PERSONS, transforms, OPTIONS.budget)
    assert list(judged["members"]) == ["photo", name, "median:3", f"{name}, drawn anew"]
    assert "work in the folder where the attack was started" in gone["error"]


def test_of_a_flood_the_candidates_before_nms_are_told(bundled, bus, tmp_path):
    small = cv2.resize(bus, (96, 128), interpolation=cv2.INTER_AREA)
    (tmp_path / "bus.png").write_bytes(encode_png(small))
    run = Run.create("attack", tmp_path / "run", CONFIG | {"goal": "flood", "target": "all"})
    options = AttackOptions(budget=Linf(32), step=4, steps=30)
    goal = Flood(tuple(bundled.class_names), 300)
    (record,) = attack_photos(Job([Victim(bundled, goal)], [], options, run), {"bus": tmp_path / "bus.png"})
    before, after = record["candidates"]
    photo = read_photo(run.path(record["files"]["photo"]))
    frames = frames_tensor([bundled.letterbox((128, 96))(photo)])
    assert after == int((bundled.candidates(frames).logits.sigmoid().amax(2) > 0.25).sum())
    assert after > max(10 * before, len(record["members"]["photo"]["detections"]))
    assert f"{before} candidates before NMS, then {after}" in attack_page(run, [record], [bundled]).decode()


def test_a_copy_in_which_more_is_found_without_any_attack_counts_as_no_success(attacked, bundled, tmp_path):
    photo = Path(attacked[1]["photo"])
    specs, run = "crop:0.5,rotate:45,rotate:10..40", Run(tmp_path, {"attack": {"conf": OPTIONS.conf}})
    job = Job([Victim(bundled, Fabricate((0,)))], parse_transforms(specs), AttackOptions(budget=Linf(0), steps=1), run)
    (record,) = attack_photos(job, {"bus": photo})
    assert {name: member["fooled"] for name, member in record["members"].items()} == dict.fromkeys(
        ["photo", *specs.split(",")], False
    )
    (verified,) = verify_run(job.run, bundled, Fabricate((0,)), parse_transforms("crop:0.6"), Linf(0))
    assert not verified["members"]["crop:0.6"]["fooled"]


def test_a_photo_in_which_one_of_the_detectors_finds_no_target_is_not_counted(attacked, bundled, tmp_path):
    photo, sheep = Path(attacked[1]["photo"]), [i for i, name in bundled.class_names.items() if name == "sheep"]
    job = Job([Victim(bundled, PERSONS), Victim(bundled, Vanish(tuple(sheep)))], [], OPTIONS, Run(tmp_path, {}))
    (record,) = attack_photos(job, {"bus": photo})
    assert record == {"key": "bus", "photo": str(photo), "status": "no-target", "detector": bundled.name}


def test_a_mask_that_leaves_nothing_of_a_photo_is_an_error_at_once(attacked, bundled, tmp_path):
    options = AttackOptions(budget=parse_budget("linf", 4, "5000,5000,6000,5000,6000,6000"))
    job = Job([Victim(bundled, PERSONS)], [], options, Run(tmp_path, {}))
    (record,) = attack_photos(job, {"bus": Path(attacked[1]["photo"])})
    assert record["status"] == "error"
    assert "leaves nothing of this photo" in record["error"]
    attack = AttackOptions(budget=parse_budget("linf", 4, "inside")).config()
    with pytest.raises(DetguardError, match="`mask` inside: of objects that are attacked"):
        plan_attack(CONFIG | {"goal": "fabricate", "count": 1, "attack": attack}, [bundled])


@pytest.mark.parametrize("options", [{"batch": 3}, {"smallest": True}])
def test_the_times_of_photos_add_up_to_no_more_than_the_run_takes(attacked, bundled, tmp_path, options):
    photo = Path(attacked[1]["photo"])
    job = Job([Victim(bundled, PERSONS)], [], AttackOptions(steps=3, **options), Run(tmp_path, {}))
    began = time.perf_counter()
    records = list(attack_photos(job, {str(number): photo for number in range(3)}))
    assert 0 < sum(record["seconds"] for record in records) <= time.perf_counter() - began + 0.03  # by rounding


def test_what_a_codec_cannot_hold_is_the_error_of_one_photo(attacked, bundled, tmp_path):
    pytest.importorskip("av")
    (tmp_path / "wide.png").write_bytes(encode_png(np.zeros((64, 17000, 3), np.uint8)))
    files = {"wide": tmp_path / "wide.png", "bus": Path(attacked[1]["photo"])}
    run = Run(tmp_path / "run", {})
    job = Job([Victim(bundled, Flood((0,)))], parse_transforms("h264:28"), AttackOptions(steps=1), run)
    (tmp_path / "run").mkdir()
    wide, bus = sorted(attack_photos(job, files), key=lambda record: record["key"], reverse=True)
    assert [wide["status"], bus["status"]] == ["error", "failed"]
    assert wide["error"].startswith(f"{tmp_path / 'wide.png'}: 17000 x 64 px: H.264 cannot hold that")


def test_the_confidence_that_is_left_is_that_of_what_was_attacked():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    clean = Detections(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 0]))
    found = Detections(boxes, torch.tensor([0.7, 0.1]), torch.tensor([0, 0]))
    for selection, left in ((Selection(), 0.7), (Selection((2,)), 0.1)):
        assert judge(Vanish((0,), only=selection), clean, found, 0.25, NAMES)["confidence"] == left


def test_how_much_a_photo_changed_is_what_others_measure(bundled, bus, tmp_path):
    small = cv2.resize(bus, (240, 320), interpolation=cv2.INTER_AREA)
    (result,) = detguard.attack(bundled, [small], transforms="none", steps=3, out=tmp_path / "run")
    (record,) = Run.open(tmp_path / "run", "attack").records()
    apart = ((result.photo.astype(float) - small) ** 2).mean()
    theirs = structural_similarity(
        small, result.photo, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert record["psnr"] == pytest.approx(10 * math.log10(255**2 / apart), abs=0.01)
    assert record["ssim"] == pytest.approx(theirs, abs=0.005)


def test_a_photo_that_fools_one_detector_of_two_has_failed(attacked, bundled, tmp_path):
    photo = read_photo(attacked[1]["photo"])
    clean = bundled.predict(photo, 0.05)
    (attempt,) = attack_group(bundled, [("bus", photo, clean.above(0.25))], PERSONS, [], OPTIONS)
    job = Job([Victim(bundled, PERSONS), Victim(bundled, Outrank((0,)))], [], OPTIONS, Run(tmp_path, {}))
    saved = save_attempt(job, attempt, tmp_path / "bus.png", [clean, clean])
    assert saved["members"]["photo"]["fooled"]
    assert saved["status"] == "failed"


def test_a_photo_that_one_end_of_a_range_makes_too_small_ends_no_other(bundled, bus, tmp_path):
    small = cv2.resize(bus, (48, 64), interpolation=cv2.INTER_AREA)
    files = {name: tmp_path / f"{name}.png" for name in ("small", "bus")}
    files["small"].write_bytes(encode_png(small))
    files["bus"].write_bytes(encode_png(cv2.resize(bus, (240, 320), interpolation=cv2.INTER_AREA)))
    job = Job([Victim(bundled, PERSONS)], parse_transforms("crop:0.1..1"), AttackOptions(steps=1), Run(tmp_path, {}))
    small_one, other = sorted(attack_photos(job, files), key=lambda record: record["key"], reverse=True)
    assert "after crop:0.1 it has" in small_one["error"]
    assert other["status"] in ("fooled", "failed")
