import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from detguard.classes import left_out, meant
from detguard.data.dataset import read_dataset
from detguard.data.entries import CROWDED, LOST, DataError
from detguard.data.yolo import MAX_LABELS

WIDE = {"width": 100, "height": 80}
CALLED = [{"id": 1, "name": "pedestrian"}, {"id": 18, "name": "dog"}]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "images" / "val"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        Image.fromarray(np.zeros((80, 100, 3), np.uint8)).save(folder / f"{name}.jpg")
    return tmp_path


def coco(folder, annotations=(), images=None, categories=None, name="instances_val.json"):
    data = {
        "images": images
        or [{"id": i, "file_name": f"{n}.jpg", "width": 100, "height": 80} for i, n in ((7, "a"), (9, "b"))],
        "categories": categories or [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {"id": n, "image_id": 7, "category_id": 1, "bbox": [10, 10, 20, 30], "area": 600, "iscrowd": 0} | a
            for n, a in enumerate(annotations)
        ],
    }
    (folder / name).write_text(json.dumps(data))
    return folder / name


def yolo(folder, labels, config=None):
    (folder / "labels" / "val").mkdir(parents=True, exist_ok=True)
    for name, text in ({"a": "", "b": ""} | labels).items():
        (folder / "labels" / "val" / f"{name}.txt").write_text(text)
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump({"path": ".", "val": "images/val", "names": ["person", "dog"]} | (config or {})))
    return file


def test_both_formats_give_the_same_boxes_and_official_category_ids(photos):
    a = read_dataset(coco(photos, [{}, {"category_id": 18, "bbox": [50, 40, 50, 40]}]))
    b = read_dataset(yolo(photos, {"a": "0 0.2 0.3125 0.2 0.375\n1 0.75 0.75 0.5 0.5\n"}))
    boxes = [
        [(x["category_id"], np.round(x["bbox"], 4).tolist()) for x in d.annotations.dataset["annotations"]]
        for d in (a, b)
    ]
    assert boxes[0] == boxes[1]
    assert a.categories == b.categories == {1: "person", 18: "dog"}
    assert list(a.files) == [7, 9]
    assert a.warnings == b.warnings == {}


def test_classes_that_are_not_cocos_are_numbered_from_one(photos):
    dataset = read_dataset(yolo(photos, {"a": "1 .5 .5 .2 .2"}, {"names": ["helmet", "person"]}))
    assert dataset.categories == {1: "helmet", 2: "person"}


@pytest.mark.parametrize("form", [yolo, coco])
def test_of_one_photo_only_so_many_objects_are_taken(photos, form, monkeypatch):
    for module in ("yolo", "coco"):
        monkeypatch.setattr(f"detguard.data.{module}.MOST_OBJECTS", 2)
    lines = "0 .5 .5 .2 .2\n0 .4 .5 .2 .2\n0 .3 .5 .2 .2\n0 .2 .5 .2 .2\n"
    dataset = read_dataset(yolo(photos, {"a": lines}) if form is yolo else coco(photos, [{}] * 4))
    assert len(dataset.annotations.anns) == 2
    assert dataset.warnings[CROWDED].total == 2


def test_a_line_that_is_there_twice_is_one_object_and_a_mark_of_the_byte_order_is_none(photos):
    dataset = read_dataset(yolo(photos, {"a": "\ufeff1 .5 .5 .2 .2\n0 .2 .2 .2 .2\n1 0.50 .5 .2 .2\n"}))
    assert [one["category_id"] for one in dataset.annotations.dataset["annotations"]] == [18, 1]
    assert {name: where.total for name, where in dataset.warnings.items()} == {"boxes given twice, left out once": 1}


def test_a_list_of_photos_may_begin_with_a_mark_of_the_byte_order(photos):
    (photos / "val.txt").write_text("\ufeffimages/val/a.jpg\n")
    assert len(read_dataset(yolo(photos, {"a": "1 .5 .5 .2 .2"}, {"val": "val.txt"})).files) == 1


def test_a_list_of_photos_may_count_from_its_own_folder(photos):
    (photos / "images" / "val.txt").write_text("./val/a.jpg\n")
    assert len(read_dataset(yolo(photos, {"a": "1 .5 .5 .2 .2"}, {"val": "images/val.txt"})).files) == 1


def test_a_yaml_says_itself_where_its_photos_are(photos):
    with pytest.raises(DataError, match="`images` goes with a COCO json"):
        read_dataset(yolo(photos, {"a": "1 .5 .5 .2 .2"}), images=photos)


@pytest.mark.parametrize(("name", "known"), [("cart", None), ("Traffic_Lights", "traffic light"), ("rider", "person")])
def test_no_class_is_said_to_be_another_that_is_spelt_nearly_alike(name, known):
    told = left_out({name: 3}, ["person", "traffic light", "cat", "car"])
    assert (f'"{name}": "{known}"' if known else "renames them") in told
    assert meant("persn", ["person", "car"]) == "person"  # a user's slip


@pytest.mark.parametrize(
    ("json_in", "photos_in", "prefix"),
    [
        ("annotations", "images/val", ""), ("annotations", "val", ""), ("annotations", "images", ""),
        ("", "images", "images/"), ("annotations", "val", "val/"), ("", "data", ""), ("images", "images", ""),
    ],
)  # fmt: skip
def test_photos_of_a_json_are_found_where_tools_put_them(tmp_path, json_in, photos_in, prefix):
    for folder in (json_in, photos_in, "images"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((80, 100, 3), np.uint8)).save(tmp_path / photos_in / "a.jpg")
    images = [{"id": 1, "file_name": f"{prefix}gone.jpg"}, {"id": 7, "file_name": f"{prefix}a.jpg"}]
    dataset = read_dataset(coco(tmp_path / json_in, [{}], images))
    assert list(dataset.files.values()) == [tmp_path / photos_in / "a.jpg"]


def test_shared_coco256_reads_the_same_both_ways(val_photos):
    root = val_photos[0].parents[2]
    a, b = read_dataset(root / "instances_val.json"), read_dataset(root / "data.yaml")
    assert list(a.files.values()) == list(b.files.values())
    assert list(a.files) == list(b.files)
    assert len(a.annotations.anns) == len(b.annotations.anns) == 898


def test_objects_are_given_in_the_detectors_classes_without_crowds(photos):
    dataset = read_dataset(coco(photos, [{}, {"category_id": 18}, {"iscrowd": 1}]))
    objects = dataset.objects(7, dataset.category_ids({0: "cat", 1: "dog", 2: "person"}))
    assert objects.classes.tolist() == [2, 1]
    assert objects.boxes.tolist()[0] == [10, 10, 30, 40]


def test_a_class_subset_must_be_known_to_both(photos):
    dataset = read_dataset(coco(photos, [{}]))
    assert dataset.category_ids({0: "person", 1: "dog"}, ["dog"]) == {1: 18}
    with pytest.raises(DataError, match="horse"):
        dataset.category_ids({0: "person", 1: "horse"}, ["horse"])
    with pytest.raises(DataError, match="no class in common"):
        dataset.category_ids({0: "zebra"})


def test_boxes_of_classes_that_the_detector_does_not_know_are_counted_and_named(photos):
    dataset = read_dataset(coco(photos, [{}, {}, {"category_id": 18}], categories=CALLED))
    assert dataset.category_ids({0: "person", 1: "dog"}) == {1: 18}
    ((kind, where),) = dataset.warnings.items()
    assert where.total == 2
    assert "pedestrian (2)" in kind
    assert 'say so: `class_map={"pedestrian": "person"}`' in kind
    with pytest.raises(DataError, match=r"no class in common.*dog \(1\).*\{\"pedestrian\": \"person\"\}"):
        dataset.category_ids({0: "person"})


def test_a_map_calls_classes_as_the_detector_does_and_makes_those_of_one_name_one(photos):
    called = [*CALLED, {"id": 2, "name": "rider"}, {"id": 3, "name": "person"}]
    file = coco(photos, [{}, {"category_id": 2}, {"category_id": 3}, {"category_id": 18}], categories=called)
    dataset = read_dataset(file, class_map={"pedestrian": "person", "rider": "person", "cyclist": "person"})
    assert dataset.categories == {3: "person", 18: "dog"}
    assert dataset.objects(7, dataset.category_ids({0: "dog", 1: "person"})).classes.tolist() == [1, 1, 1, 0]
    assert {kind: list(where) for kind, where in dataset.warnings.items()} == {
        "names in `class_map` that no class of the data has": ["'cyclist'"]
    }


def test_detectors_with_two_classes_of_one_name_can_be_judged_by_the_others_only(photos):
    dataset = read_dataset(coco(photos, [{}]))
    names = {0: "person", 1: "dog", 2: "person"}
    with pytest.raises(DataError, match="several classes of one name"):
        dataset.category_ids(names)
    assert dataset.category_ids(names, ["dog"]) == {1: 18}


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [
        ({"bbox": [10, 10, float("nan"), 5]}, "not a number"),
        ({"bbox": [10, 10, -3, 5]}, "no size"),
        ({"bbox": "wide"}, "not a number"),
        ({"bbox": [200, 10, 20, 20]}, "outside their photo"),
        ({"category_id": 44}, "unknown classes"),
        ({"image_id": 1234}, "unknown photos"),
    ],
)
def test_a_broken_coco_annotation_is_left_out_and_named(photos, annotation, kind):
    dataset = read_dataset(coco(photos, [{}, annotation]))
    assert len(dataset.annotations.anns) == 1
    ((found, where),) = dataset.warnings.items()
    assert kind in found
    assert "instances_val.json: annotations[1]" in where[0]


def test_a_box_that_sticks_out_is_cut(photos):
    dataset = read_dataset(coco(photos, [{"bbox": [90, 60, 40, 40]}]))
    assert dataset.annotations.anns[1]["bbox"] == [90, 60, 10, 20]
    assert list(dataset.warnings) == ["boxes partly outside their photo, cut"]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("0 .5 .5 .2", "class x y w h"),
        ("person .5 .5 .2 .2", "class x y w h"),
        ("7 .5 .5 .2 .2", "unknown classes"),
        ("0 .5 .5 nan .2", "not a number"),
        ("0 .1 .1 nan .1 .5 .5 .1 .5", "not a number"),
        ("0 .5 .5 0 .2", "no size"),
        ("0 1.9 .5 .2 .2", "outside their photo"),
    ],
)
def test_a_broken_yolo_line_is_left_out_and_named(photos, line, kind):
    dataset = read_dataset(yolo(photos, {"a": f"0 .5 .5 .2 .2\n{line}\n"}))
    assert len(dataset.annotations.anns) == 1
    ((found, where),) = dataset.warnings.items()
    assert kind in found
    assert "a.txt:2" in where[0]


def test_the_outline_of_a_segment_counts_as_its_box(photos):
    dataset = read_dataset(yolo(photos, {"a": "0 .1 .1 .5 .1 .5 .5 .1 .5"}))
    assert np.allclose(dataset.annotations.anns[1]["bbox"], [10, 8, 40, 32])


def test_points_of_a_pose_are_left_out(photos):
    labels = {"a": "0 .5 .5 .2 .4" + 12 * " .9 .9 2", "b": "1 .5 .5 .4 .2\n"}
    found = read_dataset(yolo(photos, labels, {"kpt_shape": [12, 3]})).annotations.anns
    assert [np.round(one["bbox"]).tolist() for one in found.values()] == [[40, 24, 20, 32], [30, 32, 40, 16]]
    with pytest.raises(DataError, match="'kpt_shape' should be"):
        read_dataset(yolo(photos, labels, {"kpt_shape": [12, "3"]}))


def test_missing_photos_are_counted_and_left_out(photos):
    (photos / "images" / "val" / "b.jpg").unlink()
    dataset = read_dataset(coco(photos, [{}, {"image_id": 9}]))
    assert list(dataset.files) == [7]
    assert len(dataset.annotations.anns) == 1
    assert "images[1]" in dataset.warnings[LOST][0]


def test_annotations_without_any_photo_are_an_error(tmp_path):
    with pytest.raises(DataError, match="no photo to evaluate on"):
        read_dataset(coco(tmp_path))


@pytest.mark.parametrize("name", ["../../etc/passwd.jpg", "/etc/passwd", "a/../../x.jpg"])
def test_photos_outside_the_data_folder_are_refused(photos, name):
    with pytest.raises(DataError, match="leads out of the data folder"):
        read_dataset(coco(photos, images=[{"id": 1, "file_name": name}]))


@pytest.mark.parametrize("value", ["../elsewhere/images", "/etc", ["images/val", "../../x"]])
def test_a_split_outside_the_data_folder_is_refused(photos, value):
    with pytest.raises(DataError, match=r"leads out of the data folder|neither a folder"):
        read_dataset(yolo(photos, {}, {"val": value}))


def test_a_split_may_be_an_absolute_path_where_the_yaml_is_a_relative_one(photos, monkeypatch):
    yolo(photos, {"a": "0 .5 .5 .2 .2"}, {"val": str(photos / "images" / "val")})
    monkeypatch.chdir(photos)
    assert len(read_dataset("data.yaml").files) == 2


def test_a_split_has_the_photos_of_linked_folders_in_the_data_folder_alone_and_no_hidden_ones(photos, tmp_path_factory):
    stranger, split = tmp_path_factory.mktemp("stranger"), photos / "images/val"
    for folder in (photos / "images/cam1", stranger, split / ".ipynb_checkpoints"):
        folder.mkdir(exist_ok=True)
        shutil.copy(split / "a.jpg", folder / "c.jpg")
    shutil.copy(split / "a.jpg", split / "._a.jpg")
    (split / "cam1").symlink_to("../cam1")
    (split / "cam2").symlink_to(stranger)
    dataset = read_dataset(yolo(photos, {"a": "0 .5 .5 .2 .2"}))
    assert list(dataset.files.values()) == [split / "a.jpg", split / "b.jpg", split / "cam1/c.jpg"]
    (places,) = (where for kind, where in dataset.warnings.items() if "lead out" in kind)
    assert places == [f"{split / 'cam2'} leads to {stranger}"]
    shutil.move(split, stranger / "val")  # a split that is a link itself is where its photos are
    split.symlink_to(stranger / "val")
    (split / "cam2").unlink()
    (split / "cam2").symlink_to("cam3")
    (split / "cam3").mkdir()
    shutil.copy(split / "a.jpg", split / "cam3/d.jpg")
    found = read_dataset(yolo(photos, {"a": "0 .5 .5 .2 .2"}))
    assert [str(one.relative_to(split)) for one in found.files.values()] == ["a.jpg", "b.jpg", "cam3/d.jpg"]


def test_a_list_of_photos_may_not_lead_out_either(photos):
    (photos / "val.txt").write_text("images/val/a.jpg\n../../secret.jpg\n")
    with pytest.raises(DataError, match=r"val\.txt:2: .* leads out"):
        read_dataset(yolo(photos, {}, {"val": "val.txt"}))


def test_duplicate_image_ids_are_an_error(photos):
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}]
    with pytest.raises(DataError, match="same id 1"):
        read_dataset(coco(photos, images=images))


def test_duplicate_annotation_ids_are_numbered_anew(photos):
    dataset = read_dataset(coco(photos, [{"id": 0}, {"id": 0, "bbox": [50, 50, 10, 10]}]))
    assert sorted(dataset.annotations.anns) == [1, 2]


@pytest.mark.parametrize("text", ["{", "[]", '{"images": []}', '{"images": [], "categories": []}'])
def test_what_is_no_coco_json_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json"):
        read_dataset(tmp_path / "x.json")


def test_a_yaml_never_executes_or_downloads(photos):
    marker = photos / "ran"
    file = yolo(
        photos, {}, {"path": "nowhere", "download": f"open({str(marker)!r}, 'w')", "ultralytics": "coco128.yaml"}
    )
    with pytest.raises(DataError, match="not here"):
        read_dataset(file)
    assert not marker.exists()


def test_a_missing_split_names_those_that_there_are(photos):
    with pytest.raises(DataError, match=r"no split 'test' \(it has: val\)"):
        read_dataset(yolo(photos, {}), "test")


def test_a_known_name_that_is_not_here_says_how_to_get_it():
    with pytest.raises(DataError, match=r"val2017\.zip"):
        read_dataset("coco")
    with pytest.raises(DataError, match=r"cocoo: no such data; did you mean coco\?"):
        read_dataset("cocoo")
    with pytest.raises(DataError, match="known name"):
        read_dataset("openimages")


def test_photos_of_the_same_number_stay_apart(photos):
    for folder in ("cam1", "cam2"):
        (photos / "images" / "val" / folder).mkdir()
        for suffix in ("images", "labels"):
            (photos / suffix / "val" / folder).mkdir(parents=True, exist_ok=True)
        (photos / "images" / "val" / "a.jpg").rename(photos / "images" / "val" / folder / "1.jpg")
        (photos / "labels" / "val" / folder / "1.txt").write_text("0 .5 .5 .2 .2")
        (photos / "images" / "val" / "b.jpg").replace(photos / "images" / "val" / "a.jpg") if folder == "cam1" else None
    dataset = read_dataset(yolo(photos, {}))
    assert len(dataset.files) == 2
    assert all(len(dataset.annotations.imgToAnns[i]) == 1 for i in dataset.files)


def test_data_without_any_label_is_an_error(photos):
    with pytest.raises(DataError, match="no labelled object"):
        read_dataset(yolo(photos, {}))


def test_photos_without_a_label_file_are_counted(photos):
    file = yolo(photos, {"a": "0 .5 .5 .2 .2"})
    (photos / "labels" / "val" / "b.txt").unlink()
    dataset = read_dataset(file)
    assert list(dataset.warnings) == ["photos without a label file, taken as empty"]


def test_a_limit_takes_the_first_photos(photos):
    assert list(read_dataset(coco(photos, [{}, {"image_id": 9}]), limit=1).files) == [7]


ODD_NAMES = [True, "person", {"a": "person"}, {0: None}, {0: ["person"]}, [None, "dog"], {0: {}}, {10**400: "dog"}]


@pytest.mark.parametrize("names", ODD_NAMES, ids=range(len(ODD_NAMES)))
def test_odd_names_of_classes_are_one_line(photos, names):
    with pytest.raises(DataError, match=r"data\.yaml: .*'names'"):
        read_dataset(yolo(photos, {"a": "0 .5 .5 .2 .2"}, {"names": names}))


def test_classes_may_be_numbered_in_quotes_and_called_by_numbers(photos):
    dataset = read_dataset(yolo(photos, {"a": "1 .5 .5 .2 .2"}, {"names": {"0": "zero", "1": 1}}))
    assert dataset.categories == {1: "zero", 2: "1"}


def test_two_classes_of_one_name_are_one_line(photos):
    twice = [{"id": 1, "name": "dog"}, {"id": 2, "name": "dog"}]
    for file in (coco(photos, [{}], categories=twice), yolo(photos, {"a": "0 .5 .5 .2 .2"}, {"names": ["dog", "dog"]})):
        with pytest.raises(DataError, match="several classes are called 'dog'"):
            read_dataset(file)


@pytest.mark.parametrize("value", [7, True, {"a": 1}, [["images/val"]], [None], 0.5, "x" * 5000, "a\0b", "\n"])
def test_a_split_that_is_no_name_is_one_line(photos, value):
    with pytest.raises(DataError, match=r"data\.yaml"):
        read_dataset(yolo(photos, {}, {"val": value}))


@pytest.mark.parametrize("annotations", [7, True, "x", ["val"], {"val": 7}, {"val": None}, {"val": "gone.json"}])
def test_odd_annotations_of_a_yaml_are_one_line(photos, annotations):
    with pytest.raises(DataError, match=r"data\.yaml|gone\.json"):
        read_dataset(yolo(photos, {}, {"annotations": annotations}))


def test_the_whole_file_system_is_no_folder_of_data(photos):
    with pytest.raises(DataError, match="path: / is no folder of data"):
        read_dataset(yolo(photos, {}, {"path": "/"}))


@pytest.mark.parametrize("path", [7, "x" * 5000, "a\0b", ["."], "gone"])
def test_an_odd_path_of_a_yaml_is_one_line(photos, path):
    with pytest.raises(DataError, match=r"data\.yaml"):
        read_dataset(yolo(photos, {}, {"path": path}))


def test_a_folder_of_data_that_is_not_there_is_named_once(photos):
    with pytest.raises(DataError, match=r"\(looked at /nowhere\)"):
        read_dataset(yolo(photos, {}, {"path": "/nowhere"}))


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b.yaml", "\ud800.json"])
def test_a_source_that_no_file_is_called_is_one_line(source):
    with pytest.raises(DataError, match=r"no such (data|file or folder)"):
        read_dataset(source)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("my/photos", "my/photos: no such file or folder; give a"),
        ("data.yml", "data.yml: no such file or folder; give a"),
        ("coco.json", "coco.json: no such file or folder; give a"),
        ("street", "street: no such data; give a"),
        ("coco127", r"coco127: no such data; did you mean coco128\?"),
        ("COCO128.yaml", r"COCO128.yaml: no such file or folder; did you mean coco128\?"),
    ],
)
def test_data_that_are_not_there_are_a_path_or_nearly_a_name(tmp_path, monkeypatch, source, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=reason):
        read_dataset(source)


@pytest.mark.parametrize("number", ["true", "NaN", "Infinity", "0.5", "9" * 400, '"1"', "null", "[]"])
@pytest.mark.parametrize("entry", ["images", "categories"])
def test_an_id_that_is_no_number_is_one_short_line(photos, entry, number):
    file = coco(photos, [{}])
    data = json.loads(file.read_text())
    data[entry][0]["id"] = "ID"
    file.write_text(json.dumps(data).replace('"ID"', number))
    with pytest.raises(DataError, match=rf"{entry}\[0\]: id .* is not a whole number") as caught:
        read_dataset(file)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", ["NaN", "Infinity", "9" * 400, "-5", '"wide"', "true", "null", "[]"])
def test_areas_and_sizes_that_are_no_numbers_are_made_anew(photos, value):
    file = coco(photos, [{}, {}])
    data = json.loads(file.read_text())
    data["annotations"][0]["area"] = data["images"][0]["width"] = "ODD"
    file.write_text(json.dumps(data).replace('"ODD"', value))
    dataset = read_dataset(file)
    assert dataset.annotations.anns[1]["area"] in (600, 1)
    assert list(dataset.warnings) == ["photos of another size than annotated"]


def test_a_box_of_four_hundred_digits_is_left_out(photos):
    dataset = read_dataset(coco(photos, [{}, {"bbox": [0, 0, 10**400, 5]}]))
    assert len(dataset.annotations.anns) == 1


def test_a_deep_json_is_one_line(tmp_path):
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"x\.json: not JSON"):
        read_dataset(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["!!int x", "a: !!timestamp 99", "val: 2001-99-99\n? [a]\n: b", "&a [*a]", "[" * 5000])
def test_an_odd_yaml_is_one_line(tmp_path, text):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=r"data\.yaml"):
        read_dataset(tmp_path / "data.yaml")


def test_photos_whose_labels_cannot_be_read_are_lost_not_empty(photos):
    file = yolo(photos, {"a": "0 .5 .5 .2 .2"})
    label = photos / "labels/val/b.txt"
    label.unlink()
    large = "0 .5 .5 .2 .2\n" * (MAX_LABELS // 14 + 1)
    for make in (
        os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir, lambda path: path.write_text(large),
        lambda path: path.write_text("0 .5 .5 .2 .2", "utf-16"),
    ):  # fmt: skip
        make(label)
        dataset = read_dataset(file)
        ((kind, (place,)),) = dataset.warnings.items()
        assert kind == LOST
        assert f"b.jpg: its labels cannot be read ({label}" in place
        assert [one.stem for one in dataset.files.values()] == ["a"]
        label.rmdir() if label.is_dir() else label.unlink()


def test_a_pipe_among_the_photos_is_left_out(photos):
    os.mkfifo(photos / "images/val/c.jpg")
    assert "c.jpg" in read_dataset(yolo(photos, {"a": "0 .5 .5 .2 .2"})).warnings[LOST][0]


def test_a_list_of_photos_that_is_no_text_is_one_line(photos):
    (photos / "val.txt").write_bytes(b"images/val/a.jpg\n\xff\n")
    with pytest.raises(DataError, match=r"val\.txt: not a readable list"):
        read_dataset(yolo(photos, {}, {"val": "val.txt"}))


def test_of_many_faults_the_first_places_are_kept_and_all_are_counted(photos):
    dataset = read_dataset(yolo(photos, {"a": "0 .5 .5 .2 .2\n" + "7 .5 .5 .2 .2\n" * 5000}))
    (places,) = dataset.warnings.values()
    assert places.total == 5000
    assert len(places) == 1000
    assert "a.txt:2" in places[0]


def test_a_data_yaml_that_names_a_coco_json_is_labelled_by_it(photos):
    coco(photos, [{"category_id": 18}], name="official.json")
    file = yolo(photos, {"a": "0 .5 .5 .2 .2"}, {"annotations": {"val": "official.json"}})
    (found,) = read_dataset(file).annotations.dataset["annotations"]
    assert (found["image_id"], found["category_id"], found["bbox"]) == (7, 18, [10, 10, 20, 30])


@pytest.mark.parametrize("form", [yolo, coco])
def test_a_limit_takes_photos_that_can_be_read(photos, form):
    (photos / "images/val/a.jpg").write_bytes(b"")
    labels = {"b": "0 .5 .5 .2 .2"} if form is yolo else [{}, {"image_id": 9}]
    assert [file.stem for file in read_dataset(form(photos, labels), limit=1).files.values()] == ["b"]


@pytest.mark.parametrize("form", [yolo, coco])
def test_photos_alone_need_no_label(photos, form):
    assert len(read_dataset(form(photos, {} if form is yolo else []), labelled=False).files) == 2
