"""From the options of a run to its objective. A new one is one file and one line here."""

from collections.abc import Callable, Mapping
from typing import Any

from detguard import DetguardError
from detguard.detectors.base import Detector
from detguard.objectives import Degrade, Fabricate, Flood, Mislabel, Outrank, Untargeted, Vanish
from detguard.objectives.base import Goal, Objective, Selection, Wish
from detguard.objectives.mislabel import OTHER, check_classes

# What `detguard attack` offers.
GOALS: dict[str, type[Goal]] = {goal.kind: goal for goal in (Vanish, Mislabel, Untargeted, Fabricate, Flood)}
# And what only makes detections worse, and never succeeds.
KINDS: dict[str, Callable[..., Objective]] = {**GOALS, **{kind.kind: kind for kind in (Degrade, Outrank)}}
ALL, ANY_OTHER, ARROW = "all", "other", "->"


def complete(goal: str | None, target: str | None, to: str | None, selected: bool) -> tuple[str, str]:
    """The goal and the targets of a run, where some of both are left to be understood.

    `to` or an arrow in `target` mean mislabel, otherwise vanish is meant; targets are those of the goal, or `all`
    where objects are `selected`.

    Raises:
        DetguardError: unknown goal.
    """
    if goal is None:
        goal = Mislabel.kind if to is not None or ARROW in (target or "") else Vanish.kind
    if goal not in GOALS:
        raise DetguardError(f"--goal '{goal}': expected one of {', '.join(GOALS)}")
    return goal, (ALL if selected else GOALS[goal].default) if target is None else target


def parse_goal(config: Mapping[str, Any], detector: Detector) -> Goal:
    """What the config of an attack run asks for, on this detector.

    Raises:
        DetguardError: unknown class, or options that do not go together.
    """
    kind = GOALS[config["goal"]]
    options = ("to", "strict", "object", "box", "count")
    for option in (f"--{name}" for name in options if config[name] not in (None, False)):
        if option not in kind.takes:
            takers = [name for name, goal in GOALS.items() if option in goal.takes]
            raise DetguardError(f"{option}: goes with --goal {' or '.join(takers)}, not with {kind.kind}")
    if ARROW in config["target"] and "--to" not in kind.takes:
        raise DetguardError(f"--target '{config['target']}': an arrow goes with --goal mislabel, not with {kind.kind}")
    pairs = _pairs(config["target"], config["to"], detector)
    if not pairs:
        raise DetguardError("--target: name at least one class, as in person,bus, or all")
    to = [other for other in pairs.values() if other is not None]
    if to and len(to) < len(pairs):
        raise DetguardError("--target: with arrows for some classes only, --to says what the others are found as")
    check_classes(list(pairs)[: len(to)], to, detector.class_names)
    box = config["box"]
    if box and not (box[0] < box[2] and box[1] < box[3]):
        raise DetguardError("--box: expected x1,y1,x2,y2 with x1 < x2 and y1 < y2, pixels of the photo")
    common = {
        "only": Selection(tuple(config["object"] or ()), tuple(box) if box else None),
        "keep_others": config["keep_others"],
        "measure": config["loss"],
    }
    common = {name: value for name, value in common.items() if name != "only" or "--object" in kind.takes}
    return kind.parse(Wish(tuple(pairs), tuple(to) or None, config["strict"], config["count"], common))


def _pairs(target: str, to: str | None, detector: Detector) -> dict[int, int | None]:
    """Class index -> that of what it is found as, from "person->car,bus" and what all others become."""

    def becomes(name: str | None) -> int | None:
        if name is None:
            return None
        return OTHER if name.strip().lower() == ANY_OTHER else detector.class_index(name)

    pairs: dict[int, int | None] = {}
    for part in target.split(","):
        name, arrow, other = part.partition(ARROW)
        if not part.strip():
            continue
        every = name.strip().lower() == ALL
        for index in detector.class_names if every else [detector.class_index(name)]:
            pairs[index] = becomes(other if arrow else to)
    return pairs


def wanted(config: Mapping[str, Any]) -> str:
    """What a run wants in words, as "person not found any more", from its config."""
    names = [name.strip().replace(ARROW, f" {Mislabel.wanted} ") for name in config["target"].split(",")]
    words, to = ["objects of all classes" if names == [ALL] else ", ".join(names)], config["to"]
    if config["goal"] != Mislabel.kind:
        words.append(GOALS[config["goal"]].wanted)
    elif to is not None:
        words.append(f"{Mislabel.wanted} {'any other class' if to == ANY_OTHER else to}")
    if count := config["count"] or getattr(GOALS[config["goal"]], "count", None):
        words.append(f"(at least {count})")
    if config["object"]:
        words.append(f"(object {', '.join(map(str, config['object']))})")
    if config["box"]:
        words.append(f"(within {', '.join(f'{v:g}' for v in config['box'])})")
    return " ".join(words) + (", the rest stays" if config["keep_others"] else "")
