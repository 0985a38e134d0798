"""The commands as a user runs them: the real program, the bundled detector, real photos, files on disk."""

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import program
import pytest
from PIL import Image
from ultralytics.utils import ASSETS

from detguard.data.dataset import read_dataset
from detguard.detectors.load import load_detector
from detguard.photos import read_photo

BUS = ASSETS / "bus.jpg"
ZIDANE = ASSETS / "zidane.jpg"
detguard = partial(program.detguard, timeout=300)


def records(run: Path):
    return [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attack")
    result = detguard("attack", BUS, "--eps", 4, "--out", "run", cwd=folder)
    return folder / "run", result


def test_attack_hides_every_pedestrian_in_the_saved_files(attacked):
    run, result = attacked
    assert result.returncode == 0, result.stdout + result.stderr
    detector = load_detector()
    assert len(detector.predict(BUS, 0.25).of([0])) >= 3
    for file in ("adversarial/bus.png", "group/bus/median-3.png", "group/bus/jpeg-75.jpg"):
        assert len(detector.predict(run / file, 0.25).of([0])) == 0, file


def test_attack_keeps_its_budget_on_the_saved_pixels(attacked):
    run, _ = attacked
    saved, original = (read_photo(f).astype(int) for f in (run / "adversarial/bus.png", BUS))
    assert 1 <= np.abs(saved - original).max() <= 4


def test_attack_writes_the_run_folder_of_the_design(attacked):
    run, result = attacked
    (record,) = records(run)
    assert record["status"] == "fooled"
    assert {o["outcome"] for o in record["objects"]} <= {"vanished", "relabelled", "kept"}
    assert set(record["members"]) == {"photo", "median:3", "jpeg:75"}
    assert all((run / name).is_file() for name in record["files"].values())
    assert Image.open(run / "overlays/bus.png").size[0] > 3 * 810
    config = (run / "config.yaml").read_text()
    assert re.search(r"sha256: [0-9a-f]{64}", config)
    assert "seed: 0" in config
    assert "1 of 1 fooled" in result.stdout
    assert "at most 100 steps, seed 0, detguard" in result.stdout


def test_nothing_attacked_is_neither_success_nor_failure(tmp_path):
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "empty.png")
    result = detguard("attack", "empty.png", "--imgsz", 64, "--out", "run", cwd=tmp_path)
    assert result.returncode == 3, result.stderr
    assert "0 of 0 fooled, 1 without target" in result.stdout
    assert detguard("verify", "run", cwd=tmp_path).returncode == 3


def without_reader(number):
    """Have a stream be a pipe whose reader has ended, as `head` does."""
    name = ("stdin", "stdout", "stderr")[number]
    getattr(sys, name).close()
    reads, writes = os.pipe()
    os.close(reads)
    os.dup2(writes, number)
    setattr(sys, name, io.TextIOWrapper(io.FileIO(number, "w"), "utf-8", "backslashreplace", line_buffering=True))


@pytest.mark.parametrize(("number", "options"), [(1, ()), (1, ["--json"]), (2, ["--trust"])])
def test_what_nobody_reads_ends_no_work(tmp_path, number, options):
    (tmp_path / "damaged.png").write_text("no photo")
    Image.open(BUS).resize((240, 320)).save(tmp_path / "bus.png")
    for photos, code in ((["bus.png"], 141), (["bus.png", "damaged.png"], 2)):
        line = ["attack", *photos, "--imgsz", 192, "--steps", 2, "--out", str(code), *options]
        result = detguard(*line, cwd=tmp_path, preexec_fn=partial(without_reader, number))
        assert result.returncode == code, result.stderr
        assert "Error" not in result.stderr
        assert (tmp_path / str(code) / "report.html").exists()


def test_verify_judges_the_files_anew(attacked):
    run, _ = attacked
    result = detguard("verify", run, "--transforms", "jpeg:90", cwd=run)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "jpeg:90" in result.stdout
    assert "most of the budget used: 4 of 4 levels of 255" in result.stdout


def test_a_black_box_attack_counts_its_queries_and_is_resumed(tmp_path):
    Image.open(BUS).resize((240, 320)).save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    options = ("--mask", "inside", "--eps", 64, "--transforms", "flip:h", "--queries", 200)
    result = detguard("attack", "a.png", "b.png", "--black-box", *options, "--out", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    first, second = records(tmp_path / "run")
    assert 4 <= first["queries"] == 2 * (first["iterations"] + 1) <= 200
    assert 0 < first["used"] <= 64
    assert "queries (black box, at most 200)" in result.stdout
    page = (tmp_path / "run/report.html").read_text()
    assert "black box: at most 200 queries" in page
    assert f"{first['queries']} queries, " in page
    (tmp_path / "run/results.jsonl").write_text(json.dumps(first) + "\n")
    again = detguard("attack", "--resume", "run", cwd=tmp_path)
    assert "1 photos done before" in again.stdout, again.stderr
    assert [r | {"seconds": 0} for r in records(tmp_path / "run")] == [first | {"seconds": 0}, second | {"seconds": 0}]


def test_a_photo_that_a_transform_cannot_encode_is_named_and_the_others_are_attacked(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.open(BUS).resize((240, 320)).save(tmp_path / "photos/bus.png")
    Image.new("RGB", (16_400, 64)).save(tmp_path / "photos/wide.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "photos/tiny.png")
    options = ("--transforms", "webp:75,albumentations:Superpixels", "--steps", 2, "--imgsz", 320, "--out", "run")
    result = detguard("attack", "photos", *options, cwd=tmp_path)
    assert result.returncode == 2
    assert "16400 x 64 px: more than a .webp file can hold" in result.stderr
    statuses = {r["key"]: r["status"] for r in records(tmp_path / "run")}
    assert (statuses["wide"], statuses["tiny"], len(statuses)) == ("error", "error", 3)
    assert "8 x 8 px (division by zero); leave one of them out" in result.stderr


def test_options_of_a_gradient_are_refused_in_a_black_box(tmp_path):
    result = program.refusal("attack", BUS, "--black-box", "--rule", "apgd", "--out", "run", cwd=tmp_path)
    assert result.returncode == 2
    assert "--rule: does not go with --black-box" in result.stderr
    assert not (tmp_path / "run").exists()


def test_one_photo_fools_two_detectors_inside_the_objects_and_its_random_members(tmp_path):
    small = tmp_path / "bus.png"
    Image.open(BUS).resize((240, 320)).save(small)
    models = ("--model", "detguard-n", "--model", "detguard-n-hard")
    options = ("--mask", "inside", "--eps", 32, "--step", 4, "--transforms", "rotate:-4..4", "--imgsz", 320)
    result = detguard("attack", small, *models, *options, "--out", "run", cwd=tmp_path)
    (record,) = records(tmp_path / "run")
    assert record["also"]["detguard-n-hard"].keys() == record["members"].keys() == {"photo", "rotate:-4..4"}
    assert (record["status"] == "fooled") == (result.returncode == 0)
    assert record["also"]["detguard-n-hard"]["photo"]["fooled"]
    assert record["members"]["photo"]["fooled"]
    assert "photo (png), detguard-n-hard" in result.stdout
    drawn = record["draws"]["rotate:-4..4"]
    assert record["files"]["rotate:-4..4"] == f"group/bus/{drawn.replace(':', '-')}.png"
    inside = np.zeros((320, 240), bool)
    for box in (o["box"] for o in record["objects"]):
        inside[max(int(box[1]), 0) : int(box[3]) + 1, max(int(box[0]), 0) : int(box[2]) + 1] = True
    changed = (read_photo(tmp_path / "run/adversarial/bus.png") != read_photo(small)).any(2)
    assert changed.any()
    assert not (changed & ~inside).any()
    assert "the run attacked detguard-n-hard as well" in detguard("verify", "run", cwd=tmp_path).stderr
    judged = detguard("verify", "run", "--model", "detguard-n-hard", "--json", cwd=tmp_path)
    assert "as well" not in judged.stderr
    (line,) = map(json.loads, judged.stdout.splitlines())
    assert line["members"] == record["also"]["detguard-n-hard"]


def test_each_entry_of_a_photo_that_is_there_twice_keeps_its_labels(tmp_path):
    Image.open(BUS).resize((240, 320)).save(tmp_path / "bus.png")
    boxes = [[40, 90, 80, 230], [150, 90, 200, 230]]
    lines = [{"photo": "bus.png", "objects": [{"class": "person", "box": box}]} for box in boxes]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    options = ("--data", "data.jsonl", "--transforms", "none", "--eps", 16, "--step", 4)
    result = detguard("attack", *options, "--out", "run", cwd=tmp_path)
    assert "samples: 2 images" in result.stdout, result.stdout + result.stderr
    names = load_detector().class_names
    made = read_dataset(tmp_path / "run/samples/data.yaml", "val")
    found = [made.objects(image, made.category_ids(names)).boxes[0].tolist() for image in made.files]
    assert sorted(found) == [pytest.approx(box, abs=0.1) for box in boxes]


def test_samples_are_a_data_set_whose_labels_went_with_the_pixels(tmp_path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "labels").mkdir()
    Image.open(BUS).resize((240, 320)).save(tmp_path / "data/images/bus.png")
    (tmp_path / "data/labels/bus.txt").write_text("0 0.25 0.5 0.1 0.4\n1 0.5 0.4 0.8 0.5\n")
    (tmp_path / "data/data.yaml").write_text("path: .\ntrain: images\nval: images\nnames: [pedestrian, bus]\n")
    options = (
        "--data",
        "data/data.yaml",
        "--map",
        "pedestrian=person",
        "--transforms",
        "flip:h,jpeg:60",
        "--eps",
        16,
        "--step",
        2,
    )
    result = detguard("attack", *options, "--out", "run", cwd=tmp_path)
    assert "samples: 3 images" in result.stdout, result.stdout + result.stderr
    names = load_detector().class_names
    made = read_dataset(tmp_path / "run/samples/data.yaml", "val")
    assert [file.name for file in made.files.values()] == ["bus--flip-h.png", "bus--jpeg-60.jpg", "bus--photo.png"]
    found = {
        file.stem: {names[c]: box for c, box in zip(o.classes.tolist(), o.boxes.tolist(), strict=True)}
        for image, file in made.files.items()
        for o in [made.objects(image, made.category_ids(names))]
    }
    assert found["bus--photo"]["person"] == pytest.approx([48, 96, 72, 224], abs=0.1)
    assert found["bus--jpeg-60"] == found["bus--photo"]
    assert found["bus--flip-h"]["person"] == pytest.approx([168, 96, 192, 224], abs=0.1)
    json_of_coco = read_dataset(tmp_path / "run/samples/instances.json", "val", tmp_path / "run/samples/images")
    assert len(json_of_coco.annotations.anns) == 6


def test_verify_writes_what_is_found_on_every_member_as_json(attacked):
    run, _ = attacked
    (line,) = detguard("verify", run, "--json", "--transforms", "jpeg:90", cwd=run).stdout.splitlines()
    told, (record,) = json.loads(line), records(run)
    assert told["photo"] == str(BUS)
    assert set(told["members"]) == {"photo", "median:3", "jpeg:75", "jpeg:90"}
    for name, judged in record["members"].items():
        assert told["members"][name] == judged, name
    assert {"class", "confidence", "box", "wrong"} == set(record["members"]["jpeg:75"]["detections"][0])


def test_verify_notices_a_file_that_no_longer_fools(attacked, tmp_path):
    run, _ = attacked
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", run, copy], check=True)
    Image.open(BUS).save(copy / "group/bus/jpeg-75.jpg", quality=75)
    assert detguard("verify", copy, cwd=tmp_path).returncode == 1
    (copy / "group/bus/jpeg-75.jpg").unlink()
    missing = detguard("verify", copy, cwd=tmp_path)
    assert missing.returncode == 2
    assert "jpeg-75.jpg" in missing.stderr


def test_verify_tells_of_a_change_where_none_was_allowed(tmp_path):
    options = ("--imgsz", 160, "--mask", "inside", "--eps", 8, "--steps", 2, "--out", "run")
    assert detguard("attack", BUS, *options, cwd=tmp_path).returncode in (0, 1)
    within = detguard("verify", "run", "--json", cwd=tmp_path)
    assert 0 < json.loads(within.stdout)["used"] <= 8
    (file,) = (tmp_path / "run/adversarial").iterdir()
    photo = np.array(Image.open(file))
    photo[0, 0] ^= 1
    Image.fromarray(photo).save(file)
    beyond = detguard("verify", "run", "--json", cwd=tmp_path)
    assert (json.loads(beyond.stdout)["used"], beyond.returncode) == (None, 1)


def test_verify_does_not_follow_names_out_of_the_run(attacked, tmp_path):
    run, _ = attacked
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", run, copy], check=True)
    (record,) = records(copy)
    record["files"]["photo"] = "../../../etc/passwd"
    (copy / "results.jsonl").write_text(json.dumps(record) + "\n")
    result = detguard("verify", copy, cwd=tmp_path)
    assert result.returncode == 2
    assert "leads out of the run's folder" in result.stderr


def test_an_attack_that_runs_out_of_steps_exits_with_1(tmp_path):
    result = detguard("attack", BUS, "--steps", 1, "--eps", 2, "--out", "run", cwd=tmp_path)
    assert result.returncode == 1
    assert "at most 1 of 2 levels of 255; 1 steps of 1 cannot" in " ".join(result.stdout.split())
    assert "0 of 1 fooled" in result.stdout
    assert records(tmp_path / "run")[0]["status"] == "failed"


def test_mislabel_finds_the_object_as_the_other_class(tmp_path):
    detector = load_detector()
    names = [detector.class_names[int(c)] for c in detector.predict(BUS, 0.25).classes]
    source = next((n for n in names if n != "person"), "person")
    other = "car" if source != "car" else "truck"
    options = ("--target", source, "--to", other, "--eps", "8/255", "--json", "--out", "run")
    result = detguard("attack", BUS, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()] == records(tmp_path / "run")
    assert {o["outcome"] for o in records(tmp_path / "run")[0]["objects"]} == {"relabelled"}


def test_bad_input_is_one_line_each_and_the_rest_is_done(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "cut.jpg").write_bytes(BUS.read_bytes()[:20000])
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    small = Image.open(BUS).resize((240, 320))
    small.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    bad = ["empty.jpg", "text.jpg", "cut.jpg", "one.png", "gone.jpg"]
    result = detguard("attack", *bad, "cmyk.jpg", "deep.png", "--out", "run", "--transforms", "none", cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == len(bad)
    assert all(any(name in line for line in errors) for name in bad)
    done = {r["key"]: r["status"] for r in records(tmp_path / "run")}
    assert done["cmyk"] == done["deep"] == "fooled"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["attack", BUS, "--target", "persn"], "did you mean 'person'"),
        (["attack", BUS, "--transforms", "jpg:75"], "jpeg:75"),
        (["attack", BUS, "--transforms", "network,none"], "'network,none': none goes alone"),
        (["attack", BUS, "--data", "coco128"], "--data: instead of PHOTO; leave one of them out"),
        (["attack", BUS, "--schedule", "worst", "--rule", "apgd"], "--schedule worst: --rule apgd steps against the"),
        (["attack", BUS, "--schedule=worst", "--aggregate=max"], "--schedule worst: --aggregate max steps against the"),
        (["attack", BUS, "--black-box", "--schedule", "worst"], "--schedule worst: --black-box steps against the"),
        (["attack", "--data", "DATA", "--recursive"], "--recursive: goes with PHOTO, or --data of a folder"),
        (["detect", BUS, "--quiet"], "--quiet: goes before the command, as in detguard --quiet detect"),
        (["attack", BUS, "--model", "gone.pt"], "gone.pt"),
        (["attack", BUS, "--to", "person"], "is a target itself"),
        (["attack", BUS, "--goal", "flod"], "expected one of vanish, mislabel"),
        (["attack", BUS, "--box", "1,2,3"], "--box '1,2,3': expected 4 numbers"),
        (["attack", BUS, "--split", "train"], "--split: goes with --data"),
        (["attack", BUS, "--object", "0"], "--object: expected whole numbers from 1"),
        (["attack", BUS, "--object", "1.5"], "--object '1.5': expected whole numbers"),
        (["attack", BUS, "--object", ""], "--object '': expected whole numbers"),
        (["attack", "nothing/*.jpg"], "no photos here"),
        (["attack"], "PHOTO"),
        (["attack", BUS, "--aggregate", "weighted"], "--weights"),
        (["attack", "--resume", "nowhere"], "nowhere"),
        (["verify", "nowhere"], "nowhere"),
        (["detect", "."], "no photos here"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(tmp_path, tiny_data, arguments, reason):
    result = program.refusal(*(tiny_data if a == "DATA" else a for a in arguments), cwd=tmp_path)
    assert result.returncode == 2
    assert reason in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_hostile_checkpoint_is_refused_and_does_not_run(tmp_path):
    import torch

    proof = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {proof}",)

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    result = detguard("detect", BUS, "--model", "evil.pt", cwd=tmp_path)
    assert result.returncode == 2
    assert "refused" in result.stderr
    assert "Traceback" not in result.stderr
    assert not proof.exists()


def little_space():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    result = detguard("attack", BUS, "--steps", 1, "--out", "run", cwd=tmp_path, preexec_fn=little_space)
    assert result.returncode == 2
    assert "bus.png: cannot be written" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.partial"))


def test_detect_prints_json_lines_and_draws_boxes(tmp_path):
    result = detguard("detect", BUS, ZIDANE, "--json", cwd=tmp_path)
    assert result.returncode == 0
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["photo"].endswith("bus.jpg")
    assert {"class", "confidence", "box"} == set(second["detections"][0])
    assert Image.open(tmp_path / "runs/detect/001/overlays/bus.png").size == (810, 1080)


def same(record):
    return {k: v for k, v in record.items() if k != "seconds"}


def test_a_run_killed_half_way_resumes_to_the_same_records(tmp_path):
    for i in range(5):
        Image.open(BUS).crop((60 * i, 0, 810, 1080)).resize((202, 270)).save(tmp_path / f"p{i}.png")
    options = ["--random-start", "--seed", 5, "--imgsz", 192, "--steps", 12]
    unbroken = detguard("attack", tmp_path, *options, "--out", "whole", cwd=tmp_path)
    assert unbroken.returncode in (0, 1), unbroken.stderr
    victim = program.Started("attack", tmp_path, *options, "--out", "broken", cwd=tmp_path)
    results = tmp_path / "broken" / "results.jsonl"
    victim.wait_for(lambda: results.exists() and results.read_bytes().count(b"\n") >= 2)
    victim.stop()
    victim.ended()
    assert 2 <= len(records(tmp_path / "broken")) < 5
    with results.open("ab") as stream:
        stream.write(b'{"key": "p4", "cut short by the k')
    resumed = detguard("attack", "--resume", "broken", cwd=tmp_path)
    assert resumed.returncode == unbroken.returncode, resumed.stderr
    assert list(map(same, records(tmp_path / "broken"))) == list(map(same, records(tmp_path / "whole")))
    for record in records(tmp_path / "whole"):
        for name in record["files"].values():
            assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_two_processes_attack_one_run_and_one_takes_up_what_they_left(tmp_path):
    for i in range(3):
        Image.open(BUS).crop((60 * i, 0, 810, 1080)).resize((180, 240)).save(tmp_path / f"p{i}.png")
    Image.new("RGB", (180, 240)).save(tmp_path / "p0-empty.png")
    options = ["--random-start", "--seed", 5, "--imgsz", 192, "--steps", 4]
    alone = detguard("attack", tmp_path, *options, "--out", "alone", cwd=tmp_path)
    ended = program.together("attack", tmp_path, *options, "--out", "shared", folders=[tmp_path] * 2)
    assert list(map(same, records(tmp_path / "shared"))) == list(map(same, records(tmp_path / "alone"))), ended
    told = "".join(process.stdout for process in ended)
    assert told.count("results: shared") == 1
    assert told.count("p0-empty.png: skipped, no person found (confidence") == 1
    assert [process.returncode for process in ended] == [alone.returncode, 0]
    lines = (tmp_path / "shared/results.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "shared/results.jsonl").write_bytes(lines[3] + lines[1])
    resumed = detguard("attack", "--resume", "shared", cwd=tmp_path)
    assert resumed.returncode == alone.returncode, resumed.stderr
    assert list(map(same, records(tmp_path / "shared"))) == list(map(same, records(tmp_path / "alone")))


def test_photos_of_odd_names_do_not_end_a_batch(tmp_path):
    (tmp_path / "photos").mkdir()
    small = Image.open(BUS).resize((202, 270))
    for name in (b"x" * 251, "é".encode() * 125, b"caf\xe9"):
        small.save(tmp_path / "photos" / os.fsdecode(name + b".png"))
    options = ("--imgsz", 160, "--steps", 1, "--out", "run")
    result = detguard("attack", "photos", *options, cwd=tmp_path)
    assert result.returncode == 2
    assert "caf\\udce9.png: its name is not UTF-8" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(list((tmp_path / "run/adversarial").iterdir())) == 2
    again = detguard("attack", "--resume", "run", cwd=tmp_path)
    assert again.returncode == 2
    assert "2 photos done before" in again.stdout


def test_a_record_that_detguard_did_not_write_is_told_of_and_the_others_are_judged(attacked, tmp_path):
    shutil.copytree(attacked[0], tmp_path / "run")
    file = tmp_path / "run/results.jsonl"
    good = file.read_text().splitlines()[0]
    odd = [{"status": "failed", "key": ["b"]}, {"status": "fooled"}, json.loads(good) | {"files": ["photo"]}]
    file.write_text("".join(json.dumps(line) + "\n" for line in odd) + good + "\n")
    result = detguard("verify", "run", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("not a record that detguard wrote") == 3
    assert "success rate" in result.stdout
    assert "Traceback" not in result.stderr


def test_a_run_folder_taken_away_ends_the_run_in_one_line(tmp_path):
    for number in range(3):
        Image.open(BUS).resize((202 + number, 270)).save(tmp_path / f"p{number}.png")
    running = program.Started("attack", tmp_path, "--imgsz", 160, "--steps", 3, "--out", "run", cwd=tmp_path)
    running.wait_for((tmp_path / "run/results.jsonl").exists)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    told = running.ended()
    assert told.returncode == 2
    assert "run: is gone" in told.stderr
    assert "Traceback" not in told.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(attacked):
    run, _ = attacked
    result = program.refusal("attack", BUS, "--out", run, cwd=run)
    assert result.returncode == 2
    assert "--resume" in result.stderr


@pytest.mark.parametrize("command", ["attack", "detect", "verify"])
def test_help_teaches_by_example(tmp_path, command):
    result = detguard(command, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert f"detguard {command} " in result.stdout.split("Examples")[1]


STOPPING = """
import os, signal, time

def waits(device):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

def is_cut_short(device):
    try:
        waits(device)
    except KeyboardInterrupt as stop:  # as libraries in other languages do
        raise ImportError("initialization failed") from stop
"""


@pytest.mark.parametrize("factory", ["waits", "is_cut_short"])
def test_ctrl_c_while_weights_load_is_no_damage(tmp_path, bus_file, factory):
    (tmp_path / "stopping.py").write_text(STOPPING)
    result = detguard("attack", bus_file, "--model", f"stopping:{factory}", "--trust", cwd=tmp_path)
    assert (result.returncode, result.stderr.splitlines()[1:]) == (130, ["error: stopped"])


def test_trust_says_in_one_line_what_it_means(tmp_path):
    done = program.refusal("detect", "gone.jpg", "--trust", cwd=tmp_path)
    assert "warning: --trust: a .pt is unpickled, a module:factory is called; both may run any code" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("attack", "--eps", 8), "--eps"),
        (("attack", BUS), "PHOTO"),
        (("patch", "--data", "photos"), "--data"),
        (("universal", "--eps", 4), "--eps"),
        (("evaluate", "--limit", 3), "--limit"),
        (("harden", "--workers", 1, "--hours", 2), "--hours"),
        (("adapt", "--mode", "full"), "--mode"),
        (("monitor", "--window", 8, "--roll-back"), "--window"),
    ],
)
def test_a_run_that_goes_on_takes_no_options_that_it_has_already(tmp_path, arguments, named):
    result = program.refusal(*arguments, "--resume", "run", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --resume: takes all options from the run; leave out {named}")
    assert len(result.stderr.splitlines()) == 1
