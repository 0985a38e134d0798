"""`detguard harden` as a user runs it: all stages on two photos, a few batches each."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import cv2
import pytest
import torch
import ultralytics
import yaml
from program import Started, detguard, launched, refusal
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from ultralytics import YOLO
from ultralytics.utils import ASSETS

from detguard import DetguardError
from detguard import attack as detguard_attack
from detguard.detectors.gated import GatedDetector, GatedNetwork
from detguard.detectors.load import detector_config, load_configured, load_detector
from detguard.hardening.judging import answered
from detguard.hardening.validation import ONE_IN, hold_out
from detguard.photos import frames_tensor, read_photo
from detguard.ranks import ALONE
from detguard.reports.evaluation import number as shown_as
from detguard.workflows.harden import Hardening

OPTIONS = ("--data", ASSETS, "--imgsz", 64, "--batch", 4, "--photos", 40, "--steps", 1)
FEW = (*OPTIONS[:-4], "--photos", 12, "--steps", 1)
SHARED = (*OPTIONS, "--split", "neck", "--mode", "full")


@pytest.fixture(scope="module")
def hardened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harden")
    result = detguard("harden", *SHARED, "--log", "tensorboard", "--out", "run", cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "77 forward and backward passes of whole frames; --dry-run measures how long they take" in result.stderr
    return folder / "run"


def test_a_dry_run_says_what_each_stage_takes_and_leaves_nothing(tmp_path):
    result = detguard("harden", *OPTIONS, "--dry-run", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert {name: stage["photos"] for name, stage in told["stages"].items()} == {
        "adversarial": 28,
        "hard": 8,
        "joint": 4,
    }
    assert all(stage["seconds"] > 0 for stage in told["stages"].values())
    assert told["passes"] == 73
    assert list(tmp_path.iterdir()) == []
    longer = detguard(
        "harden", *OPTIONS[:-4], "--steps", 1, "--hours", 0.5, "--recipe", "pgd", "--dry-run", cwd=tmp_path
    )
    assert "forward and backward passes in all: about 30 min" in longer.stdout
    assert list(tmp_path.iterdir()) == []


def test_it_makes_an_ensemble_that_loads_like_any_detector(hardened, bus_file):
    detector = load_detector(hardened / "weights/joint.safetensors")
    assert isinstance(detector, GatedDetector)
    assert detector.model.names == ["normal", "hard", "adversarial"]
    assert detector.imgsz == 64
    detector.predict(bus_file, 0.25)
    card = json.loads((hardened / "weights/joint.json").read_text())
    assert card["hardened"]["from"] == "detguard-n"
    assert card["hardened"]["photos"] == 40


def test_tensorboard_shows_the_losses_of_each_stage(hardened):
    records = [json.loads(line) for line in (hardened / "results.jsonl").read_text().splitlines()]
    shown = EventAccumulator(str(hardened / "tensorboard")).Reload()
    first = next(r for r in records if "loss" in r)
    event = shown.Scalars(f"{first['stage']}/loss")[0]
    assert (event.step, event.value) == (first["batch"], pytest.approx(first["loss"], rel=1e-5))
    assert {tag.partition("/")[0] for tag in shown.Tags()["scalars"]} >= {"adversarial", "normal", "hard", "joint"}


def test_in_the_end_its_adversarial_expert_is_made_sparse(hardened, bus):
    before, after = (load_detector(hardened / f"weights/{name}.safetensors") for name in ("joint", "sparse"))
    assert (before.model.sparse, after.model.sparse) == ([], [2])
    frames = frames_tensor([before.letterbox(bus.shape[:2])(bus)])
    one, other = (detector.through(2).candidates(frames).logits for detector in (before, after))
    assert not torch.equal(one, other)
    weights = load_file(hardened / "weights/sparse.safetensors")
    assert all(torch.equal(weights[key], value) for key, value in before.model.state_dict().items())


def test_top_k_of_an_ensemble_can_be_chosen_where_it_is_used(hardened, bus_file):
    file = hardened / "weights/joint.safetensors"
    one = load_detector(file, top_k=1)
    assert sorted(one.detect([read_photo(bus_file)])[0].experts.tolist()) == [0, 0, 1]
    config = detector_config(one, str(file))
    assert config["top_k"] == 1
    assert load_configured(config).state_hash() == one.state_hash() != load_detector(file).state_hash()
    with pytest.raises(DetguardError, match="`top_k`"):
        load_detector("detguard-n", top_k=1)


def test_each_stage_leaves_its_weights_and_metrics(hardened):
    stages = ["adversarial", "normal", "hard", "joint"]
    weights = {stage: load_file(hardened / f"weights/{stage}.safetensors") for stage in stages}
    trunk = [key for key in weights["joint"] if key.startswith("trunk")]
    assert all(torch.equal(weights["adversarial"][key], weights["hard"][key]) for key in trunk)
    assert any(not torch.equal(weights["hard"][key], weights["joint"][key]) for key in trunk)


def test_killed_and_resumed_it_gives_the_same_weights(hardened, tmp_path):
    process = Started("harden", *SHARED, "--out", "run", cwd=tmp_path, preexec_fn=os.setsid)
    process.wait_for((tmp_path / "run/weights/adversarial.json").exists)
    os.killpg(process.pid, signal.SIGTERM)  # as a terminal or a queue of jobs does it: to its helpers, too
    assert process.ended().returncode == 130
    assert not (tmp_path / "run/weights/joint.safetensors").exists()
    with (tmp_path / "run/results.jsonl").open("ab") as stream:
        stream.write(b'{"stage": "normal", "cut short by the k')
    result = detguard("harden", "--resume", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    ours, whole = (load_file(run / "weights/joint.safetensors") for run in (tmp_path / "run", hardened))
    assert all(torch.equal(ours[key], whole[key]) for key in whole)
    assert records(tmp_path / "run") == records(hardened)


def test_two_processes_write_one_run_stop_together_and_another_goes_on(tmp_path):
    options = (*OPTIONS[:-4], "--photos", 80, "--steps", 1, "--recipe", "pgd", "--workers", 1)
    (tmp_path / "elsewhere").mkdir()  # another machine, which does not see the run
    processes = launched("harden", *options, "--out", "run", folders=[tmp_path, tmp_path / "elsewhere"], local=1)
    processes[0].wait_for((tmp_path / "run/state/adversarial.pt").exists)
    processes[1].stop(signal.SIGTERM)
    first, second = (process.ended(60) for process in processes)
    assert (first.returncode, second.returncode) == (130, 130)
    assert first.stderr.count("stopped; go on with") == 1
    assert not second.stdout + second.stderr
    assert 0 < torch.load(tmp_path / "run/state/adversarial.pt")["progress"]["number"] < 20
    result = detguard("harden", "--resume", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [r["batch"] for r in records(tmp_path / "run")] == list(range(1, 21))
    assert (tmp_path / "run/report.html").exists()
    assert not list((tmp_path / "elsewhere").iterdir())


def records(run):
    lines = (run / "results.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "photos_per_second"} for line in lines]


def test_damaged_weights_of_a_finished_stage_are_one_clear_line(hardened, tmp_path):
    shutil.copytree(hardened, tmp_path / "run")
    file = tmp_path / "run/weights/normal.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    result = detguard("harden", "--resume", "run", cwd=tmp_path)
    assert result.returncode == 2
    assert "normal.safetensors: damaged" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_batch_that_memory_does_not_hold_is_refused_before_training(tmp_path):
    result = detguard("harden", "--data", ASSETS, "--imgsz", 64, "--batch", 10**7, "--out", "run", cwd=tmp_path)
    assert result.returncode == 2
    assert "--batch 10000000: a step on frames of 64 px takes" in result.stderr
    assert not (tmp_path / "run/results.jsonl").exists()


def test_a_run_whose_detector_has_changed_does_not_go_on(hardened, tmp_path):
    config = (hardened / "config.yaml").read_text()
    used = yaml.safe_load(config)["detectors"][0]["sha256"]
    (tmp_path / "config.yaml").write_text(config.replace(used, "0" * 64))
    result = refusal("harden", "--resume", tmp_path, cwd=tmp_path)
    assert result.returncode == 2
    assert "detguard-n: no longer the weights" in result.stderr


def test_a_run_learns_by_no_other_detector_than_that_which_is_checked(tmp_path):
    Hardening.begin("detguard-n", [str(ASSETS)], {}, ALONE, out=tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"model": "owner/tiny"}))
    with pytest.raises(DetguardError, match="`model` owner/tiny: the run's detector is detguard-n"):
        Hardening.resume(tmp_path, ALONE)


def test_its_page_tells_of_every_stage_and_of_the_gate(hardened):
    page = (hardened / "report.html").read_text()
    for text in (
        "Hardening of detguard-n: gated",
        "adversarial",
        "joint",
        "Losses",
        "Gate weights on training photos",
        "No photos were held out",
    ):
        assert text in page


@pytest.fixture
def many(tmp_path, bus):
    """Folder of as many photos of two persons as it takes for one to be held out."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(ONE_IN):
        cv2.imwrite(str(folder / f"{number}.jpg"), bus[380:920:2, number * 4 : 400 + number * 4 : 2, ::-1])
    return folder


def assert_what_was_held_out_is_judged(result, run, bundled):
    kept = json.loads((run / "figures.json").read_text())
    assert kept["photos"] == {"clean": 1, "attacked": 1}
    assert kept["before"]["attacked"]["AP"] < kept["before"]["clean"]["AP"] == pytest.approx(1)
    assert kept["before"] != kept["after"]
    after = shown_as(kept["after"]["clean"]["AP"])
    told = f"Agreement with detguard-n, for want of labels, on 1 photos held out: clean AP 1.000 before, {after} after"
    assert told in result.stdout
    assert told in (run / "report.html").read_text()
    assert [r["batch"] for r in records(run) if "loss" in r] == [1, 2, 3]
    assert all(0 <= r["AP50 attacked"] <= r["AP50 clean"] <= 1 for r in records(run) if "attacked" in r)
    assert "AP50 of photos held out, under PGD and without" in (run / "report.html").read_text()
    job = Hardening.resume(run, ALONE)
    job.load(1)
    (held,) = job.held_out
    assert len(job.source) == ONE_IN - 1
    (labelled,) = answered(bundled, [held], bundled.class_names)
    elsewhere = replace(labelled.objects, boxes=labelled.objects.boxes / 3)
    job.held_out = [replace(labelled, objects=elsewhere)]  # as if labels had been learned
    judged = job.judge(run / "weights/adversarial.safetensors", lambda: None)
    assert judged.answers == {}
    assert judged.before["clean"]["F1"] < kept["before"]["clean"]["F1"]


def test_labels_judge_though_the_teacher_is_what_is_learned(tmp_path, many):
    shutil.copytree(many, tmp_path / "data/images")
    (tmp_path / "data/labels").mkdir()
    for photo in many.iterdir():
        (tmp_path / f"data/labels/{photo.stem}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data/data.yaml").write_text("train: images\nnames: [person]\n")
    options = (*OPTIONS[2:-4], "--photos", 4, "--steps", 1, "--recipe", "pgd", "--crop", 64, "--json", "--out", "run")
    result = detguard("harden", "--data", "data/data.yaml", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    told, kept = json.loads(result.stdout), json.loads((tmp_path / "run/figures.json").read_text())
    assert told["by"] == {"clean": "labels", "attacked": "labels"}
    assert (kept["photos"]["clean"], kept["answers"]) == (1, {})
    assert kept["before"]["clean"]["F1"] < 0.5  # the teacher agrees with itself
    page = (tmp_path / "run/report.html").read_text()
    assert "By labels, on 1 photos held out" in page
    assert "What is to be found in the clean and attacked photos is what their labels say." in page
    assert len((tmp_path / "run/labelled.jsonl").read_text().splitlines()) == 1
    strange = (tmp_path / "data/data.yaml").read_text().replace("person", "gremlin")
    (tmp_path / "data/data.yaml").write_text(strange)
    job = Hardening.begin("detguard-n", [str(tmp_path / "data/data.yaml")], {}, ALONE, imgsz=64, out=tmp_path / "other")
    job.load(1)
    (held,) = job.held_out
    assert held.stem in {photo.stem for photo in many.iterdir()}


def test_a_hardened_network_becomes_an_ensemble_without_its_first_stage(tmp_path, many, bundled):
    options = (*OPTIONS[2:-4], "--photos", 12, "--steps", 1, "--recipe", "pgd", "--crop", 64, "--out", "single")
    # At so high a rate the few batches change what is found, however a processor rounds.
    first = detguard("harden", "--data", many, "--rate", 0.05, *options, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    single = "single/weights/adversarial.safetensors"
    assert_what_was_held_out_is_judged(first, tmp_path / "single", bundled)
    options = (*FEW, *SHARED[-4:], "--model", single, "--teacher", "detguard-n")
    result = detguard("harden", *options, "--out", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    made = sorted(file.stem for file in (tmp_path / "run/weights").glob("*.json"))
    assert made == ["hard", "joint", "normal", "sparse"]
    trunk = {k: v for k, v in load_file(tmp_path / "run/weights/hard.safetensors").items() if k.startswith("trunk")}
    start = load_file(tmp_path / single)
    assert all(torch.equal(v, start[k.replace("trunk", "experts.0")]) for k, v in trunk.items())
    refused = refusal("harden", *FEW, "--model", single, "--out", "other", cwd=tmp_path)
    assert refused.returncode == 2
    assert "adversarial.safetensors" in refused.stderr


def test_an_ensemble_goes_on_for_some_time(hardened, tmp_path):
    model = hardened / "weights/joint.safetensors"
    options = [*OPTIONS[:-4], "--steps", 1, "--hours", 0.0015, "--teacher", "detguard-n"]
    began = time.monotonic()
    result = detguard("harden", *options, "--model", model, "--out", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert 5.4 <= time.monotonic() - began < 120
    stages = list(dict.fromkeys(r["stage"] for r in records(tmp_path / "run")))
    assert stages == ["adversarial", "normal", "hard", "joint"]
    start, end = (load_file(run / "weights/joint.safetensors") for run in (hardened, tmp_path / "run"))
    assert start.keys() == end.keys()
    apart = sum(float((value - start[key]).norm()) for key, value in end.items())
    assert 0 < apart < 0.5 * sum(float(value.norm()) for value in end.values())
    assert "0.0015 hours" in (tmp_path / "run/report.html").read_text()
    card = json.loads((tmp_path / "run/weights/joint.json").read_text())["hardened"]
    assert card["hours"] == 0.0015
    assert "photos" not in card


def test_experts_apart_start_from_the_undefended_detector(tmp_path, bundled):
    result = detguard("harden", *FEW, "--out", "run", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    told = {"weights": "run/weights/sparse.safetensors", "folder": "run", "unread": []}
    assert json.loads(result.stdout) == told | {"before": {}, "after": {}, "by": {}}
    made = sorted(file.stem for file in (tmp_path / "run/weights").glob("*.json"))
    assert made == ["adversarial", "hard", "joint", "sparse"]
    weights = load_file(tmp_path / "run/weights/joint.safetensors")
    assert json.loads((tmp_path / "run/weights/joint.json").read_text())["gated"]["fusion"] == "bounded:0.25"
    given = GatedNetwork(bundled.model, 0, ("undefended",)).experts[0].state_dict()
    experts = [{k: weights[f"experts.{i}.{k}"] for k in given} for i in range(3)]
    assert all(torch.equal(experts[0][k], given[k]) for k in given)
    for expert in experts[1:]:
        assert any(not torch.equal(expert[k], given[k]) for k in given)


def test_resumed_it_learns_the_labels_and_samples_that_the_run_keeps(tmp_path, tiny_data, bundled):
    shutil.copytree(tiny_data.parent, tmp_path / "data")
    file = tmp_path / "data/instances.json"
    file.write_text(file.read_text().replace('"person"', '"pedestrian"'))
    options = ("--data", "data/instances.json", *OPTIONS[2:-4], "--photos", 12, "--recipe", "pgd", "--learn", "both")
    options += ("--pretrain", ASSETS, "--samples", "attack", "--transforms", "jpeg:50", "--map", "pedestrian=person")
    list(detguard_attack(bundled, ASSETS / "bus.jpg", transforms="jpeg:75", steps=1, out=tmp_path / "attack"))
    result = detguard("harden", *options, "--out", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    card = json.loads((tmp_path / "run/weights/adversarial.json").read_text())
    told = {"learn": "both", "pretrain": True, "samples": 2, "transforms": "jpeg:50"}
    assert told.items() <= card["hardened"].items()
    page = (tmp_path / "run/report.html").read_text()
    assert "through jpeg:50" in page
    assert "Error of feature maps" in page
    assert (tmp_path / "run/weights/pretrain.json").exists()
    assert '"class": "person"' in (tmp_path / "run/labelled.jsonl").read_text()
    made = tmp_path / "run/weights/adversarial.safetensors"
    whole = load_file(made.rename(tmp_path / "whole.safetensors"))
    (tmp_path / "data/instances.json").unlink()
    (tmp_path / "attack/results.jsonl").unlink()
    result = detguard("harden", "--resume", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    ours = load_file(made)
    assert all(torch.equal(ours[key], whole[key]) for key in whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--data"),
        (("--data", ASSETS, "--recipe", "mtd", "--attack", "free"), "--attack free"),
        (("--data", ASSETS, "--attack", "fgsm", "--steps", "2"), "--steps 2"),
        (("--data", ASSETS, "--imgsz", "64", "--crop", "96"), "--crop 96: expected at most the 64 px"),
        (("--data", ASSETS, "--crop", "100"), "--crop 100"),
        (("--data", ASSETS, "--teacher", "detguard-n-hard"), "detguard-n-hard"),
        (("--data", "nowhere"), "nowhere"),
        (("--data", ASSETS, "--pretrain", ASSETS, "--recipe", "finetune"), "--pretrain: --recipe finetune"),
        (("--data", ASSETS, "--samples", ASSETS), f"--samples {ASSETS}: expected a run of detguard attack"),
        (("--data", ASSETS, "--transforms", "rotate:5"), "--transforms rotate:5: moves pixels"),
        (("--data", ASSETS, "--learn", "both"), f"--learn both: {ASSETS} has no labels"),
        (("--data", ASSETS, "--top-k", "9"), "--top-k 9"),
        (("--data", ASSETS, "--split", "tail"), "--split tail"),
        (("--data", ASSETS, "--split", "99"), "--split 99"),
        (("--data", ASSETS, "--corruptions", "rain"), "--corruptions rain"),
    ],
)
def test_wrong_use_is_one_line_that_names_the_option(tmp_path, arguments, message):
    result = refusal("harden", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_what_could_not_be_loaded_again_is_refused_before_training(tmp_path):
    own = (Path(ultralytics.__file__).parent / "cfg/models/11/yolo11.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(own.replace("[256, 3, 2]", "[192, 3, 2]"))
    YOLO(tmp_path / "mine.yaml", task="detect").save(tmp_path / "mine.pt")
    result = refusal("harden", *FEW, "--model", "mine.pt", "--out", "run", cwd=tmp_path)
    assert result.returncode == 2
    assert "mine.pt: is of mine.yaml, not as Ultralytics ships it" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_detector_of_larger_strides_is_hardened_by_whole_strides(tmp_path):
    YOLO("yolov8n-p6.yaml", task="detect").save(tmp_path / "p6.pt")
    options = ("--model", "p6.pt", "--recipe", "pgd", "--photos", 4, "--batch", 2, "--steps", 1, "--data", ASSETS)
    refused = refusal("harden", *options, "--imgsz", 128, "--crop", 96, "--out", "run", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--crop 96: expected a multiple of 64" in refused.stderr
    result = detguard("harden", *options, "--imgsz", 64, "--out", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_photos_held_out_are_learned_from_in_no_other_way(tmp_path, many, bundled):
    files = sorted(many.iterdir())
    (held,) = hold_out(files)[1]
    other = next(file for file in files if file != held)
    list(detguard_attack(bundled, [held, other], transforms="none", steps=1, out=tmp_path / "attack"))
    copies = shutil.copytree(many, tmp_path / "copies")
    for file in files:
        (copies / file.name).rename(copies / f"copy-{file.name}")
    job = Hardening.begin(
        "detguard-n", [str(many)], {"recipe": "pgd"}, ALONE, pretrain=[str(copies)],
        samples=[str(tmp_path / "attack")], imgsz=64, out=tmp_path / "run",
    )  # fmt: skip
    job.load(1)
    assert job.held_out == [held]
    assert len(job.source) == len(job.first) == ONE_IN - 1
    assert len(job.samples.clean) == 1
