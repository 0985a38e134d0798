"""Labelled photos in the order in which they came."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from detguard.data.dataset import TIME, DataError, Dataset
from detguard.detections import Detections


@dataclass(frozen=True)
class Labelled:
    """One photo; objects: its labels as detections of score 1, in the detector's class indices.

    known: the classes that are labelled wherever they are seen; None: all that the detector knows.
    """

    file: Path
    objects: Detections
    known: tuple[int, ...] | None = None

    def counted(self, found: Detections) -> Detections:
        """Those of detections that the labels can tell to be true or false."""
        return found if self.known is None else found.of(self.known)


def in_order(dataset: Dataset, category_ids: dict[int, int]) -> Iterator[Labelled]:
    """The photos of a data set by the time that its json gives all of them, or else in its own order."""
    images = list(dataset.files)
    times = [dataset.annotations.imgs[image].get(TIME) for image in images]
    if all(isinstance(time, str) and time for time in times):
        images = [image for _, image in sorted(zip(times, images, strict=True))]
    for image in images:
        yield Labelled(dataset.files[image], dataset.objects(image, category_ids), tuple(category_ids))


def as_line(photo: Labelled, class_names: dict[int, str]) -> dict[str, Any]:
    """A photo with its objects as `from_lines` takes it."""
    line: dict[str, Any] = {"photo": str(photo.file), "objects": photo.objects.records(class_names)}
    if photo.known is not None and len(photo.known) < len(class_names):
        line["classes"] = [class_names[index] for index in photo.known]
    return line


def from_lines(lines: Iterable[str], class_names: dict[int, str], source: str = "--stream") -> Iterator[Labelled]:
    """Photos from JSON lines: {"photo": "a.jpg", "objects": [{"class": "person", "box": [x1, y1, x2, y2]}]}.

    Boxes in pixels of the photo; objects of classes that the detector does not know are left out. "classes" may list
    those that are labelled, if not all are. source: where the lines are from, for errors.

    Raises:
        DataError: a line is not such an object; names it by its number.
    """
    index = {name: number for number, name in class_names.items()}
    if len(index) < len(class_names):
        raise DataError(f"{source}: the detector has several classes of one name, which labels cannot tell apart")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            found = [(index[o["class"]], _box(o["box"])) for o in record["objects"] if o["class"] in index]
            file = Path(record["photo"])
            if "\0" in record["photo"]:
                raise ValueError("a name with a null byte")
            known = tuple(index[c] for c in record["classes"] if c in index) if "classes" in record else None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{source} line {number}: expected {{"photo": "a.jpg", "objects": [{{"class": "person", '
                f'"box": [x1, y1, x2, y2]}}]}} ({type(error).__name__}: {error})'
            ) from error
        boxes = torch.tensor([box for _, box in found], dtype=torch.float32).reshape(-1, 4)
        classes = torch.tensor([c for c, _ in found], dtype=torch.int64)
        yield Labelled(file, Detections(boxes, torch.ones(len(found)), classes), known)


def _box(values: Sequence[float]) -> list[float]:
    x1, y1, x2, y2 = map(float, values)
    if not (x1 <= x2 and y1 <= y2):
        raise ValueError(f"box {values}")
    return [x1, y1, x2, y2]
