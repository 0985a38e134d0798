"""AP under the 15 corruptions as published (imagecorruptions) beside detguard's own, of several models.

    python benchmarks/corruptions.py --model ../shared/weights/yolo11n-coco.pt --model ../shared/weights/yolov8n-coco.pt

Training and attacks have detguard's own, since they take a fifth of the time; detectors are judged under the published.
"""

from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from typing_extensions import override

from detguard.data.corruptions import KINDS, SEVERITIES, chosen_kinds, corrupt
from detguard.data.dataset import read_dataset
from detguard.detectors.load import load_detector
from detguard.engine import keep_freed_memory
from detguard.evaluation.cache import Cache
from detguard.evaluation.run import mean
from detguard.evaluation.score import score
from detguard.evaluation.views import Clean, Corrupted, Subject, fill
from detguard.photos import Photo
from detguard.reports.evaluation import number


@dataclass(frozen=True)
class Own(Corrupted):
    """The photos under one of the corruptions that detectors are trained with."""

    @override
    def alter(self, photo: Photo, seed: int) -> Photo:
        return corrupt(photo, self.kind, self.severity, seed)


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
    title = f"AP, mean over severities {severities}; {imgsz} px, {data}, {len(dataset.files)} photos, seed 0"
    table = Table("corruption", title=title)
    columns: list[list[str]] = []
    for name in model:
        detector = load_detector(name, imgsz)
        subject = Subject(name, detector, dataset, dataset.category_ids(detector.class_names), Cache())
        fill(subject, [Clean()])
        clean = score(subject, Clean()).stats["AP"]
        for source, made in (("published", Corrupted), ("detguard's", Own)):
            views = {kind: [made(kind, level, 0) for level in levels] for kind in chosen}
            for kind in track(chosen, f"{detector.name}, {source}", transient=True):
                fill(subject, views[kind])
            each = {kind: mean(score(subject, view).stats["AP"] for view in views[kind]) for kind in chosen}
            overall = mean(each.values())
            share = overall / clean if clean and overall is not None else None
            columns.append([number(value) for value in (clean, *each.values(), overall, share)])
            table.add_column(f"{detector.name}, {source}", justify="right")
    for label, *row in zip(["none", *chosen, "mPC", "rPC"], *columns, strict=True):
        table.add_row(label.replace("_", " "), *row)
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
