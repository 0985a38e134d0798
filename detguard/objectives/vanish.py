"""Objects are not found any more."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from detguard.detections import Candidates, Detections
from detguard.objectives.base import Goal, Scene, near, on_class, outcomes, pick


@dataclass(frozen=True)
class Vanish(Goal):
    """No object of the target classes is found any more; with `strict`, nor anything else in its place.

    Where some objects are selected, they alone must go: no detection of their class in their places (IoU >= 0.5).

    Attributes:
        targets: one class name or several, or "all"; by default "person".
        strict: nothing else may be found in their places either.

    Examples:
        >>> import detguard
        >>> detguard.Vanish("person", only=detguard.Selection(objects=(3,)), keep_others=True)  # doctest: +SKIP
    """

    kind: ClassVar[str] = "vanish"
    wanted: ClassVar[str] = "not found any more"
    takes: ClassVar[frozenset[str]] = frozenset({"strict", "object", "box"})
    strict: bool = False

    @override
    def own_loss(self, candidates: Candidates, aims: Sequence[Scene], conf: float, sure: float) -> Tensor:
        """Each target logit lowered to the threshold; with `strict`, all logits on the objects, too."""
        where = None
        if not self.only.all:
            where = torch.stack(
                [on_class(b, scene.attacked, self.classes) for b, scene in zip(candidates.boxes, aims, strict=True)]
            )
        loss = self.by.lower(pick(candidates.logits, self.classes), conf, where)
        if not self.strict:
            return loss
        frames = zip(candidates.best_boxes, aims, strict=True)
        on = torch.stack([near(boxes, scene.attacked).any(1) for boxes, scene in frames])
        return loss + self.by.lower(candidates.logits, conf, on[..., None])

    @override
    def own_success(self, clean: Detections, attacked: Detections, found: Detections) -> bool:
        """No detection of a target class, or no selected object kept; with `strict`, none relabelled either."""
        if self.only.all and len(found.of(self.classes)):
            return False
        return not {"kept", "relabelled" if self.strict else "kept"} & set(outcomes(attacked, found))
