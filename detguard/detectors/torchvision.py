"""Torchvision's detectors: what all have in common, and those of one stage, RetinaNet, FCOS and SSD.

Torchvision takes as long to import as torch: only what builds or runs one of its networks imports it.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from typing_extensions import override

from detguard import DetguardError, first_line
from detguard.detections import MAX_DETECTIONS, Anchors, Candidates, Detections, scaled
from detguard.detectors.base import Detector, Family, to_photo
from detguard.detectors.checkpoint import MAX_BYTES
from detguard.detectors.recipe import MOST_CLASSES
from detguard.files import is_file, read_file
from detguard.photos import Letterbox, Source, as_photo, frames_tensor

ARCHITECTURES = (
    "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn", "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)  # fmt: skip
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# Outputs of torchvision's networks that stand for no class; of those that say one of all classes, the first does.
NO_CLASS = ("__background__", "N/A")


def check_published(file: Path) -> None:
    """See that a file has the hash that its name ends in, as torchvision publishes its weights.

    Raises:
        DetguardError: it has another.
    """
    published = file.stem.rpartition("-")[2]
    if not hashlib.sha256(read_file(file, MAX_BYTES)).hexdigest().startswith(published):
        raise DetguardError("its hash is not the published one")


@contextmanager
def weights_only() -> Iterator[None]:
    """Have all that torch loads meanwhile be read without running code, which torchvision does not ask for."""
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[WEIGHTS_ONLY]
        else:
            os.environ[WEIGHTS_ONLY] = before


class TorchvisionDetector(Detector):
    """A frozen RetinaNet, FCOS or SSD with the resize and the normalization that it comes with.

    A frame is the photo itself: the network resizes it, so that the network that users run is what is attacked.

    Raises:
        DetguardError: the network has one frame size, and `imgsz` is another.
    """

    def __init__(self, model: Any, name: str, imgsz: int, device: str = "cpu") -> None:
        self.name = name
        self.model: Any = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.device = torch.device(device)
        self.iou = float(self.last_stage.nms_thresh)
        first = int(self.one_of_all)
        classes = [(n, text) for n, text in enumerate(model.outputs) if n >= first and text not in NO_CLASS]
        self.class_names = dict(enumerate(text for _, text in classes))
        self.outputs = torch.tensor([number for number, _ in classes], device=self.device)
        resize = self.model.transform
        if resize.fixed_size and imgsz != (size := max(resize.fixed_size)):
            raise DetguardError(f"`imgsz` {imgsz}: {name} has frames of {size} px only")
        if imgsz != frame_size(model):
            resize.min_size, resize.max_size = (imgsz,), imgsz
        self.imgsz = imgsz

    @property
    def one_of_all(self) -> bool:
        """Whether outputs exclude each other: the first then stands for background, whatever it is called."""
        from torchvision.models.detection.ssd import SSD

        return isinstance(self.model, SSD)

    @property
    def last_stage(self) -> Any:
        """The part of the network that chooses what users see, by thresholds of its own."""
        return self.model

    @override
    def letterbox(self, photo_shape: tuple[int, int]) -> Letterbox:
        return Letterbox.whole(photo_shape)

    @override
    def candidates(self, frames: Tensor) -> Candidates:
        from torchvision.ops import clip_boxes_to_image

        images, _ = self.model.transform(list(frames))
        features = list(self.model.backbone(images.tensors).values())
        raw = self.model.head(features)
        places = self.model.anchor_generator(images, features)[0]
        decode = getattr(self.model.box_coder, "decode_single", self.model.box_coder.decode)
        boxes = decode(raw["bbox_regression"].flatten(0, 1), places.repeat(len(frames), 1)).view(len(frames), -1, 4)
        # From the network's pixels to the frame's; what reaches over its sides is cut off, as users see it.
        (height, width), (tall, wide) = frames.shape[2:], images.image_sizes[0]
        across, down = width / wide, height / tall
        boxes = clip_boxes_to_image(scaled(boxes, across, down), (height, width))
        per_cell = self.model.anchor_generator.num_anchors_per_location()
        levels = [images.tensors.shape[2] * height / tall / level.shape[2] for level in features]
        strides = [
            places.new_full((level[0, 0].numel() * count, 1), stride)
            for level, count, stride in zip(features, per_cell, levels, strict=True)
        ]
        points = scaled((places[:, :2] + places[:, 2:]) / 2, across, down)
        anchors = Anchors(points, torch.cat(strides), levels=tuple(levels))
        logits = self._logits(raw)[..., self.outputs]
        return Candidates(logits, boxes, anchors=anchors, multi_label=True)

    def _logits(self, raw: dict[str, Tensor]) -> Tensor:
        """Logits of the confidences that users see, [B, N, outputs], from the head's own."""
        from torchvision.models.detection.fcos import FCOS

        logits = raw["cls_logits"]
        if self.one_of_all:
            return softmax_logits(logits)
        if isinstance(self.model, FCOS):
            # The confidence is the geometric mean of class probability and centerness.
            log_score = (logsigmoid(logits) + logsigmoid(raw["bbox_ctrness"])) / 2
            return log_score - torch.log(-torch.expm1(log_score))
        return logits

    @override
    def predict(self, source: Source, conf: float, iou: float | None = None) -> Detections:
        photo = as_photo(source)
        stage = self.last_stage
        stage.score_thresh, stage.nms_thresh = conf, self.iou if iou is None else iou
        stage.detections_per_img = MAX_DETECTIONS
        with torch.no_grad():
            (found,) = self.model(list(frames_tensor([photo], self.device)))
        known = torch.isin(found["labels"], self.outputs)
        classes = torch.searchsorted(self.outputs, found["labels"][known])
        detections = Detections(found["boxes"][known].cpu(), found["scores"][known].cpu(), classes.cpu())
        return to_photo(detections, self.letterbox(photo.shape[:2]))


def frame_size(model: Any) -> int:
    """The longest side, px, to which a network of torchvision enlarges or shrinks a photo."""
    return int(max(model.transform.fixed_size or [model.transform.max_size]))


def softmax_logits(logits: Tensor) -> Tensor:
    """Logits, [..., C], of which the sigmoid is the softmax of `logits`: each less the log-sum-exp of the others.

    Exact and with a gradient where the softmax rounds to 1, which the logarithm of one minus it has not.
    """
    log_total = logits.logsumexp(-1, keepdim=True)
    best = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.argmax(-1, keepdim=True), True)
    others = logits.masked_fill(best, -torch.inf).logsumexp(-1, keepdim=True)
    # All but the best have a probability of at most a half: 1 less it is exact enough.
    log_p = logits - log_total
    rest = log_total + torch.log1p(-log_p.exp().masked_fill(best, 0))
    return logits - torch.where(best, others, rest)


@dataclass(frozen=True)
class Torchvision(Family):
    """Networks that torchvision builds by the names `architectures`, of the types called `networks`.

    The names of a network's outputs, "__background__" first as torchvision has them, become its `outputs`.
    """

    architectures: tuple[str, ...]
    networks: tuple[str, ...]
    runs: type[TorchvisionDetector]

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return self.architectures

    @property
    @override
    def built(self) -> str:
        return ", ".join(self.architectures)

    @override
    def owns(self, network: nn.Module) -> bool:
        types = type(network).__mro__
        return any(one.__name__ in self.networks and one.__module__.startswith("torchvision.") for one in types)

    @override
    def build(self, architecture: str, classes: list[str]) -> nn.Module | None:
        if architecture not in self.architectures:
            return None
        # RetinaNet and FCOS ask of each class by itself: one without a background will do.
        if not (1 if architecture.startswith(("retinanet", "fcos")) else 2) <= len(classes) <= MOST_CLASSES:
            raise DetguardError(
                f"`classes`: {len(classes)}; expected the outputs of {architecture}, at most {MOST_CLASSES}, the "
                f"background first"
            )
        from torchvision.models import get_model

        model: Any = get_model(architecture, weights=None, weights_backbone=None, num_classes=len(classes))
        model.outputs = classes
        return model

    @override
    def fetch(self, name: str) -> Path | None:
        if name not in self.architectures:
            return None
        from torchvision.models import get_model_weights

        weights = get_model_weights(name).DEFAULT
        with _published(name) as file:
            if not is_file(file):
                weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
            check_published(file)
        return file

    @override
    def read(self, name: str, file: Path, trust: bool) -> tuple[nn.Module, int]:
        from torchvision.models import get_model, get_model_weights

        weights = get_model_weights(name).DEFAULT
        with _published(name), weights_only():
            model: Any = get_model(name, weights=weights, progress=False)
        model.outputs = weights.meta["categories"]
        return model, frame_size(model)


@contextmanager
def _published(architecture: str) -> Iterator[Path]:
    """Where torchvision keeps its COCO-trained weights; what goes wrong with them meanwhile becomes one line."""
    from torchvision.models import get_model_weights

    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(get_model_weights(architecture).DEFAULT.url).name
    try:
        yield file
    except Exception as error:  # whatever the network layers and the unpickler raise, the user's remedy is the same
        reason = first_line(error)
        raise DetguardError(
            f"{architecture}: cannot be downloaded or read ({reason}); go online, or put torchvision's file at {file}"
        ) from error


ONE_STAGE = Torchvision(ARCHITECTURES, ("RetinaNet", "FCOS", "SSD"), TorchvisionDetector)
