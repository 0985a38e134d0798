"""One stage of hardening: some parts of a gated ensemble learn from normal, hard and adversarial frames."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detguard import DetguardError
from detguard.data.batches import Batch, PhotoSet, Samples, batches
from detguard.data.corruptions import KINDS
from detguard.detections import Candidates
from detguard.detectors.gated import EXPERTS, GatedNetwork
from detguard.detectors.ultralytics import decode, run_layers
from detguard.engine import bf16_helps, cores
from detguard.hardening.adversary import Adversary, perturb
from detguard.hardening.loop import BatchLog, OnBatch, Pace, Update, Validate, train
from detguard.hardening.losses import MAPS, Goal, feature_loss, feature_variances, gate_margin
from detguard.hardening.members import Members
from detguard.ranks import ALONE, Ranks
from detguard.transforms.base import Transform

# Kinds of frames, each that of the expert of the same number.
NORMAL, HARD, ADVERSARIAL = range(len(EXPERTS))
# More batches than any stage has time for.
ENDLESS = 10**12
# Of the gate, which learns from nothing, also where experts only go on.
GATE_RATE = 3e-3


@dataclass(frozen=True)
class Stage:
    """What learns from what, for `number` batches or `seconds`; its name is that of its metrics and checkpoint.

    rate: highest learning rate, as a share of each layer's weights (root mean square) per update;
    route: the expert that learns, alone, or None for all through the gate; trunk: whether the trunk learns too;
    share: of normal, hard and adversarial frames in a batch; size: side of its frames, if not that of the setting:
    smaller frames show parts of photos at the same scale. sampled: share of the adversarial frames that are photos of
    attacks made before. learn: what is wanted of them, one of LEARN, or MAPS, for which the backbone of the expert
    learns alone. aims: parts of the loss that attacks raise, of which the most harmful counts per frame ("class" and
    "box": multi-task training, Zhang & Wang 2019). ramp: share of the stage over which the budget grows. margins:
    weights of the gate's logits in the attack, taken in turn: an attack on the result alone is blind where the gate is
    sure. transforms: what attacked frames go through, in the attack and when they are learned from, each by one or by
    none. gate, features: weights of the gate's cross-entropy, which it learns by whichever expert is trained, and of
    the error of feature maps. backbone: share of the rate at which that of the expert learns.
    """

    name: str
    number: int | None
    route: int | None
    trunk: bool
    share: tuple[float, float, float]
    adversary: Adversary = field(default_factory=Adversary)
    experts: tuple[int, ...] | None = None
    rate: float = 3e-3
    size: int | None = None
    sampled: float = 0.0
    learn: str = "teacher"
    aims: tuple[str, ...] = ("all",)
    ramp: float = 0.0
    margins: tuple[float, ...] = (0.0,)
    transforms: tuple[Transform, ...] = ()
    gate: float = 0.0
    features: float = 0.0
    seconds: float | None = None
    backbone: float = 1.0

    def adversary_at(self, done: float) -> Adversary:
        """The adversary of a batch after which that share of the stage is over; its budget may still be growing."""
        share = min(1.0, done / self.ramp) if self.ramp else 1.0
        return replace(self.adversary, eps=self.adversary.eps * share)


@dataclass(frozen=True)
class Setting:
    """What all stages have in common. batch: frames of all `ranks` together; workers: processes that make batches.

    bf16: forward and backward in bfloat16, where the device has it; corruptions: kinds that hard frames show.
    """

    batch: int = 16
    size: int = 320
    seed: int = 0
    bf16: bool = False
    save_every: float = 180.0
    corruptions: tuple[str, ...] = tuple(KINDS)
    workers: int = 1
    ranks: Ranks = ALONE

    @classmethod
    def on(
        cls, ranks: Ranks, workers: int | None, batch: int, size: int, seed: int, corruptions: tuple[str, ...]
    ) -> "Setting":
        """That of a command: bfloat16 where it helps, and by default a worker for each core that the rank may use.

        Raises:
            DetguardError: there are more ranks than photos in a batch.
        """
        if batch < ranks.count:
            raise DetguardError(f"`batch` {batch}: fewer photos than the {ranks.count} processes that train")
        workers = workers or max(1, cores() // ranks.local)
        return cls(batch, size, seed, bf16_helps(ranks.device), cls.save_every, corruptions, workers, ranks)

    def precision(self) -> AbstractContextManager[Any]:
        """The context of a network's forward pass: autocast to bfloat16 where the device has it."""
        return torch.autocast(self.ranks.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def run(
        self, network: GatedNetwork, frames: Tensor, route: int | Sequence[int] | None = None
    ) -> tuple[Candidates, dict[int, Tensor]]:
        """Candidates of a network, through one expert, some or all, and the feature maps on the way."""
        with self.precision():
            raw, gate = network(frames, route)
        return decode(network.head, raw, gate), _single(raw["maps"])

    def maps(self, network: GatedNetwork, frames: Tensor, route: int) -> dict[int, Tensor]:
        """The feature maps that the neck takes from the backbone, by the way of one expert."""
        with self.precision():
            return _single(run_layers(network.backbone(route), frames, {}, network.save)[1])


def _single(maps: dict[int, Any]) -> dict[int, Tensor]:
    """Those of layers that give one map; of YOLOv9e some give several, which others sum up."""
    return {layer: x for layer, x in maps.items() if isinstance(x, Tensor)}


# Of frames of each kind: where they lie among those of this rank, and how many all ranks have together.
Kinds = dict[int, tuple[slice, int]]


@dataclass(frozen=True)
class Layout:
    """The kinds of frames in a batch of all ranks: `hard` ones, normal ones, those `attacked`, last those `sampled`.

    sampled: adversarial frames from files; they are not attacked again.
    """

    batch: int
    hard: int
    attacked: int
    sampled: int = 0

    @classmethod
    def of(cls, stage: Stage, batch: int) -> "Layout":
        """The layout of the batches of one stage."""
        hard, normal = (round(stage.share[kind] * batch) for kind in (HARD, NORMAL))
        # Both may be rounded up, or both down, and where none is to be attacked none is.
        normal = min(normal, batch - hard) if stage.share[ADVERSARIAL] else batch - hard
        adversarial = batch - hard - normal
        sampled = round(stage.sampled * adversarial)
        return cls(batch, hard, adversarial - sampled, sampled)

    @property
    def last(self) -> int:
        """The end of those that are attacked."""
        return self.batch - self.sampled

    def kinds(self, ranks: Ranks, *, attacked: bool = True) -> Kinds:
        """Those that there are; before frames are `attacked`, those to be are normal."""
        last = self.last - self.attacked * attacked
        ends = {HARD: (0, self.hard), NORMAL: (self.hard, last), ADVERSARIAL: (last, self.batch)}
        local = {end: len(ranks.rows(0, end)) for bounds in ends.values() for end in bounds}
        return {
            kind: (slice(local[start], local[end]), end - start)
            for kind, (start, end) in sorted(ends.items())
            if end > start
        }


def learned_parameters(network: GatedNetwork, stage: Stage) -> list[nn.Parameter]:
    """The parameters that a stage trains; all others are frozen."""
    if stage.learn == MAPS:
        return only_learn(network, network.backbone(stage.route or 0))
    experts = stage.experts if stage.route is None else (stage.route,)
    chosen = range(len(network.experts)) if experts is None else experts
    parts = [network.experts[i] for i in chosen] + ([network.trunk] if stage.trunk else [])
    parts += [network.gate] if stage.route is None or stage.gate else []
    return only_learn(network, parts)


def only_learn(network: GatedNetwork, parts: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Freeze a network but for some parts; returns their parameters. The heads' decoding constants never learn."""
    network.requires_grad_(False)
    learned = [p for part in parts for name, p in part.named_parameters() if "dfl" not in name]
    for parameter in learned:
        parameter.requires_grad_(True)
    return learned


def train_stage(
    network: GatedNetwork,
    teacher: GatedNetwork,
    source: PhotoSet,
    stage: Stage,
    setting: Setting,
    checkpoint: Path,
    on_batch: OnBatch | None = None,
    log: BatchLog | None = None,
    validate: Validate | None = None,
    samples: Samples | None = None,
) -> GatedNetwork:
    """Train `network` in place, from `checkpoint` where it stopped; returns the average of its last weights.

    teacher: the undefended detector as a network of one expert; samples: where the stage has frames of them. The rest
    is as in `train`.
    """
    teacher.to(memory_format=torch.channels_last)
    ranks, size, layout = setting.ranks, stage.size or setting.size, Layout.of(stage, setting.batch)

    def made(first: int) -> Iterator[Batch]:
        zoom, kinds = setting.size / size, setting.corruptions
        return batches(
            source, setting.batch, size, setting.seed, first, stage.number or ENDLESS, layout.hard, zoom, kinds,
            setting.workers, ranks, samples, layout.sampled,
        )  # fmt: skip

    def learn(batch: Batch, number: int, done: float, update: Update) -> dict[str, Tensor]:
        return Lesson(network, teacher, batch, stage, setting, number, done).learn(update)

    learned = learned_parameters(network, stage)
    slower = network.backbone(stage.route or 0) if stage.backbone < 1 else []
    shares = {p: stage.backbone for layer in slower for p in layer.parameters()}
    pace = Pace(stage.number, stage.rate, GATE_RATE, setting.save_every, stage.seconds)
    top_k, network.top_k = network.top_k, None  # what is not evaluated does not learn
    try:
        return train(network, learned, made, learn, pace, checkpoint, on_batch, log, ranks, validate, shares)
    finally:
        network.top_k = top_k


class Lesson:
    """What is learned from one batch, of which this rank has some frames, as `Layout` has them.

    done: share of the stage that is over; rows: of this rank's frames, the ones that are attacked; goal: what is wanted
    of all of them. Losses, those that `learn`'s `update` is given and those it returns, are this rank's summands of
    means over the whole batch.
    """

    def __init__(
        self, network: GatedNetwork, teacher: GatedNetwork, batch: Batch, stage: Stage, setting: Setting,
        number: int, done: float,
    ) -> None:  # fmt: skip
        self.network, self.batch, self.stage, self.setting = network, batch, stage, setting
        self.adversary = stage.adversary_at(done)
        self.layout, ranks = Layout.of(stage, setting.batch), setting.ranks
        first, last = self.layout.last - self.layout.attacked, self.layout.last
        self.rows = slice(len(ranks.rows(0, first)), len(ranks.rows(0, last)))
        # The noise of an attack is drawn for all ranks, of which this one has some.
        self.among = ranks.among(first, last)
        seeds = ((setting.seed, number, i, 1) for i in ranks.rows(first, last))  # others than made the frames
        self.members = Members(stage.transforms, seeds)
        self.free = self.layout.attacked > 0 and self.adversary.method == "free"
        self.margin = stage.margins[number % len(stage.margins)]
        torch.manual_seed((setting.seed << 32) + number)  # of the noise, on any device
        with torch.no_grad():
            self.wanted, self.maps = self.answer(teacher, batch.clean, 0)
            self.variances: dict[int, Tensor] = {}
            if stage.features or self.wanted is None:
                share = len(batch.shown) / self.layout.batch
                self.variances = feature_variances(self.maps, lambda x: ranks.total(x * share))
        self.goal = self.goal_of(slice(len(batch.shown)))

    def answer(
        self, of: GatedNetwork, frames: Tensor, route: int | None
    ) -> tuple[Candidates | None, dict[int, Tensor]]:
        """What a network says of frames: its candidates and feature maps, or where maps are learned these alone."""
        if self.stage.learn == MAPS:
            return None, self.setting.maps(of, frames, route or 0)
        return self.setting.run(of, frames, route)

    def on_gate(self, found: Candidates | None) -> Tensor | None:
        """What an attack gains by leading the gate astray, where this batch's attack knows of it."""
        if not self.margin or found is None or found.gate is None:
            return None
        return self.margin * gate_margin(found.gate, NORMAL, self.network.robust)

    def goal_of(self, rows: slice) -> Goal:
        """What is wanted of some of the frames."""
        if self.wanted is None:
            return Goal(maps={layer: x[rows] for layer, x in self.maps.items()}, variances=self.variances)
        return Goal.of(self.stage.learn, self.wanted[rows], self.batch.labels[rows])

    def attacked(self, shown: Tensor) -> Tensor:
        """The frames after the attacks on those that are attacked, of which the worst stays."""
        if self.rows.stop == self.rows.start or self.free:
            return shown
        goal, route = self.goal_of(self.rows), self.stage.route

        def harm(x: Tensor, aim: str) -> Tensor:
            found, maps = self.answer(self.network, self.members(x), route)
            loss, more = goal.loss(found, maps, aim), self.on_gate(found)
            return loss if more is None else loss + more

        frames = shown[self.rows]
        attacks = [perturb(frames, partial(harm, aim=aim), self.adversary, self.among) for aim in self.stage.aims]

        def left(x: Tensor) -> Tensor:
            return goal.loss(*self.answer(self.network, self.members(x), route))

        return with_rows(shown, self.rows, worst(attacks, left))

    def losses(self, found: Candidates | None, maps: dict[int, Tensor], *, attacked: bool) -> dict[str, Tensor]:
        """The loss and its parts; before frames are `attacked`, those to be count as normal ones."""
        stage, kinds = self.stage, self.layout.kinds(self.setting.ranks, attacked=attacked)
        gate = found.gate if found is not None and stage.gate else None
        parts = _losses(self.goal.loss(found, maps), gate, kinds, self.layout.batch, stage.gate)
        if stage.features:
            parts["features"] = feature_loss(maps, self.maps, self.variances).sum() / self.layout.batch
            parts["loss"] = parts["loss"] + stage.features * parts["features"]
        return parts

    def learn(self, update: Update) -> dict[str, Tensor]:
        """Attack, and update the weights, in free training once for every step of the attack; returns the losses."""
        free, rows, shown = self.free, self.rows, self.attacked(self.batch.shown)
        losses: dict[str, Tensor] = {}
        for turn in range(self.adversary.updates if free else 1):
            if free:
                shown = shown.detach().requires_grad_()
            transformed = self.stage.transforms and (turn or not free)
            looked = with_rows(shown, rows, self.members(shown[rows])) if transformed else shown
            found, maps = self.answer(self.network, looked, self.stage.route)
            parts = self.losses(found, maps, attacked=not free or turn > 0)
            losses |= {name: value.detach() for name, value in parts.items()}
            more = self.on_gate(found)
            pull = torch.autograd.grad(more.sum(), shown, retain_graph=True)[0] if free and more is not None else None
            update(parts["loss"])
            if free and turn < self.adversary.steps and shown.grad is not None:
                clean = self.batch.shown[rows]
                x = shown.detach()[rows] if turn else self.adversary.start(clean, self.among)
                gradient = shown.grad * self.layout.batch + (0 if pull is None else pull)
                shown = with_rows(shown.detach(), rows, self.adversary.advance(x, gradient[rows], clean))
        return losses


def with_rows(frames: Tensor, rows: slice, changed: Tensor) -> Tensor:
    """Frames of which some, `rows`, are changed."""
    parts = [frames[: rows.start], changed, frames[rows.stop :]]
    return torch.cat(parts).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def worst(attacks: list[Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Of each frame the attack, of several, that raises the loss most."""
    if len(attacks) == 1:
        return attacks[0]
    best = torch.stack([loss(x) for x in attacks]).argmax(0)
    return torch.stack(attacks)[best, torch.arange(len(best), device=best.device)]


def _losses(
    per_frame: Tensor, gate_logits: Tensor | None, kinds: Kinds, batch: int, gate_weight: float
) -> dict[str, Tensor]:
    """The loss of a batch and, for the records, its mean on each kind of frames and the gate's weights there.

    batch: frames of all ranks, of whose means these are this rank's summands.
    """
    losses = {"loss": per_frame.sum() / batch}
    losses |= {EXPERTS[kind]: per_frame[rows].sum() / count for kind, (rows, count) in kinds.items()}
    if gate_logits is not None:
        logits, last = gate_logits, gate_logits.shape[1] - 1
        # Each kind counts alike, or the gate would learn how many of each a batch has.
        of_kinds = [
            -logits[rows].log_softmax(1)[:, min(kind, last)].sum() / count for kind, (rows, count) in kinds.items()
        ]
        gate = torch.stack(of_kinds).mean()
        losses |= {"gate": gate, "loss": losses["loss"] + gate_weight * gate}
        for kind, (rows, count) in kinds.items():
            weights = logits[rows].softmax(1).sum(0) / count
            losses |= {f"gate {EXPERTS[kind]} {i}": weight for i, weight in enumerate(weights)}
    return losses
