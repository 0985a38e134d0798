"""What detectors are trained on, as white-box attacks and hardening need it: per frame, on any family's candidates.

Task-aligned assignment (Feng et al. 2021, TOOD), binary cross-entropy of the classes, CIoU of the boxes and the
distribution focal loss of their distances (Li et al. 2020), with Ultralytics' gains.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from ultralytics.utils.metrics import bbox_iou
from ultralytics.utils.tal import TaskAlignedAssigner, bbox2dist

from detguard.detections import Anchors, Candidates, Detections, boxes_as

GAINS = {"class": 0.5, "box": 7.5, "distance": 1.5}


@dataclass(frozen=True)
class Assignment:
    """Which candidates answer for objects, as flat lists of P positives; all other candidates are background.

    frames, candidates, classes: int64 [P]; weights: float32 [P], the class score that is wanted of each;
    boxes: float32 [P, 4] xyxy, frame pixels.
    """

    frames: Tensor
    candidates: Tensor
    classes: Tensor
    weights: Tensor
    boxes: Tensor

    @classmethod
    def stack(cls, parts: "Sequence[Assignment]") -> "Assignment":
        """Assignments of one frame each as that of their batch."""
        frames = [torch.full_like(part.frames, i) for i, part in enumerate(parts)]
        rest = [(p.candidates, p.classes, p.weights, p.boxes) for p in parts]
        return cls(torch.cat(frames), *(torch.cat(values) for values in zip(*rest, strict=True)))


@torch.no_grad()
def assign(candidates: Candidates, objects: Sequence[Detections]) -> Assignment:
    """Assign candidates to the objects of each frame, boxes in frame pixels."""
    anchors = candidates.anchors
    if anchors is None and len(candidates) > 1:  # without anchors the points differ from frame to frame
        return Assignment.stack([assign(candidates[i : i + 1], objects[i : i + 1]) for i in range(len(candidates))])
    logits, boxes = candidates.logits.detach().float(), candidates.best_boxes.detach().float()
    # They come from the CPU, and nothing but the assigner's own lists of pairs is read back.
    labels = pad_sequence([o.classes for o in objects], batch_first=True).to(logits.device)
    wanted = pad_sequence([o.boxes for o in objects], batch_first=True).to(boxes)
    present = pad_sequence([torch.ones(len(o), 1) for o in objects], batch_first=True).to(boxes)
    points = anchors.points if anchors is not None else (boxes[0, :, :2] + boxes[0, :, 2:]) / 2
    levels = list(Anchors.levels if anchors is None else anchors.levels)
    assigner = TaskAlignedAssigner(
        topk=min(10, boxes.shape[1]), num_classes=logits.shape[2], alpha=0.5, beta=6.0, stride=levels
    )
    if not labels.shape[1]:
        none = torch.zeros(0, dtype=torch.int64, device=logits.device)
        return Assignment(none, none, none, boxes.new_zeros(0), boxes.new_zeros(0, 4))
    _, target_boxes, target_scores, positive, target = assigner(
        logits.sigmoid(), boxes, points, labels[..., None], wanted, present
    )
    frames, found = positive.nonzero(as_tuple=True)
    classes = labels[frames, target[frames, found].long()]
    weights = target_scores[frames, found, classes]
    return Assignment(frames, found, classes, weights, target_boxes[frames, found])


def detection_loss(
    candidates: Candidates, assignment: Assignment, known: Tensor | None = None, parts: Collection[str] = tuple(GAINS)
) -> dict[str, Tensor]:
    """Some `parts` of the training loss, each [B], times its gain and over the frame's sum of weights: see GAINS.

    "distance" is zero for heads without a distribution of distances. known: float [B, C], 1 for classes of which all
    objects of a frame are labelled; scores of the others, 0, do not count. By default all are.
    """
    logits, (frames, found) = candidates.logits.float(), (assignment.frames, assignment.candidates)
    weights = assignment.weights
    batch = logits.shape[0]

    def per_frame(values: Tensor) -> Tensor:
        return logits.new_zeros(batch).index_add(0, frames, values)

    def of_classes() -> Tensor:
        wanted = per_frame(logits[frames, found, assignment.classes] * weights)
        negatives = binary_cross_entropy(logits)
        return (negatives if known is None else negatives * known[:, None]).flatten(1).sum(1) - wanted

    def of_boxes() -> Tensor:
        boxes = boxes_as(candidates.boxes.float()[frames, found], assignment.classes)
        overlap = bbox_iou(boxes, assignment.boxes, xywh=False, CIoU=True).squeeze(-1)
        return per_frame((1 - overlap) * weights)

    def of_distances() -> Tensor:
        return per_frame(_distance_loss(candidates, assignment) * weights)

    norm = per_frame(weights).clamp(min=1)
    losses = {"class": of_classes, "box": of_boxes, "distance": of_distances}
    return {name: losses[name]() * (GAINS[name] / norm) for name in parts}


class _BinaryCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor | None) -> Tensor:
        ctx.save_for_backward(logits, wanted)
        loss = logits.clamp(min=0)
        return (loss if wanted is None else loss.sub_(logits * wanted)).sub_(logits.abs().sigmoid_().log_())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, wanted = ctx.saved_tensors
        p = logits.sigmoid()
        return (p if wanted is None else p.sub_(wanted)).mul_(gradient), None


def binary_cross_entropy(logits: Tensor, wanted: Tensor | None = None) -> Tensor:
    """Cross-entropy of sigmoid(logits) from the probabilities wanted, elementwise; no gradient reaches the latter.

    wanted: shape as the logits; by default all 0.

    That of torch takes log1p, which is not vectorized on CPUs: six times as long, and a quarter of a training step.
    """
    loss: Tensor = _BinaryCrossEntropy.apply(logits, None if wanted is None else wanted.detach())
    return loss


def _distance_loss(candidates: Candidates, assignment: Assignment) -> Tensor:
    """Distribution focal loss of each positive, [P]."""
    anchors = candidates.anchors
    if anchors is None or anchors.bins is None:
        return torch.zeros_like(assignment.weights)
    found = assignment.candidates
    bins = anchors.bins[assignment.frames, found].float()
    size = bins.shape[-1]
    strides = anchors.strides[found]
    target = bbox2dist(anchors.points[found] / strides, assignment.boxes / strides, size - 1)
    low = target.long()
    share = target - low
    logits = bins.flatten(0, 1)
    near = cross_entropy(logits, low.flatten(), reduction="none") * (1 - share).flatten()
    far = cross_entropy(logits, low.flatten() + 1, reduction="none") * share.flatten()
    return (near + far).view(-1, 4).mean(1)
