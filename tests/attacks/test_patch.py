import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from detguard import DetguardError
from detguard.attacks.patch import PatchOptions, patch_loss, printable_png, stages, total_variation, train_patch
from detguard.detectors.load import load_detector
from detguard.objectives import Vanish

SMALL = PatchOptions(size=0.5, pixels=32, photos=24, batch=2, rate=0.1)


@pytest.fixture(scope="module")
def small():
    return load_detector(imgsz=96)


@pytest.fixture(scope="module")
def photos(small, tmp_path_factory, bus_file):
    """The bus and its mirror image, 96 px, with what is found there."""
    folder = tmp_path_factory.mktemp("photos")
    bus = cv2.resize(cv2.imread(str(bus_file)), (72, 96), interpolation=cv2.INTER_AREA)
    for name, photo in (("a", bus), ("b", bus[:, ::-1])):
        cv2.imwrite(str(folder / f"{name}.png"), photo)
    files: list[tuple[Path, None]] = [(folder / f"{name}.png", None) for name in "ab"]
    return stages(small, files, Vanish((small.class_index("person"),)), 0.1)


def expected_loss(detector, photos, patch):
    """The mean of a patch over the same looks."""
    rng, generator = np.random.default_rng(7), torch.Generator().manual_seed(7)
    square = torch.from_numpy(patch).permute(2, 0, 1).float() / 255
    goal = Vanish((detector.class_index("person"),))
    with torch.no_grad():
        losses = [float(patch_loss(detector, photos, goal, square, SMALL, rng, generator)) for _ in range(4)]
    return sum(losses) / len(losses)


def test_a_few_steps_lower_the_loss_however_the_patch_appears(small, photos):
    goal = Vanish((small.class_index("person"),))
    told = []
    learned = train_patch(small, photos, goal, SMALL, lambda done, record: told.append((done, record)))
    assert learned.shape == (32, 32, 3)
    assert expected_loss(small, photos, learned) < 0.9 * expected_loss(small, photos, np.full_like(learned, 128))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == 1
    assert [record["photos"] for _, record in told if record] == [20]
    again = train_patch(small, photos, goal, SMALL)
    assert (again == learned).all()


def test_colours_can_be_printed(small, photos):
    goal = Vanish((small.class_index("person"),))
    learned = train_patch(small, photos, goal, PatchOptions(pixels=16, photos=4, batch=2, rate=1.0))
    assert (learned.min(), learned.max()) == (13, 242)


def test_it_ends_when_it_is_told_to(small, photos):
    calls = []
    train_patch(small, photos, Vanish((0,)), SMALL, lambda done, _: calls.append(done) or len(calls) == 2)
    assert len(calls) == 2


def test_photos_without_the_target_are_an_error(small, photos):
    with pytest.raises(DetguardError, match="`targets`: no photo has such an object"):
        stages(small, [(one.file, one.objects) for one in photos], Vanish((small.class_index("sheep"),)), 0.1)


def test_total_variation_is_the_mean_difference_of_neighbours():
    stripes = torch.tensor([0.0, 1.0]).repeat(4).expand(3, 8, 8)
    assert float(total_variation(stripes)) == 1


def test_it_is_printed_in_its_size():
    image = Image.open(io.BytesIO(printable_png(np.zeros((128, 128, 3), np.uint8), 20)))
    assert 128 / image.info["dpi"][0] * 2.54 == pytest.approx(20, rel=1e-3)
