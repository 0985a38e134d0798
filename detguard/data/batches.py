"""Training batches: photos randomly cropped, flipped, stretched, toned and tiled, the same for the same seed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detguard import DetguardError
from detguard.data.ahead import ahead
from detguard.data.corruptions import KINDS, SEVERITIES, corrupt
from detguard.data.stream import Labelled
from detguard.detections import Detections
from detguard.photos import PADDING_LEVEL, Letterbox, Photo, read_photo

# Photos are kept decoded; larger ones would be shrunk to a frame anyway.
KEPT_SIDE = 1.5
# An object of which less is left in a frame is not labelled there.
VISIBLE = 0.3
MOSAIC_SHARE = 0.3


@dataclass(frozen=True)
class PhotoSet:
    """Decoded photos and how likely each is drawn; probabilities sum to 1.

    labels: of each photo, boxes in its pixels as it is kept here; empty where photos have none. plain: photos are shown
    at the size at which a detector sees them, padded to squares and mirrored at random: an attack, for one, does not
    outlast being resized.
    """

    photos: list[Photo]
    probability: NDArray[np.float64]
    labels: Sequence[Labelled] = ()
    plain: bool = False


def read_photos(
    folders: Sequence[tuple[Sequence[Path] | Sequence[Labelled], float]], size: int, plain: bool = False
) -> tuple[PhotoSet, list[str]]:
    """Decode photos, given as lists with the share of a batch that each list has, for frames of `size` pixels.

    Returns the set, with labels if the photos have them, and a message for each photo that cannot be read.

    Raises:
        DetguardError: no photo can be read.
    """
    photos: list[Photo] = []
    labels: list[Labelled] = []
    probability: list[float] = []
    broken: list[str] = []
    for shown, share in folders:
        before = len(photos)
        for entry in shown:
            try:
                photo = read_photo(entry.file if isinstance(entry, Labelled) else entry)
            except DetguardError as error:
                broken.append(str(error))
                continue
            kept = _shrunk(photo, size, plain)
            if isinstance(entry, Labelled):
                scale = torch.tensor([kept.shape[1] / photo.shape[1], kept.shape[0] / photo.shape[0]] * 2)
                labels.append(replace(entry, objects=replace(entry.objects, boxes=entry.objects.boxes * scale)))
            photos.append(kept)
        count = len(photos) - before
        probability += [share / count] * count if count else []
    if not photos:
        raise DetguardError(broken[0] if broken else "no photos to train on")
    p = np.array(probability)
    return PhotoSet(photos, p / p.sum(), labels, plain), broken


def _shrunk(photo: Photo, size: int, plain: bool) -> Photo:
    if plain:
        height, width = (letterbox := Letterbox.fit(photo.shape[:2], size)).resized
        top, left = letterbox.offset
        return letterbox(photo)[top : top + height, left : left + width]
    scale = max(KEPT_SIDE * size / max(photo.shape[:2]), 1 / min(photo.shape[:2]))  # or nothing of it would be left
    if scale >= 1:
        return photo
    return cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


@dataclass(frozen=True)
class Drawn:
    """Where a photo lies in a frame. photo: its number; matrix: float64 [2, 3], from the middles of its pixels to those
    of the frame, as OpenCV counts; part: xyxy, frame pixels, of what it was drawn on.
    """

    photo: int
    matrix: NDArray[np.float64]
    part: tuple[int, int, int, int]


def augment(
    photo: Photo, canvas: Photo, rng: np.random.Generator, wide: float, zoom: float = 1.0
) -> NDArray[np.float64]:
    """Draw a randomly flipped, stretched, scaled, shifted and toned `photo` onto `canvas`, `uint8 [S, S, 3]`.

    wide: at most so many canvases wide, times `zoom`: of a larger photo, the canvas shows a part. Returns the matrix
    from pixels of the photo to those of the canvas, [2, 3].
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
    return matrix


def show(photo: Photo, canvas: Photo, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw a `photo` no larger than `canvas` in its middle, mirrored at random; returns the matrix like `augment`."""
    h, w = photo.shape[:2]
    top, left = (canvas.shape[0] - h) // 2, (canvas.shape[1] - w) // 2
    mirrored = rng.random() < 0.5
    canvas[top : top + h, left : left + w] = photo[:, ::-1] if mirrored else photo
    return np.array([[-1 if mirrored else 1, 0, left + (w - 1) * mirrored], [0, 1, top]], np.float64)


def draw_frames(
    source: PhotoSet,
    count: int,
    size: int,
    rng: np.random.Generator,
    zoom: float = 1.0,
    on_frame: Callable[[], None] = lambda: None,
) -> tuple[NDArray[np.uint8], list[list[Drawn]]]:
    """Random training frames, uint8 [count, size, size, 3] RGB, and the photos in each; some are mosaics of four.

    zoom: photos drawn so many times larger, so that small frames show parts of them at the scale of large frames;
    on_frame: called after each.
    """
    frames = np.full((count, size, size, 3), PADDING_LEVEL, np.uint8)
    drawn: list[list[Drawn]] = [[] for _ in frames]

    def draw(canvas: Photo, into: list[Drawn], x: int, y: int, wide: float) -> None:
        number = int(rng.choice(len(source.photos), p=source.probability))
        photo, side = source.photos[number], canvas.shape[0]
        matrix = show(photo, canvas, rng) if source.plain else augment(photo, canvas, rng, wide, zoom)
        into.append(Drawn(number, matrix + np.array([[0, 0, x], [0, 0, y]]), (x, y, x + side, y + side)))

    for canvas, into in zip(frames, drawn, strict=True):
        if not source.plain and rng.random() < MOSAIC_SHARE:  # more and smaller objects
            half = size // 2
            for y in (0, half):
                for x in (0, half):
                    tile = np.full((half, half, 3), PADDING_LEVEL, np.uint8)
                    draw(tile, into, x, y, 2.2)
                    canvas[y : y + half, x : x + half] = tile
        else:
            draw(canvas, into, 0, 0, 1.7)
        on_frame()
    return frames, drawn


def make_frames(
    source: PhotoSet, count: int, size: int, rng: np.random.Generator, zoom: float = 1.0
) -> NDArray[np.uint8]:
    """The frames of `draw_frames`."""
    return draw_frames(source, count, size, rng, zoom)[0]


def labels_of(drawn: Sequence[Drawn], labels: Sequence[Labelled]) -> Labelled:
    """The labels of a frame: those of its photos where they lie now; objects of which too little is left are not there.

    Only classes that all its photos are labelled for are known.
    """
    parts: list[Detections] = []
    for one in drawn:
        objects = labels[one.photo].objects
        x1, y1, x2, y2 = objects.boxes.double().unbind(1)
        (sx, _, dx), (_, sy, dy) = one.matrix
        dx, dy = dx + (1 - sx) / 2, dy + (1 - sy) / 2  # of edges, which lie half a pixel before the middles
        corners = torch.stack([x1 * sx + dx, y1 * sy + dy, x2 * sx + dx, y2 * sy + dy], 1).unflatten(1, (2, 2))
        whole = torch.cat([corners.amin(1), corners.amax(1)], 1)
        low, high = torch.tensor(one.part[:2] * 2), torch.tensor(one.part[2:] * 2)
        left = whole.maximum(low).minimum(high)
        visible = _area(left) > VISIBLE * _area(whole)
        parts.append(replace(objects, boxes=left.float())[visible])
    known = [set(k) for one in drawn if (k := labels[one.photo].known) is not None]
    objects = Detections(*(torch.cat([getattr(p, name) for p in parts]) for name in ("boxes", "scores", "classes")))
    frame = Labelled(labels[drawn[0].photo].file, objects, tuple(sorted(set.intersection(*known))) if known else None)
    return replace(frame, objects=frame.counted(objects))


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def make_hard(
    frames: NDArray[np.uint8],
    rng: np.random.Generator,
    kinds: Sequence[str] = tuple(KINDS),
    on_frame: Callable[[], None] = lambda: None,
) -> None:
    """Corrupt each of `frames` in place by a random one of `kinds` at a random severity; call `on_frame` after each."""
    for frame in frames:
        kind, severity = str(rng.choice(list(kinds))), int(rng.choice(SEVERITIES))
        frame[:] = corrupt(frame, kind, severity, int(rng.integers(2**31)))
        on_frame()


@dataclass(frozen=True)
class Batch:
    """Frames, float32 [B, 3, S, S], 0..1, clean; and as they are shown, the first `hard` of them corrupted.

    labels: of each frame, boxes in its pixels, where the photos have some.
    """

    clean: Tensor
    shown: Tensor
    hard: int
    labels: Sequence[Labelled] = ()


# Frames, clean, and the hard ones as they are shown, uint8 [B, S, S, 3]; and the photos in each.
Made = tuple[NDArray[np.uint8], NDArray[np.uint8], list[list[Drawn]]]


@dataclass(frozen=True)
class _Maker:
    """Batches by number, as `batches` says."""

    source: PhotoSet
    count: int
    size: int
    seed: int
    hard: int
    zoom: float
    kinds: Sequence[str]

    def make(self, number: int, on_frame: Callable[[], None]) -> Made:
        rng = np.random.default_rng((self.seed, number))
        clean, drawn = draw_frames(self.source, self.count, self.size, rng, self.zoom, on_frame)
        shown = clean.copy()
        make_hard(shown[: self.hard], rng, self.kinds, on_frame)
        return clean, shown[: self.hard], drawn


def batches(
    source: PhotoSet,
    count: int,
    size: int,
    seed: int,
    first: int,
    last: int,
    hard: int = 0,
    zoom: float = 1.0,
    kinds: Sequence[str] = tuple(KINDS),
) -> Iterator[Batch]:
    """Batches number `first` to `last`, each the same whichever came before it.

    kinds: of the corruptions of hard frames. A process makes them ahead: a thread would hold the interpreter that
    training waits for, which took a quarter of its steps.

    Raises:
        AheadError: that process cannot be kept alive.
    """
    cv2.setNumThreads(1)  # its threads would take turns with torch's, and a forked process would wait for them for ever
    maker = _Maker(source, count, size, seed, hard, zoom, kinds)
    for levels, corrupted, drawn in ahead(maker.make, first, last):
        clean = _frames(levels)
        shown = clean.clone()
        shown[:hard] = _frames(corrupted)
        labels = [labels_of(photos, source.labels) for photos in drawn] if source.labels else ()
        yield Batch(clean, shown, hard, labels)


def _frames(levels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(levels).permute(0, 3, 1, 2).float().div_(255)
