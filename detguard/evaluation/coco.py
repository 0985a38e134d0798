"""COCO metrics by hotcoco, whose numbers are those of pycocotools; for a whole data set and for single photos."""

import contextlib
import io
from collections.abc import Iterable, Sequence
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
from detguard.data.entries import Annotation, annotation
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


def coco_results(image_id: int, detections: Detections, category_ids: dict[int, int]) -> list[Result]:
    """Detections of one photo in COCO's results format, rounded as usual; classes without a category are left out."""
    corners, scores = detections.boxes.numpy().astype(float), detections.scores.numpy().astype(float)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    rounded = (np.round(boxes * 100) / 100).tolist(), (np.round(scores * 1e5) / 1e5).tolist()
    return [
        {"image_id": image_id, "category_id": category_ids[index], "bbox": box, "score": score}
        for box, score, index in zip(*rounded, detections.classes.tolist(), strict=True)
        if index in category_ids
    ]


def coco_metrics(
    annotations: COCO,
    results: Iterable[Result],
    categories: Iterable[int],
    images: Sequence[int] | None = None,
    *,
    sizes: bool = True,
    drawn: bool = False,
) -> CocoMetrics:
    """The 12 COCO numbers at maxDets 1, 10, 100 over `categories`, and AP and AP50 of each that has objects.

    images: only these; without `sizes` the small, medium and large objects are not told apart: AP and AP50 only;
    `drawn`: AP of photos drawn anew, too, and AP_error among the numbers, half of the 95 % interval about AP; of a
    class, by the photos that have an object of it.
    """
    categories = sorted(categories)
    images = sorted(annotations.imgs if images is None else images)
    judge = _judge(annotations, results, categories, images, sizes=sizes)
    judge.accumulate()
    if sizes:
        with contextlib.redirect_stdout(io.StringIO()):
            judge.summarize()
    assert judge.eval is not None
    # [IoU thresholds, recalls, categories, areas, maxDets]; -1 where a category has no objects.
    precision = judge.eval["precision"][:, :, :, 0, -1]
    stats = list(map(float, judge.stats)) if sizes else [_mean(precision), _mean(precision[0])]
    wanted = set(images)
    per_class: dict[str, OfClass] = {
        annotations.cats[category]["name"]: {
            "AP": _mean(precision[:, :, i]),
            "AP50": _mean(precision[0, :, i]),
            "objects": sum(
                not a["iscrowd"] and a["image_id"] in wanted
                for a in map(annotations.anns.__getitem__, annotations.getAnnIds(catIds=[category]))
            ),
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
    annotations: COCO, results: Iterable[Result], categories: list[int], images: list[int], *, sizes: bool
) -> COCOeval:
    """hotcoco, which has matched the results; categories and images are numbered by their places in the lists."""
    category_at, image_at = ({one: place for place, one in enumerate(ids)} for ids in (categories, images))

    def known(entry: Annotation | Result) -> bool:
        return entry["image_id"] in image_at and entry["category_id"] in category_at

    labelled = [
        {**entry, "image_id": image_at[entry["image_id"]], "category_id": category_at[entry["category_id"]]}
        for entry in annotations.dataset["annotations"]
        if known(entry)
    ]
    truth = hotcoco.COCO(
        {
            "images": [{"id": place} for place in image_at.values()],
            "annotations": labelled,
            "categories": [{"id": place, "name": str(place)} for place in category_at.values()],
        }
    )
    rows = (
        (image_at[r["image_id"]], *r["bbox"], r["score"], category_at[r["category_id"]]) for r in results if known(r)
    )
    judge = COCOeval(truth, truth.load_res(np.fromiter(rows, np.dtype((float, 7)))), "bbox")
    judge.params.cat_ids, judge.params.img_ids = list(category_at.values()), list(image_at.values())
    if not sizes:
        judge.params.area_rng, judge.params.area_rng_lbl = judge.params.area_rng[:1], ["all"]
    judge.evaluate()
    return judge


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
    results = [r for image, d in enumerate(found) for r in coco_results(image, d, same)]
    return coco_metrics(annotations, results, categories, sizes=sizes, drawn=drawn)


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
