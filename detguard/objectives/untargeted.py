"""Objects are not found as what they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from detguard.detections import Candidates, Detections, logit
from detguard.objectives.base import Goal, Scene, best_other, near, outcomes, pick


@dataclass(frozen=True)
class Untargeted(Goal):
    """Every attacked object is gone or found as another class: none of its own in its place (IoU >= 0.5).

    Attributes:
        targets: one class name or several; by default "all".
    """

    kind: ClassVar[str] = "untargeted"
    wanted: ClassVar[str] = "gone or found as another class"
    takes: ClassVar[frozenset[str]] = frozenset({"object", "box"})
    default: ClassVar[str] = "all"

    @override
    def own_loss(self, candidates: Candidates, aims: Sequence[Scene], conf: float, sure: float) -> Tensor:
        """On each object its class is lowered to the threshold, or under the best other class, which is nearer."""
        # Where candidates count for every class, another class takes nothing away from the object's own.
        ranked = not candidates.multi_label
        losses = []
        for logits, boxes, scene in zip(candidates.logits, candidates.boxes, aims, strict=True):
            own = pick(logits, scene.attacked.classes)  # [N, K]
            if ranked:
                own = own - (best_other(logits, scene.attacked.classes) - logit(conf)).clamp(min=0)
            losses.append(self.by.lower(own[None], conf, near(boxes, scene.attacked)))
        return torch.cat(losses)

    @override
    def own_success(self, clean: Detections, attacked: Detections, found: Detections) -> bool:
        """Whether none of the attacked objects is found any more in its place and class."""
        return "kept" not in outcomes(attacked, found)
