from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import detguard
from detguard import DetguardError
from detguard.photos import decode_photo
from detguard.transforms.base import Drawn
from detguard.transforms.blur import Defocus, Gaussian, Median, Motion
from detguard.transforms.jpeg import Jpeg
from detguard.transforms.parse import KINDS, PRESETS, parse_transforms
from detguard.transforms.resize import Resize

ALL = [kind.example for kind in KINDS.values()]


def random_photo(seed, height=24, width=20):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("spec", [*ALL, "median:5", "median:7", "gaussian:9", "jpeg:1", "jpeg:100", "resize:1.5"])
def test_specs_are_read_back_as_they_are_written(spec):
    assert [str(t) for t in parse_transforms(spec)] == [spec]


def test_none_is_no_transform():
    assert parse_transforms("none") == []


@pytest.mark.parametrize(
    "spec", ["median:4", "median", "jpeg:0", "jpeg:101", "jpeg:x", "resize:0", "blur:3", "gaussian:2"]
)
def test_bad_specs_are_errors_that_show_a_good_one(spec):
    with pytest.raises(DetguardError, match=rf"{spec}.*:\d"):
        parse_transforms(f"median:3,{spec}")


def test_a_transform_twice_is_an_error():
    with pytest.raises(DetguardError, match="only once"):
        parse_transforms("jpeg:75,jpeg:75")


@pytest.mark.parametrize("size", [3, 5, 7])
def test_median_is_opencv_to_the_bit(bus, size):
    assert np.array_equal(Median(size)(bus), cv2.medianBlur(bus, size))


def test_jpeg_is_what_its_file_decodes_to(bus):
    jpeg = Jpeg(75)
    assert np.array_equal(jpeg(bus), decode_photo(jpeg.encode(bus)))


def test_jpeg_subsamples_chroma_by_two_both_ways(bus):
    data = Jpeg(75).encode(bus)
    start = data.index(b"\xff\xc0")
    assert data[start + 11] == 0x22  # sampling factors of luma in the frame header (ITU-T T.81, B.2.2)
    assert data[start + 14] == 0x11


@pytest.mark.parametrize("spec", ALL)
def test_transforms_keep_shape_type_and_input(spec, bus):
    before = bus.copy()
    (transform,) = parse_transforms(spec)
    after, warp = transform(bus), transform.warp(bus.shape[:2])
    assert after.shape[:2] == (warp.picture if warp else bus.shape[:2])
    assert after.dtype == np.uint8
    assert np.array_equal(bus, before)
    assert not np.array_equal(after, bus)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([3, 5, 7]))
def test_median_pull_back_is_exact_where_no_values_tie(seed, size):
    # All values of a channel differ, so the pixel that each window chose is known by its value.
    rng = np.random.default_rng(seed)
    photo = np.stack([rng.permutation(12 * 20).reshape(12, 20) for _ in range(3)], -1).astype(np.uint8)
    gradient = torch.from_numpy(rng.random((3, 12, 20)))
    pulled = Median(size).pull_back(photo, gradient)
    expected = torch.zeros_like(gradient)
    blurred = cv2.medianBlur(photo, size)
    for channel in range(3):
        source = {int(v): divmod(i, 20) for i, v in enumerate(photo[..., channel].ravel())}
        for (y, x), value in np.ndenumerate(blurred[..., channel]):
            expected[(channel, *source[int(value)])] += gradient[channel, y, x]
    assert torch.allclose(pulled, expected)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([Gaussian(3), Gaussian(7), Motion(7), Defocus(5), Resize(0.5), Resize(0.7), Resize(1.6)]),
)
def test_linear_transforms_pull_back_by_their_adjoint(seed, transform):
    photo = random_photo(seed)
    gradient = torch.from_numpy(np.random.default_rng(seed).random((3, 24, 20)))
    change = torch.from_numpy(photo.astype(np.float64)).permute(2, 0, 1)
    inner = (torch.from_numpy(transform(photo).astype(np.float64)).permute(2, 0, 1) * gradient).sum()
    # OpenCV rounds each value by up to one level on the way.
    assert abs(inner - (change * transform.pull_back(photo, gradient)).sum()) <= 1.0 * gradient.sum()


def test_jpeg_surrogate_points_where_the_real_jpeg_moves():
    y, x = np.mgrid[0:64, 0:64]
    waves = [128 + 60 * np.sin(x / 7), 128 + 60 * np.cos(y / 9), 100 + x + y / 2]
    photo = np.stack(waves, -1).clip(0, 255).astype(np.uint8)
    jpeg = Jpeg(90)
    gradient = torch.zeros(3, 64, 64)
    gradient[:, 16:48, 16:48] = 1.0
    pulled = jpeg.pull_back(photo, gradient)
    brighter = photo.copy()
    brighter[16:48, 16:48] += 8
    moved = (jpeg(brighter).astype(float) - jpeg(photo))[16:48, 16:48].sum()
    promised = 8 * float(pulled[:, 16:48, 16:48].sum())
    # The smooth rounding's slope is 0 at whole numbers and 3/4 halfway between, 1/4 on average.
    assert 0.1 * moved < promised < moved
    assert pulled[:, 16:48, 16:48].abs().sum() > 0.9 * pulled.abs().sum()


@pytest.mark.parametrize(
    "spec", ["gaussian:17", "gaussian:31", "median:7", "jpeg:75", "resize:0.05", "resize:4", "motion:31", "defocus:31"]
)
@pytest.mark.parametrize("shape", [(8, 8), (8, 40), (40, 8)])
def test_photos_smaller_than_the_window_go_through_and_back(spec, shape):
    (transform,) = parse_transforms(spec)
    photo = random_photo(1, *shape)
    pulled = transform.pull_back(photo, torch.ones(3, *shape))
    assert transform(photo).shape == photo.shape
    assert pulled.shape == (3, *shape)
    assert pulled.isfinite().all()


@pytest.mark.parametrize("size", [3, 17, 31])
def test_the_adjoint_of_a_blur_reflects_as_the_blur_does_even_many_times(size):
    photo = random_photo(2, 8, 11)
    blurred = cv2.GaussianBlur(photo.astype(np.float64), (size, size), 0)  # as the 8-bit one, but for its rounding
    sharp = torch.from_numpy(photo.astype(np.float64)).permute(2, 0, 1)
    for y, x in np.ndindex(8, 11):
        one = torch.zeros(3, 8, 11, dtype=torch.float64)
        one[:, y, x] = 1  # brought back: how much of each pixel is in this one
        made = (sharp * Gaussian(size).pull_back(photo, one)).sum((1, 2))
        assert made.tolist() == pytest.approx(blurred[y, x].tolist())


def test_resize_is_opencvs_bilinear_there_and_back(bus):
    height, width = bus.shape[:2]
    small = cv2.resize(bus, (round(width * 0.7), round(height * 0.7)), interpolation=cv2.INTER_LINEAR)
    back = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(Resize(0.7)(bus), back)


@pytest.mark.parametrize(
    "spec", ["brightness:0.4", "brightness:-0.5", "contrast:0.5", "contrast:-0.5", "gamma:1.8", "hue:40", "invert:1"]
)
def test_colours_pull_back_by_their_slope(spec):
    (transform,) = parse_transforms(spec)
    photo = np.random.default_rng(0).integers(60, 160, (12, 10, 3), np.uint8)
    gradient = torch.from_numpy(np.random.default_rng(1).random((3, 12, 10)))
    change = np.random.default_rng(2).integers(-8, 9, photo.shape)
    after = transform((photo + change).astype(np.uint8)).astype(float) - transform((photo - change).astype(np.uint8))
    moved = (torch.from_numpy(after).permute(2, 0, 1) * gradient).sum()
    promised = (torch.from_numpy(2.0 * change).permute(2, 0, 1) * transform.pull_back(photo, gradient)).sum()
    size = (torch.from_numpy(np.abs(2.0 * change)).permute(2, 0, 1) * gradient).sum()
    assert abs(moved - promised) < 0.05 * size


def test_values_that_are_cut_off_have_no_gradient():
    (transform,) = parse_transforms("brightness:1")
    pulled = transform.pull_back(np.full((2, 2, 3), 200, np.uint8), torch.ones(3, 2, 2))
    assert not pulled.any()


def test_an_inverted_photo_is_its_negative_and_turns_gradients_round():
    (transform,) = parse_transforms("invert:1")
    photo = random_photo(0)
    assert np.array_equal(transform(photo), 255 - photo)
    assert torch.equal(transform.pull_back(photo, torch.ones(3, 24, 20)), -torch.ones(3, 24, 20))
    assert not transform.straight


def test_hues_turn_as_told():
    (transform,) = parse_transforms("hue:120")
    red, grey = np.array([[[200, 0, 0]]], np.uint8), np.array([[[90, 90, 90]]], np.uint8)
    assert transform(red).tolist() == [[[0, 200, 0]]]
    assert transform(grey).tolist() == grey.tolist()


def test_what_a_library_cannot_make_of_a_photo_is_told():
    (transform,) = parse_transforms("albumentations:Superpixels")
    with pytest.raises(
        DetguardError, match="`transforms` albumentations:Superpixels: cannot be made of a photo of 8 x 6"
    ):
        transform(np.zeros((6, 8, 3), np.uint8))


@pytest.mark.parametrize("spec", ["noise:8", "corrupt:fog-2", "albumentations:RandomShadow"])
def test_what_is_random_is_drawn_and_repeats_by_what_was_drawn(spec, bus):
    (transform,) = parse_transforms(spec)
    one, two = (transform.draw(np.random.default_rng(seed)) for seed in (0, 1))
    assert not np.array_equal(one(bus), two(bus))
    (again,) = parse_transforms(str(one))
    assert np.array_equal(again(bus), one(bus))
    assert again.draw(np.random.default_rng(2)) == again


def test_noise_is_as_strong_as_told():
    (transform,) = parse_transforms("noise:8")
    assert np.std(transform(np.full((200, 200, 3), 128, np.uint8)).astype(float)) == pytest.approx(8, abs=0.1)


@pytest.mark.parametrize("name", ["HorizontalFlip", "Compose", "np", "__name__", "Lambda"])
def test_only_image_only_transforms_of_albumentations_are_taken(name):
    with pytest.raises(DetguardError, match="image-only"):
        parse_transforms(f"albumentations:{name}")


@pytest.mark.parametrize("name", ["ToFloat", "Normalize", "FromFloat", "ImageOnlyTransform"])
def test_what_of_albumentations_makes_no_photos_of_photos_is_refused(name):
    with pytest.raises(DetguardError, match="expected"):
        parse_transforms(f"albumentations:{name}")


@pytest.mark.parametrize(("spec", "weaker"), [("webp:20", "webp:90"), ("h264:40", "h264:18")])
def test_codecs_lose_more_the_smaller_their_files(spec, weaker, bus):
    strong, weak = (parse_transforms(s)[0](bus) for s in (spec, weaker))
    assert cv2.PSNR(weak, bus) > cv2.PSNR(strong, bus) + 2 > 22


def test_h264_takes_odd_sides():
    photo = random_photo(0, 33, 21)
    assert parse_transforms("h264:30")[0](photo).shape == photo.shape


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_are_groups(preset):
    assert [str(t) for t in parse_transforms(preset)] == PRESETS[preset].split(",")
    assert any(isinstance(t, Drawn) for t in parse_transforms(preset)) == (preset != "network")


def test_the_help_names_every_kind_and_preset():
    text = (Path(detguard.__file__).parent / "cli" / "attack.py").read_text()
    assert all(f"{kind}:" in text for kind in KINDS)
    assert all(preset in text for preset in PRESETS)
