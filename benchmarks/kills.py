"""SIGKILL at random moments of every command that can go on: does `--resume` end where an unbroken run does?

    python benchmarks/kills.py --kills 40

Small jobs of the bundled detector. Half of the kills are spread over the time of a run, from when its folder exists;
half come the moment a file appears or grows in it. A run without a config.yaml is begun again, all others are resumed.
Equal: the same exit code, records without times, and bytes of metrics, detections, photos and weights.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import cv2
import torch
import typer
from rich.console import Console
from rich.table import Table
from ultralytics.utils import ASSETS

import detguard.hardening.train
from detguard.cli import main as program
from detguard.detectors.gated import GatedNetwork
from detguard.detectors.load import fused, load_detector, load_model, save_gated

TIMES = ("seconds", "photos_per_second")
WRITTEN = (".png", ".jpg", ".safetensors", ".csv", ".jsonl", ".json")
# What takes longer than this after the death of its parent is left.
GRACE = 1.0
JOBS = {
    "attack": ("attack", "photos", "--imgsz", "160", "--steps", "5", "--random-start"),
    "attack, batch 4": ("attack", "photos", "--imgsz", "160", "--steps", "5", "--random-start", "--batch", "4"),
    "evaluate": ("evaluate", "--data", "data.json", "--imgsz", "160", "--protocols", "clean,attack", "--steps", "2",
                 "--attacks", "class,vanish"),
    "monitor": ("monitor", "--stream", "data.json", "--imgsz", "160", "--window", "8"),
    "harden": ("harden", "--data", "photos", "--imgsz", "64", "--batch", "4", "--photos", "100", "--split", "head"),
    "adapt": (
        "adapt", "--model", "ensemble.safetensors", "--new", "data.json", "--replay", "old", "--mode", "full",
        "--batch", "6", "--photos", "120",
    ),
}  # fmt: skip


def prepare(folder: Path) -> None:
    """Photos, their labels by the bundled detector, and an ensemble to adapt."""
    detector = load_detector()
    (folder / "photos").mkdir()
    (folder / "old").mkdir()
    names = detector.class_names
    data: dict[str, Any] = {"images": [], "annotations": []}
    data["categories"] = [{"id": index + 1, "name": name} for index, name in names.items()]
    photo = cv2.imread(str(ASSETS / "bus.jpg"))
    for number in range(8):
        small = cv2.resize(photo[:, 16 * number :], None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / f"photos/{number:02d}.png"), small)
        cv2.imwrite(str(folder / f"old/{number:02d}.png"), small // 2)
        file = {"id": number, "file_name": f"photos/{number:02d}.png"}
        data["images"].append(file | {"height": small.shape[0], "width": small.shape[1]})
        found = detector.detect([small[..., ::-1].copy()], 0.35)[0]
        for box, index in zip(found.boxes.tolist(), found.classes.tolist(), strict=True):
            x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
            of = {"id": len(data["annotations"]) + 1, "image_id": number, "category_id": index + 1, "iscrowd": 0}
            data["annotations"].append(of | {"bbox": [x, y, w, h], "area": w * h})
    (folder / "data.json").write_text(json.dumps(data))
    torch.manual_seed(0)
    card = {"architecture": "yolo11n.yaml", "classes": list(names.values()), "imgsz": 96}
    save_gated(GatedNetwork(fused(load_model()[0]), 11), card, folder / "ensemble.safetensors")


def start(place: Path, arguments: tuple[str, ...]) -> int:
    """Run the program in a process of its own, in `place`; returns its number."""
    if process := os.fork():
        return process
    code = 70
    try:
        os.chdir(place)
        with open("log", "ab", buffering=0) as log:  # noqa: PTH123
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.argv = ["detguard", *arguments]
        # Checkpoints every second, not every three minutes.
        detguard.hardening.train.Setting.save_every = 1.0
        program()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        print(f"Traceback: {error!r}", flush=True)
    finally:
        os._exit(code)


def new_place(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("photos", "old", "data.json", "ensemble.safetensors", "ensemble.json"):
        (folder / name).symlink_to(source / name)
    return folder


def files_in(run: Path) -> dict[str, int]:
    found = {}
    for inside, _, names in os.walk(run):
        for name in names:
            try:
                found[f"{inside}/{name}"] = os.stat(f"{inside}/{name}").st_size  # noqa: PTH116
            except OSError:
                continue
    return found


def watch(process: int, run: Path, until: float = float("inf"), event: int = -1) -> tuple[float, int, bool]:
    """Wait until a process ends, or for `until` seconds after its run folder exists, or for a change in it.

    Returns the seconds since the folder existed, the number of changes seen, and whether the process goes on.
    """
    began, changes, before = 0.0, 0, dict[str, int]()
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        now = files_in(run)
        began = began or (time.monotonic() if run.is_dir() else 0.0)
        changes += now != before
        before = now
        if began and (time.monotonic() - began >= until or changes == event):
            return time.monotonic() - began, changes, True
        time.sleep(0.001)
    return time.monotonic() - began, changes, False


def kill(process: int) -> list[int]:
    """SIGKILL; returns the processes that it leaves behind."""
    os.kill(process, signal.SIGSTOP)
    children: list[int] = []
    for task in Path(f"/proc/{process}/task").iterdir():
        children += map(int, (task / "children").read_text().split())
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    deadline = time.monotonic() + GRACE
    while left := [child for child in children if lives(child)]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.01)
    return []


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def outcome(run: Path, code: int) -> dict[str, Any]:
    """What must be equal of two runs."""
    found: dict[str, Any] = {"exit code": code}
    for file in sorted(run.rglob("*")):
        name = str(file.relative_to(run))
        if name == "results.jsonl":
            records = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = sorted(
                json.dumps({k: v for k, v in r.items() if k not in TIMES}, sort_keys=True) for r in records
            )
        elif file.suffix in WRITTEN:
            found[name] = file.read_bytes()
    return found


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(kills: int = 40, seed: int = 0, only: Annotated[str, typer.Option(help="One of the jobs.")] = "") -> None:
    rng = random.Random(seed)
    console = Console(width=120)
    table = Table(title=f"{kills} SIGKILLs, then --resume")
    for column in ("command", "kills", "equal", "begun again", "processes left", "partial files left"):
        table.add_column(column, justify="left" if column == "command" else "right")
    jobs = {name: job for name, job in JOBS.items() if only in ("", name)}
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    if os.fork() == 0:  # nothing may run in this process before it forks: threads would be lost
        prepare(root)
        os._exit(0)
    if os.wait()[1]:
        raise typer.Exit(1)
    wrong = False
    for number, (name, job) in enumerate(jobs.items()):
        arguments = (*job, "--out", "run")
        whole = new_place(root, root / f"{number}")
        process = start(whole, arguments)
        seconds, changes, _ = watch(process, whole / "run")
        reference = outcome(whole / "run", ended(process))
        if reference["exit code"] not in (0, 1):
            console.print((whole / "log").read_text())
            raise typer.Exit(2)
        count = kills // len(jobs) + (number < kills % len(jobs))
        killed = equal = again = left = partials = 0
        for turn in range(count):
            place = new_place(root, root / f"{number}-{turn}")
            process = start(place, arguments)
            if turn % 2:
                when = {"event": rng.randint(1, max(1, changes - 1))}
            else:
                when = {"until": seconds * (turn + 2 * rng.random()) / (count + 1)}
            *at, alive = watch(process, place / "run", **when)  # type: ignore[arg-type]
            if alive:
                killed += 1
                left += len(kill(process))
            else:  # faster than the reference
                ended(process)
            begun = (place / "run/config.yaml").exists()
            again += not begun
            process = start(place, (job[0], "--resume", "run") if begun else arguments)
            found = outcome(place / "run", ended(process))
            partials += len(list(place.rglob(".*.partial")))
            if found == reference:
                equal += 1
                shutil.rmtree(place)
            else:
                parts = sorted(k for k in found.keys() | reference.keys() if found.get(k) != reference.get(k))
                console.print(f"{name}: killed after {at[0]:.2f} s, change {at[1]}: {', '.join(parts)}; see {place}")
        table.add_row(name, str(killed), f"{equal} of {count}", str(again), str(left), str(partials))
        console.print(f"{name}: {equal} of {count} equal; unbroken {seconds:.1f} s, {changes} changes of files")
        wrong |= equal < count or bool(left or partials)
    console.print(table)
    if not wrong:
        shutil.rmtree(root)
    raise typer.Exit(int(wrong))


if __name__ == "__main__":
    typer.run(main)
