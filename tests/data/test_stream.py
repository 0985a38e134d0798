import io
import json
from pathlib import Path

import pytest
import torch

from detguard import DetguardError
from detguard.data.dataset import read_dataset
from detguard.data.entries import DataError
from detguard.data.sources import read_labelled
from detguard.data.stream import Labelled, Labels, as_line, from_lines, in_order, lines_of, read_lines
from detguard.detections import Detections
from detguard.schema import RECORDS, check

NAMES = {0: "person", 1: "bus"}


def as_bytes(line):
    return json.dumps(line).encode()


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
    hours = ["2026-01-04 10:00:00", "2026-01-04 09:30:00+00:00", "2026-01-04 09:00:00-02:00", "2026-01-04T10:00:00Z"]
    assert order(hours) == ["12", "11", "14", "13"]  # of one moment as they are listed
    assert order(["2026:01:04 10:00:00", "2026/01/02", "2026:01:03", "2026-01-01"]) == [
        "14",
        "12",
        "13",
        "11",
    ]  # Exif's


def test_times_that_are_none_change_no_order_and_are_told(tiny_data, tmp_path, bundled):
    data = json.loads(tiny_data.read_text())
    for entry, time in zip(data["images"], ["12/31/2025", "01/01/2026", "2026-01-01", "x"], strict=True):
        entry["date_captured"] = time
    (tmp_path / "instances.json").write_text(json.dumps(data))
    said = []
    images = tiny_data.parent / "images"
    shown = read_labelled(
        str(tmp_path / "instances.json"), "", bundled.class_names, lambda *of: said.append(of), images
    )
    assert [one.file.stem for one in shown] == ["11", "12", "13", "14"]
    assert "3 'date_captured' that are no times" in "".join(
        f"{places.total} {kind}" for kind, places in said[0][1].items()
    )


def test_a_monitor_takes_what_it_writes_of_photos_that_judge(tmp_path):
    photo = Labelled(tmp_path / "a.png", Detections.none(), judges=True)
    figures = {"number": 1, "f1": None, "confidence": 0.5, "entropy": None, "began": None}
    check(as_line(photo, {}) | figures, RECORDS["monitor"])


def test_lines_are_photos_with_their_objects():
    line = {
        "photo": "a.jpg",
        "objects": [{"class": "bus", "box": [1, 2, 30, 40]}, {"class": "cow", "box": [0, 0, 1, 1]}],
    }
    first, second = from_lines([as_bytes(line), b"\n", as_bytes(line | {"objects": []})], NAMES)
    assert first.file.name == "a.jpg"
    assert first.objects.boxes.tolist() == [[1, 2, 30, 40]]
    assert first.objects.classes.tolist() == [1]
    assert len(second.objects) == 0


def test_objects_of_unknown_classes_are_named_and_a_map_makes_them_known():
    objects = [{"class": one, "box": [1, 2, 30, 40]} for one in ("pedestrian", "bus", "persn")]
    line = as_bytes({"photo": "a.jpg", "objects": objects, "classes": ["person", "pedestrian"]})
    (plain,) = from_lines([line], NAMES)
    assert plain.unknown == ("pedestrian", "persn")
    (mapped,) = from_lines([line], NAMES, class_map={"pedestrian": "Person"})
    assert mapped.unknown == ("persn",)
    assert mapped.known == (0,)
    assert mapped.objects.classes.tolist() == [0]  # that a bus is there says nothing, as others may be
    with pytest.raises(DetguardError, match="did you mean pedestrian=person"):
        from_lines([line], NAMES, class_map={"pedestrian": "persn"})


PLAIN = b'{"photo": "a.jpg", "objects": []}\n'


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b'{"photo": "a.jpg"}',
        b'{"photo": "a.jpg", "objects": {}}',
        b'{"photo": "a.jpg", "objects": [], "classes": "bus"}',
        b'{"photo": "a.jpg", "objects": [{"class": ["bus"], "box": [1, 1, 2, 2]}]}',
        b'{"photo": "a.jpg", "objects": [{"class": "bus", "box": [5, 5, 1, 9]}]}',
        b'{"photo": "a.jpg", "objects": [{"class": "bus", "box": [5, 5]}]}',
        b'{"photo": "a.jpg", "objects": [{"class": "bus", "box": [0, 0, 1, Infinity]}]}',
        b'{"photo": "a.jpg", "objects": [{"class": "bus", "box": [-1e20, 0, 1, 1]}]}',
        b'{"photo": "a.jpg", "objects": [{"class": "bus", "box": [0, 0, 1, ' + b"9" * 400 + b"]}]}",
        b'{"photo": 3, "objects": []}',
        b'{"photo": "a\\u0000.jpg", "objects": []}',
        b'{"photo": "\\ud800.jpg", "objects": []}',
        b'{"photo": "caf\xe9.jpg", "objects": []}',
        b"[" * 100_000,
        b" " * (16 << 20) + PLAIN,
        b'{"photo": "a.jpg", "objects": [' + b"0," * 20_000 + b"0]}",
    ],
    ids=lambda line: repr(line[-60:].strip()),
)
def test_an_odd_line_is_an_error_that_names_it_and_the_others_go_on(line):
    first, wrong, last = from_lines([PLAIN, line, PLAIN], NAMES)
    assert first.file == last.file == Path("a.jpg")
    assert isinstance(wrong, DataError)
    assert "line 2" in str(wrong)
    assert len(str(wrong)) < 400


def test_an_error_says_which_rule_a_line_breaks():
    bare, turned = b'{"photo": "a.jpg"}', PLAIN.replace(b"[]", b'[{"class": "bus", "box": [60, 118, 50, 253]}]')
    told = [str(error) for error in from_lines([bare, turned], NAMES)]
    assert "an \"id\" by which the objects come later (no 'objects')" in told[0]
    assert "box [60, 118, 50, 253]: x1 <= x2" in told[1]


def test_a_line_without_an_end_is_not_read_whole():
    stream = io.BytesIO(PLAIN + bytes(100 << 20) + b"\n" + PLAIN)
    first, wrong, last = lines_of(stream)
    assert (first, last) == (PLAIN, PLAIN)
    assert len(wrong) < 20 << 20


def test_a_line_of_a_photo_is_read_back_as_it_was():
    objects = Detections(torch.tensor([[1.0, 2, 30, 40]]), torch.ones(1), torch.tensor([1]))
    for known in (None, (1,)):
        photo = Labelled(Path("a.jpg"), objects, known)
        (back,) = from_lines([as_bytes(as_line(photo, NAMES))], NAMES)
        assert (back.file, back.known) == (photo.file, known)
        assert torch.equal(back.objects.boxes, objects.boxes)
        assert torch.equal(back.objects.classes, objects.classes)


def test_a_wrong_line_of_a_file_is_one_error_that_names_both(tmp_path):
    (tmp_path / "new.jsonl").write_bytes(PLAIN + b"{\n")
    with pytest.raises(DataError, match=r"new\.jsonl line 2"):
        read_lines(tmp_path / "new.jsonl", NAMES)


def test_labels_that_come_later_are_joined_by_their_id(tmp_path):
    later = {"id": 17, "objects": [{"class": "bus", "box": [1, 2, 30, 40]}], "classes": ["bus"]}
    photo = {"id": "17", "photo": "b.jpg"}
    _, bare, labels = from_lines([PLAIN, as_bytes(photo), as_bytes(later)], NAMES)
    assert (bare.id, bare.labelled, len(bare.objects)) == ("17", False, 0)
    assert as_line(bare, NAMES)["labelled"] is False
    assert isinstance(labels, Labels)
    file = tmp_path / "new.jsonl"

    def read(*lines):
        file.write_bytes(b"\n".join(as_bytes(line) for line in lines) + b"\n" + PLAIN)
        return read_lines(file, NAMES)

    first, second = read(photo, later)
    assert (first.file, first.known, first.labelled) == (Path("b.jpg"), (1,), True)
    assert first.objects.boxes.tolist() == [[1, 2, 30, 40]]
    assert second.labelled
    with pytest.raises(DataError, match="no labels of '17'"):
        read(photo)
    with pytest.raises(DataError, match="labels of '17', but no photo"):
        read(later, photo)
    (odd,) = from_lines([as_bytes(photo | {"id": "x" * 201})], NAMES)
    assert isinstance(odd, DataError)


def test_classes_of_one_name_cannot_be_told_apart_by_labels():
    with pytest.raises(DataError, match="several classes of one name"):
        list(from_lines([PLAIN], {0: "dog", 1: "cat", 2: "dog"}))


def test_a_name_too_long_for_any_file_is_an_error_of_its_line():
    (one,) = from_lines([as_bytes({"photo": "data:image/png;base64," + "A" * 5000, "objects": []})], NAMES)
    assert isinstance(one, DataError)
    assert "a name of over 4096 bytes" in str(one)
