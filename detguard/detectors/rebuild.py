"""From the records of an Ultralytics checkpoint to the network that they describe, built by us from its checked recipe.

Nothing of the file becomes a part of the network but numbers: the recipe, Ultralytics' `yaml`, is checked to be a list
of known layers with literal arguments; what is built of it is given the file's tensors by name, and compared, module by
module, with what the file says that it holds. The one exception is a file that the user trusts to run any code.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._device import DeviceContext
from ultralytics.nn.modules.block import AAttn, Attention
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.modules.head import Detect, RTDETRDecoder
from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel, parse_model
from ultralytics.utils.torch_utils import initialize_weights

from detguard import DetguardError, first_line
from detguard.detectors.checkpoint import Archive
from detguard.detectors.pickles import Damaged, Record, Stored, Unknown
from detguard.detectors.recipe import (
    BOX_PARTS,
    MAX_NAME,
    RENAMED,
    WITH_MORE,
    check_recipe,
    class_names,
    frame_size,
    short,
)
from detguard.detectors.ultralytics import inputs_of, run_layers
from detguard.files import JsonObject

NETWORKS = {
    "ultralytics.nn.tasks.DetectionModel": DetectionModel,
    "ultralytics.nn.tasks.YOLOv10DetectionModel": DetectionModel,
    "ultralytics.nn.tasks.RTDETRDetectionModel": RTDETRDetectionModel,
    # Of these, the boxes.
    "ultralytics.nn.tasks.SegmentationModel": DetectionModel,
    "ultralytics.nn.tasks.PoseModel": DetectionModel,
}
# Layers that compare all places of a map with each other.
ATTENDING = (nn.MultiheadAttention, Attention, AAttn)
MOST_MODULES, MAX_WINDOW, MAX_GROWTH = 20_000, 64, 8
# Of a tensor that is no parameter and no buffer, as a head's strides.
MOST_VALUES = 64
# A frame to find strides by, and the most numbers that a layer may make of it: many times what real ones do.
SMALL_FRAME, MOST_OUTPUTS = 128, 1 << 22

# What a module keeps that does not decide what it computes, or that detguard sets by itself.
IGNORED = {
    "training", "type", "np", "inplace", "momentum", "p", "legacy", "export", "format", "dynamic", "shape", "max_det",
    "xyxy", "agnostic_nms", "nc", "end2end",
}  # fmt: skip


def read_checkpoint(file: Path, *, trust: bool) -> tuple[nn.Module, int]:
    """The network of a checkpoint, as `rebuild` makes it, or unpickled where its file is trusted to run any code."""
    if trust:
        return _unpickle(file)
    return rebuild(Archive(file))


def _unpickle(file: Path) -> tuple[nn.Module, int]:
    """The network of a checkpoint that is trusted to run whatever code it likes, such as that of its own classes."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=False)
        model: Any = checkpoint.get("ema") or checkpoint.get("model")
        if not isinstance(model, nn.Module) or not hasattr(model, "names"):
            raise Damaged("holds no Ultralytics model")
        named: Any = model  # which it may be by a list
        named.names = class_names(named.names, len(named.names))
        return model.float(), frame_size(getattr(model, "args", None))
    except Exception as error:  # it is the file's own code that runs here
        raise DetguardError(f"{file}: damaged, or not a checkpoint ({first_line(error)})") from error


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
        if record.kind not in NETWORKS:
            raise Unknown(_what_it_is(record.kind))
        state = record.state
        recipe = check_recipe(state.get("yaml"))
        names = class_names(state.get("names"), recipe["nc"])
        size = frame_size(state.get("args"))
        if (whole := _children(record).get("model")) is None:
            raise Damaged("holds no Ultralytics model")
        saved = _without_more(dict(_tree(whole)))
        model = build(NETWORKS[record.kind], recipe, len(saved))
        pairs = list(_pairs(saved, model.model))
        fill(model, {f"model.{path}": archive.tensor(stored) for path, stored in _tensors(saved)}, "its yaml")
        find_strides(model)
        for path, part, module in pairs:
            _compare(path, part, module, archive)
        model.names, model.task = names, "detect"
    except Damaged as error:
        raise archive.refused(error) from error
    return model, size


def _without_more(saved: dict[str, Record]) -> dict[str, Record]:
    """The modules of a file by path without those that find masks or keypoints."""
    heads = [path for path, part in saved.items() if "." not in path and part.kind.rpartition(".")[2] in WITH_MORE]

    def more(path: str) -> bool:
        layer, _, part = path.partition(".")
        return layer in heads and bool(part) and part.partition(".")[0] not in BOX_PARTS

    return {path: part for path, part in saved.items() if not more(path)}


def _what_it_is(kind: str) -> str:
    if kind.startswith("ultralytics.nn.tasks."):
        return f"of the kind {kind.rpartition('.')[2]}; only upright boxes can be attacked"
    return f"made with classes that detguard does not know: {kind}"


class _Shapes(DeviceContext):
    """Where modules are made on a device without giving their parameters first values."""

    def __torch_function__(
        self, function: object, types: object, args: Sequence[object] = (), kwargs: Any = None
    ) -> object:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return super().__torch_function__(function, types, args, kwargs)


@contextmanager
def most_modules(most: int) -> Iterator[None]:
    """Have no more than so many modules be put into others meanwhile.

    Raises:
        Damaged: more were to be.
    """
    left = most

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Damaged("its network is described as a larger one than detectors are")

    counting = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        counting.remove()


def build(family: type[nn.Module], recipe: JsonObject, modules: int) -> Any:
    """The network of a checked recipe, on torch's meta device: without numbers, and whatever its size, without memory.

    modules: how many of them the file has, of which no more than that are built.

    Raises:
        Damaged: no network can be made of it, or one that is far larger than any.
    """
    model: Any = family.__new__(family)
    nn.Module.__init__(model)
    activation = Conv.default_act  # of the process, and not given back where layers do not fit
    # A network keeps fewer modules than it makes on its way, copies among them.
    try:
        with most_modules(4 * modules + 1000), _Shapes("meta"):
            model.model, model.save = parse_model(copy.deepcopy(recipe), ch=3, verbose=False)
            initialize_weights(model)
    except Damaged:
        raise
    except Exception as error:  # whatever layers raise that do not fit each other
        raise Damaged(f"no network can be made of its yaml ({first_line(error)[:MAX_NAME]})") from error
    finally:
        Conv.default_act = activation
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
        around = (*_sides(getattr(module, "padding", 0)), *_sides(getattr(module, "dilation", 1)))
        if max(*_sides(window), *around) > MAX_WINDOW or max(_sides(grown)) > MAX_GROWTH:
            raise Damaged("the yaml of its network describes one with enormous windows")

    def bound(layer: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor) and output.numel() > MOST_OUTPUTS:
            raise Damaged("the yaml of its network describes one with enormous outputs")

    def bound_attention(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        places = x.numel() // (layer.embed_dim if isinstance(layer, nn.MultiheadAttention) else x.shape[1])
        if layer.num_heads * places**2 > MOST_OUTPUTS:
            raise Damaged("the yaml of its network describes one with enormous attention")

    model.eval()
    *layers, head = model.model
    hooks = [module.register_forward_hook(bound) for module in model.modules()]
    attending = (module for module in model.modules() if isinstance(module, ATTENDING))
    hooks += [module.register_forward_pre_hook(bound_attention) for module in attending]
    try:
        with torch.no_grad():
            last, saved = run_layers(layers, torch.zeros(1, 3, SMALL_FRAME, SMALL_FRAME), {}, set(model.save))
            maps = inputs_of(head, last, saved)
            strides = torch.tensor([SMALL_FRAME / one.shape[-2] for one in maps])
    except Damaged:
        raise
    except Exception as error:  # whatever layers raise that do not fit each other
        raise Damaged(f"the layers of its yaml do not fit each other ({first_line(error)[:MAX_NAME]})") from error
    finally:
        for hook in hooks:
            hook.remove()
    model.stride = torch.tensor([32.0]) if isinstance(head, RTDETRDecoder) else strides
    if isinstance(head, Detect):
        head.stride = strides


def _sides(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size,)


def _is_name(name: object) -> bool:
    # A file may have thousands of places for one name, and each of them becomes a path.
    return isinstance(name, str) and len(name) <= MAX_NAME


def _children(record: Record) -> dict[str, Record]:
    modules = record.state.get("_modules")
    if not isinstance(modules, dict):
        raise Damaged("holds a module without parts")
    kept = {name: module for name, module in modules.items() if module is not None}
    for name, module in kept.items():
        if not _is_name(name) or not isinstance(module, Record) or not isinstance(module.state, dict):
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


def _pairs(saved: dict[str, Record], model: nn.Module) -> Iterator[tuple[str, Record, nn.Module]]:
    """Each module of a file beside that of the network at the same place.

    Raises:
        Damaged: one has modules that the other has not.
    """
    built = dict(model.named_modules(remove_duplicate=False))
    if odd := sorted(built.keys() ^ saved.keys(), key=len):
        raise Unknown(f"its network is not the one that its yaml makes here (model.{odd[0][:MAX_NAME]})")
    yield from ((path, saved[path], module) for path, module in built.items())


def _compare(path: str, record: Record, module: nn.Module, archive: Archive) -> None:
    """See that a module of the file computes what that of the network does, its tensors aside."""
    kind = record.kind.rpartition(".")[2]
    kind = "Detect" if kind in WITH_MORE else kind
    if kind != type(module).__name__ and RENAMED.get(kind) != f"nn.{type(module).__name__}":
        raise Unknown(f"its network is not the one that its yaml makes here (model.{path} is a {kind[:MAX_NAME]})")
    for name, value in record.state.items():
        ours = vars(module).get(name, _MISSING)
        if ours is _MISSING or name in IGNORED or short(name).startswith("_"):
            continue
        few = isinstance(value, Stored) and len(value.size) == 1 and value.size[0] <= MOST_VALUES
        theirs = archive.tensor(value).tolist() if few else value
        ours = ours.tolist() if isinstance(ours, Tensor) and not ours.is_meta else ours
        if isinstance(ours, _PLAIN) and _as_list(ours) != _as_list(theirs):
            raise Unknown(f"its network is not the one that its yaml makes here (model.{path}.{short(name)})")


_MISSING = object()
_PLAIN = (bool, int, float, str, list, tuple, type(None))


def _as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _tensors(saved: dict[str, Record]) -> Iterator[tuple[str, Stored]]:
    """The entries of the state dict of modules by path: parameters and the buffers that are kept."""
    for path, part in saved.items():
        for group in ("_parameters", "_buffers"):
            entries, left_out = part.state.get(group), part.state.get("_non_persistent_buffers_set") or ()
            if not isinstance(entries, dict) or not isinstance(left_out, set | frozenset | tuple):
                raise Damaged("holds a module without numbers")
            for name, value in entries.items():
                if not _is_name(name):
                    raise Damaged("holds numbers without a name")
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
