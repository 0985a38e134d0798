"""What users name as photos: folders, patterns, data sets, JSON lines; with their labels or without."""

import glob
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from detguard.data.dataset import Dataset, read_dataset
from detguard.data.stream import Labelled, as_line, in_order, read_lines
from detguard.photos import find_photos

# Of a run, its photos with their labels.
LABELLED = "labelled.jsonl"
OnData = Callable[[Dataset], object]


def warn_of(dataset: Dataset) -> None:
    """Warn of what was wrong with the data, counted by kind."""
    for kind, where in dataset.warnings.items():
        warnings.warn(f"{dataset.name}: {where.total} {kind}", stacklevel=2)


def unlabelled(source: str) -> bool:
    """Whether a source is a folder or pattern of photos, without labels."""
    path = Path(source)
    return not (path / "data.yaml").is_file() if path.is_dir() else not path.exists() and glob.has_magic(source)


def photo_files(source: str) -> list[Path]:
    """The photos of a folder, a pattern or a data set's training split; folders `images/train` and the like too."""
    if Path(source).suffix in (".yaml", ".yml", ".json"):
        return list(read_dataset(source, "train").files.values())
    return find_photos([source])


def read_labelled(
    source: str, split: str, class_names: dict[int, str], on_data: OnData = warn_of, images: Path | None = None
) -> list[Labelled]:
    """The labelled photos of a data.yaml, a COCO json or a file of JSON lines, in the detector's class indices.

    on_data: shown a data set when it is read; images: folder of the photos of a COCO json, by default beside it.
    """
    if Path(source).suffix == ".jsonl":
        return read_lines(source, class_names)
    dataset = read_dataset(source, split, images)
    on_data(dataset)
    return list(in_order(dataset, dataset.category_ids(class_names)))


def as_lines(photos: Sequence[Labelled], class_names: dict[int, str]) -> bytes:
    """Labelled photos as a run keeps them, for `read_labelled`."""
    return "".join(json.dumps(as_line(one, class_names)) + "\n" for one in photos).encode()
