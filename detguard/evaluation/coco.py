"""COCO metrics by pycocotools."""

import contextlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detguard.detections import Detections


def coco_results(image_id: int, detections: Detections, category_ids: dict[int, int]) -> list[dict[str, Any]]:
    """Detections of one photo in COCO's results format; classes without a category are left out."""
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[index],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for (x1, y1, x2, y2), score, index in zip(
            detections.boxes.tolist(), detections.scores.tolist(), detections.classes.tolist(), strict=True
        )
        if index in category_ids
    ]


def category_ids(annotations: COCO, class_names: dict[int, str]) -> dict[int, int]:
    """A detector's class index -> the data set's category id, by name."""
    known = {category["name"]: int(category["id"]) for category in annotations.cats.values()}
    return {index: known[name] for index, name in class_names.items() if name in known}


def coco_metrics(
    annotations: COCO, results: list[dict[str, Any]], categories: Iterable[int]
) -> dict[str, dict[str, float]]:
    """AP (.50:.95) and AP50 at maxDets 100, over `categories` ("all") and for each of them that has objects."""
    categories = sorted(categories)
    with contextlib.redirect_stdout(io.StringIO()):
        found = annotations.loadRes(results) if results else COCO()
        judge = COCOeval(annotations, found, "bbox")
        judge.params.catIds = categories
        judge.evaluate()
        judge.accumulate()
    # [IoU thresholds, recalls, categories, areas, maxDets]; -1 where a category has no objects.
    precision = judge.eval["precision"][:, :, :, 0, -1]

    def average(values: np.ndarray) -> float:
        values = values[values > -1]
        return round(float(values.mean()), 4) if values.size else float("nan")

    names = {category: annotations.cats[category]["name"] for category in categories}
    table = {"all": {"AP": average(precision), "AP50": average(precision[0])}}
    for i, category in enumerate(categories):
        if (precision[:, :, i] > -1).any():
            table[names[category]] = {"AP": average(precision[:, :, i]), "AP50": average(precision[0, :, i])}
    return table


def read_annotations(file: Path) -> COCO:
    """A COCO instances json, without pycocotools' chatter."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(file))
