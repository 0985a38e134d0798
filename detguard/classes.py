"""Names of classes: what one that is not known may mean, and which names of data stand for a detector's."""

import difflib
import json
import re
from collections.abc import Iterable, Mapping

from detguard import DetguardError

# Names by which data sets and detectors call the same; COCO's first.
SYNONYMS = (
    ("person", "pedestrian", "people", "human", "man", "woman", "rider"),
    ("bicycle", "bike", "cycle"),
    ("car", "automobile", "vehicle", "auto"),
    ("motorcycle", "motorbike", "motor"),
    ("airplane", "aeroplane", "plane", "aircraft"),
    ("truck", "lorry"),
    ("boat", "ship", "vessel"),
    ("traffic light", "traffic-light", "trafficlight", "traffic signal"),
    ("cow", "cattle"),
    ("couch", "sofa"),
    ("potted plant", "pottedplant"),
    ("dining table", "diningtable"),
    ("tv", "tvmonitor", "television", "monitor"),
    ("cell phone", "cellphone", "mobile phone", "phone"),
)
# How alike a name must be to be taken for another that was mistyped.
ALIKE = 0.7
# And for a class of data to be taken for one of the detector's: persn and person are, cart and cat, chair and car not.
SLIP = 0.9
# Names that a message lists; the rest is counted.
MOST_NAMED = 10


def meant(name: str, known: Iterable[str], alike: float = ALIKE) -> str | None:
    """The one of the known names that a name that is none of them is a synonym of, or nearly spelt as.

    alike: how nearly, 0..1; hyphens, spaces and a plural do not count.
    """
    by_lower = {one.strip().lower(): one for one in known}
    name = name.strip().lower()
    same = next((group for group in SYNONYMS if name in group), ())
    if found := [one for one in same if one in by_lower]:
        return by_lower[found[0]]
    if found := [one for lower, one in by_lower.items() if _letters(lower) == _letters(name)]:
        return found[0]
    near = difflib.get_close_matches(name, by_lower, n=1, cutoff=alike)
    return by_lower[near[0]] if near else None


def _letters(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).removesuffix("s")


def parse_names(text: str) -> list[str]:
    """From "a, b" to ["a", "b"]."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_map(text: str | None) -> dict[str, str]:
    """From "pedestrian=person,rider=person" to names of the data with the detector's names that they stand for.

    Raises:
        DetguardError: it is no such list.
    """
    pairs = [pair.partition("=") for pair in (text or "").split(",") if pair.strip()]
    made = {name.strip(): to.strip() for name, _, to in pairs}
    if not all(name and to for name, to in made.items()) or len(made) < len(pairs):
        raise DetguardError(f"`class_map` '{text}': expected each name of the data once, as in pedestrian=person")
    return made


def check_map(class_map: Mapping[str, str] | None, known: Iterable[str]) -> dict[str, str]:
    """A map of classes to those that a detector has, given in any letter case, as the detector spells them.

    Raises:
        DetguardError: one is mapped to another class; names the nearest.
    """
    known = list(known)
    spelt = {one.strip().lower(): one for one in known} | {one: one for one in known}
    checked = {}
    for name, to in (class_map or {}).items():
        if (found := spelt.get(to, spelt.get(to.strip().lower()))) is None:
            near = meant(to, known)
            advice = f"; did you mean {name}={near}?" if near else ""
            raise DetguardError(f"`class_map` {name}={to}: the detector has no class '{to}'{advice}")
        checked[name] = found
    return checked


def left_out(boxes: Mapping[str, int], known: Iterable[str]) -> str:
    """The warning about labelled classes that a detector does not have: how many boxes of each, and what to do."""
    known = list(known)
    most = sorted(boxes, key=lambda name: (-boxes[name], name))
    named = [f"{name} ({boxes[name]})" for name in most[:MOST_NAMED]]
    named += [f"{len(most) - MOST_NAMED} more classes"] if len(most) > MOST_NAMED else []
    same = {name: one for name in most if (one := meant(name, known, SLIP))}
    given = json.dumps(same, ensure_ascii=False)
    advice = f"if they are the same, say so: `class_map={given}`" if same else "`class_map` renames them"
    return f"boxes of classes that the detector does not know, left out: {', '.join(named)}; {advice}"
