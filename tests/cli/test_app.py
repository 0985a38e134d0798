"""Options and consoles: what is not a number is refused, and what a stranger named is shown, never obeyed."""

import gc
import io
import json
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import cv2
import numpy as np
import pytest
import torch
import typer
from rich.progress import TextColumn
from typer.main import get_command

import detguard
from detguard import DetguardError, is_out_of_memory
from detguard.attacks.budgets import BUDGETS
from detguard.attacks.group import Aggregate, Schedule
from detguard.attacks.steps import RULES
from detguard.cli import main
from detguard.cli.app import (
    NOTHING,
    Terminal,
    app,
    err,
    levels,
    out,
    progress_bar,
    show_python_warning,
    show_stopped,
    with_dashes,
)
from detguard.cli.harden import load as load_photos
from detguard.cli.harden import run_training
from detguard.data.sources import LABELLED
from detguard.data.stream import Labelled
from detguard.detections import Detections
from detguard.detectors import load
from detguard.engine import torch_device
from detguard.export.run import FORMATS
from detguard.files import shipped
from detguard.hardening.adapt import Adaptation
from detguard.hardening.adversary import METHODS
from detguard.hardening.judging import Judgement
from detguard.hardening.monitor import DRIFT
from detguard.hardening.recipes import RECIPES
from detguard.objectives.base import LOSSES
from detguard.objectives.parse import GOALS
from detguard.photos import encode_png
from detguard.ranks import ALONE
from detguard.reports.hardening import judged_before_after
from detguard.reports.tables import Table, terminal_list
from detguard.runs import Run
from detguard.transforms.base import GradientRule
from detguard.transforms.parse import KINDS
from detguard.workflows.adapt import Adapting, load_ensemble
from detguard.workflows.harden import Hardening, Trained

# Clears the screen, colours, turns the line around, begins another, is markup, an emoji, and no UTF-8.
HOSTILE = "a\x1b[2J\x9b31m\u202egnp\nerror: [red]b[/nosuch] :smile: \udcff"
SHOWN = r"a\x1b[2J\x9b31m\u202egnp\nerror: [red]b[/nosuch] :smile: \udcff"


@pytest.fixture
def console():
    return Terminal(file=io.StringIO(), width=200, force_terminal=True, color_system=None)


@pytest.mark.parametrize(
    "shown",
    [
        HOSTILE,
        Table("title", ("a", "b"), [(HOSTILE, "1")]),
        Table(HOSTILE, ("a", "b"), [("x" * 99, "1")]),
        Table("title", (HOSTILE, "b"), [("x" * 99, "1")]),
        Table("title", ("a", "b"), [("x" * 99, "1")], HOSTILE),
        terminal_list([(HOSTILE, "1")]),
    ],
    ids=["line", "cell", "title", "head", "note", "list"],
)
def test_what_is_printed_is_shown_and_not_obeyed(console, shown):
    console.print(shown)
    assert SHOWN in console.file.getvalue()
    assert "\x1b" not in console.file.getvalue()


def test_what_a_live_line_says_is_shown_and_not_obeyed(console, monkeypatch):
    monkeypatch.setattr("detguard.cli.app.err", console)
    with progress_bar(TextColumn("end")) as progress:
        progress.add_task(HOSTILE)
    assert SHOWN in console.file.getvalue()
    assert "\x1b[2J" not in console.file.getvalue()


def test_in_a_pipe_a_progress_leaves_nothing_behind(capsys):
    with progress_bar() as progress:
        progress.update(progress.add_task("photos", total=2), completed=1)
    assert capsys.readouterr().err == ""


def run(monkeypatch, *arguments):
    """The command line in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["detguard", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def test_python_looks_for_garbage_more_seldom_than_by_default_and_so_starts_sooner(monkeypatch):
    default = gc.get_threshold()
    gc.set_threshold(700, *default[1:])
    try:
        run(monkeypatch, "--version")
        assert gc.get_threshold()[0] >= 5_000
    finally:
        gc.set_threshold(*default)


@pytest.mark.parametrize(
    "arguments", [["compare", HOSTILE], [HOSTILE], ["attack", HOSTILE], ["detect", "a.jpg", "--device", HOSTILE]]
)
def test_arguments_are_shown_and_not_obeyed(monkeypatch, capsys, arguments):
    assert run(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert SHOWN in line


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, bus_file):
    """A folder with a photo and a detector of hostile names; of the file's, the disk must be able to hold each part."""
    folder = tmp_path_factory.mktemp("hostile")
    name = HOSTILE.replace("/", "").replace("\udcff", "")
    shutil.copy(bus_file, folder / f"{name}.jpg")
    weights = shipped("weights") / "detguard-n.safetensors"
    shutil.copy(weights, folder / f"{name}.safetensors")
    card = json.loads(weights.with_suffix(".json").read_text())
    card["classes"][0] = name
    (folder / f"{name}.json").write_text(json.dumps(card))
    return folder, name


def test_names_of_files_and_classes_are_shown_and_not_obeyed(monkeypatch, capsys, hostile):
    folder, name = hostile
    monkeypatch.chdir(folder)
    assert run(monkeypatch, "detect", f"{name}.jpg", "--model", f"{name}.safetensors", "--out", "table") == 0
    shown = capsys.readouterr()
    assert r"a\x1b[2J" in shown.out
    assert not set("\x1b\x9b\u202e") & set(shown.out + shown.err)


def test_json_lines_hold_the_names_themselves(monkeypatch, capsys, hostile):
    folder, name = hostile
    monkeypatch.chdir(folder)
    code = run(monkeypatch, "detect", f"{name}.jpg", "--model", f"{name}.safetensors", "--json", "--out", "lines")
    assert code == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["photo"] == f"{name}.jpg"
    assert json.loads(line)["detections"][0]["class"] == name
    assert not set("\x1b\x9b\u202e") & set(line)


def test_names_of_classes_in_what_a_run_keeps_are_shown_and_not_obeyed(monkeypatch, capsys, tmp_path, tiny_data):
    job = Hardening.begin("detguard-n", [str(tiny_data)], {"learn": "labels"}, ALONE, out=tmp_path / "run")
    lines = {"photo": "gone.png", "objects": [{"class": HOSTILE, "box": [0, 0, 9, 9]}]}
    (job.run.folder / LABELLED).write_text(json.dumps(lines) + "\n")
    assert run(monkeypatch, "harden", "--resume", job.run.folder) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ")
    assert SHOWN in warning
    assert "gone.png" in error


def test_warnings_of_others_are_theirs_and_not_obeyed(capsys):
    show_python_warning(UserWarning(HOSTILE), UserWarning, "/torch/functional.py", 3)
    shown = capsys.readouterr().err
    assert shown.startswith("/torch/functional.py:3: UserWarning: a\\x1b[2J")
    assert "\x1b" not in shown


FRACTIONS = [
    (name, param.opts[0])
    for name, command in get_command(app).commands.items()
    for param in command.params
    if param.type_descriptor.annotation is float
]


def test_there_are_options_to_test():
    assert {("attack", "--conf"), ("harden", "--rate"), ("adapt", "--lambda")} <= set(FRACTIONS)


def refused(command, option, value):
    with pytest.raises(typer.TyperException) as wrong:
        get_command(app).main([command, f"{option}={value}"], standalone_mode=False)
    return wrong.value.format_message()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize(("command", "option"), FRACTIONS)
def test_what_is_no_number_is_refused(command, option, value):
    assert f"'{option}'" in refused(command, option, value)


@pytest.mark.parametrize("value", ["-1", "4294967296", "9" * 400])
@pytest.mark.parametrize("command", ["attack", "evaluate", "harden", "adapt"])
def test_seeds_that_are_none_are_refused(command, value):
    assert "'--seed'" in refused(command, "--seed", value)


@pytest.mark.parametrize("device", ["nonsense", "meta", "cpu:7", "", "cuda:0,1", "cuda:999", "vulkan"])
def test_devices_that_detectors_do_not_run_on_are_one_line(monkeypatch, capsys, device):
    assert run(monkeypatch, "detect", "a.jpg", "--device", device) == 2
    assert capsys.readouterr().err.startswith(f"error: --device {device}: expected cpu")


@pytest.mark.parametrize(("name", "device"), [("0", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_devices_are_numbers_or_as_torch_calls_them(name, device):
    assert torch_device(name) == device


@pytest.mark.parametrize(("gpu", "device"), [(True, "cuda"), (False, "cpu")])
def test_the_best_device_is_a_gpu_where_there_is_one(monkeypatch, gpu, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    assert torch_device("auto") == device


@pytest.mark.parametrize(("given", "read"), [("4", 4), ("4/255", 4), (" .5", None), ("2.5/255", 2.5), ("0", 0)])
def test_budgets_are_levels_with_or_without_255(given, read):
    if read is None:
        with pytest.raises(DetguardError, match="expected levels of 255, as 4 or 4/255"):
            levels(given)
    else:
        assert levels(given) == read


@pytest.mark.parametrize(
    "arguments",
    [
        *(["attack", "PHOTO", f"--eps={value}"] for value in ("nan", "-1", "4/256", "1e999", "2.5", "256", "")),
        ["attack", "PHOTO", "--norm", "l2", "--eps", "4/255"],
        ["harden", "--data", "PHOTO", "--eps", "65"],
        ["universal", "--data", "PHOTO", "--eps", "128"],
        ["universal", "--data", "PHOTO", "--eps", "1.5"],
    ],
)
def test_budgets_that_are_none_are_one_line_and_leave_no_run(monkeypatch, capsys, tmp_path, bus_file, arguments):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *(bus_file if one == "PHOTO" else one for one in arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --eps")
    assert list(tmp_path.iterdir()) == []


def test_of_a_flood_another_detector_says_that_photos_are_flooded_already(monkeypatch, capsys, tmp_path, bus_file):
    flood = ("--goal", "flood", "--count", 300, "--steps", 1, "--transforms", "none", "--imgsz", 160)
    run(monkeypatch, "attack", bus_file, *flood, "--out", tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("count: 300", "count: 1"))
    capsys.readouterr()
    assert run(monkeypatch, "verify", tmp_path / "run", "--model", "detguard-n-hard") == NOTHING
    told = capsys.readouterr().err
    assert "1 photos left out: before the attack flooded already to detguard-n-hard" in told
    assert "nothing to judge: before the attack all are flooded already to detguard-n-hard" in told


def test_quiet_shows_nothing_but_what_json_prints(monkeypatch, capsys, tmp_path, bus_file):
    monkeypatch.chdir(tmp_path)
    for console, what in ((out, "quiet"), (err, "still")):
        monkeypatch.setattr(console, what, False)
    assert run(monkeypatch, "-q", "detect", bus_file, "--json", "--out", "a") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["key"] == "bus"
    assert not shown.err
    assert run(monkeypatch, "-q", "detect", bus_file, "gone.jpg", "--out", "b") == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.startswith("error: gone.jpg")


def test_a_photo_that_seems_to_be_an_option_is_told_how_to_be_given(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("-dash.jpg").touch()
    assert run(monkeypatch, "detect", "-dash.jpg") == 2
    assert "No such option: -d; for the file of that name give ./-dash.jpg, or -- before it" in capsys.readouterr().err
    assert run(monkeypatch, "detect", "-other.jpg") == 2
    assert capsys.readouterr().err == "error: No such option: -o\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_that_is_closed_ends_nothing(monkeypatch, stream):
    monkeypatch.setattr(sys, stream, None)  # as Python has it then
    assert run(monkeypatch, "--version") in (None, 0)


def test_hints_are_of_options_that_are_not_there(monkeypatch, capsys, tmp_path, bus_file):
    monkeypatch.chdir(tmp_path)
    shutil.copy(bus_file, "-a.jpg")
    assert run(monkeypatch, "detect", "--nonsense", "--", "-a.jpg") == 2
    assert capsys.readouterr().err == "error: No such option: --nonsense\n"
    assert run(monkeypatch, "--quiet=1", "detect", bus_file) == 2
    assert "goes before" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["detect PHOTO", "check-detector detguard-n", "export detguard-n --format pt"])
def test_a_size_of_no_whole_strides_is_told_to_be_rounded(monkeypatch, capsys, tmp_path, bus_file, command):
    monkeypatch.chdir(tmp_path)
    for size, told in ((70, ["warning: --imgsz 70: rounded up to 96, a multiple of 32"]), (96, [])):
        run(monkeypatch, *command.replace("PHOTO", str(bus_file)).split(), "--imgsz", size)
        assert [line for line in capsys.readouterr().err.splitlines() if "imgsz" in line] == told


def test_photos_and_hours_are_not_both_given(monkeypatch, capsys, tmp_path, bus_file):
    line = ("harden", "--data", bus_file, "--photos", 8, "--hours", 1, "--out", tmp_path / "run")
    assert run(monkeypatch, *line) == 2
    assert "--hours: instead of --photos" in capsys.readouterr().err


def test_a_defence_of_ones_own_is_no_ensemble_that_could_be_adapted(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    example = (Path(__file__).parents[2] / "examples/adapter.py").read_text()
    Path("defence.py").write_text(
        example.replace('    name, imgsz = "mine", 320', '    name, imgsz, hardened = "mine", 320, True')
    )
    assert run(monkeypatch, "monitor", "--model", "defence:make", "--trust", "--stream=-", "--on-drift=adapt") == 2
    assert "error: --on-drift adapt: defence:make is no gated ensemble" in capsys.readouterr().err


@pytest.fixture
def of_one_name(monkeypatch, tmp_path):
    """The bundled detector twice, as a/best.safetensors and b/best.safetensors in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).mkdir()
        for suffix in ("safetensors", "json"):
            shutil.copy(shipped("weights") / f"detguard-n.{suffix}", f"{name}/best.{suffix}")


@pytest.mark.usefixtures("of_one_name")
def test_models_of_one_file_name_are_told_apart_by_their_folders(monkeypatch, capsys, bus_file):
    models = [f"--model={name}/best.safetensors" for name in ("a", "b", "b")]
    line = ("attack", bus_file, "--imgsz", 64, "--steps", 1, "--conf", 0.02)
    assert run(monkeypatch, *line, *models[:2], "--out", "run") in (0, 1)
    assert run(monkeypatch, "attack", "--resume", "run") in (0, 1)
    (record,) = Run.open(Path("run"), "attack").records()
    assert list(record["also"]) == ["b/best.safetensors"]
    names = " and ".join(f"{name}/best.safetensors at 64 px" for name in ("a", "b"))
    assert f"{names}, budget" in Path("run/report.html").read_text()
    assert run(monkeypatch, *line, *models, "--out", "other") == 2
    assert "b/best.safetensors, b/best.safetensors; each must have a name of its own" in capsys.readouterr().err


@pytest.mark.usefixtures("of_one_name")
def test_evaluated_models_of_one_file_name_are_told_apart_too(monkeypatch, tiny_data):
    models = [f"--model={name}/best.safetensors" for name in ("a", "b")]
    options = ("--imgsz", 64, "--limit", 1, "--protocols", "corruptions", "--corruptions", "fog", "--severities", 1)
    assert run(monkeypatch, "evaluate", "--data", tiny_data, *models, *options, "--save-images", "--out", "run") == 0
    names = ["a/best.safetensors", "b/best.safetensors"]
    assert list(json.loads(Path("run/metrics.json").read_text())) == names
    assert all(name in Path("run/report.html").read_text() for name in names)
    assert run(monkeypatch, "evaluate", "--resume", "run") == 0
    assert list(json.loads(Path("run/metrics.json").read_text())) == names


WEIGHTS = ("nan,1,1", "inf,1,1", "-1,1,1", "0,-0,0", "1e308,1e308,1", "1,,1")


@pytest.mark.parametrize(
    "arguments",
    [*(["--aggregate", "weighted", f"--weights={w}"] for w in WEIGHTS), ["--target=,"], ["--target="]],
)
def test_attacks_that_cannot_be_are_one_line_and_leave_no_run(monkeypatch, capsys, tmp_path, bus_file, arguments):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "attack", bus_file, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert arguments[-1].partition("=")[0] in line
    assert list(tmp_path.iterdir()) == []


def test_fields_that_errors_name_are_shown_as_the_options_that_set_them(monkeypatch, capsys, tmp_path, bus_file):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "attack", bus_file, "--goal", "flood", "--strict") == 2
    assert "--strict: goes with --goal vanish" in capsys.readouterr().err
    assert with_dashes("`keep_others`, `targets`: `A` file called ``") == "--keep-others, --target: `A` file called ``"
    mapped = 'say so: `class_map={"traffic signal": "traffic light", "rider": "person"}`'
    assert with_dashes(mapped) == "say so: --map 'traffic signal=traffic light,rider=person'"


MAKE_RUNS = [name for name, c in get_command(app).commands.items() if "out_folder" in {p.name for p in c.params}]


def test_there_are_commands_that_make_runs():
    assert set(MAKE_RUNS) >= {"attack", "evaluate", "harden", "adapt", "monitor", "patch", "universal"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "../a"], "--name ../a: expected a plain name of letters, digits, _, - and ., as exp1"),
        (["--name", ".."], "--name ..: expected a plain name"),
        (["--name", "/tmp/a"], "--name /tmp/a: expected a plain name"),
        (["--name", ""], "--name : expected a plain name"),
        (["--name", "a", "--out", "b"], "--name: says where results go, as --out does; leave one of them out"),
        (["--exist-ok", "--out", "b"], "--exist-ok: goes with --name"),
    ],
)
@pytest.mark.parametrize("command", MAKE_RUNS)
def test_names_of_runs_lead_nowhere_else(monkeypatch, capsys, tmp_path, command, options, message):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, command, *(["a.jpg"] if command in ("attack", "detect") else []), *options) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", MAKE_RUNS)
def test_a_name_that_is_taken_is_refused_with_advice(monkeypatch, capsys, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / command / "exp1"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    assert run(monkeypatch, command, *(["a.jpg"] if command in ("attack", "detect") else []), "--name", "exp1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"runs/{command}/exp1: already holds a run; choose another --name, replace it by --exist-ok" in line
    assert ("--resume" in line) == (command != "detect")


def test_a_run_of_that_name_is_replaced_but_not_what_is_read_from_it(monkeypatch, capsys, tmp_path, bus_file):
    monkeypatch.chdir(tmp_path)
    named = ("--imgsz", 64, "--name", "exp1", "--exist-ok")
    assert run(monkeypatch, "detect", bus_file, *named) == 0
    folder = tmp_path / "runs/detect/exp1"
    assert (folder / "overlays/bus.png").exists()
    assert run(monkeypatch, "detect", folder / "overlays", *named) == 2
    assert "overlays is in that run, which would be replaced" in capsys.readouterr().err
    assert run(monkeypatch, "detect", bus_file.with_name("zidane.jpg"), *named) == 0
    assert [file.name for file in (folder / "overlays").iterdir()] == ["zidane.png"]
    assert len((folder / "results.jsonl").read_text().splitlines()) == 1


@pytest.fixture
def videos(monkeypatch, tmp_path, bus):
    """The working folder has bus.avi, of two frames, and bad.avi, which cannot be read."""
    monkeypatch.chdir(tmp_path)
    small = cv2.resize(bus, (96, 128), interpolation=cv2.INTER_AREA)[..., ::-1]
    video = cv2.VideoWriter("bus.avi", cv2.VideoWriter.fourcc(*"MJPG"), 10, (96, 128))
    for _ in range(2):
        video.write(small)
    video.release()
    Path("bad.avi").write_bytes(Path("bus.avi").read_bytes()[:2000])


SHORT = pytest.mark.parametrize(
    ("command", "options"), [("detect", ()), ("attack", ("--steps", 1, "--transforms", "none"))]
)


@SHORT
@pytest.mark.usefixtures("videos")
def test_what_cannot_be_read_is_told_of_and_the_rest_is_done(monkeypatch, capsys, tmp_path, command, options):
    line, away = (*options, "--imgsz", 64, "--conf", 0.01), "http://127.0.0.1:1/a.jpg"
    assert run(monkeypatch, command, "gone.jpg", away, *line) == 2
    assert run(monkeypatch, command, "bad.avi", away, "bus.avi", *line) == 2
    told = capsys.readouterr().err
    for reason in ("gone.jpg: cannot be read", "bad.avi: no video that can be read", f"{away}: cannot be downloaded"):
        assert f"error: {reason}" in told
    records = [json.loads(one) for one in (tmp_path / f"runs/{command}/002/results.jsonl").read_text().splitlines()]
    assert [one["key"] for one in records if one.get("status") != "error"] == ["bus-000001", "bus-000002"]
    if command == "attack":
        assert run(monkeypatch, command, "--resume", "runs/attack/002") == 2
        told = capsys.readouterr().err
        assert [one.split(": ")[1] for one in told.splitlines() if "error: " in one] == [away, "bad.avi"]
        page = Path("runs/attack/002/report.html").read_text().partition("Not attacked")[2]
        for source, why in ((away, "cannot be downloaded"), ("bad.avi", "no video that can be read")):
            assert re.search(rf"<td[^>]*>{re.escape(source)}</td>\s*<td[^>]*>{why}", page)
    (tmp_path / "mine").mkdir()
    for where in ((), ("--out", "mine")):  # of a run that could not begin nothing is left
        assert run(monkeypatch, command, "bad.avi", away, *line, *where) == 2
        told = capsys.readouterr().err
        assert [one.split(": ")[1] for one in told.splitlines() if "error: " in one] == [away, "bad.avi"]
    assert sorted(one.name for one in (tmp_path / "runs" / command).iterdir()) == ["001", "002"]
    assert list((tmp_path / "mine").iterdir()) == []


@SHORT
@pytest.mark.usefixtures("videos")
def test_a_run_is_replaced_only_once_its_video_could_be_read(monkeypatch, capsys, tmp_path, command, options):
    line = (*options, "--imgsz", 64, "--conf", 0.01, "--name", "exp1", "--exist-ok")
    folder = tmp_path / "runs" / command / "exp1"

    def files():
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    assert run(monkeypatch, command, "bus.avi", *line) in (0, 1)
    before = files()
    assert {"inputs/bus-000001.png", "inputs/bus-000002.png"} <= before.keys()
    assert run(monkeypatch, command, "bus.avi", "bad.avi", *line) == 2
    assert "bad.avi: no video that can be read" in capsys.readouterr().err
    assert files() == before
    assert run(monkeypatch, command, "bus.avi", "--every", 2, *line) in (0, 1)
    assert [name for name in files() if name.startswith("inputs/")] == ["inputs/bus-000001.png"]
    assert not any(file.name == ".inputs" for file in folder.iterdir())


def test_a_folder_of_the_users_own_called_inputs_is_left_alone(monkeypatch, capsys, tmp_path, bus):
    folder = tmp_path / "inputs"
    folder.mkdir()
    video = cv2.VideoWriter(str(folder / "bus.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (96, 128))
    video.write(cv2.resize(bus, (96, 128))[..., ::-1])
    video.release()
    before = (folder / "bus.avi").read_bytes()
    assert run(monkeypatch, "detect", folder / "bus.avi", "--imgsz", 64, "--out", tmp_path) == 2
    assert "inputs: is there already" in capsys.readouterr().err
    assert [file.name for file in folder.iterdir()] == ["bus.avi"]
    assert (folder / "bus.avi").read_bytes() == before
    assert not (tmp_path / ".inputs").exists()


@pytest.mark.parametrize(
    ("command", "option", "known"),
    [
        ("attack", "norm", BUDGETS), ("attack", "rule", RULES), ("attack", "loss", LOSSES),
        ("attack", "aggregate", get_args(Aggregate)), ("attack", "schedule", get_args(Schedule)),
        ("attack", "gradient", get_args(GradientRule)), ("export", "kind", FORMATS), ("harden", "recipe", RECIPES),
        ("harden", "attack", METHODS), ("monitor", "detector", DRIFT),
    ],
)  # fmt: skip
def test_all_that_there_is_can_be_chosen_on_the_command_line(command, option, known):
    """The help names them itself, so as not to import what they do."""
    (parameter,) = [one for one in get_command(app).commands[command].params if one.name == option]
    assert set(get_args(parameter.type_descriptor.annotation)) == set(known)


@pytest.mark.parametrize(("option", "known"), [("goal", GOALS), ("transforms", KINDS)])
def test_the_help_of_attack_names_all_goals_and_transforms(option, known):
    (parameter,) = [one for one in get_command(app).commands["attack"].params if one.name == option]
    assert [name for name in known if not re.search(rf"\b{name}\b", parameter.help)] == []


FUSED = ("--model", "detguard-n-hard", "--fusion", "average:0.3", "--iou", "0.6", "--top-k", "2")
KEPT = {"fusion": "average:0.3", "iou": 0.6, "top_k": 2}


@pytest.fixture
def asked(monkeypatch, tmp_path, bus_file):
    """Runs that were to be made, none of which is: their config, and the options of `Run.create`."""
    made = []

    def create(command, folder, config, *kept, **options):
        made.append((config, options))
        raise DetguardError("enough")

    monkeypatch.setattr(Run, "create", staticmethod(create))
    (tmp_path / "photos/inner").mkdir(parents=True)
    shutil.copy(bus_file, tmp_path / "photos/b.jpg")
    shutil.copy(bus_file, tmp_path / "photos/inner/a.jpg")
    return made


@pytest.mark.parametrize(
    ("arguments", "part", "wanted"),
    [
        ("attack PHOTO --margin .2 --momentum .5 --gradient exact --schedule group --smallest", "attack",
         {"margin": 0.2, "momentum": 0.5, "gradient": "exact", "schedule": "group", "smallest": True}),
        ("attack PHOTO --loss confidence", None, {"loss": "confidence"}),
        ("attack PHOTO --goal fabricate --count 3", None, {"count": 3}),
        ("attack PHOTO --norm l2 --eps 3 --seed 7 --random-start --step 2 --steps 9 --batch 2", "attack",
         {"norm": "l2", "eps": 3, "seed": 7, "random_start": True, "step": 2, "steps": 9, "batch": 2}),
        ("attack PHOTO --keep-others", None, {"keep_others": True}),
        ("attack PHOTO FUSED", "detector", KEPT),
        ("detect PHOTO FUSED", "detector", KEPT),
        ("evaluate --data DATA --images IMAGES", "data", {"images": "IMAGES"}),
        ("evaluate --data DATA --restarts 3", "evaluate", {"restarts": 3}),
        ("evaluate --data DATA --seed 7", "evaluate", {"seed": 7}),
        ("evaluate --data DATA --limit 2 --classes person", "data", {"limit": 2, "classes": ["person"]}),
        ("evaluate --data DATA FUSED", "detectors", KEPT),
        ("harden --data FOLDER --mix .3 --sparse .1 --fusion average:0.3", "harden",
         {"mix": 0.3, "sparse": 0.1, "fusion": "average:0.3"}),
        ("harden --data FOLDER --seed 7 --eps 6 --rate .001", "harden", {"seed": 7, "eps": 6, "rate": 0.001}),
        ("harden --data FOLDER --split backbone --tune-normal", "harden", {"tune_normal": True}),
        ("harden --data FOLDER --corruptions fog,snow", None, {"corruptions": ["fog", "snow"]}),
        ("adapt --model detguard-n-hard --new DATA --init fresh --expert whole", "adapt", {"init": "fresh"}),
        ("monitor --stream DATA --images IMAGES", "stream", {"images": "IMAGES"}),
        ("monitor --stream DATA --detector adwin", "monitor", {"detector": "adwin"}),
        ("monitor --stream DATA FUSED", "detector", KEPT),
        ("monitor --stream 0 --every 2 --frames 7", "stream", {"every": 2, "frames": 7}),
        ("patch --data FOLDER --print-cm 12", None, {"print_cm": 12}),
        ("patch --data FOLDER --seed 7 --rate .05 --batch 3 --conf .2", "learning",
         {"seed": 7, "rate": 0.05, "batch": 3, "conf": 0.2}),
        ("patch --data FOLDER FUSED", "detector", KEPT),
        ("universal --data FOLDER FUSED", "detector", KEPT),
    ],
)  # fmt: skip
def test_options_reach_the_run(monkeypatch, asked, tmp_path, tiny_data, bus_file, arguments, part, wanted):
    names = {
        "PHOTO": [str(bus_file)], "DATA": [str(tiny_data)], "IMAGES": [str(tiny_data.parent / "images")],
        "FOLDER": [str(tmp_path / "photos")], "FUSED": FUSED,
    }  # fmt: skip
    run(monkeypatch, *(word for one in arguments.split() for word in names.get(one, [one])))
    ((config, _),) = asked
    found = config[part] if part else config
    found = found[0] if isinstance(found, list) else found
    wanted = {key: names["IMAGES"][0] if value == "IMAGES" else value for key, value in wanted.items()}
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("command", ["attack", "detect"])
def test_folders_in_folders_and_so_many_frames_are_looked_at(monkeypatch, asked, tmp_path, command):
    run(monkeypatch, command, tmp_path / "photos", "0", "--recursive", "--every", 2, "--frames", 7)
    shown = asked[0][1]["photos"]
    assert (shown.keywords["every"], shown.keywords["frames"]) == (2, 7)
    assert [Path(one).name for one in shown.args[0]] == ["b.jpg", "a.jpg", "0"]


@pytest.fixture
def lossy(tiny_data):
    """A data set of which a photo is gone."""
    data = json.loads(tiny_data.read_text())
    data["images"].append({"id": 99, "file_name": "gone.jpg", "width": 9, "height": 9})
    (tiny_data.parent / "lossy.json").write_text(json.dumps(data))
    return tiny_data.parent / "lossy.json"


@pytest.mark.parametrize(
    "command", ["monitor --imgsz 64 --stream", "evaluate --imgsz 64 --dry-run --protocols clean --data"]
)
def test_photos_that_are_gone_are_told_by_the_exit_code(monkeypatch, capsys, tmp_path, lossy, command):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *command.split(), lossy) == 2
    assert "1 photos missing or unreadable" in capsys.readouterr().err


def test_photos_that_an_attack_never_saw_are_told_on_its_page_and_when_it_goes_on(monkeypatch, capsys, tmp_path, lossy):
    options = ("--imgsz", 64, "--conf", 0.01, "--steps", 1, "--transforms", "none", "--out", tmp_path / "run")
    lost = f"1 photos missing or unreadable, left out; {lossy}: images[4]: {lossy.parent / 'images/gone.jpg'}"
    for line in (("--data", lossy, *options), ("--resume", tmp_path / "run")):
        assert run(monkeypatch, "attack", *line) == 2
        told = capsys.readouterr().err
        page = (tmp_path / "run/report.html").read_text()
        assert re.search(rf"Not attacked.*<td[^>]*>lossy</td>\s*<td[^>]*>{re.escape(lost)}</td>", page, re.DOTALL)
    assert told == f"error: lossy: {lost}\n"


def test_a_long_stream_is_told_of_as_a_whole_though_its_end_is_quiet(monkeypatch, capsys, tmp_path):
    def watch(*arguments):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        return run(monkeypatch, "monitor", *arguments), " ".join(capsys.readouterr().out.split())

    monkeypatch.setattr("detguard.workflows.monitor.MOST_TOLD", 8)
    made = ("--stream", "-", "--imgsz", 64, "--window", 8, "--out", tmp_path)
    assert watch(*made)[0] == 3
    plain = {"photo": "a.png", "objects": [], "f1": 0.5, "confidence": 0.5, "entropy": None, "began": None}
    broken = {"photo": "a.png", "objects": [], "error": "a.png: no photo"}
    levels = {"before": 0.8, "photos_before": 6, "after": 0.5, "photos_after": 4}
    drop = plain | {"began": 8, "levels": levels}
    bare = plain | {"f1": None, "id": "1", "labelled": False}
    late = bare | {"number": 10, "labelled": True}
    quiet = [plain | {"f1": None}] * 20  # no objects that are known
    for early, code, *told in (
        (
            [*[plain] * 9, bare, bare, late],
            0,
            "No drop on 9 photos",
            "no drop; 9 of 31 photos",
            ", 1 have no labels yet",
        ),
        (
            [*[plain] * 7, drop, drop],
            1,
            "dropped from .800 (6 photos) to .500 (4) since about photo 8",
            "and 1 more later",
        ),
        ([broken, *[plain] * 8], 2, "no drop; 8 of 29 photos"),
    ):
        lines = [json.dumps({"number": number} | one) + "\n" for number, one in enumerate([*early, *quiet], 1)]
        (tmp_path / "results.jsonl").write_text("".join(lines))
        got, said = watch("--resume", tmp_path)
        assert (got, [one in said for one in told]) == (code, [True] * len(told))


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130])
def test_commands_end_with_their_own_code_and_word(monkeypatch, capsys, bus_file, code):
    monkeypatch.setattr(load, "load_detector", lambda *_, **__: sys.exit(code))
    assert run(monkeypatch, "detect", bus_file) == code
    assert capsys.readouterr().err == ""


def too_much(*_, **__):
    raise torch.OutOfMemoryError("Tried to allocate 9 GiB")


def too_much_of_apple(*_, **__):
    raise RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)")


def too_much_of_cuda(*_, **__):
    raise torch.AcceleratorError("CUDA error: out of memory")


def too_much_of_cublas(*_, **__):
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def too_much_of_numpy(*_, **__):
    np.empty(1 << 50, np.uint8)


def too_much_of_a_cpu(*_, **__):
    torch.empty(1 << 50)


FULL = [too_much, too_much_of_apple, too_much_of_cuda, too_much_of_cublas, too_much_of_numpy, too_much_of_a_cpu]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("full", FULL)
def test_too_little_memory_is_one_line_that_says_what_to_do(monkeypatch, capsys, bus_file, full, rank):
    monkeypatch.setattr(load, "load_detector", full)
    monkeypatch.setattr(err, "rank", rank)
    monkeypatch.setattr(err, "quiet", rank > 0)  # as `start_ranks` has it
    assert run(monkeypatch, "detect", bus_file) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith(f"error: {'rank 1: ' * rank}out of memory (")
    assert "); try a smaller --batch or --imgsz" in told


@pytest.mark.parametrize("kind", [DetguardError, RuntimeError])
def test_other_errors_are_not_of_too_little_memory(kind):
    assert not is_out_of_memory(kind("a.jpg: cannot be looked at"))
    assert is_out_of_memory(kind("out of memory")) is (kind is RuntimeError)


def test_the_end_of_another_process_of_a_launch_is_no_traceback(monkeypatch, capsys, bus_file):
    def ended(*_, **__):
        raise RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:4711")

    monkeypatch.setattr(load, "load_detector", ended)
    assert run(monkeypatch, "detect", bus_file) == 2
    assert capsys.readouterr().err.startswith("error: another process of this launch has ended, and says why ([third_p")


def test_what_a_run_does_not_keep_is_said_again_where_it_goes_on(monkeypatch, capsys, tmp_path):
    words = "evaluate --data d --fail-under clean.AP=.3 --device=cpu --trust --workers 2 --out x"
    monkeypatch.setattr(sys, "argv", ["detguard", *words.split()])
    assert show_stopped(Run(tmp_path / "my run", {"command": "evaluate"})) == 130
    again = "--fail-under clean.AP=.3 --device=cpu --trust --workers 2"
    assert f"detguard evaluate --resume '{tmp_path}/my run' {again}\n" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["detguard", "monitor", "--stream", "-"])
    show_stopped(Run(Path("r"), {"command": "monitor", "stream": {"source": "-"}}))
    assert "go on with: ... | detguard monitor --resume r\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("evaluate --data DATA --fail-under=", "--fail-under"),
        ("evaluate --data DATA --classes=", "--classes"),
        ("evaluate --data DATA --split test", "--split: goes with a data.yaml"),
        ("attack --data DATA --split test", "--split: goes with a data.yaml"),
        ("monitor --stream DATA --split test", "--split: goes with a data.yaml"),
        ("adapt --model detguard-n-hard --new DATA --split test", "--split: goes with a data.yaml"),
        ("patch --data DATA --split test", "--split: goes with a data.yaml"),
        ("universal --data DATA --split test", "--split: goes with a data.yaml"),
        ("harden --data PHOTO --map a=b", "--map: renames classes of labels"),
        ("detect PHOTO --frames 9", "--frames: goes with a camera"),
        ("attack PHOTO --frames 9", "--frames: goes with a camera"),
        ("attack PHOTO --every 3", "--every: goes with a video or a camera"),
        ("attack --data DATA --every 3", "--every: goes with a video or a camera"),
        ("detect PHOTO --every 3", "--every: goes with a video or a camera"),
        ("monitor --stream clip.mp4 --frames 9", "--frames: goes with a camera"),
        ("monitor --stream clip.mp4 --split test", "--split: goes with a data.yaml"),
        ("monitor --stream 0 --map a=person", "--map: goes with photos with labels"),
        ("monitor --stream clip.mp4 --images FOLDER", "--images: goes with a COCO json"),
        ("monitor --stream - --images FOLDER", "--images: goes with a COCO json"),
        ("monitor --stream day.jsonl --images FOLDER", "--images: goes with a COCO json"),
        ("monitor --stream DATA --window 2000000", "--window"),
        ("monitor --stream DATA --on-drift adapt --keep 2000000", "--keep"),
        ("monitor --stream DATA --on-drift adapt --gather 2000000", "--gather"),
    ],
)
def test_options_without_effect_or_out_of_range_are_named(
    monkeypatch, capsys, tmp_path, tiny_data, bus_file, arguments, message
):
    monkeypatch.chdir(tmp_path)
    names = {"DATA": tiny_data, "PHOTO": bus_file, "FOLDER": tmp_path}
    assert run(monkeypatch, *(names.get(word, word) for word in arguments.split())) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/*/config.yaml"))


@pytest.fixture
def signals():
    """What a training does with signals ends with the test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_signal_while_an_adaptation_is_judged_stops_it(signals, capsys, tmp_path, bus_file):
    job = Adapting(Run(tmp_path, {"command": "adapt"}), *load_ensemble("detguard-n-hard", trust=False), ALONE)
    job.plan, job.judged = Adaptation(), {"new": [Labelled(Path(bus_file), Detections.none())]}

    def train(on_stage):
        signal.raise_signal(signal.SIGINT)
        job.figures(on_stage)
        raise AssertionError("judged on")

    job.train = train
    assert run_training(job, *[None] * 3) == 130
    assert "stopped; go on with: detguard adapt --resume" in capsys.readouterr().err


def test_verify_tells_of_a_photo_over_the_budget_though_it_fools(monkeypatch, bundled, bus, tmp_path):
    small = cv2.resize(bus, (240, 320), interpolation=cv2.INTER_AREA)
    list(detguard.attack(bundled, small, transforms="none", steps=1, out=tmp_path / "run"))
    (tmp_path / "run/adversarial/photo-001.png").write_bytes(encode_png(np.zeros_like(small)))  # hides all
    assert run(monkeypatch, "verify", tmp_path / "run") == 1


def test_verify_says_still_only_of_a_detector_that_was_attacked(monkeypatch, capsys, bundled, bus, tmp_path):
    small = cv2.resize(bus, (240, 320), interpolation=cv2.INTER_AREA)
    list(detguard.attack(bundled, small, transforms="none", steps=1, out=tmp_path / "run"))
    for line, told in (
        ([], "photos still fool detguard-n,"),
        (["--model", "detguard-n"], "photos still fool detguard-n,"),
        (["--model", "detguard-n-hard"], "photos fool detguard-n-hard,"),
    ):
        run(monkeypatch, "verify", tmp_path / "run", *line)
        assert f"of 1 {told}" in capsys.readouterr().out


def test_verify_judges_all_else_of_a_photo_that_a_transform_fails_on(monkeypatch, capsys, bundled, bus, tmp_path):
    person = bus[390:910, 40:250]
    photos = [cv2.resize(person, size, interpolation=cv2.INTER_AREA) for size in ((70, 173), (105, 260))]
    list(detguard.attack(bundled, photos, transforms="none", steps=1, out=tmp_path / "run"))
    code = run(monkeypatch, "verify", tmp_path / "run")
    capsys.readouterr()
    assert run(monkeypatch, "verify", tmp_path / "run", "--transforms", "crop:0.1,flip:h", "--json") == code < 2
    shown = capsys.readouterr()
    why = "after crop:0.1 it has 7 x 17 px, too few to detect on"
    assert shown.err == f"warning: {tmp_path / 'run'}: photo-001: crop:0.1 not judged: {why}\n"
    small, large = map(json.loads, shown.out.splitlines())
    assert (list(small["members"]), small["unjudged"]) == (["photo", "flip:h"], {"crop:0.1": why})
    assert (list(large["members"]), large["unjudged"]) == (["photo", "crop:0.1", "flip:h"], {})


def test_detect_says_where_nothing_is_found(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("grey.png").write_bytes(encode_png(np.full((64, 64, 3), 128, np.uint8)))
    assert run(monkeypatch, "detect", "grey.png", "--imgsz", 64) == 0
    shown = capsys.readouterr().out
    assert "grey.png: nothing found over confidence 0.25\n" in shown
    assert "class" not in shown


def test_only_commands_of_several_detectors_say_of_which_the_confidence_is():
    told = {
        name: any("first's for all" in str(getattr(one, "help", "")) for one in command.params)
        for name, command in get_command(app).commands.items()
    }
    assert [name for name, does in told.items() if does] == ["attack"]


def test_photos_that_a_training_could_not_read_are_told_by_the_exit_code(signals, capsys, tmp_path):
    unread = ["a.jpg: damaged"]
    job = SimpleNamespace(
        run=Run(tmp_path, {"command": "harden"}), ranks=ALONE, load=lambda _: None, unread=unread,
        judgement=Judgement(), train=lambda _: Trained(tmp_path / "a.safetensors", tmp_path, unread, {}, {}, {}),
    )  # fmt: skip
    load_photos(job, None)
    assert run_training(job, lambda _: b"", lambda _: "", judged_before_after) == 2
    assert "a.jpg: damaged" in capsys.readouterr().err
