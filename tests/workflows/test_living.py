"""What a monitor that learns remembers of a stream without an end."""

import copy
import gc
import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typing_extensions import override

from detguard import DetguardError
from detguard.data.stream import Labelled, Labels, to_lines
from detguard.detections import Detections
from detguard.detectors.gated import GatedDetector, GatedNetwork
from detguard.detectors.load import fused, save_gated
from detguard.hardening.judging import Judgement
from detguard.hardening.monitor import MOST_WINDOWS, Deployment, observe
from detguard.photos import encode_png, read_photo
from detguard.reports.monitoring import drop_items
from detguard.runs import Run
from detguard.workflows.living import NICENESS, Living, judges, verdict, with_judges
from detguard.workflows.monitor import Drops, film, recent

KEEP = 5
PHOTOS = {"new": 13, "old": 20, "attacked": 8}


def figures(f1):
    return {"F1": f1, "AP": 0.5, "AP50": 0.5, "AP_error": None}


def judged(living, before, after):
    """What an adaptation writes at its end."""
    (folder := living.run.folder / "adapted/001").mkdir(parents=True, exist_ok=True)
    Judgement(PHOTOS, {}, before, after, PHOTOS).keep(Run(folder, {}))


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


def test_a_long_run_that_goes_on_looks_seldom_for_what_it_may_forget(tmp_path, bundled, monkeypatch):
    first = unlucky(tmp_path, bundled)
    record = {"photo": "gone.png", "objects": [], "f1": 1.0, "confidence": 0.5, "entropy": None, "began": None}
    records = [record | {"number": number} for number in range(1, 2 * MOST_WINDOWS * 8 + 1)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    for one in records:
        first._remember(one)
    sizes, forget = [], Living._forget
    monkeypatch.setattr(Living, "_forget", lambda self: sizes.append(len(self.seen)) or forget(self))
    monkeypatch.setattr("detguard.workflows.living.MOST_WAITING", 300)
    again = unlucky(tmp_path, bundled)
    assert (again.seen, again.reservoir, again.remembered) == (first.seen, first.reservoir, first.remembered)
    assert (len(sizes), sizes[0]) == (2, 300)


@pytest.fixture
def living(tmp_path, bundled_model):
    network = GatedNetwork(fused(bundled_model), split=11, fusion="bounded:0.25")
    config = {"command": "monitor", "monitor": {"window": 1}, "on_drift": "adapt", "detector": {"model": "first"}}
    run = Run(tmp_path, config | {"living": {"gather": 3, "keep": KEEP, "adapt": []}})
    return Living(run, GatedDetector(network, "first", 320))


@pytest.mark.parametrize("unfinished", ["gathering", "adapting"])
def test_a_roll_back_gives_up_what_is_being_learned(living, unfinished):
    note(living, "deployed", "second")
    living.learned = {1}
    living._note({"event": unfinished, "number": 0, "began": 1, "folder": "adapted/001", "model": "second"})
    living.roll_back()
    given_up, back = living.events[-2:]
    assert (given_up["event"], given_up["model"], given_up["why"]) == ("kept", "second", "rolled back")
    assert (back["event"], back["model"]) == ("rolled back", "first")
    assert not living.learned


def test_a_drop_of_what_is_taken_back_is_not_learned_by_what_is_gone_back_to(living):
    note(living, "deployed", "second")
    living.passed = {25}
    living.number = 39
    living.roll_back()
    living._pass({"began": 25})
    assert not living.passed
    living._pass({"began": 40})
    assert living.passed == {40}


def test_copies_of_photos_wait_as_long_as_their_labels_may_come(living, tmp_path):
    photo = tmp_path / "camera.png"
    photo.write_bytes(b"1")
    bare = {"photo": str(photo), "objects": [], "id": "1", "labelled": False, "f1": None, "confidence": 0.5}
    for number in range(1, 2 * MOST_WINDOWS):
        living.saw(bare | {"number": number, "entropy": None, "began": None})
    living.saw(bare | {"number": 1, "labelled": True, "f1": 1.0, "entropy": None, "began": None})
    assert living.reservoir == [1]
    assert living.file(1, photo).parent.name == "photos"


def test_photos_that_cannot_be_read_take_no_place_among_those_that_wait_for_labels(living, tmp_path, monkeypatch):
    monkeypatch.setattr("detguard.workflows.living.MOST_WAITING", 2)
    photo = tmp_path / "camera.png"
    photo.write_bytes(b"1")
    bare = {"photo": str(photo), "objects": [], "labelled": False}
    living.saw(bare | {"number": 1, "id": "1", "f1": None, "confidence": 0.5, "entropy": None, "began": None})
    for number in range(2, 6):
        living.saw(bare | {"number": number, "id": str(number), "error": "no photo"})
    assert living.seen.keys() == {1}


@pytest.mark.parametrize("files", [2, 9])
def test_a_file_that_a_stream_names_again_judges_again_or_is_learned_from_again(tmp_path, bundled, files):
    living = unlucky(tmp_path, bundled, gather=12)
    for number in range(1, 50):
        show(living, number, began=20 if number == 22 else None, sha256=f"{number % files}")
    lines = [json.loads(line) for part in ("new", "replay") for line in (tmp_path / f"adapted/001.{part}.jsonl").open()]
    roles = {(int(Path(line["photo"]).stem) % files, line["judges"]) for line in lines}
    assert {judging for _, judging in roles} == {True, False}
    assert len(roles) == files
    assert unlucky(tmp_path, bundled).turn_of == living.turn_of


def test_of_the_photos_that_judge_none_is_ever_learned_from():
    shown = [{"turn": turn} for turn in range(1, 1001)]
    by_parts = [one["judges"] for first in range(0, 1000, 50) for one in with_judges(shown[first : first + 50])]
    assert by_parts == [one["judges"] for one in with_judges(shown)]
    assert 195 <= sum(by_parts) <= 205
    assert all(any(by_parts[first : first + 8]) for first in range(990))
    assert [one["judges"] for one in with_judges(shown[:4])] == [False, False, False, True]


def test_of_few_old_photos_the_last_judges(tmp_path, bundled):
    living = unlucky(tmp_path, bundled, gather=12)
    for number in range(1, 40):
        show(living, number, began=5 if number == 7 else None)
    replayed = (tmp_path / "adapted/001.replay.jsonl").read_text().splitlines()
    assert any(json.loads(line)["judges"] for line in replayed)


def test_a_stream_that_is_cut_off_before_one_judges_gathers_on_when_it_is_piped_in_again(tmp_path, bundled):
    living = unlucky(tmp_path, bundled, gather=64, stream={"class_map": {}, "source": "-"})
    began = next(n for n in range(10, 99) if not any(judges({"turn": n + i}) for i in range(6)))
    for number in range(1, began + 6):
        show(living, number, began=began if number == began + 1 else None)
    living.end()
    assert living.last["event"] == "gathering"


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
    for expected in (str(living.run.folder / "b"), "first"):
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


class Unlucky(Living):
    """Whatever it adapts to fails as soon as it has begun."""

    RETRIES = 0

    @override
    def _start(self, event):
        self.run.write(f"{event['folder']}/config.yaml", b"")
        Path(f"{self.run.path(event['folder'])}.log").write_text("error: no memory\n")
        self.child = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
        self.child.wait()


def unlucky(folder, bundled, gather=3, **config):
    config = {"command": "monitor", "monitor": {"window": 8}, "on_drift": "adapt", "replay": []} | config
    config |= {"detector": {"model": "m"}, "living": {"gather": gather, "keep": KEEP, "adapt": []}}
    return Unlucky(Run(folder, {"stream": {"class_map": {}}} | config), bundled)


def show(living, number, began=None, f1=0.5, **more):
    """A photo of the stream that is judged, and since when accuracy has dropped."""
    record = {"number": number, "photo": f"{number}.png", "objects": [], "f1": f1, "confidence": 0.5, "entropy": None}
    record |= more
    living.run.append(record | {"began": began})
    living.saw(record | {"began": began})


def photos_of(file):
    """The numbers of photos that are learned, of files as `show` names them."""
    return [int(Path(json.loads(line)["photo"]).stem) for line in file.read_text().splitlines()]


def show_weather(living, fog, last=200):
    """Clear photos, fog from 51 on on so many, of which is told at the tenth or where it ends, and clear ones again."""
    rng, told = np.random.default_rng(0), 50 + min(fog, 10)
    for number in range(1, last + 1):
        level = 0.2 if 51 <= number < 51 + fog else 0.8
        show(living, number, began=51 if number == told else None, f1=float(rng.normal(level, 0.1)))


def test_when_accuracy_rises_again_photos_since_then_are_not_learned_as_the_new_kind(tmp_path, bundled):
    living = unlucky(tmp_path, bundled, gather=64)
    show_weather(living, fog=20)
    gathering, adapting, _ = living.events
    assert (gathering["number"], adapting["event"]) == (60, "adapting")
    assert adapting["number"] < 51 + 40  # and it is not waited for more, which may never come
    assert photos_of(tmp_path / "adapted/001.new.jsonl") == [*range(51, 71)]


def test_what_is_over_before_there_is_enough_to_learn_from_is_given_up_with_the_reason(tmp_path, bundled):
    living = unlucky(tmp_path, bundled, gather=64)
    show_weather(living, fog=4)
    assert [event["event"] for event in living.events] == ["gathering", "kept"]
    why = "accuracy has risen again since photo 55; 4 photos of the new kind are too few"
    assert living.events[-1]["why"] == why
    assert living.events[-1]["number"] < 51 + 40


@pytest.mark.parametrize("fog", [10, 20])
def test_a_stream_that_ends_after_accuracy_rose_again_learns_what_came_before(tmp_path, bundled, fog):
    living = unlucky(tmp_path, bundled, gather=64, stream={"class_map": {}, "source": "-"})
    show_weather(living, fog, last=50 + fog + 11)
    living.end()
    assert [event["event"] for event in living.events] == ["gathering", "adapting", "kept"]
    assert photos_of(tmp_path / "adapted/001.new.jsonl") == [*range(51, 51 + fog)]


def test_what_is_steadily_worse_is_gathered_to_the_end(tmp_path, bundled):
    for seed in range(5):
        (tmp_path / str(seed)).mkdir()
        living = unlucky(tmp_path / str(seed), bundled, gather=64, monitor={"window": 32})
        rng = np.random.default_rng(seed)
        for number in range(1, 76):
            f1 = rng.beta(2.4, 0.6) if number <= 10 else rng.beta(0.6, 2.4)  # widely scattered
            show(living, number, began=11 if number == 20 else None, f1=float(f1))
        assert len(photos_of(tmp_path / f"{seed}/adapted/001.new.jsonl")) == 64


def test_a_drop_while_another_is_learned_is_learned_next_and_each_once(tmp_path, bundled):
    living = unlucky(tmp_path, bundled)
    for number in range(1, 30):
        show(living, number, began={10: 9, 12: 11}.get(number))
    told = [(event["event"], event.get("began")) for event in living.events]
    assert told == [
        ("gathering", 9),
        ("adapting", 9),
        ("kept", None),
        ("gathering", 11),
        ("adapting", 11),
        ("kept", None),
    ]
    assert "(error: no memory)" in living.events[2]["why"]
    again = unlucky(tmp_path, bundled)
    show(again, 12, began=11)  # resumed, a run goes through its last window once more
    assert len(again.events) == len(told)


def test_of_drops_that_come_while_another_is_learned_none_is_passed_over(tmp_path, bundled, monkeypatch):
    monkeypatch.setattr(Unlucky, "_judge", lambda self: self.number > 24 and Living._judge(self))  # it takes so long
    living, drops = unlucky(tmp_path, bundled), {10: 9, 16: 15, 22: 21}
    for number in range(1, 24):
        show(living, number, began=drops.get(number))
    assert [event["event"] for event in living.events] == ["gathering", "adapting"]
    assert living.passed == unlucky(tmp_path, bundled).passed == {15, 21}
    for number in range(24, 27):
        show(living, number)
    assert [event["began"] for event in living.events if event["event"] == "gathering"] == [9, 15]
    assert living.passed == unlucky(tmp_path, bundled).passed == {21}  # also of a run that is resumed meanwhile
    for number in range(27, 40):
        show(living, number)
    assert [event["began"] for event in living.events if event["event"] == "adapting"] == [9, 15, 21]
    assert living.passed == unlucky(tmp_path, bundled).passed == set()
    replayed = (tmp_path / "adapted/002.replay.jsonl").read_text().splitlines()
    assert max(int(Path(json.loads(line)["photo"]).stem) for line in replayed) < 15


def test_a_drop_that_was_recorded_before_a_kill_is_learned_after_it(tmp_path, bundled):
    record = {"number": 10, "photo": "10.png", "objects": [], "f1": 0.5, "confidence": 0.5, "entropy": None, "began": 9}
    unlucky(tmp_path, bundled).run.append(record)
    living = unlucky(tmp_path, bundled)
    show(living, 11)
    assert [event["began"] for event in living.events] == [9]
    living.end()
    assert [event["event"] for event in living.events] == ["gathering", "kept"]
    assert living.events[-1]["why"] == "2 photos of the new kind are too few"


def test_a_stream_that_is_cut_off_gathers_on_when_it_is_piped_in_again(tmp_path, bundled):
    said = []
    living = unlucky(tmp_path, bundled, stream={"class_map": {}, "source": "-"})
    living.report = said.append
    show(living, 10, began=9)
    living.end()
    assert [event["event"] for event in living.events] == ["gathering"]
    assert "1 photos of the new kind are too few; a resumed run goes on gathering" in said[-1]


def test_what_fails_is_tried_again_later_each_time_before_it_is_given_up(tmp_path, bundled, monkeypatch):
    monkeypatch.setattr(Unlucky, "RETRIES", 2)
    tried, start = [], Unlucky._start
    monkeypatch.setattr(Unlucky, "_start", lambda self, event: tried.append(self.number) or start(self, event))
    living = unlucky(tmp_path, bundled)
    for number in range(1, 60):
        show(living, number, began=5 if number == 6 else None)
    assert tried == [7, 16, 33]  # a window of 8 photos after the first failure was seen, two after the second
    assert [event["event"] for event in living.events] == ["gathering", "adapting", "kept"]
    assert "exit code 2" in living.events[-1]["why"]


def test_what_cannot_be_started_is_tried_again(tmp_path, bundled, monkeypatch):
    living = unlucky(tmp_path, bundled)
    monkeypatch.setattr(Unlucky, "_start", Living._start)

    def popen(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", popen)
    for number in range(1, 30):
        show(living, number, began=5 if number == 6 else None)
    assert living.last["event"] == "adapting"
    assert living.waits > 20
    living.end()
    assert living.last["event"] == "kept"


def test_what_writes_nothing_for_hours_is_ended(tmp_path, bundled, monkeypatch):
    living = unlucky(tmp_path, bundled)
    living._note({"event": "adapting", "number": 0, "began": 1, "folder": "adapted/001", "model": "first"})
    log = living.run.folder / "adapted/001.log"
    log.parent.mkdir()
    log.touch()
    living.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    show(living, 1)
    assert living.child.poll() is None
    monkeypatch.setattr("detguard.workflows.living.STALLED", -1)
    show(living, 2)
    assert living.child.wait(30) != 0


def test_what_is_learned_from_is_what_was_judged_though_the_camera_writes_over_it(tmp_path, bundled, bus):
    photo = tmp_path / "latest.png"
    photo.write_bytes(encode_png(np.zeros((64, 64, 3), np.uint8)))
    (tmp_path / "run").mkdir()
    living = unlucky(tmp_path / "run", bundled)
    (record,) = observe(living.run, living, [Labelled(photo, bundled.detect([bus], 0.25)[0])], "kswin", 8)
    photo.write_bytes(encode_png(np.full((64, 64, 3), 255, np.uint8)))  # the next one
    living.saw(record)
    assert read_photo(living.seen[1]["photo"]).max() == 0


def test_a_run_that_lies_elsewhere_now_goes_on(tmp_path, bundled, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    living = unlucky(Path("run"), bundled)
    for number in range(1, 4):
        (tmp_path / "a.png").write_bytes(b"1")
        record = {"number": number, "photo": "a.png", "objects": [], "f1": 0.5, "confidence": 0.5, "entropy": None}
        living.run.append(record | {"began": None})
        living.saw(record | {"began": None})
    assert all(Path(one["photo"]).is_absolute() for one in living.seen.values())
    living.run.write("adapted/001.new.jsonl", to_lines(living.seen.values()))
    living.number = 1
    note(living, "deployed", "adapted/000/weights/adapted.safetensors")
    living._note({"event": "adapting", "number": 3, "began": 1, "folder": "adapted/001", "model": "first"})
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    again = unlucky(tmp_path / "moved", bundled)
    assert again.learned == {1, 2, 3}
    assert again.model(4) == str(tmp_path / "moved/adapted/000/weights/adapted.safetensors")


def test_a_drop_may_reach_back_over_photos_without_objects(tmp_path, bundled):
    living = unlucky(tmp_path, bundled)
    for number in range(1, 2 * MOST_WINDOWS * 8 + 1):
        f1 = 0.5 if number % 2 else None
        record = {"number": number, "photo": "gone.png", "objects": [], "f1": f1, "confidence": 0.5, "entropy": None}
        living.saw(record | {"began": None})
    assert min(living.seen) == 1
    for later in range(number + 1, number + 5):
        living.saw(record | {"number": later, "f1": 0.5, "began": None})
    assert min(n for n in living.seen if n not in living.reservoir) > 5


def test_of_an_adaptation_that_is_not_deployed_its_records_alone_stay(tmp_path, bundled):
    living = unlucky(tmp_path, bundled)
    living._note({"event": "adapting", "number": 0, "began": 1, "folder": "adapted/001", "model": "first"})
    kinds = {kind: figures(0.5) for kind in PHOTOS}
    judged(living, kinds, kinds)
    living.run.write("adapted/001/state/adapt.pt", b"large")
    living.run.write("adapted/001/weights/adapted.safetensors", b"large")
    living.child = subprocess.Popen([sys.executable, "-c", ""])
    living.child.wait()
    show(living, 1)
    assert living.last["event"] == "kept"
    assert [file.name for file in (tmp_path / "adapted/001").iterdir()] == ["figures.json"]


def test_between_photos_of_a_drop_so_many_without_objects_may_lie(tmp_path, bundled, monkeypatch):
    monkeypatch.setattr("detguard.workflows.living.MOST_RECENT", 20)
    monkeypatch.setattr("detguard.workflows.monitor.MOST_RECENT", 20)
    living, drops = unlucky(tmp_path, bundled), Drops(unlucky(tmp_path, bundled).run)
    for number in range(1, 51):
        show(living, number)
        drops.saw({"number": number, "photo": f"{number}.png", "objects": [], "f1": None, "began": None})
    assert living.seen.keys() == {*range(31, 51), *living.reservoir}
    assert [*drops.recent] == [*range(31, 51)]


def test_what_a_drop_writes_and_a_page_reads_does_not_grow_with_the_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("detguard.workflows.monitor.MOST_TOLD", 8)
    run = Run(tmp_path, {"command": "monitor", "monitor": {"window": 8}})
    bare = {"photo": "a.png", "objects": [], "confidence": 0.5, "entropy": None, "began": None, "f1": None}
    known, drops, written = bare | {"f1": 0.5}, Drops(run), []
    monkeypatch.setattr(run, "write", lambda *given: written.append(given))
    records = [known | {"number": number} for number in range(1, 20)] + [bare | {"number": 20, "labelled": False}]
    records += [known | {"number": 21, "began": 17}, known | {"number": 30, "began": 29}]
    for record in (*records, known | {"number": 20, "photo": "late.png", "labelled": True}):
        run.append(record)
        drops.saw(record)
    assert not written
    file = tmp_path / "dropped.jsonl"
    assert [json.loads(line)["photo"] for line in file.read_text().splitlines()] == ["a.png"] * 5 + ["late.png"]
    Drops(run)
    assert written == [("dropped.jsonl", file.read_bytes())]
    results = tmp_path / "results.jsonl"
    results.write_text("no json\n" + results.read_text())  # which is read no more
    assert [record["number"] for record in recent(run)] == [17, 18, 19, 20, 21, 30]


@pytest.fixture
def slept(living, tmp_path, monkeypatch):
    """A monitor whose processes that adapt do nothing for a minute."""
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    living.run.config |= {"replay": [], "stream": {"class_map": {}}}
    living.run.write("adapted/001.replay.jsonl", b"")
    yield living
    living.child.kill()
    living.child.wait()


@pytest.mark.parametrize("own", [0, NICENESS + 2])  # over which nobody but root may go back
def test_the_stream_comes_before_what_adapts(slept, monkeypatch, own):
    given = []
    monkeypatch.setattr(os, "getpriority", lambda *_: own)
    monkeypatch.setattr(os, "setpriority", lambda *asked: given.append(asked))
    slept._start({"folder": "adapted/001", "model": "m"})
    assert given == [(os.PRIO_PROCESS, slept.child.pid, max(NICENESS, own))]


def test_what_hung_has_all_its_time_when_it_is_tried_again(slept):
    slept._note({"event": "adapting", "number": 0, "began": 1, "folder": "adapted/001", "model": "m"})
    slept.run.write("adapted/001.log", b"")
    os.utime(slept.run.path("adapted/001.log"), (1, 1))
    slept._stalled()
    slept._written = slept._written[0], -math.inf  # of days ago
    assert slept._stalled()
    slept._start(slept.last)
    assert not slept._stalled()


def test_of_a_camera_that_sees_nothing_no_copies_are_kept(living, tmp_path):
    photo = tmp_path / "camera.png"
    photo.write_bytes(b"1")
    record = {"photo": str(photo), "objects": [], "f1": None, "confidence": 0.5, "entropy": None, "began": None}
    for number in range(1, 50):
        living._remember(record | {"number": number}, copied=True)
    assert not list((living.run.folder / "photos").iterdir())
    assert not living.seen


def test_at_the_end_what_fails_is_tried_again_or_left_to_a_resumed_run(tmp_path, bundled, monkeypatch):
    monkeypatch.setattr(Unlucky, "RETRIES", 2)
    waited, said = [], []
    monkeypatch.setattr("time.sleep", waited.append)
    for name, source in (("a", "day.json"), ("b", "-")):
        (tmp_path / name).mkdir()
        living = unlucky(tmp_path / name, bundled, stream={"class_map": {}, "source": source})
        living.report = lambda line: said.append(line) if "exit code" in line else None
        for number in range(1, 9):
            show(living, number, began=2 if number == 8 else None)
        living.end()
        assert living.last["event"] == ("kept" if source != "-" else "adapting")
    assert waited == [60, 120]
    assert said[0].endswith("it is tried again")
    assert said[-1].endswith("a resumed run tries it again")


def test_an_error_names_the_photo_and_not_its_copy(tmp_path, bundled):
    photo = tmp_path / "camera.png"
    photo.write_bytes(b"no photo")
    (tmp_path / "run").mkdir()
    living = unlucky(tmp_path / "run", bundled)
    (record,) = observe(living.run, living, [Labelled(photo, Detections.none())], "kswin", 8)
    assert str(photo) in record["error"]
    assert "photos/1" not in record["error"]


def test_what_is_better_and_cannot_be_loaded_is_tried_again_before_it_is_given_up(living, monkeypatch):
    monkeypatch.setattr(Living, "RETRIES", 1)
    monkeypatch.setattr(Living, "_start", lambda self, event: setattr(self, "child", subprocess.Popen(["true"])))
    living._note({"event": "adapting", "number": 0, "began": 1, "folder": "adapted/001", "model": "m"})
    before, after = ({kind: figures(f1 if kind == "new" else 0.5) for kind in PHOTOS} for f1 in (0.1, 0.5))
    judged(living, before, after)
    living.run.write("adapted/001/weights/adapted.safetensors", b"damaged")
    for number in range(1, 60):
        show(living, number)
        assert living.child is None or living.child.wait() == 0
        if living.failures == 1:
            assert (living.run.folder / "adapted/001/weights/adapted.safetensors").exists()
    assert living.last["event"] == "kept"
    assert "but it cannot be loaded" in living.last["why"]
    assert not (living.run.folder / "adapted/001/weights").exists()


@pytest.mark.parametrize("figures", [{}, {"before": {"new": {}}}, [], {"photos": None}])
def test_figures_that_are_none_deploy_nothing(tmp_path, bundled, figures):
    living = unlucky(tmp_path, bundled)
    living._note({"event": "adapting", "number": 0, "began": 1, "folder": "adapted/001", "model": "first"})
    living.run.write("adapted/001/figures.json", json.dumps(figures).encode())
    living.child = subprocess.Popen([sys.executable, "-c", ""])
    living.child.wait()
    show(living, 1)
    assert living.last["event"] == "kept"
    assert "figures.json: not one that detguard wrote" in living.last["why"]


def test_figures_that_were_there_before_an_adaptation_judge_nothing(living):
    living.run.config |= {"replay": [], "stream": {"class_map": {}}}
    living.run.write("adapted/001.replay.jsonl", b"")
    judged(living, {}, {})
    living._start({"folder": "adapted/001", "model": "m"})
    living.child.kill()
    living.child.wait()
    assert not (living.run.folder / "adapted/001/figures.json").exists()


@pytest.fixture
def to_start(living):
    """One whose adaptation can be started."""
    living.run.config |= {"replay": [], "stream": {"class_map": {}}}
    living.run.write("adapted/001.replay.jsonl", b"")
    return living


@pytest.mark.parametrize(
    ("where", "wrong"),
    [("outside", "leads out of the run's folder"), ("inside", "not a regular file"), ("pipe", "not a regular file")],
)
def test_what_adapts_writes_into_no_file_that_is_not_its_log(to_start, tmp_path, tmp_path_factory, where, wrong):
    log, other = tmp_path / "adapted/001.log", tmp_path_factory.mktemp("home") / ".bashrc"
    other.write_text("mine")
    if where == "pipe":
        os.mkfifo(log)
    else:
        log.symlink_to(other if where == "outside" else to_start.run.folder / "results.jsonl")
    with pytest.raises(DetguardError, match=wrong):
        to_start._start({"folder": "adapted/001", "model": "m"})
    assert to_start.child is None
    assert other.read_text() == "mine"
    assert not (tmp_path / "results.jsonl").exists()


def test_what_adapts_writes_nothing_beside_the_run(to_start, tmp_path):
    to_start.run.write("..replay.jsonl", b"")
    to_start._start({"folder": ".", "model": "m"})
    to_start.child.kill()
    to_start.child.wait()
    assert (tmp_path / "..log").exists()
    assert not Path(f"{tmp_path}.log").exists()


def test_events_that_do_not_fit_the_run_are_told(living, to_start, tmp_path, bundled):
    said = []
    living.report = said.append
    to_start.run.path("adapted/001.replay.jsonl").unlink()
    to_start._start({"folder": "adapted/001", "model": "detguard-n-hard"})
    assert to_start.child.wait() == 2  # which is not tried again
    (tmp_path / "photos/1.png").mkdir(parents=True)
    assert living.file(1, Path("1.png")).name == "1.png"
    for _ in range(2):
        note(living, "rolled back", "first")
    with pytest.raises(DetguardError, match="nothing that could be taken back"):
        living.roll_back()
    note(living, "deployed", "second")
    with pytest.raises(DetguardError, match=r"events\.jsonl: tells of ensembles, and detguard-n is none"):
        unlucky(tmp_path, bundled).at(1)


def test_what_refuses_to_adapt_is_not_asked_again(tmp_path, bundled, monkeypatch):
    living = unlucky(tmp_path, bundled)
    living._note({"event": "adapting", "number": 0, "began": 1, "folder": "adapted/001", "model": "first"})
    living.run.write("adapted/001.log", b"error: `max_experts` 3: the ensemble has 3\n")
    living.child = subprocess.Popen([sys.executable, "-c", "exit(2)"])
    living.child.wait()
    show(living, 1)
    assert living.last["event"] == "kept"
    assert "`max_experts` 3" in living.last["why"]


FULL = (
    b"error: adapted/001/new.jsonl: cannot be written (No space left on device)\n",
    b"error: out of memory\n",
    b"error: --device cuda: cannot be used (CUDA error: out of memory)\n",
)


@pytest.mark.parametrize("said", FULL)
def test_what_finds_no_room_to_adapt_is_tried_again(tmp_path, bundled, said):
    living = unlucky(tmp_path, bundled)
    living.RETRIES = 3
    living._note({"event": "adapting", "number": 0, "began": 1, "folder": "adapted/001", "model": "first"})
    living.run.write("adapted/001.log", said)
    living.child = subprocess.Popen([sys.executable, "-c", "exit(2)"])
    living.child.wait()
    show(living, 1)
    assert (living.last["event"], living.failures) == ("adapting", 1)


def test_why_it_failed_is_what_it_said_itself_not_those_before_it(tmp_path, bundled):
    living, told = unlucky(tmp_path, bundled), []
    living.RETRIES = 3
    living.report = told.append
    living._note({"event": "adapting", "number": 0, "began": 1, "folder": "adapted/001", "model": "first"})
    living.run.write("adapted/001.log", b"error: `max_experts` 3: stopped before\n")
    Living._start(living, living.last)
    living.child.kill()
    living.child.wait()
    living._judge()
    assert (living.last["event"], living.failures) == ("adapting", 1)
    assert "exit code -9" in told[-1]
    assert "stopped before" not in told[-1]


def test_a_log_that_is_gone_ends_no_stream(tmp_path, bundled):
    living = unlucky(tmp_path, bundled)
    living.RETRIES = 3
    living._note({"event": "adapting", "number": 0, "began": 1, "folder": "adapted/001", "model": "first"})
    living.child = subprocess.Popen([sys.executable, "-c", "exit(-9)"])
    living.child.wait()
    show(living, 1)
    assert (living.last["event"], living.failures) == ("adapting", 1)


def test_workers_are_those_that_were_asked_for_when_an_adaptation_goes_on(tmp_path, bundled):
    living = unlucky(tmp_path, bundled)
    for given in (["--rate", ".1", "--workers", "1"], ["--workers=1", "--rate", ".1"]):
        living.options = living.options | {"adapt": given}
        assert living._workers in (["--workers", "1"], ["--workers=1"])
    living.options = living.options | {"adapt": ["--rate", ".1"]}
    assert living._workers == []


def test_classes_are_renamed_once(tmp_path, bundled, bus_file):
    swapped = {"car": "truck", "truck": "car"}
    line = {"photo": str(bus_file), "objects": [{"class": "car", "box": [0, 0, 9, 9]}]}
    (tmp_path / "old.jsonl").write_text(json.dumps(line) + "\n")
    living = unlucky(tmp_path, bundled, stream={"class_map": swapped}, replay=[str(tmp_path / "old.jsonl")])
    for number in range(1, 9):
        show(living, number, began=5 if number == 6 else None)
    replayed = (tmp_path / "adapted/001.replay.jsonl").read_text().splitlines()
    assert [o["class"] for o in json.loads(replayed[-1])["objects"]] == ["truck"]


def test_photos_to_replay_that_are_gone_end_no_stream(tmp_path, bundled):
    living = unlucky(tmp_path, bundled, stream={"class_map": {"car": "truck"}}, replay=[str(tmp_path / "gone.jsonl")])
    for number in range(1, 9):
        show(living, number, began=5 if number == 6 else None)
    assert [event["event"] for event in living.events] == ["gathering", "kept"]
    assert "gone.jsonl" in living.events[-1]["why"]
    living.end()


@pytest.mark.parametrize("kept", [b"", b"{}\n"])
def test_the_command_that_adapts_replays_what_the_user_gave_too_on_the_streams_device(living, monkeypatch, kept):
    living.run.config |= {"replay": ["old.jsonl", "clear/"], "stream": {"class_map": {}}}
    living.device = "cuda:1"
    living.run.write("adapted/001.replay.jsonl", kept)
    commands = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: commands.append(command) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        living._start({"folder": "adapted/001", "model": "first"})
    replayed = [commands[0][i + 1] for i, part in enumerate(commands[0]) if part == "--replay"]
    assert replayed == ["old.jsonl", "clear/", *[f"{living.run.path('adapted/001')}.replay.jsonl"][: len(kept)]]
    assert commands[0][commands[0].index("--device") + 1] == "cuda:1"


def test_an_ensemble_is_judged_from_the_photo_on_that_it_was_deployed_after(living):
    living.number = 7
    note(living, "deployed", "a")
    assert [living.since(number) for number in (7, 8, 9)] == [0, 7, 7]


def test_what_a_resumed_run_learns_next_begins_with_what_was_deployed_last_though_it_sees_earlier_photos_again(living):
    living.number = 30
    note(living, "deployed", "a")
    again = Living(living.run, living.first)  # whose records are cut back to whole windows
    again.number = 24
    assert (again.model(25), again.last_model) == ("first", "a")


def test_what_is_deployed_sees_frames_and_boxes_as_the_first_does(living, monkeypatch):
    asked = []
    monkeypatch.setattr("detguard.workflows.living.load_detector", lambda *given: asked.append(given))
    living.first.imgsz, living.first.iou = 96, 0.55
    living._load("made.safetensors")
    assert [given[:2] + given[-1:] for given in asked] == [("made.safetensors", 96, 0.55)]


def test_a_copy_that_a_kill_left_without_a_record_is_not_the_next_photo_of_its_number(living, tmp_path):
    living.run.write("photos/1.png", b"of before the kill")
    photo = tmp_path / "camera.png"
    assert living.file(1, photo) == photo  # which is gone
    photo.write_bytes(b"now")
    assert living.file(1, photo).read_bytes() == b"now"


@pytest.mark.parametrize("code", [0, 2])  # 2: some photos could not be read
def test_of_what_is_deployed_the_weights_stay_and_the_state_goes(living, monkeypatch, code):
    monkeypatch.setattr(Living, "_load", lambda *_: None)
    living._note({"event": "adapting", "number": 0, "began": 1, "folder": "adapted/001", "model": "first"})
    before, after = ({kind: figures(f1 if kind == "new" else 0.5) for kind in PHOTOS} for f1 in (0.1, 0.5))
    judged(living, before, after)
    for name in ("state/adapt.pt", "weights/adapted.safetensors"):
        living.run.write(f"adapted/001/{name}", b"large")
    living.child = subprocess.Popen([sys.executable, "-c", f"exit({code})"])
    living.child.wait()
    show(living, 1)
    assert living.last["event"] == "deployed"
    assert {file.name for file in (living.run.folder / "adapted/001").iterdir()} == {"figures.json", "weights"}


def test_where_few_photos_are_gathered_a_rise_is_looked_for_by_as_few(tmp_path, bundled):
    living = unlucky(tmp_path, bundled, gather=8, monitor={"window": 32})
    living._note({"event": "gathering", "number": 0, "began": 1})
    for number in range(1, 15):
        living._take({"number": number, "photo": "a.png", "f1": 0.1 if number <= 7 else 0.9})
    assert living._rose() == 8


def test_at_the_end_of_a_stream_what_writes_nothing_for_hours_is_ended(tmp_path, bundled, monkeypatch):
    monkeypatch.setattr("detguard.workflows.living.PATIENCE", 0.01)
    living = unlucky(tmp_path, bundled)
    living._note({"event": "adapting", "number": 0, "began": 1, "folder": "adapted/001", "model": "first"})
    living.run.write("adapted/001.log", b"")
    living.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr("detguard.workflows.living.STALLED", -1)
    living.end()
    assert "exit code -9" in living.last["why"]


@pytest.mark.parametrize(("step", "last"), [(1, 8), (3, 24), (55, 440), (144, 1152)])
def test_whichever_photos_are_labelled_one_of_a_few_judges(tmp_path, bundled, step, last):
    living = unlucky(tmp_path, bundled)
    for number in range(1, last + 1):
        living._take({"number": number, "photo": "a.png", "f1": None if number % step else 0.5})
    assert 1 <= sum(map(judges, living._photos(1, last))) <= 3


def test_of_few_photos_of_which_none_judges_more_are_gathered(tmp_path, bundled):
    living = unlucky(tmp_path, bundled, gather=5)
    began = next(n for n in range(10, 99) if not any(judges({"turn": n + i}) for i in range(6)))
    for number in range(1, began + 20):
        show(living, number, began=began if number == began + 1 else None)
    (new,) = (tmp_path / "adapted").glob("*.new.jsonl")
    judging = [json.loads(line)["judges"] for line in new.read_text().splitlines()]
    assert judging == [False] * (len(judging) - 1) + [True]
    assert len(judging) > 5
    replayed = (tmp_path / "adapted/001.replay.jsonl").read_text().splitlines()
    assert any(json.loads(line)["judges"] for line in replayed)


def test_the_command_that_adapts_renames_nothing_again(tmp_path, bundled, monkeypatch):
    living = unlucky(tmp_path, bundled, stream={"class_map": {"car": "truck"}}, replay=["old.jsonl"])
    living.run.write("adapted/001.replay.jsonl", b"{}\n")
    commands = []

    def popen(command, **_):
        commands.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        Living._start(living, {"folder": "adapted/001", "model": "m"})
    replayed = [command[i + 1] for command in commands for i, part in enumerate(command) if part == "--replay"]
    assert replayed == [f"{tmp_path / 'adapted/001'}.replay.jsonl"]
    assert "--map" not in commands[0]


def test_labels_that_come_after_a_stop_find_the_copy_of_their_photo(tmp_path, bundled, bus_file):
    photo = tmp_path / "camera.png"
    cv2.imwrite(str(photo), cv2.resize(cv2.imread(str(bus_file)), (160, 160)))
    (tmp_path / "run").mkdir()
    living = unlucky(tmp_path / "run", bundled)
    (record,) = observe(living.run, living, [Labelled(photo, Detections.none(), id="7", labelled=False)], "kswin", 8)
    living.saw(record)
    photo.unlink()
    again = unlucky(tmp_path / "run", bundled)
    (late,) = observe(again.run, again, [Labels("7", Detections.none(), None, ())], "kswin", 8, again=False)
    assert "error" not in late


def test_labels_of_a_photo_that_the_next_one_was_written_over_are_not_judged_on_that_one(tmp_path, bundled, bus):
    small, photo = np.ascontiguousarray(bus[::4, ::4]), tmp_path / "latest.png"
    (found,) = bundled.detect([small], 0.25)
    photo.write_bytes(encode_png(small))
    shown = [Labelled(photo, found, id="6"), Labelled(photo, Detections.none(), id="7", labelled=False)]
    run = Run(tmp_path, {"command": "monitor"})
    labelled, _ = observe(run, Deployment(bundled), shown, "kswin", 8, again=False)
    of_drop = [labelled | {"began": 1}]
    assert len(drop_items(of_drop, Deployment(bundled))) == 1
    photo.write_bytes(encode_png(255 - small))
    (late,) = observe(run, Deployment(bundled), [Labels("7", found)], "kswin", 8, again=False)
    assert "latest.png: has changed since" in late["error"]
    assert "f1" not in late
    assert not drop_items(of_drop, Deployment(bundled))


def test_a_device_that_is_full_for_a_while_ends_no_stream(tmp_path, bundled, bus):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(*_, **__):
        raise RuntimeError("CUDA error: device-side assert triggered")

    small, photo = np.ascontiguousarray(bus[::4, ::4]), tmp_path / "a.png"
    (found,) = bundled.detect([small], 0.25)
    photo.write_bytes(encode_png(small))
    short = copy.copy(bundled)
    deployed, run = Deployment(short), Run(tmp_path, {"command": "monitor"})
    records = observe(run, deployed, [Labelled(photo, found)] * 5, "kswin", 8)
    first = next(records)
    short.detect = full
    assert next(records)["error"] == f"{photo}: cannot be looked at (CUDA out of memory)"
    assert not drop_items([first | {"began": 1}], Deployment(short))
    short.detect = bundled.detect
    deployed.at = full  # while it loads what was deployed
    assert "cannot be looked at (CUDA out of memory)" in next(records)["error"]
    del deployed.at
    assert next(records)["f1"] == first["f1"]
    short.detect = broken
    with pytest.raises(RuntimeError, match="device-side assert"):  # which no other photo will mend
        next(records)


def test_a_detector_that_was_replaced_is_not_kept_until_the_next_photo_comes(tmp_path, bundled):
    photo, deployed = tmp_path / "a.png", Deployment(bundled)
    photo.write_bytes(encode_png(np.zeros((64, 64, 3), np.uint8)))
    made = [copy.copy(bundled)]
    deployed.at = lambda _: made[0]
    known = weakref.ref(made[0])
    records = observe(
        Run(tmp_path, {"command": "monitor"}), deployed, [Labelled(photo, Detections.none())] * 2, "kswin", 8
    )
    next(records)
    made.clear()
    gc.collect()
    assert known() is None


def test_labels_of_an_id_that_two_photos_have_are_given_to_neither(tmp_path, bundled):
    photo = tmp_path / "camera.png"
    photo.write_bytes(encode_png(np.zeros((64, 64, 3), np.uint8)))
    (tmp_path / "run").mkdir()
    first = Labelled(photo, Detections.none(), id="7", labelled=False)
    shown = [first, first, Labels("7", Detections.none(), None, ())]
    living = unlucky(tmp_path / "run", bundled)
    one, two, labels = observe(living.run, living, shown, "kswin", 8, again=False)
    assert "error" not in one
    assert "photo 1 waits for labels by the same id" in two["error"]
    assert "none of the last" in labels["error"]
    again = unlucky(tmp_path / "run", bundled)  # nor after a stop
    (later,) = observe(again.run, again, shown[2:], "kswin", 8, again=False)
    assert "none of the last" in later["error"]


def test_of_a_camera_nothing_is_gone_on_with(tmp_path):
    run = Run(tmp_path, {"command": "monitor", "stream": {"source": "0", "every": 1, "frames": 9}})
    run.append(
        {"number": 1, "photo": "1.png", "objects": [], "f1": None, "confidence": 0, "entropy": None, "began": None}
    )
    with pytest.raises(DetguardError, match="begin a new run"):
        film(run)


@pytest.mark.parametrize(
    ("new", "old", "fits"),
    [
        ((0.2, 0.5), (0.6, 0.6), True), ((0.2, 0.5), (0.6, 0.592), True), ((0.2, 0.5), (0.6, 0.58), False),
        ((0.5, 0.5), (0.6, 0.9), False),
    ],
)  # fmt: skip
def test_what_is_deployed_is_better_on_new_photos_and_no_worse_on_old_ones(new, old, fits):
    before, after = ({"new": {"F1": new[i]}, "old": {"F1": old[i]}, "attacked": {"F1": 0.3}} for i in (0, 1))
    assert verdict(before, after, PHOTOS)[0] is fits


@pytest.mark.parametrize(
    ("attacked", "fits"),
    [((0.3, 0.26), True), ((0.3, 0.24), False), ((0.04, 0.03), True), ((0.04, 0.01), False), ((0.0, 0.0), True)],
)
def test_what_resists_attacks_less_is_not_deployed(attacked, fits):
    before, after = (
        {"new": {"F1": f1}, "old": {"F1": 0.6}, "attacked": {"F1": attacked[f1 > 0.3]}} for f1 in (0.2, 0.5)
    )
    told = verdict(before, after, PHOTOS)
    assert told[0] is fits
    assert told[1].endswith(f"{attacked[0]:.3f} -> {attacked[1]:.3f} on 8 attacked ones")
    assert told[1].startswith("F1 0.200 -> 0.500 on 13 new photos, 0.600 -> 0.600 on 20 old ones")


def test_without_old_photos_as_they_are_and_attacked_nothing_is_deployed():
    refused = False, "there are no old and attacked photos with objects to judge it by"
    assert verdict({"new": {"F1": 0.1}}, {"new": {"F1": 0.9}}, PHOTOS) == refused
    assert (
        verdict({"new": {"F1": 0.1}, "old": {"F1": None}}, {"new": {"F1": 0.9}, "old": {"F1": None}}, PHOTOS) == refused
    )
    before, after = ({"new": {"F1": f1}, "old": {"F1": 0.6}, "attacked": {"F1": None}} for f1 in (0.1, 0.9))
    assert verdict(before, after, PHOTOS) == (False, "there are no attacked photos with objects to judge it by")


@pytest.mark.parametrize("parts", [["--trust"], ["--out=/tmp/x"], ["--model", "evil:make"]])
def test_a_run_of_a_stranger_gives_adapt_no_options_but_those_a_user_may(tmp_path, bundled, parts):
    config = {"command": "monitor", "monitor": {"window": 1}, "on_drift": "adapt", "detector": {"model": "m"}}
    run = Run(tmp_path, config | {"living": {"gather": 3, "keep": KEEP, "adapt": parts}})
    with pytest.raises(DetguardError, match=r"`adapt` --.*: expected some of"):
        Living(run, bundled)


def test_while_one_kind_is_learned_the_next_one_does_not_fill_the_disk(living, tmp_path):
    photo = tmp_path / "camera.png"
    photo.write_bytes(b"1")
    living._note({"event": "adapting", "number": 0, "began": 1, "folder": "adapted/001", "model": "first"})
    living.passed, last = {1}, 3 * MOST_WINDOWS
    record = {"photo": str(photo), "objects": [], "f1": 1.0, "confidence": 0.5, "entropy": None, "began": None}
    for number in range(1, last + 1):
        living._remember(record | {"number": number}, copied=True)
    copies = {int(file.stem) for file in (living.run.folder / "photos").iterdir()}
    assert copies == {1, 2, 3, *range(last - MOST_WINDOWS + 1, last + 1), *living.reservoir}  # 3 to gather, its first


def test_a_photo_that_the_camera_deletes_meanwhile_ends_no_stream(living):
    record = {"number": 1, "photo": "gone.png", "objects": [], "f1": 1.0, "confidence": 0.5, "entropy": None}
    living.saw(record | {"began": None})
    assert living.seen[1]["photo"] == "gone.png"


def test_no_photo_of_the_new_kind_is_replayed_as_an_old_one(tmp_path, bundled):
    living = unlucky(tmp_path, bundled)
    for number in range(1, 9):
        show(living, number, began=5 if number == 6 else None)
    new, old = (
        [int(Path(json.loads(line)["photo"]).stem) for line in (tmp_path / f"adapted/001.{of}.jsonl").open()]
        for of in ("new", "replay")
    )
    assert old == [1, 2, 3, 4]
    assert min(new) == 5


def test_photos_just_before_a_drop_which_may_be_of_the_new_kind_are_not_replayed_either(tmp_path, bundled):
    living = unlucky(tmp_path, bundled)
    for number in range(1, 18):
        show(living, number, began=11 if number == 15 else None)
    lines = (tmp_path / "adapted/001.replay.jsonl").read_text().splitlines()
    assert len(lines) == KEEP
    assert max(int(Path(json.loads(line)["photo"]).stem) for line in lines) <= 6
