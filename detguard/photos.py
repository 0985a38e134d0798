"""Files <-> photos, and the letterbox: the differentiable map from a photo to the frame that a detector sees.

A photo is `uint8 [H, W, 3]` RGB at the resolution of its file. Gradients are `[3, H, W]`, as networks give them.
"""

import glob
import hashlib
import io
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile
from PIL.TiffTags import SHORT
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor
from torch.nn.functional import interpolate

from detguard import DetguardError, first_line
from detguard.files import MAX_PHOTO, FileError, is_file, is_folder, open_file, read_file

try:
    from PIL.AvifImagePlugin import SUPPORTED, AvifImageFile
except ImportError:  # Pillow before 11.3
    SUPPORTED = False

Photo = NDArray[np.uint8]
# What a photo may be given as.
Source = str | Path | Photo | Image.Image | Tensor

SUFFIXES: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".heic", ".heif")
XMP = ("xmp", "XML:com.adobe.xmp")
MAX_PIXELS = 100_000_000
MIN_SIDE = 8
# Looked into for photos to suggest, where a folder holds none itself.
MOST_FOLDERS = 1000
# Decoders may go so often over the pixels of the largest photo, and oftener over those of a smaller one: a JPEG of 2 kB
# can have thousands of scans. Pillow decodes run lengths in Python, which takes as long as so many.
MAX_PASSES = 12
RUN_LENGTH_PASSES = 120
# What a file of each kind begins with. Not `Image.open`: it starts Ghostscript for an EPS of any name, and Ultralytics
# replaces it by one that installs a package for what is no image.
READERS: dict[bytes, Callable[[BinaryIO], ImageFile]] = {
    rb"\xff\xd8\xff": JpegImageFile,
    rb"\x89PNG\r\n\x1a\n": PngImageFile,
    rb"GIF8[79]a": GifImageFile,
    rb"BM": BmpImageFile,
    rb"RIFF....WEBP": WebPImageFile,
    rb"II[*+]\0|MM\0[*+]": TiffImageFile,
}
AVIF = rb".{4}ftypavi[fs]"
if SUPPORTED:
    SUFFIXES += (".avif",)
    READERS[AVIF] = AvifImageFile
# What a HEIC may hold: images, tiles of them, and what is no image. Its decoder takes tiles of so many pixels, whatever
# size they say that they have.
ITEMS = {b"hvc1", b"jpeg", b"grid", b"tmap", b"Exif", b"iptc", b"mime", b"uri "}
LEAST_TILE = 1 << 16
HEIC = rb".{4}ftyp(?:he[iv][cmsx]|mif1|msf1)"
with suppress(ImportError):  # the extra `heic`
    from pillow_heif import HeifImageFile

    READERS[HEIC] = HeifImageFile
EXIF_ORIENTATION = 274
MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # of a segment of a JPEG, with a length
PADDING_LEVEL = 114


class PhotoError(DetguardError):
    """A photo that cannot be read or written; the message starts with its path."""


def find_photos(sources: Iterable[str | Path], *, recursive: bool | None = None) -> list[Path]:
    """Expand files, folders and glob patterns to a list of files, each once, folders and patterns in sorted order.

    A source that holds no photos or cannot be listed stays in the list as it is, so that `read_photo` says so in
    its turn and the others are done. recursive: folders with all that is in their folders, too; None: no, and whoever
    asks has no such option.

    Raises:
        PhotoError: no source exists.
    """
    found: dict[Path, None] = {}
    for source in sources:
        for match in _matching(str(source)) or [Path(source)]:
            found |= dict.fromkeys(photos_in(match, recursive=bool(recursive)) or [match])
    if not any(map(is_file, found)):
        gone = [str(one) for one in found if not os.path.lexists(one) and not glob.has_magic(str(one))]
        if gone:
            raise PhotoError(f"{', '.join(gone)}: no such file or folder")
        reason = f"{', '.join(map(str, found))}: no photos here (looked for {' '.join(SUFFIXES)})"
        if deeper := next(filter(None, map(_deeper, found)), None):
            also = "" if recursive is None else ", or give `recursive`"
            reason = f"{reason}; there are some in {deeper}{os.sep}: name that{also}"
        raise PhotoError(reason)
    return list(found)


def _deeper(folder: Path) -> Path | None:
    """A folder with photos somewhere in a folder, if one of the first is such."""
    return next((files[0].parent for files in islice(_by_folder(folder), MOST_FOLDERS) if files), None)


def _matching(pattern: str) -> list[Path]:
    try:
        known = os.path.lexists(pattern) or not glob.has_magic(pattern)
        return [] if known else [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
    except (OSError, ValueError, RecursionError):  # a name or a depth that no path has
        return []


def photos_in(folder: Path, *, recursive: bool, enter: Callable[[Path], bool] = lambda _: True) -> list[Path]:
    """The photos of a folder, sorted, as Ultralytics lists them: links are followed, what is hidden is not there.

    recursive: with those of the folders in it, each folder once; enter: asked of each link to a folder whether it is to
    be followed.
    """
    try:
        return sorted(chain.from_iterable(islice(_by_folder(folder, enter), None if recursive else 1)))
    except (OSError, ValueError):
        return []


def _by_folder(folder: Path, enter: Callable[[Path], bool] = lambda _: True) -> Iterator[list[Path]]:
    """The photos of a folder, then those of each folder in it."""
    seen, links = set[str](), deque([folder])
    while links:  # after the folders themselves, so that these are called by their own names
        for name, inside, files in os.walk(links.popleft()):
            inside[:] = sorted(one for one in inside if not one.startswith("."))
            if (real := os.path.realpath(name)) in seen:  # or a loop of links would have no end
                inside.clear()
                continue
            seen.add(real)
            parent = Path(name)
            links += [link for one in inside if (link := parent / one).is_symlink() and enter(link)]
            yield [parent / one for one in files if one.lower().endswith(SUFFIXES) and not one.startswith(".")]


def read_photo(file: str | Path, sha256: str = "") -> Photo:
    """Read a JPEG, PNG, WebP, AVIF, HEIC, BMP, TIFF or single-frame GIF of any mode as `uint8 [H, W, 3]` RGB, upright.

    Pixels come from OpenCV, as in the detectors' own predict path, and of AVIF and HEIC from Pillow. Pillow looks
    first, because OpenCV decodes half a file without a word and believes any size in a header. Of several images in a
    HEIC, it is the primary one, of those in a TIFF the first.

    sha256: of a file that was looked at before, what its bytes had then.

    Raises:
        PhotoError: missing, unreadable, not an image, truncated, animated, too large, too small or too slow, or
            changed since.
    """
    return read_hashed(file, sha256)[0]


def read_hashed(file: str | Path, sha256: str = "") -> tuple[Photo, str]:
    """A photo as `read_photo` reads it, and the SHA-256 of those very bytes: the file may be another one at once."""
    if (shown := str(file).encode(errors="backslashreplace").decode()) != str(file):  # no record could name it
        raise PhotoError(f"{shown}: its name is not UTF-8; rename it")
    try:
        data = read_file(file, MAX_PHOTO)
    except FileError as error:
        reason = f"{file}: a folder that holds no photos or cannot be listed" if is_folder(file) else str(error)
        raise PhotoError(reason) from error
    found = hashlib.sha256(data).hexdigest()
    if sha256 and found != sha256:
        raise PhotoError(f"{file}: has changed since the run looked at it")
    _check(data, file)
    return decode_photo(data, file), found


def _check(data: bytes, file: str | Path) -> None:
    """Raise PhotoError unless it is a whole image that is cheap to decode."""
    if not data:
        raise PhotoError(f"{file}: the file is empty")
    with _opened(io.BytesIO(data), file) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise PhotoError(f"{file}: {width} x {height} px is over the limit of {MAX_PIXELS // 10**6} megapixels")
        if min(width, height) < MIN_SIDE:
            raise PhotoError(f"{file}: {width} x {height} px is too small, at least {MIN_SIDE} x {MIN_SIDE} needed")
        if _passes(image, data) * width * height > MAX_PASSES * MAX_PIXELS:
            raise PhotoError(f"{file}: {width} x {height} px coded so take too long to decode; save it as PNG")
        if getattr(image, "is_animated", False) and image.format not in ("TIFF", "HEIF"):
            raise PhotoError(f"{file}: animated; save the frame you want as a PNG")
        image.load()


@contextmanager
def _opened(stream: BinaryIO, file: str | Path) -> Iterator[ImageFile]:
    """Pillow's view of an image, of which the header is read; what it raises is a PhotoError."""
    begin = stream.read(16)
    reader = next((reader for magic, reader in READERS.items() if re.match(magic, begin, re.DOTALL)), None)
    if reader is None and re.match(HEIC, begin, re.DOTALL):
        raise PhotoError(f"{file}: a HEIC needs pillow-heif; pip install 'detguard[heic]'")
    if reader is None:
        raise PhotoError(f"{file}: not an image ({', '.join(s[1:] for s in SUFFIXES)} can be read)")
    stream.seek(0)
    try:
        with reader(stream) as image:
            _forget_xmp(image)
            yield image
    except DetguardError:
        raise
    except Exception as error:  # of a damaged image, a decoder can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PhotoError(f"{file}: the image is damaged or cut short ({reason})") from error


def _passes(image: ImageFile, data: bytes) -> float:
    """How often, about, a decoder goes over all pixels of an image."""
    if image.format == "HEIF":
        return math.inf if _nested(data) else _tiles(image)
    if image.format == "BMP" and image.info.get("compression", 0) != 0:
        return RUN_LENGTH_PASSES
    if image.format != "JPEG":
        return 1
    scans, at = 0, 2
    while marker := MARKER.search(data, at):
        if marker[1] == b"\xd9":  # the end; what comes after it is not decoded
            break
        scans += marker[1] == b"\xda"
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    return scans


def _tiles(image: ImageFile) -> float:
    """How much larger the tiles of a HEIC are together than what is shown of them."""
    if not (grid := image.info.get("tiling")):
        return 1
    area = max(grid["tile_width"] * grid["tile_height"], LEAST_TILE)
    return grid["num_columns"] * grid["num_rows"] * area / (image.width * image.height)


def _nested(data: bytes) -> bool:
    """Whether a HEIC may be put together of images that are put together themselves, each of which may come often."""
    # Of the number of an item and its kind; other versions of these boxes are for more items than a decoder takes.
    items = [(found[1], found[2]) for found in re.finditer(rb"infe(?=.{4}(..)..(....))", data, re.DOTALL)]
    if re.search(rb"iref[^\0]", data) or not {kind for _, kind in items} <= ITEMS:
        return True
    grids = {number for number, kind in items if kind == b"grid"}
    for found in re.finditer(rb"dimg(?=(..)(..))", data, re.DOTALL):
        parts = data[found.end() + 4 :][: 2 * int.from_bytes(found[2])]
        if found[1] in grids and not grids.isdisjoint(parts[i : i + 2] for i in range(0, len(parts), 2)):
            return True
    return False


def photo_size(file: str | Path) -> tuple[int, int]:
    """Width and height of a photo as `read_photo` gives it, from its header alone where that leaves no doubt.

    Raises:
        PhotoError: there is no readable image.
    """
    try:
        # Of AVIF and HEIC, Pillow reads all of it.
        with open_file(file, MAX_PHOTO) as stream, _opened(stream, file) as image:
            width, height = image.size
            if isinstance(image, TiffImageFile):  # newer Pillows turn its size, older ones do not
                width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
            turned = _turned(image, stream)
    except FileError as error:
        raise PhotoError(str(error)) from error
    if turned is None:
        height, width, _ = read_photo(file).shape
        return width, height
    return (height, width) if turned else (width, height)


def _turned(image: ImageFile, stream: BinaryIO) -> bool | None:
    """Whether a photo lies on its side; None: only who decodes it knows, as readers disagree on such a header."""
    if image.format == "PNG":  # which may have its EXIF behind its pixels
        return None if "exif" in image.info or _has_chunk(stream, b"eXIf") else False
    if image.format not in ("JPEG", "WEBP"):
        return image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    told = _orientations(image.info.get("exif", b""))
    if told is None or [of for of, _ in told] not in ([], [(SHORT, 1)]):
        return None
    return any(orientation in (5, 6, 7, 8) for _, orientation in told)


def _has_chunk(stream: BinaryIO, kind: bytes) -> bool:
    """Whether a PNG has a chunk of a kind."""
    stream.seek(8)
    while len(header := stream.read(8)) == 8:
        if header[4:] == kind:
            return True
        stream.seek(int.from_bytes(header[:4]) + 4, io.SEEK_CUR)
    return False


def _orientations(exif: bytes) -> list[tuple[tuple[int, int], int]] | None:
    """The orientations in EXIF, each with its type and count, of which 2.32 has one SHORT (4.6.2, 4.6.4); None: it is
    not EXIF.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    if exif and exif[:4] not in (b"II*\0", b"MM\0*"):
        return None
    order: Literal["little", "big"] = "little" if exif[:2] == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[at : at + size], order)

    start = number(4, 4)
    entries = [start + 2 + 12 * i for i in range(number(start, 2))]
    of_tag = [at for at in entries if number(at, 2) == EXIF_ORIENTATION]
    return [((number(at + 2, 2), number(at + 4, 4)), number(at + 8, 2)) for at in of_tag]


def decode_photo(data: bytes | memoryview, file: str | Path = "photo") -> Photo:
    """Decode the bytes of an image file to `uint8 [H, W, 3]` RGB; `file` names it in errors.

    Raises:
        PhotoError: it cannot be decoded.
    """
    if re.match(rb"%s|%s" % (AVIF, HEIC), bytes(data[:12]), re.DOTALL):  # which OpenCV does not turn upright, or read
        with _opened(io.BytesIO(data), file) as opened:
            return np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except Exception as error:  # of a damaged image, a decoder can raise anything
        reason = " ".join(str(getattr(error, "err", error)).split())
        raise PhotoError(f"{file}: cannot be decoded ({reason})") from error
    if image is None:
        raise PhotoError(f"{file}: this kind of image cannot be decoded; save it as PNG or JPEG")
    return image.astype(np.uint8, copy=False)


def _forget_xmp(image: Image.Image) -> None:
    """Leave out where Pillow looks for an orientation, and nobody else."""
    for name in XMP:
        image.info.pop(name, None)


def as_photo(photo: Source) -> Photo:
    """A photo of any kind as `uint8 [H, W, 3]` RGB.

    Raises:
        DetguardError: its shape or its values are not those of one, or it cannot be read.
    """
    if isinstance(photo, str | Path):
        return read_photo(photo)
    if isinstance(photo, Image.Image):
        try:
            photo.load()  # if it is not yet
        except (OSError, ValueError, SyntaxError) as error:
            raise DetguardError(f"photo: an image that cannot be read ({first_line(error)})") from error
        if photo.mode == "F":
            raise DetguardError("photo: an image of floats (mode F); expected levels of 8 or 16 bits")
        upright = photo.copy()
        _forget_xmp(upright)
        ImageOps.exif_transpose(upright, in_place=True)
        if photo.mode[0] == "I":  # more than 8 bits, which files are read with, scaled down
            levels = np.asarray(upright)
            if photo.mode == "I" and levels.max() <= 255:
                raise DetguardError("photo: an image of whole numbers (mode I) that all fit 8 bits; convert it to L")
            stream = io.BytesIO()
            Image.fromarray(levels.clip(0, 65535).astype(np.uint16)).save(stream, "PNG")
            return decode_photo(stream.getvalue())
        return np.asarray(upright.convert("RGB"))
    if isinstance(photo, Tensor):
        if photo.ndim != 3 or photo.shape[0] != 3:
            raise DetguardError(f"photo: a tensor of shape {tuple(photo.shape)}; expected [3, H, W]")
        if photo.is_floating_point():
            if not bool(((photo >= 0) & (photo <= 1)).all()):
                raise DetguardError("photo: a tensor of floats outside 0..1; divide by 255, or give uint8")
            (photo,) = photos_of(photo[None])
        else:
            photo = photo.detach().cpu().permute(1, 2, 0).contiguous().numpy()
    right = isinstance(photo, np.ndarray) and photo.dtype == np.uint8 and photo.ndim == 3 and photo.shape[2] == 3
    if not right or not photo.size:
        shown = f"{photo.dtype} {photo.shape}" if isinstance(photo, np.ndarray) else type(photo).__name__
        raise DetguardError(
            f"photo: {shown}; expected a path, a uint8 array [H, W, 3] RGB, a PIL image, or a tensor [3, H, W]"
        )
    return np.ascontiguousarray(photo)


def encode_png(photo: Photo) -> bytes:
    """The bytes of a lossless PNG of `photo`, `uint8 [H, W, 3]` RGB."""
    return encoded(".png", photo)


def encode_jpeg(photo: Photo, quality: int) -> bytes:
    """The bytes of a JPEG of `photo`, `uint8 [H, W, 3]` RGB, of a quality of 1..100, chroma subsampled 4:2:0."""
    options = [
        cv2.IMWRITE_JPEG_QUALITY, quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    ]  # fmt: skip
    return encoded(".jpg", photo, options)


def encoded(suffix: str, photo: Photo, options: Sequence[int] = ()) -> bytes:
    """The bytes of a file of `photo`, `uint8 [H, W, 3]` RGB, by OpenCV.

    Raises:
        DetguardError: the format holds no photo of that size.
    """
    done, data = cv2.imencode(suffix, cv2.cvtColor(photo, cv2.COLOR_RGB2BGR), options)
    if not done:
        size = f"{photo.shape[1]} x {photo.shape[0]} px"
        raise DetguardError(f"{size}: more than a {suffix} file can hold; shrink the photo")
    return data.tobytes()


@dataclass(frozen=True)
class Letterbox:
    """Where a photo of one shape lies in its frame: resized, then padded. All sizes are (height, width) in pixels.

    Attributes:
        photo: size of the photo.
        resized: what it is resized to.
        frame: size of the frame.
        offset: padding above and on the left.
    """

    photo: tuple[int, int]
    resized: tuple[int, int]
    frame: tuple[int, int]
    offset: tuple[int, int]

    @classmethod
    def whole(cls, photo: tuple[int, int]) -> "Letterbox":
        """The letterbox of a detector whose frame is the photo.

        Args:
            photo: (height, width), px.
        """
        return cls(photo, photo, photo, (0, 0))

    @classmethod
    def fit(cls, photo: tuple[int, int], size: int, stride: int = 32, *, stretch: bool = False) -> "Letterbox":
        """The letterbox of Ultralytics' predict path: longest side to `size`, short side padded to whole strides.

        Args:
            photo: (height, width), px.
            size: longest side of the frame, px.
            stride: the frame's sides are whole multiples of it, px.
            stretch: the photo fills the square frame and its proportions are lost, as of RT-DETR.
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

    def pull_back(self, gradient: Tensor, *, spread: bool = False) -> Tensor:
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
            if inner.device.type != "cpu":
                return interpolate(inner[None] * share, self.photo, mode="bilinear")[0]
            # As torch's, in a tenth of its time, and in the order in which a photo is in memory.
            pixels = (inner * share).permute(1, 2, 0).numpy()
            return torch.from_numpy(cv2.resize(pixels, self.photo[::-1], interpolation=cv2.INTER_LINEAR)).permute(
                2, 0, 1
            )
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


def largest_difference(photo: Photo, other: Photo) -> int:
    """The largest change of any value between two photos of one shape, in levels."""
    return int(np.abs(photo.astype(np.int16) - other).max())


def frames_tensor(frames: Sequence[Photo], device: torch.device | str = "cpu") -> Tensor:
    """Frames of one shape as a detector takes them: float32 [B, 3, H, W], 0..1, RGB, channels last in memory."""
    if torch.device(device).type != "cpu":  # bytes are a quarter to copy
        return torch.from_numpy(np.stack(frames)).to(device).float().div_(255).permute(0, 3, 1, 2)
    stacked = np.empty((len(frames), *frames[0].shape), np.float32)
    for i, frame in enumerate(frames):
        stacked[i] = frame
    stacked /= np.float32(255)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2)


def photos_of(frames: Tensor) -> list[Photo]:
    """Photos of frames, float [B, 3, H, W] in 0..1, in 8 bit."""
    return list((frames * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy())


def resize_adjoint(gradient: Tensor, source: tuple[int, int]) -> Tensor:
    """Adjoint of the bilinear resize from `source` (height, width): gradient [3, h, w] -> gradient [3, *source]."""
    if source == (2 * gradient.shape[1], 2 * gradient.shape[2]):  # to means of four: the same in half of the time
        return interpolate((gradient / 4).contiguous()[None], source, mode="nearest")[0]
    return torch.ops.aten.upsample_bilinear2d_backward(
        gradient.contiguous()[None], list(gradient.shape[1:]), [1, 3, *source], False, None, None
    )[0]


def photo_seed(key: str, seed: int) -> int:
    """A seed for one photo of a run: the same in every process and whatever its neighbours are."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7], "big")
