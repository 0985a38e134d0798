"""Photos per second of `detguard harden` against the forward and backward passes alone that its stages need.

    python benchmarks/training_speed.py --model ../shared/weights/yolo11n-coco.pt

Bare: the same passes of the same networks on one batch of noise, no photos read, corrupted, attacked or learned from.
"""

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from detguard.data.batches import read_photos
from detguard.data.corruptions import KINDS
from detguard.detectors.gated import GatedNetwork
from detguard.detectors.load import fused, load_model
from detguard.engine import keep_freed_memory
from detguard.hardening.run import Plan, split_layer
from detguard.hardening.train import ADVERSARIAL, Setting, Stage, learned_parameters, train_stage
from detguard.photos import find_photos
from detguard.ranks import Ranks


def bare(network: GatedNetwork, teacher: GatedNetwork, stage: Stage, setting: Setting, batches: int) -> float:
    """Seconds per photo of the passes of a stage alone."""
    learned = learned_parameters(network, stage)
    size = stage.size or setting.size
    frames = torch.rand(setting.batch, 3, size, size, device=setting.ranks.device)
    frames = frames.contiguous(memory_format=torch.channels_last).requires_grad_()
    attacked = round(stage.share[ADVERSARIAL] * setting.batch)
    free = stage.adversary.method == "free"

    def passes(x: torch.Tensor, wanted: list[torch.Tensor]) -> None:
        with setting.precision():
            raw, _ = network(x, stage.route)
        torch.autograd.grad(raw["scores"].float().sum() + raw["boxes"].float().sum(), wanted, allow_unused=True)

    began = now(setting)
    for number in range(-2, batches):
        if number == 0:
            began = now(setting)
        with torch.no_grad(), setting.precision():
            teacher(frames, 0)
        for _ in range(0 if free else stage.adversary.steps * (attacked > 0)):
            passes(frames[:attacked], [frames])
        for _ in range(stage.adversary.updates):
            passes(frames, [*learned, frames] if free else list(learned))
    return (now(setting) - began) / batches / setting.batch


def now(setting: Setting) -> float:
    """The time when the device has done all that it was given."""
    if setting.ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main(
    model: Annotated[str, typer.Option()] = "detguard-n",
    photos: Path = Path("../shared/data/coco256/images/train"),
    imgsz: int = 320,
    crop: int = 192,
    batch: int = 16,
    batches: int = 10,
    attack: str = "free",
    device: str = "cpu",
) -> None:
    keep_freed_memory()
    source, _ = read_photos([(find_photos([str(photos)]), 1.0)], imgsz)
    ranks = Ranks.start(device)
    undefended = fused(load_model(model)[0]).to(ranks.device)
    teacher = GatedNetwork(undefended, 0, ("undefended",)).requires_grad_(False)
    plan = Plan(photos=400 * batch, crop=crop, attack=attack, batch=batch)
    setting = Setting.on(ranks, None, batch, imgsz, 0, tuple(KINDS))
    title = f"{Path(model).stem}, {imgsz} px (crops {crop}), batch {batch}, {batches} batches, {attack}, {ranks.device}"
    table = Table(title=title)
    for column in ("stage", "photos/s", "bare photos/s", "share in the model"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in plan.stages():
        network = GatedNetwork(undefended, split_layer(undefended, plan.split), plan.experts)
        network = network.to(ranks.device).to(memory_format=torch.channels_last)
        ticks: list[float] = []

        def told(number: int, done: float, losses: dict[str, float], ticks: list[float] = ticks) -> bool:
            ticks.append(now(setting))
            return number == batches + 1

        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
            train_stage(network, teacher, source, stage, setting, Path(folder) / "last.pt", told)
        ours = (ticks[-1] - ticks[1]) / batches / batch
        alone = bare(network, teacher, stage, setting, batches)
        table.add_row(stage.name, f"{1 / ours:.1f}", f"{1 / alone:.1f}", f"{100 * alone / ours:.0f} %")
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
