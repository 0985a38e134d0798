"""Labelled photos from COCO json or YOLO folders, read into one form: files by image id, and COCO annotations.

Nothing that a data file says is executed or downloaded, and none of its paths leaves the data folder. What is wrong
with single annotations is counted and left out, with file and line; what would make every number wrong is an error.
"""

import contextlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from pycocotools.coco import COCO

from detguard import DetguardError
from detguard.detections import Detections
from detguard.photos import SUFFIXES

MAX_BYTES = 2 << 30
EXIF_ORIENTATION = 274
# What COCO's own annotations call the time of a photo.
TIME = "date_captured"
# The kind of warning that means that the figures are of fewer photos than the data set has.
LOST = "photos missing or unreadable, left out"


class DataError(DetguardError):
    """A data set that cannot be used; the message names the file and, where there is one, the line or entry."""


@dataclass
class Dataset:
    """Photos with boxes.

    files: image id -> photo, in the order of the data set; annotations: pycocotools' ground truth, boxes in photo
    pixels; warnings: kind of fault -> where it was found, each of these left out or mended as the kind says.
    """

    name: str
    files: dict[int, Path]
    annotations: COCO
    warnings: dict[str, list[str]] = field(default_factory=dict)

    @property
    def categories(self) -> dict[int, str]:
        """Category id -> name."""
        return {int(c["id"]): str(c["name"]) for c in self.annotations.cats.values()}

    def drop(self, image: int, reason: str) -> None:
        """Take a photo out, with a warning."""
        del self.files[image]
        self.warnings.setdefault(LOST, []).append(reason)

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
    faults = _Faults()
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
        if split in annotations:
            folder = inside(root, str(config[split]), file)
            dataset, files = _read_coco(inside(root, str(annotations[split]), file), folder, faults, limit)
        else:
            dataset, files = _read_yolo(config, root, split, file, faults, limit)
    if not files:
        first = next((where[0] for where in faults.found.values()), "it lists none")
        raise DataError(f"{file}: no photo to evaluate on ({first})")
    if not dataset["annotations"]:
        first = next((where[0] for where in faults.found.values()), "it lists none")
        raise DataError(f"{file}: no labelled object to evaluate on ({first})")
    coco = indexed(dataset)
    # Of the many files called data.yaml, their folders tell which.
    name = file.resolve().parent.name if file.name == "data.yaml" else file.stem
    return Dataset(name if file.suffix == ".json" else f"{name} {split}", files, coco, faults.found)


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


class _Faults:
    """Faults that do not stop the reading, by kind."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, where: str) -> None:
        self.found.setdefault(kind, []).append(where)


def datasets_folder() -> Path:
    """Where the descriptions of public data sets are: inside the installed package, or at the top of the source."""
    within = Path(__file__).parent.parent / "datasets"
    return within if within.is_dir() else within.parent.parent / "datasets"


def _find(source: str | Path) -> Path:
    file = Path(source)
    if file.is_dir() and (file / "data.yaml").is_file():
        file = file / "data.yaml"
    if not file.is_file() and (datasets_folder() / f"{source}.yaml").is_file():
        file = datasets_folder() / f"{source}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in datasets_folder().glob("*.yaml")))
        raise DataError(f"{source}: no such data; give a data.yaml, a COCO instances json or a known name ({known})")
    if file.suffix not in (".json", ".yaml", ".yml"):
        raise DataError(f"{file}: expected a data.yaml or a COCO instances json")
    if file.stat().st_size > MAX_BYTES:
        raise DataError(f"{file}: over {MAX_BYTES >> 30} GiB, too large for annotations")
    return file


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{file}: not a readable yaml ({' '.join(str(error).split())})") from error
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
        if root.is_dir():
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
            if folder.is_dir():
                return folder
    return file.parent


def _upright_size(file: Path) -> tuple[int, int] | None:
    """(width, height) of a photo as it is shown, from its header; None where there is no readable image."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            if image.format == "PNG" and "exif" not in image.info:
                return width, height  # asked for it, Pillow would decode the whole photo to look behind it
            return (height, width) if image.getexif().get(EXIF_ORIENTATION, 1) >= 5 else (width, height)
    except Exception:  # a broken header can raise anything; reading it later says more
        return None


def _clip(box: Sequence[float], width: int, height: int, where: str, faults: _Faults) -> list[float] | None:
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


def _read_coco(file: Path, folder: Path, faults: _Faults, limit: int | None) -> tuple[dict[str, Any], dict[int, Path]]:
    try:
        data = json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error})") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
    if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in ("images", "categories")):
        raise DataError(f"{file}: expected a COCO instances json with images, annotations and categories")
    if not isinstance(data.get("annotations"), list):
        raise DataError(f"{file}: has no annotations (test sets of COCO have none); evaluate on a labelled split")
    categories = [dict(c) for c in _entries(data, "categories", ("id", "name"), file)]
    for kind, ids in (("categories", categories), ("images", data["images"])):
        counts = Counter(e.get("id") for e in ids if isinstance(e, dict) and isinstance(e.get("id"), int))
        if twice := [i for i, n in counts.items() if n > 1]:
            raise DataError(f"{file}: {kind} with the same id {twice[0]}; ids must be unique")
    images: list[dict[str, Any]] = []
    files: dict[int, Path] = {}
    for i, image in enumerate(_entries(data, "images", ("id", "file_name"), file)):
        if limit is not None and len(files) >= limit:
            break
        path = inside(folder, str(image["file_name"]), file)
        if (size := _upright_size(path)) is None:
            faults.add(LOST, f"{file}: images[{i}]: {path}")
            continue
        given = (image.get("width", size[0]), image.get("height", size[1]))
        if given != size:
            faults.add("photos of another size than annotated", f"{file}: images[{i}]: {path} is {size}, not {given}")
        known_of = {"id": int(image["id"]), "file_name": path.name, "width": size[0], "height": size[1]}
        images.append(known_of | ({TIME: image[TIME]} if TIME in image else {}))
        files[int(image["id"])] = path
    sizes: dict[int, tuple[int, int]] = {image["id"]: (image["width"], image["height"]) for image in images}
    listed = {image.get("id") for image in data["images"]}
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
        except (TypeError, ValueError):
            faults.add("boxes of no size or not a number, left out", where)
            continue
        if (cut := _clip((x, y, w, h), *sizes[entry["image_id"]], where, faults)) is not None:
            crowd = int(bool(entry.get("iscrowd", 0)))
            given_area = entry.get("area")
            area = float(given_area) if isinstance(given_area, int | float) else cut[2] * cut[3]
            annotations.append(_annotation(len(annotations), entry["image_id"], entry["category_id"], cut, area, crowd))
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
        for key in ("id", "image_id", "category_id"):
            if key in needed and not isinstance(entry[key], int):
                raise DataError(f"{file}: {kind}[{i}]: {key} {entry[key]!r} is not a whole number")
    return data[kind]


def _read_yolo(
    config: dict[str, Any], root: Path, split: str, file: Path, faults: _Faults, limit: int | None
) -> tuple[dict[str, Any], dict[int, Path]]:
    names = config["names"]
    try:
        names = {int(k): str(v) for k, v in (names.items() if isinstance(names, dict) else enumerate(names))}
    except ValueError as error:
        raise DataError(f"{file}: 'names' should map numbers to names, as in 0: person ({error})") from error
    ids = official_ids(names)
    photos = _photos_of_split(config[split], root, file)[:limit]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    files = {}
    # COCO's own photos are named by their id.
    numbers = [int(p.stem) for p in photos if p.stem.isdecimal()]
    numbered = len(set(numbers)) == len(photos)
    for number, photo in enumerate(photos, 1):
        image_id = int(photo.stem) if numbered else number
        if (size := _upright_size(photo)) is None:
            faults.add(LOST, f"{file}: {photo}")
            continue
        images.append({"id": image_id, "file_name": photo.name, "width": size[0], "height": size[1]})
        files[image_id] = photo
        if not _label_file(photo).exists():
            faults.add("photos without a label file, taken as empty", f"{_label_file(photo)} is not there")
        for category, box in _read_labels(_label_file(photo), ids, size, faults):
            annotations.append(_annotation(len(annotations), image_id, category, box, box[2] * box[3]))
    categories = [{"id": ids[k], "name": v} for k, v in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}, files


def official_ids(names: dict[int, str]) -> dict[int, int]:
    """Class index -> category id: COCO's official ids (1..90) where all names are COCO's, else index + 1."""
    from ultralytics.data.converter import coco80_to_coco91_class
    from ultralytics.utils import ROOT, YAML

    coco = YAML.load(ROOT / "cfg" / "datasets" / "coco.yaml")["names"]
    official = {name: coco80_to_coco91_class()[index] for index, name in coco.items()}
    if set(names.values()) <= official.keys():
        return {index: official[name] for index, name in names.items()}
    return {index: index + 1 for index in names}


def _photos_of_split(entry: Any, root: Path, file: Path) -> list[Path]:
    """The photos of a split: a folder, a .txt that lists photos, or a list of such."""
    photos: list[Path] = []
    for name in map(str, entry if isinstance(entry, list) else [entry]):
        # Exports of Roboflow say ../train/images where they mean train/images.
        name = name if (root / name).exists() else name.removeprefix("../")
        path = inside(root, name, file)
        if path.is_dir():
            photos += sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif path.is_file() and path.suffix == ".txt":
            lines = enumerate(path.read_text().splitlines(), 1)
            photos += [inside(root, line.strip(), Path(f"{path}:{n}")) for n, line in lines if line.strip()]
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
    file: Path, ids: dict[int, int], size: tuple[int, int], faults: _Faults
) -> Iterable[tuple[int, list[float]]]:
    """(category id, box [x, y, w, h] in pixels) of each good line of a YOLO label file; none is an empty photo."""
    if not file.exists():
        return
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
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
        if not math.isfinite(values[0]) or int(values[0]) not in ids:
            faults.add("annotations of unknown classes, left out", f"{where}: class {line.split()[0]}")
            continue
        if len(values) == 5:
            _, x, y, w, h = values
        else:  # the outline of a segment
            xs, ys = values[1::2], values[2::2]
            x, y, w, h = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)
        box = ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height)
        if (cut := _clip(box, width, height, where, faults)) is not None:
            yield ids[int(values[0])], cut
