"""Transforms that are random whatever their parameter: noise, common corruptions, and any of albumentations.

A spec may end in `@SEED`, as what was drawn is written down; without one the seed is 0 until `draw` gives another.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from typing_extensions import override

from detguard import DetguardError, first_line
from detguard.photos import Photo
from detguard.transforms.base import Transform, number, whole_number

SEEDS = 2**31


@dataclass(frozen=True)
class Seeded(Transform):
    """A transform that draws its randomness by a seed. Gradients go straight through it."""

    seed: int | None

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}" + ("" if self.seed is None else f"@{self.seed}")

    @property
    @abstractmethod
    def value(self) -> str:
        """The parameter, as the spec has it."""

    @abstractmethod
    def apply(self, photo: Photo, seed: int) -> Photo:
        """The photo, `uint8 [H, W, 3]`, transformed as that seed draws it."""

    @override
    def draw(self, rng: np.random.Generator) -> Transform:
        return self if self.seed is not None else replace(self, seed=int(rng.integers(SEEDS)))

    @override
    def __call__(self, photo: Photo) -> Photo:
        try:
            return self.apply(photo, self.seed or 0)
        except Exception as error:  # whatever a library raises of a photo that is too small or too large for it
            raise DetguardError(
                f"`transforms` {self}: cannot be made of a photo of {photo.shape[1]} x {photo.shape[0]} px "
                f"({first_line(error)}); leave one of them out"
            ) from error


def _seed(value: str) -> tuple[str, int | None]:
    """What stands before the @ of a spec, and the seed after it."""
    value, at, seed = value.partition("@")
    return value, whole_number(seed, 0, SEEDS - 1, "a seed") if at else None


@dataclass(frozen=True)
class Noise(Seeded):
    """Gaussian noise on every value, cut off at 0 and 255."""

    sigma: float
    kind = "noise"
    example = "noise:8"

    @property
    @override
    def value(self) -> str:
        return f"{self.sigma:g}"

    @classmethod
    def parse(cls, value: str) -> "Noise":
        """`noise:S` with a standard deviation of S levels, 0..128."""
        sigma, seed = _seed(value)
        return cls(seed, number(sigma, 0, 128, "levels"))

    @override
    def apply(self, photo: Photo, seed: int) -> Photo:
        noise = np.random.default_rng(seed).standard_normal(photo.shape, np.float32)
        return (photo + self.sigma * noise).round().clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Corruption(Seeded):
    """One of the 15 common corruptions at a severity."""

    corruption: str
    severity: int
    kind = "corrupt"
    example = "corrupt:fog-2"

    @property
    @override
    def value(self) -> str:
        return f"{self.corruption}-{self.severity}"

    @classmethod
    def parse(cls, value: str) -> "Corruption":
        """`corrupt:NAME-S` with a severity S of 1..5."""
        from detguard.data.corruptions import KINDS, SEVERITIES

        value, seed = _seed(value)
        name, _, severity = value.rpartition("-")
        if name not in KINDS:
            raise ValueError(f"expected one of {', '.join(KINDS)} and a severity")
        return cls(seed, name, whole_number(severity, min(SEVERITIES), max(SEVERITIES), "a severity"))

    @override
    def apply(self, photo: Photo, seed: int) -> Photo:
        from detguard.data.corruptions import corrupt

        return corrupt(photo, self.corruption, self.severity, seed)


@dataclass(frozen=True)
class Albumentation(Seeded):
    """A transform of albumentations by its name, with its own defaults, that leaves pixels where they are."""

    name: str
    kind = "albumentations"
    example = "albumentations:RandomShadow"

    @property
    @override
    def value(self) -> str:
        return self.name

    @classmethod
    def parse(cls, value: str) -> "Albumentation":
        """`albumentations:NAME` with the name of one of its image-only transforms that need no arguments."""
        name, seed = _seed(value)
        made = cls(seed, name)
        try:
            shown = made(np.zeros((32, 32, 3), np.uint8))
        except Exception as error:  # whatever a class raises that wants arguments, or photos of another kind
            raise ValueError("expected the name of an image-only transform that needs no arguments") from error
        if shown.dtype != np.uint8 or shown.shape != (32, 32, 3):
            raise ValueError("expected a transform of which photos of the same size come out, in levels of 0..255")
        return made

    def _transform(self) -> Any:
        import albumentations

        kind = getattr(albumentations, self.name, None)
        if not (isinstance(kind, type) and issubclass(kind, albumentations.ImageOnlyTransform)):
            raise TypeError(self.name)
        return kind(p=1)

    @override
    def apply(self, photo: Photo, seed: int) -> Photo:
        transform = self._transform()
        transform.set_random_seed(seed)
        return np.ascontiguousarray(transform(image=photo)["image"])
