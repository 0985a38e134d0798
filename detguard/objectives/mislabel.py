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
    near,
    on_class,
    outcomes,
    pick,
    raise_on,
    required,
)

# Instead of a class: any but an object's own.
OTHER = -1


@dataclass(frozen=True)
class Renamed(Scene):
    """The objects of a frame, and the classes, [K], that those that are attacked are to become."""

    classes: Tensor


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
    def aim(self, candidates: Candidates, objects: Detections, attacked: Tensor) -> Renamed:
        """The objects; for OTHER the class that comes second where the object was found, and no other from then on."""
        scene = super().aim(candidates, objects, attacked)
        logits, own = candidates.logits[0].detach(), scene.attacked.classes.to(candidates.logits.device)
        on = near(candidates.best_boxes[0], scene.attacked)
        finder = pick(logits, own).masked_fill(~on, UNFOUND).argmax(0)  # [K]
        second = logits[finder].scatter(1, own[:, None], -torch.inf).argmax(1)
        to = self.becomes(own)
        return Renamed(scene.attacked, scene.others, torch.where(to == OTHER, second, to))

    @override
    def own_loss(self, candidates: Candidates, aims: Sequence[Renamed], conf: float) -> Tensor:
        """Targets under the threshold on their objects, and hidden ones everywhere; new classes raised on the objects.

        Raised on each object's best candidates, over the threshold and over the rest.
        """
        where = torch.stack(
            [on_class(b, scene.attacked, self.targets) for b, scene in zip(candidates.best_boxes, aims, strict=True)]
        )
        if self.only.all:
            where |= torch.tensor([target in self.hidden for target in self.targets], device=where.device)
        losses = [
            raise_on(self.by, logits, boxes, scene.attacked, scene.classes, conf)
            for logits, boxes, scene in zip(candidates.logits, candidates.best_boxes, aims, strict=True)
        ]
        return self.by.lower(pick(candidates.logits, self.targets), conf, where) + torch.stack(losses)

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
