"""Adapting a gated ensemble to photos of a new kind: new experts, a gate that knows when to ask them, old ones kept."""

import copy
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detguard import DetguardError, defaults
from detguard.data.batches import Batch, PhotoSet, batches
from detguard.data.stream import Labelled
from detguard.detectors.gated import GatedNetwork, average_among
from detguard.detectors.load import save_gated
from detguard.detectors.shared import ADAPTER, FORMS
from detguard.detectors.sparse import MeanSparse
from detguard.detectors.ultralytics import decode
from detguard.files import read_json
from detguard.hardening.adversary import Adversary, perturb
from detguard.hardening.kinds import BATCHES, OnShare, answers, fit_kinds
from detguard.hardening.loop import BatchLog, OnBatch, Pace, Update, load_made, train
from detguard.hardening.losses import imitation_loss, label_loss, retention_loss
from detguard.hardening.memory import check_memory
from detguard.hardening.train import Setting, only_learn, with_rows
from detguard.hardening.validation import contents, forget_runs
from detguard.ranks import Ranks
from detguard.runs import Run
from detguard.schema import check, whole

MODES = ("full", "frozen")
STAGE = "adapt"
# Of a run, the expert that new ones begin as.
SOURCE = "state/source.json"
# From so few new photos a whole network learns the photos, not their kind.
FEW = 500
# Of a batch, new photos; of the others, old ones, a third (rounded down) is corrupted and a third attacked.
NEW_SHARE = 0.5
# Of the photos one in so many, at most so many, is not trained on but judged by.
JUDGED_ONE_IN, MOST_JUDGED = 5, 64


@dataclass(frozen=True)
class Adaptation:
    """How to adapt; the options of `detguard adapt`.

    Where nothing is said, `adapt` chooses the `mode`, and how many `photos` to see, by how many are new.

    Attributes:
        experts: new ones.
        expert: what a new one has of its own, one of FORMS: adapter, head or whole.
        mode: frozen (old experts stay as they are, to the bit) or full.
        init: new experts start as the `best` of the old ones, or `fresh`, from random weights.
        keep: weight of how far old experts' answers move from what they were, `--lambda`.
        photos: seen, with repeats.
        batch: frames per batch, of all processes together.
        rate: learning rate, in proportion to weights.
        seed: of all that is random.
        eps: budget of the attacks that old photos are shown under, levels of 255; of `adapt` no keyword, as it is that
            of the ensemble's hardening.

    Raises:
        DetguardError: an option is not one of those known.
    """

    experts: int = defaults.Adapt.experts
    expert: str = defaults.Adapt.expert
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
        """The attack that is made on old photos in training."""
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


def grow(network: GatedNetwork, plan: Adaptation, new: PhotoSet, setting: Setting, run: Run) -> None:
    """Add the new experts of a plan to an ensemble; the run keeps which of the old ones they begin as."""
    if not plan.experts:
        return

    def first_source() -> int:
        # Found anew by another device's arithmetic, or that of another process, it might be another one.
        file = run.path(SOURCE)
        if not file.exists():
            run.write(SOURCE, json.dumps({"expert": best(network, new, setting)}).encode())
        try:
            return int(check(read_json(file), {"expert": whole(0, len(network.names) - 1)})["expert"])
        except DetguardError as error:
            raise DetguardError(f"{file}: {error}; delete the folder {file.parent} to begin again") from error

    first = sum(name.startswith("adapted") for name in network.names) + 1
    names = [f"adapted {number}" for number in range(first, first + plan.experts)]
    network.grow(names, setting.ranks.given(first_source), plan.expert)
    if plan.init == "fresh":
        for name, module in network.experts[-plan.experts :].named_modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and "dfl" not in name:
                module.reset_parameters()
            if isinstance(module, MeanSparse):  # by channels that are others now; the layers stay, as heads that share
                module.limit.zero_()
        for expert in range(len(network.names) - plan.experts, len(network.names)):
            network.head_of(expert).bias_init()  # few objects, or the background alone would make the loss enormous


@torch.no_grad()
def best(network: GatedNetwork, new: PhotoSet, setting: Setting) -> int:
    """The expert that does most for new photos: highest mean of the gate's weight times e^-loss."""
    count = -(-setting.batch // setting.ranks.count)  # as many as this process is to hold
    (batch,) = batches(new, count, setting.size, setting.seed, 0, 1, ranks=Ranks(setting.ranks.device))
    found = [setting.run(network, batch.shown, i)[0] for i in range(len(network.names))]
    harm = torch.stack([label_loss(of_one, batch.labels) for of_one in found], 1)
    gate = found[0].gate  # the same by every route
    assert gate is not None
    return int((gate.softmax(1) * (-harm).exp()).mean(0).argmax())


def learned_parameters(network: GatedNetwork, plan: Adaptation) -> list[nn.Parameter]:
    """The parameters that learn by gradient; all others are frozen, and what tells kinds apart is fitted."""
    whole = [network.trunk, network.experts, network.gate]
    return only_learn(network, network.experts[-plan.experts :] if plan.mode == "frozen" else whole)


def adapt(
    network: GatedNetwork,
    card: dict[str, Any],
    new: PhotoSet,
    old: PhotoSet | None,
    plan: Adaptation,
    setting: Setting,
    run: Run,
    on_batch: OnBatch | None = None,
    on_fit: OnShare = lambda _: False,
) -> Path:
    """Grow a network and train it, where the run has not finished that; returns the file of its weights.

    new: labelled photos of the new kind; old: of those that it knows. card: what the json beside the weights is to say.
    on_fit: of finding whom to ask, before training, and where all learns, after it.

    Raises:
        KeyboardInterrupt: `on_batch` or `on_fit` returned True; resume with the same run.
    """
    half = plan.batch if old is None else round(NEW_SHARE * plan.batch)
    ranks = setting.ranks
    if plan.mode == "full" and old is not None and min(half, plan.batch - half) < ranks.count:
        raise DetguardError(
            f"`batch` {plan.batch}: half of it is new photos and half old ones, and each of {ranks.count} processes "
            f"needs some of both; give at least {2 * ranks.count}"
        )
    torch.manual_seed(plan.seed)  # of experts that start afresh
    before = copy.deepcopy(network).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    before.top_k = None
    grow(network, plan, new, setting, run)
    made, checkpoint = ranks.given(lambda: (run.path("weights/adapted.safetensors"), run.path(f"state/{STAGE}.pt")))
    if load_made(network, made, ranks):
        return made
    top_k, network.top_k = network.top_k, None  # what is not evaluated does not learn
    third = (plan.batch - half) // 3

    def pairs(first: int, last: int, ranks: Ranks, count: int) -> Iterator[tuple[Batch, Batch | None]]:
        size, seed, kinds = setting.size, setting.seed, setting.corruptions
        of_new = batches(new, count, size, seed, first, last, workers=setting.workers, ranks=ranks)
        if old is None or count == plan.batch:
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

    def fit() -> None:
        torch.manual_seed(plan.seed)
        both = pairs(0, BATCHES, Ranks(ranks.device), half)
        alone = ranks.count == 1  # else the others wait for it to come to its end
        fit_kinds(network, before, both, plan.adversary, setting, lambda share: on_fit(share) and alone)

    if plan.experts and ranks.first and not checkpoint.exists():  # the others are given its weights
        fit()
    # Frozen, old experts learn nothing of old photos, and whom to ask is known.
    count = plan.batch if plan.mode == "frozen" else half
    log = BatchLog(run, STAGE, plan.number, plan.batch, ranks)
    counts = Counts(count, plan.batch - count, third)

    def learn(pair: tuple[Batch, Batch | None], number: int, done: float, update: Update) -> dict[str, Tensor]:
        torch.manual_seed((setting.seed << 32) + number)  # of the noise, on any device
        losses = batch_losses(network, before, *pair, counts, plan, setting)
        update(losses["loss"])
        return losses

    pace = Pace(plan.number, plan.rate, plan.rate, setting.save_every)
    try:
        train(
            network, learned, lambda first: pairs(first, plan.number, ranks, count), learn, pace, checkpoint, on_batch,
            log, ranks,
        )  # fmt: skip
    finally:
        network.top_k = top_k
    if ranks.first:
        if plan.experts and plan.mode == "full":  # the robust expert sees otherwise by now
            fit()
        save_gated(network, card, made)
    return made


@dataclass(frozen=True)
class Counts:
    """Frames of a batch of all ranks: new ones, old ones, and how many of the old, the last, are attacked."""

    new: int
    old: int
    attacked: int


def batch_losses(
    network: GatedNetwork,
    before: GatedNetwork,
    new: Batch,
    old: Batch | None,
    counts: Counts,
    plan: Adaptation,
    setting: Setting,
) -> dict[str, Tensor]:
    """L1 and L2 of a batch: this rank's summands of means over all of it.

    New experts learn new photos without the old ones, as they are to be asked; where those are frozen, that is all: a
    fraction of the cost.
    """
    frames, ranks, reference = new.shown, setting.ranks, None
    known, frozen = len(before.names), plan.mode == "frozen"
    if any(label.known is not None and len(label.known) < len(network.class_names) for label in new.labels):
        with torch.no_grad():
            reference = setting.run(before, new.clean)[0]
    if old is not None:
        with torch.no_grad():
            wanted = setting.run(before, old.clean)[0]
        labels = answers(old, wanted)
        shown, first = old.shown, counts.old - counts.attacked
        rows = slice(len(ranks.rows(0, first)), len(shown))
        if rows.stop > rows.start:

            def harm(x: Tensor) -> Tensor:
                return imitation_loss(setting.run(network, x)[0], wanted[rows])

            noise = ranks.among(first, counts.old)
            shown = with_rows(shown, rows, perturb(shown[rows], harm, plan.adversary, noise))
        frames = torch.cat([frames, shown]).contiguous(memory_format=torch.channels_last)
    batch = counts.new + counts.old * (old is not None)
    with setting.precision():
        raw, logits = network(frames, range(known, len(network.names)) if frozen else None)
    found, count = decode(network.head, raw, logits), len(new.shown)
    of_new = label_loss(found[:count], new.labels, reference).sum()
    losses = {"loss": of_new / batch, "new": of_new / counts.new}
    if plan.experts and not frozen:
        grown = average_among({i: raw["experts"][i][1] for i in range(known, len(network.names))}, logits)
        of_grown = label_loss(decode(network.head, grown, logits)[:count], new.labels, reference).sum()
        losses |= {"loss": losses["loss"] + of_grown / batch, "new, grown": of_grown / counts.new}
    if old is not None:
        of_old = label_loss(found[count:], labels, wanted).sum()
        losses |= {"loss": losses["loss"] + of_old / batch, "old": of_old / counts.old}
    if plan.mode == "full" and plan.keep:
        with setting.precision(), torch.no_grad():
            was = before(frames)[0]["experts"]
        now = zip(raw["experts"][:known], was, strict=True)
        pairs = [(decode(network.head, a), decode(network.head, b)) for (_, a), (_, b) in now]
        losses["moved"] = torch.stack([retention_loss(a, b).sum() / batch for a, b in pairs]).sum()
        losses["loss"] = losses["loss"] + plan.keep * losses["moved"]
    return losses


def _judges(photo: Path | Labelled) -> bool | None:
    return photo.judges if isinstance(photo, Labelled) else None


def set_aside(*kinds: Sequence[Path] | Sequence[Labelled]) -> list[tuple[list[Any], list[Any]]]:
    """Of each kind of photos those to train on and those to judge by, evenly spread; of very few, all to train on.

    A photo is for one of both in all kinds, also where it is in several files: as `detguard attack` made it, or copied.
    Where it says itself whether it judges, it does, or of very many one in so many, unless the same photo is there
    without saying so: what a user replays beside a stream is the same each time, and so is to be what it judges.
    """
    forget_runs()
    names = iter(contents([one for photos in kinds for one in photos]))
    named = [[(one, next(names)) for one in photos] for photos in kinds]
    judging, told = dict[str, bool](), dict[str, bool]()
    for photos in named:
        untold = [name for one, name in photos if _judges(one) is None]
        distinct = [name for name in dict.fromkeys(untold) if name not in judging]
        judging |= dict.fromkeys(distinct, False)
        if len(distinct) >= JUDGED_ONE_IN:
            judged = distinct[:: max(JUDGED_ONE_IN, math.ceil(len(untold) / MOST_JUDGED))]
            judging |= dict.fromkeys(judged, True)
        for one, name in photos:
            told[name] = told.get(name, False) or bool(_judges(one))
    judging = told | judging
    made = []
    for photos in named:
        sure = [one for one, name in photos if judging[name] and _judges(one) is not None]
        held = [one for one, name in photos if judging[name] and _judges(one) is None]
        held += sure[:: math.ceil(len(sure) / MOST_JUDGED) or 1]
        made.append(([one for one, name in photos if not judging[name]], held))
    return made
