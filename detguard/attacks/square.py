"""The Square attack (Andriushchenko et al. 2020): random search within an L-inf budget, by scores alone."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from detguard.attacks.budgets import Linf
from detguard.detections import Candidates, Detections
from detguard.detectors.base import Detector
from detguard.objectives.base import Objective
from detguard.photos import Photo, frames_tensor

CONF = 0.25


def square_attack(
    detector: Detector,
    photos: Sequence[Photo],
    objects: Sequence[Detections],
    objective: Objective,
    budget: Linf,
    queries: int,
    seeds: Sequence[int],
) -> list[Photo]:
    """The photos of lowest loss that `queries` forwards find; photos of one frame shape, with their objects.

    seeds: one per photo, so that its result does not depend on its neighbours.
    """
    boxes = [detector.letterbox((photo.shape[0], photo.shape[1])) for photo in photos]
    random = [np.random.default_rng(seed) for seed in seeds]
    placed = [Detections(b.boxes_to_frame(o.boxes), o.scores, o.classes) for b, o in zip(boxes, objects, strict=True)]

    def query(shown: Sequence[Photo]) -> Candidates:
        with torch.no_grad():
            return detector.candidates(
                frames_tensor([b(p) for b, p in zip(boxes, shown, strict=True)], detector.device)
            )

    clean = query(photos)
    aims = [objective.aim(clean[i : i + 1], o, objective.attacked(o)) for i, o in enumerate(placed)]
    best, lowest = list(photos), objective.loss(clean, aims, CONF)
    for number in range(queries):
        if number == 0:
            proposed = [_stripes(photo, budget, rng) for photo, rng in zip(photos, random, strict=True)]
        else:
            side = math.sqrt(_share(number, queries))
            proposed = [
                _square(now, photo, budget, side, rng) for now, photo, rng in zip(best, photos, random, strict=True)
            ]
        losses = objective.loss(query(proposed), aims, CONF)
        for i in (losses < lowest).nonzero()[:, 0].tolist():
            best[i] = proposed[i]
        lowest = lowest.minimum(losses)
    return best


def _share(number: int, queries: int) -> float:
    """Share of the photo that a square covers: .3 at first, halved as the search goes on (their section 3.2)."""
    halvings = sum(number * 10_000 > bound * queries for bound in (10, 50, 200, 1000, 2000, 4000, 6000, 8000))
    return 0.3 / 2**halvings


def _corners(budget: Linf, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Changes at corners of the budget, whole levels."""
    return int(budget.eps) * rng.choice([-1, 1], shape)


def _bounded(change: np.ndarray, photo: Photo) -> Photo:
    return np.clip(photo.astype(np.int16) + change, 0, 255).astype(np.uint8)


def _stripes(photo: Photo, budget: Linf, rng: np.random.Generator) -> Photo:
    """The start: vertical stripes at the corners of the budget, each as wide as a 320th of the photo."""
    wide = max(1, photo.shape[1] // 320)
    signs = _corners(budget, rng, (1, photo.shape[1] // wide + 1, 3)).repeat(wide, 1)[:, : photo.shape[1]]
    return _bounded(signs, photo)


def _square(now: Photo, photo: Photo, budget: Linf, side: float, rng: np.random.Generator) -> Photo:
    """`now` with one square of the photo moved to a corner of the budget."""
    height, width = photo.shape[:2]
    size = max(1, round(side * min(height, width)))
    top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
    window = np.s_[top : top + size, left : left + size]
    proposed = now.copy()
    proposed[window] = _bounded(_corners(budget, rng, (3,)), photo[window])
    return proposed
