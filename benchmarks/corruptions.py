"""AP under the 15 corruptions as published (imagecorruptions) beside detguard's own, of several models.

    python benchmarks/corruptions.py --model ../shared/weights/yolo11n-coco.pt --model ../shared/weights/yolov8n-coco.pt

Training and attacks have detguard's own, since they took a fifth of the package's time; detectors are judged under
the published.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from typing_extensions import override

from detguard.data.corruptions import KINDS, SEVERITIES, chosen_kinds, corrupt
from detguard.data.dataset import read_dataset
from detguard.detectors.load import load_detector
from detguard.engine import keep_freed_memory
from detguard.evaluation.bootstrap import error_95
from detguard.evaluation.cache import Cache
from detguard.evaluation.coco import CocoMetrics
from detguard.evaluation.run import figure, mean
from detguard.evaluation.score import metrics_of
from detguard.evaluation.views import Clean, Corrupted, Subject, View, fill, results_of
from detguard.photos import Photo
from detguard.reports.evaluation import number, with_error


@dataclass(frozen=True)
class Own(Corrupted):
    """The photos under one of the corruptions that detectors are trained with."""

    @override
    def alter(self, photo: Photo, seed: int) -> Photo:
        return corrupt(photo, self.kind, self.severity, seed)


def judged(subject: Subject, view: View) -> CocoMetrics:
    """The figures of a view, with those in each draw of the photos."""
    return metrics_of(subject, results_of(subject, view), drawn=True)


def shown(some: Collection[CocoMetrics], photos: int) -> str:
    """The mean AP of some views, with half of its 95 % interval."""
    drawn = np.mean([metrics.drawn for metrics in some if metrics.drawn is not None], axis=0)
    return with_error(figure([metrics.stats for metrics in some], mean, error_95(drawn, photos)))


def main(
    model: Annotated[list[str], typer.Option()],
    data: Annotated[str, typer.Option()] = "../shared/data/coco256/data.yaml",
    imgsz: int = 320,
    kinds: Annotated[str, typer.Option(help="Only these of the 15.")] = ",".join(KINDS),
    severities: str = ",".join(map(str, SEVERITIES)),
    limit: Annotated[int | None, typer.Option(help="The first so many photos only.")] = None,
) -> None:
    keep_freed_memory()
    dataset = read_dataset(data, limit=limit)
    chosen, levels = chosen_kinds(kinds.split(",")), [int(level) for level in severities.split(",")]
    title = f"AP, mean over severities {severities}, ± half of its 95 % interval; {imgsz} px, {data}, "
    title += f"{len(dataset.files)} photos, seed 0"
    table = Table("corruption", title=title)
    columns: list[list[str]] = []
    for name in model:
        detector = load_detector(name, imgsz)
        subject = Subject(name, detector, dataset, dataset.category_ids(detector.class_names), Cache())
        fill(subject, [Clean()])
        clean = judged(subject, Clean())
        for source, made in (("published", Corrupted), ("detguard's", Own)):
            each: dict[str, list[CocoMetrics]] = {}
            for kind in track(chosen, f"{detector.name}, {source}", transient=True):
                views = [made(kind, level, 0) for level in levels]
                fill(subject, views)
                each[kind] = [judged(subject, view) for view in views]
            overall = [metrics for of_kind in each.values() for metrics in of_kind]
            means = [shown(some, len(dataset.files)) for some in ([clean], *each.values(), overall)]
            ap, under = clean.stats["AP"], mean(metrics.stats["AP"] for metrics in overall)
            columns.append([*means, number(under / ap if ap and under is not None else None)])
            table.add_column(f"{detector.name}, {source}", justify="right")
    for label, *row in zip(["none", *chosen, "mPC", "rPC"], *columns, strict=True):
        table.add_row(label.replace("_", " "), *row)
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
