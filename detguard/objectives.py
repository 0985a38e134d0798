"""What an attacker wants: a loss on candidates (lower is better for the attacker) and a success test on detections."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torchvision.ops import box_iou
from typing_extensions import override

from detguard.detections import Candidates, Detections
from detguard.training_loss import GAINS, Assignment, assign, detection_loss

Outcome = Literal["kept", "vanished", "relabelled"]
SAME_OBJECT_IOU = 0.5
# A candidate this far below the threshold (in logits) has no part in the loss: thousands of background
# candidates would otherwise outweigh the few that matter.
REACH = 3.0
# Of `Outrank`: how many false candidates of a photo are raised, the logits beyond which it pushes no further, and that
# of a candidate that does not count.
FALSE_ONES, LOWEST, HIGHEST, UNFOUND = 50, -7.0, 4.0, -30.0


class Objective(ABC):
    """A goal of the attack. `targets` are the class indices of the objects that are attacked."""

    targets: tuple[int, ...]

    def aim(self, candidates: Candidates, objects: Detections) -> Any:
        """What `loss` needs to know of one frame, fixed at its first pass; `objects` of the clean photo, frame pixels.

        By default the boxes of the attacked objects, float32 [K, 4] xyxy.
        """
        return objects.of(self.targets).boxes

    @abstractmethod
    def loss(self, candidates: Candidates, aims: Sequence[Any], conf: float) -> Tensor:
        """Loss [B] of frames with their `aims`.

        conf: the confidence that counts as found. Works on logits, so that it does not fade where a sigmoid saturates.
        """

    @abstractmethod
    def success(self, clean: Detections, found: Detections) -> bool:
        """Whether `found` is what the attacker wanted; `clean` are the detections of the photo before. Same pixels."""


@dataclass(frozen=True)
class Vanish(Objective):
    """No object of the target classes is found any more; with `strict`, nor anything else in its place."""

    targets: tuple[int, ...]
    strict: bool = False

    @override
    def loss(self, candidates: Candidates, aims: Sequence[Tensor], conf: float) -> Tensor:
        """Softplus of how far each target logit is over the threshold, summed over the candidates within reach."""
        loss = over_threshold(pick(candidates.logits, self.targets), conf).flatten(1).sum(1)
        if not self.strict:
            return loss
        return loss + torch.stack(
            [
                (over_threshold(logits, conf) * near[:, None]).sum()
                for logits, near in zip(candidates.logits, overlaps(candidates.boxes, aims), strict=True)
            ]
        )

    @override
    def success(self, clean: Detections, found: Detections) -> bool:
        """No detection of a target class; with `strict`, no attacked object relabelled either."""
        if len(found.of(self.targets)):
            return False
        return not self.strict or "relabelled" not in outcomes(clean.of(self.targets), found)


@dataclass(frozen=True)
class Mislabel(Objective):
    """Every attacked object is found in its place (IoU >= 0.5) as class `to`, and nothing as a target class."""

    targets: tuple[int, ...]
    to: int

    @override
    def loss(self, candidates: Candidates, aims: Sequence[Tensor], conf: float) -> Tensor:
        """Target classes under the threshold; on each object's best candidates, `to` over it and over the rest."""
        losses = []
        wanted = torch.logit(torch.tensor(conf)).item()
        for logits, boxes, attacked in zip(candidates.logits, candidates.boxes, aims, strict=True):
            loss = over_threshold(pick(logits, self.targets), conf).sum()
            ious = box_iou(attacked.to(boxes), boxes.detach())
            for iou in ious:
                # Far better than just in place: the box moves while the class changes.
                rank = logits.detach()[:, self.to].sigmoid() + 2 * iou.clamp(max=0.85)
                best = rank.topk(min(10, len(rank))).indices
                to = logits[best, self.to]
                rest = logits[best].index_fill(1, torch.tensor([self.to], device=logits.device), -20.0).amax(1)
                loss = loss + (softplus(wanted + 1 - to) + softplus(rest - to + 1)).sum()
            losses.append(loss)
        return torch.stack(losses)

    @override
    def success(self, clean: Detections, found: Detections) -> bool:
        """As the class says; IoU between the object's clean box and the box found."""
        if len(found.of(self.targets)):
            return False
        wanted = found.of([self.to])
        ious = box_iou(clean.of(self.targets).boxes, wanted.boxes)
        return len(wanted) > 0 and bool((ious.amax(1) >= SAME_OBJECT_IOU).all())


@dataclass(frozen=True)
class Degrade(Objective):
    """The worst training loss, or some `parts` of it (see `training_loss.GAINS`): no success test, only worse.

    gate: weight of the logits by which the gate of an ensemble prefers expert `robust` to the best of the others.
    """

    targets: tuple[int, ...]
    parts: tuple[str, ...] = tuple(GAINS)
    gate: float = 0.0
    robust: int = -1

    @override
    def aim(self, candidates: Candidates, objects: Detections) -> Assignment | Detections:
        """The assignment; for heads without anchors the objects, for their candidates change places as they will."""
        objects = objects.of(self.targets)
        return objects if candidates.anchors is None else self._assign(candidates, objects)

    def _assign(self, candidates: Candidates, objects: Detections) -> Assignment:
        # Training wants a confidence of the overlap, not of 1: raising that loss can make a detection more certain.
        assignment = assign(candidates, [objects])
        return replace(assignment, weights=torch.ones_like(assignment.weights))

    @override
    def loss(self, candidates: Candidates, aims: Sequence[Assignment | Detections], conf: float) -> Tensor:
        """The negative sum of the parts, with the assignment of the first pass where there are anchors."""
        assigned = [
            aim if isinstance(aim, Assignment) else self._assign(candidates[i : i + 1], aim)
            for i, aim in enumerate(aims)
        ]
        losses = detection_loss(candidates, Assignment.stack(assigned))
        loss = -torch.stack([losses[part] for part in self.parts]).sum(0)
        if not self.gate or candidates.gate is None:
            return loss
        # On logits: the weights themselves have no gradient left where the gate is sure.
        others = candidates.gate.clone()
        others[:, self.robust] = -torch.inf
        return loss + self.gate * (candidates.gate[:, self.robust] - others.amax(1))

    @override
    def success(self, clean: Detections, found: Detections) -> bool:
        """Never enough."""
        return False


@dataclass(frozen=True)
class Outrank(Objective):
    """Objects are found with less confidence than what is not there: what AP counts, an order, turned round."""

    targets: tuple[int, ...]

    @override
    def aim(self, candidates: Candidates, objects: Detections) -> Detections:
        """The attacked objects."""
        return objects.of(self.targets)

    @override
    def loss(self, candidates: Candidates, aims: Sequence[Detections], conf: float) -> Tensor:
        """The mean logit by which objects are found, less twice that of the most certain false candidates.

        An object is found by the candidates of its class on it (IoU >= 0.5 as their boxes lie now); false are all
        others of the classes in the photo, or of all targets where it has none.
        """
        losses = []
        for logits, boxes, objects in zip(candidates.logits, candidates.boxes, aims, strict=True):
            near = box_iou(boxes.detach(), objects.boxes.to(boxes)) >= SAME_OBJECT_IOU
            of_objects = pick(logits, objects.classes)  # [N, K]
            # Of an object that nothing lies on any more there is nothing left to push down.
            found = of_objects.masked_fill(~near, UNFOUND).logsumexp(0).clamp(min=LOWEST)
            # Where the objects are, for no device is to be asked how many classes there are.
            present = objects.classes.unique() if len(objects) else torch.tensor(self.targets)
            of_class = (objects.classes == present[:, None]).to(logits.device)
            on_class = (near[:, None] & of_class).any(2)  # [N, classes present]
            false = pick(logits, present).masked_fill(on_class, UNFOUND).flatten()
            raised = false.topk(min(FALSE_ONES, len(false))).values.clamp(max=HIGHEST).mean()
            losses.append((found.mean() if len(objects) else 0) - 2 * raised)
        return torch.stack(losses)

    @override
    def success(self, clean: Detections, found: Detections) -> bool:
        """Never enough."""
        return False


def pick(logits: Tensor, classes: Sequence[int] | Tensor) -> Tensor:
    """The columns of some classes, [..., len(classes)]; `index_select`, whose backward is the quick one."""
    return logits.index_select(-1, torch.as_tensor(classes, device=logits.device))


def over_threshold(logits: Tensor, conf: float) -> Tensor:
    """Softplus of logits over that of `conf`, zero beyond reach; same shape."""
    excess = logits - torch.logit(torch.tensor(conf, device=logits.device))
    return softplus(excess) * (excess.detach() > -REACH)


def overlaps(boxes: Tensor, objects: Sequence[Tensor]) -> Tensor:
    """Which candidates, boxes [B, N, 4], lie on an attacked object of their frame (IoU >= 0.5): bool [B, N]."""
    return torch.stack(
        [(box_iou(b.detach(), o.to(b)) >= SAME_OBJECT_IOU).any(1) for b, o in zip(boxes, objects, strict=True)]
    )


def outcomes(objects: Detections, found: Detections) -> list[Outcome]:
    """What became of each attacked object (of the clean photo): kept, vanished, or relabelled as another class.

    kept: a detection of its class overlaps it (IoU >= 0.5); relabelled: only detections of other classes do.
    """
    if not len(found):
        return ["vanished"] * len(objects)
    near = box_iou(objects.boxes, found.boxes) >= SAME_OBJECT_IOU
    same = near & (objects.classes[:, None] == found.classes[None])
    return [
        "kept" if s else "relabelled" if n else "vanished"
        for s, n in zip(same.any(1).tolist(), near.any(1).tolist(), strict=True)
    ]
