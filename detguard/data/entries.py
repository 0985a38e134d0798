"""What readers of annotations share: paths, photos and boxes of a data file, checked, and what was wrong with them."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from detguard import DetguardError
from detguard.photos import PhotoError, photo_size

# Of faults of one kind, so many places are kept.
MOST_PLACES = 1000
# Objects of one photo that are taken: attacks and trainings hold each beside every candidate.
MOST_OBJECTS = 10_000
CROWDED = f"objects beyond the first {MOST_OBJECTS:,} of a photo, left out"
# The kind of warning that means that the figures are of fewer photos than the data set has.
LOST = "photos missing or unreadable, left out"


class DataError(DetguardError):
    """A data set that cannot be used; the message names the file and, where there is one, the line or entry."""


class Image(TypedDict):
    """A photo in COCO's form; date_captured: when it was taken, where the data say it."""

    id: int
    file_name: str
    width: int
    height: int
    date_captured: NotRequired[str]


class Annotation(TypedDict):
    """An object in COCO's form. bbox: x, y, width, height, and area, in pixels of the photo; iscrowd: 0 or 1."""

    id: int
    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int


class Category(TypedDict):
    """A class in COCO's form."""

    id: int
    name: str


class Instances(TypedDict):
    """A data set in COCO's form."""

    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]


class Places(list[str]):
    """Where a fault was found: the first MOST_PLACES, of so many in `total`."""

    total = 0

    def add(self, where: str) -> None:
        """Count one more."""
        self.total += 1
        if self.total <= MOST_PLACES:
            self.append(where)


class Faults(dict[str, Places]):
    """Faults that do not stop the reading, by kind."""

    def __missing__(self, kind: str) -> Places:
        return Places()

    def add(self, kind: str, where: str) -> None:
        """Count one more of a kind."""
        self.setdefault(kind, Places()).add(where)

    def count(self, kind: str, number: int) -> None:
        """Say how many there are of a kind that names its places itself."""
        self[kind] = Places()
        self[kind].total = number

    @property
    def first(self) -> str:
        """Where the first was found."""
        return next((places[0] for places in self.values() if places), "it lists none")


def inside(root: Path, name: str, file: Path) -> Path:
    """The path `name`, as `file` gives it, under `root`.

    Raises:
        DataError: it leads out of `root`.
    """
    top = Path(os.path.normpath(root.absolute()))  # as `name` may be an absolute path where `root` is none
    if "\0" in name or not Path(os.path.normpath(top / name)).is_relative_to(top):
        raise DataError(f"{file}: '{name}' leads out of the data folder {root}")
    return Path(os.path.normpath(root / name))


def upright_size(file: Path) -> tuple[int, int] | None:
    """Width and height of a photo as it is shown, from its header; None where there is no readable image."""
    try:
        return photo_size(file)
    except PhotoError:
        return None  # reading it later says more


def clip(box: Sequence[float], width: int, height: int, where: str, faults: Faults) -> list[float] | None:
    """Box [x, y, w, h] in pixels, cut to the photo; None and a counted fault where nothing is left of it."""
    if not all(math.isfinite(v) for v in box) or box[2] <= 0 or box[3] <= 0:
        faults.add("boxes of no size or not a number, left out", where)
        return None
    x1, y1, x2, y2 = box[0], box[1], box[0] + box[2], box[1] + box[3]
    if x1 >= -1 and y1 >= -1 and x2 <= width + 1 and y2 <= height + 1:
        return list(box)  # untouched, so that official annotations score as they do elsewhere
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if x2 - x1 <= 1 or y2 - y1 <= 1:
        faults.add("boxes outside their photo, left out", where)
        return None
    faults.add("boxes partly outside their photo, cut", where)
    return [x1, y1, x2 - x1, y2 - y1]


def annotation(number: int, image_id: int, category: int, box: list[float], area: float, crowd: int = 0) -> Annotation:
    """An object in COCO's form, numbered from 1: pycocotools takes one of id 0 for one that was never matched."""
    return {
        "id": number + 1,
        "image_id": image_id,
        "category_id": category,
        "bbox": box,
        "area": area,
        "iscrowd": crowd,
    }


def file_name(entry: object, file: Path) -> str:
    """A path, as a yaml gives it.

    Raises:
        DataError: it is no text.
    """
    if not isinstance(entry, str):
        raise DataError(f"{file}: {entry!r:.50} is no name of a file or folder")
    return entry
