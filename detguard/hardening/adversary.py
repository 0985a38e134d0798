"""Attacks inside training: on frames in memory, in floats, as many at once as the batch has."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Adversary:
    """How training frames are attacked. eps: budget in levels of 255.

    steps: 1 is FGSM; random: start from noise within the budget, without which FGSM teaches to hide the gradient.
    """

    eps: float = 4.0
    steps: int = 2
    random: bool = True

    @property
    def step(self) -> float:
        """Levels per step: 1.25 eps for one random-start step (Wong et al. 2020), else two and a half crossings."""
        if self.steps == 1:
            return self.eps * (1.25 if self.random else 1)
        return min(self.eps, 2.5 * self.eps / self.steps)


def perturb(
    frames: Tensor, loss: Callable[[Tensor], Tensor], adversary: Adversary, generator: torch.Generator
) -> Tensor:
    """Frames, float32 [B, 3, H, W] in 0..1, moved within the budget to where `loss` ([B]) is higher."""
    eps, step = adversary.eps / 255, adversary.step / 255
    low, high = (frames - eps).clamp(min=0), (frames + eps).clamp(max=1)
    x = frames
    if adversary.random:
        noise = torch.rand(frames.shape, generator=generator).to(frames)
        x = (frames + (2 * noise - 1) * eps).clamp(low, high).contiguous(memory_format=torch.channels_last)
    for _ in range(adversary.steps):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x).sum(), x)
        x = (x.detach() + step * gradient.sign()).clamp(low, high)
    return x.detach()
