"""From "median:3,jpeg:75" to transforms. A new kind is one file and one line here."""

from detguard import DetguardError
from detguard.transforms.base import Transform
from detguard.transforms.blur import Gaussian, Median
from detguard.transforms.jpeg import Jpeg
from detguard.transforms.resize import Resize

KINDS: dict[str, type[Transform]] = {kind.kind: kind for kind in (Median, Gaussian, Jpeg, Resize)}


def parse_transforms(specs: str) -> list[Transform]:
    """Transforms from comma-separated specs; "none" or "" is the empty list.

    Raises:
        DetguardError: unknown kind or bad parameter; names the spec and what was expected.
    """
    if specs.strip() in ("", "none"):
        return []
    transforms = []
    for spec in (part.strip() for part in specs.split(",")):
        kind, _, value = spec.partition(":")
        if kind not in KINDS:
            examples = ", ".join(k.example for k in KINDS.values())
            raise DetguardError(f"transform '{spec}': unknown kind; expected some of {examples}, or none")
        try:
            transforms.append(KINDS[kind].parse(value))
        except ValueError as error:
            raise DetguardError(f"transform '{spec}': {error}, as in {KINDS[kind].example}") from error
    if len({str(t) for t in transforms}) < len(transforms):
        raise DetguardError(f"transforms '{specs}': each only once")
    return transforms
