"""The photos of an attack as a data set: what others train and evaluate on, with labels where transforms took them."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import yaml

from detguard.attacks.run import PHOTO, drawn_transforms
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
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
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
            run.write(f"{FOLDER}/images/{stem}{source.suffix}", source.read_bytes())
            wide, high = photo_size(source)
            run.write(f"{FOLDER}/labels/{stem}.txt", yolo_lines(here, wide, high).encode())
            images.append({"id": len(images) + 1, "file_name": f"{stem}{source.suffix}", "width": wide, "height": high})
            for category, (x1, y1, x2, y2) in zip(here.classes.tolist(), here.boxes.tolist(), strict=True):
                box = [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]
                annotations.append(
                    {
                        "id": len(annotations) + 1, "image_id": len(images), "category_id": category, "bbox": box,
                        "area": round(box[2] * box[3], 2), "iscrowd": 0,
                    }
                )  # fmt: skip
    described = {"path": ".", "train": "images", "val": "images", "names": class_names}
    run.write(f"{FOLDER}/data.yaml", yaml.safe_dump(described, sort_keys=False, allow_unicode=True).encode())
    categories = [{"id": number, "name": name} for number, name in class_names.items()]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    run.write(f"{FOLDER}/instances.json", (json.dumps(instances) + "\n").encode())
    return len(images)


def from_records(found: list[dict[str, Any]], index: Mapping[str, int]) -> Detections:
    """Detections as `Detections.records` wrote them, without those of classes that are not in `index`."""
    known = [one for one in found if one["class"] in index]
    return Detections(
        torch.tensor([one["box"] for one in known], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([float(one["confidence"]) for one in known]),
        torch.tensor([index[one["class"]] for one in known], dtype=torch.int64),
    )


def yolo_lines(objects: Detections, width: int, height: int) -> str:
    """One line per object: class, and middle and size of its box as shares of the picture."""
    lines = []
    for category, (x1, y1, x2, y2) in zip(objects.classes.tolist(), objects.boxes.tolist(), strict=True):
        middle = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height
        lines.append(" ".join(f"{v:.6f}" for v in (*middle, (x2 - x1) / width, (y2 - y1) / height)))
        lines[-1] = f"{category} {lines[-1]}\n"
    return "".join(lines)
