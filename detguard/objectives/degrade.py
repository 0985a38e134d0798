"""The detector's own training loss grows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from detguard.detections import Candidates, Detections
from detguard.objectives.base import Objective
from detguard.training_loss import GAINS, Assignment, assign, detection_loss


@dataclass(frozen=True)
class Degrade(Objective):
    """The worst training loss, or some `parts` of it (see `training_loss.GAINS`): no success test, only worse.

    gate: weight of the logits by which the gate of an ensemble prefers expert `robust` to the best of the others, or to
    expert `towards`.
    """

    kind: ClassVar[str] = "degrade"
    targets: tuple[int, ...]
    parts: tuple[str, ...] = tuple(GAINS)
    gate: float = 0.0
    robust: int = -1
    towards: int | None = None

    @override
    def aim(self, candidates: Candidates, objects: Detections, attacked: Tensor) -> Assignment | Detections:
        """The assignment; for heads without anchors the objects, for their candidates change places as they will."""
        objects = objects[attacked]
        return objects if candidates.anchors is None else self._assign(candidates, objects)

    def _assign(self, candidates: Candidates, objects: Detections) -> Assignment:
        # Training wants a confidence of the overlap, not of 1: raising that loss can make a detection more certain.
        assignment = assign(candidates, [objects])
        return replace(assignment, weights=torch.ones_like(assignment.weights))

    @override
    def loss(
        self, candidates: Candidates, aims: Sequence[Assignment | Detections], conf: float, sure: float | None = None
    ) -> Tensor:
        """The negative sum of the parts, with the assignment of the first pass where there are anchors."""
        assigned = [
            aim if isinstance(aim, Assignment) else self._assign(candidates[i : i + 1], aim)
            for i, aim in enumerate(aims)
        ]
        losses = detection_loss(candidates, Assignment.stack(assigned), parts=self.parts)
        loss = -torch.stack([*losses.values()]).sum(0)
        if not self.gate or candidates.gate is None:
            return loss
        # On logits: the weights themselves have no gradient left where the gate is sure.
        others = candidates.gate.clone()
        others[:, self.robust] = -torch.inf
        other = others.amax(1) if self.towards is None else others[:, self.towards]
        return loss + self.gate * (candidates.gate[:, self.robust] - other)

    @override
    def success(self, clean: Detections, found: Detections, attacked: Tensor | None = None) -> bool:
        """Always False: a lower score is better without end, so the search makes all its steps."""
        return False
