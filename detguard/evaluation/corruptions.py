"""The corruptions that detectors are judged under: the 15 as they were published, and pipelines of the user's own.

The published ones are those of the package of Michaelis et al. (2019), after Hendrycks and Dietterich (2019),
kept for today's numpy as `imagecorruptions-imaug`: mPC can be set beside that of papers. Training and attacks have
detguard's own (`data/corruptions.py`).
"""

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detguard import DetguardError, first_line
from detguard.files import read_json, read_yaml
from detguard.photos import Photo

if TYPE_CHECKING:
    from albumentations import Compose

SEVERITIES = (1, 2, 3, 4, 5)
PUBLISHED = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
# The package refuses smaller photos.
LEAST_SIDE = 32
# Of a pipeline's file: transforms, one within the other, and the largest number.
MOST_TRANSFORMS, DEEPEST, LARGEST = 100, 8, 20_000
CONTAINERS = {"Compose": ("p",), "Sequential": ("p",), "OneOf": ("p",), "SomeOf": ("p", "n", "replace")}


def corrupt(photo: Photo, kind: str, severity: int, seed: int) -> Photo:
    """A photo under one of the published corruptions, the same for the same seed.

    Args:
        photo: `uint8 [H, W, 3]` RGB; one with a side under 32 px is corrupted within its mirror image.
        kind: one of PUBLISHED.
        severity: 1..5.
        seed: 0..2**32 - 1.
    """
    import imagecorruptions

    from detguard.evaluation.fast_corruptions import FASTER

    height, width = photo.shape[:2]
    missing = [(0, max(LEAST_SIDE - side, 0)) for side in (height, width)]
    padded = np.pad(photo, [*missing, (0, 0)], mode="symmetric")
    if kind in FASTER:
        corrupted = FASTER[kind](padded, severity, seed)
    else:
        state = np.random.get_state()
        try:
            np.random.seed(seed)
            corrupted = imagecorruptions.corrupt(padded, severity, kind)
        finally:
            np.random.set_state(state)
    return np.ascontiguousarray(corrupted[:height, :width])


def read_pipeline(file: str | Path) -> "Compose":
    """The pipeline of a file as `albumentations.save` writes it, JSON or YAML.

    Only albumentations' own transforms that leave pixels where they are (`ImageOnlyTransform`), in `Compose`,
    `Sequential`, `OneOf` and `SomeOf`, with plain values as arguments: labels stay true, and no file or code is named.

    Raises:
        DetguardError: it is no such file.
    """
    import albumentations as A

    path = Path(file)
    read = read_yaml(path) if path.suffix in (".yaml", ".yml") else read_json(path)
    made = 0

    def build(node: object, depth: int) -> A.ImageOnlyTransform | A.BaseCompose:
        nonlocal made
        made += 1
        given = node if isinstance(node, dict) else {}
        name = str(given.get("__class_fullname__", "")).removeprefix("albumentations.").rpartition(".")[2]
        kind: Any = getattr(A, name, None)
        args = {key: one for key, one in given.items() if key != "__class_fullname__"}
        if made > MOST_TRANSFORMS or depth > DEEPEST:
            raise DetguardError(f"over {MOST_TRANSFORMS} transforms, or {DEEPEST} within each other")
        if name in CONTAINERS and isinstance(args.get("transforms"), list):
            inner = [build(one, depth + 1) for one in args["transforms"]]
            return kind(inner, **{key: plain(name, args[key]) for key in CONTAINERS[name] if key in args})
        if not (isinstance(kind, type) and issubclass(kind, A.ImageOnlyTransform)):
            raise DetguardError(
                f"'{name}' is no image-only transform of albumentations, nor {', '.join(CONTAINERS)} of some; others "
                "move pixels, so that boxes would be wrong"
            )
        return kind(**{key: plain(name, one) for key, one in args.items()})

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of arguments that it does not know, albumentations only warns
            return A.Compose([build(read["transform"] if isinstance(read, dict) else None, 0)])
    except Exception as error:  # of odd arguments, a class can raise anything
        raise DetguardError(
            f"`corruption_file` {file}: not a pipeline that can be used ({first_line(error)}); expected one that "
            "albumentations.save has written"
        ) from error


def plain(name: str, value: object) -> object:
    """An argument of a transform.

    Raises:
        DetguardError: it is no bounded number, word, or list of such.
    """
    if isinstance(value, list | tuple):
        return [plain(name, one) for one in value]
    if isinstance(value, dict):
        return {key: plain(name, one) for key, one in value.items()}
    word = isinstance(value, str) and re.fullmatch(r"[\w -]{1,40}", value)
    if value is None or word or (isinstance(value, bool | int | float) and abs(value) <= LARGEST):
        return value
    raise DetguardError(f"{name}: {value!r:.50} is no number up to {LARGEST}, word, or list of such")


def through(pipeline: "Compose", photo: Photo, seed: int) -> Photo:
    """A photo, `uint8 [H, W, 3]` RGB, after a pipeline; the same for the same seed.

    Raises:
        DetguardError: a transform fails on it, or gives no photo of its size.
    """
    pipeline.set_random_seed(seed)
    try:
        changed = pipeline(image=photo)["image"]
    except Exception as error:  # of odd sizes and arguments, a transform can raise anything
        raise DetguardError(f"`corruption_file` fails on it ({first_line(error)})") from error
    if changed.shape != photo.shape or changed.dtype != np.uint8:
        raise DetguardError("`corruption_file`: transforms must leave size and type of a photo as they are")
    return np.ascontiguousarray(changed)
