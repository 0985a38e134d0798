"""Do attacked photos still fool the detector from file, and after filtering and compression? One table per question.

    python benchmarks/survival.py group      # one image against the group, judged by the group's transforms
    python benchmarks/survival.py unseen     # a larger group against transforms that were not in it
    python benchmarks/survival.py mislabel   # bus -> train
    python benchmarks/survival.py rules      # aggregates and gradient rules on the same photos

Runs are kept under runs/benchmarks/survival/ and go on where they stopped. Success is judged on the saved files, by the
detector's own predict path.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import typer
from hardening import detguard
from threats import SHARED, rate, with_person

from detguard import DetguardError, load_detector, verify
from detguard.detectors.base import Detector
from detguard.runs import Record, Run

UNSEEN = "jpeg:40,jpeg:60,jpeg:85,jpeg:95,gaussian:3,resize:0.7,resize:0.5"
GROUP = "median:3,jpeg:75"
LARGE = "median:3,median:5,jpeg:50,jpeg:75"

app = typer.Typer(help=__doc__)
Model = Annotated[Path, typer.Option()]
MODEL = SHARED / "weights/yolo11n-coco.pt"


def attack(
    detector: Detector, photos: Sequence[Path], transforms: str, further: str, target: str, *options: object
) -> tuple[list[Record], list[Record]]:
    """Attack (or finish attacking) photos; returns the records of the attack and of judging its files anew."""
    asked = ["--target", target, "--transforms", transforms, "--steps", 60, "--schedule", "group", *options]
    name = "-".join(map(str, [detector.name, len(photos), *asked])).replace("--", "")
    run = Path("runs/benchmarks/survival") / name
    detguard("attack", run, *photos, "--model", detector.source, *asked)
    made = Run.open(run, "attack")
    if made.config["detector"]["sha256"] != detector.state_hash():
        raise DetguardError(f"{run}: of another {detector.name}; delete it")
    records = [r for r in made.records() if r["status"] in ("fooled", "failed")]
    return records, list(verify(run, detector, transforms=further))


def survival(judged: Sequence[Record], name: str) -> str:
    return rate([r["members"][name]["fooled"] for r in judged])


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def describe(records: Sequence[Record]) -> list[str]:
    success = rate([r["members"]["photo"]["fooled"] for r in records])
    steps = [r["iterations"] for r in records]
    used = max(r["difference"] for r in records)
    quality = f"{mean(r['psnr'] for r in records):.1f} dB / {mean(r['ssim'] for r in records):.3f}"
    return [
        success,
        f"{mean(steps):.1f} / {max(steps)}",
        str(used),
        quality,
        f"{mean(r['seconds'] for r in records):.1f}",
    ]


COLUMNS = ["success from file", "iterations mean / most", "levels used", "PSNR / SSIM", "s per photo"]


@app.command()
def group(model: Model = MODEL, most: int = 1000) -> None:
    """A single image against the group, by each schedule and with momentum, eps 4, at most 60 iterations."""
    detector = load_detector(model)
    photos = with_person(detector, most)
    rows = []
    worst, momentum = ("--schedule", "worst"), ("--momentum", 0.9)
    ways: list[tuple[str, str, tuple[object, ...]]] = [
        ("single image", "none", ()),
        ("group", GROUP, ()),
        ("worst member in turn", GROUP, worst),
        ("group, momentum .9", GROUP, momentum),
        ("worst, momentum .9", GROUP, worst + momentum),
    ]
    for name, transforms, options in ways:
        records, judged = attack(detector, photos, transforms, GROUP, "person", "--eps", 4, *options)
        stepped = 1 if transforms == "none" or "worst" in options else 1 + len(transforms.split(","))
        frames = f"{sum(r['queries'] for r in records)} / {sum(r['iterations'] for r in records) * stepped}"
        survived = [survival(judged, t) for t in GROUP.split(",")]
        rows.append([f"{name}: {transforms}", *describe(records), frames, *survived])
    print(f"{model.name}, conf 0.25, eps 4, step 1, at most 60 iterations, {torch.get_num_threads()} threads")
    print_table(["attack", *COLUMNS, "frames forward / backward", *GROUP.split(",")], rows)


@app.command()
def unseen(model: Model = MODEL, most: int = 1000, margins: str = "0.05,0.97", eps: int = 8, step: float = 1) -> None:
    """A group of four transforms against transforms that were not in it, for each --margin."""
    detector = load_detector(model)
    photos = with_person(detector, most)
    rows = []
    for margin in margins.split(","):
        options = ("--eps", eps, "--margin", margin, "--step", step)
        records, judged = attack(detector, photos, LARGE, UNSEEN, "person", *options)
        rows.append([margin, *describe(records), *(survival(judged, t) for t in UNSEEN.split(","))])
    print(f"{model.name}, group {LARGE}, conf 0.25, eps {eps}, step {step:g}, at most 60 iterations")
    print_table(["margin", *COLUMNS, *UNSEEN.split(",")], rows)


@app.command()
def mislabel(model: Model = MODEL, photos: Path = SHARED / "data/coco256/images/*/*") -> None:
    """Bus found as train, in place (IoU >= 0.5), in the group and after unseen JPEG."""
    detector = load_detector(model)
    judges = [*GROUP.split(","), "jpeg:60", "jpeg:90"]
    rows = []
    for name, transforms in (("bus as train, single", "none"), ("bus as train, group", GROUP)):
        records, judged = attack(detector, [photos], transforms, ",".join(judges), "bus", "--to", "train", "--eps", 4)
        rows.append([name, *describe(records), *(survival(judged, t) for t in judges)])
    print(f"{model.name}, conf 0.25, eps 4, step 1, at most 60 iterations")
    print_table(["attack", *COLUMNS, *judges], rows)


@app.command()
def rules(model: Model = MODEL, most: int = 16) -> None:
    """The three aggregates and both gradient rules on the same photos."""
    detector = load_detector(model)
    photos = with_person(detector, most)
    rows = []
    further = "jpeg:60,gaussian:3,resize:0.7"
    for gradient in ("straight-through", "exact"):
        for aggregate, *weights in (("mean",), ("weighted", "1,1,2"), ("max",)):
            options = ["--gradient", gradient, "--aggregate", aggregate, *(["--weights", *weights] if weights else [])]
            records, judged = attack(detector, photos, GROUP, further, "person", "--eps", 4, *options)
            all_members = rate([r["status"] == "fooled" for r in records])
            row = [gradient, " ".join([aggregate, *weights]), all_members, *describe(records)[1:]]
            rows.append([*row, *(survival(judged, t) for t in further.split(","))])
    print(f"{model.name}, group {GROUP}, conf 0.25, eps 4, step 1, at most 60 iterations")
    print_table(["gradient", "aggregate", "whole group fooled", *COLUMNS[1:], *further.split(",")], rows)


if __name__ == "__main__":
    app()
