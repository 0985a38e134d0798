"""One `detguard harden`: the stages of a recipe, each resumable, from a detector to a gated ensemble on disk."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from detguard import DetguardError
from detguard.data.batches import PhotoSet
from detguard.detectors.base import Detector
from detguard.detectors.gated import EXPERTS, GatedNetwork
from detguard.detectors.load import fused, save_gated
from detguard.hardening.adversary import Adversary
from detguard.hardening.train import Setting, Stage, copy_expert, train_stage
from detguard.runs import Run

RECIPES = ("gated", "pgd", "finetune")
MODES = ("full", "freeze-first")
# Logit margins that the joint stage's attacks add in turn: alone, an attack on the result is blind to a sure gate.
MARGINS = (0.0, 0.3, 1.0, 3.0)
LOG_EVERY = 20


@dataclass(frozen=True)
class Plan:
    """How to harden; the options of `detguard harden`. photos: seen in all stages together, with repeats.

    Raises:
        DetguardError: an option is not one of those known.
    """

    recipe: str = "gated"
    mode: str = "full"
    split: str = "neck"
    photos: int = 100_000
    eps: float = 4.0
    steps: int = 2
    mix: float = 0.2
    batch: int = 16
    rate: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise DetguardError(f"--recipe {self.recipe}: expected one of {', '.join(RECIPES)}")
        if self.mode not in MODES:
            raise DetguardError(f"--mode {self.mode}: expected one of {', '.join(MODES)}")

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts of the ensemble; the baselines have one."""
        return EXPERTS if self.recipe == "gated" else (self.recipe,)

    def stages(self) -> list[Stage]:
        """What is trained, in order. The trunk learns with the adversarial expert: on a trunk that was not made
        robust, no expert can be."""
        attack = Adversary(self.eps, self.steps)

        def stage(name: str, share_of_photos: float, route: int | None, main: int | None, **options: Any) -> Stage:
            shares = [1 / 3] * 3 if main is None else [self.mix / 2] * 3
            if main is not None:
                shares[main] = 1 - self.mix
            number = max(1, round(self.photos * share_of_photos / self.batch))
            share = (shares[0], shares[1], shares[2])
            return Stage(
                name, number, route, adversary=attack, share=share, **{"rate": self.rate, "trunk": False} | options
            )

        if self.recipe == "finetune":
            return [stage("finetune", 1, 0, 0, trunk=True)]
        if self.recipe == "pgd":
            return [stage("pgd", 1, 0, 2, trunk=True)]
        frozen = (2,) if self.mode == "freeze-first" else None
        joint = {"trunk": self.mode == "full", "experts": frozen, "margins": MARGINS, "gate": 0.1}
        return [
            stage("adversarial", 0.55, 2, 2, trunk=True),
            stage("normal", 0.1, 0, 0),
            stage("hard", 0.1, 1, 1),
            stage("joint", 0.25, None, None, **joint),
        ]


def split_layer(model: Any, split: str) -> int:
    """The number of the first layer that experts have for themselves.

    split: "head" (heads alone), "neck" (neck and head), "backbone" (whole networks), or a number of a layer.

    Raises:
        DetguardError: none of these.
    """
    named = {"head": len(model.model) - 1, "neck": len(model.yaml["backbone"]), "backbone": 0}
    if split in named:
        return named[split]
    if not split.isdigit():
        raise DetguardError(f"--split {split}: expected head, neck, backbone or the number of a layer")
    return int(split)


def harden(
    model: Any,
    card: dict[str, Any],
    teacher: Detector,
    source: PhotoSet,
    plan: Plan,
    setting: Setting,
    run: Run,
    on_batch: Callable[[str, int, dict[str, float]], bool] | None = None,
) -> Path:
    """Train all stages that the run has not finished; returns the file of the ensemble.

    model: the unfused detector to start from; card: what its json says (architecture, classes, imgsz);
    on_batch: told stage, batch and losses; returns True to save and stop.

    Raises:
        KeyboardInterrupt: `on_batch` asked for it; resume with the same run.
    """
    torch.manual_seed(plan.seed)  # of the gate's first weights
    single = plan.recipe != "gated"
    network = GatedNetwork(fused(model), 0 if single else split_layer(model, plan.split), plan.experts)
    made = Path()
    for stage in plan.stages():
        made = run.folder / "weights" / f"{stage.name}.safetensors"
        if stage.name in ("normal", "hard"):  # they start from what the robust trunk was trained with
            copy_expert(network, 2, stage.route or 0)
        if made.exists():
            network.load_state_dict(load_file(made))
            continue
        began, sums = time.monotonic(), dict[str, float]()

        def told(number: int, losses: dict[str, float], stage: Stage = stage) -> bool:
            nonlocal began, sums
            sums = {name: sums.get(name, 0.0) + value / LOG_EVERY for name, value in losses.items()}
            if (number + 1) % LOG_EVERY == 0:
                rate = LOG_EVERY * setting.batch / (time.monotonic() - began)
                record = {name: round(value, 4) for name, value in sums.items()}
                run.append({"stage": stage.name, "batch": number + 1, "photos_per_second": round(rate, 1)} | record)
                began, sums = time.monotonic(), {}
            return on_batch(stage.name, number, losses) if on_batch else False

        train_stage(network, teacher, source, stage, setting, run.folder / "state" / f"{stage.name}.pt", told)
        save_gated(network, card, made)
    return made
