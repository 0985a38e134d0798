import json

import pytest
import torch

from detguard.detections import Detections
from detguard.evaluation.coco import category_ids, coco_metrics, coco_results, read_annotations

CLASSES = {0: "person", 1: "bus", 2: "unicorn"}


@pytest.fixture
def annotations(tmp_path):
    boxes = [(1, 1, [10, 10, 50, 80]), (1, 6, [100, 20, 90, 60]), (2, 1, [5, 5, 40, 90])]
    data = {
        "images": [{"id": i, "width": 200, "height": 200, "file_name": f"{i}.jpg"} for i in (1, 2, 3)],
        "categories": [{"id": 1, "name": "person"}, {"id": 6, "name": "bus"}, {"id": 9, "name": "boat"}],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
            for n, (i, c, b) in enumerate(boxes, 1)
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(data))
    return read_annotations(tmp_path / "instances.json")


def found(*rows):
    """Rows of (class, score, x1, y1, x2, y2)."""
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 6)
    return Detections(table[:, 2:], table[:, 1], table[:, 0].long())


def test_classes_map_to_the_data_sets_category_ids_by_name(annotations):
    assert category_ids(annotations, CLASSES) == {0: 1, 1: 6}


def test_perfect_detections_have_an_ap_of_one(annotations):
    ids = category_ids(annotations, CLASSES)
    results = coco_results(1, found((0, 0.9, 10, 10, 60, 90), (1, 0.8, 100, 20, 190, 80)), ids)
    results += coco_results(2, found((0, 0.7, 5, 5, 45, 95)), ids)
    table = coco_metrics(annotations, results, ids.values())
    assert table == {name: {"AP": 1.0, "AP50": 1.0} for name in ("all", "person", "bus")}


def test_a_loose_box_counts_at_half_overlap_only(annotations):
    ids = category_ids(annotations, CLASSES)
    results = coco_results(1, found((1, 0.8, 100, 20, 155, 80)), ids)
    row = coco_metrics(annotations, results, [6])["bus"]
    assert row["AP50"] == 1.0
    assert row["AP"] == pytest.approx(0.3)  # IoU 0.61: found at .50, .55 and .60 of the ten thresholds


def test_nothing_found_is_an_ap_of_zero(annotations):
    assert coco_metrics(annotations, [], [1, 6])["all"] == {"AP": 0.0, "AP50": 0.0}
