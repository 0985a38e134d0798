"""Files <-> photos, and the letterbox: the differentiable map from a photo to the frame that a detector sees.

A photo is `uint8 [H, W, 3]` RGB at the resolution of its file. Gradients are `[3, H, W]`, as networks give them.
"""

import glob
import hashlib
import struct
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from detguard import DetguardError
from detguard.files import MAX_PHOTO, FileError, read_file

Photo = NDArray[np.uint8]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_PIXELS = 100_000_000
MIN_SIDE = 8
PADDING_LEVEL = 114


class PhotoError(DetguardError):
    """A photo that cannot be read or written; the message starts with its path."""


def find_photos(sources: Iterable[str | Path]) -> list[Path]:
    """Expand files, folders and glob patterns to a list of files, each once, folders and patterns in sorted order.

    A source that holds no photos or cannot be listed stays in the list as it is, so that `read_photo` says so in
    its turn and the others are done.

    Raises:
        PhotoError: no source exists.
    """
    found: dict[Path, None] = {}
    for source in sources:
        matches = [Path(source)]
        if not matches[0].exists() and glob.has_magic(str(source)):
            matches = [Path(p) for p in sorted(glob.glob(str(source), recursive=True))] or matches  # noqa: PTH207
        for match in matches:
            found |= dict.fromkeys(_photos_in(match) or [match])
    if not any(path.is_file() for path in found):
        raise PhotoError(f"{', '.join(map(str, found))}: no photos here (looked for {' '.join(SUFFIXES)})")
    return list(found)


def _photos_in(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    except OSError:
        return []


def read_photo(file: str | Path) -> Photo:
    """Read a JPEG, PNG, WebP, BMP, TIFF or single-frame GIF of any mode as `uint8 [H, W, 3]` RGB, upright.

    Pixels come from OpenCV, as in the detectors' own predict path; Pillow looks first, because OpenCV decodes
    half a file without a word and believes any size in a header.

    Raises:
        PhotoError: missing, unreadable, not an image, truncated, animated, too large or too small.
    """
    file = Path(file)
    if file.is_dir():
        raise PhotoError(f"{file}: a folder that holds no photos or cannot be listed")
    try:
        data = read_file(file, MAX_PHOTO)
    except FileError as error:
        raise PhotoError(str(error)) from error
    if not data:
        raise PhotoError(f"{file}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit, below, says it better than Pillow's warning
            with Image.open(file) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise PhotoError(
                        f"{file}: {width} x {height} px is over the limit of {MAX_PIXELS // 10**6} megapixels"
                    )
                if min(width, height) < MIN_SIDE:
                    raise PhotoError(
                        f"{file}: {width} x {height} px is too small, at least {MIN_SIDE} x {MIN_SIDE} needed"
                    )
                if (frames := getattr(image, "n_frames", 1)) > 1 and image.format in ("GIF", "WEBP", "PNG"):
                    raise PhotoError(f"{file}: animated, {frames} frames; save the frame you want as a PNG")
                image.load()
    except Image.DecompressionBombError as error:
        raise PhotoError(f"{file}: over the limit of {MAX_PIXELS // 10**6} megapixels") from error
    except (UnidentifiedImageError, ImportError) as error:
        # ImportError: Ultralytics replaces Image.open by one that wants a HEIF reader for what Pillow cannot read.
        raise PhotoError(f"{file}: not an image ({', '.join(s[1:] for s in SUFFIXES)} can be read)") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        raise PhotoError(f"{file}: the image is damaged or cut short ({error})") from error
    return decode_photo(data, file)


def decode_photo(data: bytes, file: str | Path = "photo") -> Photo:
    """Decode the bytes of an image file to `uint8 [H, W, 3]` RGB; `file` names it in errors.

    Raises:
        PhotoError: OpenCV cannot decode it.
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise PhotoError(f"{file}: cannot be decoded ({error.err})") from error
    if image is None:
        raise PhotoError(f"{file}: this kind of image cannot be decoded; save it as PNG or JPEG")
    return image.astype(np.uint8, copy=False)


def encode_png(photo: Photo) -> bytes:
    """The bytes of a lossless PNG of `photo`, `uint8 [H, W, 3]` RGB."""
    return cv2.imencode(".png", cv2.cvtColor(photo, cv2.COLOR_RGB2BGR))[1].tobytes()


@dataclass(frozen=True)
class Letterbox:
    """Where a photo of one shape lies in its frame: resized, then padded. All sizes are (height, width) in pixels."""

    photo: tuple[int, int]
    resized: tuple[int, int]
    frame: tuple[int, int]
    offset: tuple[int, int]

    @classmethod
    def fit(cls, photo: tuple[int, int], size: int, stride: int = 32, stretch: bool = False) -> "Letterbox":
        """The letterbox of Ultralytics' predict path: longest side to `size`, short side padded to whole strides.

        With `stretch` (RT-DETR) the photo fills the square frame and its proportions are lost.
        """
        if stretch:
            return cls(photo, (size, size), (size, size), (0, 0))
        gain = min(size / photo[0], size / photo[1])
        height, width = (max(round(side * gain), 1) for side in photo)
        spare = ((size - height) % stride, (size - width) % stride)
        frame = (height + spare[0], width + spare[1])
        # The 0.1 decides which side gets the odd pixel of padding, as in Ultralytics' LetterBox.
        return cls(photo, (height, width), frame, (round(spare[0] / 2 - 0.1), round(spare[1] / 2 - 0.1)))

    def __call__(self, photo: Photo) -> Photo:
        """The frame of a photo, `uint8 [H', W', 3]`: OpenCV's 8-bit bilinear resize to the bit, then padding."""
        (height, width), (top, left) = self.resized, self.offset
        if self.resized != self.photo:
            photo = cv2.resize(photo, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)
        if self.resized == self.frame:
            return photo
        frame = np.full((*self.frame, 3), PADDING_LEVEL, np.uint8)
        frame[top : top + height, left : left + width] = photo
        return frame

    def pull_back(self, gradient: Tensor, spread: bool = False) -> Tensor:
        """Gradient at the frame, [3, H', W'], brought to the photo, [3, H, W]: the adjoint of the bilinear resize.

        OpenCV's rounding is passed straight through. The padding is constant, so its gradient goes nowhere.
        A bilinear resize to a much smaller frame reads only some of the photo's pixels, and the adjoint gives the
        others nothing. With `spread` the gradient of such a frame is enlarged instead, so that each gets its share.
        """
        (height, width), (top, left) = self.resized, self.offset
        inner = gradient[:, top : top + height, left : left + width]
        if self.resized == self.photo:
            return inner
        share = (height * width) / (self.photo[0] * self.photo[1])
        if spread and share < 1:
            return interpolate(inner[None], self.photo, mode="bilinear")[0] * share
        return resize_adjoint(inner, self.photo)

    def boxes_to_photo(self, boxes: Tensor) -> Tensor:
        """Boxes [..., 4] xyxy from frame pixels to photo pixels, clipped to the photo."""
        height, width = self.photo
        scale = boxes.new_tensor([width / self.resized[1], height / self.resized[0]] * 2)
        shifted = (boxes - boxes.new_tensor([self.offset[1], self.offset[0]] * 2)) * scale
        return shifted.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))

    def boxes_to_frame(self, boxes: Tensor) -> Tensor:
        """Boxes [..., 4] xyxy from photo pixels to frame pixels."""
        scale = boxes.new_tensor([self.resized[1] / self.photo[1], self.resized[0] / self.photo[0]] * 2)
        return boxes * scale + boxes.new_tensor([self.offset[1], self.offset[0]] * 2)


def frames_tensor(frames: Sequence[Photo], device: torch.device | str = "cpu") -> Tensor:
    """Frames of one shape as a detector takes them: float32 [B, 3, H, W], 0..1, RGB, channels last in memory."""
    return torch.from_numpy(np.stack(frames)).to(device).float().div_(255).permute(0, 3, 1, 2)


def resize_adjoint(gradient: Tensor, source: tuple[int, int]) -> Tensor:
    """Adjoint of the bilinear resize from `source` (height, width): gradient [3, h, w] -> gradient [3, *source]."""
    return torch.ops.aten.upsample_bilinear2d_backward(
        gradient[None], list(gradient.shape[1:]), [1, 3, *source], False, None, None
    )[0]


def photo_seed(key: str, seed: int) -> int:
    """A seed for one photo of a run: the same in every process and whatever its neighbours are."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7], "big")
