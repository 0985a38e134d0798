"""Labelled photos from COCO json or YOLO folders, read into one form: files by image id, and COCO annotations.

Nothing that a data file says is executed or downloaded, and none of its paths leaves the data folder. What is wrong
with single annotations is counted and left out, with file and line; what would make every number wrong is an error.
"""

import contextlib
import io
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO

from detguard import DetguardError
from detguard.detections import Detections
from detguard.files import MAX_ANNOTATIONS, FileError, is_file, is_folder, read_file, read_json, read_yaml
from detguard.photos import MAX_PIXELS, SUFFIXES, PhotoError, photo_size

# What COCO's own annotations call the time of a photo.
TIME = "date_captured"
# Bytes of the labels of one photo.
MAX_LABELS = 8 << 20
# Of faults of one kind, so many places are kept.
MOST_PLACES = 1000
# The kind of warning that means that the figures are of fewer photos than the data set has.
LOST = "photos missing or unreadable, left out"


class DataError(DetguardError):
    """A data set that cannot be used; the message names the file and, where there is one, the line or entry."""


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

    @property
    def first(self) -> str:
        """Where the first was found."""
        return next((places[0] for places in self.values()), "it lists none")


@dataclass
class Dataset:
    """Photos with boxes.

    files: image id -> photo, in the order of the data set; annotations: pycocotools' ground truth, boxes in photo
    pixels; warnings: kind of fault -> where it was found, each of these left out or mended as the kind says.
    """

    name: str
    files: dict[int, Path]
    annotations: COCO
    warnings: Faults = field(default_factory=Faults)

    @property
    def categories(self) -> dict[int, str]:
        """Category id -> name."""
        return {int(c["id"]): str(c["name"]) for c in self.annotations.cats.values()}

    def drop(self, image: int, reason: str) -> None:
        """Take a photo out, with a warning."""
        del self.files[image]
        self.warnings.add(LOST, reason)

    def category_ids(self, class_names: dict[int, str], only: Sequence[str] | None = None) -> dict[int, int]:
        """A detector's class index -> category id, by name; with `only`, of those classes alone.

        Raises:
            DataError: no class in common, several of one name, or one of `only` is not known to both.
        """
        known = {name: category for category, name in self.categories.items()}
        shared = {index: known[name] for index, name in class_names.items() if name in known}
        if only is not None:
            names = {class_names[index] for index in shared}
            if missing := [name for name in only if name not in names]:
                raise DataError(f"--classes: the detector and {self.name} do not both know {', '.join(missing)}")
            shared = {index: category for index, category in shared.items() if class_names[index] in only}
        if len(set(shared.values())) < len(shared):
            raise DataError(f"{self.name}: the detector has several classes of one name; leave them out by --classes")
        if not shared:
            raise DataError(f"{self.name}: has no class in common with the detector; name its classes as it does")
        return shared

    def objects(self, image_id: int, category_ids: dict[int, int]) -> Detections:
        """The labelled objects of one photo as detections of score 1, in the detector's class indices; no crowds."""
        index = {category: k for k, category in category_ids.items()}
        found = [
            a for a in self.annotations.imgToAnns.get(image_id, []) if not a["iscrowd"] and a["category_id"] in index
        ]
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        classes = torch.tensor([index[a["category_id"]] for a in found], dtype=torch.int64)
        return Detections(boxes, torch.ones(len(found)), classes)


def read_dataset(
    source: str | Path, split: str = "val", images: Path | None = None, limit: int | None = None
) -> Dataset:
    """A data set by the name of one in `datasets/`, by an Ultralytics data.yaml, or by a COCO instances json.

    split: which part of a yaml; images: the folder of a json's photos, found beside it by default; limit: the first
    so many photos only.

    Raises:
        DataError: no such data, damaged, or its paths lead out of its folder.
    """
    file = _find(source)
    faults = Faults()
    if file.suffix == ".json":
        folder = images or _folder_of(file)
        dataset, files = _read_coco(file, folder, faults, limit)
    else:
        config = _read_yaml(file)
        root = _root(config, file)
        if split not in config or config[split] is None:
            parts = ", ".join(k for k in ("train", "val", "test") if config.get(k)) or "none"
            raise DataError(f"{file}: has no split '{split}' (it has: {parts}); choose one with --split")
        annotations = config.get("annotations") or {}
        if isinstance(annotations, dict) and split in annotations:
            folder, listed = (inside(root, _name(entry, file), file) for entry in (config[split], annotations[split]))
            dataset, files = _read_coco(listed, folder, faults, limit)
        else:
            dataset, files = _read_yolo(config, root, split, file, faults, limit)
    if not files:
        raise DataError(f"{file}: no photo to evaluate on ({faults.first})")
    if not dataset["annotations"]:
        raise DataError(f"{file}: no labelled object to evaluate on ({faults.first})")
    counts = Counter(category["name"] for category in dataset["categories"])
    if twice := [name for name, count in counts.items() if count > 1]:
        raise DataError(f"{file}: several classes are called '{twice[0]}'; give each a name of its own")
    coco = indexed(dataset)
    # Of the many files called data.yaml, their folders tell which.
    name = file.resolve().parent.name if file.name == "data.yaml" else file.stem
    return Dataset(name if file.suffix == ".json" else f"{name} {split}", files, coco, faults)


def indexed(dataset: dict[str, Any]) -> COCO:
    """Annotations in COCO's form as pycocotools looks them up; it prints while it does."""
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def inside(root: Path, name: str, file: Path) -> Path:
    """The path `name`, as `file` gives it, under `root`.

    Raises:
        DataError: it leads out of `root`.
    """
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(os.path.normpath(root)) or "\0" in name:
        raise DataError(f"{file}: '{name}' leads out of the data folder {root}")
    return path


def datasets_folder() -> Path:
    """Where the descriptions of public data sets are: inside the installed package, or at the top of the source."""
    within = Path(__file__).parent.parent / "datasets"
    return within if within.is_dir() else within.parent.parent / "datasets"


def _find(source: str | Path) -> Path:
    file = Path(source)
    if is_file(file / "data.yaml"):
        file = file / "data.yaml"
    if not is_file(file) and is_file(datasets_folder() / f"{source}.yaml"):
        file = datasets_folder() / f"{source}.yaml"
    if not is_file(file):
        known = ", ".join(sorted(p.stem for p in datasets_folder().glob("*.yaml")))
        raise DataError(f"{source}: no such data; give a data.yaml, a COCO instances json or a known name ({known})")
    if file.suffix not in (".json", ".yaml", ".yml"):
        raise DataError(f"{file}: expected a data.yaml or a COCO instances json")
    return file


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        config = read_yaml(file)
    except FileError as error:
        raise DataError(str(error)) from error
    if not isinstance(config, dict) or not isinstance(config.get("names"), dict | list):
        raise DataError(f"{file}: expected a data.yaml with 'names' and the splits 'train', 'val' or 'test'")
    return config


def _root(config: dict[str, Any], file: Path) -> Path:
    """The folder of a yaml's data: beside the yaml, under datasets/ here, or where Ultralytics keeps its own."""
    from ultralytics.utils import SETTINGS

    given = Path(str(config.get("path") or "."))
    bases = (file.parent, Path("datasets"), Path(SETTINGS["datasets_dir"]))
    roots = [Path(os.path.normpath(base / given)) for base in bases]
    for root in roots:
        if root == root.parent:
            raise DataError(f"{file}: path: {root} is no folder of data")
        if is_folder(root):
            return root
    reason = ""
    if file.parent == datasets_folder() and "ultralytics" in config:
        # Only for descriptions of ours: Ultralytics runs what its own yaml of that name says.
        from ultralytics.data.utils import check_det_dataset

        try:
            return Path(check_det_dataset(str(config["ultralytics"]))["path"])
        except Exception as error:  # whatever the network layers raise, the user's remedy is the same
            reason = f"; it cannot be downloaded ({str(error).splitlines()[0].strip()})"
    how = f"; how to get it: {config['get']}" if isinstance(config.get("get"), str) else ""
    raise DataError(f"{file}: its data folder is not here (looked at {', '.join(map(str, roots))}){reason}{how}")


def _folder_of(file: Path) -> Path:
    """Where the photos of a COCO json are by custom: images/val or val2017 for instances_val2017.json, or beside it."""
    part = file.stem.removeprefix("instances_")
    for base in (file.parent, file.parent.parent):
        for folder in (base / "images" / part, base / part, base / "images"):
            if is_folder(folder):
                return folder
    return file.parent


def _upright_size(file: Path) -> tuple[int, int] | None:
    """Width and height of a photo as it is shown, from its header; None where there is no readable image."""
    try:
        return photo_size(file)
    except PhotoError:
        return None  # reading it later says more


def _clip(box: Sequence[float], width: int, height: int, where: str, faults: Faults) -> list[float] | None:
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


def _read_coco(file: Path, folder: Path, faults: Faults, limit: int | None) -> tuple[dict[str, Any], dict[int, Path]]:
    try:
        data = read_json(file, MAX_ANNOTATIONS)
    except FileError as error:
        raise DataError(str(error)) from error
    if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in ("images", "categories")):
        raise DataError(f"{file}: expected a COCO instances json with images, annotations and categories")
    if not isinstance(data.get("annotations"), list):
        raise DataError(f"{file}: has no annotations (test sets of COCO have none); evaluate on a labelled split")
    categories = [dict(c) for c in _entries(data, "categories", ("id", "name"), file)]
    pictures = _entries(data, "images", ("id", "file_name"), file)
    for kind, entries in (("categories", categories), ("images", pictures)):
        counts = Counter(entry["id"] for entry in entries)
        if twice := [i for i, n in counts.items() if n > 1]:
            raise DataError(f"{file}: {kind} with the same id {twice[0]}; ids must be unique")
    images: list[dict[str, Any]] = []
    files: dict[int, Path] = {}
    for i, image in enumerate(pictures):
        if limit is not None and len(files) >= limit:
            break
        path = inside(folder, image["file_name"], file)
        if (size := _upright_size(path)) is None:
            faults.add(LOST, f"{file}: images[{i}]: {path}")
            continue
        given = (image.get("width", size[0]), image.get("height", size[1]))
        if given != size:
            faults.add(
                "photos of another size than annotated", f"{file}: images[{i}]: {path} is {size}, not {given!r:.50}"
            )
        known_of = {"id": image["id"], "file_name": path.name, "width": size[0], "height": size[1]}
        images.append(known_of | ({TIME: image[TIME]} if isinstance(image.get(TIME), str) else {}))
        files[image["id"]] = path
    sizes: dict[int, tuple[int, int]] = {image["id"]: (image["width"], image["height"]) for image in images}
    listed = {image["id"] for image in pictures}
    known = {c["id"] for c in categories}
    annotations: list[dict[str, Any]] = []
    for i, entry in enumerate(_entries(data, "annotations", ("image_id", "category_id", "bbox"), file)):
        where = f"{file}: annotations[{i}]"
        if entry["image_id"] not in sizes:
            if entry["image_id"] not in listed:
                faults.add("annotations of unknown photos, left out", f"{where}: image_id {entry['image_id']}")
            continue
        if entry["category_id"] not in known:
            faults.add("annotations of unknown classes, left out", f"{where}: category_id {entry['category_id']}")
            continue
        try:
            box = [float(v) for v in entry["bbox"]]
            x, y, w, h = box
        except (TypeError, ValueError, OverflowError):
            faults.add("boxes of no size or not a number, left out", where)
            continue
        if (cut := _clip((x, y, w, h), *sizes[entry["image_id"]], where, faults)) is not None:
            crowd = int(entry.get("iscrowd") in (1, "1"))
            area = entry.get("area")
            if not isinstance(area, int | float) or not 0 <= area <= MAX_PIXELS:
                area = cut[2] * cut[3]
            annotations.append(
                _annotation(len(annotations), entry["image_id"], entry["category_id"], cut, float(area), crowd)
            )
    return {"images": images, "annotations": annotations, "categories": categories}, files


def _annotation(
    number: int, image_id: int, category: int, box: list[float], area: float, crowd: int = 0
) -> dict[str, Any]:
    # Numbered anew from 1: pycocotools takes an object of id 0 for one that was never matched.
    return {
        "id": number + 1,
        "image_id": image_id,
        "category_id": category,
        "bbox": box,
        "area": area,
        "iscrowd": crowd,
    }


def _entries(data: dict[str, Any], kind: str, needed: Iterable[str], file: Path) -> list[dict[str, Any]]:
    for i, entry in enumerate(data[kind]):
        if not isinstance(entry, dict) or any(key not in entry for key in needed):
            raise DataError(f"{file}: {kind}[{i}]: expected an object with {', '.join(needed)}")
        for key in needed:
            if key.endswith("id") and (type(entry[key]) is not int or abs(entry[key]) >= 2**63):
                raise DataError(f"{file}: {kind}[{i}]: {key} {entry[key]!r:.50} is not a whole number of 64 bits")
            if key.endswith("name") and not isinstance(entry[key], str):
                raise DataError(f"{file}: {kind}[{i}]: {key} {entry[key]!r:.50} is not text")
    return data[kind]


def _read_yolo(
    config: dict[str, Any], root: Path, split: str, file: Path, faults: Faults, limit: int | None
) -> tuple[dict[str, Any], dict[int, Path]]:
    names = _class_names(config["names"], file)
    ids = official_ids(names)
    photos = _photos_of_split(config[split], root, file)[:limit]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    files = {}
    # COCO's own photos are named by their id.
    numbers = [int(p.stem) for p in photos if p.stem.isdecimal() and len(p.stem) < 19]
    numbered = len(set(numbers)) == len(photos)
    for number, photo in enumerate(photos, 1):
        image_id = int(photo.stem) if numbered else number
        if (size := _upright_size(photo)) is None:
            faults.add(LOST, f"{file}: {photo}")
            continue
        images.append({"id": image_id, "file_name": photo.name, "width": size[0], "height": size[1]})
        files[image_id] = photo
        for category, box in _read_labels(_label_file(photo), ids, size, faults):
            annotations.append(_annotation(len(annotations), image_id, category, box, box[2] * box[3]))
    categories = [{"id": ids[k], "name": v} for k, v in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}, files


def _class_names(given: dict[Any, Any] | list[Any], file: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for key, name in given.items() if isinstance(given, dict) else enumerate(given):
        number = int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 10 else key
        if type(number) is not int or not 0 <= number < 2**31 or type(name) not in (str, int, float):
            example = f"{key!r:.20}: {name!r:.50}"
            raise DataError(f"{file}: 'names' should map numbers to names, as in 0: person, not {example}")
        names[number] = str(name)
    return names


def official_ids(names: dict[int, str]) -> dict[int, int]:
    """Class index -> category id: COCO's official ids (1..90) where all names are COCO's, else index + 1."""
    official = _coco_ids()
    if set(names.values()) <= official.keys():
        return {index: official[name] for index, name in names.items()}
    return {index: index + 1 for index in names}


@cache
def _coco_ids() -> dict[str, int]:
    from ultralytics.data.converter import coco80_to_coco91_class
    from ultralytics.utils import ROOT

    names = read_yaml(ROOT / "cfg" / "datasets" / "coco.yaml")["names"]
    return {name: coco80_to_coco91_class()[index] for index, name in names.items()}


def _name(entry: Any, file: Path) -> str:
    """A path, as a yaml gives it.

    Raises:
        DataError: it is no text.
    """
    if not isinstance(entry, str):
        raise DataError(f"{file}: {entry!r:.50} is no name of a file or folder")
    return entry


def _photos_of_split(entry: Any, root: Path, file: Path) -> list[Path]:
    """The photos of a split: a folder, a .txt that lists photos, or a list of such."""
    photos: list[Path] = []
    for one in entry if isinstance(entry, list) else [entry]:
        name = _name(one, file)
        # Exports of Roboflow say ../train/images where they mean train/images.
        name = name if is_folder(root / name) or is_file(root / name) else name.removeprefix("../")
        path = inside(root, name, file)
        if is_folder(path):
            photos += sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif is_file(path) and path.suffix == ".txt":
            try:
                lines = read_file(path).decode().splitlines()
            except (FileError, UnicodeDecodeError) as error:
                raise DataError(f"{path}: not a readable list of photos ({error})") from error
            photos += [
                inside(root, line.strip(), Path(f"{path}:{n}")) for n, line in enumerate(lines, 1) if line.strip()
            ]
        else:
            raise DataError(f"{file}: '{name}' is neither a folder of photos nor a .txt that lists them")
    return photos


def _label_file(photo: Path) -> Path:
    """Ultralytics' custom: the last folder `images` on the path becomes `labels`."""
    parts = list(photo.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _read_labels(
    file: Path, ids: dict[int, int], size: tuple[int, int], faults: Faults
) -> Iterable[tuple[int, list[float]]]:
    """(category id, box [x, y, w, h] in pixels) of each good line of a YOLO label file; none is an empty photo."""
    try:
        lines = read_file(file, MAX_LABELS).decode().splitlines()
    except (FileError, UnicodeDecodeError) as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            faults.add("photos without a label file, taken as empty", f"{file} is not there")
        else:
            faults.add("label files that cannot be read, left out", f"{file}: {error}")
        return
    width, height = size
    for number, line in enumerate(lines, 1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            values = [float(v) for v in line.split()]
        except ValueError:
            faults.add("lines that are not 'class x y w h', left out", where)
            continue
        if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
            faults.add("lines that are not 'class x y w h', left out", where)
            continue
        if values[0] not in ids:
            faults.add("annotations of unknown classes, left out", f"{where}: class {line.split()[0]:.50}")
            continue
        if not all(map(math.isfinite, values)):
            faults.add("boxes of no size or not a number, left out", where)
            continue
        if len(values) == 5:
            _, x, y, w, h = values
        else:  # the outline of a segment
            xs, ys = values[1::2], values[2::2]
            x, y, w, h = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)
        box = ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height)
        if (cut := _clip(box, width, height, where, faults)) is not None:
            yield ids[int(values[0])], cut
