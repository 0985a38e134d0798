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
from detguard.evaluation.coco import Result, coco_metrics, coco_results
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
                boxes = json.loads((Path(folder) / f"{file.stem}-{size}/predictions.json").read_text())
                boxes = [
                    {key: box[key] for key in ("image_id", "bbox", "score")}
                    | {"category_id": ids[box["category_id"] - 1]}  # without COCO's own paths it counts from 1
                    for box in boxes
                ]
                rows = [boxes, on_val_frames(detector, config, truth, ids), on_photos(detector, truth, ids)]
                coco = [coco_metrics(truth.annotations, r, ids.values(), sizes=False).stats for r in rows]
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


def on_photos(detector: Detector, truth: Dataset, ids: dict[int, int]) -> list[Result]:
    found = []
    for image, file in truth.files.items():
        found += coco_results(image, detector.detect([read_photo(file)], 0.001, 0.7, multi_label=True)[0], ids)
    return found


def on_val_frames(detector: Detector, config: Path, truth: Dataset, ids: dict[int, int]) -> list[Result]:
    """detguard's network, NMS and scoring, on the frames that Ultralytics' validation makes."""
    from ultralytics.cfg import get_cfg

    data = check_det_dataset(str(config))
    settings = get_cfg(overrides={"imgsz": detector.imgsz, "rect": True, "task": "detect"})
    dataset = build_yolo_dataset(settings, data["val"], 16, data, mode="val", rect=True, stride=32)
    images = {file.name: image for image, file in truth.files.items()}
    found = []
    for batch in build_dataloader(dataset, 16, 0, shuffle=False):
        with torch.no_grad():
            candidates = detector.candidates(batch["img"].float() / 255)
        for i, detections in enumerate(suppress(candidates, 0.001, 0.7, multi_label=True)):
            boxes = scale_boxes(
                batch["img"].shape[2:], detections.boxes, batch["ori_shape"][i], ratio_pad=batch["ratio_pad"][i]
            )
            placed = Detections(boxes, detections.scores, detections.classes)
            found += coco_results(images[Path(batch["im_file"][i]).name], placed, ids)
    return found


def ultralytics_ap(truth: Dataset, ids: dict[int, int], results: list[Result]) -> float:
    """AP by Ultralytics' own formula: its matching and its integral of the precision."""
    judge = BaseValidator.__new__(BaseValidator)
    judge.iouv = torch.linspace(0.5, 0.95, 10)
    index = {category: k for k, category in ids.items()}
    stats = []
    for image in truth.files:
        objects = truth.objects(image, ids)
        found = sorted((r for r in results if r["image_id"] == image), key=lambda r: -r["score"])
        boxes = torch.tensor([r["bbox"] for r in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        classes = torch.tensor([index[r["category_id"]] for r in found], dtype=torch.int64)
        true = np.zeros((len(found), 10), bool)
        if len(found) and len(objects):
            true = judge.match_predictions(classes, objects.classes, box_iou(objects.boxes, boxes)).numpy()
        stats.append((true, np.array([r["score"] for r in found]), classes.numpy(), objects.classes.numpy()))
    return float(ap_per_class(*(np.concatenate(s) for s in zip(*stats, strict=True)))[5].mean())


if __name__ == "__main__":
    typer.run(main)
