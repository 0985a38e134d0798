"""What every detector family offers: candidates with a gradient, and the detections that its users see."""

import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from detguard import DetguardError, defaults
from detguard.classes import meant
from detguard.detections import Candidates, Detections, suppress
from detguard.detectors.loaded_code import loaded_code, package
from detguard.photos import PADDING_LEVEL, Letterbox, Source, as_photo, frames_tensor


class Detector(ABC):
    """A frozen detector in eval mode, for one thread at a time: threads load one each.

    Attributes:
        name: what it is called.
        source: the name or file that `load_detector` made it of.
        class_names: class index, from 0 -> name.
        imgsz: longest side of a frame, px.
        model: the network, its parameters frozen; `state_hash` is of it. Not needed where it is elsewhere.
        device: where its frames go.
        iou: overlap over which NMS drops the worse of two boxes, as the family has it.
        conf: confidence over which an object counts as found where nothing else is asked for, as the family has it.
        end_to_end: whether its head needs no NMS.
        nms_inside: the confidence and the overlap of an NMS that is a part of the network itself, if there is one.
        differentiable: whether candidates have a gradient at the frames; without one only black-box attacks are
            possible.
        hardened: whether it is a defence, which is judged by stronger attacks.
        experts: the names of those that answer together, of gated ensembles.
        robust: the number of the adversarial one of them; -1: none.
        leaders: the numbers of those that were grown for new kinds of images.
    """

    name: str
    source: str = ""
    class_names: dict[int, str]
    imgsz: int
    model: nn.Module
    device: torch.device
    iou: float = 0.7
    conf: float = defaults.CONF
    end_to_end: bool = False
    nms_inside: tuple[float, float] | None = None
    differentiable: bool = True
    hardened: bool = False
    experts: tuple[str, ...] = ()
    robust: int = -1
    leaders: tuple[int, ...] = ()

    def variants(self) -> dict[str, "Detector"]:
        """What an attack should also go through, by name: ways in which the same detector gives other gradients."""
        return {}

    @cached_property
    def listed(self) -> bool:
        """Whether it lists its detections itself, so that there is no NMS after it."""
        grey = np.full((self.imgsz, self.imgsz, 3), PADDING_LEVEL, np.uint8)
        frames = frames_tensor([self.letterbox(grey.shape[:2])(grey)], self.device)
        with torch.no_grad():
            return self.candidates(frames).end_to_end

    @abstractmethod
    def letterbox(self, photo_shape: tuple[int, int]) -> Letterbox:
        """Where a photo lies in this detector's frame.

        Args:
            photo_shape: (height, width), px.
        """

    @abstractmethod
    def candidates(self, frames: Tensor) -> Candidates:
        """What the detector proposes, before any threshold and NMS; differentiable with respect to the frames.

        Where `differentiable` is false they need not be, and may be the detections over confidence .001 alone.

        Args:
            frames: float32 [B, 3, H, W], 0..1, RGB, of one shape, as `letterbox` makes them.
        """

    @abstractmethod
    def predict(self, source: Source, conf: float, iou: float | None = None) -> Detections:
        """Detections of one file or photo by the family's own public predict path, in photo pixels, best first.

        Args:
            source: a file, `uint8 [H, W, 3]` RGB, or what else `detguard.photos.as_photo` takes.
            conf: confidence over which an object counts as found, 0..1.
            iou: of NMS, 0..1, by default the detector's.
        """

    def detect(
        self,
        photos: Sequence[Source],
        conf: float | None = None,
        iou: float | None = None,
        *,
        multi_label: bool = False,
    ) -> list[Detections]:
        """Detections by the tensor path that attacks use, in photo pixels, best first.

        Neighbours of one frame shape share a forward.

        Args:
            photos: each `uint8 [H, W, 3]` RGB, or what else `detguard.photos.as_photo` takes.
            conf: confidence over which an object counts as found, 0..1, by default the detector's.
            iou: of NMS, 0..1, by default the detector's.
            multi_label: a candidate counts for every class over `conf`, not for its best class only.

        Raises:
            DetguardError: it is a single photo, or one cannot be read.
        """
        if isinstance(photos, str | Path | Image) or (isinstance(photos, np.ndarray | Tensor) and photos.ndim < 4):
            shown = f" {photos}" if isinstance(photos, str | Path) else ""
            raise DetguardError(f"photos{shown}: a single one; give a list of photos")
        conf, iou = self.conf if conf is None else conf, self.iou if iou is None else iou
        found: list[Detections] = []
        placed = [(self.letterbox(photo.shape[:2]), photo) for photo in map(as_photo, photos)]
        for _, group in groupby(placed, key=lambda pair: pair[0].frame):
            boxes, batch = zip(*group, strict=True)
            # Not in a caller's inference mode: of what a network keeps, no gradient could be taken later.
            with torch.inference_mode(False), torch.no_grad():
                frames = [box(photo) for box, photo in zip(boxes, batch, strict=True)]
                candidates = self.candidates(frames_tensor(frames, self.device))
            detections = suppress(candidates, conf, iou, multi_label=multi_label)
            found += [to_photo(d, box) for d, box in zip(detections, boxes, strict=True)]
        return found

    def state_hash(self) -> str:
        """SHA-256 over what each layer is and computes, and over all parameters and buffers, by name."""
        digest = hashlib.sha256(json.dumps(architecture(network_of(self))).encode() + self._own_code())
        for key, value in sorted(network_of(self).state_dict().items()):
            digest.update(key.encode())
            numbers = value.detach().cpu().contiguous().reshape(-1)
            digest.update(numbers.view(torch.uint8).numpy().tobytes())  # NumPy knows no bfloat16
        return digest.hexdigest()

    def _own_code(self) -> bytes:
        """Of a detector or layers of the user's own, what they and the function that made them are: `loaded_code`."""
        things: list[object] = [type(layer) for layer in network_of(self).modules()]
        packages, ours = {package(layer) for layer in things} - KNOWN_LAYERS, package(Detector)
        if package(type(self)) != ours:
            module, _, factory = self.source.rpartition(":")
            made_by = getattr(sys.modules.get(module), factory, None)
            packages |= {package(kind) for kind in type(self).__mro__ if issubclass(kind, Detector)}
            packages.add(package(made_by))
            things = [self, made_by, *things]
        packages -= {ours, ""}
        return "\n".join(loaded_code(things, packages)).encode() if packages else b""

    def class_index(self, name: str) -> int:
        """The index of a class by its name, in any letter case.

        Raises:
            DetguardError: no such class, naming a synonym, the nearest or all; or several.
        """
        name = name.strip()
        known: dict[str, list[int]] = {}
        for index, called in self.class_names.items():
            known.setdefault(called.strip().lower(), []).append(index)
        if found := known.get(name.lower()):
            if len(found) > 1:
                raise DetguardError(f"class '{name}': {self.name} has {len(found)} classes of that name; give others")
            return found[0]
        near = meant(name, self.class_names.values())
        hint = f"did you mean '{near}'?" if near else f"it knows: {', '.join(self.class_names.values())}"
        raise DetguardError(f"class '{name}': {self.name} has no such class; {hint}")


def network_of(detector: Detector) -> nn.Module:
    """The network of a detector; an empty one of a service that has none here."""
    return getattr(detector, "model", nn.Module())


class Family(ABC):
    """What loading needs to know of detectors of one kind; `families.py` lists them all.

    Attributes:
        runs: the class of its detectors, made of a network, a name, the longest side of a frame, px, a device, and, by
            name, those of `options` that were given.
        options: of `load_detector`, those that it takes.
        suffixes: of files that only this family reads, such as ".onnx".
    """

    runs: type[Any]
    options: ClassVar[frozenset[str]] = frozenset()
    suffixes: ClassVar[frozenset[str]] = frozenset()

    @property
    def names(self) -> Sequence[str]:
        """Official names; errors show the nearest one, of several as near the first, or the first as an example."""
        return ()

    @property
    def built(self) -> str:
        """What architectures `build` knows, for errors."""
        return ""

    @abstractmethod
    def owns(self, network: nn.Module) -> bool:
        """Whether a network is of this family, if it is of none before it in the list."""

    def build(self, architecture: str, classes: list[str]) -> nn.Module | None:
        """The network, with random weights, that the json of a .safetensors calls so; None: not of this family.

        Reads no file but of the library that the family comes from.

        Args:
            architecture: the json's word for it.
            classes: the names of the network's outputs.
        """
        return None

    def fetch(self, name: str) -> Path | None:
        """The file of official weights, downloaded where it is not here yet; None: no name of this family.

        Raises:
            DetguardError: it is not here and cannot be downloaded.
        """
        return None

    def read(self, name: str, file: Path, *, trust: bool) -> tuple[nn.Module, int]:
        """The network of official weights, known to be what `name` says, and the frame size that it was made for.

        Or of a file that ends in one of `suffixes`.

        Args:
            name: official, or of the file.
            file: where the weights are.
            trust: as of `load_detector`.

        Raises:
            DetguardError: it is something else.
        """
        raise NotImplementedError


def architecture(network: nn.Module) -> list[tuple[str, str, dict[str, object]]]:
    """Of every layer in order: its name, its type, and its plain attributes, which decide what it computes."""
    # Duplicates too: networks of one file share their activations or not, as they were read.
    return [
        (name, f"{type(layer).__module__}.{type(layer).__qualname__}", _settings(layer))
        for name, layer in network.named_modules(remove_duplicate=False)
    ]


# Attributes that do not decide what layers of these libraries compute in eval mode, or that change with the frame.
KNOWN_LAYERS = {"torch", "torchvision", "ultralytics", "transformers", "timm", "detguard"}
PASSING = {
    "training", "inplace", "dropout", "momentum", "export", "format", "dynamic", "shape", "shapes", "max_det",
    "score_thresh", "nms_thresh", "detections_per_img", "type", "np", "nc", "task", "pt_path",
}  # fmt: skip


def _settings(layer: nn.Module) -> dict[str, object]:
    passing = PASSING if type(layer).__module__.partition(".")[0] in KNOWN_LAYERS else {"training"}
    found = {key: value for key, value in vars(layer).items() if key[0] != "_" and key not in passing}
    if isinstance(found.get("stride"), Tensor):  # of a head, by which it places its boxes
        found["stride"] = found["stride"].tolist()
    return {key: value for key, value in sorted(found.items()) if value is not None and _plain(value)}


def _plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_plain, value))
    return isinstance(value, bool | int | float | str)


def to_photo(detections: Detections, letterbox: Letterbox) -> Detections:
    """Detections in frame pixels -> photo pixels, without boxes that are none."""
    detections = detections[detections.boxes.isfinite().all(1)]
    return replace(detections, boxes=letterbox.boxes_to_photo(detections.boxes))
