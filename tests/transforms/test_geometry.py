import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detguard import DetguardError
from detguard.detections import Detections
from detguard.transforms.base import seen
from detguard.transforms.parse import parse_transforms
from detguard.transforms.warp import Warp

MOVING = ("rotate:7", "crop:0.8", "flip:h", "flip:v", "stretch:1.3", "perspective:0.2", "perspective:-0.2")


def only(spec):
    (transform,) = parse_transforms(spec)
    return transform


def smooth(seed, shape=(60, 44)):
    """A photo without edges, of which OpenCV's rounding of places changes little."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(30, 220, (1, 3, 5, 4)))
    fine = torch.nn.functional.interpolate(coarse, shape, mode="bicubic", align_corners=True)
    return fine[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(MOVING))
def test_gradients_come_back_by_the_adjoint(seed, spec):
    photo, transform = smooth(seed), only(spec)
    picture = transform(photo).astype(np.float64)
    weights = np.random.default_rng(seed).uniform(0, 1, picture.shape)
    back = transform.pull_back(photo, torch.from_numpy(weights.transpose(2, 0, 1)).float())
    # <w, T x> = <T* w, x>
    there, here = (weights * picture).sum(), (back.permute(1, 2, 0).double().numpy() * photo).sum()
    assert here == pytest.approx(there, rel=2e-3)


@pytest.mark.parametrize("spec", MOVING)
def test_boxes_go_where_pixels_go(spec):
    photo, transform = np.zeros((200, 160, 3), np.uint8), only(spec)
    photo[80:120, 50:90] = 255
    box = torch.tensor([[50.0, 80.0, 90.0, 120.0]])
    found, _ = seen(transform, (200, 160), Detections(box, torch.ones(1), torch.zeros(1).long()), torch.ones(1).bool())
    rows, columns = (transform(photo)[..., 0] > 128).nonzero()
    there = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
    # A turned square sticks out of its ellipse.
    assert torch.allclose(found.boxes[0], there, atol=4)


@pytest.mark.parametrize("spec", MOVING)
def test_the_inverse_leads_back(spec):
    warp = only(spec).warp((200, 160))
    box = torch.tensor([[60.0, 70.0, 100.0, 110.0]])
    slack = 6 if "rotate" in spec or "perspective" in spec else 1e-3  # ellipses grow with each turn
    inverse = Warp(np.linalg.inv(warp.matrix), warp.picture, warp.photo)
    assert torch.allclose(inverse.boxes(warp.boxes(box)), box, atol=slack)


@pytest.mark.parametrize(
    ("spec", "same"), [("flip:h", np.s_[:, ::-1]), ("flip:v", np.s_[::-1]), ("crop:0.5", np.s_[50:150, 40:120])]
)
def test_whole_pixels_stay_what_they_are(spec, same):
    photo = np.random.default_rng(0).integers(0, 256, (200, 160, 3), np.uint8)
    assert np.array_equal(only(spec)(photo), photo[same])


def test_objects_that_a_picture_hardly_shows_do_not_count_in_it():
    boxes = torch.tensor([[0.0, 0, 40, 40], [80, 80, 120, 120], [30, 80, 70, 120]])
    found = Detections(boxes, torch.ones(3), torch.arange(3))
    left, attacked = seen(only("crop:0.5"), (200, 160), found, torch.tensor([True, False, True]))
    assert left.classes.tolist() == [1, 2]
    assert left.boxes.tolist() == [[40, 30, 80, 70], [0, 30, 30, 70]]
    assert attacked.tolist() == [False, True]


def test_a_range_draws_within_its_ends_and_names_what_it_drew():
    drawn = [str(only("rotate:-5..5").draw(np.random.default_rng(seed))) for seed in range(40)]
    degrees = [float(spec.partition(":")[2]) for spec in drawn]
    assert min(degrees) >= -5
    assert max(degrees) <= 5
    assert len(set(drawn)) > 30
    assert [str(only(spec)) for spec in drawn] == drawn
    assert {str(only("median:3..5").draw(np.random.default_rng(seed))) for seed in range(40)} == {
        "median:3",
        "median:5",
    }
    assert str(only("rotate:-5..5")) == "rotate:-5..5"


@pytest.mark.parametrize("spec", ["rotate:5..-5", "rotate:1..500", "flip:h..v", "crop:0", "perspective:2", "stretch:x"])
def test_what_is_no_transform_is_refused(spec):
    with pytest.raises(DetguardError, match=f"transform '{spec}'"):
        parse_transforms(spec)


def test_two_numbers_the_wrong_way_round_are_shown_the_right_way():
    with pytest.raises(DetguardError, match=r"expected the smaller number first, -8\.\.8, as in rotate:"):
        parse_transforms("rotate:8..-8")
    with pytest.raises(DetguardError, match=r"expected two different numbers, or one alone, as in rotate:"):
        parse_transforms("rotate:8..8")
