"""From "median:3,jpeg:75" to transforms. A new kind is one file and one line here."""

from collections.abc import Sequence

from detguard import DetguardError
from detguard.transforms.base import Drawn, Transform
from detguard.transforms.blur import Defocus, Gaussian, Median, Motion
from detguard.transforms.codecs import H264, Webp
from detguard.transforms.colour import Brightness, Contrast, Gamma, Hue, Invert, Posterize
from detguard.transforms.geometry import Crop, Flip, Perspective, Rotate, Stretch
from detguard.transforms.jpeg import Jpeg
from detguard.transforms.random import Albumentation, Corruption, Noise
from detguard.transforms.resize import Resize

KINDS: dict[str, type[Transform]] = {
    kind.kind: kind
    for kind in (
        Median, Gaussian, Motion, Defocus, Jpeg, Webp, H264, Resize,
        Rotate, Crop, Flip, Stretch, Perspective,
        Brightness, Contrast, Gamma, Hue, Invert, Posterize,
        Noise, Corruption, Albumentation,
    )
}  # fmt: skip
# What photos go through on their way to a detector: a site's moderation, the camera of a car, a printed sheet.
PRESETS = {
    "network": "median:3,jpeg:75,resize:0.5",
    "driving": "brightness:-0.3..0.3,motion:5,corrupt:fog-1,rotate:-3..3",
    "print": "rotate:-10..10,stretch:0.9..1.1,brightness:-0.2..0.2,noise:4,defocus:3",
}


def written(transforms: Sequence[Transform]) -> str:
    """Transforms as the specs that `parse_transforms` reads.

    Raises:
        DetguardError: the class of one is not in `KINDS`, by which a run's transforms are read again.
    """
    for one in transforms:
        made = type(one.low if isinstance(one, Drawn) else one)
        if isinstance(one, Transform) and KINDS.get(made.kind) is not made:
            raise DetguardError(
                f"transform '{one}': its class is not in KINDS; put it there before: "
                f"detguard.transforms.parse.KINDS['{made.kind}'] = {made.__name__}"
            )
    return ",".join(map(str, transforms)) or "none"


def parse_transforms(specs: str) -> list[Transform]:
    """Transforms from comma-separated specs; "none" or "" is the empty list, `kind:A..B` one drawn anew each time.

    A name of `PRESETS` stands for its specs.

    Raises:
        DetguardError: unknown kind or bad parameter, or "none" among others; names the spec and what was expected.
    """
    if specs.strip() in ("", "none"):
        return []
    transforms = []
    if "none" in map(str.strip, specs.split(",")):
        raise DetguardError(f"transforms '{specs}': none goes alone; leave it out")
    named = ",".join(PRESETS.get(part.strip(), part) for part in specs.split(","))
    for spec in (part.strip() for part in named.split(",")):
        kind, _, value = spec.partition(":")
        if kind not in KINDS:
            examples = ", ".join(k.example for k in KINDS.values())
            raise DetguardError(
                f"transform '{spec}': unknown kind; expected some of {examples}, {', '.join(PRESETS)}, or none"
            )
        low, drawn, high = value.partition("..")
        try:
            transforms.append(Drawn.between(KINDS[kind], low, high) if drawn else KINDS[kind].parse(value))
        except ValueError as error:
            raise DetguardError(f"transform '{spec}': {error}, as in {KINDS[kind].example}") from error
    if len({str(t) for t in transforms}) < len(transforms):
        raise DetguardError(f"transforms '{specs}': each only once")
    return transforms
