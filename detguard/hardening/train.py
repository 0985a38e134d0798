"""One stage of hardening: some parts of a gated ensemble learn from normal, hard and adversarial frames."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from detguard.data.batches import Batch, PhotoSet, batches
from detguard.detections import Candidates
from detguard.detectors.base import Detector
from detguard.detectors.gated import GatedNetwork
from detguard.detectors.ultralytics import decode
from detguard.hardening.adversary import Adversary, perturb
from detguard.hardening.losses import gate_loss, gate_margin, imitation_loss

NORMAL, HARD, ADVERSARIAL = range(3)
EMA_DECAY = 0.998
CLIP = 10.0


@dataclass(frozen=True)
class Stage:
    """What learns from what. A stage is `number` batches long; its name is that of its metrics and checkpoint.

    route: the expert that learns, alone, or None for all through the gate; trunk: whether the trunk learns too;
    share: of normal, hard and adversarial frames in a batch; margins: weights of the gate's logits in the attack,
    taken in turn: an attack on the result alone is blind where the gate is sure.
    """

    name: str
    number: int
    route: int | None
    trunk: bool
    share: tuple[float, float, float]
    adversary: Adversary = field(default_factory=Adversary)
    experts: tuple[int, ...] | None = None
    rate: float = 5e-4
    margins: tuple[float, ...] = (0.0,)
    gate: float = 0.0


@dataclass(frozen=True)
class Setting:
    """What all stages have in common. bf16: forward and backward in bfloat16, where the machine has it."""

    batch: int = 16
    size: int = 320
    seed: int = 0
    bf16: bool = False
    save_every: float = 180.0


def bf16_helps() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; emulated, it is slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def learned_parameters(network: GatedNetwork, stage: Stage) -> list[nn.Parameter]:
    """The parameters that a stage trains; all others are frozen. The heads' decoding constants never learn."""
    experts = stage.experts if stage.route is None else (stage.route,)
    chosen = range(len(network.experts)) if experts is None else experts
    parts = [network.experts[i] for i in chosen] + ([network.trunk] if stage.trunk else [])
    parts += [network.gate] if stage.route is None else []
    network.requires_grad_(False)
    learned = [p for part in parts for name, p in part.named_parameters() if "dfl" not in name]
    for parameter in learned:
        parameter.requires_grad_(True)
    return learned


def train_stage(
    network: GatedNetwork,
    teacher: Detector,
    source: PhotoSet,
    stage: Stage,
    setting: Setting,
    checkpoint: Path,
    on_batch: Callable[[int, dict[str, float]], bool] | None = None,
) -> GatedNetwork:
    """Train `network` in place, from `checkpoint` where it stopped; returns the average of its last weights.

    on_batch: told the number of each batch and its losses; returns True to save and stop, KeyboardInterrupt follows.

    Raises:
        KeyboardInterrupt: `on_batch` asked for it; the checkpoint holds all that was learned.
    """
    learned = learned_parameters(network, stage)
    network.eval()  # batch norms are folded in; nothing else behaves differently in training
    average = AveragedModel(network, multi_avg_fn=_follow)
    optimizer = torch.optim.AdamW(learned, lr=stage.rate, weight_decay=0.01)
    first = _restore(checkpoint, network, average, optimizer)
    saved = time.monotonic()
    counts = [round(share * setting.batch) for share in stage.share]
    hard = counts[HARD]
    adversarial = setting.batch - counts[NORMAL] - hard
    made = batches(source, setting.batch, setting.size, setting.seed, first, stage.number, hard)
    for number, batch in enumerate(made, first):
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * rate_share(number, stage.number)
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.bf16):
            losses = _losses(network, teacher, batch, adversarial, stage, setting, number)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(learned, CLIP)
        optimizer.step()
        average.update_parameters(network)
        stop = on_batch(number, {k: float(v.detach()) for k, v in losses.items()}) if on_batch else False
        if stop or time.monotonic() - saved > setting.save_every:
            _save(checkpoint, network, average, optimizer, number + 1)
            saved = time.monotonic()
        if stop:
            raise KeyboardInterrupt
    network.load_state_dict(average.module.state_dict())
    return network


@torch.no_grad()
def _follow(average: Any, now: Any, updates: Any) -> None:
    """Exponential moving average of weights; it forgets fast at first, or short stages would keep where they began."""
    decay = min(EMA_DECAY, (1 + int(updates)) / (10 + int(updates)))
    torch._foreach_lerp_(list(average), list(now), 1 - decay)


def rate_share(number: int, last: int) -> float:
    """Share of the learning rate at a batch: up over the first hundred, then down a cosine to 2 %."""
    return min(1.0, (number + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * number / last)) / 2)


def _losses(
    network: GatedNetwork,
    teacher: Detector,
    batch: Batch,
    adversarial: int,
    stage: Stage,
    setting: Setting,
    number: int,
) -> dict[str, Tensor]:
    """Mean losses of one batch: hard frames first, adversarial ones last, normal ones between."""
    with torch.no_grad():
        wanted = teacher.candidates(batch.clean)
    shown = batch.shown
    kinds = torch.tensor([NORMAL] * len(shown))
    kinds[: batch.hard] = HARD
    if adversarial:
        rows = slice(len(shown) - adversarial, len(shown))
        kinds[rows] = ADVERSARIAL
        target = wanted[rows]
        margin = stage.margins[number % len(stage.margins)]

        def harm(x: Tensor) -> Tensor:
            candidates = _candidates(network, x, stage.route)
            loss = imitation_loss(candidates, target)
            if margin and stage.route is None and candidates.gate is not None:
                loss = loss + margin * gate_margin(candidates.gate, NORMAL, -1)
            return loss

        generator = torch.Generator().manual_seed((setting.seed << 32) + number)
        attacked = perturb(shown[rows], harm, stage.adversary, generator)
        shown = torch.cat([shown[: rows.start], attacked]).contiguous(memory_format=torch.channels_last)
    found = _candidates(network, shown, stage.route)
    per_frame = imitation_loss(found, wanted)
    losses = {"loss": per_frame.mean()}
    for kind, name in ((NORMAL, "normal"), (HARD, "hard"), (ADVERSARIAL, "adversarial")):
        if (kinds == kind).any():
            losses[name] = per_frame[kinds == kind].mean()
    if stage.gate and found.gate is not None:
        belongs = kinds.clamp(max=found.gate.shape[1] - 1)
        gate = torch.stack([gate_loss(found.gate[i : i + 1], int(k))[0] for i, k in enumerate(belongs)]).mean()
        losses |= {"gate": gate, "loss": losses["loss"] + stage.gate * gate}
    return losses


def _candidates(network: GatedNetwork, frames: Tensor, route: int | None) -> Candidates:
    raw, gate = network(frames, route)
    return decode(network.head, raw, gate)


def _save(file: Path, network: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {"network": network.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"number": number}, file.with_suffix(".partial"))
    file.with_suffix(".partial").replace(file)


def _restore(file: Path, network: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not file.exists():
        return 0
    state: dict[str, Any] = torch.load(file, weights_only=True)
    network.load_state_dict(state["network"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["number"])


def copy_expert(network: GatedNetwork, source: int, target: int) -> None:
    """Have one expert start as a copy of another."""
    network.experts[target] = copy.deepcopy(network.experts[source])
