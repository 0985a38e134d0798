"""Attacks inside training: on frames in memory, in floats, as many at once as the batch has.

They leave the padding around photos as it is, as attacks on photos do: a gate that was trained on attacked padding told
98 % of attacked frames by it, and 22 % of attacked photos.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from detguard import DetguardError
from detguard.attacks.budgets import Linf
from detguard.detectors.gated import content

METHODS = ("pgd", "fgsm", "free")


@dataclass(frozen=True)
class Adversary:
    """How training frames are attacked. eps: budget in levels of 255; steps: gradients that an attack follows.

    method: "pgd" starts from noise within the budget (one step of it is the fast FGSM of Wong et al. 2020); "fgsm" is
    one step from the clean frame; "free" updates the weights with every gradient of the attack (Shafahi et al. 2019).

    Raises:
        DetguardError: no such method, or FGSM of several steps.
    """

    eps: float = 4.0
    steps: int = 2
    method: str = "pgd"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise DetguardError(f"`attack` {self.method}: expected one of {', '.join(METHODS)}")
        if self.method == "fgsm" and self.steps != 1:
            raise DetguardError(f"`steps` {self.steps}: fgsm has one; several steps are pgd")

    @property
    def step(self) -> float:
        """Levels per step: eps by FGSM, 1.25 eps by one step from noise, else together two and a half times eps."""
        if self.method == "fgsm":
            return self.eps
        return self.eps * min(1.25 if self.steps == 1 else 1, 2.5 / self.steps)

    @property
    def updates(self) -> int:
        """Updates of the weights per batch: one, or by "free" one at the clean frames and one after every step."""
        return self.steps + 1 if self.method == "free" else 1

    def start(self, frames: Tensor, among: range | None = None) -> Tensor:
        """Where an attack on frames, float32 [B, 3, H, W] in 0..1, begins; its noise is drawn on their device.

        among: which rows of a larger batch they are, as noise is drawn for all of it; by default they are all.
        """
        if self.method == "fgsm":
            return frames
        rows = range(len(frames)) if among is None else among
        eps, shape = self.eps / 255, (rows.stop, *frames.shape[1:])
        noise = torch.empty(shape, device=frames.device, memory_format=torch.channels_last)
        return self.clip(noise.uniform_(-eps, eps)[rows.start :: rows.step].add_(frames), frames)

    def clip(self, x: Tensor, frames: Tensor) -> Tensor:
        """The nearest to `x` that is within the budget around `frames`, in 0..1, and has their padding."""
        return torch.where(content(frames) > 0, Linf(self.eps).project(x, frames, white=1), frames)

    def advance(self, x: Tensor, gradient: Tensor, frames: Tensor) -> Tensor:
        """One step from `x` to where the loss is higher, within the budget around `frames`."""
        return self.clip(Linf(self.eps).direction(gradient).mul_(self.step / 255).add_(x), frames)


def perturb(
    frames: Tensor, loss: Callable[[Tensor], Tensor], adversary: Adversary, among: range | None = None
) -> Tensor:
    """Frames, float32 [B, 3, H, W] in 0..1, moved within the budget to where `loss` ([B]) is higher; see `start`."""
    x = adversary.start(frames, among)
    for _ in range(adversary.steps):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x).sum(), x)
        x = adversary.advance(x.detach(), gradient, frames)
    return x.detach()
