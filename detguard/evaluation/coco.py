"""COCO metrics by hotcoco, whose numbers are those of pycocotools; for a whole data set and for single photos."""

import contextlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypedDict, cast

import hotcoco
import numpy as np
import torch
from hotcoco import COCOeval
from pycocotools.coco import COCO
from torch import Tensor

from detguard.data.dataset import indexed
from detguard.data.entries import annotation
from detguard.detections import Detections, box_area, box_iou, intersections
from detguard.evaluation.bootstrap import drawn_classes, draws, error_95, mean_ap
from detguard.evaluation.metrics import STATS, OfClass, Stats

# From which overlap on a detection is one of an object, on single photos.
MATCH_IOU = 0.5


class Result(TypedDict):
    """A detection in COCO's results format; bbox: x, y, width, height in pixels of the photo."""

    image_id: int
    category_id: int
    bbox: list[float]
    score: float


@dataclass(frozen=True)
class CocoMetrics:
    """What COCO's evaluation says, None where there is nothing to measure.

    stats: all of STATS, or its first two alone; per_class: by class name; precision: mean over the classes at IoU .50,
    at recalls 0, .01, ... 1; drawn: AP of photos drawn anew, as `draws` of them; drawn_classes: that of each class.
    """

    stats: Stats
    per_class: dict[str, OfClass]
    precision: list[float]
    drawn: np.ndarray | None = None
    drawn_classes: dict[str, np.ndarray] = field(default_factory=dict)


def coco_results(image_id: int, detections: Detections, category_ids: Mapping[int, int]) -> list[Result]:
    """Detections of one photo in COCO's results format, rounded as usual; classes without a category are left out."""
    rounded = (part.tolist() for part in _rounded(detections))
    return [
        {"image_id": image_id, "category_id": category_ids[index], "bbox": box, "score": score}
        for box, score, index in zip(*rounded, detections.classes.tolist(), strict=True)
        if index in category_ids
    ]


def _rounded(detections: Detections) -> tuple[np.ndarray, np.ndarray]:
    """Boxes, [N, 4] x, y, width, height, and scores, [N], to the digits of COCO's results format."""
    corners, scores = detections.boxes.numpy().astype(float), detections.scores.numpy().astype(float)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    return np.round(boxes * 100) / 100, np.round(scores * 1e5) / 1e5


def coco_metrics(
    annotations: COCO,
    found: Iterable[tuple[int, Detections]],
    category_ids: Mapping[int, int],
    images: Sequence[int] | None = None,
    *,
    sizes: bool = True,
    drawn: bool = False,
) -> CocoMetrics:
    """The 12 COCO numbers at maxDets 1, 10, 100 over all categories, and AP and AP50 of each that has objects.

    found: by image id; category_ids: class index -> category; images: only these; without `sizes` the small, medium
    and large objects are not told apart: AP and AP50 only; `drawn`: AP of photos drawn anew, too, and AP_error among
    the numbers, half of the 95 % interval about AP; of a class, by the photos that have an object of it.
    """
    categories = sorted(category_ids.values())
    images = sorted(annotations.imgs if images is None else images)
    judge = _judge(annotations, found, category_ids, images, sizes=sizes)
    judge.accumulate()
    if sizes:
        with contextlib.redirect_stdout(io.StringIO()):
            judge.summarize()
    assert judge.eval is not None
    # [IoU thresholds, recalls, categories, areas, maxDets]; -1 where a category has no objects.
    precision = judge.eval["precision"][:, :, :, 0, -1]
    stats = list(map(float, judge.stats)) if sizes else [_mean(precision), _mean(precision[0])]
    wanted = set(images)
    labelled = (a for a in annotations.anns.values() if not a["iscrowd"] and a["image_id"] in wanted)
    objects = Counter(a["category_id"] for a in labelled)
    per_class: dict[str, OfClass] = {
        annotations.cats[category]["name"]: {
            "AP": _mean(precision[:, :, i]),
            "AP50": _mean(precision[0, :, i]),
            "objects": objects[category],
        }
        for i, category in enumerate(categories)
        if (precision[:, :, i] > -1).any()
    }
    curve = precision[0][:, (precision[0] > -1).all(0)]
    known = (None if value is None or value < 0 else value for value in stats)
    named = cast(Stats, dict(zip(STATS, known, strict=False)))
    metrics = CocoMetrics(named, per_class, curve.mean(1).tolist() if curve.size else [])
    names = [annotations.cats[category]["name"] for category in categories]
    return _with_errors(metrics, judge, names) if drawn else metrics


def _with_errors(metrics: CocoMetrics, judge: COCOeval, names: Sequence[str]) -> CocoMetrics:
    """With what figures are of photos drawn anew, and their errors. names: of the classes, as the judge counts them."""
    photos = len(judge.params.img_ids)
    places = drawn_classes(judge, draws(photos))
    aps, classes = mean_ap(places.values()), {names[place]: one for place, one in places.items()}
    per_class: dict[str, OfClass] = {
        name: {**row, "AP_error": classes[name].error} for name, row in metrics.per_class.items()
    }
    stats: Stats = {**metrics.stats, "AP_error": error_95(aps, photos)}
    drawn = {name: one.ap for name, one in classes.items()}
    return replace(metrics, stats=stats, per_class=per_class, drawn=aps, drawn_classes=drawn)


def _judge(
    annotations: COCO,
    found: Iterable[tuple[int, Detections]],
    category_ids: Mapping[int, int],
    images: list[int],
    *,
    sizes: bool,
) -> COCOeval:
    """hotcoco, which has matched what is found; categories and images are numbered by their places in order."""
    category_at = {category: place for place, category in enumerate(sorted(category_ids.values()))}
    image_at = {image: place for place, image in enumerate(images)}
    labelled = [
        {**entry, "image_id": image_at[entry["image_id"]], "category_id": category_at[entry["category_id"]]}
        for entry in annotations.dataset["annotations"]
        if entry["image_id"] in image_at and entry["category_id"] in category_at
    ]
    truth = hotcoco.COCO(
        {
            "images": [{"id": place} for place in image_at.values()],
            "annotations": labelled,
            "categories": [{"id": place, "name": str(place)} for place in category_at.values()],
        }
    )
    class_at = {index: category_at[category] for index, category in category_ids.items()}
    rows = [_rows(image_at[image], one, class_at) for image, one in found if image in image_at]
    judge = COCOeval(truth, truth.load_res(np.concatenate([np.zeros((0, 7)), *rows])), "bbox")
    judge.params.cat_ids, judge.params.img_ids = list(category_at.values()), list(image_at.values())
    if not sizes:
        judge.params.area_rng, judge.params.area_rng_lbl = judge.params.area_rng[:1], ["all"]
    judge.evaluate()
    return judge


def _rows(image: int, detections: Detections, class_at: Mapping[int, int]) -> np.ndarray:
    """Detections of one photo as hotcoco takes them, float [N, 7]; Python objects take ten times as long."""
    boxes, scores = _rounded(detections)
    classes = np.array([class_at.get(index, -1) for index in detections.classes.tolist()])
    return np.column_stack([np.full(len(boxes), image), boxes, scores, classes])[classes >= 0]


def metrics_of_photos(
    objects: Sequence[Detections], found: Sequence[Detections], *, sizes: bool = False, drawn: bool = False
) -> CocoMetrics:
    """COCO's AP and AP50 of some photos, by the labelled objects and the detections of each; classes by index.

    `sizes`, for all 12 numbers, and `drawn`: as of `coco_metrics`; areas are those of boxes.
    """
    known = (coco_results(image, o, {int(c): int(c) for c in o.classes}) for image, o in enumerate(objects))
    labelled = [
        annotation(number, r["image_id"], r["category_id"], r["bbox"], r["bbox"][2] * r["bbox"][3])
        for number, r in enumerate(chain.from_iterable(known))
    ]
    categories = sorted({entry["category_id"] for entry in labelled})
    images = [{"id": image} for image in range(len(objects))]
    names = [{"id": category, "name": str(category)} for category in categories]
    annotations = indexed({"images": images, "annotations": labelled, "categories": names})
    same = {category: category for category in categories}
    return coco_metrics(annotations, enumerate(found), same, sizes=sizes, drawn=drawn)


def _mean(values: np.ndarray) -> float | None:
    values = values[values > -1]
    return float(values.mean()) if values.size else None


def matched(objects: Detections, found: Detections) -> Tensor:
    """Which object each of `found`, best first, is a true positive of: each is matched once, by class and IoU .50.

    int64 [N]; -1: of none.
    """
    overlap = box_iou(found.boxes, objects.boxes) * (found.classes[:, None] == objects.classes[None])
    taken = torch.zeros(len(objects), dtype=torch.bool)
    of = torch.full((len(found),), -1)
    for i in (overlap >= MATCH_IOU).any(1).nonzero()[:, 0].tolist():
        free = overlap[i].masked_fill(taken, 0)
        if free.max() >= MATCH_IOU:
            of[i] = free.argmax()
            taken[of[i]] = True
    return of


def matches(objects: Detections, found: Detections) -> Tensor:
    """Which of `found`, best first, are true positives, as `matched`; bool [N]."""
    return matched(objects, found) >= 0


def outside(crowds: Detections, objects: Detections, found: Detections) -> Detections:
    """Those of `found`, best first, that COCO counts: not those of no object that lie by half or more in a crowd."""
    inside = intersections(found.boxes, crowds.boxes) >= MATCH_IOU * box_area(found.boxes)[:, None]
    ignored = (inside & (found.classes[:, None] == crowds.classes[None])).any(1) & ~matches(objects, found)
    return found[~ignored]


def value_left(objects: Detections, found: Detections) -> tuple[float, float]:
    """What the detections of one photo are worth: of each object found, confidence x precision down to it, summed.

    AP belongs to a data set; this tells which of two sets of detections of one photo takes more from it: the lesser.
    The second number decides where the first is equal: less the summed confidence of false positives.
    """
    true = matches(objects, found)
    same = found.classes[:, None] == found.classes[None]
    ahead = torch.ones(len(found), len(found)).tril() * same
    precision = (ahead @ true.float()) / ahead.sum(1)
    return float((found.scores * precision)[true].sum()), -float(found.scores[~true].sum())


def f1(objects: Detections, found: Detections) -> float:
    """F1 of the detections of one photo at IoU .50; 1 where there is nothing to find and nothing is found."""
    if not len(objects) and not len(found):
        return 1.0
    return 2 * int(matches(objects, found).sum()) / (len(objects) + len(found))
