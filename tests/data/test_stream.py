import json
from pathlib import Path

import pytest
import torch

from detguard.data.dataset import DataError, read_dataset
from detguard.data.stream import Labelled, as_line, from_lines, in_order
from detguard.detections import Detections

NAMES = {0: "person", 1: "bus"}


def test_photos_come_by_the_time_that_the_json_gives(tiny_data, tmp_path, bundled):
    def order(times):
        data = json.loads(tiny_data.read_text())
        for entry, time in zip(data["images"], times, strict=False):
            entry["date_captured"] = time
        (tmp_path / "instances.json").write_text(json.dumps(data))
        dataset = read_dataset(tmp_path / "instances.json", images=tiny_data.parent / "images")
        return [p.file.stem for p in in_order(dataset, dataset.category_ids(bundled.class_names))]

    assert order([]) == ["11", "12", "13", "14"]
    assert order(["2026-01-04", "2026-01-02", "2026-01-03", "2026-01-01"]) == ["14", "12", "13", "11"]
    assert order(["2026-01-04", "2026-01-02"]) == ["11", "12", "13", "14"]


def test_lines_are_photos_with_their_objects():
    line = {
        "photo": "a.jpg",
        "objects": [{"class": "bus", "box": [1, 2, 30, 40]}, {"class": "cow", "box": [0, 0, 1, 1]}],
    }
    first, second = from_lines([json.dumps(line), "", json.dumps(line | {"objects": []})], NAMES)
    assert first.file.name == "a.jpg"
    assert first.objects.boxes.tolist() == [[1, 2, 30, 40]]
    assert first.objects.classes.tolist() == [1]
    assert len(second.objects) == 0


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"photo": "a.jpg"}',
        '{"photo": "a.jpg", "objects": [{"class": "bus", "box": [5, 5, 1, 9]}]}',
        '{"photo": "a.jpg", "objects": [{"class": "bus", "box": [5, 5]}]}',
        '{"photo": 3, "objects": []}',
        '{"photo": "a\\u0000.jpg", "objects": []}',
    ],
)
def test_a_wrong_line_is_named_by_its_number(line):
    with pytest.raises(DataError, match="line 2"):
        list(from_lines(['{"photo": "a.jpg", "objects": []}', line], NAMES))


def test_a_line_of_a_photo_is_read_back_as_it_was():
    objects = Detections(torch.tensor([[1.0, 2, 30, 40]]), torch.ones(1), torch.tensor([1]))
    for known in (None, (1,)):
        photo = Labelled(Path("a.jpg"), objects, known)
        (back,) = from_lines([json.dumps(as_line(photo, NAMES))], NAMES)
        assert (back.file, back.known) == (photo.file, known)
        assert torch.equal(back.objects.boxes, objects.boxes)
        assert torch.equal(back.objects.classes, objects.classes)


def test_lines_of_a_file_are_named_by_it():
    with pytest.raises(DataError, match=r"new\.jsonl line 1"):
        list(from_lines(["{"], NAMES, "new.jsonl"))


def test_classes_of_one_name_cannot_be_told_apart_by_labels():
    with pytest.raises(DataError, match="several classes of one name"):
        list(from_lines(['{"photo": "a.jpg", "objects": []}'], {0: "dog", 1: "cat", 2: "dog"}))
