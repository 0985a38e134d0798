"""Real detectors and real photos. Those in ../shared are not part of the project: without them, tests skip."""

import json
from pathlib import Path

import cv2
import pytest

from detguard.detectors.load import load_detector, load_model
from detguard.photos import Photo, read_photo

SHARED = Path(__file__).parents[2] / "shared"
YOLO11N = SHARED / "weights" / "yolo11n-coco.pt"
VAL = SHARED / "data" / "coco256" / "images" / "val"
# Of programs, trainings and browsers.
SLOW = ("end_to_end", "hardening", "workflows", "docs", "export")


def pytest_collection_modifyitems(items):
    """Slow files first: where each is run by one process, those that are left at the end are short."""
    items.sort(key=lambda item: item.path.parent.name not in SLOW)


@pytest.fixture(scope="session")
def bus_file() -> Path:
    from ultralytics.utils import ASSETS

    return ASSETS / "bus.jpg"


@pytest.fixture(scope="session")
def bus(bus_file: Path) -> Photo:
    return read_photo(bus_file)


@pytest.fixture(scope="session")
def bundled():
    return load_detector()


@pytest.fixture(scope="session")
def bundled_model():
    return load_model()[0]


@pytest.fixture(scope="session")
def yolo11n_file() -> Path:
    if not YOLO11N.exists():
        pytest.skip("needs the COCO-trained YOLO11n of ../shared/weights")
    return YOLO11N


@pytest.fixture(scope="session")
def yolo11n(yolo11n_file: Path):
    return load_detector(yolo11n_file)


@pytest.fixture(scope="session")
def val_photos() -> list[Path]:
    if not VAL.is_dir():
        pytest.skip("needs the photos of ../shared/data/coco256")
    return sorted(VAL.glob("*.jpg"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory, bundled, bus_file) -> Path:
    """A COCO json of four photos, labelled with what the bundled detector is sure of; one photo has no label."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    bus, zidane = (cv2.imread(str(bus_file.with_name(f"{n}.jpg"))) for n in ("bus", "zidane"))
    photos = {11: bus, 12: zidane, 13: bus[:, ::-1], 14: bus[:300, 300:620]}
    names = bundled.class_names
    data = {"images": [], "annotations": [], "categories": [{"id": k + 1, "name": v} for k, v in names.items()]}
    for image, photo in photos.items():
        photo = cv2.resize(photo, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / "images" / f"{image}.png"), photo)
        data["images"].append(
            {"id": image, "file_name": f"{image}.png", "height": photo.shape[0], "width": photo.shape[1]}
        )
        found = bundled.detect([photo[..., ::-1].copy()], 0.35)[0]
        for box, index in zip(found.boxes.tolist(), found.classes.tolist(), strict=True):
            x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
            data["annotations"].append(
                {"id": len(data["annotations"]) + 1, "image_id": image, "category_id": index + 1,
                 "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            )  # fmt: skip
    (folder / "instances.json").write_text(json.dumps(data))
    return folder / "instances.json"
