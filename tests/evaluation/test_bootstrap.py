import tracemalloc

import numpy as np
import pytest
import torch

from detguard.data.dataset import indexed
from detguard.detections import Detections
from detguard.evaluation.bootstrap import FEWEST, _aps, draws, error_95
from detguard.evaluation.coco import coco_metrics

PHOTOS = 40
IDS = {n: n for n in (1, 2, 3)}


def boxes(rng, photos, crowds=False):
    """Rows of image, category and box; of three classes, several per photo."""
    rows = [
        {"image_id": image, "category_id": int(rng.integers(1, 4)), "bbox": [*rng.integers(0, 90, 2).tolist(), 20, 30]}
        for image in photos
        for _ in range(rng.integers(1, 5))
    ]
    return [
        row | {"id": n, "area": 600, "iscrowd": int(crowds and rng.random() < 0.1)} for n, row in enumerate(rows, 1)
    ]


def of(photos, labelled):
    categories = [{"id": n, "name": f"class {n}"} for n in (1, 2, 3)]
    images = [{"id": image, "width": 120, "height": 120} for image in photos]
    return indexed({"images": images, "annotations": labelled, "categories": categories})


def found(results):
    """Detections by photo of rows of image, category, box and score."""
    images = sorted({row["image_id"] for row in results})
    return [(image, detections([row for row in results if row["image_id"] == image])) for image in images]


def detections(rows):
    boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    return Detections(
        boxes, torch.tensor([row["score"] for row in rows]), torch.tensor([row["category_id"] for row in rows])
    )


@pytest.fixture
def labelled():
    return boxes(np.random.default_rng(1), range(PHOTOS), crowds=True)


@pytest.fixture
def results(labelled):
    rng = np.random.default_rng(2)
    moved = [row | {"bbox": (np.array(row["bbox"]) + rng.normal(0, 3, 4)).round(2).tolist()} for row in labelled * 2]
    return [
        {k: v for k, v in r.items() if k not in ("id", "area", "iscrowd")} | {"score": round(rng.random(), 5)}
        for r in moved
    ]


def test_each_draw_is_the_ap_of_its_photos(labelled, results):
    """The same as COCO's evaluation of a data set in which each photo is as often as it was drawn."""
    drawn = coco_metrics(of(range(PHOTOS), labelled), found(results), IDS, drawn=True).drawn
    for row, ap in list(zip(draws(PHOTOS), drawn, strict=True))[:3]:
        copies = [image for image, count in enumerate(row.astype(int)) for _ in range(count)]
        again, shown = (
            [
                entry | {"image_id": copy}
                for copy, image in enumerate(copies)
                for entry in entries
                if entry["image_id"] == image
            ]
            for entries in (labelled, results)
        )
        again = [entry | {"id": number} for number, entry in enumerate(again, 1)]
        metrics = coco_metrics(of(range(PHOTOS), again), found(shown), IDS)
        assert metrics.stats["AP"] == pytest.approx(ap, abs=1e-3)


def test_a_class_has_an_error_by_the_photos_with_an_object_of_it(labelled, results):
    few = {row["image_id"] for row in labelled if row["category_id"] == 3 and not row["iscrowd"]}
    kept = [r for r in labelled if r["category_id"] != 3 or r["image_id"] in sorted(few)[: FEWEST - 1]]
    rows = coco_metrics(of(range(PHOTOS), kept), found(results), IDS, drawn=True).per_class
    assert 0 < rows["class 1"]["AP_error"] < 0.3
    assert rows["class 3"]["AP_error"] is None


def test_a_class_that_a_draw_has_no_object_of_is_left_out_of_its_mean():
    labelled = [
        {"id": 1 + n, "image_id": n, "category_id": 1 + (n == 0), "bbox": [5, 5, 9, 9], "area": 81, "iscrowd": 0}
        for n in range(12)
    ]
    results = [{"image_id": n, "category_id": 1, "bbox": [5, 5, 9, 9], "score": 0.5} for n in range(12)]
    drawn = coco_metrics(of(range(12), labelled), found(results), IDS, drawn=True).drawn
    there = draws(12)[:, 0] > 0
    assert 0 < there.sum() < len(there)
    assert drawn[~there] == pytest.approx(1)
    assert (drawn[there] < 0.6).all()


def test_what_is_matched_at_one_iou_does_not_depend_on_the_one_before():
    rng = np.random.default_rng(0)
    times, objects = rng.integers(0, 3, (20, 50)).astype(np.float32), np.full(20, 90, np.float32)
    matched, ignored = rng.random((2, 50)) < 0.3, rng.random((2, 50)) < 0.5
    matched, ignored = matched[[0, 0, 0, 1, 1]], ignored[[0, 0, 1, 1, 0]]
    alone = [_aps(times, objects, *rows) for rows in zip(matched[:, None], ignored[:, None], strict=True)]
    assert (_aps(times, objects, matched, ignored) == np.mean(alone, 0)).all()
    assert len({tuple(one) for one in alone}) == 4


def test_the_error_is_that_of_normal_values_and_none_of_few_photos():
    values = np.random.default_rng(0).normal(0.4, 0.01, 100)
    assert error_95(values, FEWEST) == pytest.approx(0.0196, abs=0.003)
    assert error_95(values, FEWEST - 1) is None
    assert error_95([float("nan")] * 3, 50) is None


def test_memory_for_the_matches_of_many_photos_is_that_of_a_few_numbers_each():
    rng, photos, most = np.random.default_rng(0), range(200), 100
    labelled = boxes(rng, photos)

    def shown():
        for image in photos:
            corners = torch.from_numpy(rng.integers(1, 90, (most, 2))).float()
            scores = torch.from_numpy(rng.random(most)).float()
            classes = torch.from_numpy(rng.integers(1, 4, most))
            yield image, Detections(torch.cat([corners, corners + torch.tensor([20, 30])], 1), scores, classes)

    annotations = of(photos, labelled)
    tracemalloc.start()
    coco_metrics(annotations, shown(), IDS, sizes=True, drawn=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / (len(photos) * most) < 500
