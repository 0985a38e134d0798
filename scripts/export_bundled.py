"""Write weights/detguard-n.safetensors and its json from a run of train_bundled.py, measured on coco256 val.

python scripts/export_bundled.py --shared ../shared --run runs/train/detguard-n --weights weights
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from safetensors.torch import save_file
from train_bundled import ARCHITECTURE, CLASSES, SIZE

from detguard.detectors.load import load_detector
from detguard.evaluation.coco import category_ids, coco_metrics, coco_results, read_annotations
from detguard.photos import read_photo


def main(
    shared: Annotated[Path, typer.Option()] = Path("../shared"),
    run: Annotated[Path, typer.Option()] = Path("runs/train/detguard-n"),
    weights: Annotated[Path, typer.Option()] = Path("weights"),
) -> None:
    state = torch.load(run / "last.pt", weights_only=True)
    prefix = "module."
    tensors = {key.removeprefix(prefix): value for key, value in state["ema"].items() if key.startswith(prefix)}
    # Half precision on disk is half the wheel; counters of batch norm are whole numbers and stay.
    halves = {k: v.half().contiguous() if v.is_floating_point() else v.contiguous() for k, v in tensors.items()}
    file = weights / "detguard-n.safetensors"
    weights.mkdir(exist_ok=True)
    save_file(halves, file)
    card = {
        "architecture": ARCHITECTURE,
        "classes": CLASSES,
        "imgsz": SIZE,
        "licence": "AGPL-3.0-or-later",
        "trained": {"by": "scripts/train_bundled.py", "photos seen": state["seen"], "from": "random weights"},
    }
    write = file.with_suffix(".json").write_text
    write(json.dumps(card, indent=2) + "\n")
    detector = load_detector(file)
    annotations = read_annotations(shared / "data/coco256/instances_val.json")
    ids = category_ids(annotations, detector.class_names)
    results = []
    for image in track(annotations.dataset["images"], "coco256 val"):
        photo = read_photo(shared / "data/coco256/images/val" / image["file_name"])
        results += coco_results(image["id"], detector.detect([photo], conf=0.001)[0], ids)
    table = coco_metrics(annotations, results, ids.values())
    write(json.dumps(card | {"measured": {"data": "coco256 val, 128 photos, 320 px", **table}}, indent=2) + "\n")
    for name, row in table.items():
        print(f"{name:12s} AP {row['AP']:.3f}  AP50 {row['AP50']:.3f}")


if __name__ == "__main__":
    typer.run(main)
