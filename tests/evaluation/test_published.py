import json
from itertools import product

import albumentations as A
import imagecorruptions
import numpy as np
import pytest

from detguard import DetguardError
from detguard.data.corruptions import KINDS, SEVERITIES
from detguard.evaluation.corruptions import PUBLISHED, corrupt, read_pipeline, through
from detguard.evaluation.fast_corruptions import FASTER
from detguard.evaluation.run import Protocols


@pytest.fixture(scope="module")
def photo(bus):
    return np.ascontiguousarray(bus[300:460, 150:310])


def published(kind, photo, severity, seed):
    np.random.seed(seed)
    given = {"seed": seed} if kind in ("glass_blur", "impulse_noise") else {}  # these draw from generators of their own
    return imagecorruptions.corrupt(photo, severity, kind, **given)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_corruptions_are_those_of_the_package_to_the_bit_and_leave_the_random_numbers_of_others(kind, photo):
    theirs = published(kind, photo, 3, 3)
    np.random.seed(7)
    ours = corrupt(photo, kind, 3, 3)
    assert np.array_equal(ours, theirs)
    drawn = np.random.random()
    np.random.seed(7)
    assert drawn == np.random.random()


def same(kind, photo, severity):
    return np.array_equal(FASTER[kind](photo, severity, severity), published(kind, photo, severity, severity))


# Streaks of motion are longer than (900, 33) is wide; rounding takes zooms of (139, 285) beyond the last line.
@pytest.mark.parametrize("kind", FASTER)
@pytest.mark.parametrize(
    ("shape", "severity"),
    [*product([(32, 47), (900, 33), (139, 285)], SEVERITIES), *product([(480, 640)], [1, 3, 5])],
)
def test_our_faster_corruptions_are_those_of_the_package_at_any_size_and_severity(kind, shape, severity, bus):
    assert same(kind, np.ascontiguousarray(bus[: shape[0], : shape[1]]), severity)


@pytest.mark.parametrize("kind", FASTER)
@pytest.mark.parametrize("severity", [1, 5])
def test_our_faster_corruptions_are_those_of_the_package_of_any_colours(kind, severity):
    levels = np.array([0, 1, 2, 100, 127, 128, 200, 253, 254, 255], np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)  # greys, pure hues, black and white
    noise = np.random.default_rng(0).integers(0, 256, (3096, 3), np.uint8)
    assert same(kind, np.concatenate([colours, noise]).reshape(64, 64, 3), severity)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_photos_that_the_package_refuses_are_corrupted_too(kind):
    photo = np.random.default_rng(0).integers(0, 256, (9, 33, 3), np.uint8)
    changed = corrupt(photo, kind, 5, 0)
    assert changed.shape == photo.shape
    assert not np.array_equal(changed, photo)


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_a_pipeline_of_ones_own_does_what_it_did_when_it_was_saved(form, photo, tmp_path):
    noise = A.OneOf([A.GaussNoise((0.2, 0.3), p=1), A.MotionBlur((7, 15), p=1)], p=1)
    made = A.Compose([noise, A.RandomBrightnessContrast(p=1)])
    A.save(made, tmp_path / f"own.{form}", data_format=form)
    read = read_pipeline(tmp_path / f"own.{form}")
    made.set_random_seed(5)
    assert np.array_equal(through(read, photo, 5), made(image=photo)["image"])
    assert not np.array_equal(through(read, photo, 6), through(read, photo, 5))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ({"__class_fullname__": "os.system", "p": 1}, "'system' is no image-only transform"),
        ({"__class_fullname__": "Lambda", "p": 1}, "'Lambda' is no image-only transform"),
        ({"__class_fullname__": "HorizontalFlip", "p": 1}, "boxes would be wrong"),
        ({"__class_fullname__": "TextImage", "font_path": "/etc/passwd", "p": 1}, "'/etc/passwd' is no number"),
        ({"__class_fullname__": "GaussianBlur", "blur_limit": 10**9, "p": 1}, "is no number up to"),
        ({"__class_fullname__": "GaussianBlur", "blur": 3, "p": 1}, "blur"),
        ({"__class_fullname__": "Compose", "transforms": 1}, "'Compose' is no image-only"),
        ([1], "is no image-only"),
    ],
)
def test_pipelines_name_no_code_and_no_files(transform, message, tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"transform": transform}))
    with pytest.raises(DetguardError, match=message) as raised:
        read_pipeline(file)
    assert str(raised.value).startswith(f"`corruption_file` {file}: ")


def test_a_pipeline_that_is_nested_without_end_is_refused(tmp_path):
    inner = {"__class_fullname__": "ToGray", "p": 1}
    for _ in range(20):
        inner = {"__class_fullname__": "Sequential", "transforms": [inner], "p": 1}
    (tmp_path / "own.json").write_text(json.dumps({"transform": inner}))
    with pytest.raises(DetguardError, match="within each other"):
        read_pipeline(tmp_path / "own.json")


@pytest.mark.parametrize("wrong", [{"corruptions": ("rain",)}, {"eps": (2.5,)}])
def test_evaluations_that_cannot_be_name_the_option(wrong):
    (option,) = wrong
    with pytest.raises(DetguardError, match=f"^`{option}` "):
        Protocols(**wrong)


def test_a_corruption_of_ours_is_none_that_detectors_are_judged_by(monkeypatch):
    monkeypatch.setitem(KINDS, "rain", KINDS["snow"])
    assert Protocols().corruptions == PUBLISHED
    with pytest.raises(DetguardError, match="`corruptions` rain"):
        Protocols(corruptions=("rain",))


def test_a_pipeline_of_too_many_transforms_is_refused(tmp_path):
    many = {"__class_fullname__": "Sequential", "transforms": [{"__class_fullname__": "ToGray", "p": 1}] * 101, "p": 1}
    (tmp_path / "own.json").write_text(json.dumps({"transform": many}))
    with pytest.raises(DetguardError, match="over 100 transforms"):
        read_pipeline(tmp_path / "own.json")


def test_a_pipeline_that_gives_no_photo_is_refused(photo, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps({"transform": {"__class_fullname__": "ToFloat", "p": 1}}))
    with pytest.raises(DetguardError, match="must leave size and type"):
        through(read_pipeline(tmp_path / "own.json"), photo, 0)
