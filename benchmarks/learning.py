"""What one adversarially trained network learns by: a teacher, labels, both, or after its backbone was made robust.

    python benchmarks/learning.py --model ../shared/weights/yolo11n-coco.pt

Each is trained from the same detector on the same labelled photos, with as many seen; those of the backbone count.
Judged are all VOC photos that were set aside, in VOC's classes, and all of COCO's `val`, in all 80; of each, the first
are attacked, and judged clean as well. Every part is a `detguard` command with a run of its own below --out: a killed
benchmark goes on where it was.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from hardening import SHARED, TRAINING, VOC, detguard, row_of, slug
from rich.console import Console
from rich.table import Table

from detguard.reports.evaluation import number

LABELLED = [VOC / "data.yaml", *6 * [SHARED / "coco256/data.yaml"]]
WAYS: dict[str, list[object]] = {
    "a teacher": ["--learn", "teacher"],
    "labels": ["--learn", "labels"],
    "both": ["--learn", "both"],
    "a teacher, on a robust backbone": [part for folder in TRAINING[:4] for part in ("--pretrain", folder)],
}


def main(
    model: Annotated[str, typer.Option(help="The undefended detector, and the teacher.")],
    photos: Annotated[int, typer.Option(help="Photos seen in each training, with repeats.")] = 4_000,
    imgsz: int = 320,
    crop: int = 192,
    eps: Annotated[float, typer.Option(help="Of training and of attacks.")] = 2,
    limit: Annotated[int, typer.Option(help="Attack so many photos of each data set.")] = 16,
    steps: int = 20,
    ways: Annotated[str, typer.Option(help="Some of them, separated by semicolons.")] = ";".join(WAYS),
    out: Path = Path("runs/benchmark/learning"),
) -> None:
    if not VOC.exists():
        subprocess.run([sys.executable, "scripts/voc_split.py", "--out", VOC], check=True)
    data = [part for source in LABELLED for part in ("--data", source)]
    options = ["--recipe", "pgd", "--imgsz", imgsz, "--crop", crop, "--eps", eps, "--photos", photos, "--workers", 1]
    judged = ["--imgsz", imgsz, "--seed", 0]
    attacked = [*judged, "--limit", limit, "--eps", f"{eps:g}", "--steps", steps, "--restarts", 1]
    attacked += ["--attacks", "all,rank", "--protocols", "clean,attack"]
    heads = ("clean, all", f"clean, {limit}", "attacked")
    table = Table("learned by", *(f"{name}: {head}" for name in ("VOC", "COCO") for head in heads))
    for way in ways.split(";"):
        run = out / slug(way)
        detguard("harden", run, "--model", model, *data, *options, *WAYS[way])
        cells = []
        for source in (VOC / "data.yaml", SHARED / "coco256/data.yaml"):
            judge = ["--model", run / "weights/sparse.safetensors", "--data", source]
            whole, first = (out / f"{slug(way)}-{source.parent.name}{part}" for part in ("", "-attacked"))
            detguard("evaluate", whole, *judge, *judged, "--protocols", "clean")
            detguard("evaluate", first, *judge, *attacked)
            few = row_of(first)
            of_each = (row_of(whole)["clean"], few["clean"], few[f"eps {eps:g}"])
            cells += [f"{number(all_)} ({number(person)})" for all_, person in of_each]
        table.add_row(way, *cells)
    table.title = f"AP50 (person), {imgsz} px, {eps:g} levels, PGD-{steps}, {limit} photos attacked, {photos} seen"
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
