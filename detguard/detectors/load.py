"""From a name or a file to a detector, without executing anything that the file says."""

import copy
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from detguard import DetguardError
from detguard.files import write_file

if TYPE_CHECKING:
    from detguard.detectors.base import Detector
    from detguard.detectors.gated import GatedNetwork

BUNDLED = "detguard-n"
MAX_BYTES = 4 << 30
MOST_CLASSES = 10_000


def load_detector(
    name: str | Path = BUNDLED,
    imgsz: int | None = None,
    trust: bool = False,
    device: str = "cpu",
    end_to_end: bool = False,
    top_k: int | None = None,
) -> "Detector":
    """A ready detector by bundled name, by file (.pt, .safetensors), by Ultralytics' name ("yolo11n") or torchvision's.

    imgsz: longest side of a frame in pixels; by default what the weights were made for.
    end_to_end: the head without NMS of YOLOv10 and YOLO26.
    top_k: experts that a gated ensemble asks per photo; by default as many as it was made for.
    trust: unpickle a .pt without the allow-list, which lets it run any code.

    Raises:
        DetguardError: no such weights, or they are damaged, of another kind, or would execute code.
    """
    import torch

    from detguard.detectors.gated import GatedDetector, GatedNetwork
    from detguard.detectors.torchvision import TorchvisionDetector
    from detguard.detectors.ultralytics import UltralyticsDetector

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DetguardError(f"--device {device}: cannot be used ({str(error).splitlines()[0]})") from error
    model, size = load_model(name, trust)
    if isinstance(model, GatedNetwork):
        if end_to_end:
            raise DetguardError(f"--end-to-end: {name} is a gated ensemble, whose heads all need NMS")
        if top_k:
            model.top_k = top_k if top_k < len(model.names) else None
        return GatedDetector(model, Path(name).stem, imgsz or size, device)
    if top_k:
        raise DetguardError(f"--top-k: {name} is no gated ensemble, it has no experts to choose from")
    if hasattr(model, "outputs"):
        if end_to_end:
            raise DetguardError(f"--end-to-end: {name} has no head that works without NMS")
        return TorchvisionDetector(model, Path(name).stem, imgsz or size, device)
    return UltralyticsDetector(model, Path(name).stem, imgsz or size, device, end_to_end)


def detector_config(detector: "Detector", model: str) -> dict[str, Any]:
    """What a run's config keeps of its detector; `model` is the name or file as the user gave it."""
    network: Any = detector.model
    experts = len(network.names) if hasattr(network, "top_k") else None
    return {
        "model": model,
        "imgsz": detector.imgsz,
        "end_to_end": detector.end_to_end,
        "top_k": experts and (network.top_k or experts),
        "sha256": detector.state_hash(),
    }


def load_configured(config: dict[str, Any], trust: bool = False, device: str = "cpu") -> "Detector":
    """The detector of a run by its `detector_config`.

    Raises:
        DetguardError: as `load_detector`, or the weights are no longer the same.
    """
    options = config["end_to_end"], config.get("top_k")
    detector = load_detector(config["model"], config["imgsz"], trust, device, *options)
    if detector.state_hash() != config["sha256"]:
        raise DetguardError(
            f"{config['model']}: no longer the weights that the run used; restore them or start a new run"
        )
    return detector


def load_model(name: str | Path = BUNDLED, trust: bool = False) -> tuple[nn.Module, int]:
    """The unfused, trainable network of a detector and the frame size it was made for; see `load_detector`."""
    from detguard.detectors.torchvision import ARCHITECTURES, frame_size, official_torchvision

    if name in ARCHITECTURES:
        model = official_torchvision(str(name))
        return model, frame_size(model)
    file = find_weights(name)
    if file.stat().st_size > MAX_BYTES:
        raise DetguardError(f"{file}: over {MAX_BYTES >> 30} GiB, too large for weights of a detector")
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_checkpoint(file, trust)


def weights_folder() -> Path:
    """Where the bundled weights are: inside the installed package, or at the top of the source tree."""
    inside = Path(__file__).parent.parent / "weights"
    return inside if inside.is_dir() else inside.parent.parent / "weights"


def find_weights(name: str | Path) -> Path:
    """The file of a detector by path, by bundled name, or by an official name that Ultralytics downloads.

    Raises:
        DetguardError: nothing of that name, here or (when it is official) online.
    """
    file = Path(name)
    if file.is_file():
        if file.suffix not in (".pt", ".safetensors"):
            raise DetguardError(f"{file}: weights end in .pt or .safetensors")
        return file
    if (bundled := weights_folder() / f"{name}.safetensors").is_file() and file.name == str(name):
        return bundled
    from ultralytics.utils import SETTINGS
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset

    from detguard.detectors.torchvision import ARCHITECTURES

    official = file.name if file.suffix else f"{file.name}.pt"
    if file.name != str(name) or official not in GITHUB_ASSETS_NAMES:
        known = ", ".join(sorted(p.stem for p in weights_folder().glob("*.safetensors"))) or "none"
        raise DetguardError(
            f"{name}: no such file, bundled detector ({known}), Ultralytics name (yolo11n, ...) or torchvision name "
            f"({', '.join(ARCHITECTURES)})"
        )
    if (cached := Path(SETTINGS["weights_dir"]) / official).is_file():
        return cached
    try:
        found = Path(attempt_download_asset(official))
    except Exception as error:  # whatever the network layers raise, the user's remedy is the same
        found = Path()
        reason = str(error).splitlines()[0].encode("ascii", "ignore").decode().strip()
    else:
        reason = "download failed"
    if not found.is_file():
        raise DetguardError(
            f"{name}: cannot be downloaded ({reason}); go online or give a file, --model path/to/{official}"
        )
    return found


def read_card(name: str | Path) -> dict[str, Any]:
    """What the json beside a detector's .safetensors says.

    Raises:
        DetguardError: no such weights, or no such json.
    """
    file = find_weights(name).with_suffix(".json")
    try:
        card = json.loads(file.read_text())
        if not isinstance(card, dict) or not {"architecture", "classes", "imgsz"} <= card.keys():
            raise ValueError("one of them is missing")
    except (OSError, ValueError) as error:
        raise DetguardError(f"{file}: expected a json with architecture, classes and imgsz ({error})") from error
    return card


def _read_safetensors(file: Path) -> tuple[nn.Module, int]:
    card = read_card(file)
    try:
        architecture, classes, imgsz = str(card["architecture"]), list(card["classes"]), int(card["imgsz"])
        gated = card.get("gated")
    except (ValueError, TypeError) as error:
        raise DetguardError(f"{file.with_suffix('.json')}: its imgsz or classes cannot be read ({error})") from error
    model: nn.Module = build_model(architecture, [str(c) for c in classes])
    if gated is not None:
        from detguard.detectors.gated import build_gated

        model = build_gated(fused(model), gated)
    try:
        model.load_state_dict(load_file(file), strict=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DetguardError(f"{file}: damaged, or not the weights of {architecture} ({reason})") from error
    return model, imgsz


def build_model(architecture: str, classes: list[str]) -> nn.Module:
    """A network with random weights by the name of one of Ultralytics' own yaml files or of torchvision's builders.

    No other file is read. classes: those of the network's outputs, of torchvision's with "__background__" first.

    Raises:
        DetguardError: neither ships such an architecture.
    """
    from detguard.detectors.torchvision import ARCHITECTURES, build_torchvision

    if architecture in ARCHITECTURES and 1 < len(classes) <= MOST_CLASSES:
        return build_torchvision(architecture, classes)
    from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel, guess_model_scale
    from ultralytics.utils import ROOT, YAML

    shipped = {p.name: p for p in (ROOT / "cfg" / "models").rglob("*.yaml")}
    scale = guess_model_scale(architecture)
    generic = architecture if architecture in shipped else re.sub(rf"(\d+){scale}", r"\1", architecture, count=1)
    if generic not in shipped or not 0 < len(classes) <= MOST_CLASSES:
        raise DetguardError(
            f"{architecture}: not an architecture that Ultralytics ships (like yolo11n.yaml), nor one of torchvision's "
            f"({', '.join(ARCHITECTURES)})"
        )
    family = RTDETRDetectionModel if "rtdetr" in architecture else DetectionModel
    recipe = YAML.load(shipped[generic]) | {"scale": scale, "yaml_file": architecture}
    model = family(recipe, nc=len(classes), verbose=False)
    model.names = dict(enumerate(classes))
    model.task = "detect"  # type: ignore[assignment]
    return model


def fused(model: nn.Module) -> Any:
    """A copy of a model with its batch norms folded into the convolutions, as detectors run it."""
    network: Any = copy.deepcopy(model).float().eval()
    return network.fuse(verbose=False)


def save_gated(network: "GatedNetwork", like: dict[str, Any], file: Path) -> None:
    """Write a gated ensemble as safetensors and, beside it, the json that `load_detector` needs; no code in either.

    like: architecture, classes and imgsz of the detector that it was made from, and what else the card is to say.
    """
    from detguard.detectors.gated import gated_card

    tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
    # First the json: weights without it could not be loaded by anyone who finds them after a kill.
    write_file(file.with_suffix(".json"), (json.dumps(like | {"gated": gated_card(network)}, indent=2) + "\n").encode())
    write_file(file, save(tensors))


def _read_checkpoint(file: Path, trust: bool) -> tuple[nn.Module, int]:
    from ultralytics.nn.tasks import torch_safe_load

    try:
        checkpoint, _ = torch_safe_load(str(file), safe_only=not trust)
    except Exception as error:  # a hostile or broken file can raise anything on its way through the unpickler
        if "outside the supported" in str(error):
            raise DetguardError(
                f"{file}: refused, loading it would run code or needs classes other than Ultralytics' models; "
                "if you know where it comes from, add --trust"
            ) from error
        raise DetguardError(
            f"{file}: damaged, or not an Ultralytics checkpoint ({str(error).splitlines()[0]})"
        ) from error
    model = checkpoint.get("ema") or checkpoint.get("model")
    if not isinstance(model, nn.Module) or not hasattr(model, "names"):
        raise DetguardError(f"{file}: holds no Ultralytics model")
    arguments = getattr(model, "args", None)
    size = arguments.get("imgsz", 640) if isinstance(arguments, dict) else getattr(arguments, "imgsz", 640)
    return model.float(), int(size)
