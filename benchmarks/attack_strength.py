"""AP over the number of attack steps, and under the black-box attack: the figures that show an attack that works.

    python benchmarks/attack_strength.py --model ../shared/weights/yolo11n-coco.pt

More steps must not raise AP, a larger budget must lower it, and the black box must not beat the white box.
"""

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from detguard.data.dataset import read_dataset
from detguard.detectors.load import load_detector
from detguard.engine import keep_freed_memory
from detguard.evaluation.attacks import ATTACKS, AttackSet, BlackBox
from detguard.evaluation.cache import Cache
from detguard.evaluation.checks import attack_ap
from detguard.evaluation.score import score
from detguard.evaluation.views import Clean, Subject, View, fill


def main(
    model: Annotated[str, typer.Option()] = "detguard-n",
    data: Annotated[str, typer.Option()] = "../shared/data/coco256/data.yaml",
    imgsz: int = 320,
    steps: str = "1,5,10,20,50",
    eps: int = 2,
    large: int = 16,
    queries: int = 200,
    attacks: str = ",".join(ATTACKS),
    limit: Annotated[int | None, typer.Option(help="The first so many photos only.")] = None,
) -> None:
    keep_freed_memory()
    detector, dataset = load_detector(model, imgsz), read_dataset(data, limit=limit)
    subject = Subject(detector.name, detector, dataset, dataset.category_ids(detector.class_names), Cache())
    names = tuple(attacks.split(","))
    sets = [AttackSet(names, eps, int(n)) for n in steps.split(",")] + [AttackSet(names, large, 20)]
    black = [BlackBox(eps, queries), BlackBox(large, queries)]
    views: list[View] = [Clean(), *sets, *black]
    for view in track(views, "showing", transient=True):
        fill(subject, [view])
    table = Table(title=f"{detector.name}, {imgsz} px, {data}, {len(dataset.files)} photos, seed 0")
    for column in ("attack", "headline AP", "worst case per photo", *names):
        table.add_column(column, justify="right")
    table.add_row("none", f"{score(subject, Clean()).stats['AP']:.4f}")
    for view in sets:
        parts = [f"{score(subject, view, part).stats['AP']:.4f}" for part in view.scored]
        table.add_row(f"eps {view.eps}, {view.steps} steps", f"{attack_ap(subject, view):.4f}", *parts)
    for square in black:
        table.add_row(f"Square, eps {square.eps}, {queries} queries", f"{score(subject, square).stats['AP']:.4f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
