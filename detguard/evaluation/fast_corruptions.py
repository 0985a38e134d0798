"""The published corruptions that take long, bit by bit as the package makes them, in a fraction of its time.

A photo is `uint8 [H, W, 3]` RGB with sides of 32 px and more; the same seed draws the same numbers.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import cv2
import numpy as np
from imagecorruptions.corruptions import disk, getMotionBlurKernel
from numba import njit
from numpy.typing import NDArray

from detguard.photos import Photo

Doubles = NDArray[np.float64]
# By severity: of impulses, their share; of defocus, the radius of a point and its blur; of glass, the blur, how far
# pixels move, how often; of motion, half its length and the spread of weights; of snow, its mean, grain and threshold,
# half the length of streaks and their spread, the photo's share; what is added to the value; what is left of contrast;
# how far pixels wander; up to where the photo is enlarged, and in which steps.
IMPULSES = (0.03, 0.06, 0.09, 0.17, 0.27)
DEFOCUS = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
GLASS = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
MOTION = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
SNOW = (
    (0.1, 3, 0.5, 10, 4, 0.8), (0.2, 2, 0.5, 12, 4, 0.7), (0.55, 4, 0.9, 12, 8, 0.7), (0.55, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 2.5, 0.85, 12, 12, 0.55),
)  # fmt: skip
ADDED = (0.1, 0.2, 0.3, 0.4, 0.5)
LEFT = (0.4, 0.3, 0.2, 0.1, 0.05)
WANDERED = (250 * 0.05, 250 * 0.065, 250 * 0.085, 250 * 0.1, 250 * 0.12)
ZOOMS = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))


def impulse_noise(photo: Photo, severity: int, seed: int) -> Photo:
    """Values that are none or all, of which draws of scikit-image's `random_noise` decide."""
    draw = np.random.default_rng(seed)
    struck, full = draw.random(photo.shape) <= IMPULSES[severity - 1], draw.random(photo.shape) <= 0.5
    # The package divides by 255 and multiplies again, which gives each of the 256 levels itself.
    return np.where(struck, full * np.uint8(255), photo)


def defocus_blur(photo: Photo, severity: int, seed: int) -> Photo:
    """Points that are disks, of all channels at once."""
    return _bytes(cv2.filter2D(photo / 255.0, -1, disk(*DEFOCUS[severity - 1])).astype(np.float64, copy=False))


def glass_blur(photo: Photo, severity: int, seed: int) -> Photo:
    """Pixels that take over the colour of a neighbour, one after another, between two blurs."""
    sigma, reach, times = GLASS[severity - 1]
    shuffled = _bytes(_smooth(photo / 255.0, (sigma, sigma), 4, "edge"))
    _shuffle(shuffled, reach, times, seed)
    return _bytes(_smooth(shuffled / 255.0, (sigma, sigma), 4, "edge"))


def motion_blur(photo: Photo, severity: int, seed: int) -> Photo:
    """The weighted mean of a photo moved step by step along a line, in double precision."""
    angle = np.random.RandomState(seed).uniform(-45, 45)
    return _smear(photo, *MOTION[severity - 1], angle).astype(np.uint8)  # weights add up to 1: none is over 255


def snow(photo: Photo, severity: int, seed: int) -> Photo:
    """Enlarged noise, smeared along a line, and the same upside down, on a paler photo."""
    mean, grain, threshold, radius, sigma, keep = SNOW[severity - 1]
    height, width = photo.shape[:2]
    draw = np.random.RandomState(seed)
    noise = draw.normal(mean, 0.3, (height, width))
    rows, columns = math.ceil(height / grain), math.ceil(width / grain)
    tall, wide = round(rows * grain), round(columns * grain)
    down = _between(rows, tall, tall, (height - rows) // 2)
    right = _between(columns, wide, wide, (width - columns) // 2)
    flakes = _enlarged(noise, *down, *right)
    flakes[flakes < threshold] = 0
    flakes = _smear(np.clip(flakes, 0, 1), radius, sigma, draw.uniform(-135, -45))
    flakes = np.round(flakes * 255)[:height, :width] / 255
    pixels = np.array(photo, np.float32) / 255.0
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    snowed: Photo = _snowed(pixels, grey, flakes, np.float32(keep), np.float32(1 - keep))
    return snowed


def brightness(photo: Photo, severity: int, seed: int) -> Photo:
    """More of the value of hue, saturation and value; scikit-image's conversions there and back, pixel by pixel."""
    made: Photo = _brighter(photo, ADDED[severity - 1])
    return made


def contrast(photo: Photo, severity: int, seed: int) -> Photo:
    """Values nearer to the mean of their channel, looked up among those of all 256."""
    mean = np.mean(photo / 255.0, axis=(0, 1))
    values = _bytes((np.arange(256)[:, None] / 255.0 - mean) * LEFT[severity - 1] + mean)
    return cv2.LUT(photo, values[None]).astype(np.uint8, copy=False)


def elastic_transform(photo: Photo, severity: int, seed: int) -> Photo:
    """Pixels that wander with their neighbours."""
    height, width = photo.shape[:2]
    draw, most = np.random.RandomState(seed), height * 0.005
    right, down = (
        (_smooth(draw.uniform(-most, most, (height, width)), (height * 0.01, width * 0.01), 3, "symmetric")
         * WANDERED[severity - 1]).astype(np.float32)
        for _ in range(2)
    )  # fmt: skip
    return _bytes(_moved(np.array(photo, np.float32) / 255.0, down, right))


def zoom_blur(photo: Photo, severity: int, seed: int) -> Photo:
    """The mean of a photo and of its middle enlarged more and more, bilinear, in double precision."""
    height, width = photo.shape[:2]
    pixels = (photo / 255).astype(np.float32)
    doubles, total = pixels.astype(np.float64), np.zeros_like(pixels)
    factors = np.arange(1, *ZOOMS[severity - 1]).tolist()
    for factor in factors:
        rows, columns = math.ceil(height / factor), math.ceil(width / factor)
        down = _between(rows, round(rows * factor), height, (height - rows) // 2)
        right = _between(columns, round(columns * factor), width, (width - columns) // 2)
        _add_enlarged(total, doubles, *down, *right)
    return _bytes((pixels + total) / (len(factors) + 1))


def _bytes(pixels: NDArray[np.floating]) -> Photo:
    """`pixels` of 0..1, which are lost, as those of a photo, rounded down."""
    np.clip(pixels, 0, 1, out=pixels)
    pixels *= 255
    return pixels.astype(np.uint8)


def _smooth(pixels: Doubles, sigmas: tuple[float, float], truncate: int, mode: Literal["edge", "symmetric"]) -> Doubles:
    """`pixels`, `[H, W]` or `[H, W, C]`, after a Gaussian of `sigmas` down and across, as SciPy's adds it up."""
    size, channels = pixels.shape[:2], pixels[0, 0].size
    weights, places = [], []
    for sigma, count in zip(sigmas, size, strict=True):
        radius = int(truncate * sigma + 0.5)
        bell = np.exp(-0.5 / (sigma * sigma) * np.arange(-radius, radius + 1) ** 2)
        weights.append((bell / bell.sum())[radius:])
        places.append(np.pad(np.arange(count), radius, mode))
    columns = (places[1][:, None] * channels + np.arange(channels)).ravel()
    smoothed: Doubles = _weighed(pixels.reshape(size[0], -1), places[0], columns, *weights, channels)
    return smoothed.reshape(pixels.shape)


def _smear(pixels: np.ndarray, radius: int, sigma: float, angle: float) -> Doubles:
    """The weighted sum of `pixels`, `[H, W]` or `[H, W, C]`, moved along a line from where they are."""
    height, width, channels = *pixels.shape[:2], pixels[0, 0].size
    length = 2 * radius + 1
    weights = getMotionBlurKernel(length, sigma)
    down, right = length * np.sin(np.deg2rad(angle)), length * np.cos(np.deg2rad(angle))
    far = math.hypot(down, right)
    moves = []
    for i in range(length):
        move = -math.ceil(i * down / far - 0.5), -math.ceil(i * right / far - 0.5)
        if abs(move[0]) >= height or abs(move[1]) >= width:
            break
        moves.append(move)
    downs, rights = np.array(moves).T
    margins = [(max(along.max(), 0), max(-along.min(), 0)) for along in (downs, rights)]
    padded = np.pad(pixels, [*margins, *[(0, 0)] * (pixels.ndim - 2)], "edge")
    tops, lefts = margins[0][0] - downs, (margins[1][0] - rights) * channels
    smeared: Doubles = _moved_sum(padded.reshape(len(padded), -1), weights, tops, lefts, height, width * channels)
    return smeared.reshape(pixels.shape)


def _between(count: int, enlarged: int, size: int, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Between which two of `count` lines, from `first` on, each of `size` lies when they are `enlarged`, and how much
    of each it has: of none, where rounding takes it beyond the last one, as SciPy's `zoom` has it.
    """
    at = np.arange(size) * ((count - 1) / (enlarged - 1) if enlarged > 1 else 0.0)
    low, inside = np.minimum(at.astype(np.int64), count - 1), at <= count - 1
    near = 1 - np.clip(at - low, 0, 1)
    return low + first, np.minimum(low + 1, count - 1) + first, near * inside, (1 - near) * inside


@njit
def _brighter(photo, added):  # type: ignore[no-untyped-def]
    height, width, _ = photo.shape
    out = np.empty_like(photo)
    for y in range(height):
        for x in range(width):
            red, green, blue = photo[y, x, 0] / 255.0, photo[y, x, 1] / 255.0, photo[y, x, 2] / 255.0
            value = max(red, max(green, blue))
            spread = value - min(red, min(green, blue))
            hue = saturation = 0.0
            if spread != 0.0:
                saturation = spread / value
                if blue == value:
                    hue = 4.0 + (red - green) / spread
                elif green == value:
                    hue = 2.0 + (blue - red) / spread
                else:
                    hue = (green - blue) / spread
                hue = (hue / 6.0) % 1.0
            value = min(max(value + added, 0.0), 1.0)
            sixth = math.floor(hue * 6.0)
            rest = hue * 6.0 - sixth
            p = value * (1.0 - saturation)
            q = value * (1.0 - rest * saturation)
            t = value * (1.0 - (1.0 - rest) * saturation)
            sector = int(sixth) % 6
            if sector == 0:
                red, green, blue = value, t, p
            elif sector == 1:
                red, green, blue = q, value, p
            elif sector == 2:
                red, green, blue = p, value, t
            elif sector == 3:
                red, green, blue = p, q, value
            elif sector == 4:
                red, green, blue = t, p, value
            else:
                red, green, blue = value, p, q
            out[y, x, 0] = np.uint8(min(max(red, 0.0), 1.0) * 255.0)
            out[y, x, 1] = np.uint8(min(max(green, 0.0), 1.0) * 255.0)
            out[y, x, 2] = np.uint8(min(max(blue, 0.0), 1.0) * 255.0)
    return out


@njit
def _add_enlarged(total, photo, above, below, up, down, left, right, near, far):  # type: ignore[no-untyped-def]
    for y in range(len(up)):
        into, first, second, upper, lower = total[y], photo[above[y]], photo[below[y]], up[y], down[y]
        for x in range(len(near)):
            before, after, nearer, farther = left[x], right[x], near[x], far[x]
            for channel in range(3):
                into[x, channel] += np.float32(
                    first[before, channel] * upper * nearer
                    + first[after, channel] * upper * farther
                    + second[before, channel] * lower * nearer
                    + second[after, channel] * lower * farther
                )


@njit
def _enlarged(noise, above, below, up, down, left, right, near, far):  # type: ignore[no-untyped-def]
    out = np.empty((len(up), len(near)))
    for y in range(len(up)):
        first, second = noise[above[y]], noise[below[y]]
        for x in range(len(near)):
            out[y, x] = (
                first[left[x]] * up[y] * near[x]
                + first[right[x]] * up[y] * far[x]
                + second[left[x]] * down[y] * near[x]
                + second[right[x]] * down[y] * far[x]
            )
    return out


@njit
def _snowed(pixels, grey, flakes, keep, rest):  # type: ignore[no-untyped-def]
    height, width, _ = pixels.shape
    out = np.empty(pixels.shape, np.uint8)
    for y in range(height):
        for x in range(width):
            least = grey[y, x] * np.float32(1.5) + np.float32(0.5)
            for channel in range(3):
                value = pixels[y, x, channel]
                pale = keep * value + rest * max(value, least)
                out[y, x, channel] = np.uint8(min(pale + flakes[y, x] + flakes[-1 - y, -1 - x], 1.0) * 255.0)
    return out


@njit
def _moved_sum(padded, weights, tops, lefts, height, count):  # type: ignore[no-untyped-def]
    total = np.zeros((height, count))
    for y in range(height):
        into = total[y]
        for i in range(len(tops)):
            weight, line = weights[i], padded[y + tops[i], lefts[i] : lefts[i] + count]
            for k in range(count):
                into[k] += weight * line[k]
    return total


@njit
def _weighed(pixels, rows, columns, down, across, channels):  # type: ignore[no-untyped-def]
    height, count = pixels.shape
    out, line, wide = np.empty_like(pixels), np.empty(count), np.empty(len(columns))
    for y in range(height):
        at = y + len(down) - 1
        here = pixels[rows[at]]
        for k in range(count):
            line[k] = here[k] * down[0]
        for i in range(len(down) - 1, 0, -1):
            _add_pair(line, pixels[rows[at - i]], pixels[rows[at + i]], down[i])
        for k in range(len(columns)):
            wide[k] = line[columns[k]]
        at, into = (len(across) - 1) * channels, out[y]
        for k in range(count):
            into[k] = wide[at + k] * across[0]
        for i in range(len(across) - 1, 0, -1):
            before, after = at - i * channels, at + i * channels
            _add_pair(into, wide[before : before + count], wide[after : after + count], across[i])
    return out


@njit
def _add_pair(into, one, other, weight):  # type: ignore[no-untyped-def]
    for k in range(len(into)):
        into[k] += (one[k] + other[k]) * weight


@njit
def _shuffle(photo, reach, times, seed):  # type: ignore[no-untyped-def]
    np.random.seed(seed)
    height, width, _ = photo.shape
    for _ in range(times):
        for y in range(height - reach, reach, -1):
            for x in range(width - reach, reach, -1):
                right = np.random.randint(-reach, reach)
                down = np.random.randint(-reach, reach)
                for channel in range(3):  # the package's swap of two views leaves the neighbour as it is, too
                    photo[y, x, channel] = photo[y + down, x + right, channel]


@njit
def _moved(pixels, down, right):  # type: ignore[no-untyped-def]
    height, width, _ = pixels.shape
    out = np.empty_like(pixels)
    for y in range(height):
        for x in range(width):
            above, below, up, low = _around(y + np.float64(down[y, x]), height)
            left, after, near, far = _around(x + np.float64(right[y, x]), width)
            for channel in range(3):
                out[y, x, channel] = np.float32(
                    pixels[above, left, channel] * up * near
                    + pixels[above, after, channel] * up * far
                    + pixels[below, left, channel] * low * near
                    + pixels[below, after, channel] * low * far
                )
    return out


@njit
def _around(at, size):  # type: ignore[no-untyped-def]
    if at < 0:
        at = -at % (2 * size)
        at = at - 1 if at <= size else 2 * size - at
    elif at > size - 1:
        at %= 2 * size
        at = at if at < size else 2 * size - at - 1
    low = math.floor(at)
    near = 1 - (at - low)
    return max(low, 0), min(low + 1, size - 1), near, 1 - near


FASTER: Mapping[str, Callable[[Photo, int, int], Photo]] = MappingProxyType(
    {
        "impulse_noise": impulse_noise,
        "defocus_blur": defocus_blur,
        "glass_blur": glass_blur,
        "motion_blur": motion_blur,
        "zoom_blur": zoom_blur,
        "snow": snow,
        "brightness": brightness,
        "contrast": contrast,
        "elastic_transform": elastic_transform,
    }
)
