"""The loop of all training: weights and their average, records of the losses, and the checkpoint to go on from."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from detguard import DetguardError
from detguard.data.ahead import AheadError
from detguard.detectors.checkpoint import MAX_BYTES, read_state
from detguard.detectors.gated import GatedNetwork
from detguard.files import read_file, write_file
from detguard.hardening.optimizer import Optimizer, same_form
from detguard.ranks import ALONE, Ranks
from detguard.runs import Run

EMA_DECAY = 0.998
LOG_EVERY = 20

Shown = TypeVar("Shown")
Update = Callable[[Tensor], None]
# Told the number of each batch and the losses of the last record; returns True to save and stop.
OnBatch = Callable[[int, dict[str, float]], bool]


@dataclass(frozen=True)
class Pace:
    """How long and how fast: number of the last batch, highest rates of the weights and of the gate, and seconds
    between checkpoints.
    """

    last: int
    rate: float
    gate_rate: float
    save_every: float

    def share(self, number: int) -> float:
        """Share of the rates at a batch: up over the first hundred (or tenth), then down a cosine to 2 %."""
        return min(1.0, (number + 1) / min(100, max(1, self.last // 10))) * (
            0.02 + 0.98 * (1 + math.cos(math.pi * number / self.last)) / 2
        )


@dataclass
class BatchLog:
    """Means of a stage's losses over some batches at a time, as records of the run, where there is one.

    batch: frames of all ranks together. Losses stay where they are made until there is a record: to read each would
    have training wait for its device.
    """

    run: Run | None
    stage: str
    last: int
    batch: int
    ranks: Ranks = ALONE
    told: dict[str, float] = field(default_factory=dict)
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

    def waiting(self) -> Tensor:
        """The losses that are in no record yet, of all ranks, [batches, losses]."""
        return self.ranks.total(torch.stack(self.rows)).cpu() if self.rows else torch.zeros(0, len(self.names))

    def add(self, number: int, losses: dict[str, Tensor]) -> dict[str, float]:
        """Take the losses of one batch; write a record when there are enough. Returns what the last one says."""
        self.names = list(losses)
        self.rows.append(torch.stack([value.detach() for value in losses.values()]))
        self.seen += 1
        if (number + 1) % LOG_EVERY and number + 1 < self.last:
            return self.told
        means = self.waiting().double().mean(0).tolist()
        self.told = {name: round(value, 4) for name, value in zip(self.names, means, strict=True)}
        if self.run and self.ranks.first:
            rate = round(self.seen * self.batch / (time.monotonic() - self.began), 1)
            self.run.append({"stage": self.stage, "batch": number + 1, "photos_per_second": rate} | self.told)
        self.rows, self.began, self.seen = [], time.monotonic(), 0
        return self.told


class Average:
    """Exponential moving average of parameters; fast at first, or short stages would end where they began."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.updates = parameters, 0
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Follow the parameters after an update."""
        decay = min(EMA_DECAY, self.updates / (9 + self.updates))
        torch._foreach_lerp_(self.values, list(self.parameters), 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def apply(self) -> None:
        """Have the parameters be their average."""
        torch._foreach_copy_(list(self.parameters), self.values)


def train(
    network: GatedNetwork,
    learned: list[nn.Parameter],
    made: Callable[[int], Iterator[Shown]],
    learn: Callable[[Shown, int, Update], dict[str, Tensor]],
    pace: Pace,
    checkpoint: Path,
    on_batch: OnBatch | None = None,
    log: BatchLog | None = None,
    ranks: Ranks = ALONE,
) -> GatedNetwork:
    """Train the `learned` parameters in place, from `checkpoint` on; returns the network with their moving average.

    made: batches from a number on; learn: told a batch, its number and how to update the weights by a loss, of which
    each of the `ranks` has a summand; returns what is to be told of it, in summands too. No device is waited for but
    at records and checkpoints.

    Raises:
        KeyboardInterrupt: `on_batch` asked one of the ranks for it; the checkpoint holds all that was learned.
        AheadError: no more batches can be made; the same.
    """
    network.to(memory_format=torch.channels_last)  # as frames are, or convolutions reorder one of them
    network.eval()  # batch norms are folded in; nothing else behaves differently in training
    ranks.share(network)
    average = Average(learned)
    optimizer = Optimizer(learned, list(network.gate.parameters()), pace.gate_rate / pace.rate, ranks)
    log = log or BatchLog(None, "", pace.last, 0, ranks)
    number = _restore(checkpoint, network, average, optimizer, pace.last, log, ranks)

    def save() -> None:
        waiting = log.waiting()
        if ranks.first:
            _save(checkpoint, network, average, optimizer, number, log.names, waiting)

    saved, batches = time.monotonic(), made(number)
    while number < pace.last:
        lost, batch = None, None
        try:
            batch = next(batches)
        except AheadError as error:
            lost = error
        if ranks.any(lost is not None):  # all of them, or the others would wait
            save()
            raise lost or AheadError("another of the processes that train can make no more batches")
        assert batch is not None

        def update(loss: Tensor, step: float = pace.rate * pace.share(number)) -> None:
            optimizer.update(loss, step)
            average.update()

        told = log.add(number, learn(batch, number, update))
        stop = ranks.any(bool(on_batch and on_batch(number, told)))
        number += 1
        if stop or ranks.any(time.monotonic() - saved > pace.save_every):
            save()
            saved = time.monotonic()
        if stop:
            raise KeyboardInterrupt
    average.apply()
    return network


def _save(
    file: Path,
    network: nn.Module,
    average: Average,
    optimizer: Optimizer,
    number: int,
    names: list[str],
    waiting: Tensor,
) -> None:
    state = {
        "network": network.state_dict(),
        "average": average.values,
        "updates": average.updates,
        "optimizer": optimizer.state_dict(),
        "number": number,
        "names": names,
        "waiting": waiting,
    }
    data = BytesIO()
    torch.save(state, data)
    write_file(file, data.getvalue())


def _restore(
    file: Path, network: nn.Module, average: Average, optimizer: Optimizer, last: int, log: BatchLog, ranks: Ranks
) -> int:
    """Have all ranks take up the first one's checkpoint, if it has one; returns the number of the next batch."""
    state = ranks.given(lambda: _read(file, network, average, optimizer, last) if file.exists() else None)
    if state is None:
        log.begin(0, [], torch.zeros(0, 0))
        return 0
    network.load_state_dict(state["network"])
    torch._foreach_copy_(average.values, [value.to(ranks.device) for value in state["average"]])
    average.updates = state["updates"]
    optimizer.load_state_dict(state["optimizer"])
    log.begin(state["number"], state["names"], state["waiting"] * ranks.first)
    return state["number"]


def _read(file: Path, network: nn.Module, average: Average, optimizer: Optimizer, last: int) -> dict[str, Any]:
    try:
        state = read_state(file)
    except DetguardError as error:
        raise DetguardError(f"{error}; delete it to begin the stage again") from error
    state = state if isinstance(state, dict) else {}
    number, updates, names, waiting = (state.get(key) for key in ("number", "updates", "names", "waiting"))
    whole = (
        type(number) is int
        and 0 <= number <= last
        and type(updates) is int
        and updates >= 0
        and same_form(state.get("network"), network.state_dict())
        and same_form(state.get("average"), average.values)
        and optimizer.fits(state.get("optimizer"))
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and isinstance(waiting, Tensor)
        and same_form(waiting, torch.zeros(len(waiting) if waiting.ndim else 0, len(names)))
    )
    if not whole:
        raise DetguardError(f"{file}: not a state of this stage; delete it to begin the stage again")
    return state


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
