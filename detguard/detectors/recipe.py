"""What checkpoints and cards say of a network, checked to be plain, small and of known kinds before it is built."""

import re
from pathlib import Path
from typing import Any

from detguard.detectors.pickles import Damaged, Record, Unknown
from detguard.files import JsonObject

HEADS = ("Detect", "v10Detect", "RTDETRDecoder")
# Heads that find boxes as `Detect` does, and say more of each by parts of their own, which change none of them.
WITH_MORE = ("Segment", "Segment26", "Pose", "Pose26")
# The parts of a `Detect`.
BOX_PARTS = ("cv2", "cv3", "dfl", "one2one_cv2", "one2one_cv3")
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
MOST_LAYERS, MOST_REPEATS, MAX_WIDTH, MAX_NAME = 500, 100, 1 << 14, 200
# Classes that a detector may know, and sides of a frame, px.
MOST_CLASSES = 10_000
SIZES = range(32, 4097)


def check_recipe(recipe: object) -> JsonObject:
    """The entries of Ultralytics' model yaml that build a network, known to be plain, small and of known layers.

    Raises:
        Damaged, Unknown: it has others.
    """
    if not isinstance(recipe, dict):
        raise Damaged("has no yaml of its network")
    recipe = boxes_alone(recipe)
    parts = {name: recipe.get(name) for name in ("backbone", "head")}
    if not all(isinstance(part, list) and 0 < len(part) <= MOST_LAYERS for part in parts.values()):
        raise Damaged("the yaml of its network lists no layers")
    checked: JsonObject = {name: [_check_layer(one) for one in part or ()] for name, part in parts.items()}
    checked["nc"] = _number(recipe, "nc", 80, 1, MOST_CLASSES, int)
    checked["reg_max"] = _number(recipe, "reg_max", 16, 1, 64, int)
    for name in ("depth_multiple", "width_multiple"):
        checked[name] = _number(recipe, name, 1.0, 0.01, 10)
    _number(recipe, "channels", 3, 3, 3, int)
    checked["end2end"] = bool(recipe.get("end2end"))
    checked["yaml_file"] = Path(recipe["yaml_file"]).name if isinstance(recipe.get("yaml_file"), str) else ""
    if scales := recipe.get("scales"):
        scale = (recipe.get("scale") or next(iter(scales))) if isinstance(scales, dict) else None
        row = scales[scale] if isinstance(scale, str) and scale in scales else None
        if not isinstance(row, list | tuple) or len(row) != 3:
            raise Damaged("the yaml of its network has no such scale")
        limits = zip(("depth", "width", "channels"), row, (0.01, 0.01, 1), (10, 10, MAX_WIDTH), strict=True)
        checked |= {"scale": scale, "scales": {scale: [_number({n: v}, n, 1, lo, hi) for n, v, lo, hi in limits]}}
    if activation := recipe.get("activation"):
        if not isinstance(activation, str) or not ACTIVATION.fullmatch(activation.strip()):
            raise Unknown(f"made with an activation that detguard does not know: {short(activation)}")
        checked["activation"] = activation.strip()
    if checked["head"][-1][2] not in HEADS:
        raise Unknown(f"made with a {checked['head'][-1][2]} head; only upright boxes can be attacked")
    return checked


def short(value: object) -> str:
    """The start of a text; of what is none its type, for a list that holds others twice each has no end."""
    return value[:MAX_NAME] if isinstance(value, str) else type(value).__name__


def boxes_alone(recipe: JsonObject) -> JsonObject:
    """A model yaml with a head that finds boxes only, where its own finds masks or keypoints of them, too."""
    match recipe.get("head"):
        case [*others, [source, repeats, str(name), [count, *_]]] if name in WITH_MORE:
            named = str(recipe.get("yaml_file") or "")
            for more in ("-seg", "-pose"):
                named = named.replace(more, "")
            return recipe | {"head": [*others, [source, repeats, "Detect", [count]]], "yaml_file": named}
    return recipe


def _number(entries: JsonObject, name: str, default: float, low: float, high: float, kind: Any = (int, float)) -> float:
    value = entries.get(name, default)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        raise Damaged(f"the yaml of its network has an odd {name}")
    return value


def _check_layer(layer: object) -> list[object]:
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


def _literal(value: object, depth: int = 0) -> object:
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


def class_names(names: object, count: int) -> dict[int, str]:
    """Class number -> name of each of `count` classes, from a dict or list.

    Raises:
        Damaged: they are not so many names.
    """
    entries = dict(enumerate(names)) if isinstance(names, list | tuple) else names
    if not isinstance(entries, dict) or set(entries) != set(range(count)):
        raise Damaged(f"has no names for its {count} classes")
    if not all(isinstance(name, str) and len(name) <= MAX_NAME and _unicode(name) for name in entries.values()):
        raise Damaged("has class names that are no text")
    return {number: entries[number] for number in range(count)}


def _unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # halves of surrogate pairs
        return False
    return True


def frame_size(args: object) -> int:
    """The longest side of a frame, px, from the arguments that a network was trained with; 640 without.

    args: their names and values, an object of them or the record of one; or whatever a file has in their place.

    Raises:
        Damaged: it is not a size that a frame can have.
    """
    given = args.state if isinstance(args, Record) else args
    given = given if isinstance(given, dict) else getattr(given, "__dict__", None)
    size = given.get("imgsz", 640) if isinstance(given, dict) else 640
    sides: list[Any] = list(size) if isinstance(size, list | tuple) and size else [size]
    if not all(isinstance(side, int) and side in SIZES for side in sides):
        raise Damaged(f"has an odd frame size; expected {SIZES.start} to {SIZES.stop - 1} px")
    return int(max(sides))
