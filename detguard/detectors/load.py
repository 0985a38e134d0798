"""From a name or a file to a detector, without executing anything that the file says."""

import copy
import json
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from detguard import DetguardError, defaults, first_line
from detguard.detectors.checkpoint import MAX_BYTES
from detguard.detectors.pickles import Damaged
from detguard.detectors.recipe import SIZES, class_names, frame_size
from detguard.engine import usable_device, with_gradients
from detguard.files import JsonObject, is_file, is_folder, read_json, shipped, write_file
from detguard.schema import Config, Maybe, Shape, check, real, whole

if TYPE_CHECKING:
    from ultralytics.models import YOLO

    from detguard.detectors.base import Detector, Family
    from detguard.detectors.gated import GatedNetwork

BUNDLED = defaults.MODEL
OPTIONS: Shape = {
    "imgsz": Maybe(whole(SIZES.start, SIZES.stop - 1)),
    "top_k": Maybe(whole(1)),
    "iou": Maybe(real(0, 1)),
}
# How much of a name, of 1, is as in the official one that it is taken for.
ALIKE = 0.8
# What a detector is that does not take an option.
LACKS = {
    "end_to_end": "has no head that works without NMS",
    "top_k": "is no gated ensemble, it has no experts to choose from",
    "fusion": "is no gated ensemble, it has no experts to choose from",
}


@with_gradients
def load_detector(
    name: "str | Path | YOLO" = BUNDLED,
    imgsz: int | None = None,
    device: "str | int | torch.device" = defaults.DEVICE,
    top_k: int | None = None,
    fusion: str | None = None,
    iou: float | None = None,
    *,
    trust: bool = False,
    end_to_end: bool = False,
) -> "Detector":
    """A detector by bundled name, file (.pt, .safetensors, .onnx), or name of Ultralytics or torchvision (yolo11n).

    Args:
        name: one of these, a folder or hub name of transformers', an `ultralytics.YOLO` object, as it is in memory: a
            copy, which its further training does not change; or `module:factory`, a function of yours that returns a
            `Detector` (with `trust`).
        imgsz: longest side of a frame, 32..4096 px, rounded up to a multiple of the network's stride, where it has one;
            by default what the weights were made for.
        trust: unpickle a .pt, which lets it run any code, instead of reading it as data; or call the function that a
            name like `module:factory` means.
        device: of torch: cpu, cuda, 0 or cuda:0, xpu or mps; by default a GPU where CUDA finds one, else (and for
            .onnx) the CPU.
        end_to_end: the head without NMS of YOLOv10 and YOLO26.
        top_k: experts that a gated ensemble evaluates per photo, at least 1; by default as it was made.
        fusion: how they become one answer, `bounded:B` or `average:F`; by default as it was made.
        iou: overlap, 0..1, over which NMS drops the worse of two boxes; by default the family's own.

    Raises:
        DetguardError: no such weights, or they are damaged, of another kind, or would execute code; or an option is out
            of its range.

    Examples:
        >>> import detguard
        >>> detector = detguard.load_detector("detguard-n")
        >>> detector.class_names[0], detector.imgsz
        ('person', 320)
    """
    from detguard.detectors.custom import is_custom, load_custom

    check({"imgsz": imgsz, "top_k": top_k, "iou": iou}, OPTIONS)
    if device == defaults.DEVICE and Path(str(name)).suffix == ".onnx":
        device = "cpu"  # onnxruntime for GPUs is another package
    device = usable_device(device)
    if isinstance(name, str | Path) and is_custom(name):
        if imgsz or end_to_end or top_k or fusion is not None:
            raise DetguardError(f"{name}: is made by your own function; `imgsz`, `end_to_end` and such are up to it")
        detector = load_custom(str(name), device, trust=trust)
    else:
        options: JsonObject = {"end_to_end": end_to_end, "top_k": top_k, "fusion": fusion}
        if isinstance(name, str | Path):
            detector = _of_network(*load_model(name, trust=trust), name, imgsz, device, **options)
        else:
            network, size, name = _of_yolo(name)
            detector = _of_network(network, size, name, imgsz, device, **options)
    detector.source = str(name)
    if detector.nms_inside and iou not in (None, detector.iou):
        raise DetguardError(f"`iou` {iou}: the NMS of {name} is inside it, at {detector.iou}; export it without")
    if iou not in (None, detector.iou) and detector.listed:
        raise DetguardError(f"`iou` {iou}: {name} lists its detections itself, without NMS; leave it out")
    detector.iou = detector.iou if iou is None else iou
    return detector


def _of_yolo(model: object) -> tuple[nn.Module, int, str]:
    """Of an object of Ultralytics', its network, the frame size that it was made for, and its file or name.

    Raises:
        DetguardError: it is none, or it runs an export.
    """
    network = getattr(model, "model", None)
    if not isinstance(network, nn.Module) or not hasattr(network, "names"):
        raise DetguardError(
            f"{type(model).__name__}: expected a name, a file, or a YOLO object of a .pt or .yaml; give exports by file"
        )
    size = frame_size(getattr(network, "args", None))
    # After training the network is another one than that which the object was made of, and knows its own file.
    named = (getattr(of, key, None) for of, key in ((network, "pt_path"), (model, "ckpt_path"), (model, "model_name")))
    return network, size, str(next(filter(None, named), "yolo"))


def _of_network(
    model: nn.Module, size: int, name: str | Path, imgsz: int | None, device: str, **options: object
) -> "Detector":
    """The detector of a network, by the family that it is of."""
    from detguard.detectors.families import FAMILIES

    family = next(family for family in FAMILIES if family.owns(model))
    given = {option: value for option, value in options.items() if value not in (None, False)}
    for option in sorted(given.keys() - family.options):
        raise DetguardError(f"`{option}`: {name} {LACKS[option]}")
    return family.runs(model, Path(name).stem, imgsz or size, device, **given)


def detector_config(detector: "Detector", model: str) -> Config:
    """What a run's config keeps of its detector; `model` is the name or file as the user gave it."""
    from detguard.detectors.base import network_of
    from detguard.detectors.gated import GatedNetwork

    network: Any = network_of(detector)
    experts = len(network.names) if isinstance(network, GatedNetwork) else None
    return {
        "model": model,
        "imgsz": detector.imgsz,
        "end_to_end": detector.end_to_end,
        "top_k": experts and (network.top_k or experts),
        "fusion": experts and network.fusion,
        "iou": detector.iou,
        "sha256": detector.state_hash(),
    }


def load_configured(config: Config, device: str = defaults.DEVICE, *, trust: bool = False) -> "Detector":
    """The detector of a run by its `detector_config`.

    Raises:
        DetguardError: as `load_detector`, or the weights are no longer the same.
    """
    from detguard.detectors.custom import is_custom
    from detguard.detectors.huggingface import check_package, downloaded, is_hub_name

    model, options = config["model"], {name: config[name] for name in ("imgsz", "end_to_end", "top_k", "fusion")}
    own = is_custom(model)  # all else is up to its function
    if not own and is_hub_name(model):
        check_package(model)
        if downloaded(model) is None:  # a run folder from a stranger has nothing fetched
            raise DetguardError(
                f"{model}: the run was made with a detector of Hugging Face's hub that is not here; if you trust it, "
                f"fetch it first: detguard detect --model {model} photo.jpg"
            )
    detector = load_detector(model, device=device, iou=config["iou"], trust=trust, **({} if own else options))
    if detector.state_hash() != config["sha256"]:
        raise DetguardError(f"{model}: no longer the weights that the run used; restore them or start a new run")
    return detector


def check_learner(config: Config, checked: Config) -> None:
    """See that what learns in a run, its `model`, is the detector whose `detector_config` is checked.

    Raises:
        DetguardError: it is another one, that nobody has checked.
    """
    if config["model"] != checked["model"]:
        raise DetguardError(f"`model` {config['model']}: the run's detector is {checked['model']}; start a new run")


@torch.random.fork_rng(devices=[])  # of the caller, whose numbers no first weights are to take
def load_model(name: str | Path = BUNDLED, *, trust: bool = False) -> tuple[nn.Module, int]:
    """The unfused, trainable network of a detector and the frame size it was made for; see `load_detector`."""
    from detguard.detectors.custom import is_custom
    from detguard.detectors.rebuild import read_checkpoint

    if is_custom(name):
        raise DetguardError(f"{name}: is made by your own function; training begins with one of Ultralytics' YOLOs")
    file, family = _find(name)
    if file.stat().st_size > MAX_BYTES:
        raise DetguardError(f"{file}: over {MAX_BYTES >> 30} GiB, too large for weights of a detector")
    if family is not None:
        return family.read(str(name), file, trust=trust)
    return _read_safetensors(file) if file.suffix == ".safetensors" else read_checkpoint(file, trust=trust)


def find_weights(name: str | Path) -> Path:
    """The file of a detector by path, by bundled name, or by an official name, which may be downloaded.

    Raises:
        DetguardError: nothing of that name, here or (when it is official) online.
    """
    return _find(name)[0]


def _find(name: str | Path) -> "tuple[Path, Family | None]":
    """The file of a detector, and the family of which its name is an official one, or that alone reads such files."""
    from detguard.detectors.custom import nearly_custom
    from detguard.detectors.families import FAMILIES

    file = Path(name)
    if is_file(file):
        if file.suffix in (".pt", ".safetensors"):
            return file, None
        owners = {suffix: family for family in FAMILIES for suffix in family.suffixes}
        if file.suffix not in owners:
            raise DetguardError(f"{file}: weights end in .pt, .safetensors or {', '.join(sorted(owners))}")
        return file, owners[file.suffix]
    if is_file(bundled := shipped("weights") / f"{name}.safetensors") and file.name == str(name):
        return bundled, None
    for family in FAMILIES:
        if (found := family.fetch(str(name))) is not None:
            return found, family
    if is_folder(file):
        if made := sorted(file.glob("weights/*.safetensors"), key=lambda one: one.stat().st_mtime):
            raise DetguardError(f"{name}: the folder of a run; its detector is {made[-1]}")
        raise DetguardError(f"{name}: a folder without config.json; expected one as save_pretrained writes it")
    if wanted := nearly_custom(name):
        raise DetguardError(f"{name}: no such file; a function of yours is named {wanted}, from the working folder")
    stems = sorted(p.stem for p in shipped("weights").glob("*.safetensors"))
    if near := get_close_matches(str(name), stems, n=1):
        raise DetguardError(f"{name}: no such detector; did you mean {near[0]}?")
    if file.name == str(name) and (nearest := _nearest(file.name.removesuffix(".pt"))):
        raise DetguardError(f"{name}: no such {'file' if file.suffix else 'detector'}; did you mean {nearest}?")
    if file.suffix in (".pt", ".safetensors", ".onnx"):
        raise DetguardError(f"{name}: no such file; without one there are the bundled {' and '.join(stems) or 'none'}")
    bundled_names = ", ".join(stems) or "none"
    official = ", ".join(family.names[0] for family in FAMILIES if family.names)
    raise DetguardError(
        f"{name}: no such file, bundled detector ({bundled_names}) or official name (such as {official})"
    )


def _nearest(name: str) -> str | None:
    """The official name that is nearly so, the first of several that are as near."""
    from detguard.detectors.families import FAMILIES

    alike = {one: SequenceMatcher(None, name, one).ratio() for family in FAMILIES for one in family.names}
    best = max(alike, key=lambda one: alike[one])
    return best if alike[best] > ALIKE else None


def read_card(name: str | Path) -> JsonObject:
    """What the json beside a detector's .safetensors says; its architecture, classes and imgsz are such.

    Raises:
        DetguardError: no such weights, or no such json.
    """
    file = find_weights(name).with_suffix(".json")
    card = read_json(file)
    try:
        if not isinstance(card, dict) or not {"architecture", "classes", "imgsz"} <= card.keys():
            raise Damaged("one of them is missing")
        if not isinstance(card["architecture"], str) or not isinstance(card["classes"], list):
            raise Damaged("they are no text and list")
        class_names(card["classes"], max(1, len(card["classes"])))
        frame_size(card)
    except Damaged as error:
        raise DetguardError(f"{file}: expected a json with architecture, classes and imgsz ({error})") from error
    return card


def _read_safetensors(file: Path) -> tuple[nn.Module, int]:
    from detguard.detectors.rebuild import fill

    card, described = read_card(file), file.with_suffix(".json")
    gated = card.get("gated")
    try:
        model: nn.Module = build_model(card["architecture"], card["classes"])
        if gated is not None:
            from detguard.detectors.gated import build_gated

            model = build_gated(fused(model), gated, file.stat().st_size)
        # Frozen batch norms, as torchvision trains its detectors with, do not keep what is counted in training alone.
        counts = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
        fill(model, counts | load_file(file), card["architecture"])
    except Damaged as error:
        raise DetguardError(f"{file}: {error}") from error
    except DetguardError as error:
        raise DetguardError(f"{described}: {error}") from error
    except Exception as error:  # whatever safetensors raises of a file that is none
        raise DetguardError(f"{file}: damaged ({first_line(error)})") from error
    return model, frame_size(card)


@torch.random.fork_rng(devices=[])
def build_model(architecture: str, classes: list[str]) -> nn.Module:
    """A network with random weights by the name of one of Ultralytics' own yaml files or of torchvision's builders.

    No other file is read. classes: those of the network's outputs, of torchvision's with "__background__" first.

    Raises:
        DetguardError: neither ships such an architecture.
    """
    from detguard.detectors.families import FAMILIES

    for family in FAMILIES:
        if (model := family.build(architecture, classes)) is not None:
            return model
    known = ", ".join(family.built for family in FAMILIES if family.built)
    raise DetguardError(f"{architecture}: not an architecture that is known: {known}")


def fused(model: nn.Module) -> Any:
    """A copy of a model with its batch norms folded into the convolutions, as detectors run it."""
    network: Any = copy.deepcopy(model).float().eval()
    if hasattr(network.model[-1], "one2one_cv2"):
        network.end2end = False  # as detectors run it: a file that is trusted may say otherwise
    return network.fuse(verbose=False)


def save_gated(network: "GatedNetwork", like: JsonObject, file: Path) -> None:
    """Write a gated ensemble as safetensors and, beside it, the json that `load_detector` needs; no code in either.

    like: architecture, classes and imgsz of the detector that it was made from, and what else the card is to say.
    """
    from detguard.detectors.gated import gated_card

    tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
    # First the json: weights without it could not be loaded by anyone who finds them after a kill.
    write_file(file.with_suffix(".json"), (json.dumps(like | {"gated": gated_card(network)}, indent=2) + "\n").encode())
    write_file(file, save(tensors))
