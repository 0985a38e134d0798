"""Boxes on photos."""

import numpy as np
import pytest
import torch

from detguard.detections import Detections
from detguard.overlay import draw_detections


@pytest.mark.parametrize("odd", [[50, 50, 20, 20], [float("nan"), 0, 9, 9], [0, 0, float("inf"), 9]])
def test_a_box_that_is_none_is_not_drawn(odd):
    photo = np.full((64, 64, 3), 128, np.uint8)
    boxes, of_each = torch.tensor([odd, [8.0, 30, 40, 60]]), torch.zeros(2, dtype=torch.int64)
    drawn = draw_detections(photo, Detections(boxes, torch.tensor([0.9, 0.5]), of_each), {0: "person"})
    alone = Detections(boxes[1:], torch.tensor([0.5]), of_each[1:])
    assert np.array_equal(drawn, draw_detections(photo, alone, {0: "person"}))
    assert not np.array_equal(drawn, photo)
