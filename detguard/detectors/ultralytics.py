"""Ultralytics' detectors: YOLOv3, v5u, v6, v8, v9, v10, 11, 12, 26 and RT-DETR; boxes of segment and pose models."""

import copy
import math
import re
from collections.abc import Container, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override
from ultralytics.models.rtdetr.predict import RTDETRPredictor
from ultralytics.models.yolo.detect import DetectionPredictor
from ultralytics.nn.modules.head import OBB, Detect, Pose, RTDETRDecoder, Segment
from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel, guess_model_scale
from ultralytics.utils import ROOT, SETTINGS, YAML
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset
from ultralytics.utils.ops import xywh2xyxy
from ultralytics.utils.tal import dist2bbox

from detguard import DetguardError, first_line
from detguard.detections import MAX_DETECTIONS, Anchors, Candidates, Detections, scaled
from detguard.detectors.base import Detector, Family, to_photo
from detguard.detectors.recipe import HEADS, MOST_CLASSES, boxes_alone
from detguard.photos import Letterbox, Source, as_photo, read_photo

# Of files with other names, Ultralytics may read a pattern, a list of files or streams, a film, or further pages.
PLAIN = (".png", ".jpg", ".jpeg")


class UltralyticsDetector(Detector):
    """A frozen, fused copy of an Ultralytics `DetectionModel` or `RTDETRDetectionModel`.

    Fused as Ultralytics' own predictor fuses it: the network that users run is the network that is attacked.
    YOLOv10 and YOLO26 have two heads; predict() runs the one with NMS, predict(nms=False) and many exports the
    other: `end_to_end` chooses that one.

    Raises:
        DetguardError: the model's head is not a box detection head, or it has no end-to-end head.
    """

    def __init__(self, model: Any, name: str, imgsz: int, device: str = "cpu", *, end_to_end: bool = False) -> None:
        self.name = name
        self.class_names = {int(k): str(v) for k, v in model.names.items()}
        frozen: Any = copy.deepcopy(model).float().eval()
        two_heads = getattr(frozen.model[-1], "one2one_cv2", None) is not None
        if end_to_end and not two_heads:
            raise DetguardError(f"`end_to_end`: {name} has no head that works without NMS")
        if two_heads:
            frozen.end2end = end_to_end
        self.end_to_end = end_to_end
        frozen = frozen.fuse(verbose=False).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.model = frozen
        self.layers, self.save = list(frozen.model), set(frozen.save)
        self.device = torch.device(device)
        self.head: Any = frozen.model[-1]
        more = isinstance(self.head, (Segment, Pose, OBB)) or getattr(frozen, "task", "detect") != "detect"
        if more or not isinstance(self.head, (Detect, RTDETRDecoder)):
            raise DetguardError(
                f"{name}: a {type(self.head).__name__} model; only upright boxes can be attacked, those of segment and "
                "pose models where they are read without --trust"
            )
        self.stretch = isinstance(self.head, RTDETRDecoder)
        if not self.stretch:
            self.head.stride = self.head.stride.cpu()  # or a GPU would be waited for in every pass
        self.stride = max(int(frozen.stride.max()), 32)
        self.imgsz = math.ceil(imgsz / self.stride) * self.stride  # whole strides, as the predictor makes it
        self._predictor: DetectionPredictor | RTDETRPredictor | None = None

    @override
    def letterbox(self, photo_shape: tuple[int, int]) -> Letterbox:
        return Letterbox.fit(photo_shape, self.imgsz, self.stride, stretch=self.stretch)

    @override
    def candidates(self, frames: Tensor) -> Candidates:
        *layers, head = self.layers
        last, saved = run_layers(layers, frames, {}, self.save)
        raw = head_outputs(head, last, saved)
        if isinstance(head, RTDETRDecoder):
            boxes, logits = raw[0].squeeze(0), raw[1].squeeze(0)
            height, width = frames.shape[2:]
            boxes = scaled(xywh2xyxy(boxes), width, height)
            return Candidates(logits, boxes, end_to_end=True, multi_label=True)
        return decode(head, raw)

    @override
    def predict(self, source: Source, conf: float, iou: float | None = None) -> Detections:
        if self._predictor is None:
            family = RTDETRPredictor if self.stretch else DetectionPredictor
            overrides = {
                "imgsz": self.imgsz, "device": str(self.device), "save": False, "verbose": False, "mode": "predict",
                "max_det": MAX_DETECTIONS, "rect": True, "batch": 1,
            }  # fmt: skip
            predictor = family(overrides=overrides | ({"nms": False} if self.end_to_end else {}))
            threads = torch.get_num_threads()
            # Of the whole process, its set-up would change which GPU is the current one, and leave one core idle.
            with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                predictor.setup_model(model=self.model, verbose=False)
            torch.set_num_threads(threads)
            # Its warm-up would import torchvision, which takes as long as torch, for the same NMS as its own.
            predictor.done_warmup = True
            self._predictor = predictor
        self._predictor.args.conf, self._predictor.args.iou = conf, self.iou if iou is None else iou
        file = Path(source) if isinstance(source, str | Path) else None
        if file is None or file.suffix not in PLAIN or "*" in str(file.absolute()) or not file.is_file():
            result = self._predictor(source=as_photo(source)[..., ::-1].copy())[0]
        else:
            read_photo(file)  # which refuses half a file and one frame of many, as Ultralytics' reader does not
            result = self._predictor(source=str(file))[0]
        boxes = result.boxes.cpu()
        found = Detections(boxes.xyxy, boxes.conf, boxes.cls.long())
        return to_photo(found, Letterbox.whole(result.orig_shape))  # RT-DETR's predictor leaves boxes beyond the photo


def run_layers(
    layers: Iterable[Any], x: Tensor, saved: dict[int, Tensor], save: Container[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Run neighbouring layers of a model, all before the head, on `x`.

    saved: outputs of earlier layers by number, added to where `save` says that later ones need them.
    Returns the last output and `saved`.
    """
    for layer in layers:
        x = layer(inputs_of(layer, x, saved))
        if layer.i in save:
            saved[layer.i] = x
    return x, saved


def inputs_of(layer: Any, last: Tensor, saved: dict[int, Tensor]) -> Tensor | list[Tensor]:
    """What a layer or the head is given, after `run_layers` has run all before it: a tensor or a list of such."""

    def output(number: int) -> Tensor:
        return last if number == -1 else saved[number if number >= 0 else layer.i + number]

    return output(layer.f) if isinstance(layer.f, int) else [output(number) for number in layer.f]


def head_outputs(head: Any, last: Tensor, saved: dict[int, Tensor]) -> Any:
    """The raw outputs of the head that users run, after `run_layers` has run all before it."""
    inputs = inputs_of(head, last, saved)
    if isinstance(head, RTDETRDecoder):
        return head(inputs)[1]
    return head.forward_head(inputs, **(head.one2one if head.end2end else head.one2many))


def decode(head: Any, raw: dict[str, Any], gate: Tensor | None = None) -> Candidates:
    """Candidates from the raw outputs of an anchor-based head; `gate`: the logits of the gate behind them.

    Not under autocast: in bfloat16, boxes would lie on every second or fourth pixel.
    """
    levels = head.stride.tolist()
    sides, scores = (raw[name].to(torch.promote_types(raw[name].dtype, torch.float32)) for name in ("boxes", "scores"))
    anchors, strides = _places(raw["feats"], levels, sides.dtype)
    boxes = dist2bbox(head.dfl(sides).transpose(1, 2), anchors, xywh=False) * strides
    bins = sides.unflatten(1, (4, -1)).permute(0, 3, 1, 2) if head.reg_max > 1 else None
    places = Anchors(anchors * strides, strides, bins, tuple(levels))
    return Candidates(scores.transpose(1, 2), boxes, head.end2end, places, gate, multi_label=head.end2end)


def _places(maps: Sequence[Tensor], strides: Sequence[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Middles of the cells of feature maps, in cells, [N, 2] xy, and the strides of each, [N, 1], made where they are.

    Ultralytics' `make_anchors` makes them on the CPU, for which a GPU waits.
    """
    points, of_points = [], []
    for found, stride in zip(maps, strides, strict=True):
        height, width = found.shape[2:]
        # Not `arange`, whose device a traced graph would keep.
        y, x = (found.new_ones(side, dtype=dtype).cumsum(0) - 0.5 for side in (height, width))
        points.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], 2).view(-1, 2))
        of_points.append(found.new_full((height * width, 1), stride, dtype=dtype))
    return torch.cat(points), torch.cat(of_points)


class Ultralytics(Family):
    """All that has a box detection head of Ultralytics'."""

    runs = UltralyticsDetector
    options: ClassVar = frozenset({"end_to_end"})

    @property
    @override
    def names(self) -> list[str]:
        """Those of detectors; the smallest first."""
        files = (re.fullmatch(r"(yolov?\d+\w*|rtdetr-\w)\.pt", name) for name in GITHUB_ASSETS_NAMES)
        return sorted((file[1] for file in files if file), key=lambda name: (name.rstrip("u")[-1] not in "nt", name))

    @property
    @override
    def built(self) -> str:
        return "yolo11n (in a json yolo11n.yaml) and others of Ultralytics"

    @override
    def owns(self, network: nn.Module) -> bool:
        return hasattr(network, "names")

    @override
    def build(self, architecture: str, classes: list[str]) -> nn.Module | None:
        """By the name of one of Ultralytics' own yaml files."""
        shipped = {p.name: p for p in (ROOT / "cfg" / "models").rglob("*.yaml")}
        scale = guess_model_scale(architecture)
        generic = architecture if architecture in shipped else re.sub(rf"(\d+){scale}", r"\1", architecture, count=1)
        if generic not in shipped:
            return None
        recipe = boxes_alone(YAML.load(shipped[generic]) | {"scale": scale, "yaml_file": architecture})
        if recipe["head"][-1][2] not in HEADS:  # those of classifiers would have backbones of torchvision's fetched
            return None
        if not 0 < len(classes) <= MOST_CLASSES:
            raise DetguardError(f"`classes`: {len(classes)}; expected 1 to {MOST_CLASSES}")
        kind = RTDETRDetectionModel if "rtdetr" in architecture else DetectionModel
        model = kind(recipe, nc=len(classes), verbose=False)
        model.names = dict(enumerate(classes))
        model.task = "detect"  # type: ignore[assignment]
        return model

    @override
    def fetch(self, name: str) -> Path | None:
        official = name if Path(name).suffix else f"{name}.pt"
        if Path(name).name != name or official not in GITHUB_ASSETS_NAMES:
            return None
        if (cached := Path(SETTINGS["weights_dir"]) / official).is_file():
            return cached
        try:
            found = Path(attempt_download_asset(official))
        except Exception as error:  # whatever the network layers raise, the user's remedy is the same
            found = Path()
            reason = first_line(error).encode("ascii", "ignore").decode().strip()
        else:
            reason = "download failed"
        if not found.is_file():
            raise DetguardError(
                f"{name}: cannot be downloaded ({reason}); go online or give a file, `detector` path/to/{official}"
            )
        return found

    @override
    def read(self, name: str, file: Path, trust: bool) -> tuple[nn.Module, int]:
        from detguard.detectors.rebuild import read_checkpoint

        model, size = read_checkpoint(file, trust=trust)
        check_official(file, model)
        return model, size


def check_official(file: Path, model: nn.Module) -> None:
    """See that what was found by an official name is that network: anybody can put a file where downloads are kept.

    Ultralytics publishes no hashes; size and classes are compared with what the name says.

    Raises:
        DetguardError: it is another.
    """
    coco = YAML.load(ROOT / "cfg" / "datasets" / "coco.yaml")["names"]
    recipe = getattr(model, "yaml", {})
    scale, given = guess_model_scale(file), recipe.get("scale")
    if given and scale and scale != given:
        raise DetguardError(f"{file}: its network is of size {given}; delete it, and it will be downloaded again")
    known = {0: "person"} if "-pose" in file.stem else coco
    if not any(data in file.stem for data in ("oiv7", "objv1")) and model.names != known:
        raise DetguardError(f"{file}: its classes are not COCO's; delete it, and it will be downloaded again")
