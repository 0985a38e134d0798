"""How the answers of a gated ensemble's experts become one, and what the others may do to the robust one."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from detguard import DetguardError

TINY = 1e-37
# Of a box, each at a distance from the candidate's place.
SIDES = 4
# Of each expert the rows of the batch that it answered for, None for all, and its raw outputs, None where it was not
# evaluated: `scores` (logits [b, C, N]) and `boxes` (logits of the distances' distributions, [b, 4 * R, N]).
Outputs = Sequence[tuple[Tensor | None, dict[str, Any] | None]]


@dataclass(frozen=True)
class Fusion(ABC):
    """A rule, written as its name and its number, as in "bounded:0.5"; number: 0..most."""

    number: float

    name: ClassVar[str]
    most: ClassVar[float]
    # Whether the robust expert answers for every frame, whatever the gate says.
    leads: ClassVar[bool]

    def __post_init__(self) -> None:
        if not 0 <= self.number <= self.most:
            raise DetguardError(f"{self.name}:{self.number:g}: expected a number in 0..{self.most:g}")

    def __str__(self) -> str:
        return f"{self.name}:{self.number:g}"

    def log_weights(self, log_weights: Tensor, robust: int) -> Tensor:
        """Logarithm of the weights [B, K] that experts get where the gate gives these; by default the same."""
        return log_weights

    @abstractmethod
    def fuse(self, outputs: Outputs, log_weights: Tensor, robust: int, leaders: Sequence[int] = ()) -> dict[str, Any]:
        """The experts' raw outputs as those of one head, before NMS.

        robust: the number of the robust expert; leaders: those of experts that were grown.
        """


@dataclass(frozen=True)
class Average(Fusion):
    """Class probabilities averaged by the gate's weights; `number` is the least weight of the robust expert.

    An expert that does not resist can be made to say anything, with a confidence of one less that weight.
    """

    name = "average"
    most = 0.99
    leads = False

    @override
    def log_weights(self, log_weights: Tensor, robust: int) -> Tensor:
        if not self.number:
            return log_weights
        weights = list((log_weights + math.log1p(-self.number)).unbind(1))
        # Of its own alone: of an expert that is not asked, -inf, logaddexp with -inf has no gradient.
        weights[robust] = torch.logaddexp(weights[robust], torch.full_like(weights[robust], math.log(self.number)))
        return torch.stack(weights, 1)

    @override
    def fuse(self, outputs: Outputs, log_weights: Tensor, robust: int, leaders: Sequence[int] = ()) -> dict[str, Any]:
        return average(outputs, log_weights)


@dataclass(frozen=True)
class Bounded(Fusion):
    """The robust expert's answer, each logit moved by at most `number` towards that of the average of all.

    However the gate and the other experts are fooled, no logit of a class is further than that from the robust
    expert's, and no logarithm of a probability in the distribution of a distance than twice that, as they sum to 1.
    Distances without one are its own.
    Leaders share in that answer by the gate's weights, the robust expert having what the gate leaves to all others: so
    what was learned of a new kind is not held to an expert that does not know it. They need not resist where the gate
    does, of which that share is all that they get of other photos.
    """

    name = "bounded"
    most = 20.0
    leads = True

    @override
    def fuse(self, outputs: Outputs, log_weights: Tensor, robust: int, leaders: Sequence[int] = ()) -> dict[str, Any]:
        leader = led_by(outputs, log_weights, robust, leaders) if leaders else outputs[robust][1]
        assert leader is not None
        whole = average(outputs, log_weights)
        scores, boxes = self._bound(whole["scores"], leader["scores"].float()), leader["boxes"]
        if boxes.shape[1] > SIDES:
            of_all, led = (x.float().unflatten(1, (SIDES, -1)).log_softmax(2) for x in (whole["boxes"], boxes))
            boxes = self._bound(of_all, led).view_as(boxes)
        return {"scores": scores, "boxes": boxes, "feats": leader["feats"]}

    def _bound(self, x: Tensor, led: Tensor) -> Tensor:
        # By tensors, not by clamp: where the bound holds, the gradient is that of the leader.
        return x.minimum(led + self.number).maximum(led - self.number)


RULES: dict[str, type[Fusion]] = {rule.name: rule for rule in (Average, Bounded)}


def parse_fusion(text: str) -> Fusion:
    """The rule that a text names, as in "average:0.5" or "bounded:0.5".

    Raises:
        DetguardError: there is no such rule, or its number is out of range.
    """
    name, _, number = text.partition(":")
    if name in RULES:
        try:
            return RULES[name](float(number))
        except ValueError:
            pass
    known = ", ".join(f"{rule.name}:0..{rule.most:g}" for rule in RULES.values())
    raise DetguardError(f"`fusion` {text}: expected one of {known}")


def led_by(outputs: Outputs, log_weights: Tensor, robust: int, leaders: Sequence[int]) -> dict[str, Any]:
    """The average of the robust expert and the leaders, it having the weights of all that are no leaders."""
    shares = [x if i in leaders else torch.full_like(x, -torch.inf) for i, x in enumerate(log_weights.T)]
    others = torch.stack([log_weights[:, i] for i in range(len(outputs)) if i not in leaders])
    # Not by logsumexp, whose gradient is no number where top-k leaves all of them out.
    shares[robust] = others.exp().sum(0).clamp(min=TINY).log()
    asked = [out if i == robust or i in leaders else (None, None) for i, out in enumerate(outputs)]
    return average(asked, torch.stack(shares, 1))


def average(outputs: Outputs, log_weights: Tensor) -> dict[str, Any]:
    """Probabilities averaged with the weights `w`, distributions with `w * p`, p the expert's best class there.

    Both come out as logits again.
    """
    evaluated = [i for i, (_, raw) in enumerate(outputs) if raw is not None]  # or cost would grow with the others
    given = [(rows, raw) for rows, raw in outputs if raw is not None]
    first = given[0][1]

    def stacked(key: str) -> Tensor:
        whole = []
        for rows, raw in given:
            if rows is None:
                whole.append(raw[key])
                continue
            zeros = first[key].new_zeros(len(log_weights), *first[key].shape[1:])
            whole.append(zeros.index_copy(0, rows, raw[key]))
        return torch.stack(whole, 1)

    scores, boxes = stacked("scores").float(), stacked("boxes").float().unflatten(2, (SIDES, -1))
    weights = torch.stack([log_weights[:, i] for i in evaluated], 1).float().exp()[:, :, None, None]
    # Probabilities of yes and of no, each by a sigmoid of its own: exact at both ends, and far faster than logarithms.
    yes, no = ((weights * x.sigmoid()).sum(1).clamp(min=TINY) for x in (scores, -scores))
    share = weights[:, :, 0] * scores.amax(2).sigmoid()
    share = (share / share.sum(1, keepdim=True).clamp(min=TINY))[:, :, None, None]
    # A single bin is no distribution but the distance itself (YOLO26).
    alone = boxes.shape[3] == 1
    fused = (share * boxes).sum(1) if alone else (share * boxes.softmax(3)).sum(1).clamp(min=TINY).log()
    return {"scores": yes.log() - no.log(), "boxes": fused.view(-1, *first["boxes"].shape[1:]), "feats": first["feats"]}
