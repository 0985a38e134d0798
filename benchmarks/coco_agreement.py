"""Clean AP of detguard against Ultralytics' own `val`, and where a difference comes from.

    python benchmarks/coco_agreement.py MODEL.pt... --data ../shared/data/coco256 --sizes 640,320

Three figures each by both formulas of AP: Ultralytics' detections, detguard's on Ultralytics' validation frames (each
padded by up to a stride more than its predict path pads), and detguard's on the predict path's frames, which is what
users run and what `detguard evaluate` prints. Photos a second: of `val` and of what `evaluate` does on clean photos,
scores and all, each by its second run.
"""

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table
from torchvision.ops import box_iou
from ultralytics import YOLO
from ultralytics.data import build_dataloader, build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.engine.validator import BaseValidator
from ultralytics.utils.metrics import ap_per_class
from ultralytics.utils.ops import scale_boxes

from detguard.data.dataset import Dataset, read_dataset
from detguard.detections import Detections, suppress
from detguard.detectors.base import Detector
from detguard.detectors.load import load_detector
from detguard.engine import keep_freed_memory
from detguard.evaluation.cache import Cache
from detguard.evaluation.coco import coco_metrics
from detguard.evaluation.score import score
from detguard.evaluation.views import Clean, Subject, fill
from detguard.photos import read_photo


def main(
    models: Annotated[list[Path], typer.Argument()],
    data: Annotated[Path, typer.Option()] = Path("../shared/data/coco256"),
    sizes: str = "640,320",
) -> None:
    keep_freed_memory()
    table = Table(title=f"clean AP, {data.name} val")
    figures = ("val's boxes", "val's frames", "detguard evaluate", "photos a second: val", "evaluate")
    for column in ("model", "px", "Ultralytics val", "", *figures):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(data, folder, dirs_exist_ok=True)  # Ultralytics writes beside the labels
        config = Path(folder) / "val.yaml"
        config.write_text(yaml.safe_dump(yaml.safe_load((data / "data.yaml").read_text()) | {"path": folder}))
        truth = read_dataset(data / "data.yaml")
        for file in models:
            for size in map(int, sizes.split(",")):
                yolo, detector = YOLO(file), load_detector(file, size)
                options = {"plots": False, "verbose": False, "device": "cpu", "workers": 0, "exist_ok": True}
                named = {"project": folder, "name": f"{file.stem}-{size}"}
                ids = truth.category_ids(detector.class_names)
                for _ in range(2):
                    began = time.perf_counter()
                    theirs = yolo.val(data=config, imgsz=size, save_json=True, **options, **named)
                    of_val = time.perf_counter() - began
                for _ in range(2):
                    began = time.perf_counter()
                    cache = Cache(Path(tempfile.mkdtemp(dir=folder)) / "cache.sqlite")
                    subject = Subject(file.stem, detector, truth, ids, cache)
                    fill(subject, [Clean()])
                    score(subject, Clean())
                    of_evaluate = time.perf_counter() - began
                boxes = vals_boxes(Path(folder) / f"{file.stem}-{size}/predictions.json", truth)
                rows = [boxes, on_val_frames(detector, config, truth), on_photos(detector, truth)]
                coco = [coco_metrics(truth.annotations, r.items(), ids, sizes=False).stats for r in rows]
                theirs_formula = [ultralytics_ap(truth, ids, r) for r in rows]
                table.add_row(
                    file.stem,
                    str(size),
                    f"{theirs.box.map:.4f}",
                    "Ultralytics' AP",
                    *(f"{v:.4f}" for v in theirs_formula),
                    *(f"{len(truth.files) / taken:.1f}" for taken in (of_val, of_evaluate)),
                )
                table.add_row("", "", "", "COCO's AP", *(f"{c['AP']:.4f}" for c in coco))
    Console(width=140).print(table)


def vals_boxes(file: Path, truth: Dataset) -> dict[int, Detections]:
    """What Ultralytics' validation has written, by image id."""
    rows: dict[int, list[list[float]]] = {image: [] for image in truth.files}
    for box in json.loads(file.read_text()):
        x, y, width, height = box["bbox"]
        # Without COCO's own paths it counts classes from 1.
        rows[box["image_id"]].append([x, y, x + width, y + height, box["score"], box["category_id"] - 1])
    tables = {image: torch.tensor(some, dtype=torch.float32).reshape(-1, 6) for image, some in rows.items()}
    return {image: Detections(table[:, :4], table[:, 4], table[:, 5].long()) for image, table in tables.items()}


def on_photos(detector: Detector, truth: Dataset) -> dict[int, Detections]:
    return {
        image: detector.detect([read_photo(file)], 0.001, 0.7, multi_label=True)[0]
        for image, file in truth.files.items()
    }


def on_val_frames(detector: Detector, config: Path, truth: Dataset) -> dict[int, Detections]:
    """detguard's network, NMS and scoring, on the frames that Ultralytics' validation makes."""
    from ultralytics.cfg import get_cfg

    data = check_det_dataset(str(config))
    settings = get_cfg(overrides={"imgsz": detector.imgsz, "rect": True, "task": "detect"})
    dataset = build_yolo_dataset(settings, data["val"], 16, data, mode="val", rect=True, stride=32)
    images = {file.name: image for image, file in truth.files.items()}
    found = {}
    for batch in build_dataloader(dataset, 16, 0, shuffle=False):
        with torch.no_grad():
            candidates = detector.candidates(batch["img"].float() / 255)
        for i, detections in enumerate(suppress(candidates, 0.001, 0.7, multi_label=True)):
            boxes = scale_boxes(
                batch["img"].shape[2:], detections.boxes, batch["ori_shape"][i], ratio_pad=batch["ratio_pad"][i]
            )
            placed = Detections(boxes, detections.scores, detections.classes)
            found[images[Path(batch["im_file"][i]).name]] = placed
    return found


def ultralytics_ap(truth: Dataset, ids: dict[int, int], found: dict[int, Detections]) -> float:
    """AP by Ultralytics' own formula: its matching and its integral of the precision."""
    judge = BaseValidator.__new__(BaseValidator)
    judge.iouv = torch.linspace(0.5, 0.95, 10)
    stats = []
    for image in truth.files:
        objects, one = truth.objects(image, ids), found[image]
        one = one[one.scores.argsort(descending=True, stable=True)]
        true = np.zeros((len(one), 10), bool)
        if len(one) and len(objects):
            true = judge.match_predictions(one.classes, objects.classes, box_iou(objects.boxes, one.boxes)).numpy()
        stats.append((true, one.scores.numpy(), one.classes.numpy(), objects.classes.numpy()))
    return float(ap_per_class(*(np.concatenate(s) for s in zip(*stats, strict=True)))[5].mean())


if __name__ == "__main__":
    typer.run(main)
