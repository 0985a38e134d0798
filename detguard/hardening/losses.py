"""What experts learn: to say of a changed photo what the undefended detector says of the clean one, or its labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from ultralytics.utils.metrics import bbox_iou

from detguard.data.stream import Labelled
from detguard.detections import Candidates
from detguard.training_loss import Assignment, assign, binary_cross_entropy, detection_loss

# What is learned: the answers of a teacher, labels, or the sum of both losses, which needs no weight: of YOLO11n on
# COCO photos, attacked at 4 levels, they are 17 and 12 a frame, each over a sum of confidences.
LEARN = ("teacher", "labels", "both")
# What a stage learns where it trains the backbone alone: the teacher's feature maps.
MAPS = "maps"

# Of the distribution of distances against the classes, as in the training loss.
BOX_GAIN = 2.0
TINY = 1e-30


def imitation_loss(student: Candidates, teacher: Candidates) -> Tensor:
    """KL divergence of the student's outputs from the teacher's, per frame, [B]: the sum of `imitation_parts`."""
    return torch.stack(list(imitation_parts(student, teacher).values())).sum(0)


def imitation_parts(student: Candidates, teacher: Candidates, among: Tensor | None = None) -> dict[str, Tensor]:
    """KL divergence of the student's classes and boxes from the teacher's, each per frame, [B].

    Classes by Bernoulli KL at every candidate, distances by KL of their distributions, or without these by 1 - CIoU of
    the boxes; both over the sum of the teacher's confidences, which also weighs boxes: where nothing is, they do not
    matter.
    among: float [B, C], 1 for classes that are imitated; by default all are.
    """
    wanted, found = teacher.logits.detach().float(), student.logits.float()
    p = wanted.sigmoid()
    classes = binary_cross_entropy(found, p) - binary_cross_entropy(wanted, p)
    weight = (p if among is None else p * among[:, None]).amax(2)
    classes = classes if among is None else classes * among[:, None]
    norm = weight.sum(1).clamp(min=1)
    parts = {"class": classes.flatten(1).sum(1) / norm}
    if student.anchors is not None and student.anchors.bins is not None and teacher.anchors is not None:
        assert teacher.anchors.bins is not None
        log_p = teacher.anchors.bins.detach().float().log_softmax(3)
        log_q = student.anchors.bins.float().log_softmax(3)
        boxes = (log_p.exp() * (log_p - log_q)).sum(3).mean(2)
    else:
        boxes = _apart(student.boxes, teacher.boxes)
    return parts | {"box": BOX_GAIN * (boxes * weight).sum(1) / norm}


def _apart(boxes: Tensor, others: Tensor) -> Tensor:
    """1 - CIoU of boxes that are told without a distribution, as YOLO26 does, [B, N, 4]; others: of no gradient."""
    return 1 - bbox_iou(boxes.float(), others.detach().float(), xywh=False, CIoU=True).squeeze(-1)


def feature_variances(teacher: dict[int, Tensor], mean: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """The variance of each channel of feature maps, [B, C, H, W] by layer, over the batch; [1, C, 1, 1] each.

    mean: of the batch's processes, of what is a mean over the frames of each.
    """
    # By means, which are vectorized over channels that lie side by side; var is not.
    maps = {layer: _grid(x) for layer, x in teacher.items()}
    sums = {layer: torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))]) for layer, x in maps.items()}
    whole = mean(torch.cat(list(sums.values()), 1)).split([x.shape[1] for x in sums.values()], 1)
    return {
        layer: (square - first.square()).clamp(min=0)[None, :, None, None]
        for layer, (first, square) in zip(sums, whole, strict=True)
    }


def feature_loss(student: dict[int, Tensor], teacher: dict[int, Tensor], variances: dict[int, Tensor]) -> Tensor:
    """Squared error of the feature maps that both have, [B, C, H, W] by layer, from the teacher's; per frame, [B].

    Each channel in units of its variance over the batch (`feature_variances`); a tenth of the layer's is added, so that
    channels that are hardly ever active do not outweigh the rest. Of large maps a grid of about 12 x 12 positions
    counts.
    """
    errors = []
    for layer in sorted(student.keys() & teacher.keys()):
        error, variance = (_grid(student[layer]) - _grid(teacher[layer].detach())).square(), variances[layer]
        errors.append((error / (variance + 0.1 * variance.mean() + 1e-6)).mean((1, 2, 3)))
    return torch.stack(errors).mean(0)


def _grid(maps: Tensor) -> Tensor:
    step = max(1, maps.shape[-1] // 12)
    return maps[..., ::step, ::step].float()


@dataclass(frozen=True)
class Goal:
    """How frames are to be answered: as by `teacher`, by the objects that are `assigned` to candidates, or by both.

    known: float [B, C], as in `detection_loss`. maps, variances: feature maps that are wanted instead, as in
    `feature_loss`.
    """

    teacher: Candidates | None = None
    assigned: Assignment | None = None
    known: Tensor | None = None
    maps: dict[int, Tensor] = field(default_factory=dict)
    variances: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, learn: str, reference: Candidates, labels: Sequence[Labelled] = ()) -> "Goal":
        """That of frames; learn: one of LEARN; reference: the teacher's outputs on them.

        labels: of each frame, boxes in its pixels; none are read where the teacher alone is learned. Classes that a
        frame is not labelled for are not known. Candidates are assigned by these outputs, which no attack changes: by
        what YOLO11n finds under one of 4 levels, objects weigh 44 % less, and it would learn the least where it fails.
        """
        if learn == "teacher":
            return cls(reference)
        known = torch.ones(len(labels), reference.logits.shape[2])
        for row, label in zip(known, labels, strict=True):
            if label.known is not None:
                row.zero_()[list(label.known)] = 1
        assigned = assign(reference, [label.objects for label in labels])
        device = reference.logits.device
        known = known.to(device, non_blocking=device.type == "cuda")
        return cls(reference if learn == "both" else None, assigned, known)

    def loss(self, found: Candidates | None, maps: dict[int, Tensor] | None = None, aim: str = "all") -> Tensor:
        """The loss of each frame, [B], or the part of it that an attack raises: "class" or "box".

        found, maps: what a network says, and its feature maps on the way; where maps are wanted, they alone count.
        """
        if found is None:
            return feature_loss(maps or {}, self.maps, self.variances)
        parts = list(imitation_parts(found, self.teacher).items()) if self.teacher is not None else []
        parts += detection_loss(found, self.assigned, self.known).items() if self.assigned is not None else []
        raised = [loss for name, loss in parts if aim in ("all", "class" if name == "class" else "box")]
        return torch.stack(raised).sum(0)


def label_loss(found: Candidates, labels: Sequence[Labelled], reference: Candidates | None = None) -> Tensor:
    """The training loss of each frame, [B], by labels that are assigned by what is found itself; see `Goal.of`.

    reference: outputs to imitate in the classes that a frame is not labelled for; by default they do not count.
    """
    goal = Goal.of("labels", found, labels)
    loss = goal.loss(found)
    if reference is not None and goal.known is not None:
        loss = loss + torch.stack(list(imitation_parts(found, reference, 1 - goal.known).values())).sum(0)
    return loss


def gate_margin(logits: Tensor, towards: int, away: int) -> Tensor:
    """How far the gate prefers one expert to another, in logits, which do not saturate as weights do; [B]."""
    return logits[:, towards] - logits[:, away]


def retention_loss(now: Candidates, before: Candidates) -> Tensor:
    """How far an expert has moved from its earlier outputs, per frame, [B]: the design's loss L2, of one expert.

    Jensen-Shannon divergence of the classes at every candidate and of the distances' distributions, or without these
    1 - CIoU of the boxes: the mean over the candidates, weighted by where either is confident.
    """
    p, q = (c.logits.float().sigmoid() for c in (now, before))
    weight = torch.maximum(p.amax(2), q.amax(2)).detach()
    loss = (js_divergence(p, q).sum(2) * weight).sum(1)
    if now.anchors is not None and now.anchors.bins is not None and before.anchors is not None:
        assert before.anchors.bins is not None
        a, b = (bins.float().softmax(3) for bins in (now.anchors.bins, before.anchors.bins))
        boxes = _js_term(a, b).sum(3).mean(2)
    else:
        boxes = _apart(now.boxes, before.boxes)
    return (loss + BOX_GAIN * (boxes * weight).sum(1)) / weight.sum(1).clamp(min=1)


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two tensors of probabilities as Bernoulli variables, elementwise; 0..ln 2."""
    return _js_term(p, q) + _js_term(1 - p, 1 - q)


def _js_term(p: Tensor, q: Tensor) -> Tensor:
    """What one outcome of probabilities `p` and `q` adds to their Jensen-Shannon divergence, elementwise."""
    # Of a probability that is 0, log has no gradient.
    a, b, m = (x.clamp(min=TINY).log() for x in (p, q, (p + q) / 2))
    return (p * (a - m) + q * (b - m)) / 2
