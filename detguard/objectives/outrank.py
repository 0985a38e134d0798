"""What is not there is found with more confidence than what is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from detguard.detections import Candidates, Detections
from detguard.objectives.base import UNFOUND, Objective, near, on_class, pick

# How many false candidates of a photo are raised, and the logits beyond which it pushes no further.
FALSE_ONES, LOWEST, HIGHEST = 50, -7.0, 4.0


@dataclass(frozen=True)
class Outrank(Objective):
    """Objects are found with less confidence than what is not there: what AP counts, an order, turned round."""

    kind: ClassVar[str] = "rank"
    targets: tuple[int, ...]

    @override
    def aim(self, candidates: Candidates, objects: Detections, attacked: Tensor) -> Detections:
        """The attacked objects in the frame, which are to be ranked below the false ones."""
        return objects[attacked]

    @override
    def loss(
        self, candidates: Candidates, aims: Sequence[Detections], conf: float, sure: float | None = None
    ) -> Tensor:
        """The mean logit by which objects are found, less twice that of the most certain false candidates.

        An object is found by the candidates of its class on it (IoU >= 0.5 as their boxes lie now); false are all
        others of the classes in the photo, or of all targets where it has none.
        """
        losses = []
        for logits, boxes, objects in zip(candidates.logits, candidates.boxes, aims, strict=True):
            of_objects = pick(logits, objects.classes)  # [N, K]
            # Of an object that nothing lies on any more there is nothing left to push down.
            found = of_objects.masked_fill(~near(boxes, objects), UNFOUND).logsumexp(0).clamp(min=LOWEST)
            # Where the objects are, as no device may be read to know how many classes there are.
            present = objects.classes.unique() if len(objects) else torch.tensor(self.targets)
            false = pick(logits, present).masked_fill(on_class(boxes, objects, present), UNFOUND).flatten()
            raised = false.topk(min(FALSE_ONES, len(false))).values.clamp(max=HIGHEST).mean()
            losses.append((found.mean() if len(objects) else 0) - 2 * raised)
        return torch.stack(losses)

    @override
    def success(self, clean: Detections, found: Detections, attacked: Tensor | None = None) -> bool:
        """Always False: a lower score is better without end, so the search makes all its steps."""
        return False
