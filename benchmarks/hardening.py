"""Hardened designs side by side: one robust network, ensembles made of it, judged by the same attacks.

    python benchmarks/hardening.py --model ../shared/weights/yolo11n-coco.pt

First one network is trained adversarially; then each design goes on from there, with --more photos. Mixtures of that
network's weights and the undefended ones are single networks of other trades, for comparison at equal robustness. Every
part is a `detguard` command with a run of its own below --out: a killed benchmark goes on where it was.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from detguard.data.corruptions import KINDS
from detguard.detectors.gated import GatedNetwork
from detguard.detectors.load import fused, load_model, read_card, save_gated
from detguard.reports.evaluation import number

# Ensembles: name -> options of `detguard harden`.
DESIGNS: dict[str, list[str]] = {
    "whole networks": [],
    "whole networks, averaged": ["--fusion", "average:0.5"],
    "necks": ["--split", "neck", "--mode", "full"],
    "heads": ["--split", "head", "--mode", "full"],
}
SHARED = Path("../shared/data")
# The few photos with all of COCO's classes are shown more often.
VOC = Path("runs/data/voc")  # by scripts/voc_split.py: some are held out
TRAINING = [
    SHARED / "street1569/images",
    VOC / "images/train",
    SHARED / "scenes700/images",
    SHARED / "rooms2000/images",
]
TRAINING += 6 * [SHARED / "coco256/images/train"]


def detguard(command: str, run: Path, *options: object) -> None:
    """Run a `detguard` command into `run`, go on with it, or do nothing when it is done."""
    if (run / "report.html").exists():
        return
    arguments = ["--resume", run] if (run / "config.yaml").exists() else [*options, "--out", run]
    code = subprocess.run([sys.executable, "-m", "detguard", command, *map(str, arguments)], check=False).returncode
    if code > 1 or not (run / "report.html").exists():  # 1: some photos of an attack do not fool
        raise SystemExit(code)


def mixed(start: Path, model: str, share: float, made: Path) -> Path:
    """Weights between those of the undefended detector, share 0, and those of the robust network, 1."""
    network, _ = load_model(start)
    assert isinstance(network, GatedNetwork)
    undefended = GatedNetwork(fused(load_model(model)[0]), 0, network.names).experts
    with torch.no_grad():
        for ours, theirs in zip(network.experts.parameters(), undefended.parameters(), strict=True):
            ours.lerp_(theirs, 1 - share)
    save_gated(network, read_card(start), made)
    return made


def row_of(run: Path, person: str = "person") -> dict[str, Any]:
    """What the table shows of an evaluate run: AP50 of all classes and of one, clean and by budget, and mPC."""
    (found,) = json.loads((run / "metrics.json").read_text()).values()
    with (run / "per_class.csv").open() as file:
        views = {r["view"]: float(r["AP50"]) for r in csv.DictReader(file) if r["class"] == person and r["AP50"]}
    row: dict[str, Any] = {"clean": (found["clean"]["AP50"], views["clean"])}
    for eps, budget in found.get("attack", {}).get("budgets", {}).items():
        attacked = [value for view, value in views.items() if view.startswith(f"attack eps {eps} ")]
        row[f"eps {eps}"] = (budget["AP50"], min(attacked))
        row[f"AP at eps {eps}"] = budget["AP"]
    row["mPC"] = found["corruptions"]["mPC"] if "corruptions" in found else None
    row["AP"] = found["clean"]["AP"]
    return row


def main(
    model: Annotated[str, typer.Option(help="The undefended detector.")] = "detguard-n",
    designs: Annotated[str, typer.Option(help="Some of the ensembles, separated by semicolons.")] = ";".join(DESIGNS),
    mixtures: Annotated[str, typer.Option(help="Shares of the robust network in mixtures.")] = "0.9,0.8",
    photos: Annotated[int, typer.Option(help="Photos that the single network sees, with repeats.")] = 104_500,
    more: Annotated[int, typer.Option(help="Photos that each ensemble sees on top.")] = 50_000,
    crop: int = 192,
    batch: int = 32,
    mix: float = 0.2,
    imgsz: int = 320,
    corruptions: Annotated[str, typer.Option(help="Kinds that are trained on.")] = ",".join(KINDS),
    data: str = str(SHARED / "coco256/data.yaml"),
    limit: Annotated[int | None, typer.Option(help="Judge on the first so many photos only.")] = None,
    eps: str = "2,4",
    steps: int = 20,
    restarts: int = 2,
    severities: str = "1,2,3,4,5",
    device: str = "cpu",
    out: Path = Path("runs/benchmarks/hardening"),
) -> None:
    if not VOC.exists():
        subprocess.run([sys.executable, "scripts/voc_split.py", "--out", VOC], check=True)
    training = [option for folder in TRAINING for option in ("--data", folder)]
    common = [*training, "--imgsz", imgsz, "--crop", crop, "--batch", batch, "--mix", mix, "--corruptions", corruptions]
    common += ["--device", device]
    start = out / "start/weights/adversarial.safetensors"
    detguard("harden", out / "start", *common, "--model", model, "--recipe", "pgd", "--photos", photos)
    weights = {"undefended": model, "single network, not sparse": str(start)}
    weights["single network"] = str(out / "start/weights/sparse.safetensors")
    for share in filter(None, mixtures.split(",")):
        made = out / f"mixture-{share}.safetensors"
        weights[f"single network, {share} of it"] = str(mixed(start, model, float(share), made))
    for name in filter(None, designs.split(";")):
        folder = out / slug(name)
        options = [*common, "--model", start, "--teacher", model, "--photos", more]
        detguard("harden", folder, *options, *DESIGNS[name])
        weights[name] = str(folder / "weights/sparse.safetensors")
    judged = ["--data", data, "--imgsz", imgsz, "--eps", eps, "--steps", steps, "--restarts", restarts]
    judged += ["--device", device, "--severities", severities] + (["--limit", limit] if limit else [])
    rows = {}
    for name, file in weights.items():
        run = out / f"judged-{slug(name)}"
        detguard("evaluate", run, *judged, "--model", file)
        rows[name] = row_of(run)
    budgets = [f"eps {budget}" for budget in eps.split(",")]
    table = Table(
        title=f"{Path(model).stem}, {imgsz} px, {photos} photos seen, ensembles {more} more; worst case of all "
        f"attacks, PGD-{steps}, {restarts} starts, seed 0; {data}"
    )
    heads = ["design", "clean AP50 (person)", *(f"{budget} AP50 (person)" for budget in budgets)]
    for column in (*heads, "kept", "mPC", "clean AP", f"AP at {budgets[-1]}"):
        table.add_column(column, justify="left" if column == "design" else "right")
    for name, row in rows.items():
        pairs = [f"{number(all_)} ({number(person)})" for all_, person in (row[k] for k in ("clean", *budgets))]
        kept = f"{100 * row[budgets[-1]][0] / row['clean'][0]:.0f} %"
        table.add_row(name, *pairs, kept, number(row["mPC"]), number(row["AP"]), number(row[f"AP at {budgets[-1]}"]))
    Console(width=170).print(table)


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


if __name__ == "__main__":
    typer.run(main)
