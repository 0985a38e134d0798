"""How far AP would be another on other photos of the same kind: it is taken again of photos drawn anew from those."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from hotcoco import COCOeval

# Times that photos are drawn: their standard deviation is then known to 7 %. The same draws for all of a data set, so
# that two figures of it can be compared draw by draw.
RESAMPLES = 100
# Of a normal distribution, 95 % lie within so many standard deviations.
SIGMAS_95 = 1.96
# Photos under which the draws tell too little of what other photos would be like.
FEWEST = 10
RECALLS = np.linspace(0, 1, 101)


def draws(photos: int) -> np.ndarray:
    """How often each of so many photos is drawn, [RESAMPLES, photos]."""
    return np.random.default_rng(0).multinomial(photos, np.full(photos, 1 / photos), RESAMPLES).astype(np.float32)


def drawn_ap(judge: COCOeval, counts: np.ndarray) -> np.ndarray:
    """AP (.50:.95) of each draw of photos, [draws]; not a number where none has an object.

    Its matches are COCO's, of all areas; each photo's count as often as it was drawn (Efron 1979), and classes without
    an object in a draw are left out of its mean. judge: evaluated, of photos called 0, 1, ...; counts: [draws, photos].
    """
    of_class: dict[int, list[dict[str, Any]]] = defaultdict(list)
    all_areas = list(judge.params.area_rng[0])
    for one in judge.eval_imgs:
        if one is not None and one["aRng"] == all_areas:
            of_class[one["category_id"]].append(one)
    found = [_class_ap(photos, counts) for photos in of_class.values()]
    if not found:
        return np.full(len(counts), np.nan)
    table = np.stack(found)
    there = ~np.isnan(table)
    with np.errstate(invalid="ignore"):
        return np.where(there, table, 0).sum(0) / there.sum(0)


def _class_ap(photos: Sequence[dict[str, Any]], counts: np.ndarray) -> np.ndarray:
    """AP of one class in each draw; not a number where it has no object."""
    place = np.array([one["image_id"] for one in photos])
    objects = counts[:, place] @ np.array([sum(one["gtInDenominator"]) for one in photos], np.float32)
    scores = [np.array(one["dtScores"], float) for one in photos]
    order = np.argsort(-np.concatenate(scores), kind="stable")
    times = counts[:, np.repeat(place, [len(one) for one in scores])[order]]
    matched, ignored = (
        np.concatenate([np.array(one[key], bool).reshape(len(one[key]), -1) for one in photos], 1)[:, order]
        for key in ("dtMatched", "dtIgnore")
    )
    aps = []
    for true, left_out in zip(matched & ~ignored, ignored, strict=True):  # at each IoU
        hits = true.nonzero()[0]  # precision is highest at a true positive
        ahead = np.cumsum(times * ~left_out, 1)[:, hits]
        right = np.cumsum(times[:, hits], 1)
        precision = np.maximum.accumulate((right / np.maximum(ahead, 1))[:, ::-1], 1)[:, ::-1]
        with np.errstate(invalid="ignore"):
            reached = np.searchsorted(RECALLS, right.astype(float) / objects[:, None], "right")
        aps.append((precision * np.diff(reached, axis=1, prepend=0)).sum(1) / len(RECALLS))
    return np.where(objects > 0, np.mean(aps, 0), np.nan)


def error_95(values: Iterable[float], photos: int) -> float | None:
    """Half of the 95 % interval about a figure, from what it is in each draw; None of too few photos.

    Not between percentiles of the draws: AP is larger in those than of the photos, by objects that are there twice.
    """
    known = np.array(list(values), float)
    known = known[~np.isnan(known)]
    return round(float(SIGMAS_95 * known.std(ddof=1)), 5) if photos >= FEWEST and len(known) > 1 else None
