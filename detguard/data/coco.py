"""COCO instances json, read into the form that `dataset.py` keeps."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from detguard.data.entries import (
    CROWDED,
    LOST,
    MOST_OBJECTS,
    DataError,
    Faults,
    Image,
    Instances,
    annotation,
    clip,
    inside,
    upright_size,
)
from detguard.files import MAX_ANNOTATIONS, FileError, JsonObject, is_file, is_folder, read_json
from detguard.photos import MAX_PIXELS

# What COCO's own annotations call the time of a photo.
TIME: Final = "date_captured"
# Photos of which one shows where all are.
FIRST = 16


def read_coco(file: Path, folder: Path | None, faults: Faults, limit: int | None) -> tuple[Instances, dict[int, Path]]:
    """Annotations and photos by image id of a COCO json, of which the photos are in `folder`, or where they are found.

    Raises:
        DataError: it is none, or its ids or names are not.
    """
    try:
        data = read_json(file, MAX_ANNOTATIONS)
    except FileError as error:
        raise DataError(str(error)) from error
    if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in ("images", "categories")):
        raise DataError(f"{file}: expected a COCO instances json with images, annotations and categories")
    if not isinstance(data.get("annotations"), list):
        raise DataError(f"{file}: has no annotations (test sets of COCO have none); evaluate on a labelled split")
    categories = _entries(data, "categories", ("id", "name"), file)
    pictures = _entries(data, "images", ("id", "file_name"), file)
    for kind, entries in (("categories", categories), ("images", pictures)):
        counts = Counter(entry["id"] for entry in entries)
        if twice := [i for i, n in counts.items() if n > 1]:
            raise DataError(f"{file}: {kind} with the same id {twice[0]}; ids must be unique")
    images, files = _photos(pictures, file, folder or _folder_of(file, pictures), faults, limit)
    sizes: dict[int, tuple[int, int]] = {image["id"]: (image["width"], image["height"]) for image in images}
    listed = {image["id"] for image in pictures}
    known = {c["id"] for c in categories}
    found: Instances = {"images": images, "annotations": [], "categories": []}
    found["categories"] = [{"id": c["id"], "name": c["name"]} for c in categories]
    objects = Counter[int]()
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
        objects[entry["image_id"]] += 1
        if objects[entry["image_id"]] > MOST_OBJECTS:
            faults.add(CROWDED, where)
            continue
        if (cut := clip((x, y, w, h), *sizes[entry["image_id"]], where, faults)) is not None:
            crowd = int(entry.get("iscrowd") in (1, "1"))
            area = entry.get("area")
            if not isinstance(area, int | float) or not 0 <= area <= MAX_PIXELS:
                area = cut[2] * cut[3]
            count = len(found["annotations"])
            found["annotations"].append(
                annotation(count, entry["image_id"], entry["category_id"], cut, float(area), crowd)
            )
    return found, files


def _folder_of(file: Path, pictures: list[JsonObject]) -> Path:
    """Where the photos of a json are by custom, one of the first of them at least: images/val for instances_val.json,
    val2017, images, data, or beside the json or its folder, as their names may begin with one of these.
    """
    part, names = file.stem.removeprefix("instances_"), [picture["file_name"] for picture in pictures[:FIRST]]
    bases = file.parent, file.parent.parent
    folders = [base / folder for base in bases for folder in (f"images/{part}", part, "images", "data")]
    there = [*filter(is_folder, folders), *bases]
    return next((folder for folder in there if any(is_file(folder / name) for name in names)), there[0])


def _photos(
    pictures: list[JsonObject], file: Path, folder: Path, faults: Faults, limit: int | None
) -> tuple[list[Image], dict[int, Path]]:
    images: list[Image] = []
    files: dict[int, Path] = {}
    for i, image in enumerate(pictures):
        if limit is not None and len(files) >= limit:
            break
        path = inside(folder, image["file_name"], file)
        if (size := upright_size(path)) is None:
            faults.add(LOST, f"{file}: images[{i}]: {path}")
            continue
        given = (image.get("width", size[0]), image.get("height", size[1]))
        if given != size:
            faults.add(
                "photos of another size than annotated", f"{file}: images[{i}]: {path} is {size}, not {given!r:.50}"
            )
        known_of: Image = {"id": image["id"], "file_name": path.name, "width": size[0], "height": size[1]}
        if isinstance(time := image.get(TIME), str):
            known_of[TIME] = time
        images.append(known_of)
        files[image["id"]] = path
    return images, files


def _entries(data: JsonObject, kind: str, needed: Iterable[str], file: Path) -> list[JsonObject]:
    for i, entry in enumerate(data[kind]):
        if not isinstance(entry, dict) or any(key not in entry for key in needed):
            raise DataError(f"{file}: {kind}[{i}]: expected an object with {', '.join(needed)}")
        for key in needed:
            if key.endswith("id") and (type(entry[key]) is not int or abs(entry[key]) >= 2**63):
                raise DataError(f"{file}: {kind}[{i}]: {key} {entry[key]!r:.50} is not a whole number of 64 bits")
            if key.endswith("name") and not isinstance(entry[key], str):
                raise DataError(f"{file}: {kind}[{i}]: {key} {entry[key]!r:.50} is not text")
    return data[kind]
