"""Ways of showing a data set to a detector, and what it finds then, photo by photo, kept in the cache.

A view is a protocol's smallest piece: the photos as they are, one corruption, one set of attacks. Photos of one frame
shape go through in fixed batches, each written to the cache whole, so that a killed run ends as an unbroken one.
"""

import hashlib
import json
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import chain
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import override

from detguard import DetguardError, defaults
from detguard.data.ahead import ahead
from detguard.data.dataset import Dataset
from detguard.data.entries import LOST
from detguard.detections import Detections
from detguard.detectors.base import Detector
from detguard.engine import cores, free_memory
from detguard.evaluation.cache import Cache, entry_key, foreign, pack, unpack
from detguard.evaluation.corruptions import corrupt, read_pipeline, through
from detguard.files import MAX_PHOTO, FileError, read_file
from detguard.photos import Photo, PhotoError, photo_seed, read_photo
from detguard.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from albumentations import Compose

# As COCO is scored: every candidate down to this confidence, each class on its own.
LOWEST_CONFIDENCE = 0.001
# Boxes that a user would see.
SHOWN_CONFIDENCE = 0.25
# From how many altered photos on processes make them, how many at most, what one takes for each pixel, and how long.
MANY, MOST_WORKERS, PIXEL_BYTES, PATIENCE = 64, 16, 256, 3600.0
# Photos that a process that alters them has at hand, each to be altered in many ways.
READ = 8
# What photos that are made ahead may take in all, and how far these processes stand back behind the model.
AHEAD_BYTES, NICENESS = 512 << 20, 10
# Fog and frost make squares of the longer side, fog of the next power of two: by the longest, 4 GiB.
FOG_BYTES, LONGEST_SIDE = 14, 1 << 14


@dataclass(eq=False)
class Subject:
    """One detector on one data set, with its name in tables.

    category_ids: the detector's class index -> category; batch: photos that go through it together.
    """

    name: str
    detector: Detector
    dataset: Dataset
    category_ids: dict[int, int]
    cache: Cache
    batch: int = defaults.Evaluate.batch

    @cached_property
    def state(self) -> list[object]:
        """All that its detections depend on but the photo."""
        detector = self.detector
        return [detector.state_hash(), detector.imgsz, detector.end_to_end, detector.device.type, detector.iou]

    @cached_property
    def hashes(self) -> dict[int, str]:
        """Image id -> hash of its file; photos that cannot be read are taken out of the data set."""
        hashes: dict[int, str] = {}
        for image, file in list(self.dataset.files.items()):
            try:
                hashes[image] = hashlib.sha256(read_file(file, MAX_PHOTO)).hexdigest()
            except FileError as error:
                self.dataset.drop(image, str(error))
        return hashes

    @property
    def photos_sha256(self) -> str:
        """Hash of all photos and of their objects that are evaluated: what figures must share to be compared."""
        annotations, digest = self.dataset.annotations, hashlib.sha256()
        names = {c: name for c, name in self.dataset.categories.items() if c in self.category_ids.values()}
        digest.update(json.dumps(sorted(names.values())).encode())
        for image in sorted(self.dataset.files):
            labelled = [a for a in annotations.imgToAnns.get(image, []) if a["category_id"] in names]
            objects = sorted([names[a["category_id"]], a["bbox"], a["iscrowd"]] for a in labelled)
            digest.update(json.dumps([self.hashes[image], objects]).encode())
        return digest.hexdigest()

    @cached_property
    def labels(self) -> dict[int, str]:
        """Image id -> hash of its labelled objects."""
        return {
            image: hashlib.sha256(o.boxes.numpy().tobytes() + o.classes.numpy().tobytes()).hexdigest()
            for image in self.dataset.files
            for o in [self.objects(image)]
        }

    def objects(self, image: int) -> Detections:
        """The labelled objects of a photo, in the detector's classes."""
        return self.dataset.objects(image, self.category_ids)

    def detect(self, photos: Sequence[Photo]) -> list[Detections]:
        """Detections as COCO scores them: down to the lowest confidence, a candidate for every class that it has."""
        return self.detector.detect(photos, LOWEST_CONFIDENCE, multi_label=True)

    def batches(self) -> list[list[int]]:
        """Image ids in batches of one frame shape, the same in every run."""
        shapes: dict[tuple[int, int], list[int]] = {}
        for image in [image for image in self.hashes if image in self.dataset.files]:
            entry = self.dataset.annotations.imgs[image]
            try:
                frame = self.detector.letterbox((entry["height"], entry["width"])).frame
            except DetguardError as error:  # a shape that it does not take
                self.dataset.drop(image, f"{self.dataset.files[image]}: {error}")
            else:
                shapes.setdefault(frame, []).append(image)
        batch = self.batch
        return [ids[i : i + batch] for _, ids in sorted(shapes.items()) for i in range(0, len(ids), batch)]


@dataclass
class Batch:
    """Photos that go through the detector together; read when first needed.

    makers: the processes that alter them ahead, if there are any.
    """

    subject: Subject
    images: list[int]
    makers: "Makers | None" = None

    @cached_property
    def photos(self) -> list[Photo]:
        """The photos of the batch as they are in their files."""
        return [self._read(image) for image in self.images]

    def _read(self, image: int) -> Photo:
        return read_photo(self.subject.dataset.files[image], self.subject.hashes[image])

    def drop_unreadable(self) -> None:
        """Take the photos that cannot be read out of the batch and its data set."""
        self.photos = self.made(self._read)

    def made(self, make: Callable[[int], Photo]) -> list[Photo]:
        """What is made of each photo; those that nothing can be made of are taken out of the batch and its data set."""
        made = dict[int, Photo]()
        for image in self.images:
            try:
                made[image] = make(image)
            except PhotoError as error:
                self.subject.dataset.drop(image, str(error))
        if len(made) < len(self.images):
            self.images = list(made)
            for of_all in ("photos", "objects"):
                vars(self).pop(of_all, None)
        return list(made.values())

    @cached_property
    def objects(self) -> list[Detections]:
        """The labelled objects of each photo of the batch."""
        return [self.subject.objects(image) for image in self.images]


class View(ABC):
    """One way of showing photos. Its fields say all that its photos depend on but photo and detector."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called while it is shown; unique within a run."""

    @property
    def cost(self) -> int:
        """Forward passes per photo, a backward counted as two."""
        return 1

    @abstractmethod
    def show(self, batch: Batch) -> list[Photo]:
        """The photos of a batch as the detector is to see them."""

    def spec(self) -> object:
        """The view in full, as JSON holds it."""
        return [type(self).__name__, asdict(self)]  # type: ignore[call-overload]

    def depends_on(self, subject: Subject, image: int) -> object:
        """What an entry of the cache depends on beside the photo, the detector and the fields of the view."""
        return None

    def entries(self, batch: Batch) -> list[dict[str, bytes]]:
        """What the cache keeps of each photo of the batch, by part."""
        return [{"": pack(found)} for found in batch.subject.detect(self.show(batch))]

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the cache entry that `entries` makes; a plain view has one without a name."""
        return ("",)

    def key(self, subject: Subject, image: int, part: str = "") -> str:
        """The cache's key of one part of one photo."""
        return entry_key(
            view=self.spec(),
            photo=subject.hashes[image],
            detector=subject.state,
            depends_on=self.depends_on(subject, image),
            part=part,
        )

    def cached(self, subject: Subject, image: int) -> bool:
        """Whether all parts of one photo are in the cache."""
        return all(self.key(subject, image, part) in subject.cache for part in self.parts)

    def kept(self, subject: Subject, image: int, part: str = "") -> bytes:
        """What the cache keeps of one part of one photo.

        Raises:
            DetguardError: it is not there any more.
        """
        data = subject.cache.get(self.key(subject, image, part))
        if data is None:
            raise DetguardError(f"{subject.cache.file}: entries of this run were taken away; run it again")
        return data

    def load(self, subject: Subject, image: int, part: str = "") -> Detections:
        """What was found on one photo, from the cache.

        Raises:
            DetguardError: as `kept` and `unpack`, or it is of a detector of other experts.
        """
        found = unpack(self.kept(subject, image, part))
        experts = subject.detector.experts
        if experts and found.experts is not None and len(found.experts) != len(experts):
            raise foreign("experts", subject.cache.file)
        return found


@dataclass(frozen=True)
class Clean(View):
    """The photos as they are."""

    @property
    @override
    def name(self) -> str:
        return "clean"

    @override
    def show(self, batch: Batch) -> list[Photo]:
        return batch.photos


class Altered(View):
    """Each photo becomes another one, whatever detector looks: slow, so that processes do it ahead."""

    seed: int

    @abstractmethod
    def alter(self, photo: Photo, seed: int) -> Photo:
        """What becomes of a photo, which stays as it is; all that is random is drawn by the `seed` of 32 bits.

        Raises:
            DetguardError: it fails on this photo.
        """

    def altered(self, photo: Photo, file: Path, sha256: str) -> Photo:
        """What becomes of the photo of a file, by a seed of its own.

        Raises:
            PhotoError: it fails on this photo.
        """
        try:
            return self.alter(photo, photo_seed(f"{sha256}/{self.name}", self.seed) % 2**32)
        except DetguardError as error:
            raise PhotoError(f"{file}: {error}") from error

    @override
    def show(self, batch: Batch) -> list[Photo]:
        if batch.makers:
            return batch.made(partial(batch.makers.photo, self))
        photos, subject = dict(zip(batch.images, batch.photos, strict=True)), batch.subject
        return batch.made(
            lambda image: self.altered(photos[image], subject.dataset.files[image], subject.hashes[image])
        )


@dataclass(frozen=True)
class Corrupted(Altered):
    """The photos under one of the published corruptions."""

    kind: str
    severity: int
    seed: int

    @property
    @override
    def name(self) -> str:
        return f"{self.kind}-{self.severity}"

    @override
    def alter(self, photo: Photo, seed: int) -> Photo:
        return corrupt(photo, self.kind, self.severity, seed)


@dataclass(frozen=True)
class Piped(Altered):
    """The photos after a pipeline of the user's own, of which `digest` is that of its settings."""

    digest: str
    seed: int
    pipeline: "Compose" = field(compare=False, repr=False)

    @property
    @override
    def name(self) -> str:
        return "own corruption"

    @override
    def spec(self) -> object:
        return [type(self).__name__, self.digest, self.seed]

    @override
    def alter(self, photo: Photo, seed: int) -> Photo:
        return through(self.pipeline, photo, seed)


def piped(file: str, seed: int) -> Piped:
    """The view of a pipeline's file.

    Raises:
        DetguardError: it cannot be used.
    """
    pipeline = read_pipeline(file)
    return Piped(hashlib.sha256(repr(pipeline.to_dict()).encode()).hexdigest(), seed, pipeline)


# A view and a photo as it is wanted in it, by its number in the data set.
Wanted = tuple[Altered, int]


class Makers:
    """Processes that alter photos ahead of `fill`, in the order in which it asks for them.

    largest: bytes of the largest photo; depth, niceness: as of `ahead`.
    """

    def __init__(
        self, subject: Subject, wanted: Sequence[Wanted], workers: int, largest: int, depth: int, niceness: int
    ) -> None:
        for kind in {view.kind for view, _ in wanted if isinstance(view, Corrupted)}:
            corrupt(np.zeros((32, 32, 3), np.uint8), kind, 1, 0)  # imports and compiles, once for all processes
        jobs = [(view, subject.dataset.files[image], subject.hashes[image]) for view, image in wanted]
        # A place for each that is made ahead, and one for that which is taken. Through pipes photos took four times as
        # long; a map of no file needs none of the shared memory that containers have little of.
        self._places = np.frombuffer(mmap(-1, (workers * depth + 1) * largest), np.uint8).reshape(-1, largest)
        make = partial(_made, jobs, self._places)
        self._made = ahead(make, 0, len(jobs), workers, PATIENCE, depth=depth, niceness=niceness)
        first = next(self._made)  # they are started by it, and go on while all else is done
        self._wanted = zip(wanted, chain([first], self._made), strict=False)

    @classmethod
    def of(cls, subject: Subject, wanted: Sequence[Wanted], local: int = 1) -> "Makers | None":
        """As many as processors and memory allow; None: it is not worth it, or there is no fork that shares all.

        local: how many processes share the machine by this.
        """
        entries = (subject.dataset.annotations.imgs[image] for image in {image for _, image in wanted})
        sizes = [(entry["height"], entry["width"]) for entry in entries]
        each = max((bytes_of(*size) for size in sizes), default=1)
        free = free_memory()
        workers = min(cores() // local, MOST_WORKERS, MOST_WORKERS if free is None else free // 2 // each // local)
        if len(wanted) < MANY or workers < 2 or sys.platform != "linux":
            return None
        largest = max(3 * height * width for height, width in sizes)
        most = AHEAD_BYTES if free is None else min(AHEAD_BYTES, free // 8 // local)
        niceness = NICENESS if local == 1 else 0  # or those of one process would wait for the models of others
        return cls(subject, wanted, workers, largest, max(2, most // largest // workers), niceness)

    def photo(self, view: Altered, image: int) -> Photo:
        """The next one; those before it that are not asked for, as they cannot be read, are passed over.

        Raises:
            PhotoError: it cannot be made.
            AheadError: the processes cannot be kept alive.
        """
        made = next(made for wanted, made in self._wanted if wanted == (view, image))
        if isinstance(made, str):
            raise PhotoError(made)
        place, shape = made
        return self._places[place, : math.prod(shape)].reshape(shape).copy()

    def close(self) -> None:
        """End the processes that make photos ahead."""
        self._made.close()


def bytes_of(height: int, width: int) -> int:
    """What a process takes at most that corrupts a photo; fog makes a square map of a power of two."""
    return max(PIXEL_BYTES * height * width, FOG_BYTES * 4 ** math.ceil(math.log2(max(height, width))))


@lru_cache(READ)
def _read(file: Path, sha256: str) -> Photo:
    return read_photo(file, sha256)


def _made(
    jobs: Sequence[tuple[Altered, Path, str]], places: np.ndarray, number: int
) -> tuple[int, tuple[int, ...]] | str:
    """The place to which an altered photo was written, and its shape; or why there is none."""
    view, file, sha256 = jobs[number]
    try:
        photo = view.altered(_read(file, sha256), file, sha256)
    except PhotoError as error:
        return str(error)
    place = number % len(places)
    places[place, : photo.size] = photo.ravel()
    return place, photo.shape


def fill(
    subject: Subject,
    views: Sequence[View],
    on_batch: Callable[[View, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Have in the cache what `views` show of every photo; what is there already is not done again.

    A photo that cannot be read, or on which a pipeline fails, is taken out of the data set, with a warning there.
    on_batch: called with each view and how many photos of it are done, by all processes; ranks: each does its share.

    Raises:
        DetguardError: no photo can be read.
    """
    if any(isinstance(view, Corrupted) for view in views):
        for image, file in list(subject.dataset.files.items()):
            entry = subject.dataset.annotations.imgs[image]
            if max(entry["height"], entry["width"]) > LONGEST_SIDE:
                subject.dataset.drop(image, f"{file}: over {LONGEST_SIDE} px long, too long to be corrupted")
    if ranks.count > 1:  # with others to show, processes would wait for each other in different places
        data, photos = subject.dataset.name, len(subject.hashes)
        ranks.must_agree([f"{data}: {photos} photos, of which SHA-256 begins with {subject.photos_sha256[:8]}"])
    batches = subject.batches()

    def on_own(view: View, photos: int) -> None:
        if on_batch:
            on_batch(view, ranks.count * photos)

    _show(subject, views, batches[ranks.rank :: ranks.count], on_own, ranks)
    if ranks.count > 1:
        _exchange(subject, views, batches, ranks)
        # Found in the cache; but each must know which photos cannot be read, or later batches would not be the same.
        others = [images for number, images in enumerate(batches) if number % ranks.count != ranks.rank]
        _show(subject, views, others, ranks=ranks)
    if not subject.dataset.files:
        faults = subject.dataset.warnings
        why = faults[LOST][-1] if faults[LOST] else faults.first
        raise DetguardError(f"{subject.dataset.name}: no photo is left ({why})")


def _exchange(subject: Subject, views: Sequence[View], batches: list[list[int]], ranks: Ranks) -> None:
    """Wait for what all have made; of several machines, whose caches are files of their own, each gets it."""
    shares = [[image for images in batches[rank :: ranks.count] for image in images] for rank in range(ranks.count)]
    for place in range(max(map(len, shares)) if ranks.local < ranks.count else 0):  # few at once, for their photos
        made = [
            (key, blob)
            for image in shares[ranks.rank][place : place + 1]
            for view in views
            for key in (view.key(subject, image, part) for part in view.parts)
            if (blob := subject.cache.get(key)) is not None
        ]
        found = ranks.gathered(made)
        if ranks.rank % ranks.local == 0:  # one on each machine
            subject.cache.put(pair for pair in found if pair[0] not in subject.cache)
    ranks.wait()


def _show(
    subject: Subject,
    views: Sequence[View],
    batches: list[list[int]],
    on_batch: Callable[[View, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Have in the cache what `views` show of some batches."""
    # First a pipeline, which may fail on photos: they are then in no view. What else is altered last: the processes
    # that do so have as long as the attacks take.
    views = sorted(views, key=lambda view: 0 if isinstance(view, Piped) else 2 if isinstance(view, Altered) else 1)
    lacking = [{view: {i for i in images if not view.cached(subject, i)} for view in views} for images in batches]
    # The whole batch again, so that what is missing comes out as it would have without the rest cached.
    wanted = [
        (view, image)
        for images, missing in zip(batches, lacking, strict=True)
        for view in views
        if isinstance(view, Altered) and missing[view]
        for image in images
    ]
    with closing(makers) if (makers := Makers.of(subject, wanted, ranks.local)) else nullcontext():
        for images, missing in zip(batches, lacking, strict=True):
            batch = Batch(subject, images, makers)
            if any(missing.values()):
                batch.drop_unreadable()
            found, kept = list[tuple[str, bytes]](), time.monotonic()
            for view in views:
                if not missing[view].isdisjoint(batch.images):
                    entries = view.entries(batch)  # which may take photos out of the batch
                    for image, parts in zip(batch.images, entries, strict=True):
                        if image in missing[view]:
                            found += [(view.key(subject, image, part), blob) for part, blob in parts.items()]
                if found and time.monotonic() > kept + 5:  # to put each by itself costs more
                    subject.cache.put(found)
                    found, kept = [], time.monotonic()
                if on_batch:
                    on_batch(view, len(images))
            if found:
                subject.cache.put(found)


def results_of(subject: Subject, view: View, part: str = "") -> Iterator[tuple[int, Detections]]:
    """Image id and detections of every photo, from the cache."""
    for image in subject.dataset.files:
        yield image, view.load(subject, image, part)
