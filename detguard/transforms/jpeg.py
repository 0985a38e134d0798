"""JPEG compression by libjpeg, chroma subsampled 4:2:0."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from detguard.photos import Photo, encode_jpeg, frames_tensor
from detguard.transforms.base import Encoded, whole_number


@dataclass(frozen=True)
class Jpeg(Encoded):
    """Encode and decode at a quality of 1..100. The surrogate gradient is that of a JPEG with smooth rounding."""

    quality: int
    kind = "jpeg"
    example = "jpeg:75"
    reads = whole_number, 1, 100, "a quality"
    suffix = ".jpg"

    @override
    def encode(self, photo: Photo) -> bytes:
        return encode_jpeg(photo, self.quality)

    @override
    def pull_back(self, photo: Photo, gradient: Tensor) -> Tensor:
        """Surrogate: the gradient of kornia's differentiable codec (Reich et al. 2024, WACV) at this photo."""
        from kornia.enhance import jpeg_codec_differentiable  # late: takes long to import

        quality = torch.tensor([float(self.quality)], device=gradient.device)
        with torch.enable_grad():
            planes = frames_tensor([photo], gradient.device).requires_grad_()
            coded = jpeg_codec_differentiable(planes, quality)
        (back,) = torch.autograd.grad(coded, planes, gradient[None])
        return back[0]
