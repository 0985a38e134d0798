"""Boxes on photos."""

import numpy as np
import pytest
import torch

from detguard.detections import Detections
from detguard.overlay import class_colour, draw_detections


@pytest.mark.parametrize("odd", [[50, 50, 20, 20], [float("nan"), 0, 9, 9], [0, 0, float("inf"), 9]])
def test_a_box_that_is_none_is_not_drawn(odd):
    photo = np.full((64, 64, 3), 128, np.uint8)
    boxes, of_each = torch.tensor([odd, [8.0, 30, 40, 60]]), torch.zeros(2, dtype=torch.int64)
    drawn = draw_detections(photo, Detections(boxes, torch.tensor([0.9, 0.5]), of_each), {0: "person"})
    alone = Detections(boxes[1:], torch.tensor([0.5]), of_each[1:])
    assert np.array_equal(drawn, draw_detections(photo, alone, {0: "person"}))
    assert not np.array_equal(drawn, photo)


def test_labels_of_boxes_that_coincide_lie_under_each_other():
    photo, names = np.zeros((120, 160, 3), np.uint8), {0: "person", 1: "car"}
    boxes, scores = torch.tensor([[10.0, 40, 90, 100]] * 2), torch.tensor([0.9, 0.5])
    drawn = draw_detections(photo, Detections(boxes, scores, torch.tensor([0, 1])), names)
    heights = [np.count_nonzero((drawn == class_colour(one)).all(2)[:, 12]) for one in names.values()]
    assert min(heights) > 8  # more than an edge of a box
