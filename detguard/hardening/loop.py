"""The loop of all training: weights and their average, records of the losses, and the checkpoint to go on from."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from detguard import DetguardError
from detguard.data.ahead import AheadError
from detguard.detectors.checkpoint import MAX_BYTES, read_state, same_form
from detguard.detectors.gated import GatedNetwork
from detguard.files import read_file, write_file
from detguard.hardening.optimizer import Optimizer
from detguard.ranks import ALONE, Ranks
from detguard.runs import Run

EMA_DECAY = 0.998
LOG_EVERY = 20
# Checkpoints that are kept of a stage.
KEPT = 3
# So many times the mean of the last so many records a loss is out of all bounds; how often a stage goes back for it.
OUT_OF_BOUNDS, HEALTHY, SETBACKS = 10.0, 10, 3

Shown = TypeVar("Shown")
Update = Callable[[Tensor], None]
# Told the number of each batch, the share of the stage that is over, and the losses of the last record; returns True to
# save and stop.
OnBatch = Callable[[int, float, dict[str, float]], bool]


@dataclass(frozen=True)
class Pace:
    """How long and how fast: number of the last batch, or the seconds that a stage has; highest rates of the weights
    and of the gate; seconds between checkpoints.
    """

    last: int | None
    rate: float
    gate_rate: float
    save_every: float
    seconds: float | None = None

    def done(self, number: int, spent: float) -> float:
        """The share of the stage that is over before a batch, `spent` seconds after it began."""
        return number / self.last if self.last is not None else spent / (self.seconds or 1)

    def share(self, number: int, done: float) -> float:
        """Share of the rates at a batch: up over the first hundred or tenth, then down a cosine to 2 %."""
        by_time = 10 * done if self.last is None else 0.0
        rising = 100 if self.last is None else min(100, max(1, self.last // 10))
        return min(1.0, max((number + 1) / rising, by_time)) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class Validate:
    """Now and then, how good the average of the weights is on photos that nothing is learned from.

    every: batches between; losses: this rank's summands of what is recorded, whose sum chooses the best weights: of
    attacked photos alone, chance would choose among weights that are as robust, and AP of few photos is rough; and what
    was found in this rank's photos; figures: of what was found in all; start: whether those that a training starts from
    are among these, as where they are robust already.
    """

    every: int
    losses: Callable[[], tuple[dict[str, Tensor], list[Any]]]
    figures: Callable[[list[Any]], dict[str, float]] = lambda _: {}
    start: bool = False


@dataclass
class BatchLog:
    """Means of a stage's losses over some batches at a time, as records of the run, where there is one.

    batch: frames of all ranks together. Losses stay where they are made until there is a record: to read each would
    have training wait for its device.
    """

    run: Run | None
    stage: str
    last: int | None
    batch: int
    ranks: Ranks = ALONE
    means: dict[str, float] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    def begin(self, first: int, names: list[str], rows: Tensor) -> None:
        """Go on before batch `first`, with the losses that are in no record yet; records of later ones were made by a
        run that was killed.
        """
        if self.run and self.ranks.first:
            records = self.run.records()
            kept = [r for r in records if r["stage"] != self.stage or r["batch"] <= first]
            if len(kept) < len(records):
                self.run.keep(kept)
        self.names, self.rows = names, list(rows.to(self.ranks.device))
        self.began, self.seen = time.monotonic(), 0

    def recent(self) -> list[float]:
        """The losses of the last records, as an unbroken stage has them."""
        records = self.run.records() if self.run else []
        return [r["loss"] for r in records if r["stage"] == self.stage and "loss" in r][-HEALTHY:]

    def waiting(self) -> Tensor:
        """The losses that are in no record yet, of all ranks, [batches, losses]."""
        return self.ranks.total(torch.stack(self.rows)).cpu() if self.rows else torch.zeros(0, len(self.names))

    def now(self) -> float:
        """The mean loss of the batches that are in no record yet."""
        return float(self.waiting()[:, self.names.index("loss")].mean())

    def add(self, number: int, losses: dict[str, Tensor]) -> dict[str, float]:
        """Take the losses of one batch; write a record when there are enough. Returns what the last one says."""
        self.names = list(losses)
        self.rows.append(torch.stack([value.detach() for value in losses.values()]))
        self.seen += 1
        # Of a stage that is over after two records there would be no curve.
        every = 1 if self.last is not None and self.last <= 2 * LOG_EVERY else LOG_EVERY
        if (number + 1) % every == 0 or number + 1 == self.last:
            self.end(number + 1)
        return self.means

    def end(self, batch: int) -> None:
        """Write a record of the losses that are in none yet, after a batch."""
        if not self.rows:
            return
        means = self.waiting().double().mean(0).tolist()
        self.means = {name: round(value, 4) for name, value in zip(self.names, means, strict=True)}
        rate = round(self.seen * self.batch / (time.monotonic() - self.began), 1)
        if all(map(math.isfinite, means)):
            self.note(batch, {"photos_per_second": rate} | self.means)
        self.rows, self.began, self.seen = [], time.monotonic(), 0

    def note(self, batch: int, what: dict[str, float]) -> None:
        """Write a record of what is so after a batch."""
        if self.run and self.ranks.first:
            self.run.append({"stage": self.stage, "batch": batch} | what)


class Average:
    """Exponential moving average of parameters; fast at first, or short stages would end where they began."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.updates = parameters, 0
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averaged weights towards the parameters after an update."""
        decay = min(EMA_DECAY, self.updates / (9 + self.updates))
        torch._foreach_lerp_(self.values, list(self.parameters), 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Have the parameters be their average, which keeps what they were until it is done again."""
        kept = [p.detach().clone() for p in self.parameters]
        torch._foreach_copy_(list(self.parameters), self.values)
        self.values = kept


@dataclass
class Progress:
    """Where a training is; what of it is no tensor is all that a resumed one must know beside them.

    spent: seconds in all; setbacks: how often it went back to a checkpoint; best: loss of the best weights so far,
    which are the `kept` ones.
    """

    number: int = 0
    spent: float = 0.0
    setbacks: int = 0
    best: float = math.inf
    kept: list[Tensor] = field(default_factory=list)


def train(
    network: GatedNetwork,
    learned: list[nn.Parameter],
    made: Callable[[int], Iterator[Shown]],
    learn: Callable[[Shown, int, float, Update], dict[str, Tensor]],
    pace: Pace,
    checkpoint: Path,
    on_batch: OnBatch | None = None,
    log: BatchLog | None = None,
    ranks: Ranks = ALONE,
    validate: Validate | None = None,
    shares: Mapping[nn.Parameter, float] = MappingProxyType({}),
) -> GatedNetwork:
    """Train the `learned` parameters in place, from `checkpoint` on; returns the network with their moving average.

    made: batches from a number on; learn: given a batch, its number, the share of the stage that is over after it, and
    how to update the weights by a loss, of which each of the `ranks` has a summand; returns what is to be recorded,
    in summands too, a "loss" among them. No device is waited for but at records and checkpoints. validate: by which
    the best average is returned, not the last. shares: of the rate, of parameters that learn slower. Where the loss
    grows out of all bounds, training goes back to the checkpoint, at half the rate.

    Raises:
        KeyboardInterrupt: `on_batch` returned True on one of the ranks; the checkpoint holds all that was learned.
        AheadError: no more batches can be made; the same.
        DetguardError: the loss has grown so again and again.
    """
    network.to(memory_format=torch.channels_last)  # as frames are, or convolutions reorder one of them
    network.eval()  # batch norms are folded in; nothing else behaves differently in training
    ranks.share(network)
    average = Average(learned)
    optimizer = Optimizer(learned, list(network.gate.parameters()), pace.gate_rate / pace.rate, ranks, shares)
    log = log or BatchLog(None, "", pace.last, 0, ranks)
    files = Checkpoints(checkpoint, network, average, optimizer, pace.last, log, ranks)
    at, healthy = files.restore() or Progress(), deque(ranks.given(log.recent), maxlen=HEALTHY)
    began = time.monotonic() - at.spent
    saved, batches = time.monotonic(), made(at.number)
    if not files.exist():  # what to go back to
        if validate and validate.start:
            _judge(validate, files, at)
        files.save(at)

    def back(loss: float) -> None:
        nonlocal at, healthy, saved, began, batches
        at = _back(files, at, loss)
        healthy = deque(ranks.given(log.recent), maxlen=HEALTHY)  # or a resumed run would judge by others
        saved = time.monotonic()
        began = saved - at.spent
        batches = made(at.number)

    while True:
        if (done := pace.done(at.number, at.spent)) >= 1:
            if not (log.rows and diverged(grown := log.now(), healthy)):
                break
            back(grown)  # of batches after the last record
            continue
        batch = _next(batches, files, at, healthy)
        rate = pace.rate * pace.share(at.number, done) * 0.5**at.setbacks

        def update(loss: Tensor, step: float = rate) -> None:
            optimizer.update(loss, step)
            average.update()

        losses = learn(batch, at.number, pace.done(at.number + 1, at.spent), update)
        losses_now = log.add(at.number, losses)
        at.number += 1
        stop = ranks.any(bool(on_batch and on_batch(at.number - 1, pace.done(at.number, at.spent), losses_now)))
        late = stop or ranks.any(time.monotonic() - saved > pace.save_every)
        loss = losses_now["loss"] if not log.rows else log.now() if late else None
        if loss is not None and diverged(loss, healthy):
            back(loss)
            if stop:
                raise KeyboardInterrupt
            continue
        if loss is not None and not log.rows:
            healthy.append(loss)
        spent = time.monotonic() - began
        at.spent = ranks.given(partial(float, spent)) if pace.last is None else spent  # all must end together
        if validate and at.number % validate.every == 0 and pace.done(at.number, at.spent) < 1:
            _judge(validate, files, at)
        if late:
            files.save(at)
            saved = time.monotonic()
        if stop:
            raise KeyboardInterrupt
    log.end(at.number)
    if validate:
        _judge(validate, files, at)
    average.values = at.kept or average.values
    average.swap()
    return network


def _next(batches: Iterator[Shown], files: "Checkpoints", at: Progress, healthy: Sequence[float]) -> Shown:
    """The next batch; where one of the ranks has none all of them stop, or the others would wait.

    What was learned is saved then, but if the loss has grown out of all bounds since it was told last.
    """
    lost, batch = None, None
    try:
        batch = next(batches)
    except AheadError as error:
        lost = error
    if files.ranks.any(lost is not None):
        if not (files.log.rows and diverged(files.log.now(), healthy)):
            files.save(at)
        raise lost or AheadError("another of the processes that train can make no more batches")
    assert batch is not None
    return batch


def _judge(validate: "Validate", files: "Checkpoints", at: Progress) -> None:
    """Validate the average, record what is told, and keep it if it is the best so far."""
    files.average.swap()
    losses, found = validate.losses()
    values = files.ranks.total(torch.stack(list(losses.values()))).tolist()
    if math.isfinite(sum(values)) and sum(values) < at.best:
        at.best, at.kept = sum(values), [p.detach().clone() for p in files.average.parameters]
    files.average.swap()
    told = dict(zip(losses, values, strict=True)) | validate.figures(files.ranks.gathered(found))
    files.log.note(at.number, {name: round(value, 4) for name, value in told.items()})


def _back(files: "Checkpoints", at: Progress, loss: float) -> Progress:
    """Go back to the last checkpoint, again and again to one before, from where training goes on at half the rate.

    Raises:
        DetguardError: that has been done too often.
    """
    worst, setbacks = at.number, at.setbacks + 1
    at = files.restore(setbacks - 1) or Progress()
    if setbacks > SETBACKS:
        raise DetguardError(
            f"{files.log.stage}: the loss grew out of all bounds at batch {worst} ({loss:.3g}), after going back "
            f"{SETBACKS} times; start anew with a lower `rate` or a smaller `eps`"
        )
    at.setbacks = setbacks
    files.log.means = {"diverged": worst, "setbacks": setbacks}
    files.log.note(at.number, files.log.means)
    files.save(at, older=False)  # or a resumed run would not know
    return at


def diverged(loss: float, healthy: Sequence[float]) -> bool:
    """Whether a loss is none, or far over the mean of those before; an imitation that is exact begins at none."""
    mean = sum(healthy) / len(healthy) if healthy else math.inf
    # Feature maps, which are learned first, are told by losses under 1.
    least = 0.1 if len(healthy) == HEALTHY else 1.0
    return not math.isfinite(loss) or loss > OUT_OF_BOUNDS * max(mean, least)


@dataclass(frozen=True)
class Checkpoints:
    """The newest state of a training, in a file that the first rank reads and writes, and those before it beside it."""

    file: Path
    network: nn.Module
    average: Average
    optimizer: Optimizer
    last: int | None
    log: BatchLog
    ranks: Ranks

    def exist(self) -> bool:
        """Whether there is one to go back to."""
        return self.ranks.given(self.file.exists)

    def save(self, at: Progress, *, older: bool = True) -> None:
        """Write the state; of those before, the last few stay, each one `older` than it was."""
        waiting = self.log.waiting()
        if not self.ranks.first:
            return
        if self.log.run:
            self.log.run.must_be_there()
        state = {
            "network": self.network.state_dict(),
            "average": self.average.values,
            "updates": self.average.updates,
            "optimizer": self.optimizer.state_dict(),
            "progress": dict(vars(at)),
            "names": self.log.names,
            "waiting": waiting,
        }
        data = BytesIO()
        torch.save(state, data)
        if data.tell() > MAX_BYTES:  # as could not be read again, which is to be known before the training
            size, most = data.tell() / 2**30, MAX_BYTES >> 30
            raise DetguardError(
                f"{self.file}: a checkpoint of {size:.1f} GiB, over the limit of {most}; train less at once (`split` "
                "neck or head), or a smaller detector"
            )
        for number in range(KEPT - 1, 0, -1) if older else ():
            before = self._before(number - 1)
            if before.exists() and not before.is_symlink():  # which could lead to a file that is not the run's
                write_file(self._before(number), read_file(before, MAX_BYTES))
        write_file(self.file, data.getvalue())

    def _before(self, number: int) -> Path:
        return self.file.with_suffix(f".{number}.pt") if number else self.file

    def restore(self, back: int = 0) -> Progress | None:
        """Have all ranks take up the first one's state, if there is one; returns where it is.

        back: how many checkpoints before the newest, if so many were kept.
        """
        back = min(back, KEPT - 1)
        state = self.ranks.given(
            lambda: next((self._read(file) for n in range(back, -1, -1) if (file := self._before(n)).exists()), None)
        )
        if state is None:
            self.log.begin(-1, [], torch.zeros(0, 0))
            return None
        self.network.load_state_dict(state["network"])
        device = self.ranks.device
        torch._foreach_copy_(self.average.values, [value.to(device) for value in state["average"]])
        self.average.updates = state["updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        at = Progress(**state["progress"])
        at.kept = [value.to(device) for value in at.kept]
        self.log.begin(at.number, state["names"], state["waiting"] * self.ranks.first)
        return at

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            state = read_state(file)
        except DetguardError as error:
            raise DetguardError(f"{error}; delete it to begin the stage again") from error
        state = state if isinstance(state, dict) else {}
        updates, names, waiting = (state.get(key) for key in ("updates", "names", "waiting"))
        whole = (
            self._fits(state.get("progress"))
            and type(updates) is int
            and updates >= 0
            and same_form(state.get("network"), self.network.state_dict())
            and same_form(state.get("average"), self.average.values)
            and self.optimizer.fits(state.get("optimizer"))
            and isinstance(names, list)
            and all(isinstance(name, str) for name in names)
            and isinstance(waiting, Tensor)
            and same_form(waiting, torch.zeros(len(waiting) if waiting.ndim else 0, len(names)))
        )
        if not whole:
            raise DetguardError(f"{file}: not a state of this stage; delete it to begin the stage again")
        return state

    def _fits(self, at: Any) -> bool:
        return (
            same_form({**at, "kept": []} if isinstance(at, dict) else at, vars(Progress()))
            and 0 <= at["number"] <= (at["number"] if self.last is None else self.last)
            and 0 <= at["spent"] < math.inf
            and 0 <= at["setbacks"] <= SETBACKS
            and (at["kept"] == [] or same_form(at["kept"], self.average.values))
        )


def load_made(network: GatedNetwork, file: Path, ranks: Ranks = ALONE) -> bool:
    """Have all ranks take up the weights of a stage that the first one has finished, if there are any.

    Raises:
        DetguardError: they are damaged, or of another network.
    """
    weights = ranks.given(lambda: _read_made(network, file))
    if weights is None:
        return False
    network.load_state_dict(weights)
    return True


def _read_made(network: GatedNetwork, file: Path) -> dict[str, Tensor] | None:
    if not (file.exists() and file.with_suffix(".json").exists()):
        return None
    try:
        weights = load(read_file(file, MAX_BYTES))
    except (SafetensorError, ValueError) as error:
        raise DetguardError(f"{file}: damaged; delete it to train the stage again ({error})") from error
    if not same_form(weights, network.state_dict()):
        raise DetguardError(f"{file}: not the weights of this stage; delete it to train the stage again")
    return weights
