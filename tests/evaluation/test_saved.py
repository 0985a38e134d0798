import contextlib
import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import supervision as sv
from pycocotools.coco import COCO
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset

from detguard.data.dataset import read_dataset
from detguard.data.entries import Faults
from detguard.evaluation.attacks import SQUARE, AttackSet, kept_photo
from detguard.evaluation.cache import Cache
from detguard.evaluation.saved import save_views
from detguard.evaluation.views import Batch, Clean, Corrupted, Makers, Subject, fill
from detguard.photos import read_photo
from detguard.runs import Run


@pytest.fixture(scope="module")
def saved(bundled, tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    dataset = read_dataset(tiny_data)
    ids = dataset.category_ids(bundled.class_names)
    subject = Subject("bundled", bundled, dataset, ids, Cache(folder / "cache.sqlite"))
    views = [Clean(), Corrupted("brightness", 3, 0), AttackSet(("all",), 8, 1), AttackSet((SQUARE,), 8, 3)]
    fill(subject, views)
    names = ["brightness-3", "bundled-attack-eps8-steps1", "bundled-blackbox-eps8-queries3"]
    assert save_views(subject, views, Run(folder, {})) == [f"datasets/{name}" for name in names]
    return subject, views, [folder / "datasets" / name for name in names]


def test_images_are_those_that_the_detector_was_shown(saved):
    subject, (_, bright, attack, black), folders = saved
    shown = {
        folders[0]: bright.show(Batch(subject, [11]))[0],
        folders[1]: kept_photo(subject, attack, 11),
        folders[2]: kept_photo(subject, black, 11),
    }
    for folder, photo in shown.items():
        assert np.array_equal(read_photo(folder / "images/11.png"), photo)


def test_pycocotools_finds_the_objects_of_the_clean_photos(saved):
    subject, _, folders = saved
    with contextlib.redirect_stdout(io.StringIO()):
        read = COCO(str(folders[1] / "instances.json"))
    assert read.cats == subject.dataset.annotations.cats
    for image in subject.dataset.files:
        before = [a["bbox"] for a in subject.dataset.annotations.imgToAnns[image]]
        assert np.allclose([a["bbox"] for a in read.imgToAnns[image]], before, atol=0.01)


@pytest.fixture(scope="module")
def labels(saved):
    """File name of each photo -> class names and boxes, as they are labelled."""
    subject = saved[0]
    names = subject.detector.class_names
    return {
        f"{image}.png": sorted((names[c], *b) for c, b in zip(o.classes.tolist(), o.boxes.tolist(), strict=True))
        for image in subject.dataset.files
        for o in [subject.objects(image)]
    }


def test_ultralytics_trains_and_validates_on_it(saved, labels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = check_det_dataset(str(saved[2][0] / "data.yaml"), autodownload=False)
    read = build_yolo_dataset(get_cfg(overrides={"task": "detect"}), data["val"], 4, data, mode="val")
    assert len(read.labels) == 4
    for one in read.labels:
        height, width = one["shape"]
        x, y, w, h = (one["bboxes"] * [width, height, width, height]).T
        boxes = zip(x - w / 2, y - h / 2, x + w / 2, y + h / 2, strict=True)
        found = sorted((data["names"][int(c)], *b) for c, b in zip(one["cls"][:, 0], boxes, strict=True))
        assert_same(found, labels[one["im_file"].rpartition("/")[2]])


@pytest.mark.parametrize("form", ["yolo", "coco"])
def test_supervision_reads_it(saved, labels, form):
    folder = saved[2][1]
    images = str(folder / "images")
    if form == "yolo":
        read = sv.DetectionDataset.from_yolo(images, str(folder / "labels"), str(folder / "data.yaml"))
    else:
        read = sv.DetectionDataset.from_coco(images, str(folder / "instances.json"))
    assert len(read) == 4
    for file, _, one in read:
        found = sorted((read.classes[c], *b) for c, b in zip(one.class_id, one.xyxy.tolist(), strict=True))
        assert_same(found, labels[file.rpartition("/")[2]])


def assert_same(found, labelled):
    assert [name for name, *_ in found] == [name for name, *_ in labelled]
    assert np.allclose([box for _, *box in found], [box for _, *box in labelled], atol=0.05)


def test_what_is_whole_is_left_as_it_is_and_the_rest_is_made_again(saved):
    subject, views, folders = saved
    (folders[0] / "images/11.png").write_bytes(b"")
    (folders[1] / "instances.json").unlink()
    (folders[1] / "images/11.png").write_bytes(b"")
    save_views(replace(subject), views[:3], Run(folders[0].parents[1], {}))
    assert not (folders[0] / "images/11.png").read_bytes()
    assert (folders[1] / "images/11.png").read_bytes()


def test_processes_that_make_them_ahead_make_the_same(saved, tmp_path, monkeypatch):
    subject, (_, bright, *_), _ = saved
    made = list[int]()
    taken = Makers.photo
    monkeypatch.setattr("detguard.evaluation.views.MANY", 1)
    monkeypatch.setattr(Makers, "photo", lambda self, view, image: made.append(image) or taken(self, view, image))
    (folder,) = save_views(subject, [bright], Run(tmp_path, {}))
    assert sorted(made) == sorted(subject.dataset.files)
    for image in subject.dataset.files:
        (shown,) = bright.show(Batch(subject, [image]))
        assert np.array_equal(read_photo(tmp_path / folder / f"images/{image}.png"), shown)


@pytest.mark.parametrize("many", [1, 10**6])
def test_a_photo_that_is_gone_by_then_takes_no_others_name(saved, tmp_path, monkeypatch, many):
    subject, (_, bright, *_), _ = saved
    monkeypatch.setattr("detguard.evaluation.views.MANY", many)
    gone = tmp_path / "gone.png"
    gone.write_bytes(subject.dataset.files[11].read_bytes())
    files = {11: gone} | {n: file for n, file in subject.dataset.files.items() if n != 11}
    fewer = replace(subject, dataset=replace(subject.dataset, files=dict(files), warnings=Faults()))
    assert set(fewer.hashes) == set(files)
    gone.unlink()
    (folder,) = save_views(fewer, [bright], Run(tmp_path, {}))
    shown = {image: bright.show(Batch(subject, [image]))[0] for image in files if image != 11}
    assert {file.stem for file in (tmp_path / folder / "images").iterdir()} == {str(image) for image in shown}
    for image, photo in shown.items():
        assert np.array_equal(read_photo(tmp_path / folder / f"images/{image}.png"), photo)


def test_a_photo_that_is_listed_twice_is_saved_twice(saved, tmp_path, monkeypatch):
    subject, (_, bright, *_), _ = saved
    files = {11: subject.dataset.files[11], 12: subject.dataset.files[11]}
    twice = replace(subject, dataset=replace(subject.dataset, files=files), cache=Cache(tmp_path / "c.sqlite"))
    images = copy.deepcopy(subject.dataset.annotations.imgs)
    monkeypatch.setattr(twice.dataset.annotations, "imgs", images | {12: images[11] | {"id": 12}})
    save_views(twice, [bright], Run(tmp_path, {}))
    assert {file.name for file in (tmp_path / "datasets/brightness-3/images").iterdir()} == {"11.png", "11-2.png"}
