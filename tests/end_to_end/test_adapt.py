"""`detguard adapt` as a user runs it: an ensemble learns photos that are all but black."""

import json
import re
import shutil
import time
from functools import partial

import cv2
import numpy as np
import pytest
import torch
import yaml
from program import Started, detguard, hurried, refusal, together
from safetensors.torch import load_file

from detguard import DetguardError
from detguard import attack as detguard_attack
from detguard.detectors.gated import GatedNetwork
from detguard.detectors.load import fused, load_detector, save_gated
from detguard.engine import bf16_helps
from detguard.hardening.validation import photo_of
from detguard.ranks import ALONE
from detguard.reports.evaluation import number as shown_as
from detguard.workflows.adapt import Adapting

# A head alone learns nothing of photos in which the layers before it see nothing.
OPTIONS = ("--new", "dark.jsonl", "--replay", "day.jsonl", "--batch", 8, "--rate", 3e-3, "--expert", "adapter")


@pytest.fixture(scope="module")
def place(tmp_path_factory, bundled, bundled_model, bus_file):
    """Folder with an ensemble, 10 photos of a bus by day and the same ones dark, and their labels as JSON lines."""
    folder = tmp_path_factory.mktemp("adapt")
    torch.manual_seed(0)
    network = GatedNetwork(fused(bundled_model), 11)
    card = {"architecture": "yolo11n.yaml", "classes": list(bundled.class_names.values()), "imgsz": 128}
    save_gated(
        network, card | {"hardened": {"eps": 2.0, "corruptions": ["fog", "frost"]}}, folder / "ensemble.safetensors"
    )
    photo = cv2.imread(str(bus_file))
    lines = {"day": [], "dark": []}
    (folder / "photos").mkdir()
    for number in range(10):
        scale = 0.15 + 0.01 * number
        shown = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        found = bundled.detect([shown[..., ::-1].copy()], 0.3)[0].records(bundled.class_names)
        for kind, light in (("day", 1.0), ("dark", 0.06)):
            name = f"photos/{kind}{number}.png"
            cv2.imwrite(str(folder / name), (shown * light).astype(np.uint8))
            lines[kind].append(json.dumps({"photo": name, "objects": found}) + "\n")
    for kind, entries in lines.items():
        (folder / f"{kind}.jsonl").write_text("".join(entries))
    return folder


# As good as sixteen batches, which take longer than learning.
by_four = partial(hurried, 4)


@pytest.fixture(scope="module")
def adapted(place):
    options = ("--model", "ensemble.safetensors", *OPTIONS, "--photos", 160, "--out", "run")
    result = detguard("adapt", *options, cwd=place, preexec_fn=by_four)
    assert result.returncode == 0, result.stderr
    return result


def test_a_photo_that_is_attacked_and_replayed_too_is_learned_from_or_judges_in_both(place, bundled, monkeypatch):
    monkeypatch.chdir(place)
    files = [place / f"photos/day{number}.png" for number in range(1, 10)]
    list(detguard_attack(bundled, files, transforms="none", steps=1, out=place / "attack"))
    job = Adapting.begin(
        str(place / "ensemble.safetensors"), [str(place / "attack")], {}, ALONE,
        replay=[str(place / "day.jsonl")], out=place / "both",
    )  # fmt: skip
    job.load(1)
    for judged, others in ((job.judged["new"], job.old), (job.judged["old"], job.new)):
        assert judged
        assert not {photo_of(one).stem for one in judged} & {photo_of(one).stem for one in others.labels}


def test_of_old_photos_those_with_objects_are_attacked(place, monkeypatch):
    monkeypatch.chdir(place)
    lines = [json.loads(line) for line in (place / "day.jsonl").read_text().splitlines()]
    lines[0]["objects"] = []  # the first that judges
    (place / "first.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = Adapting.begin(
        str(place / "ensemble.safetensors"), ["dark.jsonl"], {}, ALONE, replay=["first.jsonl"], out=place / "first"
    )
    job.load(1)
    assert job.judgement.photos == {"new": 2, "old": 2, "attacked": 1}
    assert job.judgement.with_objects == {"new": 2, "old": 1, "attacked": 1}


def figures(text, kind):
    rows = re.findall(rf"\d+ {kind} photos +│ (\w+) +│ +([.\d]+) +│ +([.\d]+) ", text)
    return {figure: (float(before), float(after)) for figure, before, after in rows}


def test_it_learns_the_new_kind_and_keeps_the_old(adapted, place):
    assert "frozen, 10 new photos are too few" in adapted.stdout
    before, after = figures(adapted.stdout, "new")["F1"]
    assert after > before + 0.2
    before, after = figures(adapted.stdout, "old")["AP50"]
    assert after > before - 0.1


def test_the_adapted_ensemble_loads_like_any_detector_and_says_where_it_is_from(adapted, place, bus_file):
    detector = load_detector(place / "run/weights/adapted.safetensors")
    assert detector.model.names == ["normal", "hard", "adversarial", "adapted 1"]
    detector.predict(bus_file, 0.25)
    card = json.loads((place / "run/weights/adapted.json").read_text())
    assert card["adapted"][0]["from"] == "ensemble"
    assert card["adapted"][0]["eps"] == 2.0
    assert yaml.safe_load((place / "run/config.yaml").read_text())["corruptions"] == ["fog", "frost"]
    page = (place / "run/report.html").read_text()
    for text in ("Adapting ensemble<", "Before and after", "Losses", "Learned from 8 new and 8 old photos"):
        assert text in page
    kept = json.loads((place / "run/figures.json").read_text())
    assert kept["photos"] == {"new": 2, "old": 2, "attacked": 2}
    assert kept["before"]["attacked"]["AP"] < kept["before"]["old"]["AP"]
    assert "at 2 of 255 levels, by PGD of 10 steps" in page
    assert f"2 old photos held out: AP {shown_as(kept['before']['old']['AP'])} before" in page


def test_old_experts_and_their_gate_are_bit_identical(adapted, place):
    old, new = (load_file(place / file) for file in ("ensemble.safetensors", "run/weights/adapted.safetensors"))
    for name, value in old.items():
        assert torch.equal(new[name], value), name


def test_an_adapted_ensemble_can_be_adapted_again_and_refuses_beyond_its_limit(adapted, place):
    model = "run/weights/adapted.safetensors"
    again = detguard(
        "adapt", "--model", model, *OPTIONS, "--photos", 8, "--out", "again", cwd=place, preexec_fn=hurried
    )
    assert again.returncode == 0, again.stderr
    card = json.loads((place / "again/weights/adapted.json").read_text())
    assert card["gated"]["experts"][3:] == ["adapted 1", "adapted 2"]
    assert len(card["adapted"]) == 2
    refused = refusal("adapt", "--model", model, *OPTIONS, "--max-experts", 4, "--out", "more", cwd=place)
    assert refused.returncode == 2
    assert "--max-experts 4" in refused.stderr


def test_four_processes_end_near_the_weights_of_one(place):
    options = ("adapt", "--model", "ensemble.safetensors", *OPTIONS, "--photos", 16, "--workers", 1)
    alone = detguard(*options, "--out", "alone", cwd=place, preexec_fn=hurried)
    first, *others = together(*options, "--out", "all", folders=[place] * 4, preexec_fn=hurried)
    assert (alone.returncode, first.returncode) == (0, 0), first.stderr
    assert figures(first.stdout, "new").keys() == figures(alone.stdout, "new").keys() != set()
    assert {(other.returncode, other.stdout, other.stderr) for other in others} == {(0, "", "")}
    ours, theirs = (load_file(place / run / "weights/adapted.safetensors") for run in ("alone", "all"))
    learned = [name for name in ours if name.endswith(".up")]  # which begins at zero
    apart, moved = (
        sum(float((ours[name] - by * theirs[name]).square().sum()) for name in learned) ** 0.5 for by in (1, 0)
    )
    # In bfloat16 the rounding is nearly as much as what processes that share no gradients are apart here.
    assert apart < (0.2 if bf16_helps() else 0.01) * moved


def test_killed_inside_an_append_it_goes_on_to_the_same_weights_and_records(adapted, place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run", ignore=shutil.ignore_patterns("adapted.*"))
    results = tmp_path / "run/results.jsonl"
    whole = results.read_text()
    results.write_text(whole[:-30])
    elsewhere = [(place / name).rename(place / f"{name}.away") for name in ("dark.jsonl", "day.jsonl")]
    again = detguard("adapt", "--resume", tmp_path / "run", "--json", cwd=place, preexec_fn=by_four)
    for file in elsewhere:
        file.rename(file.with_suffix(""))
    assert again.returncode == 0, again.stderr
    told = json.loads(again.stdout)
    assert (told["weights"], told["unread"]) == (str(tmp_path / "run/weights/adapted.safetensors"), [])
    for figure, (before, after) in figures(adapted.stdout, "new").items():
        assert told["before"]["new"][figure] == pytest.approx(before, abs=0.001)
        assert told["after"]["new"][figure] == pytest.approx(after, abs=0.001)
    assert [without_time(r) for r in results.read_text().splitlines()] == list(map(without_time, whole.splitlines()))
    ours, before = (load_file(run / "run/weights/adapted.safetensors") for run in (tmp_path, place))
    assert all(torch.equal(ours[key], before[key]) for key in before)


def without_time(line):
    return {k: v for k, v in json.loads(line).items() if k != "photos_per_second"}


def test_a_run_whose_ensemble_has_changed_does_not_go_on(adapted, place):
    config = (place / "run/config.yaml").read_text()
    (place / "changed").mkdir()
    used = yaml.safe_load(config)["detector"]["sha256"]
    (place / "changed/config.yaml").write_text(config.replace(used, "0" * 64))
    result = refusal("adapt", "--resume", "changed", cwd=place)
    assert result.returncode == 2
    assert "ensemble.safetensors: no longer the weights" in result.stderr


def test_a_run_learns_by_no_other_ensemble_than_that_which_is_checked(place):
    ensemble, new, old = (str(place / name) for name in ("ensemble.safetensors", "dark.jsonl", "day.jsonl"))
    Adapting.begin(ensemble, [new], {}, ALONE, replay=[old], out=(folder := place / "other"))
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"model": "owner/tiny"}))
    with pytest.raises(DetguardError, match=r"`model` owner/tiny: the run's detector is .*ensemble\.safetensors"):
        Adapting.resume(folder, ALONE)


def test_it_warns_that_the_fusion_bounds_new_experts(place):
    card = json.loads((place / "ensemble.json").read_text())
    card["gated"]["fusion"] = "average:0.6"
    (place / "floored.json").write_text(json.dumps(card))
    (place / "floored.safetensors").write_bytes((place / "ensemble.safetensors").read_bytes())
    # Refused after the warning: nothing has to be trained.
    result = refusal("adapt", "--model", "floored.safetensors", *OPTIONS, "--max-experts", 3, cwd=place)
    assert result.returncode == 2
    assert "fusion average:0.6 bounds" in result.stderr


def test_a_folder_is_replayed_by_what_the_ensemble_finds_there(place):
    result = detguard(
        "adapt", "--model", "ensemble.safetensors", "--new", "dark.jsonl", "--replay", "photos", "--mode", "full",
        "--batch", 6, "--photos", 12, "--corruptions", "fog,snow", "--out", "folder", cwd=place,
        preexec_fn=hurried,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "2 old photos held out (no labels: agreement with ensemble): AP 1.000 before" in result.stdout
    kept = json.loads((place / "folder/figures.json").read_text())
    assert kept["answers"] == {"old": "ensemble", "attacked": "ensemble"}
    assert "agreement with it, not accuracy" in (place / "folder/report.html").read_text()
    card = json.loads((place / "folder/weights/adapted.json").read_text())
    assert card["gated"]["shared"]["3"]["form"] == "head"  # by default
    assert len(yaml.safe_load((place / "folder/config.yaml").read_text())["data"]["replay"]) == 1


def test_unreadable_photos_are_named_and_the_rest_is_learned(place):
    lines = (place / "dark.jsonl").read_text()
    (place / "photos/broken.png").write_bytes(b"no photo")
    broken = json.dumps({"photo": "photos/broken.png", "objects": []}) + "\n"
    (place / "some.jsonl").write_text((broken + lines + broken).replace('"person"', '"pedestrian"'))
    card = json.loads((place / "ensemble.json").read_text()) | {"adapted": None}
    (place / "stranger.json").write_text(json.dumps(card))
    (place / "stranger.safetensors").write_bytes((place / "ensemble.safetensors").read_bytes())
    options = ("--new", "some.jsonl", "--map", "pedestrian=person", "--photos", 8, "--batch", 4, "--out", "some")
    result = detguard("adapt", "--model", "stranger.safetensors", *options, cwd=place, preexec_fn=hurried)
    (place / "photos/broken.png").unlink()
    assert result.returncode == 2
    assert "broken.png" in result.stderr
    assert "without --replay" in result.stderr
    assert '"class": "person"' in (place / "some/new.jsonl").read_text()
    assert load_detector(place / "some/weights/adapted.safetensors")
    assert [one["from"] for one in json.loads((place / "some/weights/adapted.json").read_text())["adapted"]] == [
        "stranger"
    ]


LEARNING = "--photos 160 --batch 8 --rate 3e-3 --expert adapter"
LIVING = ("--on-drift", "adapt", "--gather", 10, "--keep", 10, "--adapt", LEARNING)


@pytest.fixture(scope="module")
def lived(place):
    """A live run whose stream turns dark and goes on until what was learned is deployed: its folder and its lines."""
    day, dark = ((place / f"{kind}.jsonl").read_text().splitlines(keepends=True) for kind in ("day", "dark"))
    watched = ("monitor", "--model", "ensemble.safetensors", "--stream", "-", "--window", 8, "--out", "watched")
    fed = [*day * 3, *dark * 2]
    process = Started(*watched, *LIVING, cwd=place, stdin="-")
    process.write("".join(fed))
    until = time.monotonic() + 400
    while not re.search("deployed|kept", process.told) and time.monotonic() < until:
        fed.append(dark[len(fed) % 10])
        process.write(fed[-1])
        time.sleep(0.5)
    fed += dark
    process.write("".join(dark))
    process.close()
    assert process.ended(200).returncode == 1
    return place / "watched", fed


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_while_the_stream_goes_on_what_it_needs_is_learned_and_deployed(lived):
    run, fed = lived
    events, records = (lines_of(run / f"{name}.jsonl") for name in ("events", "results"))
    assert [event["event"] for event in events[:3]] == ["gathering", "adapting", "deployed"]
    gathering, adapting, deployed = events[:3]
    assert abs(gathering["began"] - 31) <= 2
    assert gathering["number"] <= adapting["number"] < deployed["number"]
    # No photo is lost, and some were judged while another process learned.
    assert [record["number"] for record in records] == list(range(1, len(fed) + 1))
    assert deployed["number"] - adapting["number"] >= 3
    assert len(lines_of(run / "adapted/001.new.jsonl")) == 10
    assert len(lines_of(run / "adapted/001.replay.jsonl")) == 10
    assert load_detector(run / "adapted/001/weights/adapted.safetensors").experts[3:] == ("adapted 1",)
    before, after = (
        [r["f1"] for r in records if first < r["number"] <= last]
        for first, last in ((gathering["began"], deployed["number"]), (deployed["number"], len(fed)))
    )
    assert sum(after) / len(after) > sum(before) / len(before) + 0.1
    assert deployed["after"]["new"]["F1"] > deployed["before"]["new"]["F1"]
    page = (run / "report.html").read_text()
    assert f"deployed adapted/001/weights/adapted.safetensors: {deployed['why']}".replace(">", "&gt;") in page
    assert "another detector" in page


def test_a_folder_without_labels_is_not_replayed_beside_a_stream(place):
    watched = ("monitor", "--model", "ensemble.safetensors", "--stream", "-", "--replay", "photos", "--out", "no")
    result = refusal(*watched, *LIVING, cwd=place)
    assert result.returncode == 2
    assert "--replay photos: a folder without labels" in result.stderr
    assert not (place / "no").exists()


def test_killed_while_it_adapts_it_goes_on_to_deploy(place):
    day, dark = ((place / f"{kind}.jsonl").read_text().splitlines(keepends=True) for kind in ("day", "dark"))
    watched = ("monitor", "--model", "ensemble.safetensors", "--stream", "-", "--window", 8, "--out", "killed")
    process = Started(*watched, *LIVING, cwd=place, stdin="-")
    process.write("".join([*day * 3, *dark * 2]))
    process.wait_for((place / "killed/adapted/001/config.yaml").exists)
    assert "adapting to the photos" in process.told
    process.stop()
    process.ended()
    resumed = detguard("monitor", "--resume", "killed", cwd=place, stdin="".join(dark[:3]))
    assert resumed.returncode == 1, resumed.stderr
    assert "at work on this run" not in (place / "killed/adapted/001.log").read_text()
    events = [event["event"] for event in lines_of(place / "killed/events.jsonl")]
    assert events == ["gathering", "adapting", "deployed"]
    records = lines_of(place / "killed/results.jsonl")
    assert [r["number"] for r in records] == list(range(1, len(records) + 1))


def test_what_was_deployed_can_be_taken_back(lived, place):
    run, fed = lived
    shutil.copytree(run, place / "back")
    resume = ("monitor", "--resume", "back")
    result = detguard(*resume, "--roll-back", cwd=place, stdin=fed[-1] * 3)
    assert result.returncode == 1, result.stderr
    assert "rolled back to ensemble.safetensors" in result.stdout
    records = lines_of(place / "back/results.jsonl")
    assert [r["number"] for r in records[-3:]] == [len(fed) + n for n in (1, 2, 3)]
    dark = [r for r in records if r["photo"] == records[-1]["photo"]]
    assert records[-1]["f1"] == dark[0]["f1"]
    again = detguard(*resume, "--roll-back", cwd=place, stdin="")
    assert again.returncode == 2
    assert "--roll-back: the run has deployed nothing that could be taken back" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--model"),
        (("--model", "ensemble.safetensors"), "--new"),
        (("--model", "detguard-n", "--new", "dark.jsonl"), "detguard harden"),
        (("--model", "ensemble.safetensors", "--new", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--model", "ensemble.safetensors", "--new", "wrong.jsonl"), "wrong.jsonl line 1"),
        (("--model", "ensemble.safetensors", "--new", "dark.jsonl", "--corruptions", "rain"), "rain"),
        (("--model", "ensemble.safetensors", *OPTIONS, "--mode", "frozen", "--experts", 0), "--experts 0"),
        (("--model", "ensemble.safetensors", "--new", "empty.jsonl"), "empty.jsonl"),
        (("--model", "ensemble.safetensors", *OPTIONS, "--replay", "photos"), "--replay"),
        (("--model", "ensemble.safetensors", "--new", "dark.jsonl", "--replay", "dark.jsonl"), "--replay dark.jsonl"),
        (("--resume", "nowhere"), "nowhere"),
    ],
)
def test_wrong_use_is_one_line_that_names_the_option(place, arguments, message):
    (place / "wrong.jsonl").write_text("{}\n")
    (place / "empty.jsonl").write_text("")
    result = refusal("adapt", *arguments, cwd=place)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (place / "runs").exists()


def test_only_an_ensemble_can_adapt_on_drift(place):
    result = refusal("monitor", "--stream", "-", "--on-drift", "adapt", cwd=place)
    assert result.returncode == 2
    assert "--on-drift adapt" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gather", 4), "--gather 4"),
        (("--keep", 4), "--keep 4"),
        (("--adapt", "--corruptions rain"), "--corruptions rain"),
        (("--adapt", "--max-experts 3"), "--max-experts 3"),
        (("--adapt", "--experts 0"), "--experts 0"),
        (("--imgsz", 64), "--imgsz 64"),
        (("--stream", 0), "no labels"),
        (("--on-drift", "tell", "--gather", 10), "--gather: goes with --on-drift adapt"),
    ],
)
def test_what_would_fail_after_a_drop_is_refused_before(place, arguments, message):
    watched = ("monitor", "--model", "ensemble.safetensors", "--stream", "-", "--on-drift", "adapt", *arguments)
    result = refusal(*watched, cwd=place)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (place / "runs").exists()
