"""The photos of an attack as a data set: what others train and evaluate on, with labels where transforms took them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from detguard.attacks.run import PHOTO, drawn_transforms
from detguard.data.writing import DatasetWriter, as_objects
from detguard.detections import Detections
from detguard.photos import photo_size
from detguard.runs import Record, Run
from detguard.transforms.base import seen

FOLDER = "samples"


def write_samples(
    run: Run, records: Iterable[Record], labels: Mapping[str, Detections], class_names: dict[int, str]
) -> int:
    """Write the attacked photos of a run and their groups as `samples/`: YOLO labels, data.yaml and a COCO json.

    labels: key of a photo -> its objects, photo pixels; what was found in the clean photo where it has none.
    class_names: all that the data set is to have. Returns how many images it has.
    """
    index = {name: number for number, name in class_names.items()}
    made = DatasetWriter(lambda name, data: run.write(f"{FOLDER}/{name}", data), class_names)
    for record in records:
        key, files = record["key"], record["files"]
        width, height = photo_size(run.path(files[PHOTO]))
        objects = labels.get(key)
        if objects is None:
            objects = from_records(record["clean"], index)
        drawn = drawn_transforms(record)
        for name, file in files.items():
            here, _ = seen(drawn.get(name), (height, width), objects, torch.ones(len(objects), dtype=torch.bool))
            source = run.path(file)
            stem = f"{key}--{PHOTO if name == PHOTO else source.stem}"
            made.add(f"{stem}{source.suffix}", source.read_bytes(), photo_size(source), as_objects(here))
    made.close()
    return len(made)


def from_records(found: list[dict[str, Any]], index: Mapping[str, int]) -> Detections:
    """Detections as `Detections.records` wrote them, without those of classes that are not in `index`."""
    known = [one for one in found if one["class"] in index]
    return Detections(
        torch.tensor([one["box"] for one in known], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([float(one["confidence"]) for one in known]),
        torch.tensor([index[one["class"]] for one in known], dtype=torch.int64),
    )
