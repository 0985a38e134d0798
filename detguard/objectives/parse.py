"""From the options of a run to its objective. A new one is one file and one line here."""

from collections.abc import Callable

from detguard import DetguardError
from detguard.classes import parse_names
from detguard.detectors.base import Detector
from detguard.objectives import Degrade, Fabricate, Flood, Mislabel, Outrank, Untargeted, Vanish
from detguard.objectives.base import ALL, ARROW, OTHER, SEPARATOR, Goal, Objective, Selection
from detguard.schema import Config

# What `detguard attack` offers.
GOALS: dict[str, type[Goal]] = {goal.kind: goal for goal in (Vanish, Mislabel, Untargeted, Fabricate, Flood)}
# And what only makes detections worse, and never succeeds.
KINDS: dict[str, Callable[..., Objective]] = {**GOALS, **{kind.kind: kind for kind in (Degrade, Outrank)}}


def read_goal(words: Config) -> Goal:
    """What the words of the command line, or of a run's config, ask for; None of `goal` and `target` is understood.

    Raises:
        DetguardError: words that do not go together.
    """
    target, to, kind = words["target"], words["to"], words["goal"]
    if kind is None:
        kind = Mislabel.kind if to is not None or ARROW in (target or "") else Vanish.kind
    if kind not in GOALS:
        raise DetguardError(f"`goal` '{kind}': expected one of {', '.join(GOALS)}")
    goal = GOALS[kind]
    options = ("to", "strict", "object", "box", "count")
    given = {name: words[name] for name in options if words[name] is not None and words[name] is not False}
    for name in (name for name in given if name not in goal.takes):
        takers = [other for other, taker in GOALS.items() if name in taker.takes]
        raise DetguardError(f"`{name}`: goes with `goal` {' or '.join(takers)}, not with {kind}")
    only = Selection(tuple(given.pop("object", ())), tuple(given.pop("box")) if "box" in given else None)
    names = None if target is None else parse_names(target)
    if names and ARROW in target:
        if "to" not in goal.takes:
            raise DetguardError(f"`target` '{target}': an arrow goes with `goal` mislabel, not with {kind}")
        parts = [name.partition(ARROW) for name in names]
        if to is not None and all(arrow for _, arrow, _ in parts):
            raise DetguardError(f"`to` {to}: each of `target` {target} has an arrow already; leave one of them out")
        pairs = {one.strip(): other.strip() if arrow else to for one, arrow, other in parts}
        if len(pairs) < len(parts):
            raise DetguardError(f"`target` '{target}': each class once; an object is found as one class alone")
        if None in pairs.values():
            raise DetguardError("`target`: with arrows for some classes only, `to` says what the others are found as")
        names, given["to"] = list(pairs), list(pairs.values())
    return goal(names, only=only, keep_others=words["keep_others"], measure=words["loss"], **given)


def parse_goal(config: Config, detector: Detector) -> Goal:
    """What the config of an attack run asks for, on this detector.

    Raises:
        DetguardError: unknown class, or options that do not go together.
    """
    return read_goal(config).on(detector)


def sought(config: Config) -> str:
    """What a run looks for in clean photos, in words, as "person", from its config."""
    names = [name.partition(ARROW)[0].strip() for name in config["target"].split(SEPARATOR)]
    words = ["object" if names == [ALL] else " or ".join(names)]
    if config["object"]:
        words.append(f"of number {' or '.join(map(str, config['object']))}")
    if config["box"]:
        words.append(f"within {', '.join(f'{v:g}' for v in config['box'])}")
    return " ".join(words)


def wanted(config: Config) -> str:
    """What a run wants in words, as "person not found any more", from its config."""
    names = [name.strip().replace(ARROW, f" {Mislabel.wanted} ") for name in config["target"].split(",")]
    words, to = ["objects of all classes" if names == [ALL] else ", ".join(names)], config["to"]
    if config["goal"] != Mislabel.kind:
        words.append(GOALS[config["goal"]].wanted)
    elif to is not None:
        words.append(f"{Mislabel.wanted} {'any other class' if to == OTHER else to}")
    if count := config["count"] or getattr(GOALS[config["goal"]], "count", None):
        words.append(f"(at least {count})")
    if config["object"]:
        words.append(f"(object {', '.join(map(str, config['object']))})")
    if config["box"]:
        words.append(f"(within {', '.join(f'{v:g}' for v in config['box'])})")
    return " ".join(words) + (", the rest stays" if config["keep_others"] else "")
