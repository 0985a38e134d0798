"""From what a view shows to COCO metrics."""

import torch

from detguard.evaluation.coco import Metrics, Result, coco_metrics, coco_results
from detguard.evaluation.views import Subject, View, results_of


def results(subject: Subject, view: View, part: str = "") -> list[Result]:
    """COCO results of all photos of the subject, as they are scored and written."""
    return [
        r for image, found in results_of(subject, view, part) for r in coco_results(image, found, subject.category_ids)
    ]


def metrics_of(subject: Subject, found: list[Result], sizes: bool = False) -> Metrics:
    """COCO metrics of results of the subject's photos, to which pycocotools adds fields; see `coco_metrics`."""
    images = list(subject.dataset.files)
    return coco_metrics(subject.dataset.annotations, found, subject.category_ids.values(), images, sizes)


def score(subject: Subject, view: View, part: str = "", sizes: bool = False) -> Metrics:
    """COCO metrics of one part of a view."""
    return metrics_of(subject, results(subject, view, part), sizes)


def expert_shares(subject: Subject, view: View, part: str = "") -> list[float]:
    """The mean weight that the gate of an ensemble gave each expert over the photos of a view."""
    weights = [found.experts for _, found in results_of(subject, view, part) if found.experts is not None]
    return [round(float(w), 4) for w in torch.stack(weights).mean(0)] if weights else []
