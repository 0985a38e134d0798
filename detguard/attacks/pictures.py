"""One picture that is learned on many photos and changes each of them: a patch, or a universal perturbation.

A picture is square, float32 [3, S, S] RGB while it is learned, and a PNG afterwards. A kind is a class in a file of its
own, which says how photos are changed by it.
"""

import io
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from detguard import DetguardError, defaults
from detguard.detections import Detections
from detguard.detectors.base import Detector
from detguard.detectors.checkpoint import read_state, same_form
from detguard.engine import with_gradients
from detguard.files import write_file
from detguard.objectives.base import Objective
from detguard.photos import Letterbox, Photo, frames_tensor, photo_seed, read_photo

RECORD_EVERY = 10
CHECKPOINT_SECONDS = 30.0


@dataclass(frozen=True)
class Learning:
    """How a picture is learned.

    Attributes:
        photos: how many are shown, counted again when they come again.
        hours: how long at most, instead.
        rate: of Adam, a share of the range of the picture's values, falling to zero.
        batch: photos of a step.
        conf: confidence over which an object counts as found, 0..1.
        seed: of all that is random.
    """

    photos: int = defaults.Picture.photos
    hours: float | None = None
    rate: float = defaults.Picture.rate
    batch: int = defaults.Picture.batch
    conf: float = defaults.Picture.conf
    seed: int = defaults.Picture.seed


@dataclass(frozen=True)
class Stage:
    """A photo to learn on: its file, its place in the frame, its objects there, frame pixels, and which are attacked.

    attacked: bool [K] of the objects.
    """

    file: Path
    letterbox: Letterbox
    objects: Detections
    attacked: Tensor


class Picture(ABC):
    """How a kind of picture changes photos. pixels: of its side; bounds: of its values while it is learned."""

    kind: ClassVar[str]
    pixels: int

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The least and the largest value of the picture while it is learned."""

    @abstractmethod
    def start(self, generator: torch.Generator) -> Tensor:
        """The picture before anything is learned, [3, S, S], on the generator's device."""

    @abstractmethod
    def change(self, frame: Tensor, picture: Tensor, stage: Stage, rng: np.random.Generator) -> Tensor:
        """A frame, [3, H, W], 0..1, changed by the picture; differentiable in the picture.

        rng: of all that is drawn at random, such as how a patch appears on each object.
        """

    @abstractmethod
    def on_photo(self, photo: Photo, picture: Photo, boxes: Tensor) -> Photo:
        """A photo, `uint8 [H, W, 3]`, changed by the picture as it is saved; boxes: [N, 4], of what is attacked."""

    @abstractmethod
    def image(self, picture: Tensor) -> Photo:
        """The picture as it is saved, `uint8 [S, S, 3]`."""

    def shown(self, picture: Photo) -> tuple[Photo, str]:
        """The saved picture as a page shows it, and what was done for that, if anything."""
        return picture, ""

    def roughness(self, picture: Tensor) -> Tensor:
        """Scalar: what is added to the loss of the photos."""
        return picture.new_zeros(())


def stages(
    detector: Detector, photos: Sequence[tuple[Path, Detections | None]], objective: Objective, conf: float
) -> list[Stage]:
    """The photos that have objects to attack: labelled ones, photo pixels, or without labels what the detector finds.

    Raises:
        DetguardError: there are none, a photo cannot be read, or the detector has no gradient.
    """
    if not detector.differentiable:
        raise DetguardError(f"{detector.name}: has no gradient, by which a picture learns; give another `detector`")
    made = []
    for file, objects in photos:
        photo = read_photo(file)  # where labels say what it shows, too: one cut short would end the learning midway
        objects = detector.detect([photo], conf)[0] if objects is None else objects
        letterbox = detector.letterbox(photo.shape[:2])
        placed = Detections(letterbox.boxes_to_frame(objects.boxes), objects.scores, objects.classes)
        if (attacked := objective.attacked(objects)).any():
            made.append(Stage(file, letterbox, placed, attacked))
    if not made:
        raise DetguardError("`target`: no photo has such an object; give other photos, or label them")
    return made


@dataclass
class State:
    """Where the learning is: steps done, photos shown, seconds spent, the sum of losses since the last that was told,
    the picture, and Adam's moments and its count.
    """

    step: int
    shown: int
    spent: float
    since: Tensor
    picture: Tensor
    adam: dict[str, Tensor]

    def done(self, learning: Learning) -> float:
        """The share of the learning that is over: of the photos, or where there are hours, of them."""
        share = self.shown / learning.photos if learning.hours is None else self.spent / (3600 * learning.hours)
        return min(1.0, share)

    def save(self, file: Path) -> None:
        """Write it, whole or not at all."""
        stream = io.BytesIO()
        moved = {"since": self.since.cpu(), "picture": self.picture.cpu()}
        torch.save(vars(self) | moved | {"adam": {k: v.cpu() for k, v in self.adam.items()}}, stream)
        write_file(file, stream.getvalue())

    def load(self, file: Path) -> "State":
        """What a file of `save` holds, for a picture like this one's.

        Raises:
            DetguardError: it is damaged, or of another picture.
        """
        state = read_state(file)
        if not same_form(state, vars(self)) or state["step"] < 0 or state["shown"] < 0 or not state["spent"] >= 0:
            raise DetguardError(f"{file}: not a state of this run; delete it to begin again")
        device = self.picture.device
        state["adam"] = {
            # Of which torch would ask the device at each step.
            name: value if name == "step" else value.to(device)
            for name, value in state["adam"].items()
        }
        return State(**state | {name: state[name].to(device) for name in ("since", "picture")})


@with_gradients
def learn_picture(
    detector: Detector,
    photos: Sequence[Stage],
    objective: Objective,
    kind: Picture,
    learning: Learning,
    on_step: Callable[[float, dict[str, float] | None], bool] | None = None,
    checkpoint: Path | None = None,
) -> Photo:
    """Learn one picture, `uint8 [S, S, 3]`, whose loss is low on all photos.

    Every step draws by its own number, so that one that is taken after a stop is the one that would have been.

    Args:
        photos: by `stages`, at least one.
        on_step: called with the share that is done, 0..1, and at every tenth step of batch, photos shown so far, and
            mean loss since the last time; ends the learning when it returns True.
        checkpoint: file to go on from, and to write to.
    """
    frames: dict[tuple[int, int], list[Stage]] = {}
    for one in photos:
        frames.setdefault(one.letterbox.frame, []).append(one)
    generator = torch.Generator(detector.device).manual_seed(learning.seed)
    picture = kind.start(generator)
    moments = {name: torch.zeros_like(picture) for name in ("exp_avg", "exp_avg_sq")}
    at = State(0, 0, 0.0, torch.zeros((), device=detector.device), picture, {"step": torch.zeros(()), **moments})
    if checkpoint is not None and checkpoint.exists():
        at = at.load(checkpoint)
    picture = at.picture.requires_grad_()
    low, high = kind.bounds
    adam = torch.optim.Adam([picture], learning.rate * (high - low))
    adam.state[picture].update(at.adam)
    started, written = time.monotonic() - at.spent, time.monotonic()
    while (share := at.done(learning)) < 1:
        adam.param_groups[0]["lr"] = learning.rate * (high - low) * (1 - share)
        rng = np.random.default_rng(photo_seed(f"step {at.step}", learning.seed))
        # A photo first and then others of its frame shape, so that all are drawn alike.
        alike = frames[photos[int(rng.integers(len(photos)))].letterbox.frame]
        batch = [alike[i] for i in rng.permutation(len(alike))[: learning.batch]]
        loss = picture_loss(detector, batch, objective, kind, picture, learning.conf, rng)
        adam.zero_grad()
        (loss + kind.roughness(picture)).backward()
        adam.step()
        with torch.no_grad():
            picture.clamp_(low, high)
        at.shown, at.step, at.spent = at.shown + len(batch), at.step + 1, time.monotonic() - started
        at.since, record = at.since + loss.detach(), None
        if at.step % RECORD_EVERY == 0:
            record = {"batch": at.step, "photos": at.shown, "loss": float(at.since) / RECORD_EVERY}
            at.since = torch.zeros_like(at.since)
        stop = bool(on_step and on_step(at.done(learning), record))
        over = stop or at.done(learning) >= 1
        if checkpoint is not None and (over or time.monotonic() - written > CHECKPOINT_SECONDS):
            replace(at, picture=picture.detach(), adam=dict(adam.state[picture])).save(checkpoint)
            written = time.monotonic()
        if stop:
            break
    return kind.image(picture.detach())


def picture_loss(
    detector: Detector,
    batch: Sequence[Stage],
    objective: Objective,
    kind: Picture,
    picture: Tensor,
    conf: float,
    rng: np.random.Generator,
) -> Tensor:
    """Scalar: the loss of photos of one frame shape that the picture, float32 [3, S, S], has changed.

    A photo's loss is per object: a crowd does not outweigh the others.
    """
    clean = frames_tensor([one.letterbox(read_photo(one.file)) for one in batch], detector.device)
    changed = [kind.change(frame, picture, one, rng) for frame, one in zip(clean, batch, strict=True)]
    candidates = detector.candidates(torch.stack(changed))
    aims = [objective.aim(candidates[i : i + 1], one.objects, one.attacked) for i, one in enumerate(batch)]
    counts = torch.stack([one.attacked.sum() for one in batch]).to(detector.device)
    return (objective.loss(candidates, aims, conf) / counts).mean()
