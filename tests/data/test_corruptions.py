import numpy as np
import pytest

from detguard.data.corruptions import KINDS, SEVERITIES, corrupt
from detguard.photos import Photo

RANDOM = set(KINDS) - {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}


@pytest.fixture(scope="module")
def photo(bus: Photo) -> Photo:
    return np.ascontiguousarray(bus[200:520, 100:500])


def distance(a, b):
    return float(np.sqrt(((a.astype(float) - b) ** 2).mean()))


def test_there_are_the_fifteen_of_imagenet_c():
    assert len(KINDS) == 15


@pytest.mark.parametrize("kind", KINDS)
def test_a_corruption_keeps_shape_and_type_and_is_the_same_for_the_same_seed(kind, photo):
    before = photo.copy()
    first, second = (corrupt(photo, kind, 3, 5) for _ in range(2))
    assert first.shape == photo.shape
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)
    assert np.array_equal(photo, before)
    assert distance(first, photo) > 2


@pytest.mark.parametrize("kind", sorted(RANDOM))
def test_random_corruptions_differ_by_seed(kind, photo):
    assert not np.array_equal(corrupt(photo, kind, 3, 5), corrupt(photo, kind, 3, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_the_highest_severity_changes_more_than_the_lowest(kind, photo):
    steps = [distance(corrupt(photo, kind, s, 1), photo) for s in SEVERITIES]
    assert steps[-1] > 1.15 * steps[0], steps


@pytest.mark.parametrize("kind", KINDS)
def test_small_and_narrow_photos_work(kind):
    for shape in ((40, 24), (33, 200)):
        photo = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
        assert corrupt(photo, kind, 5, 0).shape == photo.shape


def test_neighbouring_calls_do_not_change_a_result(photo):
    alone = corrupt(photo, "gaussian_noise", 2, 9)
    corrupt(photo, "glass_blur", 2, 1)
    corrupt(photo, "gaussian_noise", 2, 10)
    assert np.array_equal(alone, corrupt(photo, "gaussian_noise", 2, 9))
