"""Labelled photos from COCO json or YOLO folders, read into one form: files by image id, and COCO annotations.

Nothing that a data file says is executed or downloaded, and none of its paths leaves the data folder. What is wrong
with single annotations is counted and left out, with file and line; what would make every number wrong is an error.
"""

import contextlib
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import torch
from pycocotools.coco import COCO

from detguard import first_line
from detguard.classes import left_out
from detguard.data.coco import read_coco
from detguard.data.entries import LOST, DataError, Faults, Instances, file_name, inside
from detguard.data.yolo import read_yolo
from detguard.detections import Detections
from detguard.files import FileError, JsonObject, is_file, is_folder, read_yaml, shipped


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

    def unknown(self, class_names: Mapping[int, str]) -> dict[str, int]:
        """Labelled classes that a detector does not know, by name, with how many boxes each has."""
        known, names = set(class_names.values()), self.categories
        counts = Counter(names[a["category_id"]] for a in self.annotations.anns.values() if not a["iscrowd"])
        return {name: count for name, count in counts.items() if name not in known}

    def category_ids(self, class_names: dict[int, str], only: Sequence[str] | None = None) -> dict[int, int]:
        """A detector's class index -> category id, by name; with `only`, of those classes alone.

        Boxes of classes that the detector does not know are counted among the `warnings`, where all are wanted.

        Raises:
            DataError: no class in common, several of one name, or one of `only` is not known to both.
        """
        known = {name: category for category, name in self.categories.items()}
        shared = {index: known[name] for index, name in class_names.items() if name in known}
        if only is not None:
            if not only:
                raise DataError("`classes`: expected names of some")
            names = {class_names[index] for index in shared}
            if missing := [name for name in only if name not in names]:
                raise DataError(f"`classes`: the detector and {self.name} do not both know {', '.join(missing)}")
            shared = {index: category for index, category in shared.items() if class_names[index] in only}
        if len(set(shared.values())) < len(shared):
            raise DataError(f"{self.name}: the detector has several classes of one name; leave them out by `classes`")
        boxes = self.unknown(class_names)
        message = left_out(boxes, class_names.values())
        if not shared:
            raise DataError(f"{self.name}: has no class in common with the detector; {message}")
        if boxes and only is None:
            self.warnings.count(message, sum(boxes.values()))
        return shared

    def objects(self, image_id: int, category_ids: dict[int, int], *, crowds: bool = False) -> Detections:
        """The labelled objects of one photo as detections of score 1, in the detector's class indices, or crowds."""
        index = {category: k for k, category in category_ids.items()}
        labelled = self.annotations.imgToAnns.get(image_id, [])
        found = [a for a in labelled if bool(a["iscrowd"]) is crowds and a["category_id"] in index]
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        classes = torch.tensor([index[a["category_id"]] for a in found], dtype=torch.int64)
        return Detections(boxes, torch.ones(len(found)), classes)


def read_dataset(
    source: str | Path,
    split: str = "val",
    images: Path | None = None,
    limit: int | None = None,
    class_map: Mapping[str, str] | None = None,
    *,
    labelled: bool = True,
) -> Dataset:
    """A data set by the name of one in `datasets/`, by an Ultralytics data.yaml, or by a COCO instances json.

    split: which part of a yaml; images: the folder of a json's photos, found beside it by default; limit: the first
    so many photos that can be read; class_map: names of classes -> those that they are to be called by, several may be
    one; labelled: whether it has to have objects.

    Raises:
        DataError: no such data, damaged, or its paths lead out of its folder.
    """
    file = _find(source)
    faults = Faults()
    if file.suffix == ".json":
        dataset, files = read_coco(file, images, faults, limit)
    else:
        if images is not None:
            raise DataError(f"{file}: says itself where its photos are; `images` goes with a COCO json")
        config = _read_yaml(file)
        root = _root(config, file)
        if split not in config or config[split] is None:
            parts = ", ".join(k for k in ("train", "val", "test") if config.get(k)) or "none"
            raise DataError(f"{file}: has no split '{split}' (it has: {parts})")
        annotations = config.get("annotations") or {}
        if isinstance(annotations, dict) and split in annotations:
            folder, listed = (
                inside(root, file_name(entry, file), file) for entry in (config[split], annotations[split])
            )
            dataset, files = read_coco(listed, folder, faults, limit)
        else:
            dataset, files = read_yolo(config, root, split, file, faults, limit)
    if not files:
        raise DataError(f"{file}: no photo to evaluate on ({faults.first})")
    if labelled and not dataset["annotations"]:
        raise DataError(f"{file}: no labelled object to evaluate on ({faults.first})")
    counts = Counter(category["name"] for category in dataset["categories"])
    if twice := [name for name, count in counts.items() if count > 1]:
        raise DataError(f"{file}: several classes are called '{twice[0]}'; give each a name of its own")
    coco = indexed(rename_classes(dataset, class_map or {}, faults))
    # Of the many files called data.yaml, their folders tell which.
    name = file.resolve().parent.name if file.name == "data.yaml" else file.stem
    return Dataset(name if file.suffix == ".json" else f"{name} {split}", files, coco, faults)


def rename_classes(dataset: Instances, class_map: Mapping[str, str], faults: Faults) -> Instances:
    """Annotations in COCO's form whose classes are called as a map says; those of one name become one."""
    categories = dataset["categories"]
    for name in class_map.keys() - {c["name"] for c in categories}:
        faults.add("names in `class_map` that no class of the data has", f"'{name}'")
    called = {c["id"]: class_map.get(c["name"], c["name"]) for c in categories}
    ids = {c["name"]: c["id"] for c in categories if c["name"] == called[c["id"]]}
    for category, name in called.items():
        ids.setdefault(name, category)
    for entry in dataset["annotations"]:
        entry["category_id"] = ids[called[entry["category_id"]]]
    return dataset | {"categories": [{"id": category, "name": name} for name, category in ids.items()]}


def indexed(dataset: Mapping[str, object]) -> COCO:
    """Annotations in COCO's form as pycocotools looks them up; it prints while it does."""
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _find(source: str | Path) -> Path:
    file = Path(source)
    if is_file(file / "data.yaml"):
        file = file / "data.yaml"
    if not is_file(file) and is_file(shipped("datasets") / f"{source}.yaml"):
        file = shipped("datasets") / f"{source}.yaml"
    if is_folder(file):
        raise DataError(f"{source}: is a folder; photos need labels here: give a data.yaml or a COCO instances json")
    if not is_file(file):
        named = Path(source).name == str(source)
        known = sorted(p.stem for p in shipped("datasets").glob("*.yaml"))
        reason = "no such data" if named and not file.suffix else "no such file or folder"
        if named and file.suffix != ".json" and (near := get_close_matches(file.stem.lower(), known, n=1, cutoff=0.65)):
            raise DataError(f"{source}: {reason}; did you mean {near[0]}?")
        names = ", ".join(known)
        raise DataError(f"{source}: {reason}; give a data.yaml, a COCO instances json or a known name ({names})")
    if file.suffix not in (".json", ".yaml", ".yml"):
        raise DataError(f"{file}: expected a data.yaml or a COCO instances json")
    return file


def _read_yaml(file: Path) -> JsonObject:
    try:
        config = read_yaml(file)
    except FileError as error:
        raise DataError(str(error)) from error
    if not isinstance(config, dict) or not isinstance(config.get("names"), dict | list):
        raise DataError(f"{file}: expected a data.yaml with 'names' and the splits 'train', 'val' or 'test'")
    return config


def _root(config: JsonObject, file: Path) -> Path:
    """The folder of a yaml's data: beside the yaml, under datasets/ here, or where Ultralytics keeps its own."""
    from ultralytics.utils import SETTINGS

    given = Path(str(config.get("path") or "."))
    bases = (file.parent, Path("datasets"), Path(SETTINGS["datasets_dir"]))
    roots = dict.fromkeys(Path(os.path.normpath(base / given)) for base in bases)  # all are one where it is absolute
    for root in roots:
        if root.absolute() == root.absolute().parent:
            raise DataError(f"{file}: path: {root} is no folder of data")
        if is_folder(root):
            return root
    reason = ""
    if file.parent == shipped("datasets") and "ultralytics" in config:
        # Only for descriptions of ours: Ultralytics runs what its own yaml of that name says.
        from ultralytics.data.utils import check_det_dataset

        try:
            return Path(check_det_dataset(str(config["ultralytics"]))["path"])
        except Exception as error:  # whatever the network layers raise, the user's remedy is the same
            reason = f"; it cannot be downloaded ({first_line(error)})"
    how = f"; how to get it: {config['get']}" if isinstance(config.get("get"), str) else ""
    raise DataError(f"{file}: its data folder is not here (looked at {', '.join(map(str, roots))}){reason}{how}")
