"""Training on attacks that survive filtering, `detguard harden --transforms`, against training on plain ones.

    python benchmarks/filtered_training.py --model runs/harden/001/weights/sparse.safetensors --teacher yolo11n.pt

Both go on from one hardened ensemble, by the same options and seed but for the transforms. Each is attacked for itself
by either kind of attack: on the photo alone, and on the photo and its transformed copies. Judged is what each attack
left as a file, as it is and after each transform. A killed training goes on where it was.
"""

from pathlib import Path
from typing import Annotated

import typer
from gate import ap, attacked, detected
from hardening import TRAINING, detguard, slug
from rich.console import Console
from rich.progress import track
from rich.table import Table

from detguard.data.sources import read_labelled
from detguard.detectors.gated import GatedDetector
from detguard.detectors.load import load_detector
from detguard.engine import keep_freed_memory
from detguard.photos import read_photo
from detguard.reports.evaluation import number
from detguard.transforms.parse import parse_transforms

PLAIN, CLEAN = "none", "not attacked"


def main(
    model: Annotated[str, typer.Option(help="A hardened ensemble, to go on from.")],
    teacher: Annotated[str, typer.Option(help="Whom both imitate.")],
    transforms: str = "median:3,jpeg:75",
    photos: Annotated[int, typer.Option(help="Photos seen in each training.")] = 6_000,
    data: str = "../shared/data/coco256/data.yaml",
    limit: Annotated[int, typer.Option(help="Judge on the first so many photos with objects.")] = 32,
    imgsz: int = 320,
    crop: int = 192,
    eps: float = 2,
    steps: int = 10,
    rate: Annotated[float, typer.Option(help="Learning rate of both trainings.")] = 0.001,
    out: Path = Path("runs/benchmark/filtered_training"),
) -> None:
    keep_freed_memory()
    ways = (PLAIN, transforms)
    learned = [part for folder in TRAINING for part in ("--data", folder)]
    options = ["--imgsz", imgsz, "--crop", crop, "--eps", eps, "--photos", photos, "--workers", 1, "--rate", rate]
    trained = {"before": model}
    for way in ways:
        run = out / slug(way)
        detguard("harden", run, "--model", model, "--teacher", teacher, *learned, *options, "--transforms", way)
        trained[f"trained, {way}"] = str(run / "weights/sparse.safetensors")
    members = parse_transforms(transforms)
    table = Table("ensemble", "attack knows", "as it is", *(f"after {member}" for member in members))
    for name, file in track(trained.items(), "judging"):
        detector = load_detector(file, imgsz)
        assert isinstance(detector, GatedDetector)
        labelled = [one for one in read_labelled(data, "val", detector.class_names) if len(one.objects)][:limit]
        of_each = {CLEAN: [read_photo(one.file) for one in labelled]}
        of_each |= {
            way: attacked(detector, "all", labelled, eps, steps, [] if way == PLAIN else members) for way in ways
        }
        for way, shown in of_each.items():
            read = [shown, *([member(photo) for photo in shown] for member in members)]
            figures = [ap(labelled, detected(detector, labelled, one)) for one in read]
            table.add_row(name, way, *(f"{number(a)} ({number(a50)})" for a, a50 in figures))
    table.title = f"AP (AP50), {limit} photos, {imgsz} px, {eps:g} levels, PGD-{steps}, {photos} photos seen"
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
