"""How far AP would be another on other photos of the same kind: it is taken again of photos drawn anew from those."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypedDict, cast

import numpy as np
from hotcoco import COCOeval

# Times that photos are drawn: their standard deviation is then known to 7 %. The same draws for all of a data set, so
# that two figures of it can be compared draw by draw.
RESAMPLES = 100
# Of these as many at once as make a table of so many numbers, as each is a row as long as all detections of a class.
MOST_NUMBERS = 100_000
# Of a normal distribution, 95 % lie within so many standard deviations.
SIGMAS_95 = 1.96
# Photos under which the draws tell too little of what other photos would be like.
FEWEST = 10
RECALLS = np.linspace(0, 1, 101)


def draws(photos: int) -> np.ndarray:
    """How often each of so many photos is drawn, [RESAMPLES, photos]."""
    return np.random.default_rng(0).multinomial(photos, np.full(photos, 1 / photos), RESAMPLES).astype(np.float32)


class Matches(TypedDict):
    """hotcoco's matches of one class on one photo at each IoU, [IoUs, detections]; the objects' are [objects]."""

    image_id: int
    dtScores: list[float]
    dtMatched: list[list[bool]]
    dtIgnore: list[list[bool]]
    gtInDenominator: list[bool]


@dataclass(frozen=True)
class Drawn:
    """AP (.50:.95) of one class in each draw, [draws], not a number where it has no object; photos: that have one."""

    ap: np.ndarray
    photos: int

    @property
    def error(self) -> float | None:
        """Half of the 95 % interval about its AP; None of too few photos with an object of it."""
        return error_95(self.ap, self.photos)


def drawn_classes(judge: COCOeval, counts: np.ndarray) -> dict[int, Drawn]:
    """AP of each class in each draw of photos, by category.

    Its matches are COCO's, of all areas; each photo's count as often as it was drawn (Efron 1979). judge: of photos
    called 0, 1, ..., which afterwards has its last class alone; counts: [draws, photos].
    """
    classes: dict[int, Drawn] = {}
    judge.params.area_rng, judge.params.area_rng_lbl = judge.params.area_rng[:1], ["all"]
    # One after the other: all matches as Python objects are a megabyte per photo.
    for category in judge.params.cat_ids:
        judge.params.cat_ids = [category]
        judge.evaluate()
        if photos := [cast(Matches, one) for one in judge.eval_imgs if one is not None]:
            classes[category] = _drawn_class(photos, counts)
    return classes


def mean_ap(classes: Iterable[Drawn]) -> np.ndarray:
    """AP over the classes in each draw, those without an object in it left out; not a number where none has one."""
    found = [one.ap for one in classes]
    if not found:
        return np.full(RESAMPLES, np.nan)
    table = np.stack(found)
    there = ~np.isnan(table)
    with np.errstate(invalid="ignore"):
        return np.where(there, table, 0).sum(0) / there.sum(0)


def _drawn_class(photos: Sequence[Matches], counts: np.ndarray) -> Drawn:
    place = np.array([one["image_id"] for one in photos])
    labelled = np.array([sum(one["gtInDenominator"]) for one in photos], np.float32)
    if not labelled.any():
        return Drawn(np.full(len(counts), np.nan), 0)
    scores = [one["dtScores"] for one in photos]
    order = np.argsort(-np.fromiter(chain.from_iterable(scores), float), kind="stable")
    of_photo = np.repeat(place, list(map(len, scores)))[order]
    matched, ignored = (
        np.stack([np.fromiter(chain.from_iterable(rows), bool) for rows in zip(*of_photos, strict=True)])[:, order]
        for of_photos in ([one["dtMatched"] for one in photos], [one["dtIgnore"] for one in photos])
    )
    aps = [
        _aps(part[:, of_photo], part[:, place] @ labelled, matched & ~ignored, ignored)
        for part in np.array_split(counts, min(len(counts), 1 + len(counts) * len(order) // MOST_NUMBERS))
    ]
    return Drawn(np.concatenate(aps), int((labelled > 0).sum()))


def _aps(times: np.ndarray, objects: np.ndarray, matched: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """AP in some draws, in which each detection is there so many `times`, [draws, detections], best first."""
    aps: list[np.ndarray] = []
    left = before = None
    for true, left_out in zip(matched, ignored, strict=True):  # at each IoU
        # Most of them are as the one before.
        if left is None or not np.array_equal(left_out, left):
            counted, left, before = np.cumsum(times * ~left_out, 1), left_out, None
        if before is not None and np.array_equal(true, before):
            aps.append(aps[-1])
            continue
        before = true
        hits = true.nonzero()[0]  # precision is highest at a true positive
        ahead = counted[:, hits]
        right = np.cumsum(times[:, hits], 1)
        precision = np.maximum.accumulate((right / np.maximum(ahead, 1))[:, ::-1], 1)[:, ::-1]
        with np.errstate(invalid="ignore"):
            reached = np.searchsorted(RECALLS, right.astype(float) / objects[:, None], "right")
        reached[:, 1:] -= reached[:, :-1].copy()
        aps.append((precision * reached).sum(1) / len(RECALLS))
    return np.where(objects > 0, np.mean(aps, 0), np.nan)


def error_95(values: Iterable[float], photos: int) -> float | None:
    """Half of the 95 % interval about a figure, from what it is in each draw; None of too few photos.

    Not between percentiles of the draws: AP is larger in those than of the photos, by objects that are there twice.
    """
    known = np.array(list(values), float)
    known = known[~np.isnan(known)]
    return round(float(SIGMAS_95 * known.std(ddof=1)), 5) if photos >= FEWEST and len(known) > 1 else None
