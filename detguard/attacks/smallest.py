"""The least budget that fools, photo by photo: how far a detector is from failing, not whether it fails."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from detguard.attacks.group import AttackOptions, Attempt, Victim, attack_group
from detguard.detections import Detections
from detguard.detectors.base import Detector
from detguard.objectives.base import Objective
from detguard.photos import Photo
from detguard.transforms.base import Transform


def attack_smallest(
    detector: Detector,
    photos: Iterable[tuple[str, Photo, Detections]],
    objective: Objective,
    transforms: Sequence[Transform],
    options: AttackOptions,
    on_step: Callable[[Sequence[Attempt]], None] | None = None,
    also: Sequence[Victim] = (),
) -> Iterator[Attempt]:
    """As `attack_group`, with the least budget up to that of `options` by which the attack succeeds: by bisection.

    Steps shrink with the budget. Where all of it is not enough, that failed attempt is what is yielded; an attempt's
    `steps`, `queries` and `seconds` are those of all of the photo's attempts together.
    """
    whole, takes_steps = options.budget.eps, "step" not in options.moves.unused

    def attempt(item: tuple[str, Photo, Detections], tried: AttackOptions) -> Attempt:
        return next(attack_group(detector, [item], objective, transforms, tried, on_step, also))

    for item in photos:
        best = attempt(item, options)
        steps, queries, seconds = best.steps, best.queries, best.seconds
        low, high = 0.0, best.used if best.done else 0.0
        while (eps := options.budget.between(low, high)) is not None:
            step = max(options.length * eps / whole, options.length / 10)
            tried = replace(options, budget=replace(options.budget, eps=eps), step=step if takes_steps else None)
            found = attempt(item, tried)
            steps, queries, seconds = steps + found.steps, queries + found.queries, seconds + found.seconds
            if found.done:
                best, high = found, found.used
            else:
                low = eps
        best.steps, best.queries, best.seconds = steps, queries, seconds
        yield best
