"""Training batches: photos randomly cropped, flipped, stretched, toned and tiled, the same for the same seed."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detguard import DetguardError
from detguard.data.ahead import PATIENCE, ahead
from detguard.data.corruptions import KINDS, SEVERITIES, corrupt
from detguard.data.stream import Labelled
from detguard.detections import Detections, box_area
from detguard.engine import cores
from detguard.photos import PADDING_LEVEL, Letterbox, Photo, decode_photo, encode_jpeg, encode_png, read_photo
from detguard.ranks import ALONE, Ranks

# Larger photos are shrunk to so many times the side of a frame, in which they would be anyway, and kept as JPEG.
KEPT_SIDE, KEPT_QUALITY = 1.5, 95
# An object of which less is left in a frame is not labelled there.
VISIBLE = 0.3
MOSAIC_SHARE = 0.3
# Seconds that a frame may take before the process that makes it counts as hung.
OF_FRAME = 1.0


@dataclass(frozen=True)
class PhotoSet:
    """Photos as bytes of image files, and how likely each is drawn.

    data: uint8, all of them, one after the other: as objects of their own, each would be copied for every process that
    reads it; as a tensor, processes share it also where they are no forks. ends: int64 [N], where each ends there;
    probability: float64 [N], sums to 1. labels: of each photo, boxes in its pixels as it is kept here; empty where
    photos have none. plain: photos are shown at the size at which a detector sees them, padded to squares and mirrored
    at random: an attack, for one, does not outlast being resized.
    """

    data: Tensor
    ends: NDArray[np.int64]
    probability: NDArray[np.float64]
    labels: Sequence[Labelled] = ()
    plain: bool = False

    @classmethod
    def of(
        cls,
        photos: Iterable[bytes],
        probability: Sequence[float] | NDArray[np.float64],
        labels: Sequence[Labelled] = (),
        *,
        plain: bool = False,
    ) -> "PhotoSet":
        """A set of image files; probabilities are brought to a sum of 1."""
        data, ends = bytearray(), []
        for photo in photos:
            data += photo
            ends.append(len(data))
        p = np.array(probability, np.float64)
        return cls(torch.frombuffer(data, dtype=torch.uint8), np.array(ends, np.int64), p / p.sum(), labels, plain)

    def __len__(self) -> int:
        return len(self.ends)

    def photo(self, number: int) -> Photo:
        """One of the photos, decoded."""
        start = int(self.ends[number - 1]) if number else 0
        return decode_photo(self.data[start : int(self.ends[number])].numpy().data)

    def draw(self, rng: np.random.Generator) -> int:
        """The number of a photo, drawn by its probability."""
        return min(int(np.searchsorted(self.cumulative, rng.random(), "right")), len(self) - 1)

    @cached_property
    def cumulative(self) -> NDArray[np.float64]:
        """The sums of the probabilities so far: to add them up for every draw takes long with many photos."""
        return np.cumsum(self.probability)


class Samples(NamedTuple):
    """Photos of attacks and the clean ones that they were made of, in the same order, of the same sizes and `plain`.

    The clean ones have the labels.
    """

    attacked: PhotoSet
    clean: PhotoSet


def read_photos(
    folders: Sequence[tuple[Sequence[Path] | Sequence[Labelled], float]], size: int, *, plain: bool = False
) -> tuple[PhotoSet, list[str]]:
    """Read photos, given as lists with the share of a batch that each list has, for frames of `size` pixels.

    Returns the set, with labels if the photos have them, and a message for each photo that cannot be read.

    Raises:
        DetguardError: no photo can be read.
    """
    kept = deque[bytes]()
    labels: list[Labelled] = []
    probability: list[float] = []
    broken: list[str] = []

    def read(entry: Path | Labelled) -> tuple[bytes, Labelled | None] | str:
        file = entry.file if isinstance(entry, Labelled) else entry
        try:
            photo = read_photo(file)
        except DetguardError as error:
            return str(error)
        shown = shrunk(photo, size, plain=plain)
        try:
            data = encode_png(shown) if plain else encode_jpeg(shown, KEPT_QUALITY)
        except DetguardError as error:  # longer than a file of the kind can be
            return f"{file}: {error}"
        if not isinstance(entry, Labelled):
            return data, None
        return data, as_kept(entry, photo, shown)

    with ThreadPoolExecutor(cores()) as pool:
        for shown, share in folders:
            before = len(kept)
            for found in pool.map(read, shown):
                if isinstance(found, str):
                    broken.append(found)
                    continue
                kept.append(found[0])
                labels += [found[1]] if found[1] else []
            count = len(kept) - before
            probability += [share / count] * count if count else []
    if not kept:
        raise DetguardError(broken[0] if broken else "no photos to train on")
    # Each is given up when it is copied, or all would be there twice.
    photos = (kept.popleft() for _ in range(len(kept)))
    return PhotoSet.of(photos, probability, labels, plain=plain), broken


def as_kept(label: Labelled, photo: Photo, shown: Photo) -> Labelled:
    """The labels of a photo that is kept in another size."""
    scale = torch.tensor([shown.shape[1] / photo.shape[1], shown.shape[0] / photo.shape[0]] * 2)
    return replace(label, objects=replace(label.objects, boxes=label.objects.boxes * scale))


def shrunk(photo: Photo, size: int, *, plain: bool) -> Photo:
    """A photo as it is kept for frames of `size` pixels; plain: in the size in which a detector sees it."""
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
    cv2.warpAffine(photo, matrix, (size, size), dst=canvas, borderMode=cv2.BORDER_TRANSPARENT)
    return matrix


def show(photo: Photo, canvas: Photo, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw a `photo` in the middle of `canvas`, mirrored at random; of one that is larger, a random part.

    Returns the matrix like `augment`.
    """
    mirrored = rng.random() < 0.5
    (h, w), size = photo.shape[:2], canvas.shape[0]
    top, left = ((size - side) // 2 if side <= size else -int(rng.integers(side - size + 1)) for side in (h, w))
    shown = (photo[:, ::-1] if mirrored else photo)[max(-top, 0) :, max(-left, 0) :][:size, :size]
    y, x = max(top, 0), max(left, 0)
    canvas[y : y + shown.shape[0], x : x + shown.shape[1]] = shown
    return np.array([[-1 if mirrored else 1, 0, left + (w - 1) * mirrored], [0, 1, top]], np.float64)


def draw_frame(
    source: PhotoSet, size: int, rng: np.random.Generator, zoom: float = 1.0
) -> tuple[NDArray[np.uint8], list[Drawn]]:
    """A random training frame, uint8 [size, size, 3] RGB, and the photos in it; some are mosaics of four.

    zoom: photos drawn so many times larger, so that small frames show parts of them at the scale of large frames.
    """
    frame = np.full((size, size, 3), PADDING_LEVEL, np.uint8)
    drawn: list[Drawn] = []

    def draw(canvas: Photo, x: int, y: int, wide: float) -> None:
        number, side = source.draw(rng), canvas.shape[0]
        photo = source.photo(number)
        matrix = show(photo, canvas, rng) if source.plain else augment(photo, canvas, rng, wide, zoom)
        drawn.append(Drawn(number, matrix + np.array([[0, 0, x], [0, 0, y]]), (x, y, x + side, y + side)))

    if source.plain or rng.random() >= MOSAIC_SHARE:
        draw(frame, 0, 0, 1.7)
        return frame, drawn
    half = size // 2  # more and smaller objects
    for y in (0, half):
        for x in (0, half):
            tile = np.full((half, half, 3), PADDING_LEVEL, np.uint8)
            draw(tile, x, y, 2.2)
            frame[y : y + half, x : x + half] = tile
    return frame, drawn


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
        visible = box_area(left) > VISIBLE * box_area(whole)
        parts.append(replace(objects, boxes=left.float())[visible])
    known = [set(k) for one in drawn if (k := labels[one.photo].known) is not None]
    objects = Detections(*(torch.cat([getattr(p, name) for p in parts]) for name in ("boxes", "scores", "classes")))
    frame = Labelled(labels[drawn[0].photo].file, objects, tuple(sorted(set.intersection(*known))) if known else None)
    return replace(frame, objects=frame.counted(objects))


def make_hard(frame: NDArray[np.uint8], rng: np.random.Generator, kinds: Sequence[str] = tuple(KINDS)) -> Photo:
    """A frame whose photo is corrupted by a random one of `kinds` at a random severity, and whose padding is not."""
    kind, severity = str(rng.choice(list(kinds))), int(rng.choice(SEVERITIES))
    changed = corrupt(frame, kind, severity, int(rng.integers(2**31)))
    return np.where((frame == PADDING_LEVEL).all(2, keepdims=True), frame, changed)


@dataclass(frozen=True)
class Batch:
    """Frames of this process, float32 [B, 3, S, S], 0..1, clean; and as they are shown, the first `hard` corrupted, the
    last from photos of attacks, where some are `Samples`.

    labels: of each frame, boxes in its pixels, where the photos have some.
    """

    clean: Tensor
    shown: Tensor
    hard: int
    labels: Sequence[Labelled] = ()


class Made(NamedTuple):
    """What a process makes of a batch. clean, hard, sampled: uint8 [B, S, S, 3], its first and last frames as shown.

    objects: float64 [N, 6], frame, class and box, as one tensor, or there would be a file open for each; known: of each
    labelled frame.
    """

    clean: Tensor
    hard: Tensor
    sampled: Tensor
    objects: Tensor
    known: list[tuple[int, ...] | None]


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
    ranks: Ranks
    samples: Samples | None
    sampled: int

    def __call__(self, number: int) -> Made:
        clean, hard, sampled, objects, known = list[Photo](), list[Photo](), list[Photo](), list[Tensor](), []
        for i in self.ranks.rows(0, self.count):
            # Of its own for each frame, which is then the same whichever process makes it.
            rng, source = np.random.default_rng((self.seed, number, i)), self.source
            if self.samples and i >= self.count - self.sampled:
                source = self.samples.clean
                again = np.random.default_rng((self.seed, number, i))  # so that it lies where the clean one does
                sampled.append(draw_frame(self.samples.attacked, self.size, again, self.zoom)[0])
            frame, drawn = draw_frame(source, self.size, rng, self.zoom)
            if self.source.labels:
                label = labels_of(drawn, source.labels)
                found, of_frame = label.objects, torch.full((len(label.objects), 1), len(clean))
                objects.append(torch.cat([of_frame, found.classes[:, None], found.boxes], 1).double())
                known.append(label.known)
            clean.append(frame)
            if i < self.hard:
                hard.append(make_hard(frame, rng, self.kinds))
        none = np.zeros((0, self.size, self.size, 3), np.uint8)
        first, second, third = (torch.from_numpy(np.stack(x) if x else none) for x in (clean, hard, sampled))
        return Made(first, second, third, torch.cat(objects) if objects else torch.zeros(0, 6), known)


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
    workers: int = 1,
    ranks: Ranks = ALONE,
    samples: Samples | None = None,
    sampled: int = 0,
) -> Iterator[Batch]:
    """Batches number `first` to `last`, each the same whichever came before it and however many processes make it.

    count: frames of all `ranks` together, of which these are this one's; the first `hard` of all are corrupted by
    `kinds`, the last `sampled` are of `samples`. They are made ahead by `workers` processes: a thread would hold the
    interpreter that training waits for.

    Raises:
        AheadError: those processes cannot be kept alive.
    """
    alone = replace(ranks, control=None)  # a group cannot be sent to workers that are not forks
    maker = _Maker(source, count, size, seed, hard, zoom, kinds, alone, samples, sampled)
    device = ranks.device
    for made in ahead(maker, first, last, workers, PATIENCE + OF_FRAME * count, pinned=device.type == "cuda"):
        clean = _frames(made.clean, device)
        middle = clean[len(made.hard) : len(clean) - len(made.sampled)]
        shown = torch.cat([_frames(made.hard, device), middle, _frames(made.sampled, device)])
        yield Batch(clean, shown.contiguous(memory_format=torch.channels_last), len(made.hard), _labels(made))


def _frames(levels: Tensor, device: torch.device) -> Tensor:
    # Apple's GPUs would read what may be freed by then.
    return levels.to(device, non_blocking=device.type == "cuda").permute(0, 3, 1, 2).float().div_(255)


def _labels(made: Made) -> list[Labelled]:
    labels = []
    for number, known in enumerate(made.known):
        rows = made.objects[made.objects[:, 0] == number]
        objects = Detections(rows[:, 2:].float(), torch.ones(len(rows)), rows[:, 1].long())
        labels.append(Labelled(Path(), objects, known))
    return labels
