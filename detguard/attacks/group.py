"""The transformation-robust group attack: fool the photo and all its transformed copies at once.

Repeat: transform the adversarial photo, detect on it and on every copy in one batch, stop when all are fooled,
else step against the aggregated gradient of their losses, within a budget. The 8-bit photo that would be saved is what
the detector is shown at every step. How far it may go (`budgets.py`), how it moves (`steps.py`), what is wanted
(`objectives`) and where transforms take its pixels (`transforms`) are asked of these.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from detguard import DetguardError
from detguard.attacks.budgets import Budget, Linf, parse_budget
from detguard.attacks.steps import Rule, rule_named
from detguard.detections import Candidates, Detections, suppress
from detguard.detectors.base import Detector, to_photo
from detguard.objectives.base import Objective
from detguard.photos import Letterbox, Photo, frames_tensor, photo_seed
from detguard.transforms.base import GradientRule, Transform, seen

Aggregate = Literal["mean", "weighted", "max"]
DEFAULT = Linf(4)
# Draws in a row that must be fooled before a group with random members counts as fooled.
STEADY = 5


@dataclass(frozen=True)
class AttackOptions:
    """How to search.

    conf: confidence that counts as found; budget: how far the photo may go; rule: how it moves, one of `RULES`, and
    step: how far per iteration, in the unit of the budget;
    weights: one per member (photo first), for `aggregate="weighted"`; margin: the loop only stops when nothing is
    found at `conf * (1 - margin)` either, and what is wanted is found as far over `conf`, which buys survival of
    transforms that were not in the group;
    smallest: search for the least budget that fools; stop: end as soon as all are fooled, of random members `STEADY`
    draws in a row; without it all `steps` are made and the one of lowest loss counts.
    """

    conf: float = 0.25
    iou: float = 0.7
    budget: Budget = DEFAULT
    step: float = 1
    steps: int = 100
    rule: str = "steepest"
    aggregate: Aggregate = "mean"
    weights: tuple[float, ...] | None = None
    gradient: GradientRule = "straight-through"
    momentum: float = 0.0
    random_start: bool = False
    margin: float = 0.05
    seed: int = 0
    batch: int = 1
    smallest: bool = False
    stop: bool = True

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AttackOptions":
        """From what a run keeps of them.

        Raises:
            DetguardError: there is no such budget.
        """
        search = dict(config)
        budget = parse_budget(*(search.pop(name) for name in ("norm", "eps", "mask")))
        weights = search.pop("weights")
        return cls(**search, budget=budget, weights=tuple(weights) if weights else None)

    def config(self) -> dict[str, Any]:
        """What a run keeps of them, as plain values; `stop` is left out, as every run stops."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("budget", "stop")}
        weights = list(self.weights) if self.weights else None
        return self.budget.config() | kept | {"weights": weights}

    def check(self, members: int) -> None:
        """Raise DetguardError if there is no such rule, or the weights do not match the `members` of the group."""
        rule_named(self.rule)
        if (self.weights is not None) != (self.aggregate == "weighted"):
            raise DetguardError("--weights: goes with --aggregate weighted, and that with --weights")
        if self.weights is not None and len(self.weights) != members:
            raise DetguardError(f"--weights: expected {members} numbers, one for the photo and each transform")
        if self.weights is not None and not (min(self.weights) >= 0 and 0 < sum(self.weights) < math.inf):  # nor NaN
            raise DetguardError("--weights: expected numbers of 0 or more, not all 0, as in 1,1,2")


@dataclass(frozen=True)
class Member:
    """What one transform, as it is drawn, makes of a photo of one shape; None stands for the photo itself."""

    transform: Transform | None
    shape: tuple[int, int]
    letterbox: Letterbox
    moves: bool

    @property
    def straight(self) -> bool:
        """Whether a gradient at the picture may be taken for one at the photo."""
        return self.transform is None or self.transform.straight

    @classmethod
    def of(cls, detector: Detector, transform: Transform | None, shape: tuple[int, int]) -> "Member":
        """That of a photo of (height, width)."""
        warp = transform.warp(shape) if transform else None
        return cls(transform, shape, detector.letterbox(warp.picture if warp else shape), warp is not None)

    def frame(self, photo: Photo) -> Photo:
        """What the detector is shown."""
        return self.letterbox(self.transform(photo) if self.transform else photo)

    def seen(self, attempt: "Attempt") -> tuple[Detections, Tensor]:
        """What was found in the clean photo as it lies in the picture, and which of that is attacked."""
        return seen(self.transform, self.shape, attempt.clean, attempt.attacked)

    def aim(self, objective: Objective, candidates: Candidates, attempt: "Attempt") -> Any:
        """What the objective needs to know of the frame, of which `candidates` are."""
        clean, attacked = self.seen(attempt)
        placed = Detections(self.letterbox.boxes_to_frame(clean.boxes), clean.scores, clean.classes)
        return objective.aim(candidates, placed, attacked)

    def fooled(self, objective: Objective, attempt: "Attempt", found: Detections, sure: float) -> bool:
        """Whether `found` in the picture is what is wanted; where something is to be found, over `sure` as well."""
        clean, attacked = self.seen(attempt)
        return objective.success(clean, found, attacked) and (
            not objective.raises or objective.success(clean, found.above(sure), attacked)
        )

    def pull_back(self, photo: Photo, gradient: Tensor, options: "AttackOptions") -> Tensor:
        """Gradient at the frame, [3, H', W'], at the photo, [3, H, W]."""
        # Straight through a median or a JPEG, a change of single pixels between untouched ones would be lost: the
        # gradient is spread to the pixels that the letterbox does not read. Exact rules find such pixels themselves.
        exact = options.gradient == "exact"
        gradient = self.letterbox.pull_back(gradient, spread=not exact)
        return (
            self.transform.pull_back(photo, gradient) if self.transform and (exact or not self.straight) else gradient
        )


@dataclass
class Attempt:
    """The attack on one photo as it stands."""

    key: str
    photo: Photo
    clean: Detections
    attacked: Tensor
    original: Tensor
    x: Tensor
    rule: Rule
    rng: np.random.Generator
    members: list[Member]
    aims: list[Any]
    steps: int = 0
    fooled: list[bool] = field(default_factory=list)
    in_a_row: int = 0
    enough: int = 1
    failed: bool = False
    best: Photo | None = None
    best_members: list[Member] = field(default_factory=list)
    best_rank: tuple[int, float] = (-1, 0.0)

    @property
    def adversarial(self) -> Photo:
        """The photo to save, `uint8 [H, W, 3]`: the last one, or when the attack failed the best one seen."""
        return self.levels if self.best is None or self.done else self.best

    @property
    def used(self) -> float:
        """How much of the budget `adversarial` uses, in its unit."""
        return self.rule.budget.used(self.adversarial, self.photo)

    @property
    def drawn(self) -> list[Transform]:
        """The transforms of the group as they were drawn for `adversarial`."""
        members = self.members if self.best is None or self.done else self.best_members
        return [member.transform for member in members if member.transform]

    @property
    def levels(self) -> Photo:
        """`x` in whole levels, as it would be saved and as the detector is shown it."""
        return self.rule.budget.levels(self.x, self.original).to("cpu", torch.uint8).numpy()

    @property
    def done(self) -> bool:
        """Whether every member of the group was fooled often `enough` in a row, as the loop sees it.

        The saved file has the last word.
        """
        return self.in_a_row >= self.enough


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
                attempt = _begin(detector, *item, objective, transforms, options)
                waiting[attempt.members[0].letterbox.frame].append(attempt)
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
    detector: Detector,
    key: str,
    photo: Photo,
    clean: Detections,
    objective: Objective,
    transforms: Sequence[Transform],
    options: AttackOptions,
) -> Attempt:
    shape = (photo.shape[0], photo.shape[1])
    attacked = objective.attacked(clean)
    budget = options.budget.on(shape, clean[attacked].boxes)
    original = torch.from_numpy(photo).to(detector.device).float()
    seed = photo_seed(key, options.seed)
    x = budget.start(original, seed) if options.random_start else original
    rule = rule_named(options.rule)(budget, original, options.step, options.steps, options.momentum)
    members = [Member.of(detector, transform, shape) for transform in (None, *transforms)]
    rng = np.random.default_rng(seed)
    enough = STEADY if any(transform.draw(rng) is not transform for transform in transforms) else 1
    aims: list[Any] = [None] * len(members)
    return Attempt(key, photo, clean, attacked, original, x, rule, rng, members, aims, enough=enough)


def _draw(detector: Detector, attempt: Attempt, transforms: Sequence[Transform]) -> None:
    """Draw anew what is random among the members; what is aimed at in their frames moves with them."""
    for number, transform in enumerate(transforms, 1):
        drawn = transform.draw(attempt.rng)
        if drawn is not transform:
            attempt.members[number] = Member.of(detector, drawn, attempt.members[0].shape)
            attempt.aims[number] = None


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
    count = 1 + len(transforms)
    for attempt in attempts:
        _draw(detector, attempt, transforms)
    shown = [attempt.levels for attempt in attempts]
    passes = _look(detector, [m.frame(photo) for a, photo in zip(attempts, shown, strict=True) for m in a.members])
    for attempt in attempts:
        attempt.fooled = [False] * count if options.stop else []
    for numbers, _, candidates in passes:
        for i, found in zip(numbers, suppress(candidates, conf, options.iou) if options.stop else (), strict=False):
            attempt, member = attempts[i // count], attempts[i // count].members[i % count]
            attempt.fooled[i % count] = member.fooled(objective, attempt, to_photo(found, member.letterbox), sure)
        for k, i in enumerate(numbers):
            _take_aim(attempts[i // count], i % count, objective, candidates[k : k + 1])
    for attempt in attempts:
        attempt.in_a_row = attempt.in_a_row + 1 if attempt.fooled and all(attempt.fooled) else 0
        attempt.failed = not attempt.done and attempt.steps >= options.steps
    running = [i for i, attempt in enumerate(attempts) if not attempt.done]
    if not running:
        return
    losses = _losses(objective, passes, [aim for attempt in attempts for aim in attempt.aims], conf)
    losses = losses.view(-1, count).sum(1)
    told = losses.tolist()
    for i in running:
        rank = (sum(attempts[i].fooled), -told[i])
        if attempts[i].best is None or rank > attempts[i].best_rank:
            attempts[i].best, attempts[i].best_rank = shown[i], rank
            attempts[i].best_members = list(attempts[i].members)
    if all(attempts[i].failed for i in running):
        return
    by_pass = torch.autograd.grad(losses[running].sum(), [frames for _, frames, _ in passes])
    gradients = {
        i: g for (numbers, *_), gs in zip(passes, by_pass, strict=True) for i, g in zip(numbers, gs, strict=True)
    }
    for i in running:
        attempt = attempts[i]
        if not attempt.failed:
            group = [gradients[i * count + member] for member in range(count)]
            gradient = photo_gradient(group, shown[i], attempt.members, options)
            attempt.x = attempt.rule(attempt.x, gradient.permute(1, 2, 0), told[i])
            attempt.steps += 1


# Frames of one shape, by their numbers in the group of all, as the detector took them, and what it proposes.
Pass = tuple[list[int], Tensor, Candidates]


def _look(detector: Detector, frames: Sequence[Photo]) -> list[Pass]:
    """One forward for all frames of each shape; as a rule they have the same."""
    shapes: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, frame in enumerate(frames):
        shapes[frame.shape].append(number)
    passes = []
    for numbers in shapes.values():
        batch = frames_tensor([frames[number] for number in numbers], detector.device).requires_grad_()
        passes.append((numbers, batch, detector.candidates(batch)))
    return passes


def _take_aim(attempt: Attempt, number: int, objective: Objective, candidates: Candidates) -> None:
    """What is aimed at is fixed at the first pass; where pixels stay where they are, it is what it is in the photo."""
    member = attempt.members[number]
    if number and not member.moves:
        attempt.aims[number] = attempt.aims[0]
    elif attempt.aims[number] is None:
        attempt.aims[number] = member.aim(objective, candidates, attempt)


def _losses(objective: Objective, passes: Sequence[Pass], aims: Sequence[Any], conf: float) -> Tensor:
    """The loss of each frame, in the order of their numbers."""
    losses = [objective.loss(candidates, [aims[i] for i in numbers], conf) for numbers, _, candidates in passes]
    if len(passes) == 1:
        return losses[0]
    order = torch.tensor([i for numbers, *_ in passes for i in numbers]).argsort()
    return torch.cat(losses)[order.to(losses[0].device)]


def photo_gradient(
    gradients: Sequence[Tensor], photo: Photo, members: Sequence[Member], options: AttackOptions
) -> Tensor:
    """The members' gradients at their frames, [3, H', W'] each, as one gradient at the photo, [3, H, W]."""
    if options.aggregate == "max":
        back = [m.pull_back(photo, g, options) for m, g in zip(members, gradients, strict=True)]
        stacked = torch.stack(back)
        return stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]
    weights = options.weights or (1.0,) * len(members)
    shares = [weight / sum(weights) for weight in weights]
    # Straight through, members whose pixels stay share the letterbox of the photo, and all is linear: aggregated
    # first, only one gradient is brought back.
    alike = [options.gradient == "straight-through" and member.straight for member in members]
    alone = [(member, g * w) for member, g, w, a in zip(members, gradients, shares, alike, strict=True) if not a]
    if any(alike):
        alone.append((members[0], _sum([g * w for g, w, a in zip(gradients, shares, alike, strict=True) if a])))
    return _sum([member.pull_back(photo, gradient, options) for member, gradient in alone])


def _sum(gradients: Sequence[Tensor]) -> Tensor:
    """Their sum; torch's own reductions copy gradients that are channels last in memory."""
    total = gradients[0]
    for gradient in gradients[1:]:
        total = total.add(gradient)
    return total
