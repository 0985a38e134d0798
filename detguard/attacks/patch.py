"""A patch that hides objects of some classes on whatever photo it is pasted on (Thys et al. 2019)."""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detguard import DetguardError
from detguard.detections import Detections
from detguard.detectors.base import Detector
from detguard.objectives.base import Objective
from detguard.photos import Letterbox, Photo, frames_tensor, photo_size, read_photo
from detguard.transforms.paste import Look, Spot, paste

# Darker and brighter is not printed as it is shown: bounds instead of a list of a printer's colours
# (non-printability score, Sharif et al. 2016, eq. 6).
PRINTABLE = (0.05, 0.95)
# Weight of the total variation beside the loss of a photo's objects, as of Thys et al. (2019).
SMOOTHNESS = 2.5
RECORD_EVERY = 10
CENTIMETRES_PER_INCH = 2.54


@dataclass(frozen=True)
class PatchOptions:
    """How a patch learns; the options of `detguard patch`.

    size: its side, a share of the root of the area of an object's box; pixels: of its side; photos: how many are shown,
    counted again when they come again; hours: at most; rate: of Adam, in 0..1 of brightness, falling to zero; batch:
    photos of a step; conf: what counts as found.
    """

    size: float = 0.3
    pixels: int = 128
    photos: int = 4000
    hours: float | None = None
    rate: float = 0.03
    batch: int = 8
    conf: float = 0.25
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """A photo to learn on: its file, its place in the frame, and its objects there, frame pixels."""

    file: Path
    letterbox: Letterbox
    objects: Detections


def stages(
    detector: Detector, photos: Sequence[tuple[Path, Detections | None]], objective: Objective, conf: float
) -> list[Stage]:
    """The photos that have objects to attack: labelled ones, photo pixels, or without labels what the detector finds.

    Raises:
        DetguardError: there are none, a photo cannot be read, or the detector has no gradient.
    """
    if not detector.differentiable:
        raise DetguardError(f"{detector.name}: has no gradient, by which a patch learns; give another --model")
    made = []
    for file, objects in photos:
        if objects is None:
            photo = read_photo(file)
            objects, shape = detector.detect([photo], conf)[0], (photo.shape[0], photo.shape[1])
        else:
            shape = photo_size(file)[::-1]
        letterbox = detector.letterbox((shape[0], shape[1]))
        boxes = letterbox.boxes_to_frame(objects.boxes)
        if objective.attacked(objects).any():
            made.append(Stage(file, letterbox, Detections(boxes, objects.scores, objects.classes)))
    if not made:
        raise DetguardError("--target: no photo has such an object; give other photos, or label them")
    return made


def train_patch(
    detector: Detector,
    photos: Sequence[Stage],
    objective: Objective,
    options: PatchOptions,
    on_step: Callable[[float, dict[str, float] | None], bool] | None = None,
) -> Photo:
    """Learn one patch, `uint8 [S, S, 3]`, whose loss is low on all photos, however it appears there.

    photos: by `stages`, at least one. on_step: told of the share that is done, 0..1, and at every tenth step of batch,
    photos shown so far, and mean loss since the last time; ends the training when it returns True.
    """
    frames: dict[tuple[int, int], list[Stage]] = {}
    for one in photos:
        frames.setdefault(one.letterbox.frame, []).append(one)
    rng = np.random.default_rng(options.seed)
    generator = torch.Generator(detector.device).manual_seed(options.seed)
    # Grey with a little noise: no colour is nearer than another.
    patch = 0.5 + 0.05 * torch.randn(3, options.pixels, options.pixels, generator=generator, device=detector.device)
    patch = patch.requires_grad_()
    adam = torch.optim.Adam([patch], options.rate)
    started, shown, step = time.monotonic(), 0, 0
    since = torch.zeros((), device=detector.device)
    while (share := _done(options, shown, started)) < 1:
        adam.param_groups[0]["lr"] = options.rate * (1 - share)
        # A photo first and then others of its frame shape, so that all are drawn alike.
        alike = frames[photos[int(rng.integers(len(photos)))].letterbox.frame]
        batch = [alike[i] for i in rng.permutation(len(alike))[: options.batch]]
        loss = patch_loss(detector, batch, objective, patch, options, rng, generator)
        adam.zero_grad()
        (loss + SMOOTHNESS * total_variation(patch)).backward()
        adam.step()
        with torch.no_grad():
            patch.clamp_(*PRINTABLE)
        shown, step, since = shown + len(batch), step + 1, since + loss.detach()
        record = None
        if step % RECORD_EVERY == 0:
            record = {"batch": step, "photos": shown, "loss": float(since) / RECORD_EVERY}
            since = torch.zeros_like(since)
        if on_step and on_step(min(1, _done(options, shown, started)), record):
            break
    return (patch.detach() * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()


def _done(options: PatchOptions, shown: int, started: float) -> float:
    """The share of the training that is done: of the photos, or where there are hours, of them."""
    if options.hours is None:
        return shown / options.photos
    return (time.monotonic() - started) / (3600 * options.hours)


def patch_loss(
    detector: Detector,
    batch: Sequence[Stage],
    objective: Objective,
    patch: Tensor,
    options: PatchOptions,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> Tensor:
    """Scalar: the loss of photos of one frame shape with the patch, float32 [3, S, S], on each object that is attacked.

    Each object's look is drawn from `rng`, its noise from `generator`. A photo's loss is per object: a crowd
    does not outweigh the others.
    """
    attacked = [objective.attacked(one.objects) for one in batch]
    clean = frames_tensor([one.letterbox(read_photo(one.file)) for one in batch], detector.device)
    pasted = [
        paste(
            frame,
            patch,
            [
                Spot.on(box, options.size, one.letterbox.frame, Look.draw(rng))
                for box in one.objects[which].boxes.tolist()
            ],
            generator,
        )
        for frame, one, which in zip(clean, batch, attacked, strict=True)
    ]
    candidates = detector.candidates(torch.stack(pasted))
    aims = [
        objective.aim(candidates[i], one.objects, which)
        for i, (one, which) in enumerate(zip(batch, attacked, strict=True))
    ]
    counts = torch.stack([which.sum() for which in attacked]).to(detector.device)
    return (objective.loss(candidates, aims, options.conf) / counts).mean()


def total_variation(patch: Tensor) -> Tensor:
    """Scalar: the mean difference of neighbours in a patch [3, S, S]: what is smooth can be printed (Thys et al.)."""
    return patch.diff(dim=1).abs().mean() + patch.diff(dim=2).abs().mean()


def printable_png(patch: Photo, centimetres: float) -> bytes:
    """A PNG of the patch, `uint8 [S, S, 3]`, that is printed with a side of so many centimetres."""
    stream = io.BytesIO()
    dpi = len(patch) / centimetres * CENTIMETRES_PER_INCH
    Image.fromarray(patch).save(stream, "PNG", dpi=(dpi, dpi))
    return stream.getvalue()
