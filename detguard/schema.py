"""What the files of a run hold, by command. A stranger may have written them: they are checked before they are used."""

import re
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from detguard import DetguardError

MOST = 2**63 - 1
# What config.yaml or a part of it says, as CONFIGS has it of the run's command.
Config = dict[str, Any]
# What a value should be. A dict: a mapping of these keys and no others; one that ends in ? may be missing, * is any.
Shape = Union["Kind", "Maybe", "Items", "Either", dict[str, "Shape"]]


@dataclass(frozen=True)
class Kind:
    """Plain values of one kind; what: as an error calls them."""

    what: str
    has: Callable[[Any], bool]


@dataclass(frozen=True)
class Maybe:
    """A shape, or null."""

    shape: Shape


@dataclass(frozen=True)
class Items:
    """A list of `least` to `most` values of one shape."""

    shape: Shape
    least: int = 0
    most: int = MOST


@dataclass(frozen=True)
class Either:
    """One of several shapes; of the first, an error tells what is wrong."""

    shapes: tuple[Shape, ...]


def misfit(value: object, shape: Shape, where: str = "") -> str | None:
    """What is wrong with a value that should be of a shape, and where in it; None: nothing."""
    if isinstance(shape, Maybe):
        return None if value is None else misfit(value, shape.shape, where)
    if isinstance(shape, Either):
        found = [misfit(value, one, where) for one in shape.shapes]
        return None if None in found else found[0]
    if isinstance(shape, Kind):
        return None if shape.has(value) else f"{where}: expected {shape.what}"
    if isinstance(shape, Items):
        if not isinstance(value, list) or not shape.least <= len(value) <= shape.most:
            count = f" of {shape.most}" if shape.most < MOST else " of one or more" if shape.least else ""
            return f"{where}: expected a list{count}"
        each = (misfit(one, shape.shape, f"{where}[{number}]") for number, one in enumerate(value))
        return next(filter(None, each), None)
    if not isinstance(value, dict):
        return f"{where or 'all of it'}: expected names with values"
    inner = f"{where}." if where else ""
    named = {key.removesuffix("?"): of for key, of in shape.items() if key != "*"}
    if missing := [key for key in shape if key != "*" and not key.endswith("?") and key not in value]:
        return f"{inner}{missing[0]}: missing"
    for key, one in value.items():
        if not isinstance(key, str) or (key not in named and "*" not in shape):
            return f"{inner}{key}: not known"
        if wrong := misfit(one, named[key] if key in named else shape["*"], f"{inner}{key}"):
            return wrong
    return None


def check(values: Config, shape: Shape) -> Config:
    """Options as a run can hold them: numbers of NumPy and others are plain ones, paths are text.

    Raises:
        DetguardError: one cannot be held.
    """
    values = _plain(values)
    if wrong := misfit(values, shape):
        raise DetguardError(re.sub(r"^(?:\w+\.)*(\w+)", r"`\1`", wrong))
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def partly(shape: dict[str, Shape]) -> Shape:
    """The shape of some of the values that a mapping may hold."""
    return {f"{name.rstrip('?')}?": of for name, of in shape.items()}


def several(name: str, given: Any, example: object) -> tuple[Any, ...]:
    """The values of an option that is of several; name, example: of it, for errors.

    Raises:
        DetguardError: they are no such, as one alone, or the text that the command line takes.
    """
    if isinstance(given, str | Set) or not isinstance(given, Iterable):
        raise DetguardError(f"`{name}` {given!r}: expected a tuple or list, as {example}")
    return tuple(given)


def whole(least: int = -MOST, most: int = MOST) -> Kind:
    """Whole numbers in a range."""
    span = f"{least} or more" if most == MOST else f"{least} to {most}"
    return Kind(f"a whole number, {span}", lambda x: type(x) is int and least <= x <= most)


def real(least: float = -1e15, most: float = 1e15) -> Kind:
    """Numbers in a range."""
    return Kind(f"a number, {least:g} to {most:g}", lambda x: type(x) in (int, float) and least <= x <= most)


def one_of(*values: str) -> Kind:
    """Texts of a list."""
    return Kind(f"one of {', '.join(values)}", lambda x: isinstance(x, str) and x in values)


text = Kind("text", lambda x: isinstance(x, str))
flag = Kind("true or false", lambda x: isinstance(x, bool))
# A loss that grew beyond all bounds is one, too.
measured = Kind("a number", lambda x: type(x) is float or (type(x) is int and abs(x) <= MOST))
texts = Items(text)
size = whole(1, 10_000)
seed = whole(0, 2**32 - 1)
workers = Maybe(whole(1, 256))
window = whole(8, 10**6)
PLAIN = {str: text, bool: flag, int: whole(), float: real()}


def shape_of(hint: Any) -> Shape:
    """The shape that a type stands for, so that it need not be written twice.

    hint: a TypedDict, a dict by names, a list, a plain type, or one of these or None; Annotated names a shape itself.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return inner[1]
    if origin in (Union, UnionType):
        (one,) = (kind for kind in inner if kind is not NoneType)
        return Maybe(shape_of(one))
    if origin is NotRequired:
        return shape_of(inner[0])
    if origin is list:
        return Items(shape_of(inner[0]))
    if origin is dict:
        names = [f"{name}?" for name in get_args(inner[0])] if get_origin(inner[0]) is Literal else ["*"]
        return dict.fromkeys(names, shape_of(inner[1]))
    if is_typeddict(hint):
        hints = get_type_hints(hint, include_extras=True)
        return {name if name in hint.__required_keys__ else f"{name}?": shape_of(of) for name, of in hints.items()}
    return PLAIN[hint]


DETECTOR: dict[str, Shape] = {
    "model": text,
    "imgsz": size,
    "end_to_end": flag,
    "top_k": Maybe(whole(1)),
    "fusion": Maybe(text),
    "iou": real(0, 1),
    "sha256": text,
}
LEARNED: dict[str, Shape] = {
    "detector": DETECTOR,
    "data": texts,
    "split": text,
    "class_map": {"*": text},
    "target": text,
    "shown?": text,
    "learning": {
        "photos": whole(1),
        "hours": Maybe(real(0.001, 1e6)),
        "rate": real(0, 1),
        "batch": whole(1),
        "conf": real(0.001, 0.999),
        "seed": whole(),
    },
}
COMMON: dict[str, Shape] = {"command": text, "arguments": texts, "versions": {"*": text}}
# config.yaml, by command.
CONFIGS: dict[str, dict[str, Shape]] = {
    "attack": {
        "detector": DETECTOR,
        "also": Items(DETECTOR),
        "samples": flag,
        "goal": text,  # which `read_goal` knows
        "target": text,
        "to": Maybe(text),
        "strict": flag,
        "object": Maybe(Items(whole(1), 1)),
        "box": Maybe(Items(real(), 4, 4)),
        "keep_others": flag,
        "loss": one_of("logit", "confidence"),
        "count": Maybe(whole(1, 300)),
        "transforms": text,
        "attack": {
            "conf": real(0.001, 0.999),
            "norm": text,
            "mask": Maybe(text),
            "smallest": flag,
            "black_box": flag,
            "queries": whole(1),
            "eps": real(0),
            "step": Maybe(real(0.0001, 1e6)),
            "rule": text,
            "steps": whole(1),
            "aggregate": one_of("mean", "weighted", "max"),
            "weights": Maybe(Items(real(0))),
            "schedule": one_of("worst", "group"),
            "gradient": one_of("straight-through", "exact"),
            "momentum": real(0, 1),
            "random_start": flag,
            "margin": real(0, 0.99),
            "seed": whole(),
            "batch": whole(1),
        },
        "photos": texts,
        "left_out?": texts,  # why, of addresses and videos that could not be read, and of photos that the data lost
    },
    "detect": {"detector": DETECTOR, "conf": real(0.001, 0.999), "photos": texts},
    "evaluate": {
        "detectors": Items(DETECTOR, 1),
        "data": {
            "source": text,
            "split": text,
            "images": Maybe(text),
            "classes": Maybe(texts),
            "limit": Maybe(whole(1)),
            "class_map": {"*": text},
        },
        "evaluate": {
            "protocols": texts,
            "severities": Items(whole(1, 5)),
            "eps": Items(whole(1, 255)),
            "steps": whole(1),
            "restarts": whole(1),
            "attacks": texts,
            "queries": whole(1),
            "seed": seed,
            "batch?": whole(1),
            "patch": Maybe(text),
            "patch_target": text,
            "patch_size": real(0.01, 2),
            "universal": Maybe(text),
            "corruptions": texts,
            "corruption_file": Maybe(text),
            "save_images": flag,
        },
    },
    "harden": {
        "model": text,
        "detectors": Items(DETECTOR, 2, 2),
        "harden": {
            "recipe": text,
            "learn": text,
            "pretrain": flag,
            "mode": text,
            "split": text,
            "photos": whole(1),
            "hours": Maybe(real(0.001, 1e6)),
            "crop": Maybe(whole(32, 10_000)),
            "attack": text,
            "eps": real(0, 255),
            "steps": whole(1),
            "mix": real(0, 1),
            "tune_normal": flag,
            "transforms": text,
            "top_k": Maybe(whole(1)),
            "fusion": text,
            "sparse": real(0, 1),
            "batch": whole(2),
            "rate": real(1e-6, 1),
            "seed": seed,
        },
        "corruptions": texts,
        "photos": texts,
        "pretrain": texts,
        "samples": texts,
    },
    "adapt": {
        "model": text,
        "detector": DETECTOR,
        "data": {"new": texts, "replay": texts, "split": text},
        "adapt": {
            "experts": whole(0, 64),
            "expert": one_of("adapter", "head", "whole"),
            "mode": text,
            "init": one_of("best", "fresh"),
            "keep": real(0),
            "photos": whole(1),
            "batch": whole(2),
            "rate": real(1e-6, 1),
            "seed": seed,
            "eps": real(0, 255),
        },
        "why": text,
        "corruptions": texts,
        "replayed": texts,
    },
    "patch": LEARNED | {"picture": {"size": real(0.01, 2), "pixels": whole(8, 4096)}, "print_cm": real(0.1, 1e4)},
    "universal": LEARNED | {"picture": {"eps": whole(1, 127), "pixels": whole(8, 4096)}},
    "monitor": {
        "detector": DETECTOR,
        "stream": {
            "source": text,
            "split": text,
            "images": Maybe(text),
            "class_map": {"*": text},
            "every": whole(1),
            "frames": whole(1, 10_000),
        },
        "monitor": {"detector": text, "window": window},
        "on_drift": one_of("tell", "adapt"),
        "replay": texts,
        "living": {"gather": whole(1, 10**6), "keep": whole(0, 10**6), "adapt": texts},
    },
}
CONFIGS = {command: COMMON | shape for command, shape in CONFIGS.items()}

DETECTION: dict[str, Shape] = {"class": text, "confidence": real(), "box": Items(real(), 4, 4)}
_LEVELS = ("0.05", "0.1", "0.25", "0.5")
JUDGED: dict[str, Shape] = {
    "fooled": flag,
    "confidence": real(),
    "success": dict.fromkeys(_LEVELS, Maybe(flag)),
    "objects_not_kept": dict.fromkeys(_LEVELS, Items(whole(0), 2, 2)),
    "detections": Items(DETECTION | {"wrong": flag}),
}
ATTACKED: dict[str, Shape] = {
    "key": text,
    "photo": text,
    "status": one_of("fooled", "failed"),
    "iterations": whole(0),
    "queries": whole(0),
    "difference": whole(0, 255),
    "used": real(0),
    "eps": real(0),
    "psnr": real(),
    "ssim": real(),
    "objects": Items(DETECTION | {"outcome": one_of("vanished", "relabelled", "kept")}),
    "candidates?": Items(whole(0), 2, 2),
    "clean": Items(DETECTION),
    "members": {"photo": JUDGED, "*": JUDGED},
    "files": {"photo": text, "*": text},
    "draws": {"*": text},
    "also": {"*": {"photo": JUDGED, "*": JUDGED}},
    "seconds": real(0),
}
PASSED_OVER: dict[str, Shape] = {
    "key": text,
    "photo": text,
    "status": one_of("no-target", "error"),
    "detector?": text,
    "error?": text,
    "seconds?": real(0),
}
SHOWN: dict[str, Shape] = {
    "number": whole(1),
    "photo": text,
    "objects": Items(DETECTION),
    "classes?": texts,
    "unknown?": texts,
    "time?": text,
    "AP50?": Maybe(real()),
    "levels?": {"before": real(0, 1), "photos_before": whole(1), "after": real(0, 1), "photos_after": whole(1)},
}
# Of photos whose labels come later, and a record of these again; "hint": since which photo labels are missed;
# "through": up to which photo late labels told of a drop.
SHOWN |= {"id?": text, "labelled?": flag, "hint?": whole(1), "judges?": flag, "through?": whole(1)}
SHOWN |= {"outside?": whole(1), "sha256?": text}
TRAINED: dict[str, Shape] = {"stage": text, "batch": whole(1), "photos_per_second": measured, "*": measured}
# Of photos that were held out, and of having gone back to a batch.
VALIDATED: dict[str, Shape] = {
    "stage": text,
    "batch": whole(0),
    "attacked": measured,
    "clean": measured,
    "AP50 attacked?": real(0, 1),
    "AP50 clean?": real(0, 1),
}
SET_BACK: dict[str, Shape] = {"stage": text, "batch": whole(0), "diverged": whole(1), "setbacks": whole(1)}
LEARNT: dict[str, Shape] = {"stage": text, "batch": whole(1), "photos": whole(1), "loss": measured}
FIGURES: dict[str, Shape] = {"*": {"*": Maybe(real())}}
# A line of the events.jsonl of a monitor whose detector learns.
EVENTS = Either(
    (
        {"event": one_of("gathering"), "number": whole(1), "began": whole(1)},
        {"event": one_of("adapting"), "number": whole(1), "began": whole(1), "folder": text, "model": text},
        {
            "event": one_of("deployed", "kept", "rolled back"),
            "number": whole(0),
            "model": text,
            "why": text,
            "before": FIGURES,
            "after": FIGURES,
        },
    )
)
# A line of results.jsonl, by command.
RECORDS: dict[str, Shape] = {
    "attack": Either((ATTACKED, PASSED_OVER)),
    "detect": {"key": text, "photo": text, "detections": Items(DETECTION)},
    "harden": Either((TRAINED, VALIDATED, SET_BACK)),
    "adapt": Either((TRAINED, SET_BACK)),
    "patch": LEARNT,
    "universal": LEARNT,
    "monitor": Either(
        (
            SHOWN | {"f1": Maybe(real()), "confidence": real(), "entropy": Maybe(measured), "began": Maybe(whole(1))},
            SHOWN | {"error": text},
        )
    ),
}
