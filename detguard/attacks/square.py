"""The Square attack (Andriushchenko et al. 2020): random search within a budget, by scores alone."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from detguard.attacks.steps import Rule


class Square(Rule):
    """Proposes a photo with one square changed, and goes on from it where the loss is lower; its gradient is empty.

    The first photo that it is called with is the clean one. The budget decides where squares lie and what they change.
    """

    blind: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._best, self._lowest, self._proposed = self.original, torch.inf, 0

    @override
    def __call__(self, x: Tensor, gradient: Tensor, loss: float) -> Tensor:
        if loss < self._lowest:
            self._best, self._lowest = x, loss
        number, self._proposed = self._proposed, self._proposed + 1
        if number == 0:
            return self.budget.scattered(self.original, self._rng)
        return self.budget.moved(self._best, self.original, share(number, self.steps), self._rng)


def share(number: int, proposals: int) -> float:
    """Of the largest square's area, that of one: 1 at first, halved as the search goes on (their section 3.2)."""
    halvings = sum(number * 10_000 > bound * proposals for bound in (10, 50, 200, 1000, 2000, 4000, 6000, 8000))
    return float(0.5**halvings)
