"""Three of the published corruptions, bit by bit as the package makes them, in a fraction of its time.

They took three fifths of that of all 15. A photo is `uint8 [H, W, 3]` RGB with sides of 32 px and more.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numba import njit
from scipy.ndimage import map_coordinates
from skimage.filters import gaussian

from detguard.photos import Photo

# By severity: what is added to the value; how far pixels wander; up to where the photo is enlarged, and in which steps.
ADDED = (0.1, 0.2, 0.3, 0.4, 0.5)
WANDERED = (250 * 0.05, 250 * 0.065, 250 * 0.085, 250 * 0.1, 250 * 0.12)
ZOOMS = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))


def brightness(photo: Photo, severity: int) -> Photo:
    """More of the value of hue, saturation and value; scikit-image's conversions there and back, pixel by pixel."""
    made: Photo = _brighter(photo, ADDED[severity - 1])
    return made


def elastic_transform(photo: Photo, severity: int) -> Photo:
    """Pixels that wander with their neighbours, by numpy's global generator; channel by channel, not as a volume."""
    pixels = np.array(photo, np.float32) / 255.0
    height, width = photo.shape[:2]
    sigma, most = np.array((height, width)) * 0.01, height * 0.005
    right, down = (
        (gaussian(np.random.uniform(-most, most, (height, width)), sigma, mode="reflect", truncate=3)
         * WANDERED[severity - 1]).astype(np.float32)
        for _ in range(2)
    )  # fmt: skip
    places = np.stack([np.arange(height)[:, None] + down, np.arange(width) + right])
    channels = (np.ascontiguousarray(pixels[..., channel]) for channel in range(3))
    moved = [map_coordinates(channel, places, order=1, mode="reflect") for channel in channels]
    return (np.clip(np.stack(moved, -1), 0, 1) * 255).astype(np.uint8)


def zoom_blur(photo: Photo, severity: int) -> Photo:
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
    return (np.clip((pixels + total) / (len(factors) + 1), 0, 1) * 255).astype(np.uint8)


def _between(count: int, enlarged: int, size: int, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Between which two of `count` lines, from `first` on, each of `size` lies when they are `enlarged`, and how much
    of each it has: of none, where rounding takes it beyond the last one, as SciPy's `zoom` has it.
    """
    at = np.arange(size) * ((count - 1) / (enlarged - 1) if enlarged > 1 else 0.0)
    low, inside = np.minimum(at.astype(np.int64), count - 1), at <= count - 1
    share = np.clip(at - low, 0, 1)
    return low + first, np.minimum(low + 1, count - 1) + first, (1 - share) * inside, share * inside


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
    height, width, _ = total.shape
    count = width * 3
    first, second = np.empty(count), np.empty(count)
    first_is = second_is = -1
    for y in range(height):
        if above[y] != first_is:
            if above[y] == second_is:  # a line further down: what was below is above
                first, second = second, first
                first_is, second_is = second_is, first_is
            else:
                _line(photo[above[y]], left, right, near, far, first)
                first_is = above[y]
        if below[y] != second_is:
            _line(photo[below[y]], left, right, near, far, second)
            second_is = below[y]
        into = total[y].reshape(count)
        for k in range(count):
            into[k] += np.float32(first[k] * up[y] + second[k] * down[y])


@njit
def _line(pixels, left, right, near, far, into):  # type: ignore[no-untyped-def]
    for x in range(len(far)):
        for channel in range(3):
            into[3 * x + channel] = pixels[left[x], channel] * near[x] + pixels[right[x], channel] * far[x]


FASTER: Mapping[str, Callable[[Photo, int], Photo]] = MappingProxyType(
    {"brightness": brightness, "elastic_transform": elastic_transform, "zoom_blur": zoom_blur}
)
