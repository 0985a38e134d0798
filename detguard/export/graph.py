"""A detector as one graph, from frames to what runtimes that know Ultralytics' exports expect."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import nms
from ultralytics.utils.ops import xyxy2xywh

from detguard.detections import MAX_DETECTIONS
from detguard.detectors.base import Detector

# Farther than boxes of one frame reach, px: added to the boxes of each frame and class, one NMS keeps all apart.
APART = 16384.0


class Graph(nn.Module):
    """A detector from frames, float32 [B, 3, H, W], 0..1, RGB, to boxes in frame pixels, as it is traced.

    Without NMS [B, 4 + C, N], xywh of the centre and the probability of each class. With it, or of a head that needs
    none, [B, 300, 6], best first: xyxy, probability, class; rows of zeros where less is found.

    nms: by `suppress`'s rule, each candidate for its best class; conf: over which a candidate is kept; iou: overlap
    over which the worse of two of a class is not.
    """

    def __init__(self, detector: Detector, conf: float, iou: float, *, nms: bool) -> None:
        super().__init__()
        self.detector, self.network = detector, detector.model
        self.nms, self.conf, self.iou = nms, conf, iou

    @property
    def listed(self) -> bool:
        """Whether what comes out is a list of detections, not of all candidates."""
        return self.nms or self.detector.end_to_end

    def forward(self, frames: Tensor) -> Tensor:
        """Boxes and probabilities of all candidates of each frame, or of those that NMS leaves."""
        found = self.detector.candidates(frames)
        scores = found.logits.sigmoid()
        if not self.listed:
            return torch.cat([xyxy2xywh(found.boxes), scores], 2).transpose(1, 2)
        if not found.end_to_end:
            best, classes = scores.max(2, keepdim=True)
            scores = torch.zeros_like(scores).scatter(2, classes, best)
            choose = _OnnxChosen.apply if torch.onnx.is_in_onnx_export() else chosen
            frame, kind, candidate = choose(found.boxes, scores.transpose(1, 2), self.conf, self.iou).unbind(1)
            kept = torch.zeros_like(scores)
            kept[frame, candidate, kind] = 1.0
            scores = scores * kept
        kinds = scores.shape[2]
        # A small frame has fewer candidates than there are rows.
        padded = torch.cat([scores.flatten(1), scores.new_zeros(scores.shape[0], MAX_DETECTIONS)], 1)
        best, index = padded.topk(MAX_DETECTIONS)
        index = torch.where(best > 0, index, torch.zeros_like(index))
        boxes = found.boxes.gather(1, (index // kinds).unsqueeze(2).expand(-1, -1, 4))
        rows = torch.cat([boxes, best.unsqueeze(2), (index % kinds).unsqueeze(2).type_as(boxes)], 2)
        return rows * (best > 0).unsqueeze(2)


def chosen(boxes: Tensor, scores: Tensor, conf: float, iou: float) -> Tensor:
    """What NMS of each frame and class keeps of boxes, [B, N, 4], by scores, [B, C, N]: int64 [S, 3] of b, c, n."""
    found = (scores > conf).nonzero()
    frame, kind, candidate = found.unbind(1)
    # Of so large numbers, only double precision still holds the pixels.
    apart = boxes[frame, candidate].double() + ((frame * scores.shape[1] + kind) * APART).unsqueeze(1)
    return found[nms(apart, scores[frame, kind, candidate].double(), iou)]


class _OnnxChosen(torch.autograd.Function):
    """`chosen` as ONNX' own operator."""

    @staticmethod
    def forward(_: object, boxes: Tensor, scores: Tensor, conf: float, iou: float) -> Tensor:
        return chosen(boxes, scores, conf, iou)

    @staticmethod
    def symbolic(graph: Any, boxes: torch.Value, scores: torch.Value, conf: float, iou: float) -> torch.Value:
        most = graph.op("Constant", value_t=torch.tensor([MAX_DETECTIONS]))
        limits = [graph.op("Constant", value_t=torch.tensor([limit])) for limit in (iou, conf)]
        return graph.op("NonMaxSuppression", boxes, scores, most, *limits)
