"""Training batches: photos randomly cropped, flipped, stretched, toned and tiled, the same for the same seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detguard import DetguardError
from detguard.data.corruptions import KINDS, SEVERITIES, corrupt
from detguard.photos import PADDING_LEVEL, Photo, read_photo

# Photos are kept decoded; larger ones would be shrunk to a frame anyway.
KEPT_SIDE = 1.5
MOSAIC_SHARE = 0.3
AHEAD = 4


@dataclass(frozen=True)
class PhotoSet:
    """Decoded photos and how likely each is drawn; probabilities sum to 1."""

    photos: list[Photo]
    probability: NDArray[np.float64]


def read_photos(folders: Sequence[tuple[Sequence[Path], float]], size: int) -> tuple[PhotoSet, list[str]]:
    """Decode files, given as lists with the share of a batch that each list has, for frames of `size` pixels.

    Returns the set and a message for each photo that cannot be read.

    Raises:
        DetguardError: no photo can be read.
    """
    photos: list[Photo] = []
    probability: list[float] = []
    broken: list[str] = []
    for files, share in folders:
        before = len(photos)
        for file in files:
            try:
                photo = read_photo(file)
            except DetguardError as error:
                broken.append(str(error))
                continue
            scale = KEPT_SIDE * size / max(photo.shape[:2])
            if scale < 1:
                shrunk = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
                photo = shrunk.astype(np.uint8, copy=False)
            photos.append(photo)
        count = len(photos) - before
        probability += [share / count] * count if count else []
    if not photos:
        raise DetguardError(broken[0] if broken else "no photos to train on")
    p = np.array(probability)
    return PhotoSet(photos, p / p.sum()), broken


def augment(photo: Photo, canvas: Photo, rng: np.random.Generator, wide: float, zoom: float = 1.0) -> None:
    """Draw a randomly flipped, stretched, scaled, shifted and toned `photo` onto `canvas`, `uint8 [S, S, 3]`.

    wide: at most so many canvases wide, times `zoom`: of a larger photo, the canvas shows a part.
    """
    h, w = photo.shape[:2]
    size = canvas.shape[0]
    scale = zoom * size / max(h, w) * np.exp(rng.uniform(np.log(0.55), np.log(wide)))
    stretch = np.exp(rng.uniform(-0.12, 0.12))
    sx, sy = scale * stretch, scale / stretch
    free_x, free_y = size - w * sx, size - h * sy
    matrix = np.array([[sx, 0, rng.uniform(0, 1) * free_x], [0, sy, rng.uniform(0, 1) * free_y]])
    if rng.random() < 0.5:
        matrix[0] = [-sx, 0, matrix[0, 2] + w * sx]
    if rng.random() < 0.7:
        tone = np.linspace(0, 1, 256) ** np.exp(rng.uniform(-0.4, 0.4)) * rng.uniform(0.7, 1.25)
        channels = tone[:, None] * rng.uniform(0.88, 1.12, 3)
        photo = cv2.LUT(photo, (channels * 255).clip(0, 255).astype(np.uint8)[None]).astype(np.uint8, copy=False)
    interpolation = cv2.INTER_AREA if scale < 0.6 else cv2.INTER_LINEAR
    cv2.warpAffine(photo, matrix, (size, size), dst=canvas, flags=interpolation, borderMode=cv2.BORDER_TRANSPARENT)


def make_frames(
    source: PhotoSet, count: int, size: int, rng: np.random.Generator, zoom: float = 1.0
) -> NDArray[np.uint8]:
    """Random training frames, uint8 [count, size, size, 3] RGB; some are mosaics of four photos.

    zoom: photos drawn so many times larger, so that small frames show parts of them at the scale of large frames.
    """
    frames = np.full((count, size, size, 3), PADDING_LEVEL, np.uint8)

    def draw() -> Photo:
        return source.photos[rng.choice(len(source.photos), p=source.probability)]

    for canvas in frames:
        if rng.random() < MOSAIC_SHARE:  # more and smaller objects
            half = size // 2
            for y in (0, half):
                for x in (0, half):
                    tile = np.full((half, half, 3), PADDING_LEVEL, np.uint8)
                    augment(draw(), tile, rng, 2.2, zoom)
                    canvas[y : y + half, x : x + half] = tile
        else:
            augment(draw(), canvas, rng, 1.7, zoom)
    return frames


def make_hard(frames: NDArray[np.uint8], rng: np.random.Generator, kinds: Sequence[str] = tuple(KINDS)) -> None:
    """Corrupt each of `frames` in place by a random one of `kinds` at a random severity."""
    for frame in frames:
        kind, severity = str(rng.choice(list(kinds))), int(rng.choice(SEVERITIES))
        frame[:] = corrupt(frame, kind, severity, int(rng.integers(2**31)))


@dataclass(frozen=True)
class Batch:
    """Frames, float32 [B, 3, S, S], 0..1, clean; and as they are shown, the first `hard` of them corrupted."""

    clean: Tensor
    shown: Tensor
    hard: int


def batches(
    source: PhotoSet, count: int, size: int, seed: int, first: int, last: int, hard: int = 0, zoom: float = 1.0
) -> Iterator[Batch]:
    """Batches number `first` to `last`, made ahead in a thread; each the same whichever came before it."""
    queue: Queue[Batch | BaseException] = Queue(AHEAD)

    def feed() -> None:
        try:
            for number in range(first, last):
                rng = np.random.default_rng((seed, number))
                clean = make_frames(source, count, size, rng, zoom)
                shown = clean.copy()
                make_hard(shown[:hard], rng)
                queue.put(Batch(_tensor(clean), _tensor(shown), hard))
        except BaseException as error:  # handed over to whoever waits for the batch
            queue.put(error)

    Thread(target=feed, daemon=True).start()
    for _ in range(first, last):
        batch = queue.get()
        if isinstance(batch, BaseException):
            raise batch
        yield batch


def _tensor(frames: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).float() / 255
