"""YOLO folders, a text file of boxes beside each photo, read into the form that `dataset.py` keeps."""

import math
import os
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path

from detguard.data.entries import (
    CROWDED,
    LOST,
    MOST_OBJECTS,
    DataError,
    Faults,
    Instances,
    annotation,
    clip,
    file_name,
    inside,
    upright_size,
)
from detguard.files import FileError, JsonObject, is_file, is_folder, read_file
from detguard.photos import photos_in

# Bytes of the labels of one photo.
MAX_LABELS = 8 << 20
MOST_POINTS = 10_000


def read_yolo(
    config: JsonObject, root: Path, split: str, file: Path, faults: Faults, limit: int | None
) -> tuple[Instances, dict[int, Path]]:
    """Annotations and photos by image id of a split of a data.yaml, of which the data are in `root`.

    Raises:
        DataError: the names or the split are none.
    """
    names = _class_names(config["names"], file)
    ids = official_ids(names)
    photos = _photos_of_split(config[split], root, file, faults)
    found: Instances = {"images": [], "annotations": [], "categories": []}
    found["categories"] = [{"id": ids[k], "name": v} for k, v in names.items()]
    files: dict[int, Path] = {}
    points = _numbers_of_points(config, file)
    # COCO's own photos are named by their id.
    numbers = [int(p.stem) for p in photos if p.stem.isdecimal() and len(p.stem) < 19]
    numbered = len(set(numbers)) == len(photos)
    for number, photo in enumerate(photos, 1):
        if limit is not None and len(files) >= limit:
            break
        image_id = int(photo.stem) if numbered else number
        if (size := upright_size(photo)) is None:
            faults.add(LOST, f"{file}: {photo}")
            continue
        labels = _label_file(photo)
        try:
            lines = _lines_of(labels, faults)
        except FileError as error:  # taken as empty, what is found there would count as wrong
            faults.add(LOST, f"{file}: {photo}: its labels cannot be read ({error})")
            continue
        found["images"].append({"id": image_id, "file_name": photo.name, "width": size[0], "height": size[1]})
        files[image_id] = photo
        for category, box in _read_labels(labels, lines, ids, size, faults, points):
            count = len(found["annotations"])
            found["annotations"].append(annotation(count, image_id, category, box, box[2] * box[3]))
    return found, files


def _numbers_of_points(config: JsonObject, file: Path) -> int:
    """How many numbers follow each box, where labels are of poses, as in kpt_shape: [17, 3]; 0: none."""
    given = config.get("kpt_shape")
    if given is None:
        return 0
    match given:
        case [int(count), (2 | 3) as of_each] if 0 < count < MOST_POINTS:
            return count * of_each
    raise DataError(f"{file}: 'kpt_shape' should be a number of points and 2 or 3, as in [17, 3]")


def _class_names(given: dict[object, object] | list[object], file: Path) -> dict[int, str]:
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
    from ultralytics.utils import ROOT, YAML

    names = YAML.load(ROOT / "cfg" / "datasets" / "coco.yaml")["names"]
    return {name: coco80_to_coco91_class()[index] for index, name in names.items()}


def _photos_of_split(entry: object, root: Path, file: Path, faults: Faults) -> list[Path]:
    """The photos of a split: a folder, a .txt that lists photos, or a list of such."""
    photos: list[Path] = []
    for one in entry if isinstance(entry, list) else [entry]:
        name = file_name(one, file)
        # Exports of Roboflow say ../train/images where they mean train/images.
        name = name if is_folder(root / name) or is_file(root / name) else name.removeprefix("../")
        path = inside(root, name, file)
        if is_folder(path):
            photos += photos_in(path, recursive=True, enter=partial(_stays, (root, path), faults))
        elif is_file(path) and path.suffix == ".txt":
            try:
                lines = read_file(path).decode("utf-8-sig").splitlines()
            except (FileError, UnicodeDecodeError) as error:
                raise DataError(f"{path}: not a readable list of photos ({error})") from error
            here = os.path.relpath(path.parent, root)  # from where a line counts that begins with ./, as in Ultralytics
            photos += [
                inside(root, f"{here}/{line}" if line.startswith("./") else line, Path(f"{path}:{n}"))
                for n, line in enumerate(map(str.strip, lines), 1)
                if line
            ]
        else:
            raise DataError(f"{file}: '{name}' is neither a folder of photos nor a .txt that lists them")
    return photos


def _stays(tops: Sequence[Path], faults: Faults, link: Path) -> bool:
    """Whether a link leads to what is in one of some folders; a counted fault where it does not."""
    target = Path(os.path.realpath(link))
    if stays := any(target.is_relative_to(os.path.realpath(top)) for top in tops):
        return stays
    faults.add("linked folders that lead out of the data folder, left out", f"{link} leads to {target}")
    return False


def _label_file(photo: Path) -> Path:
    """Ultralytics' custom: the last folder `images` on the path becomes `labels`."""
    parts = list(photo.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _lines_of(file: Path, faults: Faults) -> list[str]:
    """The lines of a YOLO label file; where it is not there, the photo is an empty one.

    Raises:
        FileError: it is there, but cannot be read.
    """
    try:
        return read_file(file, MAX_LABELS).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise FileError(f"{file}: not text in UTF-8 ({error.reason})") from error
    except FileError as error:
        if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise
    faults.add("photos without a label file, taken as empty", f"{file} is not there")
    return []


def _read_labels(
    file: Path, lines: Iterable[str], ids: dict[int, int], size: tuple[int, int], faults: Faults, points: int
) -> Iterable[tuple[int, list[float]]]:
    """(category id, box [x, y, w, h] in pixels) of each good line of a YOLO label file.

    points: numbers of a pose that follow each box.
    """
    width, height = size
    given = set[tuple[float, ...]]()
    for number, line in enumerate(lines, 1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            values = [float(v) for v in line.split()]
        except ValueError:
            faults.add("lines that are not 'class x y w h', left out", where)
            continue
        values = values[:5] if points and len(values) == 5 + points else values
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
        if (one := (values[0], x, y, w, h)) in given:
            faults.add("boxes given twice, left out once", where)
            continue
        if len(given) >= MOST_OBJECTS:
            faults.add(CROWDED, where)
            continue
        given.add(one)
        box = ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height)
        if (cut := clip(box, width, height, where, faults)) is not None:
            yield ids[int(values[0])], cut
