"""AP over the number of attack steps, and under the black-box attack: the figures that show an attack that works.

    python benchmarks/attack_strength.py --model ../shared/weights/yolo11n-coco.pt

More steps must not raise AP, a larger budget must lower it, and the black box must not beat the white box. With
`--rules steepest,apgd` the same number of gradients is also spent by Auto-PGD, which finds its own steps.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from typing_extensions import override

from detguard.data.dataset import read_dataset
from detguard.detectors.load import load_detector
from detguard.engine import keep_freed_memory
from detguard.evaluation.attacks import (
    ATTACKS,
    SQUARE,
    AttackSet,
    attack_objective,
    attacked_photos,
    pgd_options,
)
from detguard.evaluation.cache import Cache
from detguard.evaluation.checks import attack_ap
from detguard.evaluation.score import score
from detguard.evaluation.views import Batch, Clean, Subject, View, fill
from detguard.photos import Photo


@dataclass(frozen=True)
class ByRule(AttackSet):
    """White-box attacks by another rule of steps than the one that detectors are judged by."""

    rule: str = "apgd"

    @override
    def attack(self, batch: Batch, name: str, restart: int) -> list[Photo]:
        options = pgd_options(self.eps, self.steps, len(batch.images), self.seed + restart, random_start=restart > 0)
        objective = attack_objective(name, sorted(batch.subject.category_ids), batch.subject.detector)
        # Auto-PGD has steps and a momentum of its own.
        options = replace(options, rule=self.rule, step=None, momentum=0.0)
        return attacked_photos(batch, batch.subject.detector, objective, options)


def main(
    model: Annotated[str, typer.Option()] = "detguard-n",
    data: Annotated[str, typer.Option()] = "../shared/data/coco256/data.yaml",
    imgsz: int = 320,
    steps: str = "1,5,10,20,50",
    eps: int = 2,
    large: Annotated[int, typer.Option(help="A larger budget, with 20 steps; 0 for none.")] = 16,
    queries: Annotated[int, typer.Option(help="Of the black box; 0 for none.")] = 200,
    attacks: str = ",".join(ATTACKS),
    rules: Annotated[str, typer.Option(help="steepest is the one that evaluate has.")] = "steepest",
    limit: Annotated[int | None, typer.Option(help="The first so many photos only.")] = None,
) -> None:
    keep_freed_memory()
    detector, dataset = load_detector(model, imgsz), read_dataset(data, limit=limit)
    subject = Subject(detector.name, detector, dataset, dataset.category_ids(detector.class_names), Cache())
    names = tuple(attacks.split(","))
    sets: list[tuple[str, AttackSet]] = [
        (rule, AttackSet(names, most, n) if rule == "steepest" else ByRule(names, most, n, rule=rule))
        for most, n in [*((eps, int(n)) for n in steps.split(",")), *([(large, 20)] if large else [])]
        for rule in rules.split(",")
    ]
    black = [AttackSet((SQUARE,), most, queries) for most in (eps, large) if queries and most]
    views: list[View] = [Clean(), *(view for _, view in sets), *black]
    for view in track(views, "showing", transient=True):
        fill(subject, [view])
    table = Table(title=f"{detector.name}, {imgsz} px, {data}, {len(dataset.files)} photos, seed 0")
    for column in ("attack", "headline AP", "worst case per photo", *names):
        table.add_column(column, justify="right")
    table.add_row("none", f"{score(subject, Clean()).stats['AP']:.4f}")
    for rule, view in sets:
        parts = [f"{score(subject, view, part).stats['AP']:.4f}" for part in view.scored]
        table.add_row(f"{rule}, eps {view.eps}, {view.steps} steps", f"{attack_ap(subject, view):.4f}", *parts)
    for square in black:
        table.add_row(f"Square, eps {square.eps}, {queries} queries", f"{attack_ap(subject, square):.4f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
