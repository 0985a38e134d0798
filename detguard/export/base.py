"""What every format offers: a detector is written as a file, and read back by the runtime that its users run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from detguard import DetguardError, __version__
from detguard.detectors.base import Detector
from detguard.export.graph import Graph

# From frames, float32 [B, 3, H, W], to what `Graph` gives of them.
Runtime = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Deployment:
    """A detector on its way out, and how it is wanted.

    detector: as `load_detector` gives it; network: the same as `load_model` gives it, unfused where it is none that was
    hardened; architecture: of which Ultralytics' yaml; nms, conf, iou: as of `Graph`, which the formats that trace it
    have inside; dynamic: any batch and whole strides of height and width, or one square frame; frames: float32
    [1, 3, H, W] each, of real photos.
    """

    detector: Detector
    network: nn.Module
    architecture: str
    frames: Sequence[Tensor]
    nms: bool = False
    conf: float = 0.25
    iou: float = 0.7
    dynamic: bool = True

    @property
    def graph(self) -> Graph:
        """The module that is traced."""
        return Graph(self.detector, self.conf, self.iou, nms=self.nms).eval()

    @property
    def example(self) -> Tensor:
        """Frames to trace the module with, float32 [B, 3, H, W], 0..1."""
        return torch.zeros(2 if self.dynamic else 1, 3, self.detector.imgsz, self.detector.imgsz)

    @property
    def metadata(self) -> dict[str, object]:
        """What Ultralytics' own exports say of themselves, by which `YOLO(file)` runs one."""
        size = self.detector.imgsz
        inside = {"conf": self.conf, "iou": self.iou} if self.nms else {}
        return {
            "description": f"{self.detector.name}, exported by detguard",
            "author": "detguard",
            "version": __version__,
            "license": "AGPL-3.0-or-later",
            "stride": int(getattr(self.detector, "stride", 32)),
            "task": "detect",
            "batch": 1,
            "imgsz": [size, size],
            "names": self.detector.class_names,
            "args": {"batch": 1, "dynamic": self.dynamic, "nms": self.nms, **inside},
            "channels": 3,
            "end2end": self.detector.end_to_end,
        }


class Format(ABC):
    """A kind of file; suffix: what its names end in; packages: what else must be installed for it."""

    suffix: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = "export"

    @abstractmethod
    def write(self, wanted: Deployment, file: Path) -> None:
        """Write the file, or folder of files, whole or not at all."""

    @abstractmethod
    def read(self, file: Path) -> Runtime:
        """The file as its users run it, on as many threads as torch has."""

    def check_packages(self, name: str) -> None:
        """See that what the format of a name needs is installed.

        Raises:
            DetguardError: something is missing, with the command that installs it.
        """
        if missing := [package for package in self.packages if find_spec(package) is None]:
            what = " and ".join(missing)
            raise DetguardError(f"`format` {name}: needs {what}; pip install 'detguard[{self.extra}]'")
