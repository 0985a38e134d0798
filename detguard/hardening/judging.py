"""How good a detector is on a few photos that nothing was learned from: what a training shows of before and after."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_type_hints

from detguard import DetguardError, defaults
from detguard.data.stream import Labelled
from detguard.detections import Detections
from detguard.detectors.base import Detector
from detguard.evaluation.attacks import attack_objective, attacked, pgd_options
from detguard.evaluation.coco import f1, metrics_of_photos
from detguard.evaluation.metrics import Figure
from detguard.evaluation.views import LOWEST_CONFIDENCE, SHOWN_CONFIDENCE
from detguard.files import read_json
from detguard.hardening.validation import STEPS, Entry, file_of
from detguard.photos import Photo, PhotoError, read_photo
from detguard.runs import Run
from detguard.schema import misfit, shape_of

# Of a run, what it knew of photos before and after.
FIGURES = "figures.json"
# What photos are judged by, where it is no detector.
LABELS = "labels"


class OfKind(Figure):
    """COCO's figures of photos of a kind, and the mean F1, at IoU .50 and confidence .25, of those with objects."""

    F1: float | None


# By kind of photos.
Figures = dict[str, OfKind]


@dataclass(frozen=True)
class Judgement:
    """What a detector knew of photos before and after a training.

    photos: how many there are of each kind; answers: the detector whose answers are what is to be found, of the kinds
    that have no labels; with_objects: how many photos F1 is of, as of the others nothing is to be found.
    """

    photos: dict[str, int] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    before: Figures = field(default_factory=dict)
    after: Figures = field(default_factory=dict)
    with_objects: dict[str, int] = field(default_factory=dict)

    @property
    def by(self) -> dict[str, str]:
        """Of each kind, what is to be found: "labels", or the name of the detector whose answers count as right."""
        return {kind: self.answers.get(kind, LABELS) for kind in self.photos}

    def keep(self, run: Run) -> None:
        """Write it to the run."""
        run.write(FIGURES, (json.dumps(asdict(self)) + "\n").encode())

    @classmethod
    def kept(cls, folder: Path) -> "Judgement":
        """What a run keeps.

        Raises:
            DetguardError: nothing that detguard wrote.
        """
        found = read_json(folder / FIGURES)
        if wrong := misfit(found, {name: shape_of(of) for name, of in get_type_hints(cls).items()}):
            raise DetguardError(f"{folder / FIGURES}: not one that detguard wrote ({wrong})")
        return cls(**found)


def judged_eps(eps: float) -> int:
    """The budget of the attack that a hardened detector is judged by, where it was trained with `eps` levels of 255:
    files hold whole ones.
    """
    return max(1, round(eps))


def readable(photos: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Those photos that can be read, and what is wrong with the others."""
    good, unread = list[Entry](), list[str]()
    for one in photos:
        try:
            read_photo(file_of(one))
        except PhotoError as error:
            unread.append(str(error))
        else:
            good.append(one)
    return good, unread


def answered(detector: Detector, files: Sequence[Path], class_names: Mapping[int, str]) -> list[Labelled]:
    """Photos with what a detector finds in them, as `judge` has it find, as labels in the classes of another one."""
    found = [detector.detect([read_photo(file)], SHOWN_CONFIDENCE, multi_label=True)[0] for file in files]
    if detector.class_names != class_names:  # by their names, of which several may be the same
        found = [Detections.from_records(of_one.records(detector.class_names), class_names) for of_one in found]
    return [Labelled(file, of_one) for file, of_one in zip(files, found, strict=True)]


def judge(
    detector: Detector,
    labelled: Sequence[Labelled],
    eps: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> OfKind:
    """Mean F1 (IoU .50, confidence .25), AP with its error and AP50 of a detector on labelled photos.

    eps: levels of 255, by which the photos are attacked first; on_step: called before each photo and step.
    """
    photos = _attacked(detector, labelled, eps, on_step) if eps else (read_photo(one.file) for one in labelled)
    found = []
    for one, photo in zip(labelled, photos, strict=True):
        on_step()
        found.append(one.counted(detector.detect([photo], LOWEST_CONFIDENCE, multi_label=True)[0]))
    # As in `monitor`, where nothing is labelled, to find nothing proves nothing.
    scores = [
        f1(one.objects, seen.above(SHOWN_CONFIDENCE))
        for one, seen in zip(labelled, found, strict=True)
        if len(one.objects)
    ]
    stats = metrics_of_photos([one.objects for one in labelled], found, drawn=True).stats
    mean = sum(scores) / len(scores) if scores else None
    return {"F1": mean, "AP": stats["AP"], "AP_error": stats.get("AP_error"), "AP50": stats["AP50"]}


def _attacked(detector: Detector, labelled: Sequence[Labelled], eps: int, on_step: Callable[[], None]) -> list[Photo]:
    """The photos after PGD on the whole training loss, as `detguard evaluate` attacks them."""
    known = {index for one in labelled for index in (detector.class_names if one.known is None else one.known)}
    objective = attack_objective("all", sorted(known), detector)
    options = pgd_options(eps, STEPS, defaults.Evaluate.batch)
    photos = ((str(i), read_photo(one.file), one.objects) for i, one in enumerate(labelled))
    return attacked(detector, photos, objective, options, lambda _: on_step())
