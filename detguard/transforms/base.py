"""What a transform is: photo -> photo at file resolution, and how a gradient comes back through it."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from detguard.photos import Photo, encode_png

# straight-through: the gradient goes to the same pixels unchanged, which is the attack method's own definition;
# exact: by the transform's `pull_back`.
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
        """Gradient [3, H, W] at the output -> at `photo`, exact or by the surrogate that the class names."""

    def encode(self, photo: Photo) -> bytes:
        """The bytes of a file (of `suffix`) that holds the transformed photo."""
        return encode_png(self(photo))


def whole_number(value: str, low: int, high: int, what: str) -> int:
    """`value` as an int in low..high; raises ValueError that says `what` was expected."""
    if not value.isdigit() or not low <= int(value) <= high:
        raise ValueError(f"expected {what} in {low}..{high}")
    return int(value)
