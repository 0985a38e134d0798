import errno
import gc
import os
import re
import resource
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from detguard import DetguardError, runs
from detguard.files import write_file
from detguard.runs import Run, RunError, next_free, photo_keys
from detguard.schema import EVENTS, RECORDS

CONFIG = {
    "model": "a.pt",
    "detectors": 2 * [
        {
            "model": "a.pt", "imgsz": 320, "end_to_end": False, "top_k": None, "fusion": None, "iou": 0.7,
            "sha256": "0",
        }
    ],
    "harden": {
        "recipe": "gated", "learn": "teacher", "pretrain": False, "mode": "full", "split": "neck", "photos": 100,
        "hours": None, "crop": None, "attack": "free", "eps": 4.0, "steps": 2, "mix": 0.2, "tune_normal": False,
        "transforms": "none", "top_k": None, "fusion": "bounded:0.5", "sparse": 0.2, "batch": 32, "rate": 0.003,
        "seed": 3,
    },
    "corruptions": ["fog"],
    "photos": ["a.jpg"],
    "pretrain": [],
    "samples": [],
    "arguments": [],
}  # fmt: skip


def record(number, **losses):
    return {"stage": "é", "batch": number, "photos_per_second": 1.5, "loss": 2.0} | losses


@pytest.fixture
def run(tmp_path):
    return Run.create("harden", tmp_path / "run", CONFIG)


def results(run):
    return run.folder / "results.jsonl"


def test_records_are_read_back_in_order(run):
    for number in (1, 2):
        run.append(record(number))
    assert run.records() == [record(1), record(2)]


def test_a_run_names_the_version_of_all_that_decides_what_is_found(run):
    named = yaml.safe_load((run.folder / "config.yaml").read_text())["versions"]
    assert named == {name: version(name) for name in named}
    assert {"detguard", "torch", "torchvision", "albumentations", "onnxruntime"} <= named.keys()


def test_nothing_but_a_run_of_the_same_command_is_replaced(run, tmp_path):
    run.append(record(1))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text("")
    (run.folder / "link").symlink_to(tmp_path / "kept")
    config = run.folder / "config.yaml"
    for other in ("", "a: 1", "command: attack", "command: harden", config.read_text() + "more: 1"):
        before, _ = config.read_text(), config.write_text(other)
        with pytest.raises(RunError):
            Run.create("harden", run.folder, CONFIG, exist_ok=True)
        assert results(run).exists()
        config.write_text(before)
    again = Run.create("harden", run.folder, CONFIG, {"a.txt": b"a"}, exist_ok=True)
    assert sorted(file.name for file in run.folder.iterdir()) == [".lock", "a.txt", "config.yaml"]
    assert (again.records(), (tmp_path / "kept/file").exists()) == ([], True)


def test_a_last_line_that_a_kill_cut_short_is_left_out_and_nothing_is_glued_onto_it(run):
    run.append(record(1))
    with results(run).open("ab") as stream:
        stream.write(b'{"stage": "b"')
    assert run.records() == [record(1)]
    run.append(record(2))
    assert run.records() == [record(1), record(2)]


def test_a_first_line_cut_short_is_left_out_too(run):
    results(run).write_bytes(b'{"key": "' + b"x" * 200_000)
    run.append(record(1))
    assert run.records() == [record(1)]


def test_an_append_that_fails_leaves_no_half_line(run):
    run.append(record(1))
    whole = results(run).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, limits[1]))
    try:
        with pytest.raises(RunError, match=r"results\.jsonl: cannot be written"):
            run.append(record(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert results(run).read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"batch": ' + "9" * 5000 + "}", "not JSON"),
        ("[]", "expected an object"),
        ("{}", "stage: missing"),
        ('{"stage": "a", "batch": "1", "photos_per_second": 1}', "batch: expected a whole number, 1 or more"),
        ('{"stage": "a", "batch": 1, "photos_per_second": 1, "loss": null}', "loss: expected a number"),
    ],
)
def test_a_damaged_line_is_an_error_with_its_number(run, line, reason):
    run.append(record(1))
    with results(run).open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(RunError, match=rf"results\.jsonl:2: .*{reason}"):
        run.records()


def test_results_that_are_no_file_are_named(run):
    os.mkfifo(results(run))
    with pytest.raises(DetguardError, match="not a regular file"):
        run.records()


def test_records_are_not_written_through_a_link(run, tmp_path):
    (tmp_path / "mine").write_text("mine\n")
    results(run).symlink_to(tmp_path / "mine")
    with pytest.raises(RunError, match="leads out"):
        run.append(record(1))
    assert (tmp_path / "mine").read_text() == "mine\n"


@pytest.mark.parametrize("name", ["../elsewhere.png", "/etc/passwd", "adversarial/../../x"])
def test_names_in_records_cannot_lead_out_of_the_run(run, name):
    with pytest.raises(RunError, match="leads out"):
        run.path(name)


def test_files_are_not_written_through_a_linked_folder(run, tmp_path):
    (run.folder / "weights").symlink_to(tmp_path)
    with pytest.raises(RunError, match="leads out"):
        run.write("weights/a.json", b"{}")


def test_a_folder_that_was_taken_away_is_not_made_anew(run, tmp_path):
    run.folder.rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="is gone"):
        run.write("report.html", b"")
    assert not run.folder.exists()


def test_a_run_opens_as_what_it_is(run):
    assert Run.open(run.folder, "harden").config["harden"]["seed"] == 3
    with pytest.raises(RunError, match="not a run of 'detguard attack'"):
        Run.open(run.folder, "attack")


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("photos",), None, "photos: expected a list"),
        (("photos", 0), 5, r"photos\[0\]: expected text"),
        (("detectors",), [], "detectors: expected a list of 2"),
        (("detectors", 1), "yolo", r"detectors\[1\]: expected names with values"),
        (("detectors", 0, "imgsz"), 10**9, r"detectors\[0\].imgsz: expected a whole number, 1 to 10000"),
        (("harden",), {}, "harden.recipe: missing"),
        (("harden", "eps"), "inf", "harden.eps: expected a number"),
        (("harden", "batch"), True, "harden.batch: expected a whole number"),
        (("harden", "loss"), 1, "harden.loss: not known"),
        (("harden", 7), 1, "harden.7: not known"),
    ],
)
def test_a_config_of_other_values_is_refused_where_they_are(run, path, value, reason):
    file = run.folder / "config.yaml"
    config = yaml.safe_load(file.read_text())
    *outer, last = path
    inside = config
    for step in outer:
        inside = inside[step]
    inside[last] = value
    file.write_text(yaml.dump(config, Dumper=Plain))
    with pytest.raises(RunError, match=rf"config\.yaml: not one that detguard wrote \({reason}"):
        Run.open(run.folder, "harden")


class Plain(yaml.SafeDumper):
    """Without aliases."""

    def ignore_aliases(self, data):
        return True


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=4))
@example(["\x85", "a\u2028b", "\u2029"])
@example(["é\n", "no", "012", "1e3", "~", "\ufeff", "\U0001f600"])
def test_any_names_are_read_back_from_a_config(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    Run.create("harden", folder, CONFIG | {"photos": names})
    assert Run.open(folder, "harden").config["photos"] == names


def test_names_that_are_not_utf8_are_shown_in_a_config_and_kept_in_records(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    run = Run.create("detect", tmp_path, {"photos": [name]})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["photos"] == ["caf\\udce9.png"]
    run.append({"key": "caf", "photo": name, "detections": []})
    assert run.records()[0]["photo"] == name


def test_a_run_that_a_process_is_at_work_on_is_refused_to_others(run):
    code = f"from pathlib import Path; from detguard.runs import Run; Run.resume(Path({str(run.folder)!r}), 'harden')"
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"process {os.getpid()} is at work on this run" in refused.stderr
    Run.open(run.folder, "harden")  # to look at


def test_a_run_is_its_processs_until_the_last_object_of_it_is_gone(tmp_path):
    def refused():
        code = f"from pathlib import Path; from detguard.runs import Run; Run.resume(Path({str(tmp_path)!r}), 'harden')"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        return f"process {os.getpid()} is at work on this run" in other.stderr

    objects = [Run.create("harden", tmp_path, CONFIG), *(Run.resume(tmp_path, "harden") for _ in range(2))]
    objects.pop(0)
    assert refused()
    objects.pop()
    assert refused()
    objects.pop()
    assert not refused()


def test_a_process_that_was_forked_neither_owns_a_run_nor_ends_that_it_is_owned(run):
    for act, code in ((run._lock.close, 0), (lambda: Run.resume(run.folder, "harden"), 1)):
        if not (child := os.fork()):
            try:
                act()
            except RunError:
                os._exit(1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    test_a_run_that_a_process_is_at_work_on_is_refused_to_others(run)


def test_processes_of_a_launch_share_a_run_that_others_do_not_get_before_all_have_ended(run):
    run.share(SimpleNamespace(count=2, rank=0, first=True, wait=int))
    code = (
        "from pathlib import Path; from types import SimpleNamespace; from detguard.runs import Run; "
        f"run = Run.open(Path({str(run.folder)!r}), 'harden'); "
        "run.share(SimpleNamespace(count=2, rank=1, first=False, wait=int)); print('shared', flush=True); input()"
    )
    second = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert second.stdout.readline() == "shared\n"
    run._lock.close()  # as if the first had died
    with pytest.raises(RunError, match="is at work on this run"):
        Run.resume(run.folder, "harden")
    second.communicate("\n")
    Run.resume(run.folder, "harden")


def test_the_file_of_the_lock_is_closed_with_its_run(tmp_path):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        Run.create("attack", tmp_path, {})
        gc.collect()
    assert not [one for one in warned if one.category is ResourceWarning]


def test_the_lock_of_a_process_that_is_no_more_is_taken_over(tmp_path):
    make = "from detguard.runs import Run; import os, sys; from pathlib import Path; " + (
        f"Run.create('harden', Path({str(tmp_path / 'run')!r}), {CONFIG!r}); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", make], check=False)
    Run.resume(tmp_path / "run", "harden")


def test_what_a_kill_left_half_written_is_swept_when_the_run_goes_on(run):
    (run.folder / "weights").mkdir()
    left = [run.folder / ".12.partial", run.folder / "weights/.13-0a1b2c3d.partial"]
    for file in left:
        file.write_bytes(b"half")
    Run.resume(run.folder, "harden")
    assert not any(file.exists() for file in left)


def test_a_run_killed_before_it_had_a_config_is_made_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").write_text("1\n")
    (tmp_path / "run/new.jsonl").write_text("half")
    (tmp_path / "run/.7.partial").write_text("half")
    run = Run.create("harden", tmp_path / "run", CONFIG, {"new.jsonl": b"whole"})
    assert (run.folder / "new.jsonl").read_text() == "whole"
    assert not (run.folder / ".7.partial").exists()


def test_one_killed_when_its_inputs_were_made_is_made_again_and_nothing_of_others_goes(tmp_path):
    def photos(staged):
        write_file(staged / "a\n\udce9.png", b"a")
        return [staged / "a\n\udce9.png", tmp_path / "bus.png"]

    class Killed(Run):
        def write(self, name, data):
            if name == "config.yaml":
                os.kill(os.getpid(), signal.SIGKILL)
            super().write(name, data)

    def killed():
        if not (child := os.fork()):
            try:
                Killed.create("harden", tmp_path / "run", CONFIG, photos=photos, exist_ok=True)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    inputs, mine = tmp_path / "run/inputs", tmp_path / "run/inputs/mine.png"
    for _ in range(2):  # a new one, and one that takes the place of another
        killed()
        config = Run.create("harden", tmp_path / "run", CONFIG, photos=photos).config
        assert [file.name for file in inputs.iterdir()] == ["a\n\udce9.png"]
        assert config["photos"] == [str(inputs / "a\n\udce9.png"), str(tmp_path / "bus.png")]
    killed()
    mine.write_bytes(b"mine")
    with pytest.raises(RunError, match=r"inputs/mine\.png: is in .*inputs, which would be replaced"):
        Run.create("harden", tmp_path / "run", CONFIG, photos=lambda _: [mine])
    with pytest.raises(RunError, match="inputs: is there already"):
        Run.create("harden", tmp_path / "run", CONFIG, photos=photos)
    assert [file.name for file in inputs.iterdir()] == ["mine.png"]


def test_the_config_comes_after_all_that_a_resumed_run_needs(tmp_path):
    (tmp_path / "replay.jsonl").mkdir()
    with pytest.raises(DetguardError, match="cannot be written"):
        Run.create("harden", tmp_path, CONFIG, {"new.jsonl": b"", "replay.jsonl": b""})
    assert not (tmp_path / "config.yaml").exists()


def test_of_a_run_that_could_not_begin_nothing_is_left(tmp_path):
    with pytest.raises(DetguardError, match="cannot be written"):
        Run.create("harden", tmp_path / "run", CONFIG, {"new.jsonl": b"", "n" * 300: b""})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file: cannot be made a folder"):
        Run.create("harden", tmp_path / "file", CONFIG)
    with pytest.raises(RunError, match="file/run: cannot be made a folder"):
        Run.create("harden", tmp_path / "file/run", CONFIG)
    with pytest.raises(RunError, match="no harden run here"):
        Run.resume(tmp_path / "file", "harden")


def test_a_config_cannot_run_code(run, tmp_path):
    proof = tmp_path / "ran"
    (run.folder / "config.yaml").write_text(f"!!python/object/apply:os.system ['touch {proof}']")
    with pytest.raises(RunError):
        Run.open(run.folder, "harden")
    assert not proof.exists()


def test_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [Run.create("detect", None, {}).folder for _ in range(2)]
    assert [f.as_posix() for f in folders] == ["runs/detect/001", "runs/detect/002"]


def test_a_number_belongs_to_who_makes_its_folder(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: next_free(tmp_path), range(200)))) == 200


def test_photos_of_one_stem_get_keys_of_their_own():
    files = [Path("a/x.jpg"), Path("b/x.jpg"), Path("x.png"), Path("x-2.jpg")]
    keys = photo_keys(files)
    assert len(keys) == 4
    assert list(keys.values()) == files


def test_names_too_long_for_results_are_cut(tmp_path):
    files = [Path("é" * 123 + suffix) for suffix in (".jpg", ".png")]
    keys = photo_keys(files)
    assert list(keys.values()) == files
    for key in keys:
        (tmp_path / f"{key}.png").write_bytes(b"")


def test_a_lock_that_is_a_link_is_not_written_through(run, tmp_path):
    (tmp_path / "mine").write_text("mine\n")
    (run.folder / ".lock").unlink()
    (run.folder / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(RunError, match=r"\.lock: cannot be written"):
        Run.resume(run.folder, "harden")
    assert (tmp_path / "mine").read_text() == "mine\n"


def test_what_is_written_is_on_the_disk_before_it_takes_a_name(run, tmp_path, monkeypatch):
    order, replace = [], Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: order.append("flushed"))
    monkeypatch.setattr(Path, "replace", lambda *args: order.append("renamed") or replace(*args))
    write_file(tmp_path / "file", b"1")
    assert order == ["flushed", "renamed"]
    run.append(record(1))
    assert order == ["flushed", "renamed", "flushed"]


def test_photos_whose_names_some_file_systems_take_for_one_get_keys_of_their_own():
    files = [Path("a/IMG.jpg"), Path("b/img.jpg"), Path("c/caf\u00e9.jpg"), Path("d/cafe\u0301.jpg")]
    assert [*photo_keys(files)] == ["IMG", "img-2", "caf\u00e9", "cafe\u0301-2"]


def test_photos_are_not_removed_with_the_run_that_they_are_in(tmp_path):
    folder = tmp_path / "run"
    made = Run.create(
        "detect", folder, {"detector": CONFIG["detectors"][0], "conf": 0.25, "photos": [], "arguments": []}
    )
    made.write("overlays/a.png", b"a")
    del made
    gc.collect()
    (tmp_path / "link").symlink_to(folder / "overlays")
    for photo in (folder / "overlays/a.png", tmp_path / "link/a.png"):
        with pytest.raises(RunError, match=r"a\.png: is in .*run, which would be replaced"):
            Run.create("detect", folder, {}, exist_ok=True, photos=lambda _, photo=photo: [photo])
        gc.collect()
    assert (folder / "overlays/a.png").read_bytes() == b"a"


def test_where_files_cannot_be_locked_one_process_goes_on_and_several_are_told_why(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "lockf", refuse)
    run = Run(tmp_path, {})
    run.claim()
    run.append({"key": "a"})
    assert list(run.each(checked=False)) == [{"key": "a"}]
    for refused in (lambda: run._claim(1, 1), lambda: run.share(SimpleNamespace(count=2, first=True))):
        with pytest.raises(RunError, match="cannot be locked, as several processes"):
            refused()


def test_a_stream_has_more_records_than_are_read_at_once(run, monkeypatch):
    for number in range(1, 6):
        run.append(record(number))
    monkeypatch.setattr(runs, "MAX_ANNOTATIONS", 100)
    with pytest.raises(DetguardError, match="over the limit"):
        run.records()
    assert next(run.each()) == record(1)
    run.cut(3)
    assert list(run.each()) == [record(1), record(2), record(3)]
    with results(run).open("a") as stream:
        stream.write('{"half": ')
    assert [one["batch"] for one in run.each()] == [1, 2, 3]


def names_of(shape):
    """The fields of records of a shape, with those of what is in them."""
    if isinstance(shape, dict):
        return {key.rstrip("?") for key in shape} | set().union(*(names_of(one) for one in shape.values()))
    inner = getattr(shape, "shapes", None) or [getattr(shape, "shape", None)]
    return set().union(*(names_of(one) for one in inner if one is not None))


@pytest.mark.parametrize("length", [1, 60_000, 70_000])
def test_the_last_records_are_read_without_those_before(run, length):
    records = [{"key": "a" * length, "number": number} for number in range(9)]
    for record in records:
        run.append(record)
    with run.path("results.jsonl").open("ab") as file:
        file.write(b'{"cut short')
    for last in (0, 1, 2, 9, 10):
        assert list(run.each(checked=False, last=last)) == records[9 - min(last, 9) :]


@pytest.mark.parametrize("name", ["bus.JPG", "data.yaml"])
def test_no_run_is_made_among_photos_which_would_be_taken_for_parts_of_it(tmp_path, name):
    (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RunError, match=rf"holds photos or data of yours \({name}\); choose another `out`"):
        Run.create("attack", tmp_path, {})
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("command", [*RECORDS, "events"])
def test_the_page_of_records_has_every_field(command):
    page = (Path(__file__).parents[1] / "docs/reference/records.md").read_text()
    thresholds = {"0.05", "0.1", "0.25", "0.5"}
    fields = names_of(RECORDS.get(command, EVENTS)) - {"*"} - thresholds
    assert [field for field in sorted(fields) if not re.search(rf"`{field}\??`", page)] == []
