"""Images with boxes as a data set that others read: images, YOLO labels, data.yaml and a COCO instances json."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NotRequired, TypedDict

import yaml

from detguard.data.entries import Annotation, Image, annotation
from detguard.detections import Detections

# Written last: where it is, the data set is whole.
LIST = "instances.json"


class Boxed(TypedDict):
    """An object in COCO's form, its image and perhaps more left out."""

    category_id: int
    bbox: list[float]
    area: NotRequired[float]
    iscrowd: NotRequired[int]


class DatasetWriter:
    """A data set that is written image by image; `close` writes its data.yaml and instances.json.

    Args:
        write: where files go: their names within the data set, and their bytes.
        categories: category id -> name, all that the data set is to have. In YOLO's labels they are numbered from 0, in
            this order.
    """

    def __init__(self, write: Callable[[str, bytes], object], categories: Mapping[int, str]) -> None:
        self._write = write
        self._categories = dict(categories)
        self._numbers = {category: number for number, category in enumerate(categories)}
        self._images: list[Image] = []
        self._annotations: list[Annotation] = []

    def __len__(self) -> int:
        return len(self._images)

    def add(
        self,
        name: str,
        data: bytes,
        size: tuple[int, int],
        objects: Iterable[Boxed],
        image_id: int | None = None,
    ) -> None:
        """Write one image and its labels.

        Args:
            name: of its file, unique in the data set.
            data: the bytes of the file.
            size: width and height, px.
            objects: their boxes [x, y, w, h] in pixels; area and iscrowd where they are known.
            image_id: in the json; by default, images are numbered from 1.
        """
        width, height = size
        objects = list(objects)
        self._write(f"images/{name}", data)
        self._write(f"labels/{name.rpartition('.')[0]}.txt", self._lines(objects, width, height).encode())
        number = len(self._images) + 1 if image_id is None else image_id
        self._images.append({"id": number, "file_name": name, "width": width, "height": height})
        for one in objects:
            x, y, w, h = (round(float(value), 2) for value in one["bbox"])
            area, crowd = one.get("area", round(w * h, 2)), one.get("iscrowd", 0)
            made = annotation(len(self._annotations), number, one["category_id"], [x, y, w, h], area, crowd)
            self._annotations.append(made)

    def close(self) -> None:
        """Write data.yaml and the COCO json, which list the images."""
        # Without `path`: Ultralytics looks for the images beside the file then, and with "." in the working folder.
        described = {"train": "images", "val": "images", "names": dict(enumerate(self._categories.values()))}
        self._write("data.yaml", yaml.safe_dump(described, sort_keys=False, allow_unicode=True).encode())
        categories = [{"id": category, "name": name} for category, name in self._categories.items()]
        instances = {"images": self._images, "annotations": self._annotations, "categories": categories}
        self._write(LIST, (json.dumps(instances) + "\n").encode())

    def _lines(self, objects: Sequence[Boxed], width: int, height: int) -> str:
        """One line per object: class, and middle and size of its box as shares of the image; YOLO knows no crowds."""
        lines = ""
        for one in objects:
            if not one.get("iscrowd"):
                x, y, w, h = one["bbox"]
                shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
                lines += " ".join([str(self._numbers[one["category_id"]]), *(f"{v:.6f}" for v in shares)]) + "\n"
        return lines


def as_objects(found: Detections) -> list[Boxed]:
    """Detections as objects in COCO's form, their class indices as categories."""
    return [
        {"category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for category, (x1, y1, x2, y2) in zip(found.classes.tolist(), found.boxes.tolist(), strict=True)
    ]
