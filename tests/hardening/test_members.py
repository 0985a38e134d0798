import pytest
import torch

from detguard import DetguardError
from detguard.hardening.members import Members, parse_members
from detguard.photos import frames_tensor


@pytest.fixture
def photos(bus):
    return [bus[:96, :64].copy(), bus[200:296, 300:364].copy()] * 4


def shown(photos, specs):
    frames = frames_tensor(photos).requires_grad_()
    seen = Members(parse_members(specs), [(0, i) for i in range(len(photos))])(frames)
    (gradient,) = torch.autograd.grad((seen * torch.arange(96.0).view(96, 1)).sum(), frames)
    return frames, seen, gradient


def test_each_frame_is_itself_or_what_a_transform_makes_of_it_and_its_gradient_goes_straight_through(photos):
    (transform,) = parse_members("median:5")
    frames, seen, gradient = shown(photos, "median:5")
    filtered = frames_tensor([transform(photo) for photo in photos])
    through = [torch.equal(*pair) for pair in zip(seen, filtered, strict=True)]
    assert 0 < sum(through) < len(photos)
    assert all(a or torch.equal(b, c) for a, b, c in zip(through, seen, frames, strict=True))
    assert torch.equal(gradient, torch.arange(96.0).view(96, 1).expand_as(frames))


def test_a_gradient_that_must_not_go_straight_through_takes_the_way_of_the_transform(photos):
    frames, seen, gradient = shown(photos, "invert:1")
    inverted = (seen != frames).flatten(1).any(1)
    assert 0 < inverted.sum() < len(photos)
    assert (gradient[inverted] <= 0).all()
    assert (gradient[~inverted] >= 0).all()


@pytest.mark.parametrize("spec", ["rotate:5", "jpeg:75,crop:0.9", "stretch:0.9..1.1"])
def test_what_moves_pixels_is_refused(spec):
    with pytest.raises(DetguardError, match=r"`transforms` (rotate|crop|stretch)\S+: moves pixels away"):
        parse_members(spec)
