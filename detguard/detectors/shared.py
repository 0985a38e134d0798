"""Experts that share weights with another one: a head of their own, or low-rank changes of its convolutions."""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

WHOLE, HEAD, ADAPTER = FORMS = ("whole", "head", "adapter")
# Of an adapter: of YOLO11n, a ninth of the weights of a whole network.
RANK, MOST_RANK = 8, 64
# The optimizer takes weights of nothing for so large, and moves them in proportion to that.
OF_NOTHING = 1e-2
# A change of low rank learns at so many times the rate of a whole network (Schulman et al. 2025 found ten): of a dark
# photo, in 12 batches, the loss fell from 7.2 to 6.3 at once the rate, 5.7 at three times, 4.3 at ten; whole, to 6.0.
FASTER = 5


@dataclass(frozen=True)
class Shared:
    """What an expert has from another one, `of`: all but the head (HEAD), or all but changes of a rank (ADAPTER)."""

    form: str
    of: int
    rank: int = RANK

    @classmethod
    def read(cls, entry: dict[str, Any], number: int) -> "Shared":
        """That of expert `number` in a card, as `asdict` writes it.

        Raises:
            ValueError: it is not such a one; KeyError, TypeError: nor has it the parts of one.
        """
        found = cls(str(entry["form"]), int(entry["of"]), int(entry["rank"]))
        if found.form not in (HEAD, ADAPTER) or not 0 <= found.of < number or not 1 <= found.rank <= MOST_RANK:
            raise ValueError(f"expert {number} shares nothing that is known with one before it")
        return found

    def entry(self) -> dict[str, Any]:
        """The plain values that a card keeps of it."""
        return asdict(self)

    def own(self, layers: Sequence[nn.Module]) -> nn.ModuleList:
        """The layers that an expert has of its own, where those of the other one are these."""
        return adapted(layers, self.rank) if self.form == ADAPTER else unshared(layers[-1:])

    def whole(self, layers: Sequence[nn.Module], own: Sequence[nn.Module]) -> list[nn.Module]:
        """All layers of the expert in order, the shared ones first."""
        return list(own) if self.form == ADAPTER else [*layers[:-1], *own]

    def weights(self, layers: Sequence[nn.Module]) -> int:
        """How many weights it has of its own, or a few more."""
        if self.form == HEAD:
            return sum(p.numel() for p in layers[-1].parameters())
        return sum(
            self.rank * sum(p.flatten(1).shape) if p.ndim > 1 else p.numel()
            for layer in layers
            for p in layer.parameters()
        )


class LowRank(nn.Module):
    """A convolution by the weights of another one, left as they are, a change of low rank, and biases of its own.

    The change is `up @ down` (Hu et al. 2021, LoRA): float32 [C_out, rank] and [rank, C_in * k * k]; at first it is 0.
    """

    def __init__(self, conv: nn.Conv2d, rank: int) -> None:
        super().__init__()
        self._shared = (conv,)  # in a tuple it is no part of this module: neither saved with it, nor trained
        weight = conv.weight.detach()
        rows, columns = weight.flatten(1).shape
        # A step of `up` then changes weights as much as FASTER steps of a whole network do.
        length = FASTER * float(weight.square().mean().sqrt()) / (OF_NOTHING * math.sqrt(rank))
        self.down = nn.Parameter(weight.new_empty(rank, columns).normal_(std=length))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        bias = weight.new_zeros(rows) if conv.bias is None else conv.bias.detach()
        self.bias = nn.Parameter(bias.clone())

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution whose weights are shared."""
        return self._shared[0]

    @property
    def weight(self) -> Tensor:
        """The weights that it convolves with: the shared ones and what the expert adds."""
        return self.conv.weight + (self.up @ self.down).view_as(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The shared convolution with the expert's own change to its weights."""
        return self.conv._conv_forward(x, self.weight, self.bias)

    def again(self) -> "LowRank":
        """Another one like it, of the same convolution."""
        return copy.deepcopy(self, {id(self.conv): self.conv})

    @torch.no_grad()
    def alone(self) -> nn.Conv2d:
        """A convolution that computes the same and shares nothing."""
        conv = copy.deepcopy(self.conv)
        conv.weight, conv.bias = nn.Parameter(self.weight), nn.Parameter(self.bias.clone())
        return conv


def adapted(layers: Sequence[nn.Module], rank: int) -> nn.ModuleList:
    """Layers that compute the same by the convolutions of others; those by channel, and constants, are copied."""
    whole, made = nn.ModuleList(layers), dict[int, Any]()
    for name, module in whole.named_modules():
        if isinstance(module, LowRank):
            made[id(module)] = module.again()
        elif isinstance(module, nn.Conv2d) and module.groups == 1 and "dfl" not in name:
            made[id(module)] = LowRank(module, rank)
    # What is known to have been copied already is not.
    return copy.deepcopy(whole, made)


def unshared(layers: Sequence[nn.Module]) -> nn.ModuleList:
    """A copy of layers that shares nothing."""
    whole = nn.ModuleList(layers)
    return copy.deepcopy(whole, {id(m): m.alone() for m in whole.modules() if isinstance(m, LowRank)})
