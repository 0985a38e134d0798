import numpy as np
import pytest
import torch

from detguard.photos import Letterbox
from detguard.transforms.paste import Look, Spot, paste, paste_on_photo


def patch(side=16, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).uniform(0.2, 0.8, (3, side, side)))


def test_the_gradient_reaches_the_patch():
    torch.manual_seed(0)
    look = Look.draw(np.random.default_rng(3))
    spots = [
        Spot.on(box, 0.5, (32, 48), Look(look.scale, look.angle, look.tilt, 0.9, 0.05))
        for box in ((2, 2, 20, 30), (24, 0, 50, 40))
    ]
    picture, weights = torch.rand(3, 32, 48).double(), torch.rand(3, 32, 48).double()
    assert torch.autograd.gradcheck(
        lambda p: (paste(picture, p, spots) * weights).sum(), patch(8).requires_grad_(), atol=1e-6
    )


def test_a_patch_lies_in_the_middle_of_the_upper_half_with_its_share_of_the_box():
    photo = np.zeros((200, 160, 3), np.uint8)
    seen = paste_on_photo(photo, np.full((16, 16, 3), 200, np.uint8), torch.tensor([[40.0, 20.0, 80.0, 180.0]]), 0.25)
    rows, columns = (seen[..., 0] > 0).nonzero()
    # The root of 40 x 160 is 80; the middle is at (60, 60).
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (50, 70, 50, 70)
    assert set(np.unique(seen)) == {0, 200}


def test_a_frame_has_the_patch_where_the_photo_has_it():
    photo = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    square = (patch(24).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    box = [3.0, 5.0, 50.0, 90.0]
    judged = paste_on_photo(photo, square, torch.tensor([box]), 0.4)
    planes = torch.from_numpy(photo).permute(2, 0, 1).double() / 255
    learned = paste(planes, torch.from_numpy(square).permute(2, 0, 1).double() / 255, [Spot.on(box, 0.4, (96, 64))])
    assert np.abs(learned.permute(1, 2, 0).numpy() * 255 - judged).max() <= 0.501
    # And so in a frame of half the size, or one that is stretched: what is square is so in the photo.
    wide = Letterbox.fit((96, 64), 32, 32, stretch=True)
    spot = Spot.on(box, 0.4, (96, 64)).in_frame(wide)
    assert wide.frame == spot.size == (32, 32)
    assert np.ptp(spot.corners, axis=0) == pytest.approx(np.ptp(Spot.on(box, 0.4, (96, 64)).corners, axis=0) / [2, 3])
    spot = Spot.on([side / 2 for side in box], 0.4, (48, 32))
    small = paste(
        torch.full((3, 48, 32), -1.0).double(), torch.from_numpy(square).permute(2, 0, 1).double() / 255, [spot]
    )
    changed = (judged != photo).any(2)[::2, ::2]
    assert ((small[0] >= 0).numpy() != changed).mean() < 0.03


@pytest.mark.parametrize("box", [(-60, -60, -40, -40), (90, 20, 150, 70), (5.5, 5, 5.5, 9)])
def test_what_lies_outside_is_not_pasted(box):
    picture = torch.zeros(3, 60, 100)
    seen = paste(picture, torch.ones(3, 8, 8), [Spot.on(box, 0.3, (60, 100))])
    assert seen.shape == picture.shape
    assert int((seen > 0).sum()) <= 3 * 20 * 20
