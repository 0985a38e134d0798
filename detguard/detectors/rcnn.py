"""Torchvision's two-stage detectors: Faster R-CNN, and the boxes of Mask R-CNN and Keypoint R-CNN."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from detguard.detections import Candidates, scaled
from detguard.detectors.torchvision import Torchvision, TorchvisionDetector, softmax_logits

ARCHITECTURES = (
    "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn", "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2",
    "keypointrcnn_resnet50_fpn",
)  # fmt: skip
# The logit of a candidate that there is not, and the side of a box under which torchvision drops it, network's pixels.
NOTHING, SMALLEST = -30.0, 1e-2
# Of whole strides of any backbone.
SQUARE = (256, 256)


class RcnnDetector(TorchvisionDetector):
    """A frozen Faster, Mask or Keypoint R-CNN, of which masks and keypoints are left out.

    The first stage chooses proposals without a gradient, as torchvision trains it; what the second says of them, a
    logit and a box for each class, has one.
    """

    def __init__(self, model: Any, name: str, imgsz: int, device: str = "cpu") -> None:
        # Masks and keypoints come of the boxes found, and change none of them.
        model.roi_heads.mask_roi_pool = model.roi_heads.keypoint_roi_pool = None
        super().__init__(model, name, imgsz, device)
        # The pool takes its scales from the first photo that it sees, wrong ones from a strip that is mostly padding.
        with torch.no_grad():
            features = self.model.backbone(torch.zeros(1, 3, *SQUARE, device=self.device))
            model.roi_heads.box_roi_pool(features, [torch.zeros(1, 4, device=self.device)], [SQUARE])

    @property
    @override
    def one_of_all(self) -> bool:
        return True

    @property
    @override
    def last_stage(self) -> Any:
        return self.model.roi_heads

    @override
    def candidates(self, frames: Tensor) -> Candidates:
        from torchvision.ops import clip_boxes_to_image

        images, _ = self.model.transform(list(frames))
        features = self.model.backbone(images.tensors)
        with torch.no_grad():
            proposals, _ = self.model.rpn(images, features)
        stage, size = self.model.roi_heads, images.image_sizes[0]
        raw, moves = stage.box_predictor(stage.box_head(stage.box_roi_pool(features, proposals, images.image_sizes)))
        boxes = stage.box_coder.decode(moves, proposals).view(*raw.shape, 4)  # of no proposals it has another shape
        boxes = clip_boxes_to_image(boxes, size)[:, self.outputs]
        small = ((boxes[..., 2:] - boxes[..., :2]) < SMALLEST).any(2)
        logits = softmax_logits(raw)[:, self.outputs].masked_fill(small, NOTHING)
        (height, width), (tall, wide) = frames.shape[2:], size
        boxes = scaled(boxes, width / wide, height / tall)
        # As many for every photo: what one gives is not to depend on the others of its batch.
        counts, number = [len(found) for found in proposals], self.model.rpn.post_nms_top_n()
        return Candidates(
            _filled(logits, counts, number, NOTHING), _filled(boxes, counts, number, 0.0), multi_label=True
        )


def _filled(values: Tensor, counts: Sequence[int], number: int, fill: float) -> Tensor:
    """Values, [sum of counts, ...], as [photos, number, ...], with `fill` where a photo has fewer."""
    parts = [pad(v, [0, 0] * (v.ndim - 1) + [0, number - len(v)], value=fill) for v in values.split(list(counts))]
    return torch.stack(parts)


TWO_STAGE = Torchvision(ARCHITECTURES, ("FasterRCNN",), RcnnDetector)
