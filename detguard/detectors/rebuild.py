"""From the records of an Ultralytics checkpoint to the network that they describe, built by us from its checked recipe.

Nothing of the file becomes a part of the network but numbers: the recipe, Ultralytics' `yaml`, is checked to be a list
of known layers with literal arguments; what is built of it is given the file's tensors by name, and compared, module by
module, with what the file says that it holds.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._device import DeviceContext
from ultralytics.nn.modules.head import Detect, RTDETRDecoder
from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel, parse_model
from ultralytics.utils.torch_utils import initialize_weights

from detguard.detectors.checkpoint import MOST_CLASSES, SIZES, Archive, Damaged, Record, Stored, Unknown
from detguard.detectors.ultralytics import inputs_of, run_layers

FAMILIES = {
    "ultralytics.nn.tasks.DetectionModel": DetectionModel,
    "ultralytics.nn.tasks.YOLOv10DetectionModel": DetectionModel,
    "ultralytics.nn.tasks.RTDETRDetectionModel": RTDETRDetectionModel,
}
HEADS = ("Detect", "v10Detect", "RTDETRDecoder")
LAYERS = (
    "AConv", "ADown", "AIFI", "A2C2f", "Bottleneck", "BottleneckCSP", "C1", "C2", "C2PSA", "C2f", "C2fCIB", "C2fPSA",
    "C3", "C3Ghost", "C3TR", "C3k2", "C3x", "CBFuse", "CBLinear", "Concat", "Conv", "ConvTranspose", "DWConv",
    "DWConvTranspose2d", "ELAN1", "Focus", "GhostBottleneck", "GhostConv", "HGBlock", "HGStem", "PSA", "RepC3",
    "RepNCSPELAN4", "ResNetLayer", "SCDown", "SPP", "SPPELAN", "SPPF", "nn.BatchNorm2d", "nn.ConvTranspose2d",
    "nn.Identity", "nn.MaxPool2d", "nn.Upsample", "nn.ZeroPad2d",
)  # fmt: skip
RENAMED = {"Silence": "nn.Identity"}
ACTIVATION = re.compile(
    r"(torch\.)?nn\.(CELU|ELU|GELU|Hardswish|Identity|LeakyReLU|Mish|PReLU|ReLU|ReLU6|SELU|SiLU|Softplus)"
    r"\((inplace=True|0?\.\d{1,4})?\)"
)
TEXTS = {"nc": "nc", "nearest": "nearest", "bilinear": "bilinear", "None": None, "True": True, "False": False}
MOST_LAYERS, MOST_MODULES, MOST_REPEATS = 500, 20_000, 100
MAX_WIDTH, MAX_WINDOW, MAX_GROWTH, MAX_NAME = 1 << 14, 64, 8, 200
# A frame to find strides by, and the most numbers that a layer may make of it: many times what real ones do.
SMALL_FRAME, MOST_OUTPUTS = 128, 1 << 22

# What a module keeps that does not decide what it computes, or that detguard sets by itself.
IGNORED = {
    "training", "type", "np", "inplace", "momentum", "p", "legacy", "export", "format", "dynamic", "shape", "max_det",
    "xyxy", "agnostic_nms", "nc", "end2end",
}  # fmt: skip


def rebuild(archive: Archive) -> tuple[nn.Module, int]:
    """The unfused network of a checkpoint, float32, and the frame size that it was made for.

    Raises:
        CheckpointError: it is none of Ultralytics' detection models, or not what its recipe describes, or damaged.
    """
    root = archive.root
    record = (root.get("ema") or root.get("model")) if isinstance(root, dict) else root
    try:
        if not isinstance(record, Record) or not isinstance(record.state, dict):
            raise Damaged("holds no Ultralytics model")
        if record.kind not in FAMILIES:
            raise Unknown(_what_it_is(record.kind))
        state = record.state
        recipe = check_recipe(state.get("yaml"))
        names = class_names(state.get("names"), recipe["nc"])
        size = frame_size(state.get("args"))
        saved = _child(record, "model")
        model = build(FAMILIES[record.kind], recipe, sum(1 for _ in _tree(saved)))
        pairs = list(_pairs(saved, model.model))
        fill(model, {f"model.{path}": archive.tensor(stored) for path, stored in _tensors(saved)}, "its yaml")
        find_strides(model)
        for path, part, module in pairs:
            _compare(path, part, module, archive)
        model.names, model.task = names, "detect"
    except Damaged as error:
        raise archive.refused(error) from error
    return model, size


def _what_it_is(kind: str) -> str:
    if kind.startswith("ultralytics.nn.tasks."):
        return f"a {kind.rpartition('.')[2]}; only box detection can be attacked"
    return f"made with classes that detguard does not know: {kind}"


def check_recipe(recipe: Any) -> dict[str, Any]:
    """The entries of Ultralytics' model yaml that build a network, known to be plain, small and of known layers.

    Raises:
        Damaged, Unknown: it has others.
    """
    if not isinstance(recipe, dict):
        raise Damaged("has no yaml of its network")
    parts = {name: recipe.get(name) for name in ("backbone", "head")}
    if not all(isinstance(part, list) and 0 < len(part) <= MOST_LAYERS for part in parts.values()):
        raise Damaged("the yaml of its network lists no layers")
    checked: dict[str, Any] = {name: [_check_layer(one) for one in part or ()] for name, part in parts.items()}
    checked["nc"] = _number(recipe, "nc", 80, 1, MOST_CLASSES, int)
    checked["reg_max"] = _number(recipe, "reg_max", 16, 1, 64, int)
    for name in ("depth_multiple", "width_multiple"):
        checked[name] = _number(recipe, name, 1.0, 0.01, 10)
    _number(recipe, "channels", 3, 3, 3, int)
    checked["end2end"] = bool(recipe.get("end2end"))
    checked["yaml_file"] = Path(recipe["yaml_file"]).name if isinstance(recipe.get("yaml_file"), str) else ""
    if scales := recipe.get("scales"):
        scale = recipe.get("scale") or next(iter(scales))
        row = scales.get(scale) if isinstance(scales, dict) else None
        if not isinstance(scale, str) or not isinstance(row, list | tuple) or len(row) != 3:
            raise Damaged("the yaml of its network has no such scale")
        limits = zip(("depth", "width", "channels"), row, (0.01, 0.01, 1), (10, 10, MAX_WIDTH), strict=True)
        checked |= {"scale": scale, "scales": {scale: [_number({n: v}, n, 1, lo, hi) for n, v, lo, hi in limits]}}
    if activation := recipe.get("activation"):
        if not isinstance(activation, str) or not ACTIVATION.fullmatch(activation.strip()):
            raise Unknown(f"made with an activation that detguard does not know: {str(activation)[:MAX_NAME]}")
        checked["activation"] = activation.strip()
    if checked["head"][-1][2] not in HEADS:
        raise Unknown(f"made with a {checked['head'][-1][2]} head; only box detection can be attacked")
    return checked


def _number(
    entries: dict[str, Any], name: str, default: float, low: float, high: float, kind: Any = (int, float)
) -> Any:
    value = entries.get(name, default)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        raise Damaged(f"the yaml of its network has an odd {name}")
    return value


def _check_layer(layer: Any) -> list[Any]:
    match layer:
        case [source, int(repeats), str(name), list() | tuple() as args] if not isinstance(repeats, bool):
            name = RENAMED.get(name, name)
            if name not in (*LAYERS, *HEADS):
                raise Unknown(f"made with classes that detguard does not know: {name[:MAX_NAME]}")
            sources = source if isinstance(source, list | tuple) else [source]
            numbers = all(isinstance(n, int) and abs(n) < MOST_LAYERS for n in sources)
            if numbers and len(sources) <= 64 and 1 <= repeats <= MOST_REPEATS and len(args) <= 16:
                given = list(sources) if isinstance(source, list | tuple) else source
                return [given, repeats, name, [_literal(arg) for arg in args]]
    raise Damaged("the yaml of its network has an odd layer")


def _literal(value: Any, depth: int = 0) -> Any:
    match value:
        case None | bool():
            return value
        case int() | float() if abs(value) <= MAX_WIDTH:  # not so of NaN
            return value
        case str() if value in TEXTS:
            return TEXTS[value]
        case list() | tuple() if depth < 2 and len(value) <= 16:
            return [_literal(one, depth + 1) for one in value]
    raise Damaged("the yaml of its network has an odd argument of a layer")


def class_names(names: Any, count: int) -> dict[int, str]:
    """Class number -> name of each of `count` classes, from a dict or list.

    Raises:
        Damaged: they are not so many names.
    """
    entries = dict(enumerate(names)) if isinstance(names, list | tuple) else names
    if not isinstance(entries, dict) or set(entries) != set(range(count)):
        raise Damaged(f"has no names for its {count} classes")
    if not all(isinstance(name, str) and len(name) <= MAX_NAME for name in entries.values()):
        raise Damaged("has class names that are no text")
    return {number: entries[number] for number in range(count)}


def frame_size(args: Any) -> int:
    """The longest side of a frame, px, from the arguments that a network was trained with; 640 without.

    Raises:
        Damaged: it is not a size that a frame can have.
    """
    given = args.state if isinstance(args, Record) else args
    size = given.get("imgsz", 640) if isinstance(given, dict) else 640
    sides: list[Any] = list(size) if isinstance(size, list | tuple) and size else [size]
    if not all(isinstance(side, int) and side in SIZES for side in sides):
        raise Damaged(f"has an odd frame size; expected {SIZES.start} to {SIZES.stop - 1} px")
    return int(max(sides))


class _Shapes(DeviceContext):
    """Where modules are made on a device without giving their parameters first values."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return super().__torch_function__(function, types, args, kwargs)


def build(family: type[nn.Module], recipe: dict[str, Any], modules: int) -> Any:
    """The network of a checked recipe, on torch's meta device: without numbers, and whatever its size, without memory.

    modules: how many of them the file has, of which no more than that are built.

    Raises:
        Damaged: no network can be made of it, or one that is far larger than any.
    """
    model: Any = family.__new__(family)
    nn.Module.__init__(model)
    # A network keeps fewer modules than it makes on its way, copies among them.
    left = 4 * modules + 1000

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Damaged("the yaml of its network describes a larger one")

    counting = register_module_module_registration_hook(count)
    try:
        with _Shapes("meta"):
            model.model, model.save = parse_model({**recipe, "backbone": [*recipe["backbone"]]}, ch=3, verbose=False)
            initialize_weights(model)
    except Damaged:
        raise
    except Exception as error:  # whatever layers raise that do not fit each other
        raise Damaged(f"no network can be made of its yaml ({_line(error)})") from error
    finally:
        counting.remove()
    model.yaml, model.inplace = recipe | {"channels": 3}, True
    return model


def find_strides(model: Any) -> None:
    """Run a small frame through all layers but the head, to find its strides and that no layer makes too much of it.

    Raises:
        Damaged: layers do not fit each other, or one is enormous.
    """
    for module in model.modules():
        window = getattr(module, "kernel_size", 1) if isinstance(module, nn.MaxPool2d) else 1
        grown = getattr(module, "scale_factor", None) or 1 if isinstance(module, nn.Upsample) else 1
        grown = module.stride if isinstance(module, nn.ConvTranspose2d) else grown
        if max(_sides(window)) > MAX_WINDOW or max(_sides(grown)) > MAX_GROWTH:
            raise Damaged("the yaml of its network describes one with enormous windows")

    def bound(layer: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.numel() > MOST_OUTPUTS:
            raise Damaged("the yaml of its network describes one with enormous outputs")

    model.eval()
    *layers, head = model.model
    hooks = [module.register_forward_hook(bound) for module in model.modules()]
    try:
        with torch.no_grad():
            last, saved = run_layers(layers, torch.zeros(1, 3, SMALL_FRAME, SMALL_FRAME), {}, set(model.save))
            maps = inputs_of(head, last, saved)
            strides = torch.tensor([SMALL_FRAME / one.shape[-2] for one in maps])
    except Damaged:
        raise
    except Exception as error:  # whatever layers raise that do not fit each other
        raise Damaged(f"the layers of its yaml do not fit each other ({_line(error)})") from error
    finally:
        for hook in hooks:
            hook.remove()
    model.stride = torch.tensor([32.0]) if isinstance(head, RTDETRDecoder) else strides
    if isinstance(head, Detect):
        head.stride = strides


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:MAX_NAME]


def _sides(size: Any) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size,)


def _child(record: Record, name: str) -> Record:
    modules = record.state.get("_modules") if isinstance(record.state, dict) else None
    child = modules.get(name) if isinstance(modules, dict) else None
    if not isinstance(child, Record) or not isinstance(child.state, dict):
        raise Damaged("holds no Ultralytics model")
    return child


def _children(record: Record) -> dict[str, Record]:
    modules = record.state.get("_modules")
    if not isinstance(modules, dict):
        raise Damaged("holds a module without parts")
    kept = {name: module for name, module in modules.items() if module is not None}
    for name, module in kept.items():
        if not isinstance(name, str) or not isinstance(module, Record) or not isinstance(module.state, dict):
            raise Damaged("holds a module that is none")
    return kept


def _tree(record: Record) -> Iterator[tuple[str, Record]]:
    """Path and record of a module and all in it, of which there are so many as networks have."""
    waiting, count = [("", record)], 0
    while waiting:
        path, part = waiting.pop()
        count += 1
        if count > MOST_MODULES:
            raise Damaged("holds more modules than a detector needs")
        yield path, part
        waiting += [(f"{path}.{name}".lstrip("."), child) for name, child in _children(part).items()]


def _pairs(record: Record, model: nn.Module) -> Iterator[tuple[str, Record, nn.Module]]:
    """Each module of a file beside that of the network at the same place.

    Raises:
        Damaged: one has modules that the other has not.
    """
    built = dict(model.named_modules(remove_duplicate=False))
    saved = dict(_tree(record))
    if odd := sorted(built.keys() ^ saved.keys(), key=len):
        raise Unknown(f"its network is not the one that its yaml makes here (model.{odd[0][:MAX_NAME]})")
    yield from ((path, saved[path], module) for path, module in built.items())


def _compare(path: str, record: Record, module: nn.Module, archive: Archive) -> None:
    """See that a module of the file computes what that of the network does, its tensors aside."""
    kind = record.kind.rpartition(".")[2]
    if kind != type(module).__name__ and RENAMED.get(kind) != f"nn.{type(module).__name__}":
        raise Unknown(f"its network is not the one that its yaml makes here (model.{path} is a {kind[:MAX_NAME]})")
    for name, value in record.state.items():
        ours = vars(module).get(name, _MISSING)
        if ours is _MISSING or name in IGNORED or str(name).startswith("_"):
            continue
        theirs = archive.tensor(value).tolist() if isinstance(value, Stored) and len(value.size) == 1 else value
        ours = ours.tolist() if isinstance(ours, Tensor) and not ours.is_meta else ours
        if isinstance(ours, _PLAIN) and _as_list(ours) != _as_list(theirs):
            raise Unknown(f"its network is not the one that its yaml makes here (model.{path}.{str(name)[:MAX_NAME]})")


_MISSING = object()
_PLAIN = (bool, int, float, str, list, tuple, type(None))


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tensors(record: Record) -> Iterator[tuple[str, Stored]]:
    """The entries of a module's state dict: parameters and the buffers that are kept."""
    for path, part in _tree(record):
        for group in ("_parameters", "_buffers"):
            entries, left_out = part.state.get(group), part.state.get("_non_persistent_buffers_set") or ()
            if not isinstance(entries, dict) or not isinstance(left_out, set | frozenset | tuple):
                raise Damaged("holds a module without numbers")
            for name, value in entries.items():
                if isinstance(value, Stored) and name not in left_out:
                    yield f"{path}.{name}".lstrip("."), value


def fill(model: nn.Module, tensors: dict[str, Tensor], architecture: str) -> None:
    """Give a network, of an `architecture` by name, its numbers by theirs, as float32; each is checked to be one.

    Raises:
        Damaged: some are missing or of another shape, or not finite numbers.
    """
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in expected or name not in tensors or tensors[name].shape != expected[name].shape:
            raise Damaged(f"damaged, or not the weights of {architecture} ({name[:MAX_NAME]} is not the same in both)")
        if tensors[name].is_floating_point() != expected[name].is_floating_point():
            raise Damaged(f"its weights are of another type ({name})")
    as_ours = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    if not torch.stack([value.sum() for value in as_ours.values() if value.is_floating_point()]).isfinite().all():
        raise Damaged("its weights are not finite numbers")
    model.load_state_dict(as_ours, strict=True, assign=True)
