"""Objects are found where there are none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, stack
from typing_extensions import override

from detguard.detections import Candidates, Detections, box_iou, nms
from detguard.objectives.base import UNFOUND, Goal, Scene, new, pick

# Places at which an object is tried to be raised, for each that is wanted; the candidates that they are chosen from;
# and their largest overlap.
PLACES, CHOICE, APART = 4, 1000, 0.3


@dataclass(frozen=True)
class Places(Scene):
    """The objects of a frame, and where others are raised: indices [P] of candidate times target."""

    index: Tensor


@dataclass(frozen=True)
class Fabricate(Goal):
    """At least `count` objects of the target classes are found where none of their class was (IoU < 0.5).

    Attributes:
        targets: one class name or several, or "all"; by default "person".
        count: objects to find where there are none, 1 or more.
    """

    kind: ClassVar[str] = "fabricate"
    needs_target: ClassVar[bool] = False
    wanted: ClassVar[str] = "found where there is none"
    takes: ClassVar[frozenset[str]] = frozenset({"count"})
    count: int = 1

    @property
    @override
    def raises(self) -> bool:
        return True

    @override
    def aim(self, candidates: Candidates, objects: Detections, attacked: Tensor) -> Places:
        """The best candidates of the target classes that lie on no object, apart from each other."""
        logits, boxes = pick(candidates.logits[0].detach(), self.classes), candidates.best_boxes[0].detach()
        # Well apart from the objects, for boxes move.
        taken = (box_iou(boxes, objects.boxes.to(boxes)) > APART).any(1)
        free = logits.masked_fill(taken[:, None], UNFOUND).flatten()
        best = free.topk(min(CHOICE, len(free)))
        chosen = nms(boxes[best.indices // len(self.classes)], best.values, APART)[: PLACES * self.count]
        chosen = chosen[best.values[chosen] > UNFOUND]
        return Places(objects[attacked], objects[~attacked], best.indices[chosen])

    @override
    def own_loss(self, candidates: Candidates, aims: Sequence[Places], conf: float) -> Tensor:
        """The target classes are raised over the threshold at the places that were chosen."""
        logits = pick(candidates.logits, self.classes).flatten(1)
        return stack([self.by.higher(one[places.index], conf) for one, places in zip(logits, aims, strict=True)])

    @override
    def own_success(self, clean: Detections, attacked: Detections, found: Detections) -> bool:
        """Enough detections of the target classes are new."""
        return len(found[new(clean, found)].of(self.classes)) >= self.count
