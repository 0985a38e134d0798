"""Objects are found where there are none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from detguard.detections import Candidates, Detections, box_iou, nms
from detguard.objectives.base import SAME_OBJECT_IOU, UNFOUND, Goal, Scene, new, pick

# Places at which an object is tried to be raised, for each that is wanted; the candidates that they are chosen from;
# and their largest overlap.
PLACES, CHOICE, APART = 4, 1000, 0.3


@dataclass(frozen=True)
class Places(Scene):
    """The objects of a frame, and where others are raised.

    index: [P], of candidate times target; there: boxes and classes of the same, for heads without anchors, whose
    candidates change places as they will.
    """

    index: Tensor
    there: Detections


@dataclass(frozen=True)
class Fabricate(Goal):
    """At least `count` objects of the target classes are found where none of their class was (IoU < 0.5).

    Attributes:
        targets: one class name or several, or "all"; by default "person".
        count: objects to find where there are none, 1..300.
    """

    kind: ClassVar[str] = "fabricate"
    needs_target: ClassVar[bool] = False
    compares: ClassVar[bool] = True
    wanted: ClassVar[str] = "found where there is none"
    takes: ClassVar[frozenset[str]] = frozenset({"count"})
    count: int = 1

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
        index, count = best.indices[chosen], len(self.classes)
        classes = torch.tensor(self.classes, device=index.device)[index % count]
        there = Detections(boxes[index // count], best.values[chosen].sigmoid(), classes)
        return Places(objects[attacked], objects[~attacked], index, there)

    @override
    def own_loss(self, candidates: Candidates, aims: Sequence[Places], conf: float, sure: float) -> Tensor:
        """The target classes are raised over the threshold at the places that were chosen."""
        if candidates.anchors is None:
            frames = zip(candidates.logits, candidates.best_boxes, aims, strict=True)
            return torch.stack([self.by.higher(_best_on(aim.there, *frame), sure) for *frame, aim in frames])
        logits = pick(candidates.logits, self.classes).flatten(1)
        return torch.stack([self.by.higher(one[aim.index], sure) for one, aim in zip(logits, aims, strict=True)])

    @override
    def own_success(self, clean: Detections, attacked: Detections, found: Detections) -> bool:
        """Enough detections of the target classes are new."""
        return len(found[new(clean, found)].of(self.classes)) >= self.count


def _best_on(places: Detections, logits: Tensor, boxes: Tensor) -> Tensor:
    """The logits of places' classes, [P], each of the best candidate on the place, or the nearest where none is.

    logits [N, C] and boxes [N, 4] of one frame.
    """
    of_classes = pick(logits, places.classes).T  # [P, N]
    overlap = box_iou(places.boxes, boxes.detach())
    rank = torch.where(overlap >= SAME_OBJECT_IOU, of_classes.detach(), overlap + UNFOUND)
    return of_classes.gather(1, rank.argmax(1, keepdim=True))[:, 0]
