"""The transformation-robust group attack: fool the photo and all its transformed copies at once.

Repeat: transform the adversarial photo, detect on it and on every copy in one batch, stop when all are fooled,
else step, within a budget: against the aggregated gradient of their losses, or against that of the member of highest
loss alone until it is fooled, then of the next that is not; in a black box, where there is no gradient, propose another
photo and keep it if the aggregated loss is lower. The 8-bit photo that would be saved is what the detector is shown at
every step. How far it may go (`budgets.py`), how it moves (`steps.py`), what is wanted (`objectives`) and where
transforms take its pixels (`transforms`) are taken from these.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from statistics import fmean
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from detguard import DetguardError, defaults, first_line, is_out_of_memory
from detguard.attacks.budgets import Budget, Linf, parse_budget
from detguard.attacks.square import Square
from detguard.attacks.steps import Rule, rule_named
from detguard.detections import Candidates, Detections, suppress
from detguard.detectors.base import Detector, to_photo
from detguard.engine import with_gradients
from detguard.objectives.base import Objective
from detguard.photos import Letterbox, Photo, frames_tensor, photo_seed
from detguard.schema import Config, several
from detguard.transforms.base import GradientRule, Transform, seen
from detguard.transforms.warp import Warp

Aggregate = Literal["mean", "weighted", "max"]
Schedule = Literal["worst", "group"]
DEFAULT = Linf(defaults.Attack.eps)
# Draws in a row that must be fooled before a group with random members counts as fooled.
STEADY = 5
# Photos of other frame shapes than the next one's that wait in memory, for each photo of a batch.
WAITING = 4
# Options that only a gradient has a use for.
WHITE_BOX = ("smallest", "rule", "step", "steps", "schedule", "momentum", "gradient", "random_start")


@dataclass(frozen=True)
class AttackOptions:
    """How to search.

    Attributes:
        conf: confidence over which an object counts as found, 0..1.
        budget: how far the photo may go.
        step: change per iteration, in the unit of the budget; by default its own.
        steps: most iterations.
        rule: how it moves: steepest, sign, normalized, raw, adam, or apgd, which finds its own steps.
        aggregate: how the members' gradients become one: mean, weighted or max.
        weights: of `aggregate="weighted"`, one per member, photo first.
        schedule: who is stepped against: worst, the member of highest loss among those that are not fooled, alone until
            it is; group, all members each time, their gradients averaged. Another `aggregate` than mean, rules that
            compare losses, and groups with random members, which are averaged over, take group.
        gradient: through transforms: straight-through (BPDA) or exact.
        momentum: share of earlier gradients in each step, 0..1.
        random_start: start from noise within the budget.
        margin: the loop only stops when nothing is found at `conf * (1 - margin)` either, and what is wanted is found
            as far over `conf`, which buys survival of transforms that were not in the group.
        seed: of all that is random.
        batch: photos attacked at once.
        smallest: search for the least budget that fools, up to that of `budget`.
        black_box: search by losses alone (Square); the whole group is evaluated each time, and `WHITE_BOX` options are
            of no use.
        queries: of `black_box`, most forwards of one frame per photo.
        stop: end as soon as all are fooled, of random members `STEADY` draws in a row; without it all `steps` are made
            and the one of lowest loss counts.
    """

    conf: float = defaults.Attack.conf
    budget: Budget = DEFAULT
    step: float | None = None
    steps: int = defaults.Attack.steps
    rule: str = defaults.Attack.rule
    aggregate: Aggregate = defaults.Attack.aggregate
    weights: tuple[float, ...] | None = None
    schedule: Schedule = defaults.Attack.schedule
    gradient: GradientRule = defaults.Attack.gradient
    momentum: float = defaults.Attack.momentum
    random_start: bool = False
    margin: float = defaults.Attack.margin
    seed: int = defaults.Attack.seed
    batch: int = defaults.Attack.batch
    smallest: bool = False
    black_box: bool = False
    queries: int = defaults.Attack.queries
    stop: bool = True

    @property
    def length(self) -> float:
        """How far a step goes, in the unit of the budget."""
        return self.step or self.budget.step

    @property
    def moves(self) -> type[Rule]:
        """The rule of steps: Square in a black box, else the one that `rule` names."""
        return Square if self.black_box else rule_named(self.rule)

    def most(self, members: int) -> int:
        """How many steps a photo shown to `members` may take; what it is after the last of them is shown, too."""
        return max(self.queries // members - 1, 0) if self.black_box else self.steps

    @classmethod
    def from_config(cls, config: Config) -> "AttackOptions":
        """From what a run keeps of them.

        Raises:
            DetguardError: there is no such budget.
        """
        search = dict(config)
        budget = parse_budget(*(search.pop(name) for name in ("norm", "eps", "mask")))
        weights = search.pop("weights")
        return cls(**search, budget=budget, weights=tuple(weights) if weights else None)

    def config(self) -> Config:
        """What a run keeps of them, as plain values; `stop` is left out, as every run stops."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("budget", "stop")}
        try:
            weights = None if self.weights is None else list(map(float, several("weights", self.weights, (1, 1, 2))))
        except (TypeError, ValueError) as error:
            raise DetguardError(f"`weights` {self.weights!r}: expected numbers, as (1, 1, 2)") from error
        return self.budget.config() | kept | {"weights": weights}

    def check(self, members: int, detectors: int = 1) -> None:
        """Raise DetguardError if there is no such rule, options do not go together, or not with the group's `members`.

        detectors: before which it is shown.
        """
        unused = rule_named(self.rule).unused
        by_default = {one.name: one.default for one in fields(self)}
        if self.black_box and (given := [name for name in WHITE_BOX if getattr(self, name) != by_default[name]]):
            raise DetguardError(f"`{given[0]}`: does not go with `black_box`, which has no gradient")
        if given := [name for name in unused if getattr(self, name) != by_default[name]]:
            raise DetguardError(f"`{given[0]}`: does not go with `rule` {self.rule}, which has its own")
        if self.smallest and self.batch != by_default["batch"]:
            raise DetguardError("`batch`: does not go with `smallest`, which attacks photo by photo")
        if self.budget.scale != 1 and self.step is None and not rule_named(self.rule).by_budget:
            raise DetguardError(
                f"`rule` {self.rule}: moves values one by one, which this `norm` does not say how far; give `step`, or "
                "`rule` steepest"
            )
        if not self.black_box and self.queries != by_default["queries"]:
            raise DetguardError("`queries`: goes with `black_box`; without it, `steps` bounds the search")
        if self.black_box and self.most(members * detectors) < 1:
            least = 2 * members * detectors
            raise DetguardError(f"`queries` {self.queries}: expected {least} or more, to ask the group of it twice")
        if (self.weights is not None) != (self.aggregate == "weighted"):
            raise DetguardError("`weights`: goes with `aggregate` weighted, and that with `weights`")
        if self.weights is not None and len(self.weights) != members:
            raise DetguardError(f"`weights`: expected {members} numbers, one for the photo and each transform")
        if self.weights is not None and not (min(self.weights) >= 0 and 0 < sum(self.weights) < math.inf):  # nor NaN
            raise DetguardError("`weights`: expected numbers of 0 or more, not all 0, as in 1,1,2")

    def check_detector(self, detector: Detector) -> None:
        """Raise DetguardError if the detector cannot be attacked so."""
        if not (detector.differentiable or self.black_box):
            raise DetguardError(f"{detector.name}: has no gradient; give `black_box`")
        check_told(detector, self.conf)


def check_told(detector: Detector, conf: float) -> None:
    """Raise DetguardError if the detector does not tell all that it finds over `conf`: it would count as fooled."""
    if detector.nms_inside and conf < (least := detector.nms_inside[0]):
        raise DetguardError(
            f"`conf` {conf:g}: the NMS of {detector.name} is inside it, at {least:g} or so, and gives no less, so that "
            f"what it does not tell would count as fooled; attack at {least:g} or more, or export it without `nms`"
        )


@dataclass(frozen=True)
class Victim:
    """A detector that is to be fooled, and what is wanted of it, in its own classes."""

    detector: Detector
    objective: Objective

    def found_in_copy(self, transform: Transform | None, photo: Photo, conf: float) -> Detections:
        """What is found in a copy of the clean photo, where the objective compares with that; else nothing.

        Nor before what is random in the transform has been drawn.
        """
        if not self.objective.compares or transform is None or transform.random:
            return Detections.none()
        return self.detector.predict(transform(photo), conf)


def in_copy(
    transform: Transform | None, shape: tuple[int, int], clean: Detections, attacked: Tensor, copied: Detections
) -> tuple[Detections, Tensor]:
    """What was `seen` in a photo as it lies in a copy, then what was found in the clean copy, none of it attacked."""
    clean, attacked = seen(transform, shape, clean, attacked)
    if not len(copied):
        return clean, attacked
    return clean.and_those(copied), torch.cat([attacked, attacked.new_zeros(len(copied))])


@dataclass(frozen=True)
class Member:
    """A photo, or what a transform as it is drawn makes of it, before one of the detectors.

    clean, attacked: what that detector found in the clean photo, as it lies in the picture, and which of it is
    attacked. warp: where pixels are, if elsewhere in the picture.
    """

    victim: Victim
    transform: Transform | None
    shape: tuple[int, int]
    letterbox: Letterbox
    clean: Detections
    attacked: Tensor
    warp: Warp | None

    @classmethod
    def of(cls, victim: Victim, transform: Transform | None, photo: Photo, clean: Detections, conf: float) -> "Member":
        """That of a clean photo, in which the detector found `clean` over `conf`."""
        shape = photo.shape[:2]
        warp = transform.warp(shape) if transform else None
        letterbox = victim.detector.letterbox(warp.picture if warp else shape)
        copied = victim.found_in_copy(transform, photo, conf)
        there, attacked = in_copy(transform, shape, clean, victim.objective.attacked(clean), copied)
        return cls(victim, transform, shape, letterbox, there, attacked, warp)

    @property
    def straight(self) -> bool:
        """Whether a gradient at the picture may be taken for one at the photo."""
        return self.transform is None or self.transform.straight

    def frame(self, photo: Photo) -> Photo:
        """The frame that the detector is shown of a photo: transformed, then letterboxed."""
        return self.letterbox(self.transform(photo) if self.transform else photo)

    def aim(self, candidates: Candidates) -> object:
        """What the objective needs to know of the frame, of which `candidates` are."""
        boxes = self.letterbox.boxes_to_frame(self.clean.boxes)
        return self.victim.objective.aim(candidates, replace(self.clean, boxes=boxes), self.attacked)

    def fooled(self, found: Detections, sure: float) -> bool:
        """Whether `found` in the frame is what is wanted, and would be without what is not over `sure`."""
        wanted, found = self.victim.objective.success, to_photo(found, self.letterbox)
        return wanted(self.clean, found, self.attacked) and wanted(self.clean, found.above(sure), self.attacked)

    def pull_back(self, photo: Photo, gradient: Tensor, options: "AttackOptions") -> Tensor:
        """Gradient at the frame, [3, H', W'], at the photo, [3, H, W]."""
        # Straight through a median or a JPEG, a change of single pixels between untouched ones would be lost: the
        # gradient is spread to the pixels that the letterbox does not read. Exact rules find such pixels themselves.
        exact = options.gradient == "exact"
        gradient = self.letterbox.pull_back(gradient, spread=not exact)
        if self.transform is None or (self.straight and not exact):
            return gradient
        if self.warp is not None:  # that of the member, for it knows its places already
            return self.warp.pull_back(gradient)
        return self.transform.pull_back(photo, gradient)


@dataclass
class Attempt:
    """The attack on one photo as it stands.

    clean_by: what each detector found in the clean photo; queries: forwards of one frame that the search has taken;
    seconds: its share of the time that the search has taken;
    fooled: whether each member is known to be, by the photo as it was shown last; losses: each one's when it was last
    looked at.
    in_turn: whether members are looked at and stepped against one at a time; alone: the number of that one; None: all
    are.
    """

    key: str
    photo: Photo
    clean_by: list[Detections]
    original: Tensor
    x: Tensor
    rule: Rule
    rng: np.random.Generator
    members: list[Member]
    steps: int = 0
    queries: int = 0
    seconds: float = 0.0
    in_turn: bool = False
    alone: int | None = None
    in_a_row: int = 0
    enough: int = 1
    failed: bool = False
    best: Photo | None = None
    best_rank: tuple[int, float] = (-1, 0.0)
    fooled: list[bool] = field(init=False)
    losses: list[float] = field(init=False)
    aims: list[object] = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.members)
        self.fooled, self.losses, self.aims = [False] * count, [0.0] * count, [None] * count

    @property
    def adversarial(self) -> Photo:
        """The photo to save, `uint8 [H, W, 3]`: the last one, or when the attack failed the best one seen."""
        return self.levels if self.best is None or self.done else self.best

    @property
    def progress(self) -> str:
        """How far the search is, in words; of members looked at one at a time, how many are fooled is not known."""
        count = f"{self.queries} queries" if self.rule.blind else f"iteration {self.steps}"
        if self.alone is not None:
            return f"{count}, against {self.members[self.alone].transform or 'the photo'}"
        return count if self.in_turn else f"{count}, {sum(self.fooled)}/{len(self.fooled)} fooled"

    @property
    def used(self) -> float:
        """How much of the budget `adversarial` uses, in its unit."""
        return self.rule.budget.used(self.adversarial, self.photo)

    def used_by(self, photo: Photo, name: object) -> float:
        """How much of the budget a photo uses that was made of this one, called `name`.

        Raises:
            DetguardError: more than there is.
        """
        budget = self.rule.budget
        used = budget.used(photo, self.photo)
        if used > budget.eps:
            raise DetguardError(f"{name}: differs by {used:g}, over the budget of {budget}")
        return used

    @property
    def drawn(self) -> list[Transform]:
        """The transforms of the group as they were drawn last."""
        return [member.transform for member in self.members[: self.group] if member.transform]

    @property
    def group(self) -> int:
        """How many members each detector is shown: the photo, then its transforms."""
        return len(self.members) // len(self.clean_by)

    @property
    def evaluated(self) -> Sequence[int]:
        """The numbers of the members that the next pass is for."""
        return range(len(self.members)) if self.alone is None else (self.alone,)

    @property
    def clean(self) -> Detections:
        """What the first detector found in the clean photo."""
        return self.clean_by[0]

    @property
    def attacked(self) -> Tensor:
        """Which of `clean` are attacked, bool [K]."""
        return self.members[0].attacked

    @property
    def levels(self) -> Photo:
        """`x` in whole levels, as it would be saved and as the detector is shown it."""
        if self.x.dtype == torch.uint8:
            return self.x.numpy().copy()  # which transforms and callers may write into
        levels = self.rule.budget.levels(self.x, self.original)
        if levels.device.type != "cpu":
            levels = levels.to(torch.uint8)  # a quarter of the bytes to copy; on the CPU NumPy is the faster one
        return levels.cpu().numpy().astype(np.uint8, copy=False)

    @property
    def done(self) -> bool:
        """Whether every member of the group was fooled often `enough` in a row, as the loop sees it.

        The saved file has the last word.
        """
        return self.in_a_row >= self.enough


class NoRoomError(MemoryError):
    """A device has too little memory for photos; keys: theirs."""

    def __init__(self, keys: Sequence[str], why: str) -> None:
        super().__init__(why)
        self.keys = keys


@contextmanager
def room_for(*keys: str) -> Iterator[None]:
    """Have too little memory meanwhile be that of the photos `keys`.

    Raises:
        NoRoomError: there was.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # Under no name, by which this frame would keep it, and all that the step held.
        raise NoRoomError(keys, first_line(error)) from error


@with_gradients
def attack_group(
    detector: Detector,
    photos: Iterable[tuple[str, Photo, Detections]],
    objective: Objective,
    transforms: Sequence[Transform],
    options: AttackOptions,
    on_step: Callable[[Sequence[Attempt]], None] | None = None,
    also: Sequence[Victim] = (),
) -> Iterator[Attempt]:
    """Attack photos, given as (key, `uint8 [H, W, 3]`, clean detections); yields each attempt as it ends.

    also: further detectors, all of which the same photo and its transforms must fool.

    Up to `options.batch` photos of one frame shape share a forward and a backward; a finished photo leaves and the
    next takes its place; `on_step` is shown the active ones after every step. The key seeds a photo's random start,
    so that its result does not depend on its neighbours.

    Raises:
        DetguardError: `weights` do not match the group, or a detector has no gradient.
        NoRoomError: a device has too little memory for some of them.
    """
    victims = [Victim(detector, objective), *also]
    options.check(1 + len(transforms), len(victims))
    for victim in victims:
        options.check_detector(victim.detector)
    waiting: dict[tuple[int, int], deque[Attempt]] = defaultdict(deque)
    source = iter(photos)
    exhausted = False
    while True:
        # Photos of other frame shapes queue up; the fullest shape goes first.
        # Not many of them, for each is in memory: sooner a step of fewer photos.
        while (
            not exhausted
            and all(len(queue) < options.batch for queue in waiting.values())
            and sum(map(len, waiting.values())) < WAITING * options.batch
        ):
            if (item := next(source, None)) is None:
                exhausted = True
            else:
                began = time.perf_counter()
                with room_for(item[0]):
                    attempt = _begin(victims, *item, transforms, options)
                attempt.seconds = time.perf_counter() - began
                waiting[attempt.members[0].letterbox.frame].append(attempt)
        shape = max(waiting, key=lambda s: len(waiting[s]), default=None)
        if shape is None:
            return
        queue = waiting[shape]
        active = [queue[i] for i in range(min(options.batch, len(queue)))]
        began = time.perf_counter()
        with room_for(*(attempt.key for attempt in active)):
            _iterate(active, transforms, options)
        for attempt in active:  # a step is shared by all
            attempt.seconds += (time.perf_counter() - began) / len(active)
        if on_step:
            on_step(active)
        for attempt in active:
            if attempt.done or attempt.failed:
                queue.remove(attempt)
                if attempt.failed:  # the best photo is that of the luckiest draws: it is not to be judged by these
                    _draw(attempt, transforms, options.conf)
                yield attempt
        if not queue:
            del waiting[shape]


def _begin(
    victims: Sequence[Victim],
    key: str,
    photo: Photo,
    clean: Detections,
    transforms: Sequence[Transform],
    options: AttackOptions,
) -> Attempt:
    found = [clean, *(victim.detector.predict(photo, options.conf) for victim in victims[1:])]
    members = [
        Member.of(victim, transform, photo, there, options.conf)
        for victim, there in zip(victims, found, strict=True)
        for transform in (None, *transforms)
    ]
    budget = options.budget.on(photo.shape[:2], clean[members[0].attacked].boxes)
    original = torch.from_numpy(photo).to(victims[0].detector.device).float()
    seed = photo_seed(key, options.seed)
    x = budget.start(original, seed) if options.random_start else original
    asked = len(members) + _looks(victims, transforms)
    rule = options.moves(budget, original, options.length, options.most(asked), options.momentum, seed)
    x = rule.begin(x)
    rng = np.random.default_rng(seed)
    enough = STEADY if any(transform.draw(rng) is not transform for transform in transforms) else 1
    averaged = options.aggregate != "mean" or rule.blind or rule.compares or enough > 1 or not options.stop
    in_turn = options.schedule == "worst" and not averaged and len(members) > 1
    return Attempt(key, photo, found, original, x, rule, rng, members, enough=enough, in_turn=in_turn)


def _looks(victims: Sequence[Victim], transforms: Sequence[Transform]) -> int:
    """How often detectors are shown a copy of the clean photo at every draw, to compare with that."""
    return sum(victim.objective.compares for victim in victims) * sum(transform.random for transform in transforms)


def _draw(attempt: Attempt, transforms: Sequence[Transform], conf: float) -> None:
    """Draw anew what is random among the members, the same before each detector; what is aimed at moves with it."""
    for number, transform in enumerate(transforms, 1):
        drawn = transform.draw(attempt.rng)
        if drawn is not transform:
            for i, clean in enumerate(attempt.clean_by):
                place = i * attempt.group + number
                member = attempt.members[place]
                attempt.members[place] = Member.of(member.victim, drawn, attempt.photo, clean, conf)
                attempt.aims[place] = None


# Frames of one shape before one detector, by their numbers among all, as it took them, and what it proposes.
Pass = tuple[list[int], Tensor, Candidates]


def _iterate(attempts: Sequence[Attempt], transforms: Sequence[Transform], options: AttackOptions) -> None:
    """One forward of all members that are evaluated, and at most one backward; updates the attempts in place.

    In a black box nothing but the forward.
    """
    conf = options.conf * (1 - options.margin)
    # What is to be found must be as far over the confidence, what is not as far under it.
    sure = 1 - (1 - options.conf) * (1 - options.margin)
    for attempt in attempts:
        _draw(attempt, transforms, options.conf)
        attempt.queries += _looks([member.victim for member in attempt.members[:: attempt.group]], transforms)
    shown = [attempt.levels for attempt in attempts]
    evaluated = [(i, number) for i, attempt in enumerate(attempts) for number in attempt.evaluated]
    members = [(attempts[i].members[number], shown[i]) for i, number in evaluated]
    counts = [len(attempt.evaluated) for attempt in attempts]
    passes = _look(members, [attempts[i].in_turn for i, _ in evaluated], gradients=not options.black_box)
    for attempt, count in zip(attempts, counts, strict=True):
        attempt.queries += count
    for frames, _, candidates in passes:
        iou = members[frames[0]][0].victim.detector.iou
        for frame, found in zip(frames, suppress(candidates, conf, iou) if options.stop else (), strict=False):
            i, number = evaluated[frame]
            attempts[i].fooled[number] = members[frame][0].fooled(found, sure)
        for k, frame in enumerate(frames):
            i, number = evaluated[frame]
            _take_aim(attempts[i], number, candidates[k : k + 1])
    for attempt in attempts:
        attempt.in_a_row = attempt.in_a_row + 1 if all(attempt.fooled) else 0
        attempt.failed = attempt.alone is None and not attempt.done and attempt.steps >= attempt.rule.steps
    running = [i for i, attempt in enumerate(attempts) if not attempt.done]
    if not running:
        return
    losses = _losses(passes, members, [attempts[i].aims[number] for i, number in evaluated], conf, sure)
    by_photo = torch.stack(losses).split(counts)
    # By gradients, the largest value of each pixel is that of no loss: then their sum.
    summed = not options.black_box and options.aggregate == "max"
    aggregated = torch.stack([one.sum() if summed else _aggregate(one, options) for one in by_photo])
    told = torch.cat([aggregated, *by_photo]).tolist()
    for (i, number), loss in zip(evaluated, told[len(attempts) :], strict=True):
        attempts[i].losses[number] = loss
    ends = list(accumulate(counts))
    stepped = {i: _stepped(attempts[i], range(ends[i] - counts[i], ends[i])) for i in running if not attempts[i].failed}
    stepped = {i: places for i, places in stepped.items() if places}
    for i in running:
        attempt = attempts[i]
        if not (attempt.failed or i in stepped):
            continue  # it is still looked at: losses of others may be those of earlier photos
        rank = (sum(attempt.fooled), -(fmean(attempt.losses) if attempt.in_turn else told[i]))
        if attempt.best is None or rank > attempt.best_rank:
            attempt.best, attempt.best_rank = shown[i], rank
    if not stepped:
        return
    gradients = {}
    if not options.black_box:
        gradients = _gradients([losses[frame] for places in stepped.values() for frame in places], passes)
    for i, places in stepped.items():
        attempt = attempts[i]
        attempt.steps += 1
        if not options.black_box:
            there = [members[frame][0] for frame in places]
            of_frames = [gradients[frame].to(attempt.x.device) for frame in places]
            gradient = photo_gradient(of_frames, shown[i], there, options)
            attempt.x = attempt.rule(attempt.x, gradient.permute(1, 2, 0), told[i])
            if attempt.in_turn:
                attempt.fooled = [False] * len(attempt.members)
                if attempt.steps >= attempt.rule.steps:
                    attempt.alone = None
        elif not attempt.in_a_row:  # else the same photo is evaluated again, on other draws
            attempt.x = attempt.rule(attempt.x, attempt.x.new_empty(0), told[i])


def _stepped(attempt: Attempt, frames: range) -> Sequence[int]:
    """Those of the frames that were evaluated that are stepped against; none: another is looked at first."""
    if not attempt.in_turn:
        return frames
    if attempt.alone is None or attempt.fooled[attempt.alone]:
        # That of highest loss when it was last looked at: a look at all would tell more, and costs more.
        others = [number for number, fooled in enumerate(attempt.fooled) if not fooled]
        looked_at = attempt.evaluated
        attempt.alone = max(others, key=attempt.losses.__getitem__)
        return [frame for frame, number in zip(frames, looked_at, strict=True) if number == attempt.alone]
    return frames


def _aggregate(losses: Tensor, options: AttackOptions) -> Tensor:
    """The losses of a photo's members, [M], as one; of one that is looked at alone, its own."""
    if options.aggregate == "max":
        return losses.amax()
    if options.weights is None:
        return losses.mean()
    weights = losses.new_tensor(options.weights)
    weights = weights.repeat(len(losses) // len(weights))  # the same before each detector
    return losses @ (weights / weights.sum())


def _gradients(losses: list[Tensor], passes: Sequence[Pass]) -> dict[int, Tensor]:
    """That of the losses at each frame that has a part in them, [3, H', W'], by the frame's number."""
    by_pass = torch.autograd.grad(torch.stack(losses).sum(), [frames for _, frames, _ in passes], allow_unused=True)
    there = [(numbers, found) for (numbers, *_), found in zip(passes, by_pass, strict=True) if found is not None]
    return {number: gradient for numbers, found in there for number, gradient in zip(numbers, found, strict=True)}


def _look(members: Sequence[tuple[Member, Photo]], in_turn: Sequence[bool], *, gradients: bool) -> list[Pass]:
    """One forward for all frames of each detector and shape; as a rule there is one of both.

    in_turn: which of them may be looked at without being stepped against. On a CPU, where a frame costs by itself what
    it costs among others, each of these has a pass of its own, so that the backward is that of few.
    gradients: whether any are wanted.
    """
    frames = [member.frame(photo) for member, photo in members]
    alike: dict[tuple[int, tuple[int, ...], int], list[int]] = defaultdict(list)
    for number, ((member, _), frame) in enumerate(zip(members, frames, strict=True)):
        detector = member.victim.detector
        own = number if in_turn[number] and detector.device.type == "cpu" else -1
        alike[id(detector), frame.shape, own].append(number)
    passes = []
    for numbers in alike.values():
        detector = members[numbers[0]][0].victim.detector
        batch = frames_tensor([frames[number] for number in numbers], detector.device).requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            candidates = detector.candidates(batch)
        if gradients and not candidates.logits.requires_grad:
            raise DetguardError(
                f"{detector.name}: its candidates have no gradient at the frames; `detguard check-detector` tells what "
                "to look at, or give `black_box`"
            )
        passes.append((numbers, batch, candidates))
    return passes


def _take_aim(attempt: Attempt, number: int, candidates: Candidates) -> None:
    """What is aimed at is fixed at the first pass; where pixels stay where they are, it is what it is in the photo."""
    photo = number - number % attempt.group
    if number != photo and attempt.members[number].warp is None:
        attempt.aims[number] = attempt.aims[photo]
    elif attempt.aims[number] is None:
        attempt.aims[number] = attempt.members[number].aim(candidates)


def _losses(
    passes: Sequence[Pass], members: Sequence[tuple[Member, Photo]], aims: Sequence[object], conf: float, sure: float
) -> list[Tensor]:
    """The loss of each frame, by its number: apart, since the backward of a part of a tensor is that of all of it."""
    losses = dict[int, Tensor]()
    for numbers, _, candidates in passes:
        objective = members[numbers[0]][0].victim.objective
        found = objective.loss(candidates, [aims[i] for i in numbers], conf, sure)
        losses |= zip(numbers, found.to(passes[0][1].device).unbind(), strict=True)  # detectors may be on several
    return [losses[number] for number in range(len(members))]


def photo_gradient(
    gradients: Sequence[Tensor], photo: Photo, members: Sequence[Member], options: AttackOptions
) -> Tensor:
    """The members' gradients at their frames, [3, H', W'] each, as one gradient at the photo, [3, H, W]."""
    if len(members) == 1:
        return members[0].pull_back(photo, gradients[0], options)
    if options.aggregate == "max":
        back = [m.pull_back(photo, g, options) for m, g in zip(members, gradients, strict=True)]
        stacked = torch.stack(back)
        return stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]
    weights = options.weights or (1.0,)
    weights = weights * (len(members) // len(weights))  # the same before each detector
    alone: list[tuple[Member, Tensor]] = []
    alike: dict[Letterbox, tuple[Member, list[Tensor]]] = {}
    for member, gradient, weight in zip(members, gradients, weights, strict=True):
        share = gradient * (weight / sum(weights))
        if options.gradient == "straight-through" and member.straight:
            # All is linear: those of one letterbox are aggregated first, and only one is brought back.
            alike.setdefault(member.letterbox, (member, []))[1].append(share)
        else:
            alone.append((member, share))
    alone += [(member, _sum(shares)) for member, shares in alike.values()]
    return _sum([member.pull_back(photo, gradient, options) for member, gradient in alone])


def _sum(gradients: Sequence[Tensor]) -> Tensor:
    """Their sum; torch's own reductions copy gradients that are channels last in memory."""
    total = gradients[0]
    for gradient in gradients[1:]:
        total = total.add(gradient)
    return total
