"""What every detector promises, tested on a photo: what is attacked is what users run, and nothing changes by it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detguard import first_line
from detguard.detections import Detections
from detguard.detectors.base import Detector
from detguard.photos import Photo, frames_tensor

# How far two ways to the same detections may be apart: pixels of the photo, and confidence.
PIXELS, CONFIDENCE = 0.5, 1e-3
# What is over this confidence is compared: by default little, for a network with random weights finds little.
CONF = 0.05


@dataclass(frozen=True)
class Promise:
    """One promise, kept or not.

    Attributes:
        name: what is promised.
        remedy: what to look at where it is not kept.
        wrong: what was seen then; None: it is kept.
        skipped: why this detector does not make it.
    """

    name: str
    remedy: str
    wrong: str | None = None
    skipped: str | None = None


def check_contract(detector: Detector, photo: Photo, conf: float = CONF) -> Iterator[Promise]:
    """Test each promise on a photo.

    Args:
        detector: of any family, or yours.
        photo: `uint8 [H, W, 3]` RGB, in which something is found over `conf`.
        conf: confidence over which detections are compared, 0..1; low, for a network with random weights finds little.

    Yields:
        Each promise, kept or not.
    """
    for name, (test, remedy) in PROMISES.items():
        if test is _gradient and not detector.differentiable:
            yield Promise(name, remedy, skipped="it has none: black-box attacks only")
            continue
        try:
            wrong = test(detector, photo, conf)
        except Exception as error:  # of somebody's detector
            wrong = f"{type(error).__name__}: {first_line(error)}"
        yield Promise(name, remedy, wrong)


def _frames(detector: Detector, photo: Photo, number: int = 1) -> Tensor:
    """A photo, and darker ones of it, as one batch."""
    box = detector.letterbox((photo.shape[0], photo.shape[1]))
    return frames_tensor([box((photo * 0.8**i).astype(np.uint8)) for i in range(number)], detector.device)


def _shapes(detector: Detector, photo: Photo, conf: float) -> str | None:
    found = detector.candidates(_frames(detector, photo, 2))
    shape = (2, found.boxes.shape[1], len(detector.class_names))
    if tuple(found.logits.shape) != shape:
        return f"logits {tuple(found.logits.shape)}, expected {shape}"
    if tuple(found.boxes.shape) not in ((*shape[:2], 4), (*shape, 4)):
        return f"boxes {tuple(found.boxes.shape)}, expected {(*shape[:2], 4)} or {(*shape, 4)}"
    if sorted(detector.class_names) != list(range(len(detector.class_names))):
        return "class_names: expected a name for each index from 0"
    return None


def _something(detector: Detector, photo: Photo, conf: float) -> str | None:
    return (
        None if len(detector.predict(photo, conf)) else f"nothing over {conf}: give another `photo` or a lower `conf`"
    )


def _gradient(detector: Detector, photo: Photo, conf: float) -> str | None:
    frames = _frames(detector, photo).requires_grad_()
    (gradient,) = torch.autograd.grad(detector.candidates(frames).logits.amax(2).topk(5).values.sum(), frames)
    if not gradient.isfinite().all():
        return "it is not finite"
    share = float((gradient != 0).float().mean())
    return None if share > 0.01 else f"it is 0 for {100 - 100 * share:.3g} % of the values"


def _same(a: Detections, b: Detections) -> str | None:
    if len(a) != len(b):
        return f"{len(a)} and {len(b)} detections"
    if not torch.equal(a.classes, b.classes):
        return "other classes, or another order"
    if not len(a):
        return None
    apart, surer = (a.boxes - b.boxes).abs().max(), (a.scores - b.scores).abs().max()
    if apart > PIXELS or surer > CONFIDENCE:
        return f"boxes up to {apart:.2g} px and confidences up to {surer:.2g} apart"
    return None


def _paths(detector: Detector, photo: Photo, conf: float) -> str | None:
    return _same(detector.detect([photo], conf)[0], detector.predict(photo, conf))


def _state(detector: Detector, photo: Photo, conf: float) -> str | None:
    before = detector.state_hash()
    frames = _frames(detector, photo).requires_grad_(detector.differentiable)
    logits = detector.candidates(frames).logits
    if detector.differentiable:
        logits.sum().backward()
    detector.predict(photo, conf)
    if any(parameter.grad is not None for parameter in detector.model.parameters()):
        return "parameters got gradients: freeze them with requires_grad_(False)"
    return None if detector.state_hash() == before else "weights or buffers changed: is it in eval mode?"


def _batch(detector: Detector, photo: Photo, conf: float) -> str | None:
    frames = _frames(detector, photo, 3)
    together, alone = detector.candidates(frames), detector.candidates(frames[2:])
    if together.logits.shape[1:] != alone.logits.shape[1:]:
        return f"{alone.logits.shape[1]} candidates alone and {together.logits.shape[1]} with others"
    apart = (together.logits[2:] - alone.logits).abs().max()
    return None if apart < 0.05 else f"logits up to {apart:.2g} apart"


def _settings(detector: Detector, photo: Photo, conf: float) -> str | None:
    found = detector.predict(photo, conf)
    if len(found) and not (found.scores > conf).all():
        return "predict gives what is under conf"
    if not torch.equal(found.scores, found.scores.sort(descending=True).values):
        return "predict does not give the best first"
    loose, tight = (detector.predict(photo, conf, iou) for iou in (0.95, 0.05))
    if len(loose) < len(tight):
        return f"{len(loose)} detections with an IoU of .95 and {len(tight)} with .05"
    return _same(detector.detect([photo], conf, 0.95)[0], loose)


PROMISES: dict[str, tuple[Callable[[Detector, Photo, float], str | None], str]] = {
    "candidates have the shapes that class_names say": (
        _shapes,
        "logits [B, N, C], boxes [B, N, 4], class_names from 0",
    ),
    "something is found in the photo": (_something, "the class names, the size of frames, or the photo"),
    "the gradient reaches the photo": (_gradient, "no torch.no_grad, detach, numpy or rounding before the logits"),
    "the tensor path finds what predict finds": (_paths, "letterbox, normalization, the scale of boxes, NMS"),
    "attacking changes no state": (_state, "eval mode, frozen parameters, no buffers that count"),
    "a photo's candidates do not depend on its batch": (
        _batch,
        "batch norms in eval mode, a fixed number of boxes",
    ),
    "conf and iou are obeyed": (_settings, "both paths must take the two arguments that predict takes"),
}
