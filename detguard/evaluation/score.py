"""From what a view shows to COCO metrics."""

from collections.abc import Iterable

import torch

from detguard.detections import Detections
from detguard.evaluation.coco import CocoMetrics, coco_metrics
from detguard.evaluation.views import Subject, View, results_of


def metrics_of(
    subject: Subject, found: Iterable[tuple[int, Detections]], *, sizes: bool = False, drawn: bool = False
) -> CocoMetrics:
    """COCO metrics of what was found in the subject's photos, by image id; see `coco_metrics`."""
    images = list(subject.dataset.files)
    return coco_metrics(subject.dataset.annotations, found, subject.category_ids, images, sizes=sizes, drawn=drawn)


def score(subject: Subject, view: View, part: str = "", *, sizes: bool = False) -> CocoMetrics:
    """COCO metrics of one part of a view."""
    return metrics_of(subject, results_of(subject, view, part), sizes=sizes)


def expert_shares(found: Iterable[tuple[int, Detections]]) -> list[float]:
    """The mean weight that the gate of an ensemble gave each expert over photos."""
    weights = [detections.experts for _, detections in found if detections.experts is not None]
    return [round(float(w), 4) for w in torch.stack(weights).mean(0)] if weights else []
