"""Real detectors and real photos. Those in ../shared are not part of the project: without them, tests skip."""

from pathlib import Path

import pytest

from detguard.detectors.load import load_detector, load_model
from detguard.photos import Photo, read_photo

SHARED = Path(__file__).parents[2] / "shared"
YOLO11N = SHARED / "weights" / "yolo11n-coco.pt"
VAL = SHARED / "data" / "coco256" / "images" / "val"


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
