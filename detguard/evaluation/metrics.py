"""metrics.json of an evaluate run: by model, each protocol's figures and the settings that they were made with."""

import re
import shlex
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict, cast, get_args

from detguard import DetguardError
from detguard.evaluation.bootstrap import RESAMPLES
from detguard.files import FileError, read_json
from detguard.schema import Items, Maybe, Shape, misfit, real, shape_of, whole

# To be raised with every change that readers of the file must know of.
SCHEMA = 2
# AP or recall; None where there is nothing to measure.
Ap = Annotated[float, real(0, 1)] | None
Count = Annotated[int, whole(0)]
Eps = Annotated[int, whole(1, 255)]
Severity = Literal["1", "2", "3", "4", "5"]
# COCO's numbers, in its order.
Stat = Literal["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
STATS: tuple[Stat, ...] = get_args(Stat)
# The files of a run, and what draws.json holds: each model's AP by protocol in each draw of the photos, of which
# `compare` takes differences.
METRICS, DRAWS = "metrics.json", "draws.json"
Draws = dict[str, dict[str, list[float | None]]]


class Figure(TypedDict):
    """AP, AP50, and half of the 95 % interval about AP; None: too few photos to tell."""

    AP: Ap
    AP50: Ap
    AP_error: NotRequired[Annotated[float, real(0)] | None]


class Stats(Figure):
    """COCO's numbers; those by size, and recall, where they were measured."""

    AP75: NotRequired[Ap]
    APs: NotRequired[Ap]
    APm: NotRequired[Ap]
    APl: NotRequired[Ap]
    AR1: NotRequired[Ap]
    AR10: NotRequired[Ap]
    AR100: NotRequired[Ap]
    ARs: NotRequired[Ap]
    ARm: NotRequired[Ap]
    ARl: NotRequired[Ap]


class OfClass(Figure):
    """Figures of one class, and its labelled objects."""

    objects: Count


class Setting(TypedDict):
    """What figures are of. nms: IoU, None of a detector without; nms_inside: of an export that has its NMS inside, the
    confidence down to which it lists what it finds; unknown_classes: name -> boxes left out.
    """

    schema: Annotated[int, whole(1)]
    version: str
    data: str
    photos: Count
    photos_sha256: str
    classes: Count
    unknown_classes: dict[str, int]
    imgsz: Annotated[int, whole(1)]
    end_to_end: bool
    nms: float | None
    nms_inside: NotRequired[float]
    seed: int
    sha256: str
    left_out: Count


class Clean(Stats):
    """Figures on the photos as they are."""

    photos: Count
    classes: Count


class Corruption(Figure):
    """Of one kind: mean over the severities, and each."""

    severities: dict[Severity, Stats]


class Corruptions(Figure):
    """Mean AP over the kinds (mPC) and its share of the clean AP (rPC), as Michaelis et al. (2019) define them."""

    mPC: Ap
    rPC: Annotated[float, real(0)] | None
    kinds: dict[str, Corruption]


class Budget(Figure):
    """The least of all attacks at one budget, the attack `by` which it is, and each attack's own."""

    by: str
    attacks: dict[str, Stats]


class Spent(TypedDict, total=False):
    """Of each attack; `queries` where there is no gradient to step along."""

    steps: Count
    restarts: Count
    queries: Count


class Attack(Figure, Spent):
    """The budget that leads, and all of them by levels of 255."""

    by: str
    eps: Eps
    seed: int
    budgets: dict[str, Budget]


# By functional syntax where a key is no name of Python's.
Source = TypedDict("Source", {"eps": Eps, "from": dict[str, Stats]})


class Transfer(Figure, Spent, Source):
    """The least of the attacks on each other model; sources: the hashes of those models."""

    attacks: list[str]
    sources: dict[str, str]


class BlackBoxStats(Stats):
    """Figures under the Square attack, which uses no gradient."""

    eps: Eps
    queries: Count
    seed: int


class OwnCorruption(Stats):
    """After a pipeline of the user's own."""

    file: str | None
    content: str


Worn = TypedDict(
    "Worn",
    {"class": str, "size": float, "file": str, "content": str, "shown": dict[str, OfClass | None]},
)


class Patch(Worn):
    """AP of the class that wears a patch: clean, and by kind of patch."""


class UniversalStats(TypedDict):
    """One change for all photos, in levels of 255: clean, and by kind of change."""

    eps: Eps
    file: str
    content: str
    shown: dict[str, Stats]


class Check(TypedDict):
    """A sign that an attack is weak: what was measured, the most that is allowed, what more means, what to do then.

    passed: None where clean photos leave too little to judge by.
    """

    passed: bool | None
    value: float
    limit: float
    what: str
    meaning: str
    remedy: str


class Checked(TypedDict):
    """The data and settings that the checks of the attack were made with."""

    photos: Count
    steps: Count
    queries: Count


class Gate(TypedDict):
    """An ensemble's experts, and the mean weight of each by what was shown."""

    experts: list[str]
    shares: dict[str, list[float]]


class ModelMetrics(TypedDict):
    """What was measured of one model; without a key, it was not."""

    setting: Setting
    clean: NotRequired[Clean]
    corruptions: NotRequired[Corruptions]
    attack: NotRequired[Attack]
    transfer: NotRequired[Transfer]
    blackbox: NotRequired[BlackBoxStats]
    corruption_file: NotRequired[OwnCorruption]
    patch: NotRequired[Patch]
    universal: NotRequired[UniversalStats]
    checks: NotRequired[dict[str, Check]]
    checked: NotRequired[Checked]
    gate: NotRequired[Gate]


Metrics = dict[str, ModelMetrics]


def read_metrics(file: Path) -> Metrics:
    """What a metrics.json says, by model.

    Raises:
        DetguardError: it cannot be read, is of a later detguard, or is none.
    """
    metrics = cast(Metrics, _read(file, shape_of(Metrics)))
    if wrong := next(filter(None, map(_disagreement, metrics.values())), None):
        raise DetguardError(f"{file}: not one that this detguard writes ({wrong}); {_anew(file)}")
    return metrics


def read_draws(file: Path) -> Draws:
    """What a draws.json says.

    Raises:
        DetguardError: it cannot be read, or is none.
    """
    return cast(Draws, _read(file, {"*": {"*": Items(Maybe(real()), RESAMPLES, RESAMPLES)}}))


def _read(file: Path, shape: Shape) -> object:
    try:
        found = read_json(file)
    except FileError as error:
        raise DetguardError(f"{error}; {_anew(file)}") from error
    if late := [schema for schema in _schemas(found) if schema > SCHEMA]:
        raise DetguardError(f"{file}: written by a later detguard (schema {late[0]}, here {SCHEMA}); update this one")
    if wrong := misfit(found, shape):
        raise DetguardError(f"{file}: not one that this detguard writes ({wrong}); {_anew(file)}")
    return found


def _anew(file: Path) -> str:
    return f"finish the run, or write it anew, with: detguard evaluate --resume {shlex.quote(str(file.parent))}"


def _schemas(found: object) -> list[int]:
    """Those that are named, of what may be anything."""
    settings = [m.get("setting") for m in found.values() if isinstance(m, dict)] if isinstance(found, dict) else []
    named = [setting.get("schema") for setting in settings if isinstance(setting, dict)]
    return [schema for schema in named if type(schema) is int]


def _disagreement(found: ModelMetrics) -> str | None:
    """What does not fit together in what has the right shape."""
    if "corruptions" in found:
        severities = [kind["severities"].keys() for kind in found["corruptions"]["kinds"].values()]
        if not severities or not severities[0] or any(one != severities[0] for one in severities):
            return "corruptions.kinds: expected one or more, of the same severities"
    if "attack" in found:
        attack, budgets = found["attack"], found["attack"]["budgets"]
        if str(attack["eps"]) not in budgets or not all(re.fullmatch(r"[1-9][0-9]{0,2}", eps) for eps in budgets):
            return "attack.budgets: expected some of 1 to 255, `eps` among them"
        first, *others = (budget["attacks"].keys() for budget in budgets.values())
        named = {one["by"] for one in (attack, *budgets.values())}
        if any(one != first for one in others) or named - first:
            return "attack.budgets: expected the same attacks of each, `by` among them"
    if "patch" in found and "patch" not in found["patch"]["shown"]:
        return "patch.shown.patch: missing"
    if "universal" in found and "universal" not in found["universal"]["shown"]:
        return "universal.shown.universal: missing"
    return None
