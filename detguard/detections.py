"""Candidates (before NMS, differentiable), detections (after it), and the one NMS between them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from detguard import DetguardError, first_line
from detguard.engine import with_doubles

if TYPE_CHECKING:
    import supervision

MAX_DETECTIONS = 300
# A detection as JSON has it. box: xyxy, photo pixels; kind: on pages, right (found), wrong (false) or missed.
Found = TypedDict("Found", {"class": str, "confidence": float, "box": list[float], "kind": NotRequired[str]})


def logit(confidence: float) -> float:
    """The logit of a confidence, 0..1; of 0 and 1 infinite."""
    return math.log(confidence / (1 - confidence)) if 0 < confidence < 1 else math.copysign(math.inf, confidence - 0.5)


def _load_operators() -> None:
    """Have torch know torchvision's operators, without its Python package, which takes as long to import as torch."""
    found = find_spec("torchvision")
    if found and found.origin:
        for suffix in EXTENSION_SUFFIXES:
            for file in Path(found.origin).parent.glob(f"_C*{suffix}"):
                try:
                    torch.ops.load_library(file)
                except OSError as error:
                    raise DetguardError(
                        f"{file}: made for another torch than this one, {torch.__version__}; install torch and "
                        f"torchvision again, both from one index ({first_line(error)})"
                    ) from error
    if not hasattr(torch.ops.torchvision, "nms"):
        import torchvision  # noqa: F401


@dataclass(frozen=True)
class Anchors:
    """Where an anchor-based head looks from.

    points: float32 [N, 2] xy, frame pixels; strides: float32 [N, 1], pixels per unit of distance;
    bins: float32 [B, N, 4, R], logits of the distribution of each side's distance, if the head has one; levels: the
    strides that there are, known without asking the device.
    """

    points: Tensor
    strides: Tensor
    bins: Tensor | None = None
    levels: tuple[float, ...] = (8, 16, 32)

    def __getitem__(self, index: int | slice | Tensor) -> "Anchors":
        return replace(self, bins=None if self.bins is None else self.bins[index])


@dataclass(frozen=True)
class Candidates:
    """What a detector proposes for a batch of frames, before NMS.

    Attributes:
        logits: float32 [B, N, C], class confidence before the sigmoid.
        boxes: float32 [B, N, 4] xyxy, frame pixels; or [B, N, C, 4], where each class has its own (two stages).
        end_to_end: the head needs no NMS (YOLOv10, YOLO26, DETRs): the best scores are the detections, at most
            MAX_DETECTIONS and no more than there are candidates.
        anchors: where the candidates come from, for families that have them.
        gate: float32 [B, K], of gated ensembles: the gate's logits.
        experts: float32 [B, K], of gated ensembles: the weights that the gate gives the experts.
        multi_label: users see one of every class over the threshold, not of the best class only (torchvision, RT-DETR).
    """

    logits: Tensor
    boxes: Tensor
    end_to_end: bool = False
    anchors: Anchors | None = None
    gate: Tensor | None = None
    experts: Tensor | None = None
    multi_label: bool = False

    def __getitem__(self, index: int | slice | Tensor) -> "Candidates":
        parts = {"anchors": self.anchors, "gate": self.gate, "experts": self.experts}
        given: dict[str, Any] = {name: part[index] for name, part in parts.items() if part is not None}
        return replace(self, logits=self.logits[index], boxes=self.boxes[index], **given)

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def best_boxes(self) -> Tensor:
        """One box for each candidate, [B, N, 4]: where each class has its own, that of the best class."""
        return self.boxes if self.boxes.ndim == 3 else boxes_as(self.boxes, self.logits.argmax(2))


@dataclass(frozen=True)
class Detections:
    """What a user sees on one photo, best first.

    Attributes:
        boxes: float32 [N, 4] xyxy, photo pixels.
        scores: float32 [N], confidence, 0..1.
        classes: int64 [N], class indices.
        experts: float32 [K], how much each expert of a gated ensemble had to say on this photo.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    experts: Tensor | None = None

    @classmethod
    def none(cls) -> "Detections":
        """No detections at all."""
        return cls(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))

    def __getitem__(self, index: slice | Tensor) -> "Detections":
        return Detections(self.boxes[index], self.scores[index], self.classes[index], self.experts)

    def __len__(self) -> int:
        return len(self.scores)

    def and_those(self, others: "Detections") -> "Detections":
        """These, then others on the same photo."""
        boxes, scores = torch.cat([self.boxes, others.boxes]), torch.cat([self.scores, others.scores])
        return Detections(boxes, scores, torch.cat([self.classes, others.classes]), self.experts)

    def above(self, conf: float) -> "Detections":
        """The detections with a confidence over `conf`."""
        return self[self.scores > conf]

    def of(self, classes: Sequence[int]) -> "Detections":
        """The detections whose class is one of `classes`."""
        return self[torch.isin(self.classes, torch.tensor(list(classes), dtype=torch.int64))]

    def records(self, class_names: dict[int, str]) -> list[Found]:
        """As plain values for JSON: class, confidence, box."""
        return [
            {
                "class": class_names[int(c)],
                "confidence": round(float(s), 4),
                "box": [round(float(v), 1) for v in b],
            }
            for b, s, c in zip(self.boxes, self.scores, self.classes, strict=True)
        ]

    @classmethod
    def from_records(cls, found: Sequence[Found], class_names: Mapping[int, str]) -> "Detections":
        """From what `records` gave, without those of classes that are not among `class_names`."""
        index = {name: number for number, name in class_names.items()}
        known = [one for one in found if one["class"] in index]
        return cls(
            torch.tensor([one["box"] for one in known], dtype=torch.float32).reshape(-1, 4),
            torch.tensor([float(one["confidence"]) for one in known]),
            torch.tensor([index[one["class"]] for one in known], dtype=torch.int64),
        )

    def to_supervision(self, class_names: dict[int, str] | None = None) -> "supervision.Detections":
        """As `supervision.Detections`, which its annotators draw and its metrics take.

        Args:
            class_names: class index -> name, kept as `data["class_name"]`.

        Raises:
            DetguardError: supervision is not installed.
        """
        named = {} if class_names is None else {"class_name": [class_names[c] for c in self.classes.tolist()]}
        return _supervision().Detections(
            xyxy=self.boxes.cpu().numpy().reshape(-1, 4),
            confidence=self.scores.cpu().numpy(),
            class_id=self.classes.cpu().numpy(),
            data={name: np.array(values, dtype=str) for name, values in named.items()},
        )

    @classmethod
    def from_supervision(cls, detections: "supervision.Detections") -> "Detections":
        """From `supervision.Detections`; those without a confidence, as of labelled data, have a score of 1.

        Raises:
            DetguardError: they have no classes.
        """
        if detections.class_id is None:
            raise DetguardError("detections: have no class_id; expected supervision.Detections with classes")
        scores = np.ones(len(detections)) if detections.confidence is None else detections.confidence
        best_first = np.argsort(-scores, kind="stable")
        return cls(
            torch.tensor(detections.xyxy[best_first], dtype=torch.float32).reshape(-1, 4),
            torch.tensor(scores[best_first], dtype=torch.float32),
            torch.tensor(detections.class_id[best_first], dtype=torch.int64),
        )


def _supervision() -> ModuleType:
    try:
        import supervision
    except ImportError as error:
        raise DetguardError("supervision is not installed; pip install 'detguard[supervision]'") from error
    return supervision


def nms(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """Greedy non-maximum suppression by torchvision's operator: the indices that are kept, int64 [K], best first.

    Args:
        boxes: float [N, 4] xyxy.
        scores: of their type, [N].
        iou: overlap, 0..1, over which the worse of two is dropped.
    """
    kept: Tensor = torch.ops.torchvision.nms(boxes, scores, iou)
    return kept


def scaled(points: Tensor, across: float, down: float) -> Tensor:
    """Points or boxes, [..., 2 or 4] xy, by factors of their own for x and y; no device is waited for."""
    factors = (across, down) * (points.shape[-1] // 2)
    return torch.stack([one * factor for one, factor in zip(points.unbind(-1), factors, strict=True)], -1)


def box_area(boxes: Tensor) -> Tensor:
    """The areas of boxes, [N, 4] xyxy, those of no size or less being 0; [N]."""
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)


def intersections(boxes: Tensor, others: Tensor) -> Tensor:
    """The areas that all pairs of boxes share, [N, M]; boxes, others: float [N, 4] and [M, 4] xyxy."""
    lower, upper = torch.maximum(boxes[:, None, :2], others[:, :2]), torch.minimum(boxes[:, None, 2:], others[:, 2:])
    return (upper - lower).clamp(min=0).prod(2)


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of all pairs, [N, M], digit by digit that of `torchvision.ops.box_iou`.

    Args:
        boxes: float [N, 4] xyxy.
        others: float [M, 4] xyxy.
    """
    both = intersections(boxes, others)
    area, area_of_others = ((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, others))
    return both / (area[:, None] + area_of_others - both)


def boxes_as(boxes: Tensor, classes: Tensor) -> Tensor:
    """The boxes, [..., 4], of candidates that are of the `classes`, int64 [...]; boxes: [..., 4] or [..., C, 4]."""
    return boxes if boxes.ndim == classes.ndim + 1 else boxes.take_along_dim(classes[..., None, None], -2).squeeze(-2)


def suppress(candidates: Candidates, conf: float, iou: float, *, multi_label: bool = False) -> list[Detections]:
    """The detections of each frame in the batch, in *frame* pixels: threshold, then per-class NMS.

    As Ultralytics' predict path, a candidate counts for its best class only, or with `multi_label`, as its validation
    and torchvision, for every class over the threshold. An end-to-end head skips NMS.
    """
    multi_label = multi_label or candidates.multi_label
    with torch.no_grad():
        found = [
            _best(logits, boxes, conf, multi_label=multi_label)
            if candidates.end_to_end
            else _suppress_one(logits, boxes, conf, iou, multi_label=multi_label)
            # Of an adapter, whose network may be of another precision.
            for logits, boxes in zip(candidates.logits.detach().float(), candidates.boxes.detach().float(), strict=True)
        ]
    if candidates.experts is None:
        return found
    weights = candidates.experts.detach().float().cpu()
    return [replace(one, experts=weight) for one, weight in zip(found, weights, strict=True)]


def _suppress_one(logits: Tensor, boxes: Tensor, conf: float, iou: float, *, multi_label: bool) -> Detections:
    logits, boxes = with_doubles(logits), with_doubles(boxes)
    if multi_label:
        index, classes = (logits > logit(conf)).nonzero(as_tuple=True)
        scores = logits[index, classes].sigmoid()
    else:
        scores = logits.amax(1).sigmoid()
        index = (scores > conf).nonzero()[:, 0]
        scores, classes = scores[index], logits[index].argmax(1)
    whole = boxes_as(boxes[index], classes).isfinite().all(1)  # of a network that has diverged, or an adapter
    index, scores, classes = index[whole], scores[whole], classes[whole]
    order = scores.argsort(descending=True, stable=True)
    # What survives NMS depends on better candidates only: the first thousand usually hold all that is kept.
    for best in (order[: 4 * MAX_DETECTIONS], order):
        # Classes are kept apart by more than the boxes reach, which makes one NMS of many: with a thousand boxes of 80
        # classes torchvision's `batched_nms` takes five times as long. In doubles, or large photos lose digits.
        found = boxes_as(boxes[index[best]], classes[best]).double()
        apart = found + classes[best, None] * (found.amax() - found.amin() + 1 if len(best) else 0)
        kept = best[nms(apart, scores[best].double(), iou)[:MAX_DETECTIONS]]
        if len(kept) == MAX_DETECTIONS or len(best) == len(order):
            break
    return Detections(boxes_as(boxes[index[kept]], classes[kept]).cpu(), scores[kept].cpu(), classes[kept].cpu())


def _best(logits: Tensor, boxes: Tensor, conf: float, *, multi_label: bool) -> Detections:
    values, labels = (logits.flatten(), None) if multi_label else logits.max(1)
    scores, index = values.sigmoid().topk(min(MAX_DETECTIONS, len(logits)))
    keep = scores > conf
    scores, index = scores[keep], index[keep]
    candidate = index if labels is not None else index // logits.shape[1]
    classes = labels[index] if labels is not None else index % logits.shape[1]
    return Detections(boxes_as(boxes[candidate], classes).cpu(), scores.cpu(), classes.cpu())


_load_operators()
