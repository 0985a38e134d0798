import contextlib
import io
import json

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detguard.data.dataset import read_dataset
from detguard.detections import Detections
from detguard.evaluation.coco import STATS, coco_metrics, coco_results, f1, matches, outside, value_left

IDS = {0: 1, 1: 6}


@pytest.fixture
def annotations():
    boxes = [(1, 1, [10, 10, 50, 80]), (1, 6, [100, 20, 90, 60]), (2, 1, [5, 5, 40, 90])]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "width": 200, "height": 200, "file_name": f"{i}.jpg"} for i in (1, 2, 3)],
        "categories": [{"id": 1, "name": "person"}, {"id": 6, "name": "bus"}, {"id": 9, "name": "boat"}],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
            for n, (i, c, b) in enumerate(boxes, 1)
        ],
    }
    coco.createIndex()
    return coco


def found(*rows):
    """Rows of (class, score, x1, y1, x2, y2)."""
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 6)
    return Detections(table[:, 2:], table[:, 1], table[:, 0].long())


def test_perfect_detections_have_an_ap_of_one(annotations):
    shown = [(1, found((0, 0.9, 10, 10, 60, 90), (1, 0.8, 100, 20, 190, 80))), (2, found((0, 0.7, 5, 5, 45, 95)))]
    metrics = coco_metrics(annotations, shown, IDS)
    assert metrics.stats["AP"] == metrics.stats["AR100"] == pytest.approx(1)
    assert metrics.stats["APs"] is None  # no small objects
    assert metrics.per_class == {
        "person": {"AP": pytest.approx(1), "AP50": pytest.approx(1), "objects": 2},
        "bus": {"AP": pytest.approx(1), "AP50": pytest.approx(1), "objects": 1},
    }
    assert metrics.precision == pytest.approx([1] * 101)


def test_a_loose_box_counts_at_half_overlap_only(annotations):
    row = coco_metrics(annotations, [(1, found((1, 0.8, 100, 20, 155, 80)))], {1: 6}).per_class["bus"]
    assert row["AP50"] == pytest.approx(1)
    assert row["AP"] == pytest.approx(0.3)  # IoU 0.61: found at .50, .55 and .60 of the ten thresholds


def test_nothing_found_is_an_ap_of_zero(annotations):
    for sizes in (True, False):
        stats = coco_metrics(annotations, [], IDS, sizes=sizes).stats
        assert (stats["AP"], stats["AP50"]) == (0, 0)


def test_only_the_wanted_images_count(annotations):
    shown = [(1, found((0, 0.9, 10, 10, 60, 90), (1, 0.8, 100, 20, 190, 80))), (2, found((0, 0.95, 0, 0, 9, 9)))]
    assert coco_metrics(annotations, shown, IDS).stats["AP"] < 1
    metrics = coco_metrics(annotations, shown, IDS, [1])
    assert metrics.stats["AP"] == pytest.approx(1)
    assert metrics.per_class["person"]["objects"] == 1


def test_classes_that_the_data_do_not_know_are_left_out(annotations):
    unknown = found((2, 0.95, 100, 20, 190, 80), (0, 0.9, 10, 10, 60, 90))
    person = coco_metrics(annotations, [(1, unknown)], IDS, [1]).per_class["person"]
    assert person["AP"] == pytest.approx(1)
    assert [row["category_id"] for row in coco_results(1, unknown, IDS)] == [1]


def test_crowds_are_no_objects_to_find(annotations):
    annotations.dataset["annotations"][2]["iscrowd"] = 1
    annotations.createIndex()
    assert coco_metrics(annotations, [], IDS).per_class["person"]["objects"] == 1


def test_of_what_lies_in_a_crowd_only_what_is_of_no_object_is_left_out():
    objects, crowds = found((0, 1, 0, 0, 50, 50)), found((0, 1, 100, 0, 200, 100), (1, 1, 0, 0, 60, 60))
    shown = found(
        (0, 0.9, 0, 0, 48, 50),  # the object
        (0, 0.8, 90, 10, 108, 20),  # 8 of 18 px in the crowd
        (0, 0.7, 92, 10, 112, 20),  # 12 of 20
        (0, 0.6, 20, 20, 40, 40),  # in the crowd of another class
        (1, 0.5, 20, 20, 40, 40),
        (1, 0.4, 120, 20, 140, 40),
    )
    assert outside(crowds, objects, shown).scores.tolist() == pytest.approx([0.9, 0.8, 0.6, 0.4])
    inside = found((0, 1, 110, 10, 150, 50))
    assert len(outside(crowds, inside, found((0, 0.9, 110, 10, 150, 50), (0, 0.8, 110, 10, 150, 50)))) == 1
    assert len(outside(found(), objects, shown)) == len(outside(crowds, found(), shown)) + 2 == len(shown)


def test_without_sizes_the_numbers_are_the_same(annotations):
    shown = [(1, found((0, 0.9, 12, 10, 60, 80), (1, 0.8, 110, 20, 190, 80)))]
    full, quick = (coco_metrics(annotations, shown, IDS, sizes=sizes).stats for sizes in (True, False))
    assert list(quick) == ["AP", "AP50"]
    assert [quick[k] for k in quick] == pytest.approx([full[k] for k in quick], abs=1e-12)


def test_the_numbers_are_pycocotools_own_on_real_detections(val_photos, yolo11n, tmp_path):
    root = val_photos[0].parents[2]
    dataset = read_dataset(root / "instances_val.json", limit=24)
    ids = dataset.category_ids(yolo11n.class_names)
    from detguard.photos import read_photo

    shown = [
        (image, yolo11n.detect([read_photo(file)], 0.001, 0.7, multi_label=True)[0])
        for image, file in dataset.files.items()
    ]
    results = [result for image, one in shown for result in coco_results(image, one, ids)]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(root / "instances_val.json"))
        judge = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
        judge.params.imgIds = list(dataset.files)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    ours = coco_metrics(dataset.annotations, shown, ids, list(dataset.files)).stats
    assert ours["AP"] > 0.3
    assert [ours[name] for name in STATS] == judge.stats.tolist()


def test_each_object_is_matched_once_by_class_and_overlap():
    objects = found((0, 1, 0, 0, 10, 10), (1, 1, 0, 0, 10, 10))
    detections = found((0, 0.9, 0, 0, 10, 9), (0, 0.8, 0, 0, 10, 10), (1, 0.7, 0, 0, 4, 10), (1, 0.6, 0, 0, 10, 10))
    assert matches(objects, detections).tolist() == [True, False, False, True]
    assert f1(objects, detections) == pytest.approx(2 * 2 / 6)


def test_f1_of_an_empty_photo():
    nothing = found()
    assert f1(nothing, nothing) == 1
    assert f1(nothing, found((0, 0.9, 0, 0, 5, 5))) == 0
    assert f1(found((0, 1, 0, 0, 5, 5)), nothing) == 0


def test_what_is_left_falls_with_confidence_and_with_false_positives_ahead():
    objects = found((0, 1, 0, 0, 10, 10))
    sure, unsure = (found((0, score, 0, 0, 10, 10)) for score in (0.9, 0.3))
    ahead = found((0, 0.95, 50, 50, 60, 60), (0, 0.9, 0, 0, 10, 10))
    behind = found((0, 0.9, 0, 0, 10, 10), (0, 0.5, 50, 50, 60, 60))
    other = found((1, 0.95, 50, 50, 60, 60), (0, 0.9, 0, 0, 10, 10))
    for detections in (sure, behind, other):
        assert value_left(objects, detections)[0] == pytest.approx(0.9)
    assert value_left(objects, ahead)[0] == pytest.approx(0.45)
    assert value_left(objects, unsure)[0] == pytest.approx(0.3)
    assert value_left(objects, found()) == (0, 0)
    assert value_left(objects, found((0, 0.7, 50, 50, 60, 60))) < value_left(objects, found())
