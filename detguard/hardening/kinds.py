"""Whom a grown ensemble asks: photos of a new kind are told from known ones by what its robust expert sees."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from detguard.data.batches import Batch
from detguard.data.stream import Labelled
from detguard.detections import MAX_DETECTIONS, Candidates, suppress
from detguard.detectors.base import Detector
from detguard.detectors.gated import GatedNetwork, content
from detguard.evaluation.views import SHOWN_CONFIDENCE
from detguard.hardening.adversary import Adversary, perturb
from detguard.hardening.losses import label_loss
from detguard.hardening.train import Setting

# Told the share that is over; returns True to stop.
OnShare = Callable[[float], bool]
# The weight of squares in the regression, and how far apart several new experts begin.
DECAY, SPREAD = 1e-2, 0.1
# How often known frames are attacked so as to look new, in how many steps, and learned as known ones.
ROUNDS, STEPS = 2, 5
# Candidates of a frame, the surest, of which its labels are made where it has none.
MOST_ASKED = 4 * MAX_DETECTIONS
# Batches by which new kinds are told from known ones; all are gone through once, and once for each attack.
BATCHES = 16
# Old frames that are corrupted, and look newer than so many of the new ones, are of the new kind themselves.
ALIKE = 0.1
# Of known frames, attacked or not, so many shall be given to new experts with a weight of no more than e^-3; of new
# ones half with at least 1 - e^-3, where a slope of up to so many times that of the regression does it.
SURE, UNASKED, STEEPEST = 0.98, 3.0, 10.0


def fit_kinds(
    network: GatedNetwork,
    before: GatedNetwork,
    pairs: Iterable[tuple[Batch, Batch | None]],
    adversary: Adversary,
    setting: Setting,
    on_share: OnShare = lambda _: False,
) -> None:
    """Fit how far the experts are asked that `before` had not: to tell new frames from known ones.

    Logistic regression on what the robust expert sees. Known frames, attacked so as to look new, are learned as known
    ones; in the end the bias is lowered until nearly all of them leave the new experts unasked: they lead, and need not
    resist. That may leave most new frames to the old experts, too, though all are told apart: then the slope rises at
    that threshold. Several experts differ a little, or all would learn the same.

    pairs: BATCHES of new frames and of old ones. Old ones are known but for those whose corruption takes from `before`
    more than half of what the new kind does: what it was shown and has not learned is no loss; and for those whose
    corruption is the new kind, or looks like it. on_share: called with the share that is over; returns True to stop.

    Raises:
        KeyboardInterrupt: `on_share` returned True.
    """
    passes = ROUNDS + 2

    def over(number: int, done: int, of: int) -> None:
        if on_share((number + done / of) / passes):
            raise KeyboardInterrupt

    count = len(network.names) - len(before.names)
    new, harm_of_new, harm_of_clean = list[Tensor](), list[Tensor](), list[Tensor]()
    old, seen, harm, hard = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    with torch.no_grad():
        for done, (fresh, replayed) in enumerate(pairs, 1):
            new.append(network.kind_features(fresh.shown))
            if replayed is not None:
                clean = setting.run(before, replayed.clean)[0]
                labels = answers(replayed, clean)
                old.append(replayed.shown)
                seen.append(network.kind_features(replayed.shown))
                hard.append(torch.arange(len(replayed.shown), device=replayed.shown.device) < replayed.hard)
                harm_of_new.append(label_loss(setting.run(before, fresh.shown)[0], fresh.labels))
                harm.append(label_loss(setting.run(before, replayed.shown)[0], labels))
                harm_of_clean.append(label_loss(clean, labels))
            over(0, done, BATCHES)
    x = torch.cat(new)
    known, features = list[Tensor](), list[Tensor]()
    if old:
        most = (torch.cat(harm_of_new).median() - torch.cat(harm_of_clean).median()).clamp(min=0) / 2
        less = [shown - clean <= most for shown, clean in zip(harm, harm_of_clean, strict=True)]
        unlike = _unlike(network, count, x, seen, hard)
        kept = [one & other for one, other in zip(less, unlike, strict=True)]
        known = [frames[rows] for frames, rows in zip(old, kept, strict=True) if rows.any()]
        features = [found[rows] for found, rows in zip(seen, kept, strict=True) if rows.any()]
    weight, bias = _told_apart(network, count, x, features)
    for number in range(ROUNDS if known else 0):
        on_done = partial(over, 1 + number)
        features += _attacked_kinds(network, count, known, weight, bias, adversary, on_done)
        weight, bias = _told_apart(network, count, x, features)
    if known:
        features += _attacked_kinds(network, count, known, weight, bias, adversary, partial(over, 1 + ROUNDS))
        every = torch.cat(features)

        def lowered(weight: Tensor, bias: Tensor) -> Tensor:
            highest = _kind_logit(network, count, every, weight, bias).quantile(SURE)
            return bias - (highest + UNASKED).clamp(min=0)

        bias = lowered(weight, bias)
        above = _kind_logit(network, count, x, weight, bias).median() + UNASKED
        slope = (2 * UNASKED / above).clamp(1, STEEPEST)
        weight, bias = slope * weight, slope * (bias + UNASKED) - UNASKED
        bias = lowered(weight, bias)  # of frames that an expert of earlier adaptations knows, others are the highest
    kinds = network.kinds
    assert kinds is not None
    with torch.no_grad():
        spread = SPREAD * (count > 1) * torch.randn(count, len(weight), device=weight.device)
        kinds.weight[-count:] = weight + spread * weight.std()
        kinds.bias[-count:] = bias - math.log(count)


def _unlike(
    network: GatedNetwork, count: int, new: Tensor, seen: Sequence[Tensor], hard: Sequence[Tensor]
) -> list[Tensor]:
    """Which old frames are not of the new kind, bool [B] of each batch: clean ones all, corrupted ones by their looks.

    Else a single frame in fog among the old ones would be the newest of all, and keep photos in fog from new experts.
    """
    clean = [found[~rows] for found, rows in zip(seen, hard, strict=True)]
    if not sum(map(len, clean)):
        return [torch.ones_like(rows) for rows in hard]
    weight, bias = _told_apart(network, count, new, clean)
    least = _kind_logit(network, count, new, weight, bias).quantile(ALIKE)
    newness = [_kind_logit(network, count, found, weight, bias) for found in seen]
    return [~rows | (found < least) for found, rows in zip(newness, hard, strict=True)]


def answers(batch: Batch, clean: Candidates) -> list[Labelled]:
    """The labels of old frames, or what the ensemble found in the clean ones."""
    if batch.labels:
        return list(batch.labels)
    # A device is waited for once, not several times for each frame.
    best = clean.logits.amax(2).topk(min(MOST_ASKED, clean.logits.shape[1])).indices[..., None]
    logits, boxes = (x.take_along_dim(best, 1).detach().cpu() for x in (clean.logits, clean.boxes))
    found = suppress(Candidates(logits, boxes, clean.end_to_end), SHOWN_CONFIDENCE, Detector.iou)
    return [Labelled(Path(), objects) for objects in found]


def _kind_logit(network: GatedNetwork, count: int, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """How much likelier frames are new than anything that was known before, [B]."""
    assert network.kinds is not None
    known = network.kinds(features)[:, :-count]
    known = torch.cat([torch.zeros_like(features[:, :1]), known], 1)
    return features @ weight + bias - known.logsumexp(1)


def _told_apart(network: GatedNetwork, count: int, new: Tensor, old: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the logistic regression; new and old frames count alike, however many there are."""
    x = torch.cat([new, *old])
    y = (torch.arange(len(x), device=x.device) < len(new)).float()
    share = torch.where(y > 0, len(x) / (2 * y.sum()), len(x) / (2 * (1 - y).sum()).clamp(min=1))
    mean, spread = x.mean(0), x.std(0) + 1e-3
    x_scaled = (x - mean) / spread
    scaled, bias = (torch.zeros(size, device=x.device, requires_grad=True) for size in (x.shape[1], 1))
    offset = _kind_logit(network, count, x, torch.zeros_like(mean), torch.zeros_like(mean[:1])).detach()
    optimizer = torch.optim.LBFGS([scaled, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(x_scaled @ scaled + bias + offset, y, share)
        value = value + DECAY * scaled.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight = scaled.detach() / spread
    return weight, bias.detach() - mean @ weight


def _attacked_kinds(
    network: GatedNetwork,
    count: int,
    known: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    adversary: Adversary,
    on_done: Callable[[int, int], None],
) -> list[Tensor]:
    """The features of frames that are attacked so as to look new; on_done: told how many of how many batches are."""
    found = list[Tensor]()
    for frames in known:
        where = content(frames)

        def newness(x: Tensor, where: Tensor = where) -> Tensor:
            return _kind_logit(network, count, network.kind_features(x, where), weight, bias)

        attacked = perturb(frames, newness, replace(adversary, steps=STEPS))
        with torch.no_grad():
            found.append(network.kind_features(attacked, where))
        on_done(len(found), len(known))
    return found
