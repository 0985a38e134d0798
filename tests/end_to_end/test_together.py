"""`detguard evaluate` by several processes: what one finds, by shares."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zlib

import pytest
import torch
from program import detguard, launched, together

from detguard.evaluation.cache import DEFAULT as CACHE
from detguard.evaluation.cache import Cache

LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "detguard")


@pytest.fixture(scope="module")
def line(tmp_path_factory, tiny_data):
    """A command on five photos of four frame shapes, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("photos") / "data"
    shutil.copytree(tiny_data.parent, folder)
    data = json.loads((folder / "instances.json").read_text())
    broken = data["images"][0] | {"id": 15, "file_name": "broken.png"}
    data["images"].insert(2, broken)
    (folder / "images/broken.png").write_bytes((folder / "images/11.png").read_bytes()[:5000])
    (folder / "instances.json").write_text(json.dumps(data))
    models = ("--model", "detguard-n", "--model", "detguard-n", "--imgsz", 160, "--attacks", "all", "--steps", 2)
    what = ("--protocols", "clean,corruptions,attack,transfer", "--corruptions", "fog", "--severities", 3)
    return ("evaluate", "--data", folder / "instances.json", *models, *what, "--out", "run")


@pytest.fixture(scope="module")
def alone(line, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    result = detguard(*line, cwd=folder)
    assert result.returncode == 2, result.stderr
    assert "broken.png" in result.stderr
    return folder


def made(folder):
    """The files of a run that the photos alone decide."""
    run = folder / "run"
    names = ("metrics.json", "draws.json", "per_class.csv", "detections/detguard-n/fog-3.json")
    return [(run / name).read_bytes() for name in names]


def entries(folder):
    with contextlib.closing(sqlite3.connect(folder / CACHE)) as database:
        return dict(database.execute("select key, value from entries"))


def test_four_processes_write_the_bytes_of_one_and_the_first_alone_speaks(line, alone, tmp_path):
    (tmp_path / "runs/evaluate").mkdir(parents=True)
    (tmp_path / CACHE).write_text("no cache")
    first, *others = together(*line, folders=[tmp_path] * 4)
    assert first.returncode == 2, first.stderr
    assert made(tmp_path) == made(alone)
    assert entries(tmp_path) == entries(alone)
    assert "set aside as cache.sqlite.damaged-1" in first.stderr
    assert "broken.png" in first.stderr
    assert "results: run" in first.stdout
    for other in others:
        assert (other.returncode, other.stdout, other.stderr) == (0, "", "")


def test_each_machine_has_a_cache_of_its_own_and_gets_what_the_other_made(line, alone, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    kept, marked = Cache(alone / CACHE), Cache(folders[1] / CACHE)
    for key in entries(alone):
        with contextlib.suppress(zlib.error):  # photos are made again
            marked.put([(key, zlib.compress(zlib.decompress(kept.get(key)), 9))])  # the same, in other bytes
    there = entries(folders[1])
    first, _ = together(*line, folders=folders, local=1)
    assert first.returncode == 2, first.stderr
    assert made(folders[0]) == made(alone)
    assert entries(folders[0]).keys() == entries(folders[1]).keys() == entries(alone).keys()
    taken = [key for key, value in entries(folders[0]).items() if value == there.get(key)]
    assert 0 < len(taken) < len(there)
    assert not (folders[1] / "run").exists()


def test_another_than_the_first_says_what_ends_it_and_whose_error_it_is(tiny_data, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    shutil.copytree(tiny_data.parent, folders[0] / "data")
    folders[1].mkdir()
    line = ("evaluate", "--data", "data/instances.json", "--imgsz", 64, "--protocols", "clean", "--out", "run")
    first, second = launched(*line, folders=folders)
    ended = second.ended(240)
    first.stop()  # which a launcher does
    first.ended()
    assert (ended.returncode, ended.stdout) == (2, "")
    (told,) = ended.stderr.splitlines()
    assert told.startswith("error: rank 1: data/instances.json: no such file or folder")
    (folders[0] / "run").mkdir(exist_ok=True)
    (folders[0] / "run/config.yaml").write_text("")
    refused, other = together(*line, folders=[folders[0]] * 2)
    assert "already holds a run" in refused.stderr
    assert (other.returncode, other.stderr) == (2, "")


def test_when_one_is_killed_all_end_and_another_takes_up_what_they_left(line, alone, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with (tmp_path / "log").open("wb") as log:
        launch = subprocess.Popen([*LAUNCH, *map(str, line)], cwd=tmp_path, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 240
    while not (begun := entries(tmp_path) if (tmp_path / "run/config.yaml").exists() else {}):
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.02)
    os.kill(int((tmp_path / "run/.lock").read_text()), signal.SIGKILL)
    assert launch.wait(60) != 0
    assert not (tmp_path / "run/metrics.json").exists()
    kept = entries(tmp_path)
    assert begun.items() <= kept.items()
    result = detguard("evaluate", "--resume", "run", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert "of them known already" in result.stderr
    assert made(tmp_path) == made(alone)
    assert kept.items() <= entries(tmp_path).items()
