"""Detectors of Hugging Face's transformers: DETR and its kin, RT-DETR, D-FINE and YOLOS."""

import importlib.util
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import override

from detguard import DetguardError, first_line, is_out_of_memory
from detguard.detections import MAX_DETECTIONS, Candidates, Detections, scaled
from detguard.detectors.base import Detector, Family, to_photo
from detguard.detectors.pickles import Damaged
from detguard.detectors.rebuild import MOST_MODULES, most_modules
from detguard.detectors.recipe import MAX_NAME, MAX_WIDTH, SIZES, class_names
from detguard.detectors.torchvision import softmax_logits
from detguard.files import JsonObject, is_file, is_folder, read_json
from detguard.photos import Letterbox, Source, as_photo

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.image_utils import SizeDict

# Of transformers, whose configs are data classes from there on.
LEAST = "5.4"
WEIGHTS, CONFIG, PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
WANTED = [WEIGHTS, CONFIG, PREPROCESSOR]
# A name on the hub is told from a path by what it lacks: a suffix of a file, a folder of that name here.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9](?:[\w.-]*\w)?")
FILES = (".pt", ".pth", ".bin", ".safetensors", ".json", ".yaml", ".onnx", ".engine", ".torchscript")
# Outputs that are of no class, as the names of COCO's gaps say it.
NO_CLASS = "N/A"
MOST_QUERIES, MOST_ENTRIES, SMALLEST_PATCH, STRIDE = 2000, 64, 8, 32
# The numbers that a network keeps beside those of its file, anchors above all, at most.
MOST_UNSAVED = 1 << 24
TIMM_BACKBONE = re.compile(r"resnet\d{2,3}d?")


@dataclass(frozen=True)
class Architecture:
    """What transformers calls a network of a `model_type`; softmax: one of its outputs is that there is nothing."""

    network: str
    processor: str
    config: str
    softmax: bool = False
    # Arguments of `post_process_object_detection`, which would keep 100 only.
    most: tuple[str, ...] = ()


def _known(name: str, processor: str = "", most: tuple[str, ...] = (), *, softmax: bool = False) -> Architecture:
    return Architecture(
        f"{name}ForObjectDetection", f"{processor or name}ImageProcessor", f"{name}Config", softmax, most
    )


ARCHITECTURES = {
    "detr": _known("Detr", softmax=True),
    "conditional_detr": _known("ConditionalDetr", most=("top_k",)),
    "deformable_detr": _known("DeformableDetr", most=("top_k",)),
    "rt_detr": _known("RTDetr"),
    "rt_detr_v2": _known("RTDetrV2", "RTDetr"),
    "d_fine": _known("DFine", "RTDetr"),
    "yolos": _known("Yolos", softmax=True),
}
# Those that have a backbone of timm's where their config describes none.
OF_TIMM = ("detr", "conditional_detr", "deformable_detr")
BACKBONES = {
    "resnet": "ResNetConfig", "rt_detr_resnet": "RTDetrResNetConfig", "hgnet_v2": "HGNetV2Config",
    "timm_backbone": "TimmBackboneConfig",
}  # fmt: skip
# Of a config, what no network is built by, and what one is beside the fields of its class.
UNUSED = {
    "architectures", "transformers_version", "dtype", "output_hidden_states", "return_dict", "problem_type", "label2id",
    "id2label", "backbone_config", "is_encoder_decoder", "chunk_size_feed_forward",
}  # fmt: skip
LEGACY = {"use_timm_backbone", "backbone", "out_features", "out_indices"}
RESIZING = {
    "do_resize", "size", "max_size", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
    "do_pad", "pad_size", "pad_and_return_pixel_mask", "resample",
}  # fmt: skip
# Of Pillow: bilinear and bicubic.
FILTERS = (2, 3)


class HuggingFaceDetector(Detector):
    """A frozen detector of transformers with the image processor that it comes with.

    A frame is the photo itself. The processor, which users run, resizes its whole levels and rounds to such; the
    gradient is that of the same processor on floats, which rounds nothing.

    Raises:
        DetguardError: the network has one frame size, and `imgsz` is another.
    """

    # As `post_process_object_detection` and pipelines have it.
    conf = 0.5

    def __init__(self, model: Any, name: str, imgsz: int, device: str = "cpu") -> None:
        self.name = name
        self.kind = ARCHITECTURES[model.config.model_type]
        self.model: Any = model.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        self.processor = model.processor
        classes = [(number, text) for number, text in sorted(model.config.id2label.items()) if text != NO_CLASS]
        self.class_names = dict(enumerate(text for _, text in classes))
        self.outputs = torch.tensor([number for number, _ in classes], device=self.device)
        size = self.processor.size
        self.stretch = bool(size.height)
        if imgsz != frame_size(self.processor):
            fixed = any(getattr(model.config, key, None) for key in ("anchor_image_size", "eval_size"))
            if fixed or self.processor.pad_size:
                raise DetguardError(f"`imgsz` {imgsz}: {name} has frames of {frame_size(self.processor)} px only")
            self.processor.size = _resized(size, imgsz)
        self.imgsz = frame_size(self.processor)
        model.preprocessing = json.dumps({key: str(getattr(self.processor, key, None)) for key in sorted(RESIZING)})

    @override
    def letterbox(self, photo_shape: tuple[int, int]) -> Letterbox:
        height, width = photo_shape
        patch = getattr(self.model.config, "patch_size", 1)
        if not self.stretch and min(photo_shape) * self.imgsz < patch * max(photo_shape):
            raise DetguardError(f"{self.name}: a photo of {width} x {height} px is too narrow for its patches")
        return Letterbox.whole(photo_shape)

    @override
    def candidates(self, frames: Tensor) -> Candidates:
        from torchvision.ops import box_convert

        with self._running():
            found = self.model(**self._inputs(frames))
        logits = softmax_logits(found.logits) if self.kind.softmax else found.logits
        height, width = frames.shape[2:]
        boxes = box_convert(found.pred_boxes, "cxcywh", "xyxy")
        boxes = scaled(boxes, width, height)
        return Candidates(logits[..., self.outputs], boxes, end_to_end=True, multi_label=not self.kind.softmax)

    @contextmanager
    def _running(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever layers raise that do not fit each other, or the size of the frames
            if is_out_of_memory(error):
                raise
            raise DetguardError(
                f"{self.name}: cannot be run on frames of {self.imgsz} px ({first_line(error)[:MAX_NAME]}); its "
                f"{CONFIG} is odd, or try another `imgsz`"
            ) from error

    def _inputs(self, frames: Tensor) -> dict[str, Tensor]:
        """What the processor makes of frames, with a gradient."""
        levels = frames * 255
        # On the CPU, as `predict` has it: elsewhere whole levels are resized as floats, and may differ by one.
        whole = self._processed(levels.detach().round().clamp(0, 255).to(torch.uint8).cpu())
        inputs = {key: value.to(frames.device) for key, value in whole.items()}
        if frames.requires_grad:
            smooth = self._processed(levels)["pixel_values"]
            inputs["pixel_values"] = inputs["pixel_values"] + (smooth - smooth.detach())
        return inputs

    def _processed(self, levels: Tensor) -> dict[str, Tensor]:
        return dict(self.processor(images=list(levels), return_tensors="pt", input_data_format="channels_first"))

    @override
    def predict(self, source: Source, conf: float, iou: float | None = None) -> Detections:
        photo = as_photo(source)
        shape = photo.shape[:2]
        box = self.letterbox(shape)
        # Not in a caller's inference mode: of what is kept from call to call, no gradient could be taken later.
        with torch.inference_mode(False), torch.no_grad(), self._running():
            inputs = self.processor(images=photo, return_tensors="pt", input_data_format="channels_last")
            outputs = self.model(**{key: value.to(self.device) for key, value in inputs.items()})
        most = dict.fromkeys(self.kind.most, min(MAX_DETECTIONS, outputs.logits.shape[1]))
        (found,) = self.processor.post_process_object_detection(outputs, conf, [shape], **most)
        best = found["scores"].argsort(descending=True, stable=True)
        best = best[torch.isin(found["labels"][best], self.outputs)][:MAX_DETECTIONS]
        classes = torch.searchsorted(self.outputs, found["labels"][best])
        detections = Detections(found["boxes"][best].cpu(), found["scores"][best].cpu(), classes.cpu())
        return to_photo(detections, box)


def frame_size(processor: Any) -> int:
    """The longest side, px, to which an image processor enlarges or shrinks a photo."""
    return max(processor.size.height or 0, processor.size.width or 0, processor.size.longest_edge or 0)


def _resized(size: "SizeDict", imgsz: int) -> "SizeDict":
    """A size in the same proportions, its longest side `imgsz`; fixed sides are whole strides."""
    longest = max(value for value in (size.height, size.width, size.longest_edge) if value)

    def scaled(side: int | None, stride: int) -> int | None:
        return side and max(math.ceil(round(side * imgsz / longest, 6) / stride) * stride, stride)

    return type(size)(
        height=scaled(size.height, STRIDE),
        width=scaled(size.width, STRIDE),
        shortest_edge=scaled(size.shortest_edge, 1),
        longest_edge=scaled(size.longest_edge, 1),
    )


class HuggingFace(Family):
    """Object detectors of transformers, by their name on the hub or by a folder as `save_pretrained` writes it."""

    runs = HuggingFaceDetector
    names = ("PekingU/rtdetr_v2_r18vd",)

    @override
    def owns(self, network: nn.Module) -> bool:
        return type(network).__module__.startswith("transformers.")

    @override
    def fetch(self, name: str) -> Path | None:
        folder = Path(name)
        if is_file(folder / CONFIG):
            check_package(name)
        elif is_hub_name(name):
            check_package(name)
            folder = _downloaded(name)
        else:
            return None
        if not is_file(folder / WEIGHTS):
            raise DetguardError(f"{name}: has no {WEIGHTS}; other files of weights could run code and are not read")
        return folder / WEIGHTS

    @override
    def read(self, name: str, file: Path, trust: bool) -> tuple[nn.Module, int]:
        folder = file.parent
        try:
            model = _network(read_json(folder / CONFIG), file)
            model.processor = _processor(model.config.model_type, read_json(folder / PREPROCESSOR))
        except Damaged as error:
            raise DetguardError(f"{name}: {error}") from error
        return model, frame_size(model.processor)


def check_package(name: str) -> None:
    """See that transformers is there, which has `name`.

    Raises:
        DetguardError: it is not.
    """
    from packaging.version import Version

    found = importlib.util.find_spec("transformers") and version("transformers")
    if not found or Version(found) < Version(LEAST):
        raise DetguardError(f"{name}: needs transformers {LEAST} or newer; pip install 'detguard[huggingface]'")


def is_hub_name(name: str) -> bool:
    """Whether a name is that of a detector of the hub, and no file's or folder's."""
    file = Path(name)
    return bool(HUB_NAME.fullmatch(name)) and file.suffix not in FILES and not is_folder(file.parent)


def downloaded(name: str) -> Path | None:
    """The folder of a detector of the hub that is here already; None: it would have to be fetched."""
    from huggingface_hub import snapshot_download

    try:
        with _quiet():
            folder = Path(snapshot_download(name, allow_patterns=WANTED, local_files_only=True))
    except Exception:  # whatever there is instead, it is not here
        return None
    return folder if all(is_file(folder / one) for one in WANTED) else None


def _downloaded(name: str) -> Path:
    """The folder of a detector of the hub; what is here already is not fetched again."""
    from huggingface_hub import snapshot_download

    if (here := downloaded(name)) is not None:
        return here
    try:
        with _quiet():
            return Path(snapshot_download(name, allow_patterns=WANTED))
    except Exception as error:  # whatever the network layers raise, the user's remedy is the same
        reason = first_line(error).rstrip(".")
        raise DetguardError(
            f"{name}: no such file, and cannot be downloaded from Hugging Face's hub ({reason}); go online, or give a "
            f"folder that holds {', '.join(WANTED)}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice of Hugging Face's libraries meanwhile."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    before, bars, hub_bars = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
        if not hub_bars:
            enable_progress_bars()


def _network(described: object, file: Path) -> Any:
    """The network that a config.json describes, with the weights of a file.

    Raises:
        Damaged: it is none of the known architectures, too large, or the weights are of another.
    """
    import transformers

    config = _config(described)
    kind = getattr(transformers, ARCHITECTURES[config.model_type].network)
    try:
        tensors = {key: value.float() if value.is_floating_point() else value for key, value in load_file(file).items()}
        with most_modules(MOST_MODULES), torch.device("meta"):
            empty = kind(config)
        if sum(value.numel() for value in (*empty.parameters(), *empty.buffers())) > MOST_UNSAVED + 2 * sum(
            value.numel() for value in tensors.values()
        ):
            raise Damaged(f"its {CONFIG} describes a larger network than its weights are of")
        with _quiet():
            model, loaded = kind.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
            )
    except Damaged:
        raise
    except (
        Exception
    ) as error:  # whatever layers raise that do not fit each other, or safetensors of a file that is none
        raise Damaged(f"damaged, or no network can be made of its {CONFIG} ({first_line(error)[:MAX_NAME]})") from error
    odd = [*loaded["missing_keys"], *loaded["mismatched_keys"], *loaded["error_msgs"]]
    if odd:
        raise Damaged(f"its weights are not those of its {CONFIG} ({str(sorted(map(str, odd))[0])[:MAX_NAME]})")
    if not all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point()):
        raise Damaged("its weights are not finite numbers")
    # Beside what its layers are, what they read of the config decides what is computed: both are hashed.
    model.recipe = json.dumps(_plain_config(described), sort_keys=True)
    return model


def _config(described: object) -> "PretrainedConfig":
    """The config object of a config.json: only of known classes, only of what builds a network, all within bounds."""
    import transformers

    kept = _plain_config(described)
    backbone = kept.pop("backbone_config", None)
    try:
        if backbone is not None:
            kept["backbone_config"] = getattr(transformers, BACKBONES[backbone.pop("model_type")])(**backbone)
        labels = {int(number): text for number, text in kept.pop("id2label").items()}
        kind = getattr(transformers, ARCHITECTURES[kept.pop("model_type")].config)
        return kind(**kept, id2label=class_names(labels, max(1, len(labels))))
    except Damaged:
        raise
    except Exception as error:  # a config class checks its own values
        raise Damaged(f"its {CONFIG} is odd ({first_line(error)[:MAX_NAME]})") from error


def _plain_config(described: Any) -> JsonObject:
    """The entries of a config.json that build a network."""
    import transformers

    kind = described.get("model_type") if isinstance(described, dict) else None
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise Damaged(f"its {CONFIG} is of no known architecture; known are {', '.join(ARCHITECTURES)}")
    kept = _entries(described, getattr(transformers, ARCHITECTURES[kind].config))
    labels = described.get("id2label")
    if not isinstance(labels, dict) or not all(str(number).isdecimal() for number in labels):
        raise Damaged(f"its {CONFIG} names no classes (id2label)")
    inner = described.get("backbone_config")
    if inner is not None:
        if not isinstance(inner, dict) or inner.get("model_type") not in list(BACKBONES):
            raise Damaged(f"its backbone is of no known kind; known are {', '.join(BACKBONES)}")
        inside = _entries(inner, getattr(transformers, BACKBONES[inner["model_type"]]))
        kept["backbone_config"] = inside | {"model_type": inner["model_type"]}
        _check_timm(inside)
    elif kind not in OF_TIMM or not kept.get("use_timm_backbone", True):
        kept.pop("backbone", None)  # of which transformers would ask the hub
    _check_timm(kept)
    queries = [kept.get(key, 0) for key in ("num_queries", "num_detection_tokens")]
    if not all(isinstance(number, int) and number <= MOST_QUERIES for number in queries):
        raise Damaged(f"its {CONFIG} has over {MOST_QUERIES} queries, or no number of them")
    patch = kept.get("patch_size", SMALLEST_PATCH)
    if not isinstance(patch, int) or patch < SMALLEST_PATCH:
        raise Damaged(f"its {CONFIG} has an odd patch_size; expected {SMALLEST_PATCH} px or more")
    for key in ("anchor_image_size", "eval_size"):
        sides = kept.get(key) or SIZES.start
        if not all(side in SIZES for side in (sides if isinstance(sides, list) else [sides])):
            raise Damaged(f"its {CONFIG} has an odd {key}; expected {SIZES.start} to {SIZES.stop - 1} px")
    return kept | {"model_type": kind, "id2label": labels}


def _check_timm(entries: JsonObject) -> None:
    """See that a backbone of timm's is one of its own ResNets: other names of timm's have it read or fetch files."""
    name = entries.get("backbone")
    if name is not None and not (isinstance(name, str) and TIMM_BACKBONE.fullmatch(name)):
        raise Damaged("its backbone of timm's is of no known kind; known are its ResNets, such as resnet50")
    if name is not None and importlib.util.find_spec("timm") is None:
        raise Damaged("its backbone is timm's; pip install 'detguard[huggingface]'")


def _entries(described: JsonObject, kind: "type[PretrainedConfig]") -> JsonObject:
    """Of a json's entries those that a config class has fields for, all plain and small."""
    names = {field.name for field in fields(kind) if field.name[0] != "_"} - UNUSED | LEGACY
    kept = {name: described[name] for name in sorted(names & described.keys())}
    for name, value in kept.items():
        if not _is_plain(value):
            raise Damaged(f"its {CONFIG} has an odd {name}")
    return {name: value for name, value in kept.items() if value is not None}


def _is_plain(value: object, depth: int = 0) -> bool:
    match value:
        case None | bool():
            return True
        case int():
            return abs(value) <= MAX_WIDTH
        case float():
            return math.isfinite(value)
        case str():
            return len(value) <= MAX_NAME
        case list():
            return depth < 2 and len(value) <= MOST_ENTRIES and all(_is_plain(one, depth + 1) for one in value)
    return False


def _processor(model_type: str, described: object) -> Any:
    """The image processor of a preprocessor_config.json, of the class that is the architecture's.

    Raises:
        Damaged: it does not resize, or in a way that is not known, or to enormous frames.
    """
    import transformers

    given = {key: described[key] for key in RESIZING & described.keys()} if isinstance(described, dict) else {}
    try:
        with _quiet():
            made = getattr(transformers, ARCHITECTURES[model_type].processor)(**given)
        size, padded = made.size, made.pad_size
        sides = [size.height, size.width] if size.height or size.width else [size.shortest_edge, size.longest_edge]
        floats = [*made.image_mean, *made.image_std, made.rescale_factor]
        good = all(isinstance(side, int) and side in SIZES for side in sides) and sides[0] <= max(sides[1:])
        good = good or bool(size.height and all(side in SIZES for side in sides))
        good &= len(floats) == 7 and all(isinstance(one, int | float) and math.isfinite(one) for one in floats)
        good &= min(*made.image_std, made.rescale_factor) > 0 and int(made.resample) in FILTERS
        if padded:
            good &= all(side in SIZES and side >= max(sides) for side in (padded.height, padded.width))
    except Exception as error:  # whatever a processor raises of odd values
        raise Damaged(f"its {PREPROCESSOR} is odd ({first_line(error)[:MAX_NAME]})") from error
    if not good or not made.do_resize:
        raise Damaged(
            f"its {PREPROCESSOR} is odd; expected a size of {SIZES.start} to {SIZES.stop - 1} px, bilinear or bicubic, "
            "and three means and deviations"
        )
    return made
