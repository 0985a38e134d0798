"""So much is found that whatever comes after the detector is slowed down or of no use."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from detguard.detections import Candidates, Detections
from detguard.objectives.base import Goal, Scene, pick


@dataclass(frozen=True)
class Flood(Goal):
    """At least `count` objects of the target classes are found, after NMS.

    Attributes:
        targets: one class name or several; by default "all".
        count: objects to find in all, 1..300; 100 is what every family can answer, of which some stop there.
    """

    kind: ClassVar[str] = "flood"
    needs_target: ClassVar[bool] = False
    counts_candidates: ClassVar[bool] = True
    wanted: ClassVar[str] = "found in masses"
    takes: ClassVar[frozenset[str]] = frozenset({"count"})
    default: ClassVar[str] = "all"
    spared: ClassVar[str] = "flooded already"
    count: int = 100

    @override
    def own_loss(self, candidates: Candidates, aims: Sequence[Scene], conf: float, sure: float) -> Tensor:
        """The best target class of every candidate is raised over the threshold."""
        best = pick(candidates.logits, self.classes).amax(2)
        return torch.stack([self.by.higher(one, sure) for one in best])

    @override
    def own_success(self, clean: Detections, attacked: Detections, found: Detections) -> bool:
        """Whether at least `count` objects are found."""
        return len(found.of(self.classes)) >= self.count
