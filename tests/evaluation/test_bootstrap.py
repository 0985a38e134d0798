import tracemalloc

import numpy as np
import pytest

from detguard.data.dataset import indexed
from detguard.evaluation.bootstrap import FEWEST, draws, error_95
from detguard.evaluation.coco import coco_metrics

PHOTOS = 40


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
    drawn = coco_metrics(of(range(PHOTOS), labelled), results, (1, 2, 3), drawn=True).drawn
    for row, ap in list(zip(draws(PHOTOS), drawn, strict=True))[:3]:
        copies = [image for image, count in enumerate(row.astype(int)) for _ in range(count)]
        again, found = (
            [
                entry | {"image_id": copy}
                for copy, image in enumerate(copies)
                for entry in entries
                if entry["image_id"] == image
            ]
            for entries in (labelled, results)
        )
        again = [entry | {"id": number} for number, entry in enumerate(again, 1)]
        assert coco_metrics(of(range(PHOTOS), again), found, (1, 2, 3)).stats["AP"] == pytest.approx(ap, abs=1e-3)


def test_a_class_has_an_error_by_the_photos_with_an_object_of_it(labelled, results):
    few = {row["image_id"] for row in labelled if row["category_id"] == 3 and not row["iscrowd"]}
    kept = [r for r in labelled if r["category_id"] != 3 or r["image_id"] in sorted(few)[: FEWEST - 1]]
    rows = coco_metrics(of(range(PHOTOS), kept), results, (1, 2, 3), drawn=True).per_class
    assert 0 < rows["class 1"]["AP_error"] < 0.3
    assert rows["class 3"]["AP_error"] is None


def test_a_class_that_a_draw_has_no_object_of_is_left_out_of_its_mean():
    labelled = [
        {"id": 1 + n, "image_id": n, "category_id": 1 + (n == 0), "bbox": [5, 5, 9, 9], "area": 81, "iscrowd": 0}
        for n in range(12)
    ]
    results = [{"image_id": n, "category_id": 1, "bbox": [5, 5, 9, 9], "score": 0.5} for n in range(12)]
    drawn = coco_metrics(of(range(12), labelled), results, (1, 2), drawn=True).drawn
    there = draws(12)[:, 0] > 0
    assert 0 < there.sum() < len(there)
    assert drawn[~there] == pytest.approx(1)
    assert (drawn[there] < 0.6).all()


def test_the_error_is_that_of_normal_values_and_none_of_few_photos():
    values = np.random.default_rng(0).normal(0.4, 0.01, 100)
    assert error_95(values, FEWEST) == pytest.approx(0.0196, abs=0.003)
    assert error_95(values, FEWEST - 1) is None
    assert error_95([float("nan")] * 3, 50) is None


def test_memory_for_the_matches_of_many_photos_is_that_of_a_few_numbers_each():
    rng, photos, most = np.random.default_rng(0), range(200), 100
    labelled = boxes(rng, photos)

    def found():
        for image in photos:
            for x, y, category in rng.integers(1, 90, (most, 3)).tolist():
                row = {"image_id": image, "category_id": 1 + category % 3, "bbox": [x, y, 20, 30]}
                yield row | {"score": round(float(rng.random()), 5)}

    annotations = of(photos, labelled)
    tracemalloc.start()
    coco_metrics(annotations, found(), (1, 2, 3), sizes=True, drawn=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / (len(photos) * most) < 500
