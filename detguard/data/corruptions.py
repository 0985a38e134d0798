"""The 15 common corruptions at severities 1..5, the same for the same photo and seed.

Kinds and strengths are those of Hendrycks and Dietterich (2019, ImageNet-C), as Michaelis et al. (2019) brought them
to detection: at the photo's own resolution, boxes unchanged. Albumentations makes those that it defines alike; comments
in `KINDS` say where ours differ. Training and attacks use these; detectors are judged under the published ones
(`evaluation/corruptions.py`).
"""

from collections.abc import Callable, Sequence
from functools import cache

import albumentations as A
import cv2
import numpy as np
from numpy.typing import NDArray

from detguard import DetguardError
from detguard.photos import Photo
from detguard.schema import several

SEVERITIES = (1, 2, 3, 4, 5)
Floats = NDArray[np.float32]
# From a photo, a severity and a seed to the photo corrupted.
Apply = Callable[[Photo, int, int], Photo]


def corrupt(photo: Photo, kind: str, severity: int, seed: int) -> Photo:
    """`photo`, `uint8 [H, W, 3]` RGB, corrupted by one of `KINDS` at severity 1..5."""
    return np.ascontiguousarray(KINDS[kind](photo, severity, seed))


def _library(make: Callable[[int], A.ImageOnlyTransform | A.DualTransform]) -> Apply:
    """A corruption by albumentations; `make` gives the transform of severity 0..4."""
    made = cache(make)

    def apply(photo: Photo, severity: int, seed: int) -> Photo:
        transform = made(severity - 1)
        transform.set_random_seed(seed)
        return transform(image=photo)["image"]

    return apply


def _own(function: Callable[[Floats, int, np.random.Generator], Floats]) -> Apply:
    """A corruption of ours, on float32 [H, W, 3] in 0..1; `function` is given a severity of 0..4."""

    def apply(photo: Photo, severity: int, seed: int) -> Photo:
        pixels = np.multiply(photo, np.float32(1 / 255), dtype=np.float32)
        changed = function(pixels, severity - 1, np.random.default_rng(seed))
        return np.rint(np.clip(changed, 0, 1) * 255).astype(np.uint8)

    return apply


def _shot(x: Floats, i: int, rng: np.random.Generator) -> Floats:
    photons = (60, 25, 12, 5, 3)[i]
    return (rng.poisson(x * photons) / photons).astype(np.float32)


def _impulse(x: Floats, i: int, rng: np.random.Generator) -> Floats:
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[i]
    draw = rng.random(x.shape, np.float32)
    return np.where(draw < share / 2, 0, np.where(draw > 1 - share / 2, 1, x)).astype(np.float32)


def _snow(x: Floats, i: int, rng: np.random.Generator) -> Floats:
    mean, zoom, threshold, streak, keep = (
        (0.1, 3, 0.5, 9, 0.8),
        (0.2, 2, 0.5, 9, 0.7),
        (0.55, 4, 0.9, 15, 0.7),
        (0.55, 4.5, 0.85, 15, 0.65),
        (0.55, 2.5, 0.85, 19, 0.55),
    )[i]
    height, width = x.shape[:2]
    small = rng.normal(mean, 0.3, (int(height / zoom) + 1, int(width / zoom) + 1)).astype(np.float32)
    flakes = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1).astype(np.float32)
    flakes = cv2.filter2D(flakes, -1, _line(streak, rng.uniform(-135, -45)))[..., None]
    grey = cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., None]
    whitened = keep * x + (1 - keep) * np.maximum(x, grey * 1.5 + 0.5)
    return whitened + flakes + flakes[::-1, ::-1]


def _line(length: int, degrees: float) -> Floats:
    """A kernel that smears along a line."""
    kernel = np.zeros((length, length), np.float32)
    kernel[length // 2] = 1
    turn = cv2.getRotationMatrix2D(((length - 1) / 2,) * 2, degrees, 1)
    kernel = cv2.warpAffine(kernel, turn, (length, length)).astype(np.float32)
    return kernel / kernel.sum()


def _clouds(shape: tuple[int, int], decay: float, rng: np.random.Generator, first: int = 1) -> Floats:
    """Fractal noise in 0..1: octaves of smooth noise, each of half the grain and 1/decay of the height of the last."""
    total = np.zeros(shape, np.float32)
    side = max(shape)
    for octave in range(first, max(int(np.log2(side)), first + 1)):
        cells = 2**octave
        grid = rng.random((cells * shape[0] // side + 2, cells * shape[1] // side + 2), np.float32)
        layer = cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_CUBIC)
        total += layer / np.float32(decay ** (octave - first))
    total -= total.min()
    return total / max(float(total.max()), 1e-6)


def _frost(x: Floats, i: int, rng: np.random.Generator) -> Floats:
    keep, cover = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[i]
    shape = x.shape[:2]
    # Feathers of ice are the ridges of fractal noise; they grow thickest from the rim of the pane.
    ridges = 1 - np.abs(2 * _clouds(shape, 1.5, rng, first=3) - 1)
    grain = _clouds(shape, 1.1, rng, first=4)
    y, x_ = np.ogrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    rim = np.clip(np.maximum(np.abs(y), np.abs(x_)) * 0.75 + 0.35, 0, 1)
    ice = np.clip((ridges**5 * 0.75 + grain * 0.45) * rim * (0.6 + 0.8 * _clouds(shape, 2, rng)), 0, 1)
    tint = np.array([0.9, 0.96, 1.0], np.float32)
    return keep * x + cover * ice[..., None].astype(np.float32) * tint


def _fog(x: Floats, i: int, rng: np.random.Generator) -> Floats:
    thickness, decay = ((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[i]
    brightest = x.max()
    return (x + thickness * _clouds(x.shape[:2], decay, rng)[..., None]) * brightest / (brightest + thickness)


def _brightness(x: Floats, i: int, rng: np.random.Generator) -> Floats:
    hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)
    hsv[..., 2] = np.clip(hsv[..., 2] + (0.1, 0.2, 0.3, 0.4, 0.5)[i], 0, 1)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(np.float32, copy=False)


def _contrast(x: Floats, i: int, rng: np.random.Generator) -> Floats:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[i] + mean


def _elastic(x: Floats, i: int, rng: np.random.Generator) -> Floats:
    height, width = x.shape[:2]
    side = min(height, width)
    # Smoothing by sigma leaves 0.163 / sigma of uniform noise's spread: alpha makes it a share of the short side.
    sigma = max(0.01 * side, 1.0)
    alpha = (0.0015, 0.0025, 0.0035, 0.0045, 0.006)[i] * side * sigma / 0.163
    y, x_ = np.mgrid[:height, :width].astype(np.float32)
    shift = rng.uniform(-1, 1, (2, height, width)).astype(np.float32)
    dy, dx = (cv2.GaussianBlur(s, (0, 0), sigma) * np.float32(alpha) for s in shift)
    moved = cv2.remap(x, x_ + dx, y + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return moved.astype(np.float32, copy=False)


KINDS: dict[str, Apply] = {
    "gaussian_noise": _library(lambda i: A.GaussNoise(std_range=((0.08, 0.12, 0.18, 0.26, 0.38)[i],) * 2, p=1)),
    "shot_noise": _own(_shot),
    "impulse_noise": _own(_impulse),
    "defocus_blur": _library(
        lambda i: A.Defocus(radius=((3, 4, 6, 8, 10)[i],) * 2, alias_blur=((0.1, 0.5, 0.5, 0.5, 0.5)[i],) * 2, p=1)
    ),
    # all pixels swap at once, not one after another
    "glass_blur": _library(
        lambda i: A.GlassBlur(
            sigma=(0.7, 0.9, 1, 1.1, 1.5)[i], max_delta=(1, 2, 2, 3, 4)[i], iterations=(2, 1, 3, 2, 2)[i], p=1
        )
    ),
    # even weights along a line of 7 to 25 px, not fading ones
    "motion_blur": _library(lambda i: A.MotionBlur(blur_limit=((7, 11, 15, 19, 25)[i],) * 2, allow_shifted=False, p=1)),
    "zoom_blur": _library(
        lambda i: A.ZoomBlur(
            max_factor=((1.11, 1.16, 1.21, 1.26, 1.31)[i],) * 2,
            step_factor=((0.01, 0.01, 0.02, 0.02, 0.03)[i],) * 2,
            p=1,
        )
    ),
    # even weights along a flake's streak
    "snow": _own(_snow),
    # drawn ice; theirs are photos of frost
    "frost": _own(_frost),
    # octaves of smooth noise, not midpoint displacement
    "fog": _own(_fog),
    "brightness": _own(_brightness),
    "contrast": _own(_contrast),
    # no affine part, strength rises with severity, relative to the photo
    "elastic_transform": _own(_elastic),
    "pixelate": _library(
        lambda i: A.Downscale(
            scale_range=((0.6, 0.5, 0.4, 0.3, 0.25)[i],) * 2,
            interpolation_pair={"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_NEAREST},
            p=1,
        )
    ),
    "jpeg_compression": _library(lambda i: A.ImageCompression(quality_range=((25, 18, 15, 10, 7)[i],) * 2, p=1)),
}


def chosen_kinds(names: Sequence[str] | None) -> tuple[str, ...]:
    """The kinds of corruptions of these names, by default all that are known.

    Raises:
        DetguardError: one of them is not known, or there is none.
    """
    kinds = tuple(KINDS) if names is None else several("corruptions", names, ("fog", "snow"))
    if not kinds or not set(kinds) <= KINDS.keys():
        raise DetguardError(f"`corruptions` {','.join(kinds)}: expected some of {', '.join(KINDS)}")
    return kinds
