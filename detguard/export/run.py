"""One `detguard export`: what each format takes, and a checked file. A new format is one file and one line here."""

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from detguard import DetguardError, first_line
from detguard.detectors.base import network_of
from detguard.detectors.gated import GatedNetwork
from detguard.detectors.load import find_weights, load_detector, load_model, read_card
from detguard.detectors.ultralytics import UltralyticsDetector
from detguard.export.base import Deployment, Format
from detguard.export.check import PHOTOS, Verdict, check, default_photos, frames_of
from detguard.export.onnx import Onnx
from detguard.export.openvino import OpenVino
from detguard.export.pt import Checkpoint
from detguard.export.torchscript import TorchScript
from detguard.files import is_file
from detguard.photos import Photo

FORMATS: dict[str, Format] = {
    "pt": Checkpoint(),
    "onnx": Onnx(),
    "torchscript": TorchScript(),
    "openvino": OpenVino(),
}


def plan_export(
    model: str,
    kind: str,
    photos: Sequence[Photo] = (),
    imgsz: int | None = None,
    conf: float = 0.25,
    iou: float = 0.7,
    top_k: int | None = None,
    *,
    nms: bool = False,
    dynamic: bool = True,
    end_to_end: bool = False,
    trust: bool = False,
) -> Deployment:
    """The detector by its name or file, and how it is wanted; see `Deployment`.

    kind: one of FORMATS. photos: to check the file on, of which the first PHOTOS count; by default `default_photos`.
    imgsz, end_to_end, top_k, trust: as of `load_detector`.

    Raises:
        DetguardError: the format does not take such a detector or option, or lacks a package.
    """
    FORMATS[kind].check_packages(kind)
    if kind == "pt" and (nms or not dynamic or end_to_end):
        option = "`nms`" if nms else "`end_to_end`" if end_to_end else "`static`"
        raise DetguardError(
            f"{option}: not of a .pt, where YOLO(file) decides; leave it out or choose another `format`"
        )
    if nms and end_to_end:
        raise DetguardError("`nms`: the head of `end_to_end` needs none; leave one of them out")
    # On the CPU, where the frames are made that are traced and checked.
    detector = load_detector(model, imgsz, "cpu", trust=trust, end_to_end=end_to_end, top_k=top_k)
    network = network_of(detector)
    architecture = ""
    if isinstance(network, GatedNetwork):
        detector.model = network.unshared()  # runtimes want weights, not sums of them
        if kind == "pt" and len(network.names) > 1:
            raise DetguardError(
                f"`format` pt: {model} is an ensemble of {len(network.names)} experts, and Ultralytics' .pt holds one "
                "network; choose `format` onnx, which YOLO(file) runs too, or harden one network (`recipe` pgd)"
            )
        architecture = str(read_card(model)["architecture"])
    elif not isinstance(detector, UltralyticsDetector) or detector.stretch:
        raise DetguardError(f"{model}: only Ultralytics' YOLO families and what was hardened of them can be exported")
    elif kind == "pt":
        network = load_model(model, trust=trust)[0]
    shown = list(photos[:PHOTOS]) or default_photos()
    frames = frames_of(detector, shown, square=not dynamic)
    return Deployment(detector, network, architecture, frames, nms, conf, iou, dynamic)


def default_file(model: str, kind: str) -> Path:
    """Where a file goes by default: here, by the name of the model."""
    return Path(f"{Path(model).stem}{FORMATS[kind].suffix}")


def check_file(file: Path, model: str, kind: str, *, by_default: bool = False) -> None:
    """See that a file may be written: named as runtimes tell its format, and not the model itself.

    by_default: nobody gave the name, so that no other checkpoint is written over either.

    Raises:
        DetguardError: it may not.
    """
    suffix = FORMATS[kind].suffix
    if not file.name.endswith(suffix):
        raise DetguardError(f"`out` {file}: expected a name that ends in {suffix} for `format` {kind}")
    if kind == "pt" and is_file(file) and file.samefile(find_weights(model)):
        raise DetguardError(f"`out` {file}: would be written over the model itself; give another name")
    if kind == "pt" and by_default and os.path.lexists(file):
        raise DetguardError(f"{file}: is there already, and may be another model; say by `out` where to write")


def rejected(file: Path, kind: str) -> Path:
    """What a file is called whose check has failed."""
    suffix = FORMATS[kind].suffix
    return file.with_name(f"{file.name.removesuffix(suffix)}.failed{suffix}")


def export(wanted: Deployment, kind: str, file: Path) -> Verdict:
    """Write a detector in one of FORMATS, read the file back by its runtime, and compare the two.

    The file takes its name once it has passed; one that has not is called as by `rejected`, and what is there stays.

    Raises:
        DetguardError: it cannot be written in that format.
    """
    made = FORMATS[kind]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as folder:
            written = Path(folder) / file.name
            made.write(wanted, written)
            verdict = check(wanted, made.read(written))
            file = file if verdict.passed else rejected(file, kind)
            if written.is_dir():
                file.mkdir(exist_ok=True)
            for one in sorted(written.iterdir()) if written.is_dir() else [written]:
                one.replace(file / one.relative_to(written))
        return verdict
    except DetguardError:
        raise
    except OSError as error:
        raise DetguardError(f"{file}: cannot be written ({error.strerror or error})") from error
    except Exception as error:  # whatever an exporter or a runtime raises of a network that it does not know
        reason = first_line(error)
        raise DetguardError(f"`format` {kind}: {wanted.detector.name} cannot be exported ({reason})") from error
