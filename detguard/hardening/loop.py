"""The loop of all training: weights and their average, records of the losses, and the checkpoint to go on from."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from detguard import DetguardError
from detguard.data.ahead import AheadError
from detguard.detectors.checkpoint import MAX_BYTES, read_state
from detguard.detectors.gated import GatedNetwork
from detguard.files import read_file, write_file
from detguard.hardening.optimizer import Optimizer, same_form
from detguard.runs import Run

EMA_DECAY = 0.998
LOG_EVERY = 20

Shown = TypeVar("Shown")
Update = Callable[[Tensor], None]
# Told the number of each batch and its losses; returns True to save and stop.
OnBatch = Callable[[int, dict[str, float]], bool]
Losses = list[dict[str, float]]


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


class BatchLog:
    """Means of a stage's losses over some batches at a time, as records of the run."""

    def __init__(self, run: Run, stage: str, last: int, batch: int) -> None:
        self.run, self.stage, self.last, self.batch = run, stage, last, batch
        self.waiting: Losses = []

    def begin(self, first: int, waiting: Losses) -> None:
        """Go on before batch `first`, with the losses that are in no record yet; records of later ones were made by a
        run that was killed.
        """
        records = self.run.records()
        kept = [r for r in records if r["stage"] != self.stage or r["batch"] <= first]
        if len(kept) < len(records):
            self.run.keep(kept)
        self.waiting = waiting
        self.began, self.seen = time.monotonic(), 0

    def add(self, number: int, losses: dict[str, float]) -> None:
        """Take the losses of one batch; write a record when there are enough."""
        self.waiting.append(losses)
        self.seen += 1
        if (number + 1) % LOG_EVERY and number + 1 < self.last:
            return
        rate = self.seen * self.batch / (time.monotonic() - self.began)
        told = {name: [s[name] for s in self.waiting if name in s] for name in losses}
        record = {name: round(sum(values) / len(values), 4) for name, values in told.items()}
        self.run.append({"stage": self.stage, "batch": number + 1, "photos_per_second": round(rate, 1)} | record)
        self.waiting = []
        self.began, self.seen = time.monotonic(), 0


def train(
    network: GatedNetwork,
    learned: list[nn.Parameter],
    made: Callable[[int], Iterator[Shown]],
    learn: Callable[[Shown, int, Update], dict[str, float]],
    pace: Pace,
    checkpoint: Path,
    on_batch: OnBatch | None = None,
    log: BatchLog | None = None,
) -> GatedNetwork:
    """Train the `learned` parameters in place, from `checkpoint` on; returns the network with their moving average.

    made: batches from a number on; learn: told a batch, its number and how to update the weights by a loss; returns
    what is to be told of it.

    Raises:
        KeyboardInterrupt: `on_batch` asked for it; the checkpoint holds all that was learned.
        AheadError: no more batches can be made; the same.
    """
    network.to(memory_format=torch.channels_last)  # as frames are, or convolutions reorder one of them
    network.eval()  # batch norms are folded in; nothing else behaves differently in training
    average = AveragedModel(network, multi_avg_fn=_follow)
    optimizer = Optimizer(learned, list(network.gate.parameters()), pace.gate_rate / pace.rate)
    number, waiting = _restore(checkpoint, network, average, optimizer, pace.last)
    if log:
        log.begin(number, waiting)

    def save() -> None:
        _save(checkpoint, network, average, optimizer, number, log.waiting if log else [])

    saved, stop = time.monotonic(), False
    try:
        for batch in made(number):

            def update(loss: Tensor, step: float = pace.rate * pace.share(number)) -> None:
                optimizer.update(loss, step)
                average.update_parameters(network)

            losses = learn(batch, number, update)
            if log:
                log.add(number, losses)
            stop = bool(on_batch and on_batch(number, losses))
            number += 1
            if stop or time.monotonic() - saved > pace.save_every:
                save()
                saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt
    except AheadError:
        save()
        raise
    network.load_state_dict(average.module.state_dict())
    return network


@torch.no_grad()
def _follow(average: Any, now: Any, updates: Any) -> None:
    """Exponential moving average of weights; it forgets fast at first, or short stages would keep where they began."""
    decay = min(EMA_DECAY, (1 + int(updates)) / (10 + int(updates)))
    torch._foreach_lerp_(list(average), list(now), 1 - decay)


def _save(
    file: Path, network: nn.Module, average: nn.Module, optimizer: Optimizer, number: int, waiting: Losses
) -> None:
    state = {"network": network.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
    data = BytesIO()
    torch.save(state | {"number": number, "waiting": waiting}, data)
    write_file(file, data.getvalue())


def _restore(file: Path, network: nn.Module, average: nn.Module, optimizer: Optimizer, last: int) -> tuple[int, Losses]:
    """Take up a checkpoint, if there is one; returns the number of the next batch and the losses in no record yet."""
    if not file.exists():
        return 0, []
    try:
        state = read_state(file)
    except DetguardError as error:
        raise DetguardError(f"{error}; delete it to begin the stage again") from error
    state = state if isinstance(state, dict) else {}
    number: Any = state.get("number")
    waiting = state.get("waiting", [])
    whole = (
        type(number) is int
        and 0 <= number <= last
        and same_form(state.get("network"), network.state_dict())
        and same_form(state.get("average"), average.state_dict())
        and int(state["average"]["n_averaged"]) >= 0
        and optimizer.fits(state.get("optimizer"))
        and isinstance(waiting, list)
        and all(isinstance(one, dict) and all(type(value) is float for value in one.values()) for one in waiting)
    )
    if not whole:
        raise DetguardError(f"{file}: not a state of this stage; delete it to begin the stage again")
    network.load_state_dict(state["network"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return number, waiting


def load_made(network: GatedNetwork, file: Path) -> bool:
    """Take up the weights of a finished stage, if there are any and the json beside them.

    Raises:
        DetguardError: they are damaged, or of another network.
    """
    if not (file.exists() and file.with_suffix(".json").exists()):
        return False
    try:
        weights = load(read_file(file, MAX_BYTES))
    except (SafetensorError, ValueError) as error:
        raise DetguardError(f"{file}: damaged; delete it to train the stage again ({error})") from error
    if not same_form(weights, network.state_dict()):
        raise DetguardError(f"{file}: not the weights of this stage; delete it to train the stage again")
    network.load_state_dict(weights)
    return True
