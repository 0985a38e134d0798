"""How the cost of `detguard attack` and `evaluate` grows with photos, and that of an attack with their side and group.

    OMP_NUM_THREADS=1 python benchmarks/growth.py            # --quick: 10 and 100 photos, two sides, two groups

Each row is a command in a process of its own. Seconds per photo are what each photo after the first adds, of the
processor's time, which other programs change less than the clock: loading is left out. Memory is the peak of what is
resident, as the system counts it; neither command starts processes for what is measured here. 1,000 photos should take
the memory of 10, and a hundred times as long. What an ensemble costs by its experts and by those asked (K):
`python benchmarks/adapting.py --model MODEL --minutes 0 --with-costs`.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import typer
import yaml
from rich.console import Console
from rich.table import Table

# Nothing here imports torch: Linux counts what a process had resident before it became another program.
SHARED = Path("../shared/data").absolute()
STREET = SHARED / "street1569"
# Copies of one kind, so that a group grows by nothing but their number.
COPIES = [f"jpeg:{quality}" for quality in range(95, 55, -5)]
ALONE = ("--transforms", "none")
# Photos of each side and group.
FEW = 9
PHOTOS = "photos"


@dataclass(frozen=True)
class Cell:
    """A command on some photos, and what is varied in it."""

    command: str
    value: int
    varied: str
    photos: Sequence[Path]
    options: Sequence[str]


@dataclass(frozen=True)
class Cost:
    """Of one command: seconds by the clock and of the processor, peak MiB, and how many photos were attacked."""

    clock: float
    processor: float
    peak: float
    attacked: int


def scaled(photos: Sequence[Path], side: int, folder: Path) -> list[Path]:
    """Copies of photos whose longest side is so many pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for photo in photos:
        pixels = cv2.imread(str(photo))
        scale = side / max(pixels.shape[:2])
        cv2.imwrite(str(folder / photo.name), cv2.resize(pixels, None, fx=scale, fy=scale))
    return [folder / photo.name for photo in photos]


def cells(
    out: Path, counts: Sequence[int], sides: Sequence[int], groups: Sequence[int], schedules: Sequence[str], seed: int
) -> Iterator[Cell]:
    """All that is measured, on the same photos or the first of them."""
    many = random.Random(seed).sample(sorted((STREET / "images").iterdir()), max(counts))
    for count in counts:
        yield Cell("attack", count, PHOTOS, many[:count], ALONE)
    for count in counts:
        options = ("--protocols", "clean,attack", "--attacks", "class", "--restarts", "1")
        yield Cell("evaluate", count, PHOTOS, many[:count], options)
    for side in sides:
        yield Cell("attack", side, "px", scaled(many[:FEW], side, out / f"side-{side}"), ALONE)
    for schedule in schedules:
        for size in groups:
            group = ("--transforms", ",".join(COPIES[:size]), "--schedule", schedule)
            yield Cell("attack", size, f"transforms, {schedule}", many[:FEW], group)


def data_of(photos: Sequence[Path], folder: Path) -> Path:
    """A data.yaml of some of STREET's photos."""
    for part in ("images", "labels"):
        (folder / part).symlink_to(STREET / part)
    (folder / "val.txt").write_text("".join(f"images/{photo.name}\n" for photo in photos))
    names = yaml.safe_load((SHARED / "coco256/data.yaml").read_text())["names"]
    (folder / "data.yaml").write_text(yaml.safe_dump({"path": ".", "val": "val.txt", "names": names}))
    return folder / "data.yaml"


def cost(cell: Cell, photos: Sequence[Path], common: Sequence[str], folder: Path) -> Cost:
    """What a command takes on some photos; folder: emptied, with the cache of rows before, and worked in."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    attack = cell.command == "attack"
    given = ["--target", "all", *map(str, photos)] if attack else ["--data", str(data_of(photos, folder))]
    program = [sys.executable, "-m", "detguard", "--quiet", cell.command, *given, *cell.options, *common]
    began = time.perf_counter()
    with (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen([*program, "--out", "run"], cwd=folder, stderr=errors)
    _, status, usage = os.wait4(process.pid, 0)
    clock = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1, 3):  # of an attack: not all photos were fooled, none had a target
        raise SystemExit((folder / "errors.txt").read_text())
    statuses = [json.loads(line)["status"] for line in (folder / "run/results.jsonl").open()] if attack else []
    attacked = sum(status in ("fooled", "failed") for status in statuses) if attack else len(photos)
    # Linux counts memory in KiB.
    return Cost(clock, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, attacked)


def main(
    model: str = "detguard-n",
    imgsz: int = 320,
    steps: int = 3,
    counts: str = "10,100,1000",
    sides: str = "320,640,1280,1920",
    groups: Annotated[str, typer.Option(help="Numbers of transforms, 8 at most.")] = "1,2,4,8",
    seed: Annotated[int, typer.Option(help="Of which photos.")] = 0,
    schedules: str = "worst,group",
    quick: Annotated[bool, typer.Option("--quick", help="10 and 100 photos, two sides, two groups.")] = False,
    out: Path = Path("runs/benchmark/growth"),
) -> None:
    if quick:
        counts, sides, groups, schedules = "10,100", "320,1280", "1,4", "group"
    out = out.absolute()
    weights = str(Path(model).absolute()) if Path(model).exists() else model
    common = ["--model", weights, "--imgsz", str(imgsz), "--steps", str(steps), "--device", "cpu"]
    wanted = [[int(one) for one in text.split(",")] for text in (counts, sides, groups)]
    started: dict[tuple[str, Path, Sequence[str]], Cost] = {}
    per_photo: dict[tuple[str, int], tuple[float, float]] = {}
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    table = Table(
        title=f"{Path(model).stem}, {imgsz} px, {steps} steps, photos by seed {seed}, OMP_NUM_THREADS={threads}"
    )
    for column in ("command", "by", "photos attacked", "clock, s", "processor, s per photo", "peak, MiB"):
        table.add_column(column, justify="left" if column in ("command", "by") else "right")
    for cell in cells(out, *wanted, schedules.split(","), seed):
        key = (cell.command, cell.photos[0], cell.options)
        if key not in started:
            started[key] = cost(cell, cell.photos[:1], common, out / "cell")
        found = cost(cell, cell.photos, common, out / "cell")
        seconds = (found.processor - started[key].processor) / (len(cell.photos) - 1)
        row = [cell.command, f"{cell.value:,} {cell.varied}", f"{found.attacked:,} of {len(cell.photos):,}"]
        row += [f"{found.clock:.1f}", f"{seconds:.3f}", f"{found.peak:.0f}"]
        print(", ".join(row), file=sys.stderr)
        table.add_row(*row)
        if cell.varied == PHOTOS:
            per_photo[cell.command, cell.value] = seconds, found.peak
    Console(width=120).print(table)
    least, most = min(wanted[0]), max(wanted[0])
    for command in ("attack", "evaluate"):
        (time_a, peak_a), (time_b, peak_b) = per_photo[command, least], per_photo[command, most]
        grown = f"memory x {peak_b / peak_a:.2f}, time per photo x {time_b / time_a:.2f}"
        print(f"{command}, {most:,} photos against {least:,}: {grown}")


if __name__ == "__main__":
    typer.run(main)
