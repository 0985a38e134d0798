"""Labelled photos in the order in which they came."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from detguard.classes import check_map
from detguard.data.coco import TIME
from detguard.data.dataset import Dataset
from detguard.data.entries import MOST_OBJECTS, DataError
from detguard.detections import Detections
from detguard.files import MAX_ANNOTATIONS, MAX_LINE, JsonObject, parse_json, read_file

# Objects that one photo may have, bytes of its id, and pixels from its corner that a box may lie.
LONGEST_ID = 200
MOST_PIXELS = 1e9
# Bytes of the name of a file, as systems have them.
LONGEST_NAME = 4096
# Of the name of a class that is not known, and of a time, which are only shown.
MOST_LETTERS = 100


@dataclass(frozen=True)
class Labelled:
    """One photo; objects: its labels as detections of score 1, in the detector's class indices.

    known: the classes that are labelled wherever they are seen; None: all that the detector knows; unknown: of each
    object that is left out, since the detector does not know its class, that class's name.
    id: by which `Labels` that come later name it; labelled: whether none are waited for; time: of the photo, as it was
    given, which is only shown; judges: whether it judges what is learned and is never learned from, None: it is up to
    who learns.
    """

    file: Path
    objects: Detections
    known: tuple[int, ...] | None = None
    unknown: tuple[str, ...] = ()
    id: str = ""
    labelled: bool = True
    time: str = ""
    judges: bool | None = None

    def counted(self, found: Detections) -> Detections:
        """Those of detections that the labels can tell to be true or false."""
        return found if self.known is None else found.of(self.known)


@dataclass(frozen=True)
class Labels:
    """What was labelled of a photo that came before, by its id; the rest is as in `Labelled`."""

    id: str
    objects: Detections
    known: tuple[int, ...] | None = None
    unknown: tuple[str, ...] = ()

    def of(self, photo: Labelled) -> Labelled:
        """Join a photo of a stream and its labels."""
        return replace(photo, objects=self.objects, known=self.known, unknown=self.unknown, labelled=True)


def in_order(dataset: Dataset, category_ids: dict[int, int]) -> Iterator[Labelled]:
    """The photos of a data set by the time that its json gives all of them, or else in its own order."""
    images = list(dataset.files)
    times = [_moment(dataset.annotations.imgs[image].get(TIME)) for image in images]
    known = [time for time in times if time is not None]
    if len(known) == len(images):
        # Those of one moment keep their order.
        images = [images[i] for i in np.argsort(known, kind="stable")]
    elif wrong := sum(bool(dataset.annotations.imgs[image].get(TIME)) for image in images) - len(known):
        dataset.warnings.count(
            f"'{TIME}' that are no times (as 2026-01-31 10:00:00), photos stay as they are listed", wrong
        )
    left_out = {
        category: name for category, name in dataset.categories.items() if category not in category_ids.values()
    }
    for image in images:
        labelled = [a["category_id"] for a in dataset.annotations.imgToAnns.get(image, []) if not a["iscrowd"]]
        unknown = tuple(left_out[category] for category in labelled if category in left_out)
        time = str(dataset.annotations.imgs[image].get(TIME, ""))[:MOST_LETTERS]
        objects = dataset.objects(image, category_ids)
        yield Labelled(dataset.files[image], objects, tuple(category_ids), unknown, time=time)


def _moment(time: object) -> float | None:
    """A time as ISO 8601 or Exif has it (2013-11-14 11:18:45, 2013:11:14 11:18:45), as seconds; None: it is none.

    One without a zone is of UTC.
    """
    text = re.sub(r"^(\d{4})[:/](\d\d)[:/](\d\d)", r"\1-\2-\3", str(time))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def unknown_boxes(unknown: Iterable[Iterable[str]]) -> dict[str, int]:
    """How many objects of each class that the detector does not know, from those of each photo."""
    return dict(Counter(name for names in unknown for name in names))


def as_line(photo: Labelled, class_names: dict[int, str]) -> JsonObject:
    """A photo with its objects as `from_lines` takes it."""
    line: JsonObject = {"photo": str(photo.file), "objects": photo.objects.records(class_names)}
    if photo.known is not None and len(photo.known) < len(class_names):
        line["classes"] = [class_names[index] for index in photo.known]
    if photo.unknown:
        line["unknown"] = list(photo.unknown)
    if photo.time:
        line["time"] = photo.time
    if photo.judges is not None:
        line["judges"] = photo.judges
    return line | ({"id": photo.id, "labelled": photo.labelled} if photo.id else {})


def to_lines(records: Iterable[Mapping[str, object]]) -> bytes:
    """Photos of mappings that hold what `as_line` gives, and may hold more, as JSON lines for `read_lines`."""
    lines = [{key: one[key] for key in ("photo", "objects", "classes", "judges") if key in one} for one in records]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def lines_of(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a stream that may never end; of one that is over MAX_LINE, its beginning."""
    while line := stream.readline(MAX_LINE + 1):
        yield line
        while len(line) > MAX_LINE and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE + 1)


def from_lines(
    lines: Iterable[bytes],
    class_names: dict[int, str],
    source: str = "`stream`",
    class_map: Mapping[str, str] | None = None,
) -> Iterator[Labelled | Labels | DataError]:
    """Photos from JSON lines: {"photo": "a.jpg", "objects": [{"class": "person", "box": [x1, y1, x2, y2]}]}.

    Boxes in pixels of the photo; objects of classes that the detector does not know are left out. "classes" may list
    those that are labelled, if not all are, and "time" say when the photo was taken. Labels may come later:
    {"id": "17", "photo": "a.jpg"}, then {"id": "17", "objects": [...]}. A line that is not such an object is given as
    the error that names it by its number. source: where the lines are from, for errors; class_map: names of their
    classes -> the detector's.

    Raises:
        DetguardError: the detector has no class that is mapped to, or several of one name.
    """
    index = _index(class_names, source, class_map)
    return (_labelled(line, index, f"{source} line {number}") for number, line in enumerate(lines, 1) if line.strip())


def from_records(
    records: Iterable[Mapping[str, object] | DataError],
    class_names: dict[int, str],
    class_map: Mapping[str, str] | None = None,
) -> Iterator[Labelled | Labels | DataError]:
    """Photos from mappings such as lines are, as `from_lines`; errors stay what they are."""
    index = _index(class_names, "`photos`", class_map)
    return (
        record if isinstance(record, DataError) else _labelled(record, index, f"`photos` {number}")
        for number, record in enumerate(records, 1)
    )


def read_lines(
    file: str | Path, class_names: dict[int, str], class_map: Mapping[str, str] | None = None
) -> list[Labelled]:
    """The photos of a file of JSON lines, as `from_lines`, with labels that come later.

    Raises:
        DetguardError: it cannot be read, or a line is wrong, or labels and photos are without each other.
    """
    photos, places = list[Labelled](), dict[str, int]()
    for one in from_lines(read_file(file, MAX_ANNOTATIONS).split(b"\n"), class_names, str(file), class_map):
        if isinstance(one, DataError):
            raise one
        if isinstance(one, Labels):
            if one.id not in places:
                raise DataError(f"{file}: labels of '{one.id}', but no photo of that id before them")
            photos[places[one.id]] = one.of(photos[places[one.id]])
            continue
        places |= {one.id: len(photos)} if one.id else {}
        photos.append(one)
    if bare := [one.id for one in photos if not one.labelled]:
        raise DataError(f"{file}: no labels of '{bare[0]}' ({len(bare)} such); add a line with its id and objects")
    return photos


def _index(class_names: dict[int, str], source: str, class_map: Mapping[str, str] | None) -> dict[str, int]:
    """Class index by each name that an object's class may have."""
    index = {name: number for number, name in class_names.items()}
    if len(index) < len(class_names):
        raise DataError(f"{source}: the detector has several classes of one name, which labels cannot tell apart")
    renamed = check_map(class_map, class_names.values())
    kept = {name: number for name, number in index.items() if name not in renamed}
    return kept | {name: index[to] for name, to in renamed.items()}


def _labelled(one: bytes | Mapping[str, object], index: dict[str, int], where: str) -> Labelled | Labels | DataError:
    try:
        return _read(_parsed(one) if isinstance(one, bytes) else one, index)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        why = f"no {error!s:.50}" if isinstance(error, KeyError) else f"{error!s:.150}"
        why = "no JSON" if isinstance(error, json.JSONDecodeError) else why
        return DataError(
            f'{where}: expected {{"photo": "a.jpg", "objects": [{{"class": "person", '
            f'"box": [x1, y1, x2, y2]}}]}}, or an "id" by which the objects come later ({why})'
        )


def _parsed(line: bytes) -> object:
    if len(line) > MAX_LINE:
        raise ValueError(f"over {MAX_LINE >> 20} MiB")
    return parse_json(line.decode("utf-8-sig"))


def _read(record: object, index: dict[str, int]) -> Labelled | Labels:
    if not isinstance(record, Mapping):
        raise TypeError("no object")
    later = record.get("id") is not None
    if later and (not isinstance(record["id"], str | int) or not 0 < len(str(record["id"]).encode()) <= LONGEST_ID):
        raise ValueError(f"id: no text of 1 to {LONGEST_ID} bytes")
    key, labelled = str(record["id"]) if later else "", "objects" in record or not later
    if later and "photo" not in record:
        return Labels(key, *_objects(record, index))
    name = record["photo"]
    if b"\0" in os.fsencode(name):  # which no file can be called, as is what cannot be encoded
        raise ValueError("a name with a null byte")
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise ValueError(f"photo: a name of over {LONGEST_NAME} bytes; give a file")
    objects, known, unknown = _objects(record if labelled else {"objects": []}, index)
    time = str(record["time"])[:MOST_LETTERS] if isinstance(record.get("time"), str | int | float) else ""
    judges = record["judges"] if isinstance(record.get("judges"), bool) else None
    return Labelled(Path(name), objects, known, unknown, key, labelled, time, judges)


def _objects(
    record: Mapping[str, Any], index: dict[str, int]
) -> tuple[Detections, tuple[int, ...] | None, tuple[str, ...]]:
    """The labels of a photo, the classes that are known to be labelled, and those of objects that are left out."""
    objects, classes = record["objects"], record.get("classes")
    if not isinstance(objects, list) or len(objects) > MOST_OBJECTS:
        raise ValueError(f"objects: no list, or over {MOST_OBJECTS}")
    if not isinstance(classes, list | None):
        raise ValueError("classes: no list")
    known = None if classes is None else tuple(dict.fromkeys(index[c] for c in classes if c in index))
    # What is labelled here and there alone says nothing: neither that it was missed nor that it was found.
    counted = set(index.values()) if known is None else set(known)
    found = [(index[o["class"]], _box(o["box"])) for o in objects if index.get(o["class"]) in counted]
    unknown = tuple(str(o["class"])[:MOST_LETTERS] for o in objects if o["class"] not in index)
    boxes = torch.tensor([box for _, box in found], dtype=torch.float32).reshape(-1, 4)
    detections = Detections(boxes, torch.ones(len(found)), torch.tensor([c for c, _ in found], dtype=torch.int64))
    return detections, known, unknown


def _box(values: Sequence[float]) -> list[float]:
    x1, y1, x2, y2 = map(float, values)
    if not (-MOST_PIXELS <= x1 <= x2 <= MOST_PIXELS and -MOST_PIXELS <= y1 <= y2 <= MOST_PIXELS):
        raise ValueError(f"box {values!s:.50}: x1 <= x2 and y1 <= y2, within {MOST_PIXELS:g} pixels, are expected")
    return [x1, y1, x2, y2]
