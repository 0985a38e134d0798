"""Objects are found as another class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from detguard import DetguardError
from detguard.detections import Candidates, Detections, box_iou
from detguard.detectors.base import Detector
from detguard.objectives.base import (
    ARROW,
    OTHER,
    SAME_OBJECT_IOU,
    SEPARATOR,
    UNFOUND,
    Goal,
    Scene,
    class_word,
    classes_of,
    indices,
    is_all,
    near,
    on_class,
    outcomes,
    pick,
    raise_on,
)
from detguard.schema import Config

# Instead of an index: any but an object's own.
ANY = -1


@dataclass(frozen=True)
class Renamed(Scene):
    """The objects of a frame, and the classes, [K], that those that are attacked are to become."""

    classes: Tensor


@dataclass(frozen=True)
class Mislabel(Goal):
    """Every attacked object is found in its place (IoU >= 0.5) as another class, and no longer as its own.

    A target class that nothing becomes, nor may, is found nowhere any more, if no objects are selected.

    Attributes:
        targets: what each becomes, as {"person": "car", "bus": "other"}, "other" for any class but its own; or only the
            targets, and in `to` what they become.
        to: one class for all targets or one for each; of a goal that is used by index, or ANY.

    Examples:
        >>> import detguard
        >>> detguard.Mislabel({"bus": "train"})  # doctest: +SKIP
    """

    kind: ClassVar[str] = "mislabel"
    wanted: ClassVar[str] = "found as"
    takes: ClassVar[frozenset[str]] = frozenset({"to", "object", "box"})
    to: Any = None

    def __post_init__(self) -> None:
        to = self.to
        if isinstance(self.targets, Mapping):
            if to is not None:
                raise DetguardError("`to`: the targets say already what they become; leave one of them out")
            object.__setattr__(self, "to", tuple(self.targets.values()))
        super().__post_init__()
        if to is None and self.to is None:
            raise DetguardError(f"`goal` {self.kind}: give `to`, the class that objects are found as")
        to = classes_of("to", self.to)
        object.__setattr__(self, "to", to * len(self.targets) if to == (self.to,) else to)
        if len(self.to) != len(self.targets):
            raise DetguardError(f"`to`: expected one class for all targets or one for each, {len(self.targets)}")

    @override
    def on(self, detector: Detector) -> "Mislabel":
        names, pairs, of_all = detector.class_names, dict[int, int](), dict[int, int]()
        for target, to in zip(self.targets, self.to, strict=True):
            other = to == ANY or (isinstance(to, str) and to.strip().lower() == OTHER)
            found = [ANY] if other else indices(to, detector)
            if len(found) > 1:
                raise DetguardError(f"`to` {to}: expected one class, or other")
            if other and len(names) < 2:
                raise DetguardError("`to` other: the detector knows one class only")
            each = of_all if is_all(target) else pairs
            for index in indices(target, detector):
                if each.setdefault(index, found[0]) != found[0]:
                    raise DetguardError(f"`to`: {names[index]} is to become two classes; give each class once")
        pairs = of_all | pairs  # what is said of one class is an exception from what is said of all
        for target, becomes in pairs.items():
            if target == becomes:
                raise DetguardError(f"`to` {names[target]}: is a target itself; name another class")
        return replace(self, targets=tuple(pairs), to=tuple(pairs.values()))

    @override
    def words(self, class_names: Mapping[int, str]) -> Config:
        words, names = super().words(class_names), {ANY: OTHER, **class_names}
        to = [class_word(one, names) for one in self.to]
        if len(set(to)) == 1:
            return words | {"to": to[0]}
        pairs = zip(words["target"].split(SEPARATOR), to, strict=True)
        return words | {"target": SEPARATOR.join(f"{target}{ARROW}{one}" for target, one in pairs)}

    @property
    def hidden(self) -> tuple[int, ...]:
        """Target classes that nothing becomes, and nothing may."""
        return () if ANY in self.to else tuple(target for target in self.classes if target not in self.to)

    def becomes(self, classes: Tensor) -> Tensor:
        """The class that each of the target `classes`, [K], becomes."""
        which = (classes[:, None] == torch.tensor(self.classes, device=classes.device)).int().argmax(1)
        return torch.tensor(self.to, device=classes.device)[which]

    @override
    def aim(self, candidates: Candidates, objects: Detections, attacked: Tensor) -> Renamed:
        """The objects; for ANY the class that comes second where the object was found, and no other from then on."""
        scene = super().aim(candidates, objects, attacked)
        logits, own = candidates.logits[0].detach(), scene.attacked.classes.to(candidates.logits.device)
        on = near(candidates.boxes[0], scene.attacked)
        finder = pick(logits, own).masked_fill(~on, UNFOUND).argmax(0)  # [K]
        second = logits[finder].scatter(1, own[:, None], -torch.inf).argmax(1)
        to = self.becomes(own)
        return Renamed(scene.attacked, scene.others, torch.where(to == ANY, second, to))

    @override
    def own_loss(self, candidates: Candidates, aims: Sequence[Renamed], conf: float, sure: float) -> Tensor:
        """Targets under the threshold on their objects, and hidden ones everywhere; new classes raised on the objects.

        Raised on each object's best candidates, over the threshold and over the rest.
        """
        where = torch.stack(
            [on_class(b, scene.attacked, self.classes) for b, scene in zip(candidates.boxes, aims, strict=True)]
        )
        if self.only.all:
            where |= torch.tensor([target in self.hidden for target in self.classes], device=where.device)
        losses = [
            raise_on(self.by, logits, boxes, scene.attacked, scene.classes, sure)
            for logits, boxes, scene in zip(candidates.logits, candidates.best_boxes, aims, strict=True)
        ]
        return self.by.lower(pick(candidates.logits, self.classes), conf, where) + torch.stack(losses)

    @override
    def own_success(self, clean: Detections, attacked: Detections, found: Detections) -> bool:
        """As the class says; IoU between the object's clean box and the box found."""
        if self.only.all and len(found.of(self.hidden)):
            return False
        if "kept" in outcomes(attacked, found):
            return False
        to = self.becomes(attacked.classes)[:, None]
        wanted = (found.classes == to) | (to == ANY)
        placed = box_iou(attacked.boxes, found.boxes) >= SAME_OBJECT_IOU
        return bool((placed & wanted).any(1).all())
