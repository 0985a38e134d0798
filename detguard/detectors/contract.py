"""What every detector promises, tested on a photo: what is attacked is what users run, and nothing changes by it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detguard import first_line
from detguard.detections import Detections
from detguard.detectors.base import Detector, network_of
from detguard.photos import Photo, frames_tensor

# How far two ways to the same detections may be apart: pixels of the photo, and confidence.
PIXELS, CONFIDENCE = 0.5, 1e-3
# What is over this confidence is compared: by default little, for a network with random weights finds little.
CONF = 0.05
# Pixels of the frame; where no box has a side as long, they are shares of the frame, most likely.
SMALL = 2


class Broken(Exception):
    """A promise is not kept; says what was seen."""

    state = "BROKEN"


class Doubtful(Exception):
    """A promise is kept by what is hardly meant; says what was seen."""

    state = "DOUBTFUL"


class Skipped(Exception):
    """A promise cannot be tested; says why."""

    state = "skipped"


@dataclass(frozen=True)
class Promise:
    """One promise, and whether a detector keeps it.

    Attributes:
        name: what is promised.
        remedy: what to look at where it is not kept, or in doubt.
        state: kept, DOUBTFUL: in a way that is hardly meant, BROKEN, or skipped: not made, or not to be tested.
        seen: what was seen, or why it is skipped.
    """

    name: str
    remedy: str
    state: str
    seen: str


def check_contract(detector: Detector, photo: Photo, conf: float = CONF) -> Iterator[Promise]:
    """Test each promise on a photo.

    Args:
        detector: of any family, or yours.
        photo: `uint8 [H, W, 3]` RGB, in which something is found over `conf`.
        conf: confidence over which detections are compared, 0..1; low, for a network with random weights finds little.

    Yields:
        Each promise, in the order of `PROMISES`.
    """
    for name, (test, remedy) in PROMISES.items():
        try:
            state, seen = "kept", test(detector, photo, conf)
        except (Broken, Doubtful, Skipped) as found:
            state, seen = found.state, str(found)
        except Exception as error:  # of somebody's detector
            state, seen = Broken.state, f"{type(error).__name__}: {first_line(error)}"
        yield Promise(name, remedy, state, seen)


def _frames(detector: Detector, photo: Photo, number: int = 1) -> Tensor:
    """A photo, and darker ones of it, as one batch."""
    box = detector.letterbox(photo.shape[:2])
    return frames_tensor([box((photo * 0.8**i).astype(np.uint8)) for i in range(number)], detector.device)


def _shapes(detector: Detector, photo: Photo, conf: float) -> str:
    if not isinstance(detector.device, torch.device):
        raise Broken(f"device {detector.device!r}: expected a torch.device, as torch.device({detector.device!r})")
    found = detector.candidates(_frames(detector, photo, 2))
    shape = (2, found.boxes.shape[1], len(detector.class_names))
    if tuple(found.logits.shape) != shape:
        raise Broken(f"logits {tuple(found.logits.shape)}, expected {shape}")
    if tuple(found.boxes.shape) not in ((*shape[:2], 4), (*shape, 4)):
        raise Broken(f"boxes {tuple(found.boxes.shape)}, expected {(*shape[:2], 4)} or {(*shape, 4)}")
    if sorted(detector.class_names) != list(range(len(detector.class_names))):
        raise Broken("class_names: expected a name for each index from 0")
    low, high = found.logits.min(), found.logits.max()
    if low >= 0 and high <= 1:
        raise Doubtful("all logits lie in 0..1, as confidences do: return them as before the sigmoid")
    return f"{shape[1]} candidates, logits {low:.2g} to {high:.2g}"


def _something(detector: Detector, photo: Photo, conf: float) -> str:
    found = detector.predict(photo, conf)
    if not len(found):
        raise Broken(f"nothing over {conf}: give another `photo` or a lower `conf`")
    boxes = detector.letterbox(photo.shape[:2]).boxes_to_frame(found.boxes)
    if (boxes[:, 2:] - boxes[:, :2]).max() < SMALL:
        raise Doubtful(f"{len(found)} objects, all under {SMALL} px of the frame: are boxes shares of it, not pixels?")
    best, box = found.records(detector.class_names)[0], ", ".join(f"{side:.0f}" for side in found.boxes[0].tolist())
    return f"{len(found)} objects over {conf:g}, first {best['class']} {best['confidence']:.2f} at {box}"


def _gradient(detector: Detector, photo: Photo, conf: float) -> str:
    if not detector.differentiable:
        raise Skipped("it has none: black-box attacks only")
    frames = _frames(detector, photo).requires_grad_()
    logits = detector.candidates(frames).logits
    if not logits.requires_grad:
        raise Broken("the logits are cut off from the frames")
    (gradient,) = torch.autograd.grad(logits.amax(2).topk(5).values.sum(), frames)
    if not gradient.isfinite().all():
        raise Broken("it is not finite")
    share = float((gradient != 0).float().mean())
    if share <= 0.01:
        raise Broken(f"it is 0 for {100 - 100 * share:.3g} % of the values")
    return ""


def _same(a: Detections, b: Detections) -> None:
    if len(a) != len(b):
        raise Broken(f"{len(a)} and {len(b)} detections")
    if not torch.equal(a.classes, b.classes):
        raise Broken("other classes, or another order")
    if not len(a):
        return
    apart, surer = (a.boxes - b.boxes).abs().max(), (a.scores - b.scores).abs().max()
    if apart > PIXELS or surer > CONFIDENCE:
        raise Broken(f"boxes up to {apart:.2g} px and confidences up to {surer:.2g} apart")


def _paths(detector: Detector, photo: Photo, conf: float) -> str:
    found, called = detector.detect([photo], conf)[0], []

    def detect(*args: Any, **options: Any) -> list[Detections]:
        called.append(True)
        return type(detector).detect(detector, *args, **options)

    vars(detector)["detect"] = detect
    try:
        _same(found, detector.predict(photo, conf))
    finally:
        del vars(detector)["detect"]
    if called:
        raise Skipped("predict is detect: compared with itself, which shows nothing")
    return ""


def _state(detector: Detector, photo: Photo, conf: float) -> str:
    before = detector.state_hash()
    frames = _frames(detector, photo).requires_grad_(detector.differentiable)
    logits = detector.candidates(frames).logits
    if logits.requires_grad:
        logits.sum().backward()
    detector.predict(photo, conf)
    if any(parameter.grad is not None for parameter in network_of(detector).parameters()):
        raise Broken("parameters got gradients: freeze them with requires_grad_(False)")
    if detector.state_hash() != before:
        raise Broken("weights or buffers changed: is it in eval mode?")
    return ""


def _batch(detector: Detector, photo: Photo, conf: float) -> str:
    frames = _frames(detector, photo, 3)
    together, alone = detector.candidates(frames), detector.candidates(frames[2:])
    if together.logits.shape[1:] != alone.logits.shape[1:]:
        raise Broken(f"{alone.logits.shape[1]} candidates alone and {together.logits.shape[1]} with others")
    there, here = together[2:], alone
    if alone.end_to_end:  # best first: where two are as good, rounding says which comes first
        both = [torch.cat([one.logits[0], one.best_boxes[0]], 1) for one in (there, here)]
        order = torch.cdist(both[1], both[0]).argmin(1)
        apart = (there.logits[0].index_select(0, order) - here.logits[0]).abs().max()
    else:
        apart = (there.logits - here.logits).abs().max()
    if not apart < 0.05:
        raise Broken(f"logits up to {apart:.2g} apart")
    return ""


def _settings(detector: Detector, photo: Photo, conf: float) -> str:
    found = detector.predict(photo, conf)
    if len(found) and not (found.scores > conf).all():
        raise Broken("predict gives what is under conf")
    if not torch.equal(found.scores, found.scores.sort(descending=True).values):
        raise Broken("predict does not give the best first")
    loose, tight = (detector.predict(photo, conf, iou) for iou in (0.95, 0.05))
    if len(loose) < len(tight):
        raise Broken(f"{len(loose)} detections with an IoU of .95 and {len(tight)} with .05")
    _same(detector.detect([photo], conf, 0.95)[0], loose)
    return ""


PROMISES: dict[str, tuple[Callable[[Detector, Photo, float], str], str]] = {
    "candidates have the shapes that class_names say": (
        _shapes,
        "logits [B, N, C], boxes [B, N, 4], class_names from 0, device a torch.device",
    ),
    "something is found in the photo": (
        _something,
        "the class names, the size of frames, the scale of boxes, or the photo",
    ),
    "the gradient reaches the photo": (_gradient, "no torch.no_grad, detach, numpy or rounding before the logits"),
    "the tensor path finds what predict finds": (_paths, "letterbox, normalization, the scale of boxes, NMS"),
    "attacking changes no state": (_state, "eval mode, frozen parameters, no buffers that count"),
    "a photo's candidates do not depend on its batch": (
        _batch,
        "batch norms in eval mode, a fixed number of boxes",
    ),
    "conf and iou are obeyed": (_settings, "both paths must take the two arguments that predict takes"),
}
