"""The processes of one launch, one per device: each sees a part of every batch, or of the photos."""

import atexit
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from detguard import DetguardError
from detguard.engine import torch_device, usable_device

Thing = TypeVar("Thing")
CPU = torch.device("cpu")
# How long one may wait for the others: as long as the slowest works. The launcher ends all when one has died.
PATIENCE = timedelta(weeks=4)


@dataclass(frozen=True)
class Ranks:
    """This process among all, by default alone on the CPU.

    rank: its number, 0 of the first, which writes; count: of all; local: how many of them this machine runs; device:
    where it trains; control: the group by which they agree, on the CPU, so that no device waits for it.
    """

    device: torch.device = CPU
    rank: int = 0
    count: int = 1
    local: int = 1
    control: Any = None

    @classmethod
    def start(cls, device: str) -> "Ranks":
        """This process as `accelerate launch` or `torchrun` started it; without them it is alone.

        device: as users name it; of several processes each gets the GPU of its number on its machine.

        Raises:
            DetguardError: the device cannot be used, several processes would share one GPU, or none has started them.
        """
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
            if not (os.environ.get(name) or "0").isdecimal():
                raise DetguardError(
                    f"{name}={os.environ[name]} in the environment: expected a number, as torchrun and accelerate "
                    "launch give it; unset it"
                )
        count = int(os.environ.get("WORLD_SIZE") or 1)
        if count == 1:
            return cls(torch.device(usable_device(device)))
        device = torch_device(device)
        if ":" in device:
            raise DetguardError(f"`device` {device}: {count} processes get a GPU each; give `device` cuda")
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
            raise DetguardError(
                f"WORLD_SIZE={count} in the environment, without {', '.join(missing)}: start several processes by "
                "torchrun or accelerate launch, or unset WORLD_SIZE for one"
            )
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu")
        if state.device.type != device or state.num_processes != count:
            raise DetguardError(f"`device` {device}: {count} processes cannot train on it here; found {state.device}")
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or count)
        place = CPU if device == "cpu" else state.device  # which has a number where there is one alone
        ranks = cls(place, state.process_index, count, local, dist.new_group(backend="gloo", timeout=PATIENCE))
        if place.type == "cuda":
            ranks._refuse_shared()
        return ranks

    def _refuse_shared(self) -> None:
        """See that no two processes have one GPU, which each may call cuda:0."""
        gpus = self.gathered([(socket.gethostname(), str(torch.cuda.get_device_properties(self.device).uuid))])
        had = Counter(machine for machine, _ in set(gpus))
        for machine, started in Counter(machine for machine, _ in gpus).items():
            if started > had[machine]:
                raise DetguardError(
                    f"`device` cuda: {started} processes on {machine} share {had[machine]} GPU(s); start as many as "
                    f"there are, as by --nproc_per_node {had[machine]}"
                )

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def rows(self, start: int, end: int) -> range:
        """Of the frames `start` to `end` of a batch, those that are this one's: every one in `count`."""
        return range(start + self.among(start, end).start, end, self.count)

    def among(self, start: int, end: int) -> range:
        """The same frames as `rows`, counted from `start` on."""
        return range((self.rank - start) % self.count, end - start, self.count)

    def total(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all processes; no gradient passes."""
        if self.count == 1:
            return x
        from accelerate.utils import reduce

        return reduce(x, "sum")

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Have the gradients of parameters be the sums of those of all processes, which must have the same ones."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        whole = self.total(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = whole.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)])

    def share(self, network: nn.Module) -> None:
        """Have a network be the first one's in all: made alike, weights may differ in their last bits."""
        if self.count > 1:
            network.load_state_dict(self.given(lambda: {k: v.cpu() for k, v in network.state_dict().items()}))

    def any(self, flag: bool) -> bool:  # noqa: FBT001
        """Whether it is so in one of them."""
        if self.count == 1:
            return flag
        any_of = torch.tensor(int(flag))
        dist.all_reduce(any_of, dist.ReduceOp.MAX, group=self.control)
        return bool(any_of)

    def given(self, make: Callable[[], Thing]) -> Thing:
        """What the first process makes, given to all; where that is wrong use, it is so for all.

        Raises:
            DetguardError: as `make` in the first process.
        """
        if self.count == 1:
            return make()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = make()
            except DetguardError as error:
                answer[1] = error
        dist.broadcast_object_list(answer, group=self.control)
        if answer[1] is not None:
            answer[1].told = not self.first
            raise answer[1]
        return answer[0]

    def gathered(self, things: list[Thing]) -> list[Thing]:
        """Those of all processes, in their order; nobody goes on until all have given theirs."""
        if self.count == 1:
            return things
        lists: list[list[Thing]] = [[] for _ in range(self.count)]
        dist.all_gather_object(lists, things, group=self.control)
        return [thing for one in lists for thing in one]

    def must_agree(self, unread: list[str]) -> None:
        """See that all processes have read the same photos, or they would learn from others than they count.

        unread: what could not be read here, a message each.

        Raises:
            DetguardError: some could read what others could not.
        """
        counts = Counter(message for messages in self.gathered([unread]) for message in set(messages))
        odd = sorted(message for message, count in counts.items() if count < self.count)
        if odd:
            raise DetguardError(f"{odd[0]}: read by some processes only; see that all can read the same files")

    def wait(self) -> None:
        """Wait until all have come as far."""
        if self.count > 1:
            dist.barrier(group=self.control)

    def end(self) -> None:
        """Wait until all have come as far; they part when they exit, for they may train again."""
        self.wait()
        if self.count > 1:
            atexit.unregister(dist.destroy_process_group)  # once, however often they end
            atexit.register(dist.destroy_process_group)


ALONE = Ranks()
