"""Frames of video files as photos, by PyAV (extra `video`)."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from detguard import DetguardError, first_line
from detguard.files import FileError, open_file, write_file
from detguard.photos import MAX_PIXELS, MIN_SIDE, Photo, encode_png
from detguard.runs import photo_keys

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
# Of one file; each becomes a PNG.
MOST_FRAMES = 10_000
# FFmpeg would also take a playlist for a video, and read what it names.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"


def is_video(file: Path) -> bool:
    """Whether a file is called as videos are."""
    return file.suffix.lower() in SUFFIXES


def read_frames(file: Path, every: int = 1) -> Iterator[tuple[int, Photo]]:
    """Every so many frames of a video, and their numbers from 1, `uint8 [H, W, 3]` RGB.

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
            for number, frame in enumerate(video.decode(video.streams.video[0])):
                if not MIN_SIDE**2 <= frame.width * frame.height <= MAX_PIXELS:
                    raise DetguardError(f"{file}: frames of {frame.width} x {frame.height} px; too small or too large")
                if number % every == 0:
                    if number // every == MOST_FRAMES:
                        raise DetguardError(f"{file}: over {MOST_FRAMES} frames; take fewer by `every`")
                    yield number + 1, np.ascontiguousarray(frame.to_ndarray(format="rgb24"))
    except (FileError, DetguardError):
        raise
    except Exception as error:  # of a damaged file, a decoder can raise anything
        raise DetguardError(f"{file}: no video that can be read ({first_line(error)})") from error


def with_frames(files: Iterable[Path], folder: Path, every: int = 1) -> list[Path]:
    """Files, of which videos are replaced by their frames, written into a folder as NAME-NUMBER.png.

    Raises:
        DetguardError: as `read_frames`, or a frame cannot be written.
    """
    files = list(files)
    names = {file: name for name, file in photo_keys(list(filter(is_video, files))).items()}
    found: list[Path] = []
    for file in files:
        if not is_video(file):
            found.append(file)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for number, photo in read_frames(file, every):
            found.append(folder / f"{names[file]}-{number:06d}.png")
            write_file(found[-1], encode_png(photo))
    return found
