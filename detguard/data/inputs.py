"""What stands for photos without being files of them: videos, by PyAV (extra `video`), cameras, and web addresses."""

import mimetypes
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from http.client import HTTPException, HTTPResponse
from itertools import count, islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse
from urllib.request import Request, urlopen

import cv2
import numpy as np

from detguard import DetguardError, first_line
from detguard.files import FileError, open_file, write_file
from detguard.photos import MAX_PIXELS, MIN_SIDE, Photo, PhotoError, encode_png, find_photos
from detguard.runs import photo_keys

OnWarning = Callable[[str], object]
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
# Of one file; each becomes a PNG.
MOST_FRAMES = 10_000
# FFmpeg would also take a playlist for a video, and read what it names.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
# Of one file from the web; what is read of it at once; and how long nothing may come.
MOST_BYTES, BLOCK, PATIENCE = 2 << 30, 1 << 20, 30
# What the network raises; ValueError: of an address that is none.
UNREACHABLE = (OSError, HTTPException, ValueError)


def is_video(file: str | Path) -> bool:
    """Whether a file is called as videos are."""
    return str(file).lower().endswith(VIDEOS)


def is_camera(source: str | Path) -> bool:
    """Whether a source is the number of a camera, as OpenCV counts them from 0, and no file is called so."""
    return bool(re.fullmatch(r"\d{1,2}", str(source), re.ASCII)) and not Path(source).exists()


def is_address(source: str) -> bool:
    """Whether a source is a file of the web."""
    return bool(re.match(r"https?://", source, re.IGNORECASE))


def find_inputs(sources: Iterable[str], *, recursive: bool = False) -> list[str]:
    """What `find_photos` finds, and the cameras and addresses among the sources as they are, behind it.

    Raises:
        PhotoError: no source exists.
    """
    sources = list(sources)
    others = [one for one in sources if is_camera(one) or is_address(one)]
    files = [one for one in sources if one not in others]
    try:
        found = find_photos(files, recursive=recursive) if files else []
    except PhotoError:
        if not others:
            raise
        found = [*map(Path, files)]  # whoever reads them says so, and the others are done
    return [*map(str, found), *others]


def download(address: str, folder: Path) -> Path:
    """The file of an address, downloaded into a folder under its own name, or if that is taken another one.

    Raises:
        DetguardError: it cannot be downloaded, or is over 2 GiB.
    """
    try:
        with urlopen(Request(address, headers={"User-Agent": "detguard"}), timeout=PATIENCE) as answer:
            name = Path(re.sub(r"[^\w.-]", "_", unquote(urlparse(address).path).rpartition("/")[2])[-64:])
            suffix = name.suffix or mimetypes.guess_extension(answer.headers.get_content_type()) or ""
            names = (f"{name.stem.strip('.') or 'photo'}{f'-{number}' if number else ''}{suffix}" for number in count())
            file = next(folder / name for name in names if not (folder / name).exists())
            write_file(file, _blocks(address, answer))
    except UNREACHABLE as error:
        raise DetguardError(f"{address}: cannot be downloaded ({first_line(error)})") from error
    return file


def _blocks(address: str, answer: HTTPResponse) -> Iterator[bytes]:
    """What a server sends, to its end.

    Raises:
        DetguardError: it is too much, or breaks off.
    """
    size, length = 0, answer.headers.get("Content-Length", "")
    try:
        while block := answer.read(BLOCK):
            size += len(block)
            if size > MOST_BYTES:
                raise DetguardError(f"{address}: over {MOST_BYTES >> 30} GiB")
            yield block
    except UNREACHABLE as error:
        raise DetguardError(f"{address}: cannot be downloaded ({first_line(error)})") from error
    if length.isdecimal() and size < int(length):
        raise DetguardError(f"{address}: cut short, {size} of {length} bytes; try again")


def read_frames(file: Path, every: int = 1, on_warning: OnWarning = warnings.warn) -> Iterator[tuple[int, Photo]]:
    """Every so many frames of a video, and their numbers from 1, `uint8 [H, W, 3]` RGB.

    on_warning: called at the end where damaged parts were left out.

    Raises:
        DetguardError: it is no video, cannot be read, or its frames are too large or too many.
    """
    try:
        import av
    except ImportError as error:
        raise DetguardError(f"{file}: needs PyAV; pip install 'detguard[video]'") from error
    try:
        with (
            open_file(file) as stream,
            av.open(stream, "r", options={"format_whitelist": FORMATS}) as video,
        ):
            if video.streams.video[0].frames > every * MOST_FRAMES:  # 0 where the file does not say
                raise DetguardError(f"{file}: over {MOST_FRAMES} frames; take fewer by `every`")
            for number, frame in enumerate(_decoded(video, file, on_warning)):
                if not MIN_SIDE**2 <= frame.width * frame.height <= MAX_PIXELS:
                    raise DetguardError(f"{file}: frames of {frame.width} x {frame.height} px; too small or too large")
                if number % every == 0:
                    if number // every == MOST_FRAMES:
                        raise DetguardError(f"{file}: over {MOST_FRAMES} frames; take fewer by `every`")
                    # Of a phone held upright, the file says by how much its frames are to be turned, as OpenCV does.
                    upright = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                    yield number + 1, np.ascontiguousarray(upright)
    except (FileError, DetguardError):
        raise
    except Exception as error:  # of a damaged file, a decoder can raise anything
        raise DetguardError(f"{file}: no video that can be read ({first_line(error)})") from error


def _decoded(video: Any, file: Path, on_warning: OnWarning) -> Iterator[Any]:
    """The frames of a video, without those of damaged parts, as a card that is pulled or a lost connection leaves them.

    Raises:
        av.error.InvalidDataError: there is nothing else.
    """
    from av.error import InvalidDataError

    found, damaged, rest = 0, list[Exception](), ""
    try:
        for packet in video.demux(video.streams.video[0]):
            try:
                frames = packet.decode()
            except InvalidDataError as error:
                damaged.append(error)
                continue
            yield from frames
            found += len(frames)
    except InvalidDataError as error:
        damaged.append(error)
        rest = ", and all behind the last of them"
    if damaged and not found:
        raise damaged[0]
    if damaged:
        on_warning(f"{file}: {len(damaged)} damaged parts of the video left out{rest}")


def camera_frames(camera: cv2.VideoCapture, every: int = 1) -> Iterator[tuple[int, Photo]]:
    """Every so many frames of an open `cv2.VideoCapture`, and their numbers from 1, `uint8 [H, W, 3]` RGB, to its end.

    Raises:
        DetguardError: it gives none.
    """
    number = 0
    try:
        while camera.grab():
            number += 1
            if (number - 1) % every == 0 and (frame := camera.retrieve())[0]:
                yield number, np.ascontiguousarray(frame[1][..., ::-1])
    finally:
        camera.release()
    if not number:
        raise DetguardError("the camera gives no frames; see that it is there and that nothing else uses it")


def _camera(number: int) -> cv2.VideoCapture:
    """A camera, without what OpenCV logs of each way in which it could not be opened."""
    before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        return cv2.VideoCapture(number)
    finally:
        cv2.utils.logging.setLogLevel(before)


def as_photos(
    sources: Iterable[str],
    folder: Path,
    every: int = 1,
    frames: int = MOST_FRAMES,
    on_warning: OnWarning = warnings.warn,
    on_error: OnWarning | None = None,
) -> Iterator[Path]:
    """Photos of sources by `find_inputs`, one by one: downloads, and frames as NAME-NUMBER.png, go into a folder.

    Args:
        sources: photos, videos, cameras and addresses.
        folder: made where it is needed.
        every: of videos and cameras, every so many frames.
        frames: of a camera, which never ends, so many.
        on_warning: called where a video has damaged parts.
        on_error: called with why a source cannot be read, which is then left out whole; None: it ends all.

    Raises:
        DetguardError: as `read_frames`, `camera_frames` and `download`, or a file cannot be written; with `on_error`
            only where nothing is left.
    """
    files, left_out, shown = list[tuple[str, Path]](), list[DetguardError](), 0
    for source in sources:
        try:
            files.append((source, download(source, folder) if is_address(source) else Path(source)))
        except DetguardError as error:
            if on_error is None:
                raise
            left_out.append(error)
    names = {file: name for name, file in photo_keys([file for _, file in files]).items()}
    for source, file in files:
        photos, made = _photos_of(source, file, folder / names[file], every, frames, on_warning), list[Path]()
        try:
            for photo in photos:
                made.append(photo)
                if on_error is None:
                    yield photo
        except DetguardError as error:
            if on_error is None:
                raise
            left_out.append(error)
            for photo in made:
                photo.unlink(missing_ok=True)
            continue
        shown += len(made)
        yield from made if on_error else ()
    last = left_out.pop() if left_out and not shown else None
    if on_error is not None:
        for reason in left_out:
            on_error(str(reason))
    if last:
        raise last


def _photos_of(source: str, file: Path, place: Path, every: int, frames: int, on_warning: OnWarning) -> Iterator[Path]:
    """The photo of a source, or its frames, of which the names begin with `place`."""
    shown: Iterator[tuple[int, Photo]]
    if is_camera(source):
        shown = islice(camera_frames(_camera(int(source)), every), frames)
    elif is_video(file):
        shown = read_frames(file, every, on_warning)
    else:
        yield file
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    for number, photo in shown:
        made = place.with_name(f"{place.name}-{number:06d}.png")
        write_file(made, encode_png(photo))
        yield made
