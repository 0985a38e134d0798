"""Adapting a gated ensemble to photos of a new kind: new experts, a gate that knows when to ask them, old ones kept."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from detguard import DetguardError, defaults
from detguard.data.batches import Batch, PhotoSet, batches
from detguard.data.stream import Labelled
from detguard.detections import Candidates, suppress
from detguard.detectors.base import Detector
from detguard.detectors.gated import GatedNetwork
from detguard.detectors.load import save_gated
from detguard.detectors.shared import ADAPTER, FORMS, WHOLE
from detguard.detectors.ultralytics import decode
from detguard.evaluation.views import SHOWN_CONFIDENCE
from detguard.hardening.adversary import Adversary, perturb
from detguard.hardening.loop import BatchLog, OnBatch, Pace, Update, load_made, train
from detguard.hardening.losses import Goal, imitation_loss, label_loss, retention_loss
from detguard.hardening.memory import check_memory
from detguard.hardening.train import Setting, only_learn, with_rows
from detguard.hardening.validation import Entry, file_of
from detguard.ranks import Ranks
from detguard.runs import Run

MODES = ("full", "frozen")
STAGE = "adapt"
# From so few new photos a whole network learns the photos, not their kind.
FEW = 500
# Of a batch, new photos; of the others, old ones, a third (rounded down) is corrupted and a third attacked.
NEW_SHARE = 0.5
# Of the new photos, those that are attacked where new experts are to lead.
ATTACKED_SHARE = 0.5
# Batches that the gate's new outputs are first fitted to, the weight of their squares, and how far apart they begin.
FIT_BATCHES, FIT_DECAY, FIT_SPREAD = 16, 1e-4, 0.1
# A loss that an attack raises, [B], of what is found.
Harm = Callable[[Candidates], Tensor]
# Of the photos one in so many, at most so many, is not trained on but judged by.
JUDGED_ONE_IN, MOST_JUDGED = 5, 64


@dataclass(frozen=True)
class Adaptation:
    """How to adapt; the options of `detguard adapt`.

    Attributes:
        experts: new ones.
        expert: what a new one has of its own, one of FORMS: adapter, head or whole.
        mode: frozen (old experts stay as they are, to the bit) or full.
        init: new experts start as the `best` of the old ones, or `fresh`, from random weights.
        keep: weight of the old experts' earlier outputs, the lambda of L2.
        photos: seen, with repeats.
        batch: frames per batch, of all processes together.
        rate: learning rate, in proportion to weights.
        seed: of all that is random.
        eps: budget of the attacks that photos are shown under, levels of 255.

    Raises:
        DetguardError: an option is not one of those known.
    """

    experts: int = defaults.Adapt.experts
    expert: str = WHOLE  # as of runs that do not tell
    mode: str = "full"
    init: str = defaults.Adapt.init
    keep: float = defaults.Adapt.keep
    photos: int = 5_000
    batch: int = defaults.Adapt.batch
    rate: float = defaults.Adapt.rate
    seed: int = defaults.Adapt.seed
    eps: float = Adversary.eps

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise DetguardError(f"`mode` {self.mode}: expected one of {', '.join(MODES)}")
        if self.expert not in FORMS:
            raise DetguardError(f"`expert` {self.expert}: expected one of {', '.join(FORMS)}")
        if self.expert == ADAPTER and self.init == "fresh":
            raise DetguardError("`init` fresh: an adapter changes what another expert has learned; use `expert` whole")
        if self.mode == "frozen" and not self.experts:
            raise DetguardError("`experts` 0: in `mode` frozen only new experts learn; add some, or use `mode` full")

    @property
    def number(self) -> int:
        """The number of batches of the whole training."""
        return max(1, round(self.photos / self.batch))

    @property
    def adversary(self) -> Adversary:
        """The attack that is made on photos in training."""
        return Adversary(self.eps)


def choose_mode(new: int) -> tuple[str, str]:
    """The mode for so many new photos, and why."""
    if new < FEW:
        return "frozen", f"{new} new photos are too few (under {FEW}) to let old experts learn from them"
    return "full", f"{new} new photos are enough ({FEW} or more) to let old experts learn from them too"


def check_growth(network: GatedNetwork, plan: Adaptation, most: int) -> None:
    """See that there would be at most `most` experts.

    Raises:
        DetguardError: there would be more.
    """
    if len(network.names) + plan.experts > most:
        raise DetguardError(
            f"`max_experts` {most}: the ensemble has {len(network.names)} and would get {plan.experts} more; allow "
            "more (an ensemble made with `top_k` still asks few), or adapt those that it has: `experts` 0 `mode` full"
        )


def grow(network: GatedNetwork, plan: Adaptation, new: PhotoSet, setting: Setting) -> None:
    """Add the new experts of a plan to an ensemble.

    Where the robust expert leads, they come from those that lead, and lead with them: bounded by an expert that does
    not know the new kind, they could change nothing.
    """
    if not plan.experts:
        return
    first = sum(name.startswith("adapted") for name in network.names) + 1
    names = [f"adapted {number}" for number in range(first, first + plan.experts)]
    lead = network.rule.leads
    among = [network.robust, *network.leaders] if lead else range(len(network.names))
    network.grow(names, best(network, among, new, setting), plan.expert, lead=lead)
    if plan.init == "fresh":
        for name, module in network.experts[-plan.experts :].named_modules():
            if isinstance(module, nn.Conv2d) and "dfl" not in name:
                module.reset_parameters()
        for expert in range(len(network.names) - plan.experts, len(network.names)):
            network.head_of(expert).bias_init()  # few objects, or the background alone would make the loss enormous


@torch.no_grad()
def best(network: GatedNetwork, among: Sequence[int], new: PhotoSet, setting: Setting) -> int:
    """The one of some experts that does most for new photos: highest mean of the gate's weight times e^-loss."""
    # By the same frames in all ranks, which must come to the same answer.
    (batch,) = batches(new, setting.batch, setting.size, setting.seed, 0, 1, ranks=Ranks(setting.ranks.device))
    found = [setting.run(network, batch.shown, i)[0] for i in among]
    harm = torch.stack([label_loss(of_one, batch.labels) for of_one in found], 1)
    gate = found[0].gate  # the same by every route
    assert gate is not None
    return among[int((gate.softmax(1)[:, list(among)] * (-harm).exp()).mean(0).argmax())]


def fit_gate(network: GatedNetwork, known: int, pairs: Iterable[tuple[Batch, Batch | None]]) -> None:
    """Fit the gate's new outputs, all but its first `known`, to tell new frames from old ones: logistic regression.

    They begin so far down that training would take long to find them. Several differ a little, or all their experts
    would learn the same.
    """
    features, is_new = [], []
    with torch.no_grad():
        for new, old in pairs:
            frames = new.shown if old is None else torch.cat([new.shown, old.shown])
            features.append(network.gate_features(frames))
            is_new.append(torch.arange(len(frames), device=frames.device) < len(new.shown))
    x, y, out = torch.cat(features), torch.cat(is_new).float(), network.gate.out
    old_logits = out(x)[:, :known].detach().logsumexp(1)
    weight, bias = (torch.zeros(size, device=x.device, requires_grad=True) for size in (x.shape[1], 1))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(x @ weight + bias - old_logits, y) + FIT_DECAY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    count = len(out.bias) - known
    with torch.no_grad():
        out.weight[known:] = (
            weight + FIT_SPREAD * (count > 1) * torch.randn(count, len(weight), device=x.device) * weight.std()
        )
        out.bias[known:] = bias - math.log(count)


def learned_parameters(network: GatedNetwork, plan: Adaptation) -> list[nn.Parameter]:
    """The parameters that learn; all others are frozen. Of the gate's outputs, `keep_rows` freezes the old."""
    frozen = plan.mode == "frozen"
    return only_learn(network, [*network.experts[-plan.experts :], network.gate.out] if frozen else [network])


def keep_rows(layer: nn.Linear, rows: int) -> list[Any]:
    """Have the first rows of a layer get no gradient; returns the hooks that do it."""

    def hook(gradient: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(gradient[:rows]), gradient[rows:]])

    return [parameter.register_hook(hook) for parameter in (layer.weight, layer.bias)]


def adapt(
    network: GatedNetwork,
    card: dict[str, Any],
    new: PhotoSet,
    old: PhotoSet | None,
    plan: Adaptation,
    setting: Setting,
    run: Run,
    on_batch: OnBatch | None = None,
) -> Path:
    """Grow a network and train it, where the run has not finished that; returns the file of its weights.

    new: labelled photos of the new kind; old: of those that it knows. card: what the json beside the weights is to say.

    Raises:
        KeyboardInterrupt: `on_batch` returned True; resume with the same run.
    """
    torch.manual_seed(plan.seed)  # of experts that start afresh
    before = copy.deepcopy(network).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    before.top_k = None
    grow(network, plan, new, setting)
    ranks = setting.ranks
    made, checkpoint = ranks.given(lambda: (run.path("weights/adapted.safetensors"), run.path(f"state/{STAGE}.pt")))
    if load_made(network, made, ranks):
        return made
    top_k, network.top_k = network.top_k, None  # what is not evaluated does not learn
    count = plan.batch if old is None else round(NEW_SHARE * plan.batch)
    third = (plan.batch - count) // 3

    def shown(first: int, last: int = plan.number, ranks: Ranks = ranks) -> Iterator[tuple[Batch, Batch | None]]:
        size, seed, kinds = setting.size, setting.seed, setting.corruptions
        of_new = batches(new, count, size, seed, first, last, workers=setting.workers, ranks=ranks)
        if old is None:
            yield from ((batch, None) for batch in of_new)
            return
        rest, workers = plan.batch - count, setting.workers
        of_old = batches(old, rest, size, seed + 1, first, last, third, kinds=kinds, workers=workers, ranks=ranks)
        yield from zip(of_new, of_old, strict=True)

    learned = learned_parameters(network, plan)

    def loss(frames: Tensor) -> Tensor:
        found = setting.run(network, frames)[0]
        return imitation_loss(found, found)

    check_memory(network.to(memory_format=torch.channels_last), loss, setting.size, plan.batch, ranks)
    if plan.experts and ranks.first and not checkpoint.exists():  # the others are given its weights
        fit_gate(network, len(before.names), shown(0, FIT_BATCHES, Ranks(ranks.device)))
    hooks = keep_rows(network.gate.out, len(before.names)) if plan.mode == "frozen" else []
    log = BatchLog(run, STAGE, plan.number, plan.batch, ranks)
    led = bool(plan.experts) and network.rule.leads
    counts = Counts(count, plan.batch - count, third, round(ATTACKED_SHARE * count) if led else 0)

    def learn(pair: tuple[Batch, Batch | None], number: int, done: float, update: Update) -> dict[str, Tensor]:
        torch.manual_seed((setting.seed << 32) + number)  # of the noise, on any device
        losses = batch_losses(network, before, *pair, counts, plan, setting)
        update(losses["loss"])
        return losses

    pace = Pace(plan.number, plan.rate, plan.rate, setting.save_every)
    try:
        train(network, learned, shown, learn, pace, checkpoint, on_batch, log, ranks)
    finally:
        for hook in hooks:
            hook.remove()
        network.top_k = top_k
    if ranks.first:
        save_gated(network, card, made)
    return made


@dataclass(frozen=True)
class Counts:
    """Frames of a batch of all ranks: new ones, old ones, and how many of each, the last, are attacked."""

    new: int
    old: int
    attacked_old: int
    attacked_new: int


def batch_losses(
    network: GatedNetwork,
    before: GatedNetwork,
    new: Batch,
    old: Batch | None,
    counts: Counts,
    plan: Adaptation,
    setting: Setting,
) -> dict[str, Tensor]:
    """L1, of labels and of the gate's choice, and L2 of a batch: this rank's summands of means over all of it.

    Where old experts are frozen, new ones learn without them, as the gate is to ask for them: a third of the cost. Of
    old photos there is then nothing to learn but whom to ask.
    """
    known, batch = len(before.names), counts.new + counts.old * (old is not None)
    route = range(known, len(network.names)) if plan.mode == "frozen" else None
    frames, reference, own = new.shown, None, None
    if any(label.known is not None and len(label.known) < len(network.class_names) for label in new.labels):
        with torch.no_grad():
            reference = setting.run(before, new.clean)[0]
    if counts.attacked_new:
        with torch.no_grad():
            own = answers = setting.run(network, frames, route)[0]

        def harm_of_new(rows: slice) -> Harm:
            return Goal.of("labels", answers[rows], new.labels[rows]).loss

        first = counts.new - counts.attacked_new
        frames = attacked(network, frames, first, counts.new, harm_of_new, plan, setting, route)
    if old is not None:

        def harm_of_old(rows: slice) -> Harm:
            with torch.no_grad():
                return partial(imitation_loss, teacher=setting.run(before, old.clean[rows])[0])

        shown = attacked(network, old.shown, counts.old - counts.attacked_old, counts.old, harm_of_old, plan, setting)
    count = len(frames)
    if old is not None and route is None:
        frames = torch.cat([frames, shown]).contiguous(memory_format=torch.channels_last)
    with setting.precision():
        raw, logits = network(frames, route)
        if old is not None and route is not None:
            logits = torch.cat([logits, network.gate.out(network.gate_features(shown))])
    found = decode(network.head, raw, logits[: len(frames)])
    of_new = label_loss(found[:count], new.labels, reference, own).sum()
    losses = {"loss": of_new / batch, "new": of_new / counts.new}
    if old is not None and route is None:
        with torch.no_grad():
            wanted = setting.run(before, old.clean)[0]
        labels = list(old.labels) or [Labelled(Path(), o) for o in suppress(wanted, SHOWN_CONFIDENCE, Detector.iou)]
        of_old = label_loss(found[count:], labels, wanted).sum()
        losses |= {"loss": losses["loss"] + of_old / batch, "old": of_old / counts.old}
    if plan.experts:
        log_weights = logits.log_softmax(1)
        groups = torch.stack([log_weights[:, :known].logsumexp(1), log_weights[:, known:].logsumexp(1)])
        evaluate = torch.cat([groups[1, :count], groups[0, count:]])
        losses["gate"] = -evaluate.sum() / batch
        losses["loss"] = losses["loss"] + losses["gate"]
    if plan.mode == "full" and plan.keep:
        with setting.precision():
            with torch.no_grad():
                was = before(frames)[0]["experts"]
            now = zip(raw["experts"][:known], was, strict=True)
            pairs = [(decode(network.head, a), decode(network.head, b)) for (_, a), (_, b) in now]
        losses["moved"] = torch.stack([retention_loss(a, b).sum() / batch for a, b in pairs]).sum()
        losses["loss"] = losses["loss"] + plan.keep * losses["moved"]
    return losses


def attacked(
    network: GatedNetwork,
    frames: Tensor,
    first: int,
    last: int,
    harm_of: Callable[[slice], Harm],
    plan: Adaptation,
    setting: Setting,
    route: Sequence[int] | None = None,
) -> Tensor:
    """Frames of this rank, those from `first` to `last` among all of the ranks attacked.

    harm_of: the loss, of what is found in some of this rank's frames, that is raised; route: by some experts, or all.
    """
    rows = slice(len(setting.ranks.rows(0, first)), len(frames))
    if rows.stop == rows.start:
        return frames
    harm, noise = harm_of(rows), setting.ranks.among(first, last)
    made = perturb(frames[rows], lambda x: harm(setting.run(network, x, route)[0]), plan.adversary, noise)
    return with_rows(frames, rows, made)


def hold_out(photos: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Photos to train on and photos to judge by, evenly spread; of very few photos, all to train on."""
    if len(photos) < JUDGED_ONE_IN:
        return list(photos), []
    judged = photos[:: max(JUDGED_ONE_IN, math.ceil(len(photos) / MOST_JUDGED))]
    files = {file_of(one) for one in judged}
    return [one for one in photos if file_of(one) not in files], list(judged)
