"""What every objective offers, and what goals share: which objects are attacked, and what becomes of the others."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus
from typing_extensions import override

from detguard import DetguardError, defaults
from detguard.detections import Candidates, Detections, box_iou, logit
from detguard.detectors.base import Detector
from detguard.schema import Config

# Instead of a class's name: every one that a detector knows, and any but an object's own.
ALL, OTHER = "all", "other"
# Between the names of classes in words, and from one to what it is to be found as.
SEPARATOR, ARROW = ",", "->"
Outcome = Literal["kept", "vanished", "relabelled"]
SAME_OBJECT_IOU = 0.5
# A candidate this far below the threshold (in logits) has no part in the loss: thousands of background
# candidates would otherwise outweigh the few that matter.
REACH = 3.0
# The logit of a candidate that does not count.
UNFOUND = -30.0
# Candidates of an object on which a class is raised.
CANDIDATES = 10


class Objective(ABC):
    """What the attacker wants: a loss on candidates, and a success test on detections.

    Attributes:
        kind: what it is called in `parse.KINDS`.
        needs_target: whether there is nothing to do on a photo without an object of the `targets`.
        counts_candidates: whether records tell how many candidates there are before NMS, too.
        compares: whether what counts is only what was not found before: then copies are compared with clean copies.
        targets: the class indices of the objects that are attacked.
    """

    kind: ClassVar[str]
    needs_target: ClassVar[bool] = True
    counts_candidates: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    targets: tuple[int, ...]

    @property
    def classes(self) -> tuple[int, ...]:
        """The class indices of the targets."""
        return self.targets

    def attacked(self, clean: Detections) -> Tensor:
        """Which detections of the clean photo are attacked, bool [K].

        Args:
            clean: all K of them, photo pixels.
        """
        return torch.isin(clean.classes, torch.tensor(self.classes, dtype=torch.int64))

    @abstractmethod
    def aim(self, candidates: Candidates, objects: Detections, attacked: Tensor) -> object:
        """What `loss` needs to know of one frame, fixed at its first pass.

        Args:
            candidates: of the frame alone, B = 1.
            objects: detections of the clean photo, frame pixels.
            attacked: which of them, bool [K], by `attacked`.
        """

    @abstractmethod
    def loss(self, candidates: Candidates, aims: Sequence[Any], conf: float, sure: float | None = None) -> Tensor:
        """Loss of a batch, float32 [B], differentiable by the candidates; lower is better for the attacker.

        Args:
            candidates: of B frames.
            aims: what `aim` gave for each of them.
            conf: confidence over which an object counts as found, 0..1.
            sure: that over which what is wanted is to be found, 0..1, by default `conf`.
        """

    @abstractmethod
    def success(self, clean: Detections, found: Detections, attacked: Tensor | None = None) -> bool:
        """Whether what is found is what the attacker wanted.

        Args:
            clean: detections of the photo before the attack.
            found: detections after it, in the same pixels, over the same confidence.
            attacked: which of `clean`, bool [K]; by default all that are by `attacked`, which only the whole photo
                tells.
        """


class LogitLoss:
    """Works on logits, so that it does not fade where a sigmoid saturates."""

    def lower(self, logits: Tensor, conf: float, where: Tensor | None = None) -> Tensor:
        """[B] of logits [B, ...]: how far they are over the threshold (softplus), summed over those within reach.

        where: those that count, of a shape that broadcasts.
        """
        over = softplus(logits - logit(conf)) * within_reach(logits, conf)
        return (over if where is None else over * where).flatten(1).sum(1)

    def higher(self, logits: Tensor, conf: float) -> Tensor:
        """Scalar: how far logits of any shape are from a logit over the threshold (softplus), summed."""
        return softplus(logit(conf) + 1 - logits).sum()

    def under(self, logits: Tensor, others: Tensor) -> Tensor:
        """Scalar: how far logits are from a logit under the `others` of their shape (softplus), summed."""
        return softplus(logits - others + 1).sum()


class ConfidenceLoss(LogitLoss):
    """The plain confidences, means of sigmoids; their gradient fades where the detector is sure."""

    @override
    def lower(self, logits: Tensor, conf: float, where: Tensor | None = None) -> Tensor:
        """[B]: the mean confidence of those within reach of the threshold."""
        counted = within_reach(logits, conf) if where is None else within_reach(logits, conf) & where
        return (logits.sigmoid() * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)

    @override
    def higher(self, logits: Tensor, conf: float) -> Tensor:
        """Scalar: what the mean confidence lacks of 1."""
        return (1 - logits.sigmoid()).sum() / max(1, logits.numel())

    @override
    def under(self, logits: Tensor, others: Tensor) -> Tensor:
        """Scalar: by how much what should be under is over, as a mean difference of confidences."""
        return (logits.sigmoid() - others.sigmoid()).sum() / max(1, logits.numel())


LOSSES: dict[str, LogitLoss] = {"logit": LogitLoss(), "confidence": ConfidenceLoss()}


@dataclass(frozen=True)
class Selection:
    """Some of a photo's objects; by default all.

    Attributes:
        objects: places in the clean detections, best first, from 1, as `detguard detect` numbers them.
        box: x1, y1, x2, y2 in photo pixels, in which the middle of an object lies.

    Raises:
        DetguardError: these are none.
    """

    objects: tuple[int, ...] = ()
    box: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        objects: object = self.objects
        object.__setattr__(self, "objects", tuple(objects) if isinstance(objects, Iterable) else (objects,))
        if not all(isinstance(number, Integral) and number >= 1 for number in self.objects):
            raise DetguardError("`objects`: expected whole numbers from 1")
        if self.box is not None and not isinstance(self.box, tuple):  # of an array or a tensor
            object.__setattr__(self, "box", tuple(map(float, self.box)))
        if self.box is not None and not (
            len(self.box) == 4 and self.box[0] < self.box[2] and self.box[1] < self.box[3]
        ):
            raise DetguardError("`box`: expected x1,y1,x2,y2 with x1 < x2 and y1 < y2, pixels of the photo")

    @property
    def all(self) -> bool:
        """Whether all objects are selected."""
        return not self.objects and self.box is None

    def of(self, clean: Detections) -> Tensor:
        """Which are selected, bool [K]."""
        selected = torch.ones(len(clean), dtype=torch.bool)
        if self.objects:
            selected &= torch.isin(torch.arange(1, len(clean) + 1), torch.tensor(self.objects))
        if self.box is not None:
            x, y = ((clean.boxes[:, :2] + clean.boxes[:, 2:]) / 2).unbind(1)
            x1, y1, x2, y2 = self.box
            selected &= (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)
        return selected


@dataclass(frozen=True)
class Scene:
    """The objects of a frame, frame pixels.

    Attributes:
        attacked: those that are attacked.
        others: the others.
    """

    attacked: Detections
    others: Detections


@dataclass(frozen=True)
class Goal(Objective):
    """A goal of `detguard attack`: an objective whose classes are given by name.

    Attributes:
        wanted: for titles, after the names of the targets.
        takes: words of the command line that it knows beside those of all goals.
        default: the targets where none are named and no objects selected.
        spared: said of photos that are not attacked, as there is nothing to do on them.
        targets: one class or several, by name, by index or "all"; of a goal that is used, by index: see `on`.
        only: the objects that are attacked, where not all of the targets are.
        keep_others: whether all other objects must still be found in their places (IoU >= 0.5) as what they were.
        measure: by which logits become a loss: logit or confidence.

    Raises:
        DetguardError: these do not go together.
    """

    wanted: ClassVar[str]
    takes: ClassVar[frozenset[str]] = frozenset()
    default: ClassVar[str] = "person"
    spared: ClassVar[str] = "without target"
    targets: Any = None
    only: Selection = field(default=Selection(), kw_only=True)
    keep_others: bool = field(default=False, kw_only=True)
    measure: str = field(default=defaults.Attack.measure, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.only, Selection):
            raise DetguardError("`only`: expected a Selection, as in Selection(objects=(3,))")
        if not self.needs_target and not self.only.all:
            raise DetguardError(f"`only`: {self.kind} attacks no objects that could be selected")
        if self.measure not in LOSSES:
            raise DetguardError(f"`measure` {self.measure}: expected one of {', '.join(LOSSES)}")
        targets = (self.default if self.only.all else ALL) if self.targets is None else self.targets
        object.__setattr__(self, "targets", classes_of("targets", targets))
        if not self.targets:
            raise DetguardError("`targets`: name at least one class, as in person,bus, or all")

    @property
    @override
    def classes(self) -> tuple[int, ...]:
        if not all(isinstance(target, int) for target in self.targets):
            raise TypeError(f"{self}: knows its classes by name; use what `on` gives for a detector")
        return self.targets

    def on(self, detector: Detector) -> Self:
        """The same goal with the class indices of a detector.

        Raises:
            DetguardError: it has no such class, or cannot be fooled so.
        """
        return replace(self, targets=tuple(dict.fromkeys(i for one in self.targets for i in indices(one, detector))))

    def words(self, class_names: Mapping[int, str]) -> Config:
        """What a run keeps of a goal, in the words of the command line; class_names: of targets that are indices.

        Raises:
            DetguardError: a class cannot be named so.
        """
        return {
            "goal": self.kind,
            "target": ",".join(class_word(target, class_names) for target in self.targets),
            "to": None,
            "strict": getattr(self, "strict", False),
            "object": list(self.only.objects) or None,
            "box": list(self.only.box) if self.only.box else None,
            "keep_others": self.keep_others,
            "loss": self.measure,
            "count": getattr(self, "count", None),
        }

    @property
    def by(self) -> LogitLoss:
        """The loss on logits or on confidences that `measure` names."""
        return LOSSES[self.measure]

    @override
    def attacked(self, clean: Detections) -> Tensor:
        if not self.needs_target:
            return torch.zeros(len(clean), dtype=torch.bool)
        return super().attacked(clean) & self.only.of(clean)

    @override
    def aim(self, candidates: Candidates, objects: Detections, attacked: Tensor) -> Scene:
        """The objects, as the clean photo has them."""
        return Scene(objects[attacked], objects[~attacked])

    @override
    def loss(self, candidates: Candidates, aims: Sequence[Scene], conf: float, sure: float | None = None) -> Tensor:
        """The goal's own loss; with `keep_others`, the others' classes are raised on them, too."""
        sure = conf if sure is None else sure
        loss = self.own_loss(candidates, aims, conf, sure)
        if not self.keep_others:
            return loss
        held = [
            raise_on(self.by, logits, boxes, scene.others, scene.others.classes, sure)
            for logits, boxes, scene in zip(candidates.logits, candidates.best_boxes, aims, strict=True)
        ]
        return loss + torch.stack(held)

    @abstractmethod
    def own_loss(self, candidates: Candidates, aims: Sequence[Any], conf: float, sure: float) -> Tensor:
        """Loss, float32 [B], differentiable by the candidates; what is not attacked is left aside.

        Args:
            candidates: of B frames.
            aims: the `Scene` of each of them, frame pixels.
            conf: confidence over which an object counts as found, 0..1.
            sure: that over which what is wanted is to be found, 0..1.
        """

    @override
    def success(self, clean: Detections, found: Detections, attacked: Tensor | None = None) -> bool:
        """The goal's own success; with `keep_others`, the others are kept, too."""
        attacked = self.attacked(clean) if attacked is None else attacked
        if self.keep_others and set(outcomes(clean[~attacked], found)) - {"kept"}:
            return False
        return self.own_success(clean, clean[attacked], found)

    @abstractmethod
    def own_success(self, clean: Detections, attacked: Detections, found: Detections) -> bool:
        """Whether what is found is what is wanted, what is not attacked left aside.

        Args:
            clean: detections of the photo before the attack.
            attacked: those of them that are attacked.
            found: detections after it, in the same pixels, over the same confidence.
        """


def classes_of(name: str, classes: object) -> tuple[str | int, ...]:
    """One class or several, by name or index, as a tuple; name: of what they are given by.

    Raises:
        DetguardError: they are something else.
    """
    found = list[str | int]()
    for one in classes if isinstance(classes, Iterable) and not isinstance(classes, str) else (classes,):
        if not isinstance(one, str | Integral):
            raise DetguardError(f"`{name}` {one!r}: expected names of classes or their indices")
        found.append(one if isinstance(one, str) else int(one))
    return tuple(found)


def indices(target: str | int, detector: Detector) -> list[int]:
    """The class indices of one target.

    Raises:
        DetguardError: no such class.
    """
    if isinstance(target, int):
        if target not in detector.class_names:
            known = f"{min(detector.class_names)} to {max(detector.class_names)}"
            raise DetguardError(f"class {target}: {detector.name} has no such class; its indices are {known}")
        return [target]
    return list(detector.class_names) if is_all(target) else [detector.class_index(target)]


def is_all(target: str | int) -> bool:
    """Whether a target stands for all classes."""
    return isinstance(target, str) and target.strip().lower() == ALL


def class_word(target: str | int, class_names: Mapping[int, str]) -> str:
    """A class as the command line names it.

    Raises:
        DetguardError: it cannot.
    """
    name = class_names[target] if isinstance(target, int) else target
    if SEPARATOR in name or ARROW in name:
        raise DetguardError(
            f"`targets` '{name}': classes whose names hold {SEPARATOR} or {ARROW} cannot be attacked; give several as "
            '("person", "bus"), and what they become as Mislabel({"person": "car"})'
        )
    return name


def pick(logits: Tensor, classes: Sequence[int] | Tensor) -> Tensor:
    """The columns of some classes, [..., len(classes)]; `index_select`, whose backward is the quick one."""
    if not isinstance(classes, Tensor) and list(classes) == list(range(logits.shape[-1])):
        return logits
    return logits.index_select(-1, torch.as_tensor(classes, dtype=torch.int64, device=logits.device))


def within_reach(logits: Tensor, conf: float) -> Tensor:
    """Which logits are over that of `conf`, or little under it; bool, same shape."""
    return logits.detach() - logit(conf) > -REACH


def near(boxes: Tensor, objects: Detections) -> Tensor:
    """Which candidates, boxes [N, 4], lie on which objects of their frame (IoU >= 0.5): bool [N, K].

    boxes: or [N, C, 4], one for each class; then that of an object's class counts.
    """
    there = objects.boxes.to(boxes)
    if boxes.ndim == 2:
        return box_iou(boxes.detach(), there) >= SAME_OBJECT_IOU
    own = boxes.detach().index_select(1, objects.classes.to(boxes.device))  # [N, K, 4]
    each = [box_iou(one, box[None])[:, 0] for one, box in zip(own.unbind(1), there, strict=True)]
    return (torch.stack(each, 1) if each else own.new_zeros(own.shape[:2])) >= SAME_OBJECT_IOU


def on_class(boxes: Tensor, objects: Detections, classes: Sequence[int] | Tensor) -> Tensor:
    """Which candidates, boxes as of `near`, lie on an object of which of the `classes`: bool [N, len(classes)]."""
    of_class = objects.classes == torch.as_tensor(classes, dtype=torch.int64)[:, None]
    return (near(boxes, objects)[:, None] & of_class.to(boxes.device)).any(2)


def best_other(logits: Tensor, classes: Tensor) -> Tensor:
    """The best logit of each candidate but for one class, [N, K] of logits [N, C] and classes [K]."""
    values, indices = pad(logits, (0, 1), value=UNFOUND).topk(2, 1)
    return torch.where(indices[:, :1] == classes.to(logits.device), values[:, 1:], values[:, :1])


def raise_on(by: LogitLoss, logits: Tensor, boxes: Tensor, objects: Detections, classes: Tensor, conf: float) -> Tensor:
    """Scalar: on each object's best candidates a class is raised over the threshold and over the rest.

    logits [N, C] and boxes [N, 4] of one frame; classes: one for each object, [K].
    """
    # Far better than just in place: the box moves while the class changes.
    rank = pick(logits.detach(), classes).T.sigmoid() + 2 * box_iou(objects.boxes.to(boxes), boxes.detach()).clamp(
        max=0.85
    )
    best = logits[rank.topk(min(CANDIDATES, len(boxes)), 1).indices]  # [K, CANDIDATES, C]
    wanted = torch.arange(logits.shape[1], device=logits.device) == classes.to(logits.device)[:, None]  # [K, C]
    raised = best.masked_fill(~wanted[:, None], UNFOUND).amax(2)
    rest = best.masked_fill(wanted[:, None], UNFOUND).amax(2)
    return by.higher(raised, conf) + by.under(rest, raised)


def outcomes(objects: Detections, found: Detections) -> list[Outcome]:
    """What became of each attacked object (of the clean photo): kept, vanished, or relabelled as another class.

    kept: a detection of its class overlaps it (IoU >= 0.5); relabelled: only detections of other classes do.
    """
    if not len(found):
        return ["vanished"] * len(objects)
    on = box_iou(objects.boxes, found.boxes) >= SAME_OBJECT_IOU
    same = on & (objects.classes[:, None] == found.classes[None])
    return [
        "kept" if s else "relabelled" if n else "vanished"
        for s, n in zip(same.any(1).tolist(), on.any(1).tolist(), strict=True)
    ]


def new(clean: Detections, found: Detections) -> Tensor:
    """Which of `found` have no clean detection of their class in their place (IoU >= 0.5): bool [N]."""
    same = clean.classes == found.classes[:, None]
    return ~((box_iou(found.boxes, clean.boxes) >= SAME_OBJECT_IOU) & same).any(1)
