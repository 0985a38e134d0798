"""Any detector in twenty lines: `detguard check-detector adapter:make --trust`, then `--model adapter:make --trust`.

This one adapts torchvision's SSDlite by what it offers to all: a network that makes one box and one logit per class of
every place that it looks at. Exchange `network`, `candidates` and `class_names` for yours.
"""

import torch
from torch import Tensor
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from detguard.detections import Candidates, Detections
from detguard.detectors.base import Detector
from detguard.detectors.torchvision import softmax_logits
from detguard.photos import Letterbox, Source


class Mine(Detector):
    """A detector that only has to say where a photo lies in its frame, and what it proposes for frames."""

    name, imgsz = "mine", 320

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)  # random weights, so that the example needs no download
        network = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
        self.model = network.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        self.class_names = {0: "person", 1: "bicycle", 2: "car"}

    def letterbox(self, photo_shape: tuple[int, int]) -> Letterbox:
        """The photo fills the square frame."""
        return Letterbox.fit(photo_shape, self.imgsz, stretch=True)

    def candidates(self, frames: Tensor) -> Candidates:
        """Logits [B, N, C] and boxes [B, N, 4] of all places, before any threshold."""
        images, _ = self.model.transform(list(frames))
        features = list(self.model.backbone(images.tensors).values())
        raw = self.model.head(features)
        places = torch.stack(self.model.anchor_generator(images, features)).flatten(0, 1)
        boxes = self.model.box_coder.decode_single(raw["bbox_regression"].flatten(0, 1), places)
        logits = softmax_logits(raw["cls_logits"])[..., 1:]  # log-odds: what users see is a softmax
        return Candidates(logits, boxes.view(len(frames), -1, 4))

    def predict(self, source: Source, conf: float, iou: float | None = None) -> Detections:
        """What users of the detector see; yours calls its own public function, so that both ways can be compared."""
        return self.detect([source], conf, iou)[0]


def make(device: str) -> Mine:
    """What `--model adapter:make` calls."""
    return Mine(device)
