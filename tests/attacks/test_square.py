import numpy as np
import torch

from detguard.attacks.budgets import Linf
from detguard.attacks.square import square_attack
from detguard.detections import Detections
from detguard.objectives import Degrade


def test_it_lowers_confidence_within_its_budget_and_repeats(bundled, bus):
    found = bundled.detect([bus], 0.25)[0]
    objects = Detections(found.boxes, torch.ones(len(found)), found.classes)
    objective = Degrade(tuple(bundled.class_names))
    (first,), (second,) = (square_attack(bundled, [bus], [objects], objective, Linf(8), 40, [3]) for _ in range(2))
    assert np.array_equal(first, second)
    assert 1 <= np.abs(first.astype(int) - bus).max() <= 8
    before, after = (bundled.detect([p], 0.001)[0].of([0, 4]).scores for p in (bus, first))
    assert after[:4].sum() < before[:4].sum()
