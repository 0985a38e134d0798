import io
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detguard import DetguardError
from detguard.attacks.patch import Patch, printable_png, total_variation
from detguard.attacks.pictures import Learning, Stage, learn_picture, picture_loss, stages
from detguard.attacks.universal import Universal, largest_change, stretched
from detguard.detections import Detections
from detguard.detectors.load import load_detector
from detguard.objectives import Mislabel, Untargeted, Vanish
from detguard.photos import Letterbox, largest_difference

SMALL = Learning(photos=24, batch=2, rate=0.1)
PATCH = Patch(size=0.5, pixels=32)
NOISE = Universal(eps=8, pixels=96)


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


def goal_of(detector):
    return Vanish((detector.class_index("person"),))


def expected_loss(detector, photos, kind, picture):
    """The mean of a picture, [3, S, S], over the same draws."""
    rng = np.random.default_rng(7)
    with torch.no_grad():
        losses = [
            float(picture_loss(detector, photos, goal_of(detector), kind, picture, SMALL.conf, rng)) for _ in range(4)
        ]
    return sum(losses) / len(losses)


def test_a_photos_loss_is_that_of_any_goal(small, photos):
    targets = (small.class_index("person"),)
    for goal in (Mislabel(targets, (small.class_index("bus"),)), Untargeted(targets)):
        rng = np.random.default_rng(7)
        square = torch.full((3, 32, 32), 0.5, requires_grad=True)
        loss = picture_loss(small, photos, goal, PATCH, square, SMALL.conf, rng)
        assert torch.autograd.grad(loss, square)[0].abs().sum() > 0


def test_a_few_steps_lower_the_loss_however_the_patch_appears(small, photos):
    told = []
    learned = learn_picture(small, photos, goal_of(small), PATCH, SMALL, lambda *one: told.append(one))
    assert learned.shape == (32, 32, 3)
    square = torch.from_numpy(learned).permute(2, 0, 1).float() / 255
    grey = torch.full_like(square, 0.5)
    assert expected_loss(small, photos, PATCH, square) < 0.9 * expected_loss(small, photos, PATCH, grey)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == 1
    assert [record["photos"] for _, record in told if record] == [20]


def test_a_few_steps_of_a_universal_perturbation_lower_the_loss_within_its_budget(small, photos):
    learned = learn_picture(small, photos, goal_of(small), NOISE, SMALL)
    assert largest_change(learned) == 8
    change = (torch.from_numpy(learned).permute(2, 0, 1).float() - 128) / 255
    start = NOISE.start(torch.Generator().manual_seed(0))
    assert expected_loss(small, photos, NOISE, change) < 0.7 * expected_loss(small, photos, NOISE, start)


def test_a_universal_perturbation_reaches_all_of_the_photo_and_no_padding(small, photos):
    stage = photos[0]
    frame = torch.full((3, *stage.letterbox.frame), 0.5)
    changed = NOISE.change(frame, torch.full((3, 96, 96), 8 / 255), stage, np.random.default_rng(0))
    (height, width), (top, left) = stage.letterbox.resized, stage.letterbox.offset
    inside = torch.zeros(stage.letterbox.frame, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert not inside.all()
    assert torch.equal((changed != frame).all(0), inside)


@pytest.mark.parametrize(("eps", "told"), [(8, ", changes 15 times as large"), (100, "")])
def test_a_page_shows_small_changes_larger(eps, told):
    change = np.array([[[-eps, 0, eps]]])
    picture, done = Universal(eps=eps, pixels=1).shown((128 + change).astype(np.uint8))
    assert (picture.tolist(), done) == ((128 + change * (127 // eps)).tolist(), told)


@given(st.integers(1, 127), st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_no_photo_is_changed_by_more_than_the_budget(eps, height, width, seed):
    rng = np.random.default_rng(seed)
    kind = Universal(eps, 16)
    picture = rng.integers(128 - eps, 129 + eps, (16, 16, 3)).astype(np.uint8)
    photo = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    changed = kind.on_photo(photo, picture, torch.zeros(0, 4))
    assert largest_difference(changed, photo) <= eps
    assert torch.allclose(stretched(torch.full((3, 16, 16), 5.0), (height, width)), torch.tensor(5.0))


@pytest.mark.parametrize("kind", [PATCH, NOISE], ids=["patch", "universal"])
def test_stopped_and_gone_on_with_it_is_learned_as_in_one_go(small, photos, tmp_path, kind):
    told, calls, file = [], [], tmp_path / "state.pt"
    whole = learn_picture(small, photos, goal_of(small), kind, SMALL, lambda *one: told.append(one))
    early = learn_picture(
        small, photos, goal_of(small), kind, SMALL, lambda *one: calls.append(one) or len(calls) == 5, file
    )
    assert len(calls) == 5
    assert not (early == whole).all()
    later = learn_picture(small, photos, goal_of(small), kind, SMALL, lambda *one: calls.append(one), file)
    assert (later == whole).all()
    assert calls == told  # the losses of the first ten batches, of which five were before the stop
    assert (learn_picture(small, photos, goal_of(small), kind, SMALL, checkpoint=file) == whole).all()


def test_the_state_of_another_picture_is_refused(small, photos, tmp_path):
    file = tmp_path / "state.pt"
    short = Learning(photos=2, batch=2)
    learn_picture(small, photos, goal_of(small), PATCH, short, checkpoint=file)
    with pytest.raises(DetguardError, match="not a state of this run; delete it to begin again"):
        learn_picture(small, photos, goal_of(small), Patch(pixels=16), short, checkpoint=file)


def test_colours_can_be_printed(small, photos):
    learned = learn_picture(small, photos, goal_of(small), Patch(pixels=16), Learning(photos=4, batch=2, rate=1.0))
    assert (learned.min(), learned.max()) == (13, 242)


def test_photos_without_the_target_are_an_error(small, photos):
    with pytest.raises(DetguardError, match="`target`: no photo has such an object"):
        stages(small, [(one.file, one.objects) for one in photos], Vanish((small.class_index("sheep"),)), 0.1)


def test_a_photo_cut_short_is_told_before_the_learning_begins(small, photos, tmp_path):
    cut = tmp_path / "cut.png"
    cut.write_bytes(photos[0].file.read_bytes()[:4000])
    with pytest.raises(DetguardError, match=r"cut\.png"):
        stages(small, [(cut, photos[0].objects)], goal_of(small), 0.1)


def test_total_variation_is_the_mean_difference_of_neighbours():
    stripes = torch.tensor([0.0, 1.0]).repeat(4).expand(3, 8, 8)
    assert float(total_variation(stripes)) == 1


def test_it_is_printed_in_its_size():
    image = Image.open(io.BytesIO(printable_png(np.zeros((128, 128, 3), np.uint8), 20)))
    assert 128 / image.info["dpi"][0] * 2.54 == pytest.approx(20, rel=1e-3)


@dataclass(frozen=True)
class Toned(Patch):
    """One whose roughness is its distance from a tone."""

    tone: float = 0.5

    def roughness(self, picture):
        return 1e6 * (picture - self.tone).square().mean()


def test_what_a_picture_costs_by_itself_is_learned_too(small, photos):
    dark, light = (
        learn_picture(small, photos, goal_of(small), Toned(0.5, 32, tone), SMALL).mean() for tone in (0.1, 0.9)
    )
    assert light - dark > 100


def test_a_patch_lies_on_what_is_attacked_alone_and_each_time_otherwise():
    boxes = torch.tensor([[8.0, 8, 40, 40], [56, 56, 88, 88]])
    objects = Detections(boxes, torch.ones(2), torch.tensor([0, 4]))
    one = Stage(Path(), Letterbox.whole((96, 96)), objects, torch.tensor([True, False]))
    rng = np.random.default_rng(0)
    seen = [PATCH.change(torch.zeros(3, 96, 96), torch.full((3, 32, 32), 0.5), one, rng) for _ in range(2)]
    covered = [(frame != 0).any(0) for frame in seen]
    assert covered[0].any()
    assert not covered[0][48:].any()
    assert not torch.equal(*covered)


def test_the_loss_of_a_photo_is_per_object(small, photos):
    goal = SimpleNamespace(aim=lambda *_: None, loss=lambda *_: torch.tensor([6.0]))
    of_one = [replace(photos[0], attacked=torch.ones(2, dtype=torch.bool))]
    assert picture_loss(small, of_one, goal, NOISE, torch.zeros(3, 96, 96), 0.1, np.random.default_rng(0)) == 3


def test_steps_of_a_picture_shrink_to_the_end(small, photos, monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *of: rates.append(self.param_groups[0]["lr"]) or step(self, *of)
    )
    learn_picture(small, photos, goal_of(small), PATCH, Learning(photos=8, batch=2, rate=0.1))
    assert rates == pytest.approx([0.09 * (1 - number / 4) for number in range(4)])
