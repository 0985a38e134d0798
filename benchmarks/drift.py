"""Delay and false alarms of the drift detectors on real streams: clean photos, fog and low contrast, attacked ones;
a collapse after 40 photos; slow decay, and what it ends in for as long as there are photos.

    python benchmarks/drift.py --model ../shared/weights/yolo11n-coco.pt

What is found on each photo is kept by `evaluate`'s cache; the streams are those photos in many random orders.
"""

from collections.abc import Iterator
from itertools import product
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from detguard.data.corruptions import SEVERITIES
from detguard.data.dataset import read_dataset
from detguard.detectors.load import load_detector
from detguard.engine import keep_freed_memory
from detguard.evaluation.attacks import WORST, AttackSet
from detguard.evaluation.cache import Cache
from detguard.evaluation.views import Clean, Corrupted, Subject, View, fill
from detguard.hardening.monitor import DRIFT, Monitor, quality


def alarms(kind: str, window: int, values: list[float]) -> Iterator[int]:
    """The numbers of the photos at which a drop is told."""
    monitor = Monitor(kind, window)
    return (number for number, value in enumerate(values, 1) if monitor.add(value) is not None)


def main(
    model: Annotated[str, typer.Option()] = "detguard-n",
    data: str = "../shared/data/coco256/data.yaml",
    imgsz: int = 320,
    windows: str = "8,16,32",
    streams: int = 20,
    limit: int | None = None,
) -> None:
    keep_freed_memory()
    detector, dataset = load_detector(model, imgsz), read_dataset(data, limit=limit)
    subject = Subject(detector.name, detector, dataset, dataset.category_ids(detector.class_names), Cache())
    views: dict[str, tuple[View, str]] = {
        "clean": (Clean(), ""),
        "fog": (Corrupted("fog", 5, 0), ""),
        "low contrast": (Corrupted("contrast", 4, 0), ""),
        "PGD": (AttackSet(("all",), 4, 10), WORST),
        "least contrast": (Corrupted("contrast", 5, 0), ""),
        **{f"noise {severity}": (Corrupted("gaussian_noise", severity, 0), "") for severity in SEVERITIES},
    }
    for view, _ in track(views.values(), "showing", transient=True):
        fill(subject, [view])
    found = {
        name: [
            f1 for i in dataset.files if (f1 := quality(subject.objects(i), view.load(subject, i, part)).f1) is not None
        ]
        for name, (view, part) in views.items()
    }
    parts = [found["clean"], found["fog"] + found["low contrast"], found["PGD"]]
    means = ", ".join(f"{name} {np.mean(values):.2f}" for name, values in found.items())
    table = Table(title=f"{detector.name}, {imgsz} px; mean F1: {means}; {streams} orders, seed 0")
    changes = ("first change", "second change", "collapse, 40 + 40", "decay, 200 photos", "decay, going on")
    heads = ("false alarms, clean twice over", *(head for change in changes for head in (f"{change}: delay", "missed")))
    for column in ("detector", "window", *heads):
        table.add_column(column, justify="left" if column == "detector" else "right")
    for kind, window in product(DRIFT, map(int, windows.split(","))):
        rng = np.random.default_rng(0)
        false = 0
        delays: tuple[list[int], ...] = ([], [], [], [], [])
        for _ in range(streams):
            false += len(list(alarms(kind, window, [*rng.permutation(parts[0]), *rng.permutation(parts[0])])))
            drawn = [list(rng.permutation(part))[: len(parts[0])] for part in parts]
            told = list(alarms(kind, window, [*drawn[0], *drawn[1], *drawn[2]]))
            for change, part in enumerate(delays[:2], 1):
                start = change * len(parts[0])
                part += [number - start for number in told if start < number <= start + len(parts[0])][:1]
            few = [v for name in ("clean", "least contrast") for v in list(rng.permutation(found[name]))[:40]]
            delays[2].extend([number - 40 for number in alarms(kind, window, few) if number > 40][:1])
            *weaker, strongest = (list(rng.permutation(found[f"noise {severity}"])) for severity in SEVERITIES)
            decay = [v for part in weaker for v in part[:40]] + strongest
            start, length = len(parts[0]), 40 * len(SEVERITIES)
            told = list(alarms(kind, window, [*rng.permutation(parts[0]), *decay]))
            first = [number - start for number in told if number > start][:1]
            delays[3].extend(number for number in first if number <= length)
            delays[4].extend(first)
        cells = [f"{np.mean(d):.0f} (most {max(d)})" if d else "-" for d in delays]
        missed = [f"{streams - len(d)} of {streams}" for d in delays]
        table.add_row(
            kind, str(window), f"{false} in {streams}", *(c for pair in zip(cells, missed, strict=True) for c in pair)
        )
    Console(width=200).print(table)


if __name__ == "__main__":
    typer.run(main)
