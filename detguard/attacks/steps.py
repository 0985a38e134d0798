"""How an attack moves: from a photo, the gradient and the loss there to the next one. A new rule is a class and its
line in `RULES`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from detguard import DetguardError
from detguard.attacks.budgets import WHITE, Budget, Linf


@dataclass
class Rule(ABC):
    """One photo's way through an attack: called once per step, in order, with what it has to know.

    budget, original: where it may go, from which photo, float32 [H, W, 3] levels; step: length of one, in the unit of
    `eps`; steps: how many there will be at most; momentum: share of earlier gradients in each step; seed: of what is
    drawn at random; blind: whether it goes by losses alone; compares: whether by how they change,
    for which all have to be of the same members; by_budget: whether it moves as far as the budget measures it, not so
    far with each value; unused: options of an attack that it has its own in the place of;
    evened: whether `momentum` brings gradients to one mean size before it adds them.
    """

    blind: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    by_budget: ClassVar[bool] = False
    unused: ClassVar[tuple[str, ...]] = ()
    evened: ClassVar[bool] = True
    budget: Budget
    original: Tensor
    step: float
    steps: int
    momentum: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """What is kept from step to step."""
        self._velocity: Tensor | None = None

    def begin(self, x: Tensor) -> Tensor:
        """The photo that the attack begins with, in the form in which this rule is fastest."""
        return x

    @property
    def length(self) -> float:
        """The length of a step in levels of 255."""
        return self.step * self.budget.scale

    @abstractmethod
    def __call__(self, x: Tensor, gradient: Tensor, loss: float) -> Tensor:
        """The next photo after `x` [H, W, 3], within the budget, where the loss of that `gradient` should be lower.

        gradient: empty for a `blind` rule, for which none is computed.
        """

    def gathered(self, gradient: Tensor) -> Tensor:
        """The gradient and what `momentum` keeps of earlier ones (Dong et al. 2018, eq. 6)."""
        if not self.momentum:
            return gradient
        size = gradient.abs().mean().clamp(min=1e-20) if self.evened else gradient.new_ones(())
        if self._velocity is None:
            self._velocity = gradient / size
        else:  # in place: half of the time
            self._velocity.mul_(self.momentum).addcdiv_(gradient, size)
        return self._velocity

    def within(self, x: Tensor) -> Tensor:
        """`x`, projected onto the budget."""
        return self.budget.project(x, self.original)


class Steepest(Rule):
    """The step by which the loss falls most, as the budget measures it: by signs in L-inf, along the gradient in L2."""

    by_budget = True

    @override
    def begin(self, x: Tensor) -> Tensor:
        """In bytes where all photos on the way are in whole levels: the same ones in a quarter of the time."""
        whole = type(self.budget) is Linf and float(self.budget.eps).is_integer() and float(self.length).is_integer()
        if not (whole and type(self) in (Steepest, Sign) and x.device.type == "cpu" and 0 < self.length <= WHITE):
            return x
        original, eps = self.original.numpy().astype(np.uint8), np.uint8(min(self.budget.eps, WHITE))
        self._low, self._high = np.maximum(original, eps) - eps, np.minimum(original, np.uint8(WHITE) - eps) + eps
        return torch.from_numpy(x.numpy().astype(np.uint8))

    @override
    def __call__(self, x: Tensor, gradient: Tensor, loss: float) -> Tensor:
        gathered = self.gathered(gradient)
        if x.dtype == torch.uint8:
            return self._in_bytes(x.numpy(), gathered.numpy())
        return self.within(x.sub(self.direction(gathered), alpha=self.length))

    def _in_bytes(self, x: np.ndarray, gradient: np.ndarray) -> Tensor:
        # As gradients lie in memory, channel by channel or pixel by pixel.
        planes = gradient if gradient.flags.c_contiguous else gradient.transpose(2, 0, 1)
        down, up = (moves.view(np.uint8) for moves in (planes > 0, planes < 0))
        if planes is not gradient:
            down, up = cv2.merge(list(down)), cv2.merge(list(up))
        if self.length != 1:
            for moves in (down, up):
                moves *= np.uint8(self.length)
        moved = cv2.add(cv2.subtract(x, down, dst=down), up, dst=down)
        return torch.from_numpy(cv2.min(cv2.max(moved, self._low, dst=moved), self._high, dst=moved))

    def direction(self, gradient: Tensor) -> Tensor:
        """The direction of the step, which is `length` times as long; shape as the gradient."""
        return self.budget.direction(gradient)


class Sign(Steepest):
    """Every value by the same amount (Goodfellow et al. 2015)."""

    by_budget = False

    @override
    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign()


class Normalized(Steepest):
    """Along the gradient, values moving by `step` levels on average."""

    by_budget = False

    @override
    def direction(self, gradient: Tensor) -> Tensor:
        return gradient / gradient.abs().mean().clamp(min=1e-30)


class Raw(Steepest):
    """Along the gradient as it is, `step` times."""

    evened = False

    @override
    def direction(self, gradient: Tensor) -> Tensor:
        return gradient


class Adam(Rule):
    """Adam (Kingma & Ba 2015, algorithm 1) on levels; `step` is its rate."""

    unused = ("momentum",)
    _square: Tensor | float = 0.0
    _mean: Tensor | float = 0.0
    _done: int = 0

    @override
    def __call__(self, x: Tensor, gradient: Tensor, loss: float) -> Tensor:
        self._done += 1
        # By their mean size, or what keeps from dividing by zero would be large beside gradients of many small values.
        gradient = gradient / gradient.abs().mean().clamp(min=1e-30)
        self._mean = 0.9 * self._mean + 0.1 * gradient
        self._square = 0.999 * self._square + 0.001 * gradient.square()
        mean, square = self._mean / (1 - 0.9**self._done), self._square / (1 - 0.999**self._done)
        return self.within(x - self.length * mean / (square.sqrt() + 1e-8))


class Apgd(Rule):
    """Auto-PGD (Croce & Hein 2020, algorithm 1): steps of twice the budget at first, halved where they stop helping.

    `step` and `momentum` are its own; the first step after a halving, from the best photo, has no momentum term.
    """

    compares = by_budget = True
    unused = ("step", "momentum")
    ALPHA, RHO = 0.75, 0.75
    FIRST, SHORTER, SHORTEST = 0.22, 0.03, 0.06

    def __post_init__(self) -> None:
        self._size = 2 * self.budget.eps * self.budget.scale
        self._before: Tensor | None = None
        self._best: tuple[float, Tensor, Tensor] | None = None
        self._best_at_check, self._last_loss = torch.inf, -torch.inf  # the first loss is no fall
        self._falls = self._since = 0
        self._wait, self._halved = self.FIRST, True

    @override
    def __call__(self, x: Tensor, gradient: Tensor, loss: float) -> Tensor:
        self._falls += loss < self._last_loss
        self._last_loss = loss
        if self._best is None or loss < self._best[0]:
            self._best = loss, x, gradient
        if self._since >= max(1, round(self._wait * self.steps)):
            x, gradient = self._checked(x, gradient, self._best)
        moved = self.within(x - self._size * self.budget.direction(gradient))
        if self._before is not None:
            moved = self.within(x + self.ALPHA * (moved - x) + (1 - self.ALPHA) * (x - self._before))
        self._before = x
        self._since += 1
        return moved

    def _checked(self, x: Tensor, gradient: Tensor, best: tuple[float, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """From where steps go on: the last photo, or the best so far where they are halved."""
        stuck = not self._halved and best[0] >= self._best_at_check
        self._halved = self._falls < self.RHO * self._since or stuck
        if self._halved:
            self._size /= 2
            _, x, gradient = best
            self._before = None
        self._best_at_check = best[0]
        self._wait = max(self._wait - self.SHORTER, self.SHORTEST)
        self._falls = self._since = 0
        return x, gradient


RULES: dict[str, type[Rule]] = {
    "steepest": Steepest,
    "sign": Sign,
    "normalized": Normalized,
    "raw": Raw,
    "adam": Adam,
    "apgd": Apgd,
}


def rule_named(name: str) -> type[Rule]:
    """A rule of `RULES`.

    Raises:
        DetguardError: there is none of that name.
    """
    if name not in RULES:
        raise DetguardError(f"`rule` {name}: expected one of {', '.join(RULES)}")
    return RULES[name]
