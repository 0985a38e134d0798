"""What a transform is: photo -> photo at file resolution, and how a gradient comes back through it."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from detguard.photos import Photo, encode_png

GradientRule = Literal["straight-through", "exact"]


class Transform(ABC):
    """A pixel-aligned photo transform with its parameter; `str()` gives the spec that the command line reads."""

    kind: ClassVar[str]
    example: ClassVar[str]
    suffix: ClassVar[str] = ".png"

    @abstractmethod
    def __str__(self) -> str:
        """The spec, e.g. `jpeg:75`."""

    @classmethod
    @abstractmethod
    def parse(cls, value: str) -> "Transform":
        """From the part of the spec after the colon; raises ValueError with what was expected."""

    @abstractmethod
    def __call__(self, photo: Photo) -> Photo:
        """Transform `uint8 [H, W, 3]` RGB to the same shape."""

    @abstractmethod
    def pull_back(self, photo: Photo, gradient: Tensor) -> Tensor:
        """Gradient [H, W, 3] at the output -> at `photo`, exact or by the surrogate that the class names."""

    def encode(self, photo: Photo) -> bytes:
        """The bytes of a file (of `suffix`) that holds the transformed photo."""
        return encode_png(self(photo))


def transform_with_gradient(transform: Transform, photo: Tensor, rule: GradientRule) -> Tensor:
    """Apply `transform` to a photo, float32 [H, W, 3] whole levels, with its gradient rule attached.

    straight-through: the gradient goes to the same pixels unchanged (the attack method's own definition).
    exact: the transform's own `pull_back`.
    """
    return _TransformMap.apply(photo, transform, rule)


class _TransformMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, photo: Tensor, transform: Transform, rule: GradientRule) -> Tensor:
        pixels = photo.detach().to("cpu", torch.uint8).numpy()
        ctx.pixels, ctx.transform, ctx.rule = pixels, transform, rule
        return torch.from_numpy(transform(pixels)).to(photo)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0]
        if ctx.rule == "exact":
            gradient = ctx.transform.pull_back(ctx.pixels, gradient)
        return gradient, None, None


def whole_number(value: str, low: int, high: int, what: str) -> int:
    """`value` as an int in low..high; raises ValueError that says `what` was expected."""
    if not value.isdigit() or not low <= int(value) <= high:
        raise ValueError(f"expected {what} in {low}..{high}")
    return int(value)
