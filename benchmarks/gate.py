"""What the gate of a hardened ensemble knows of a photo, and what it is worth beside equal and fixed weights.

    python benchmarks/gate.py --limit 16

By --fusion bounded:0.25 the gate moves a logit by a quarter at most; --fusion average:0 leaves all to it. Every
ensemble is attacked for itself, that with the gate also by attacks that know its logits. The best fixed weights are
chosen on the photos that they are judged on, which flatters them.
"""

import copy
import math
from collections.abc import Sequence
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from detguard.data.corruptions import KINDS, corrupt
from detguard.data.sources import read_labelled
from detguard.data.stream import Labelled
from detguard.detections import Detections
from detguard.detectors.gated import GatedDetector
from detguard.detectors.load import load_detector
from detguard.engine import keep_freed_memory
from detguard.evaluation.attacks import attack_objective, pgd_options
from detguard.evaluation.attacks import attacked as photos_after
from detguard.evaluation.coco import metrics_of_photos, value_left
from detguard.evaluation.views import LOWEST_CONFIDENCE
from detguard.hardening.train import ADVERSARIAL, HARD, NORMAL
from detguard.photos import Photo, frames_tensor, read_photo
from detguard.reports.evaluation import number
from detguard.transforms.base import Transform

# Attacks on the loss alone, and with the gate's logits at three weights.
ATTACKS = ("all", "gate:1", "gate:10", "gate:100")
# Fixed weights of the normal, hard and adversarial expert that are tried.
WEIGHTS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0, 0.5), (0.25, 0.25, 0.5))
EQUAL = (1, 1, 1)


def fixed(detector: GatedDetector, weights: Sequence[float]) -> GatedDetector:
    """The ensemble with a gate that says the same of every photo."""
    network = copy.deepcopy(detector.model)
    with torch.no_grad():
        network.gate.out.weight.zero_()
        network.gate.out.bias.copy_(torch.tensor([math.log(max(weight, 1e-9)) for weight in weights]))
    return GatedDetector(network, f"{detector.name} {weights}", detector.imgsz)


def attacked(
    detector: GatedDetector,
    name: str,
    labelled: Sequence[Labelled],
    eps: float,
    steps: int,
    transforms: Sequence[Transform] = (),
) -> list[Photo]:
    """The photos after one attack on them and their transformed copies, made for this detector."""
    classes = sorted({int(c) for one in labelled for c in one.objects.classes})
    options = pgd_options(eps, steps, 8, random_start=True)
    photos = ((str(i), read_photo(one.file), one.objects) for i, one in enumerate(labelled))
    return photos_after(detector, photos, attack_objective(name, classes, detector), options, transforms=transforms)


def chosen(detector: GatedDetector, photos: Sequence[Photo]) -> list[int]:
    """The expert that the gate prefers for each photo."""
    asked = []
    for photo in photos:
        letterbox = detector.letterbox(photo.shape[:2])
        with torch.no_grad():
            gate = detector.candidates(frames_tensor([letterbox(photo)])).gate
        assert gate is not None
        asked.append(int(gate.argmax()))
    return asked


def detected(detector: GatedDetector, labelled: Sequence[Labelled], photos: Sequence[Photo]) -> list[Detections]:
    return [
        one.counted(detector.detect([photo], LOWEST_CONFIDENCE, multi_label=True)[0])
        for one, photo in zip(labelled, photos, strict=True)
    ]


def ap(labelled: Sequence[Labelled], found: Sequence[Detections]) -> tuple[float | None, float | None]:
    stats = metrics_of_photos([one.objects for one in labelled], found).stats
    return stats["AP"], stats["AP50"]


def main(
    model: Annotated[str, typer.Option(help="The ensemble.")] = "detguard-n-hard",
    data: str = "../shared/data/coco256/data.yaml",
    split: str = "val",
    limit: int = 16,
    imgsz: int = 320,
    eps: float = 2,
    steps: int = 10,
    severity: int = 3,
    fusion: Annotated[str | None, typer.Option(help="How answers become one; default: as the ensemble has it.")] = None,
) -> None:
    keep_freed_memory()
    detector = load_detector(model, imgsz, fusion=fusion)
    if not isinstance(detector, GatedDetector) or len(detector.experts) != len(EQUAL):
        raise SystemExit(f"{model}: expected an ensemble of a normal, a hard and an adversarial expert")
    labelled = [one for one in read_labelled(data, split, detector.class_names) if len(one.objects)][:limit]
    clean = [read_photo(one.file) for one in labelled]
    hard = [corrupt(photo, list(KINDS)[i % len(KINDS)], severity, i) for i, photo in enumerate(clean)]
    known = {"clean": (NORMAL, chosen(detector, clean)), f"corrupted, {severity}": (HARD, chosen(detector, hard))}
    designs = {"the gate": detector, "equal weights": fixed(detector, EQUAL)}
    designs |= {f"fixed {weights}": fixed(detector, weights) for weights in WEIGHTS}
    rows = {}
    for name, one in track(designs.items(), "attacking", transient=True):
        worst: list[tuple[tuple[float, float], Detections]] = []
        for attack in ATTACKS if one is detector else ATTACKS[:1]:
            photos = attacked(one, attack, labelled, eps, steps)
            if one is detector:
                known[f"attacked, {attack}"] = ADVERSARIAL, chosen(detector, photos)
            found = detected(one, labelled, photos)
            told = [(value_left(label.objects, f), f) for label, f in zip(labelled, found, strict=True)]
            worst = [min(pair, key=lambda x: x[0]) for pair in zip(worst or told, told, strict=True)]
        rows[name] = [*ap(labelled, detected(one, labelled, clean)), *ap(labelled, [found for _, found in worst])]
    title = f"{detector.name}, {imgsz} px, {len(labelled)} photos, {eps:g} levels, PGD-{steps}, {detector.model.fusion}"
    table = Table("photos", "right", "normal", "hard", "adversarial", title=f"Whom the gate asks. {title}")
    for kind, (right, asked) in known.items():
        shares = [asked.count(expert) / len(asked) for expert in (right, NORMAL, HARD, ADVERSARIAL)]
        table.add_row(kind, *(f"{share:.0%}" for share in shares))
    judged = Table("weights", "clean AP", "AP50", "attacked AP", "AP50", title="What it is worth")
    best = max((name for name in rows if name.startswith("fixed")), key=lambda name: rows[name][2] or 0)
    for name, row in rows.items():
        judged.add_row(f"{name}{', the best of these' if name == best else ''}", *map(number, row))
    console = Console(width=120)
    console.print(table, judged)


if __name__ == "__main__":
    typer.run(main)
