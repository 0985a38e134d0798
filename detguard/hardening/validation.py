"""How robust a network is on photos that it is not trained on, measured while it trains."""

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from detguard import DetguardError
from detguard.data.sources import attack_run
from detguard.data.stream import Labelled
from detguard.detections import Detections, suppress
from detguard.detectors.base import Detector
from detguard.detectors.gated import GatedNetwork
from detguard.engine import cores
from detguard.evaluation.coco import metrics_of_photos
from detguard.evaluation.views import LOWEST_CONFIDENCE, SHOWN_CONFIDENCE
from detguard.files import MAX_PHOTO, FileError, read_file
from detguard.hardening.adversary import Adversary, perturb
from detguard.hardening.loop import LOG_EVERY
from detguard.hardening.losses import MAPS, Goal
from detguard.hardening.train import ADVERSARIAL, Setting, Stage
from detguard.photos import PADDING_LEVEL, Letterbox, Photo, frames_tensor, read_photo
from detguard.runs import Run

# Photos that are held out, at most, and at most one in so many of all.
HELD_OUT, ONE_IN = 32, 20
# Steps of PGD, and the share of the time of training that validation may take.
STEPS, SHARE = 10, 0.03
# What its records hold of each stage: the losses under attack, by which the best weights are chosen, and without.
ATTACKED, CLEAN = "attacked", "clean"
# And how much of what is there is found.
AP50 = {ATTACKED: "AP50 attacked", CLEAN: "AP50 clean"}

Entry = TypeVar("Entry", Path, Labelled)


def file_of(entry: Path | Labelled) -> Path:
    """The file of a photo, with labels or without."""
    return entry.file if isinstance(entry, Labelled) else entry


def photo_of(entry: Path | Labelled) -> Path:
    """What is one photo in several files: of what `detguard attack` made, the clean photo of its record.

    Files of one have its key in common: samples/images/KEY--NAME, adversarial/KEY.png and group/KEY/NAME. Where there
    is no record of it, it is run/KEY.
    """
    file = file_of(entry)
    folder = file.absolute().parent
    if (run := _run_of(folder)) is None:
        return file
    if folder == run / "adversarial":
        key = file.stem
    else:
        key = folder.name if folder.parent == run / "group" else file.stem.rpartition("--")[0]
    return _clean_photos(run).get(key, run / key) if key else file


def contents(photos: Sequence[Path | Labelled]) -> list[str]:
    """Of each photo what its copies and what an attack made of it have in common; each file is read once.

    It is the SHA-256 of the bytes of `photo_of`; of one that cannot be read, its path.
    """
    files = [photo_of(photo) for photo in photos]
    distinct = list(dict.fromkeys(files))
    with ThreadPoolExecutor(cores()) as pool:
        found = dict(zip(distinct, pool.map(_content, distinct), strict=True))
    return [found[file] for file in files]


def _content(file: Path) -> str:
    try:
        return hashlib.sha256(read_file(file, MAX_PHOTO)).hexdigest()
    except FileError:
        return str(file.absolute())


@cache
def _run_of(folder: Path) -> Path | None:
    return attack_run(folder)


@cache
def _clean_photos(run: Path) -> dict[str, Path]:
    return {one["key"]: Path(one["photo"]) for one in Run(run, {"command": "attack"}).each()}


def forget_runs() -> None:
    """Have runs of attacks be read anew: they may have been made again since."""
    _run_of.cache_clear()
    _clean_photos.cache_clear()


def hold_out(photos: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Photos to train on, and to validate on: those whose bytes have the smallest SHA-256; of few photos, none.

    A photo is for one of both, also where it is in several files: as `detguard attack` made it, or copied.
    """
    forget_runs()
    names = contents(photos)
    distinct = sorted(set(names))
    held = set(distinct[: min(HELD_OUT, len(distinct) // ONE_IN)])
    first = {name: photo for name, photo in zip(reversed(names), reversed(photos), strict=True) if name in held}
    return [photo for name, photo in zip(names, photos, strict=True) if name not in held], list(first.values())


class Found(NamedTuple):
    """What is there in a photo, by its number, and what was found in it, in pixels of the frame."""

    number: int
    there: Detections
    attacked: Detections
    clean: Detections


def figures(found: Sequence[Found]) -> dict[str, float]:
    """AP50 of some photos, attacked and clean; none where nothing is there."""
    ordered = sorted(found, key=lambda one: one.number)
    there = [one.there for one in ordered]
    told = {
        ATTACKED: metrics_of_photos(there, [one.attacked for one in ordered]).stats["AP50"],
        CLEAN: metrics_of_photos(there, [one.clean for one in ordered]).stats["AP50"],
    }
    return {AP50[name]: value for name, value in told.items() if value is not None}


@dataclass(frozen=True)
class Validation:
    """Photos as a detector sees them, padded to squares: uint8 [S, S, 3] each.

    labels: of each frame, boxes in its pixels, where the photos have some.
    """

    frames: list[Photo]
    labels: list[Labelled] = field(default_factory=list)

    @classmethod
    def of(cls, photos: Sequence[Path] | Sequence[Labelled], size: int) -> "Validation":
        """Those that can be read, in frames of `size` pixels."""
        frames, labels = [], []
        for entry in photos:
            try:
                photo = read_photo(file_of(entry))
            except DetguardError:
                continue
            frame, letterbox = np.full((size, size, 3), PADDING_LEVEL, np.uint8), Letterbox.fit(photo.shape[:2], size)
            shown = letterbox(photo)
            frame[: shown.shape[0], : shown.shape[1]] = shown
            frames.append(frame)
            if isinstance(entry, Labelled):
                boxes = letterbox.boxes_to_frame(entry.objects.boxes)
                labels.append(replace(entry, objects=replace(entry.objects, boxes=boxes)))
        return cls(frames, labels)

    def every(self, stage: Stage, setting: Setting, passes: float) -> int | None:
        """After how many batches to validate, as costs SHARE of training; None: not at all.

        passes: forward and backward passes of a whole frame that a photo of the stage costs.
        """
        # Nor where the expert is for other frames: the one that resists best need not be the one that sees best.
        if not self.frames or stage.share[ADVERSARIAL] < max(stage.share) or stage.learn == MAPS:
            return None
        batches = len(self.frames) * (STEPS + 1) / (SHARE * setting.batch * passes)
        return LOG_EVERY * math.ceil(batches / LOG_EVERY)

    def losses(
        self, network: GatedNetwork, teacher: GatedNetwork, stage: Stage, setting: Setting
    ) -> tuple[dict[str, Tensor], list[Found]]:
        """This rank's summands of the mean loss that the stage learns by, under PGD and without, and what was found.

        teacher: the undefended detector as a network of one expert, shown clean photos. What it shows of these is what
        is there, or what labels say where they are learned.
        """
        shown: list[Found] = []
        ranks, adversary = setting.ranks, Adversary(stage.adversary.eps, STEPS)
        sums = {ATTACKED: torch.zeros((), device=ranks.device), CLEAN: torch.zeros((), device=ranks.device)}
        torch.manual_seed(setting.seed)  # of the noise
        # Whole frames: as many at once as take what a batch of the stage's crops does.
        at_once = max(ranks.count, int(setting.batch * ((stage.size or setting.size) / setting.size) ** 2))
        for start in range(0, len(self.frames), at_once):
            end = min(start + at_once, len(self.frames))
            rows = ranks.rows(start, end)
            if not rows:
                continue
            clean = frames_tensor([self.frames[i] for i in rows], ranks.device)
            with torch.no_grad():
                reference = setting.run(teacher, clean, 0)[0]
            labels = self.labels[rows.start : rows.stop : rows.step]
            goal = Goal.of(stage.learn, reference, labels)

            def harm(x: Tensor, goal: Goal = goal) -> Tensor:
                return goal.loss(setting.run(network, x, stage.route)[0])

            moved = perturb(clean, harm, adversary, range(rows.start - start, end - start, ranks.count))
            found = dict[str, list[Detections]]()
            for name, frames in ((ATTACKED, moved), (CLEAN, clean)):
                with torch.no_grad():
                    candidates = setting.run(network, frames, stage.route)[0]
                    sums[name] += goal.loss(candidates).sum() / len(self.frames)
                found[name] = suppress(candidates, LOWEST_CONFIDENCE, Detector.iou, multi_label=True)
            there = suppress(reference, SHOWN_CONFIDENCE, Detector.iou)
            for i, number in enumerate(rows):
                known = Labelled(Path(), there[i]) if goal.assigned is None else labels[i]
                attacked, unattacked = (known.counted(of_kind[i]) for of_kind in (found[ATTACKED], found[CLEAN]))
                shown.append(Found(number, known.objects, attacked, unattacked))
        return sums, shown
