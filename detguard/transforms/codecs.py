"""WebP and H.264: what services and cameras do to a photo. Gradients go straight through them."""

import io
from dataclasses import dataclass

import cv2
import numpy as np
from typing_extensions import override

from detguard import DetguardError
from detguard.photos import Photo, encoded
from detguard.transforms.base import Encoded, Transform, whole_number


@dataclass(frozen=True)
class Webp(Encoded):
    """Encode and decode by libwebp at a quality of 1..100."""

    quality: int
    kind = "webp"
    example = "webp:75"
    reads = whole_number, 1, 100, "a quality"
    suffix = ".webp"

    @override
    def encode(self, photo: Photo) -> bytes:
        return encoded(".webp", photo, [cv2.IMWRITE_WEBP_QUALITY, self.quality])


@dataclass(frozen=True)
class H264(Transform):
    """The first frame of a film, by libx264 at a constant rate factor: what a camera's stream leaves of a photo."""

    factor: int
    kind = "h264"
    example = "h264:28"
    reads = whole_number, 0, 51, "a rate factor"

    @classmethod
    def parse(cls, value: str) -> Transform:
        """`h264:F` with F 0 (hardly a loss) to 51; 23 is the encoder's own. Needs `pip install detguard[video]`."""
        found = super().parse(value)
        try:
            import av  # noqa: F401
        except ImportError:
            raise DetguardError(f"transform '{found}': needs PyAV; pip install 'detguard[video]'") from None
        return found

    @override
    def __call__(self, photo: Photo) -> Photo:
        import av

        height, width = photo.shape[:2]
        # Chroma is halved, so sides are even.
        even = np.pad(photo, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        film = io.BytesIO()
        try:
            with av.open(film, "w", format="mp4") as container:
                stream = container.add_stream("libx264", rate=25, options={"crf": str(self.factor), "threads": "1"})
                stream.width, stream.height, stream.pix_fmt = even.shape[1], even.shape[0], "yuv420p"
                container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
                container.mux(stream.encode())
        except av.error.FFmpegError as error:
            raise DetguardError(f"{width} x {height} px: H.264 cannot hold that ({error}); shrink the photo") from error
        film.seek(0)
        with av.open(film, "r") as read:
            frame = next(read.decode(video=0)).to_ndarray(format="rgb24")
        return np.ascontiguousarray(frame[:height, :width])
