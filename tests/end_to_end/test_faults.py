"""What breaks while a command runs: one line that says so, nothing half written, and `--resume` goes on."""

import ctypes
import json
import os
import re
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from program import Started, detguard
from safetensors.torch import load_file
from ultralytics.utils import ASSETS

HARDEN = ("harden", "--data", ASSETS, "--imgsz", 64, "--batch", 4, "--photos", 12, "--steps", 1, "--recipe", "pgd")
# What is there when a command has begun to learn.
STARTED = {"harden long": "run/state/adversarial.pt", "patch": "run/results.jsonl"}
MADE = "weights/adversarial.safetensors"


def without_privileges():
    """Have rights of files hold for root, too, for whom Linux else ignores them."""
    # The third version of the structure, for this process; no capability is effective, permitted or inherited.
    assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0


def little_space():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def told(result):
    """Its last line; the exit code is that of wrong use and of files."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1
    return result.stderr.splitlines()[-1]


def children(process):
    found = []
    with suppress(OSError):
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


@pytest.fixture(scope="module")
def commands(tiny_data):
    return {
        "attack": ("attack", ASSETS, "--imgsz", 160, "--steps", 3),
        "detect": ("detect", ASSETS),
        "evaluate": ("evaluate", "--data", tiny_data, "--imgsz", 160, "--protocols", "clean,attack", "--steps", 2),
        "monitor": ("monitor", "--stream", tiny_data, "--imgsz", 160),
        "harden": HARDEN,
        "harden long": (*HARDEN, "--photos", 1000),
        "patch": ("patch", "--data", tiny_data, "--imgsz", 96, "--pixels", 32, "--photos", 2000, "--conf", 0.1),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of a training that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    result = detguard(*HARDEN, "--out", "run", cwd=folder)
    assert result.returncode == 0, result.stderr
    return load_file(folder / "run" / MADE)


def goes_on(run, whole):
    resumed = detguard("harden", "--resume", run.name, cwd=run.parent)
    assert resumed.returncode == 0, resumed.stderr
    ours = load_file(run / MADE)
    assert all(torch.equal(ours[key], value) for key, value in whole.items())
    assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize("command", ["attack", "evaluate", "monitor", "harden"])
def test_a_folder_that_cannot_be_written_is_named(commands, tmp_path, command):
    (tmp_path / "closed").mkdir(mode=0o555)
    result = detguard(*commands[command], "--out", "closed/run", cwd=tmp_path, preexec_fn=without_privileges)
    assert told(result) == "error: closed/run: cannot be made a folder (Permission denied); choose another --out"


@pytest.mark.parametrize("command", ["detect", "evaluate"])
def test_where_nothing_can_be_written_that_is_named(commands, tmp_path, command):
    tmp_path.chmod(0o555)
    line = told(detguard(*commands[command], cwd=tmp_path, preexec_fn=without_privileges))
    assert re.match("error: runs.*Permission denied", line)


def test_a_run_that_cannot_be_written_any_more_does_not_go_on(commands, tmp_path):
    assert detguard(*commands["monitor"], "--out", "run", cwd=tmp_path).returncode == 3
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()}
    for file in (*files, tmp_path / "run"):
        file.chmod(0o555)
    line = told(detguard("monitor", "--resume", "run", cwd=tmp_path, preexec_fn=without_privileges))
    assert "error: run/.lock: cannot be written (Permission denied)" in line
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()}


def until_it_is_gone():
    """Have a run of few photos not be over before its folder is taken away."""
    from detguard.runs import Run

    append = Run.append

    def late(run, *arguments):
        deadline = time.monotonic() + 60
        while not run.gone and time.monotonic() < deadline:
            time.sleep(0.005)
        append(run, *arguments)

    Run.append = late


@pytest.mark.parametrize("command", ["evaluate", "monitor", "harden"])
def test_a_run_folder_taken_away_is_not_made_anew_and_goes_on_when_it_is_back(commands, whole, tmp_path, command):
    process = Started(*commands[command], "--out", "run", cwd=tmp_path, preexec_fn=until_it_is_gone)
    process.wait_for((tmp_path / "run/config.yaml").exists)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    line = told(process.ended())
    assert line == "error: run: is gone; put it back and go on with --resume"
    assert not (tmp_path / "run").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    if command == "harden":
        return goes_on(tmp_path / "run", whole)
    result = detguard(command, "--resume", "run", cwd=tmp_path)
    assert result.returncode == {"monitor": 3}.get(command, 0), result.stderr  # which has too few photos to judge
    assert (tmp_path / "run/report.html").exists()


@pytest.mark.parametrize("command", ["harden long", "patch"])
def test_one_that_learns_and_is_stopped_does_not_make_its_folder_anew(commands, tmp_path, command):
    process = Started(*commands[command], "--out", "run", cwd=tmp_path)
    process.wait_for((tmp_path / STARTED[command]).exists)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    process.stop(signal.SIGTERM)
    assert told(process.ended()) == "error: run: is gone; put it back and go on with --resume"
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_full_at_a_checkpoint_is_named_and_training_goes_on_with_more(whole, tmp_path):
    line = told(detguard(*HARDEN, "--out", "run", cwd=tmp_path, preexec_fn=little_space))
    assert "error: run/state/adversarial.pt: cannot be written (File too large)" in line
    assert not list((tmp_path / "run/state").iterdir())
    goes_on(tmp_path / "run", whole)


def without_helpers(*arguments, cwd):
    """A program whose helpers are all killed as soon as they are there ends with a line that says so."""
    process = Started(*arguments, "--out", "run", cwd=cwd)
    while process.running:
        for child in children(process):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    line = told(process.ended())
    assert re.search(r"was killed or hung 3 times at number \d+; see that there is memory .* fewer --workers", line)
    assert line.endswith("go on with --resume")


def test_helpers_that_are_killed_again_and_again_end_a_training_that_goes_on(whole, tmp_path):
    without_helpers(*HARDEN, cwd=tmp_path)
    goes_on(tmp_path / "run", whole)


def test_helpers_that_are_killed_again_and_again_end_an_evaluation_that_goes_on(commands, tmp_path):
    # As many photos as are worth helpers.
    kinds = ("--corruptions", "contrast,brightness,pixelate,jpeg_compression", "--severities", "1,2,3,4")
    without_helpers(*commands["evaluate"][:5], "--protocols", "corruptions", *kinds, cwd=tmp_path)
    assert not (tmp_path / "run/metrics.json").exists()
    result = detguard("evaluate", "--resume", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (metrics,) = json.loads((tmp_path / "run/metrics.json").read_text()).values()
    assert len(metrics["corruptions"]["kinds"]) == 4
