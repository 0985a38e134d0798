"""Defaults of options, for Python and the command line. Light, so that --help is quick."""

from typing import Final

MODEL: Final = "detguard-n"
# A GPU where CUDA finds one, else the CPU.
DEVICE: Final = "auto"
FRAMES: Final = 100
# Confidence over which an object counts as found, of families that have no threshold of their own: that of Ultralytics'
# predict. Torchvision's .05 is the least that its networks give, not one that is shown.
CONF: Final = 0.25


class Attack:
    """Defaults of `detguard attack`."""

    conf: Final = CONF
    eps: Final = 4
    norm: Final = "linf"
    transforms: Final = "median:3,jpeg:75"
    measure: Final = "logit"
    queries: Final = 5000
    rule: Final = "steepest"
    steps: Final = 100
    aggregate: Final = "mean"
    schedule: Final = "worst"
    gradient: Final = "straight-through"
    momentum: Final = 0
    margin: Final = 0.05
    seed: Final = 0
    batch: Final = 1


class Evaluate:
    """Defaults of `detguard evaluate`."""

    split: Final = "val"
    protocols: Final = ("clean", "corruptions", "attack")
    severities: Final = (1, 2, 3, 4, 5)
    eps: Final = (4,)
    attacks: Final = ("class", "box", "all", "vanish", "rank")
    queries: Final = 200
    seed: Final = 0
    batch: Final = 8
    patch_target: Final = "person"
    patch_size: Final = 0.3


class Picture:
    """Defaults of `detguard patch` and `detguard universal`."""

    split: Final = "train"
    size: Final = 0.3
    pixels: Final = 128
    print_cm: Final = 20
    eps: Final = 8
    photos: Final = 4000
    rate: Final = 0.03
    batch: Final = 8
    conf: Final = CONF
    seed: Final = 0


class Harden:
    """Defaults of `detguard harden`."""

    recipe: Final = "gated"
    learn: Final = "teacher"
    mode: Final = "freeze-first"
    split: Final = "backbone"
    photos: Final = 100_000
    eps: Final = 4
    mix: Final = 0.2
    transforms: Final = "none"
    fusion: Final = "bounded:0.25"
    sparse: Final = 0.2
    batch: Final = 32
    rate: Final = 3e-3
    seed: Final = 0


class Adapt:
    """Defaults of `detguard adapt`."""

    split: Final = "train"
    experts: Final = 1
    expert: Final = "head"
    mode: Final = "auto"
    init: Final = "best"
    keep: Final = 1.0
    max_experts: Final = 12
    batch: Final = 16
    rate: Final = 1e-3
    seed: Final = 0


class Monitor:
    """Defaults of `detguard monitor`."""

    split: Final = "val"
    drift: Final = "either"
    window: Final = 32
    gather: Final = 64
    keep: Final = 256
