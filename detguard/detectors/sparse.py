"""Mean sparsity: values near the mean of their channel say least, and are what an attack moves most easily."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from detguard.detectors.shared import LowRank
from detguard.engine import with_doubles

# Between which shares of its limit a value comes free. A jump at the limit, as in the paper, makes of rounding, which
# is another in each runtime, other detections: 3 % of the boxes of an exported ensemble, by up to 4.7 px.
HELD, FREE, TINY = 0.9, 1.1, 1e-12


class MeanSparse(nn.Module):
    """Sets values near the mean of their channel to it, before an activation (Amini et al. 2024, MeanSparse).

    mean, limit: float32 [C], of each channel, and how far from its mean a value is set to it: up to HELD of that
    wholly, from FREE on not at all, and in between by a part that falls evenly. Its gradient is that of doing nothing:
    attacks are not to be stopped by a gradient of none.
    """

    mean: Tensor
    limit: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ramp = (HELD, FREE)  # part of what `state_hash` says
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("limit", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Of values, [B, C, H, W], those that are left."""
        mean, limit = (value[:, None, None] for value in (self.mean, self.limit))
        with torch.no_grad():
            away = x - mean
            slope = -1 / ((FREE - HELD) * limit.clamp(min=TINY))  # of a channel without a limit, nothing is held
            # In place: these passes over memory are a quarter of the time of a small network.
            held = away.abs().mul_(slope).add_(FREE / (FREE - HELD)).clamp_(0, 1).mul_(away)
        return x - held


def add_sparse(layers: nn.Module) -> None:
    """Put one, as yet without effect, before the activation of every convolution of fused layers."""
    for _, block in blocks_of(layers):
        block.act = nn.Sequential(MeanSparse(block.conv.out_channels).to(block.conv.weight), block.act)


def drop_sparse(layers: nn.Module) -> None:
    """Take the mean-sparse layers out of a network again."""
    for _, block in blocks_of(layers):
        if isinstance(block.act, nn.Sequential) and isinstance(block.act[0], MeanSparse):
            block.act = block.act[1]


def fit_sparse(run: Callable[[Tensor], object], layers: nn.Module, frames: Iterable[Tensor], reach: float) -> None:
    """Set values within `reach` standard deviations of their mean, as `run` makes them of frames of clean photos."""
    statistics = output_statistics(run, layers, frames)
    for name, block in blocks_of(layers):
        mean, variance = statistics[f"{name}.conv" if name else "conv"]
        block.act[0].mean.copy_(mean)
        block.act[0].limit.copy_(reach * variance.sqrt())


def blocks_of(layers: nn.Module) -> list[tuple[str, Any]]:
    """The convolutions that end in an activation, if only in Identity, by name."""
    return [
        (n, m)
        for n, m in layers.named_modules()
        if isinstance(getattr(m, "conv", None), nn.Conv2d | LowRank) and hasattr(m, "act")
    ]


def output_statistics(
    run: Callable[[Tensor], object], layers: nn.Module, frames: Iterable[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of each output channel of each convolution among `layers`, as `run` is shown `frames`."""
    sums: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            values = with_doubles(output).double().transpose(0, 1).flatten(1)
            count = torch.full_like(values[:, 0], values.shape[1])
            seen = [count, values.sum(1), values.square().sum(1)]
            sums[name] = [old + new for old, new in zip(sums[name], seen, strict=True)] if name in sums else seen

        return hook

    convolutions = [(n, m) for n, m in layers.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    hooks = [module.register_forward_hook(watch(name)) for name, module in convolutions]
    try:
        with torch.no_grad():
            for batch in frames:
                run(batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for name, (count, total, squares) in sums.items():
        mean = total / count
        found[name] = (mean.float(), (squares / count - mean.square()).clamp(min=0).float())
    return found
