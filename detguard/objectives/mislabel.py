"""Objects are found as another class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torchvision.ops import box_iou
from typing_extensions import override

from detguard import DetguardError
from detguard.detections import Candidates, Detections
from detguard.objectives.base import (
    SAME_OBJECT_IOU,
    UNFOUND,
    Goal,
    Scene,
    Wish,
    best_other,
    on_class,
    outcomes,
    pick,
    required,
)

OTHER = -1
# Candidates of an object on which the new class is raised.
CANDIDATES = 10


@dataclass(frozen=True)
class Mislabel(Goal):
    """Every attacked object is found in its place (IoU >= 0.5) as another class, and no longer as its own.

    to: for each of the targets the class index that it becomes, or OTHER: any but its own. A class that becomes one
    that is not attacked itself is found nowhere any more, if no objects are selected.
    """

    kind: ClassVar[str] = "mislabel"
    wanted: ClassVar[str] = "found as"
    takes: ClassVar[frozenset[str]] = frozenset({"--to", "--object", "--box"})
    to: tuple[int, ...]

    @override
    @classmethod
    def parse(cls, wish: Wish) -> "Mislabel":
        return cls(wish.targets, required(wish.to, "--to CLASS", cls.kind), **wish.common)

    @property
    @override
    def raises(self) -> bool:
        return True

    @property
    def hidden(self) -> tuple[int, ...]:
        """Target classes that nothing becomes."""
        return tuple(t for t, to in zip(self.targets, self.to, strict=True) if to != OTHER and t not in self.to)

    def becomes(self, classes: Tensor) -> Tensor:
        """The class that each of the target `classes`, [K], becomes."""
        which = (classes[:, None] == torch.tensor(self.targets, device=classes.device)).int().argmax(1)
        return torch.tensor(self.to, device=classes.device)[which]

    @override
    def own_loss(self, candidates: Candidates, aims: Sequence[Scene], conf: float) -> Tensor:
        """Hidden classes under the threshold; on each object's best candidates, `to` over it and over the rest."""
        where = None
        if not self.only.all:
            where = torch.stack(
                [on_class(b, scene.attacked, self.hidden) for b, scene in zip(candidates.boxes, aims, strict=True)]
            )
        losses = [
            self._on_objects(logits, boxes, scene.attacked, conf)
            for logits, boxes, scene in zip(candidates.logits, candidates.boxes, aims, strict=True)
        ]
        return self.by.lower(pick(candidates.logits, self.hidden), conf, where) + torch.stack(losses)

    def _on_objects(self, logits: Tensor, boxes: Tensor, attacked: Detections, conf: float) -> Tensor:
        own = attacked.classes.to(logits.device)
        to = self.becomes(own)
        other = (to == OTHER)[:, None]
        new = torch.where(other, best_other(logits.detach(), own).T, pick(logits.detach(), to.clamp(min=0)).T)  # [K, N]
        # Far better than just in place: the box moves while the class changes.
        rank = new.sigmoid() + 2 * box_iou(attacked.boxes.to(boxes), boxes.detach()).clamp(max=0.85)
        best = logits[rank.topk(min(CANDIDATES, len(boxes)), 1).indices]  # [K, CANDIDATES, C]
        index = torch.arange(logits.shape[1], device=logits.device)
        wanted = torch.where(other, index != own[:, None], index == to[:, None])[:, None]  # [K, 1, C]
        raised, rest = best.masked_fill(~wanted, UNFOUND).amax(2), best.masked_fill(wanted, UNFOUND).amax(2)
        return self.by.higher(raised, conf) + self.by.under(rest, raised)

    @override
    def own_success(self, clean: Detections, attacked: Detections, found: Detections) -> bool:
        """As the class says; IoU between the object's clean box and the box found."""
        if self.only.all and len(found.of(self.hidden)):
            return False
        if "kept" in outcomes(attacked, found):
            return False
        to = self.becomes(attacked.classes)[:, None]
        wanted = (found.classes == to) | (to == OTHER)
        placed = box_iou(attacked.boxes, found.boxes) >= SAME_OBJECT_IOU
        return bool((placed & wanted).any(1).all())


def check_classes(targets: Sequence[int], to: Sequence[int], names: dict[int, str]) -> None:
    """Raise DetguardError where a class is to become itself, or another and there is none."""
    for target, other in zip(targets, to, strict=True):
        if target == other:
            raise DetguardError(f"--to {names[target]}: is a target itself; name another class")
        if other == OTHER and len(names) < 2:
            raise DetguardError("--to other: the detector knows one class only")
