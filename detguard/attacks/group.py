"""The transformation-robust group attack: fool the photo and all its transformed copies at once.

Repeat: transform the adversarial photo, detect on it and on every copy in one batch, stop when all are fooled,
else step against the aggregated gradient of their losses, within an L-inf budget. The 8-bit photo that would be
saved is what the detector is shown at every step.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from detguard import DetguardError
from detguard.attacks.budget import linf_bounds, project_linf, random_start
from detguard.detections import Detections, suppress
from detguard.detectors.base import Detector, to_photo
from detguard.objectives.base import Objective
from detguard.photos import Letterbox, Photo, frames_tensor, photo_seed
from detguard.transforms.base import GradientRule, Transform

Aggregate = Literal["mean", "weighted", "max"]


@dataclass(frozen=True)
class AttackOptions:
    """How to search. Levels are those of 8-bit pixels.

    conf: confidence that counts as found; eps: budget, step: per iteration, both in levels;
    weights: one per member (photo first), for `aggregate="weighted"`; margin: the loop only stops when nothing is
    found at `conf * (1 - margin)` either, and what is wanted is found as far over `conf`, which buys survival of
    transforms that were not in the group;
    stop: end as soon as all are fooled; without it all `steps` are made and the one of lowest loss counts.
    """

    conf: float = 0.25
    iou: float = 0.7
    eps: int = 4
    step: float = 1
    steps: int = 100
    aggregate: Aggregate = "mean"
    weights: tuple[float, ...] | None = None
    gradient: GradientRule = "straight-through"
    momentum: float = 0.0
    random_start: bool = False
    margin: float = 0.05
    seed: int = 0
    batch: int = 1
    stop: bool = True

    def check(self, members: int) -> None:
        """Raise DetguardError if the weights do not match the `members` of the group or cannot be weighed with."""
        if (self.weights is not None) != (self.aggregate == "weighted"):
            raise DetguardError("--weights: goes with --aggregate weighted, and that with --weights")
        if self.weights is not None and len(self.weights) != members:
            raise DetguardError(f"--weights: expected {members} numbers, one for the photo and each transform")
        if self.weights is not None and not (min(self.weights) >= 0 and 0 < sum(self.weights) < math.inf):  # nor NaN
            raise DetguardError("--weights: expected numbers of 0 or more, not all 0, as in 1,1,2")


@dataclass
class Attempt:
    """The attack on one photo as it stands."""

    key: str
    photo: Photo
    clean: Detections
    letterbox: Letterbox
    objects: Detections
    attacked: Tensor
    bounds: tuple[Tensor, Tensor]
    x: Tensor
    aim: Any = None
    steps: int = 0
    fooled: list[bool] = field(default_factory=list)
    failed: bool = False
    velocity: Tensor | None = None
    best: Photo | None = None
    best_rank: tuple[int, float] = (-1, 0.0)

    @property
    def adversarial(self) -> Photo:
        """The photo to save, `uint8 [H, W, 3]`: the last one, or when the attack failed the best one seen."""
        return self.levels if self.best is None or self.done else self.best

    @property
    def levels(self) -> Photo:
        """`x` rounded to whole levels, as it would be saved and as the detector is shown it."""
        return self.x.round().to("cpu", torch.uint8).numpy()

    @property
    def done(self) -> bool:
        """Whether every member of the group is fooled, as the loop sees it; the saved file has the last word."""
        return bool(self.fooled) and all(self.fooled)


def attack_group(
    detector: Detector,
    photos: Iterable[tuple[str, Photo, Detections]],
    objective: Objective,
    transforms: Sequence[Transform],
    options: AttackOptions,
    on_step: Callable[[Sequence[Attempt]], None] | None = None,
) -> Iterator[Attempt]:
    """Attack photos, given as (key, `uint8 [H, W, 3]`, clean detections); yields each attempt as it ends.

    Up to `options.batch` photos of one frame shape share a forward and a backward; a finished photo leaves and the
    next takes its place; `on_step` is shown the active ones after every step. The key seeds a photo's random start,
    so that its result does not depend on its neighbours.

    Raises:
        DetguardError: `weights` do not match the group.
    """
    options.check(1 + len(transforms))
    waiting: dict[tuple[int, int], deque[Attempt]] = defaultdict(deque)
    source = iter(photos)
    exhausted = False
    while True:
        # Photos of other frame shapes queue up; the fullest shape goes first.
        while not exhausted and all(len(queue) < options.batch for queue in waiting.values()):
            if (item := next(source, None)) is None:
                exhausted = True
            else:
                attempt = _begin(detector, *item, objective, options)
                waiting[attempt.letterbox.frame].append(attempt)
        shape = max(waiting, key=lambda s: len(waiting[s]), default=None)
        if shape is None:
            return
        queue = waiting[shape]
        active = [queue[i] for i in range(min(options.batch, len(queue)))]
        _iterate(detector, active, objective, transforms, options)
        if on_step:
            on_step(active)
        for attempt in active:
            if attempt.done or attempt.failed:
                queue.remove(attempt)
                yield attempt
        if not queue:
            del waiting[shape]


def _begin(
    detector: Detector, key: str, photo: Photo, clean: Detections, objective: Objective, options: AttackOptions
) -> Attempt:
    letterbox = detector.letterbox((photo.shape[0], photo.shape[1]))
    bounds = linf_bounds(photo, options.eps, detector.device)
    if options.random_start:
        x = random_start(bounds, photo_seed(key, options.seed))
    else:
        x = torch.from_numpy(photo).to(detector.device).float()
    objects = Detections(letterbox.boxes_to_frame(clean.boxes), clean.scores, clean.classes)
    return Attempt(key, photo, clean, letterbox, objects, objective.attacked(clean), bounds, x)


def _iterate(
    detector: Detector,
    attempts: Sequence[Attempt],
    objective: Objective,
    transforms: Sequence[Transform],
    options: AttackOptions,
) -> None:
    """One forward and at most one backward for all members of all attempts; updates the attempts in place."""
    conf = options.conf * (1 - options.margin)
    # What is to be found must be as far over the confidence, what is not as far under it.
    sure = 1 - (1 - options.conf) * (1 - options.margin)
    members = 1 + len(transforms)
    shown = [attempt.levels for attempt in attempts]

    def frame(index: int) -> Photo:
        photo, member = shown[index // members], index % members
        return attempts[index // members].letterbox(transforms[member - 1](photo) if member else photo)

    frames = frames_tensor([frame(i) for i in range(members * len(attempts))], detector.device).requires_grad_()
    candidates = detector.candidates(frames)
    found = suppress(candidates, conf, options.iou) if options.stop else []
    for i, attempt in enumerate(attempts):
        group = found[i * members : (i + 1) * members]
        placed = [to_photo(d, attempt.letterbox) for d in group]
        attempt.fooled = [objective.success(attempt.clean, d) for d in placed]
        if objective.raises:
            both = zip(attempt.fooled, placed, strict=True)
            attempt.fooled = [fooled and objective.success(attempt.clean, d.above(sure)) for fooled, d in both]
        if attempt.aim is None:
            attempt.aim = objective.aim(candidates[i * members : i * members + 1], attempt.objects, attempt.attacked)
        attempt.failed = not attempt.done and attempt.steps >= options.steps
    running = [i for i, attempt in enumerate(attempts) if not attempt.done]
    if not running:
        return
    aims = [attempt.aim for attempt in attempts for _ in range(members)]
    losses = objective.loss(candidates, aims, conf).view(-1, members).sum(1)
    for i in running:
        rank = (sum(attempts[i].fooled), -losses[i].item())
        if attempts[i].best is None or rank > attempts[i].best_rank:
            attempts[i].best, attempts[i].best_rank = shown[i], rank
    if all(attempts[i].failed for i in running):
        return
    (gradients,) = torch.autograd.grad(losses[running].sum(), frames)
    for i in running:
        if not attempts[i].failed:
            group_gradients = gradients[i * members : (i + 1) * members]
            gradient = photo_gradient(group_gradients, shown[i], attempts[i].letterbox, transforms, options)
            _update(attempts[i], gradient, options)


def photo_gradient(
    gradients: Tensor, photo: Photo, letterbox: Letterbox, transforms: Sequence[Transform], options: AttackOptions
) -> Tensor:
    """The members' gradients at their frames, [members, 3, H', W'], as one gradient at the photo, [3, H, W]."""
    # Straight through a median or a JPEG, a change of single pixels between untouched ones would be lost: the
    # gradient is spread to the pixels that the letterbox does not read. Exact rules find such pixels themselves.
    spread = options.gradient == "straight-through"
    if spread and options.aggregate != "max":
        # All are linear and the members share their letterbox: aggregated first, only one is brought back.
        return letterbox.pull_back(aggregate_gradients(gradients, options), spread)
    back = [letterbox.pull_back(gradient, spread) for gradient in gradients]
    if options.gradient == "exact":
        back[1:] = [t.pull_back(photo, gradient) for t, gradient in zip(transforms, back[1:], strict=True)]
    return aggregate_gradients(torch.stack(back), options)


def aggregate_gradients(gradients: Tensor, options: AttackOptions) -> Tensor:
    """Gradients [members, ...] -> one: arithmetic mean, mean by `weights`, or each element of largest magnitude."""
    if options.aggregate == "max":
        return gradients.gather(0, gradients.abs().argmax(0, keepdim=True))[0]
    weights = options.weights or (1.0,) * len(gradients)
    # Written out: torch's own reductions copy gradients that are channels last in memory.
    total = gradients[0] * (weights[0] / sum(weights))
    for weight, gradient in zip(weights[1:], gradients[1:], strict=True):
        total = total.add(gradient, alpha=weight / sum(weights))
    return total


def _update(attempt: Attempt, gradient: Tensor, options: AttackOptions) -> None:
    """One signed step against `gradient` [3, H, W], projected onto the budget."""
    if options.momentum:
        # Dong et al. 2018, "Boosting Adversarial Attacks with Momentum", eq. 6.
        gradient = gradient / gradient.abs().mean().clamp(min=1e-20)
        if attempt.velocity is not None:
            gradient = gradient + options.momentum * attempt.velocity
        attempt.velocity = gradient
    x = attempt.x.add_(gradient.sign().permute(1, 2, 0), alpha=-options.step)
    attempt.x = project_linf(x, attempt.bounds)
    attempt.steps += 1
