"""How robust a network is on photos that it is not trained on, told while it trains."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detguard import DetguardError
from detguard.detections import Candidates
from detguard.detectors.gated import GatedNetwork
from detguard.hardening.adversary import Adversary, perturb
from detguard.hardening.loop import LOG_EVERY
from detguard.hardening.losses import imitation_loss
from detguard.hardening.train import ADVERSARIAL, Setting, Stage
from detguard.photos import PADDING_LEVEL, Letterbox, Photo, frames_tensor, read_photo

# Photos that are held out, at most, and at most one in so many of all.
HELD_OUT, ONE_IN = 32, 20
# Steps of PGD, and the share of the time of training that validation may take.
STEPS, SHARE = 10, 0.03
# What records of it tell of each stage: the losses under attack, by which the best weights are chosen, and without.
ATTACKED, CLEAN = "attacked", "clean"


def hold_out(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Photos to train on, and to validate on: those whose names have the smallest SHA-256; of few photos, none."""

    def order(name: str) -> bytes:
        return hashlib.sha256(name.encode(errors="replace")).digest()

    names = sorted({file.name for file in files}, key=order)
    held = set(names[: min(HELD_OUT, len(names) // ONE_IN)])
    first = {file.name: file for file in reversed(files) if file.name in held}
    return [file for file in files if file.name not in held], list(first.values())


@dataclass(frozen=True)
class Validation:
    """Photos as a detector sees them, padded to squares: uint8 [S, S, 3] each."""

    frames: list[Photo]

    @classmethod
    def of(cls, files: Sequence[Path], size: int) -> "Validation":
        """Those of files that can be read, in frames of `size` pixels."""
        frames = []
        for file in files:
            try:
                photo = read_photo(file)
            except DetguardError:
                continue
            frame = np.full((size, size, 3), PADDING_LEVEL, np.uint8)
            shown = Letterbox.fit(photo.shape[:2], size)(photo)
            frame[: shown.shape[0], : shown.shape[1]] = shown
            frames.append(frame)
        return cls(frames)

    def every(self, stage: Stage, setting: Setting, passes: float) -> int | None:
        """After how many batches to validate, as costs SHARE of training; None: not at all.

        passes: forward and backward passes of a whole frame that a photo of the stage costs.
        """
        if not self.frames or not stage.share[ADVERSARIAL]:
            return None
        batches = len(self.frames) * (STEPS + 1) / (SHARE * setting.batch * passes)
        return LOG_EVERY * math.ceil(batches / LOG_EVERY)

    def losses(self, network: GatedNetwork, teacher: GatedNetwork, stage: Stage, setting: Setting) -> dict[str, Tensor]:
        """This rank's summands of the mean divergence from the teacher on clean photos, under PGD and without."""
        ranks, adversary = setting.ranks, Adversary(stage.adversary.eps, STEPS)
        told = {ATTACKED: torch.zeros((), device=ranks.device), CLEAN: torch.zeros((), device=ranks.device)}
        torch.manual_seed(setting.seed)  # of the noise
        for start in range(0, len(self.frames), setting.batch):
            end = min(start + setting.batch, len(self.frames))
            rows = ranks.rows(start, end)
            if not rows:
                continue
            clean = frames_tensor([self.frames[i] for i in rows], ranks.device)
            with torch.no_grad():
                wanted = setting.run(teacher, clean, 0)[0]

            def harm(x: Tensor, wanted: Candidates = wanted) -> Tensor:
                return imitation_loss(setting.run(network, x, stage.route)[0], wanted)

            moved = perturb(clean, harm, adversary, range(rows.start - start, end - start, ranks.count))
            with torch.no_grad():
                told[ATTACKED] += harm(moved).sum() / len(self.frames)
                told[CLEAN] += harm(clean).sum() / len(self.frames)
        return told
