"""Signs that a detector looks robust because the attack was blind, and not because it is."""

from dataclasses import replace
from itertools import islice

import torch

from detguard.engine import with_gradients
from detguard.evaluation.attacks import SQUARE, AttackSet, attack_objective
from detguard.evaluation.metrics import Check
from detguard.evaluation.score import score
from detguard.evaluation.views import Batch, Clean, Subject, fill
from detguard.photos import frames_tensor

PHOTOS = 32
LARGE_EPS = 16
TOLERANCE = 0.01
# Steps under which an attack that leaves something may only have stopped too early.
FEW_STEPS = 20
ZERO_SHARE = 0.1
# The checks that say nothing where there is no AP to lose.
BY_AP = ("more steps", "large budget", "black box")


def check_views(attack: AttackSet, queries: int) -> list[AttackSet]:
    """What `run_checks` needs of the first PHOTOS photos."""
    return [
        attack,
        replace(attack, steps=2 * attack.steps),
        replace(attack, eps=LARGE_EPS, restarts=1),
        AttackSet((SQUARE,), attack.eps, queries, seed=attack.seed),
    ]


def first_photos(subject: Subject) -> Subject:
    """The subject on the first PHOTOS photos of its data that have objects to lose."""
    with_objects = ((image, file) for image, file in subject.dataset.files.items() if len(subject.objects(image)))
    files = dict(islice(with_objects, PHOTOS))
    return replace(subject, dataset=replace(subject.dataset, files=files))


def run_checks(subject: Subject, attack: AttackSet, queries: int) -> dict[str, Check]:
    """All checks of one subject on its first photos, by name; their views must be in the cache or are shown now.

    Where nothing that is measured could be lost on these photos, those that are by AP neither pass nor fail.
    """
    few = first_photos(subject)
    views = check_views(attack, queries)
    fill(few, [Clean(), *views])
    clean = score(few, Clean()).stats["AP"] or 0.0
    once, longer, large, black = (attack_ap(few, view) for view in views)
    converged, more = longer >= once - TOLERANCE, f"use --steps {2 * attack.steps} or more"
    zero = zero_gradient_share(few)
    found = {
        "more steps": Check(
            passed=abs(longer - once) <= TOLERANCE,
            value=abs(longer - once),
            limit=TOLERANCE,
            what=f"AP goes from {once:.3f} after {attack.steps} steps to {longer:.3f} after {2 * attack.steps}",
            meaning="more steps should never help the detector: the loss surface is rough, or the steps are too large"
            if converged
            else "not converged: the figures are too good",
            remedy="try other step counts and restarts, and believe the lowest figure only" if converged else more,
        ),
        "large budget": Check(
            passed=large <= TOLERANCE,
            value=large,
            limit=TOLERANCE,
            what=f"AP at {LARGE_EPS} of 255 levels",
            meaning="at a budget that anybody sees, an attack that works leaves nothing: this one is kept from the "
            "gradient",
            remedy=("" if converged and attack.steps >= FEW_STEPS else f"first {more}; if it stays, ")
            + "look for rounding, saturation or randomness between photo and loss, and attack around it",
        ),
        "black box": Check(
            passed=black >= once - TOLERANCE,
            value=once - black,
            limit=TOLERANCE,
            what=f"AP under the white-box attack less that under {queries} queries of the Square attack",
            meaning="an attack without gradients should not beat one with them: the gradients are of no use",
            remedy="take the black-box figure for the true one, and attack by another loss",
        ),
        "zero gradient": Check(
            passed=zero <= ZERO_SHARE,
            value=zero,
            limit=ZERO_SHARE,
            what="share of frame pixels where the loss has no gradient",
            meaning="where the gradient is exactly zero the attack does not know where to go",
            remedy="attack logits instead of probabilities, and a smooth stand-in for hard decisions",
        ),
    }
    if clean <= TOLERANCE:
        for name in BY_AP:
            found[name] |= {
                "passed": None,
                "meaning": f"the clean AP of these photos is {clean:.3f}, so that an attack has nothing to show",
                "remedy": "judge by photos on which the detector finds what is labelled",
            }
    return found


def attack_ap(subject: Subject, attack: AttackSet) -> float:
    """The headline: the lowest AP of each attack alone and of the worst attack per photo."""
    return min(score(subject, attack, part).stats["AP"] or 0.0 for part in attack.scored)


@with_gradients
def zero_gradient_share(subject: Subject) -> float:
    """Mean share of values, padding left out, where the training loss has no gradient at the frame, or no number."""
    objective = attack_objective("all", sorted(subject.category_ids), subject.detector)
    zeros = total = 0
    for images in subject.batches():
        batch = Batch(subject, images)
        for photo, objects in zip(batch.photos, batch.objects, strict=True):
            box = subject.detector.letterbox(photo.shape[:2])
            frames = frames_tensor([box(photo)], subject.detector.device).requires_grad_()
            candidates = subject.detector.candidates(frames)
            placed = replace(objects, boxes=box.boxes_to_frame(objects.boxes))
            loss = objective.loss(candidates, [objective.aim(candidates, placed, objective.attacked(placed))], 0.25)
            (gradient,) = torch.autograd.grad(loss.sum(), frames)
            (top, left), (height, width) = box.offset, box.resized
            inner = gradient[..., top : top + height, left : left + width]
            zeros, total = zeros + int((inner.nan_to_num(0, 0, 0) == 0).sum()), total + inner.numel()
    return zeros / max(total, 1)
