"""Write bundled weights and their json, measured on coco256 val, from a run that trained or hardened them.

python scripts/export_bundled.py trained --run runs/train/detguard-n
python scripts/export_bundled.py hardened --made runs/harden/001/weights/sparse.safetensors --judged runs/evaluate/001
python scripts/export_bundled.py measured weights/detguard-n.safetensors
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save
from torch import Tensor
from train_bundled import ARCHITECTURE, CLASSES, SIZE

from detguard.data.dataset import read_dataset
from detguard.detectors.load import load_detector, read_card
from detguard.evaluation.cache import Cache
from detguard.evaluation.score import score
from detguard.evaluation.views import Clean, Subject, fill
from detguard.files import write_file

app = typer.Typer()
Shared = Annotated[Path, typer.Option(help="Where the data is.")]
Weights = Annotated[Path, typer.Option(help="Where the weights go.")]


@app.command()
def trained(
    run: Path = Path("runs/train/detguard-n"),
    before: Annotated[Path | None, typer.Option(help="Weights that it began with, to go half way from.")] = None,
    shared: Shared = Path("../shared"),
    weights: Weights = Path("weights"),
) -> None:
    """weights/detguard-n from a run of train_bundled.py."""
    state = torch.load(run / "last.pt", weights_only=True)
    prefix = "module."
    tensors = {key.removeprefix(prefix): value for key, value in state["ema"].items() if key.startswith(prefix)}
    card = {
        "architecture": ARCHITECTURE,
        "classes": CLASSES,
        "imgsz": SIZE,
        "licence": "AGPL-3.0-or-later",
        "trained": {"by": "scripts/train_bundled.py", "photos seen": state["seen"], "from": "random weights"},
    }
    if before:  # Izmailov et al. (2018): the mean of two of a run is in the middle of what both are at the rim of
        seen = read_card(before)["trained"]["photos seen"]
        card["trained"]["averaged"] = f"half way with the weights after {seen:,} photos"
        of_before = load_file(before)
        tensors = {k: v.lerp(of_before[k].to(v), 0.5) if v.is_floating_point() else v for k, v in tensors.items()}
    publish(tensors, card, weights / "detguard-n.safetensors", shared)


@app.command()
def hardened(
    made: Annotated[Path, typer.Option(help="Weights by detguard harden.")],
    judged: Annotated[Path, typer.Option(help="A run of detguard evaluate on them alone: what attacks left.")],
    shared: Shared = Path("../shared"),
    weights: Weights = Path("weights"),
) -> None:
    """weights/detguard-n-hard from a run of `detguard harden`."""
    card = json.loads(made.with_suffix(".json").read_text())
    (found,) = json.loads((judged / "metrics.json").read_text()).values()
    (eps,) = found["attack"]["budgets"]
    budget, clean = found["attack"]["budgets"][eps], found["clean"]
    attack = {"AP": round(budget["AP"], 4), "AP50": round(budget["AP50"], 4), "eps": int(eps)}
    attack |= {key: found["attack"][key] for key in ("steps", "restarts", "seed")} | {"photos": clean["photos"]}
    card["measured"] = {"attack": attack | {"attacks": list(budget["attacks"])}}
    publish(load_file(made), card, weights / "detguard-n-hard.safetensors", shared)


def publish(tensors: dict[str, Tensor], card: dict[str, Any], file: Path, shared: Path) -> None:
    """Write weights in half precision, and the card with their figures on clean photos beside them."""
    # Counters of batch norm are whole numbers and stay.
    halves = {k: v.half().contiguous() if v.is_floating_point() else v.contiguous() for k, v in tensors.items()}
    write_file(file, save(halves))  # `save_file` would leave a file that nobody else may read
    write_card(file, card)
    measured(file, shared)


def write_card(file: Path, card: dict[str, Any]) -> None:
    file.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")


@app.command()
def measured(file: Path, shared: Shared = Path("../shared")) -> None:
    """The figures on clean photos in the card beside bundled weights, as `detguard evaluate` counts them."""
    card, detector, dataset = read_card(file), load_detector(file), read_dataset(shared / "data/coco256/data.yaml")
    subject = Subject(file.stem, detector, dataset, dataset.category_ids(detector.class_names), Cache())
    fill(subject, [Clean()])
    metrics = score(subject, Clean())
    rows = {"all": metrics.stats} | metrics.per_class
    table = {name: {stat: round(row[stat] or 0.0, 4) for stat in ("AP", "AP50")} for name, row in rows.items()}
    data = {"data": f"coco256 val, {len(dataset.files)} photos, {detector.imgsz} px"}
    attacked = {key: value for key, value in card.get("measured", {}).items() if key == "attack"}
    write_card(file, card | {"measured": data | table | attacked})
    for name, row in table.items():
        print(f"{name:12s} AP {row['AP']:.3f}  AP50 {row['AP50']:.3f}")


if __name__ == "__main__":
    app()
