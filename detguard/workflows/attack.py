"""Attack photos and judge what was saved, from Python."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from detguard import DetguardError, defaults
from detguard.attacks.budgets import Budget
from detguard.attacks.group import DEFAULT, AttackOptions, Attempt
from detguard.attacks.run import PHOTO, Job, attack_photos, plan_attack, verify_run
from detguard.detectors.base import Detector
from detguard.detectors.load import detector_config
from detguard.files import Temporary, write_file
from detguard.objectives import Vanish
from detguard.objectives.base import Goal
from detguard.objectives.parse import parse_goal, read_goal
from detguard.photos import Photo, Source, as_photo, encode_png, find_photos, read_photo
from detguard.runs import INPUTS, Record, Run, photo_keys
from detguard.schema import CONFIGS, Config, check, partly
from detguard.transforms.base import Transform
from detguard.transforms.parse import parse_transforms
from detguard.workflows.keywords import as_detector, as_detectors, as_specs, refuse_unknown

OBJECTIVE = Vanish()
# What stands for options of `detguard attack`.
ELSEWHERE = {
    "eps": "`budget=Linf(8)`",
    "norm": "`budget=L2(3)`",
    "mask": '`budget=Masked.of(Linf(8), "inside")`',
    "goal": "`objective`, one of Vanish, Mislabel, Untargeted, Fabricate, Flood",
    "target": '`objective=Vanish("person")`',
    "to": '`objective=Mislabel({"person": "car"})`',
    "object": "`objective=Vanish(only=Selection(objects=(3,)))`",
    "box": "`objective=Vanish(only=Selection(box=(10, 20, 200, 300)))`",
    "strict": "`objective=Vanish(strict=True)`",
    "keep_others": "`objective=Vanish(keep_others=True)`",
    "loss": '`objective=Vanish(measure="confidence")`',
    "count": '`objective=Fabricate("person", count=2)`',
    "data": "`photos`, without labels",
    "resume": "on the command line alone: detguard attack --resume RUN",
} | dict.fromkeys(("split", "map", "class_map", "recursive", "every", "frames"), "on the command line alone")


@dataclass(frozen=True)
class Result:
    """What became of one photo.

    Attributes:
        key: its name in the run.
        record: all that is known of it, as in results.jsonl of a run (docs/reference/records.md).
        folder: of the run; where `out` names none it is gone with the last of the results.
    """

    key: str
    record: Record
    folder: Path
    kept: object = field(default=None, repr=False, compare=False)

    @property
    def status(self) -> str:
        """fooled, failed, no-target (nothing to attack was found), or error."""
        return str(self.record["status"])

    @property
    def success(self) -> bool:
        """Whether the saved photo and every saved member of its group fool the detector, judged from their files."""
        return self.status == "fooled"

    @cached_property
    def photo(self) -> Photo:
        """The adversarial photo as it was read back, `uint8 [H, W, 3]` RGB.

        Raises:
            DetguardError: there is none, as nothing was attacked, or its file is gone.
        """
        return self._read(PHOTO)

    @cached_property
    def group(self) -> dict[str, Photo]:
        """Its transformed copies by their specs, as they were read back, `uint8 [H', W', 3]` RGB each."""
        return {name: self._read(name) for name in self.record.get("files", {}) if name != PHOTO}

    @property
    def members(self) -> "Members":
        """What was judged of the photo and of each copy: fooled, confidence left, and what is found; {} if nothing."""
        return Members(self.record.get("members", {}), why=self._nothing)

    @property
    def _nothing(self) -> str:
        """Why there is no adversarial photo."""
        return f"{self.key}: {self.record.get('error', self.status)}; there is no adversarial photo"

    @property
    def used(self) -> float:
        """How much of the budget the saved photo uses, in its unit; 0 where nothing was attacked."""
        return float(self.record.get("used", 0))

    def save(self, folder: str | Path) -> Path:
        """Write the adversarial photo as PNG; returns its path.

        Args:
            folder: where, made if it is not there; the file is called `KEY.png`, and takes the place of one of that
                name: in each call the first photo is photo-001, if it is no file.

        Raises:
            DetguardError: there is none, as nothing was attacked, or its file is gone.
        """
        file = Path(folder) / f"{self.key}.png"
        write_file(file, encode_png(self.photo))
        return file

    def _read(self, name: str) -> Photo:
        if "files" not in self.record:
            raise DetguardError(self._nothing)
        return read_photo(self.folder / self.record["files"][name])


class Members(dict[str, Record]):
    """Records by name; asked for one of a photo without any, it says why there is none.

    Raises:
        DetguardError: nothing was judged.
    """

    def __init__(self, records: Mapping[str, Record], why: str) -> None:
        super().__init__(records)
        self._why = why

    def __missing__(self, name: str) -> Record:
        raise KeyError(name) if self else DetguardError(self._why)


def attack_config(
    detectors: Sequence[Detector],
    options: AttackOptions,
    *,
    objective: Goal,
    transforms: str | Sequence[Transform | str],
    samples: bool = False,
    arguments: Sequence[str] = (),
) -> Config:
    """What a run keeps of an attack, checked.

    Raises:
        DetguardError: a class, a goal or a transform is not known, or options do not go together.
    """
    config: Config = {
        "detector": detector_config(detectors[0], detectors[0].source),
        "also": [detector_config(other, other.source) for other in detectors[1:]],
        "samples": samples,
        **objective.words(detectors[0].class_names),
        "transforms": as_specs(transforms),
        "attack": options.config(),
        "arguments": list(arguments),
    }
    *_, search = plan_attack(config, detectors)
    _same_again(objective, read_goal(config), search.budget, options.budget, detectors[0])
    return check(config, partly(CONFIGS["attack"]))


def _same_again(objective: Goal, goal: Goal, budget: Budget, given: Budget, detector: Detector) -> None:
    """See that what a run keeps of a goal and a budget, by which it is made and judged again, is all of them.

    Raises:
        DetguardError: it is not.
    """
    on = [(type(one), json.dumps(asdict(one.on(detector)), default=str)) for one in (objective, goal)]
    within = [(type(one), getattr(one, "within", one)) for one in (given, budget)]
    for name, same, one, kept in (("objective", on, objective, goal), ("budget", within, given, budget)):
        if same[0] != same[1]:
            raise DetguardError(
                f"`{name}` {one!r}: a run keeps it in words, which are of {kept!r}; a class or field of your own needs "
                "words of its own (docs/adding_an_objective.md)"
            )


def attack_job(run: Run, detectors: Sequence[Detector]) -> Job:
    """The attack that a run asks for, on its detectors."""
    return Job(*plan_attack(run.config, detectors), run)


def attack(
    detector: Detector | Sequence[Detector],
    photos: Source | Iterable[Source],
    *,
    objective: Goal = OBJECTIVE,
    transforms: str | Sequence[Transform | str] = defaults.Attack.transforms,
    budget: Budget = DEFAULT,
    out: str | Path | None = None,
    on_step: Callable[[Sequence[Attempt]], None] | None = None,
    **options: Any,
) -> Iterator[Result]:
    """Attack photos one by one; each result is judged from its saved files by the detector's own predict path.

    Args:
        detector: what is attacked, by `load_detector`; several must all be fooled by the same photo.
        photos: files, folders or patterns of them, `uint8 [H, W, 3]` RGB arrays, PIL images, or tensors [3, H, W] RGB:
            uint8, or floats in 0..1.
        objective: what is wanted: `Vanish("person")`, `Mislabel({"person": "car"})`, `Untargeted()`,
            `Fabricate("person", count=2)` or `Flood()`, each with `only=Selection(...)` or `keep_others=True`.
        transforms: the group beside the photo, as of the command line; "none" for none.
        budget: `Linf(levels)`, `L2(size)`, or part of a photo by `Masked.of`; `Linf(4)` by default.
        out: folder of a run as `detguard attack` writes it; by default a temporary one.
        on_step: shown the attacks that are under way after each of their steps.
        **options: the fields of `AttackOptions`: `conf` (by default the first detector's own), `step`, `steps`, `rule`,
            `aggregate`, `weights`, `schedule`, `gradient`, `momentum`, `random_start`, `margin`, `smallest`,
            `black_box`, `queries`, `seed` and `batch`.

    Yields:
        A `Result` per photo as it ends: with a `batch`, or photos of several shapes, in another order than they were
            given in; its `key` tells which it is of: photo-002 of the second, where that is no file.

    Raises:
        DetguardError: an option is wrong, a class is not known, a photo is of no kind above, the detector has no
            gradient and `black_box` is not asked for, or `out` holds a run already.
        MemoryError: there is too little memory, and no photo has been attacked yet; later, such a photo has an `error`.
        TypeError: `options` are no such fields; says where else an option of the command line is.

    Examples:
        >>> import detguard
        >>> detector = detguard.load_detector("detguard-n")
        >>> person = detguard.Vanish("person")
        >>> for result in detguard.attack(detector, "bus.jpg", objective=person, budget=detguard.Linf(8)):
        ...     print(result.key, result.success, result.photo.shape)  # doctest: +SKIP
    """
    refuse_unknown("attack", options, AttackOptions.__dataclass_fields__.keys() - {"budget", "stop"}, ELSEWHERE)
    detectors = as_detectors(detector)
    if not isinstance(objective, Goal):
        raise DetguardError(f"`objective` {objective!r}: expected one as Vanish('person')")
    if not isinstance(budget, Budget):
        raise DetguardError(f"`budget` {budget!r}: expected one as Linf(8)")
    search = AttackOptions(budget=budget, **{"conf": detectors[0].conf, **options})
    config = attack_config(detectors, search, objective=objective, transforms=transforms)
    given = [source for photo in _listed(photos) for source in _sources(photo)]
    if not given:
        raise DetguardError("photos: expected at least one")
    kept = Temporary() if out is None else None
    folder = kept.folder if kept else Path(str(out))
    names = [f"{INPUTS}/photo-{number:03}.png" for number in range(1, len(given) + 1)]
    inputs = {name: one for name, one in zip(names, given, strict=True) if isinstance(one, bytes)}
    files = [folder / name if isinstance(one, bytes) else one for name, one in zip(names, given, strict=True)]
    run = Run.create("attack", folder, config | {"photos": [str(file) for file in files]}, inputs)
    records = attack_photos(attack_job(run, detectors), photo_keys(files), on_step)
    return (Result(record["key"], record, folder, kept) for record in records)


def _listed(photos: Source | Iterable[Source]) -> list[Source]:
    if isinstance(photos, str | Path | Image.Image):
        return [photos]
    if isinstance(photos, np.ndarray | torch.Tensor) and photos.ndim < 4:
        return [photos]
    return list(photos) if isinstance(photos, Iterable) else [photos]  # which is none, as `as_photo` says


def _sources(photo: Source) -> Sequence[Path | bytes]:
    """Its file, or its files, or what would be in one."""
    if not isinstance(photo, str | Path):
        return [encode_png(as_photo(photo))]
    try:
        return find_photos([photo])
    except DetguardError:  # its record will say what is wrong
        return [Path(photo)]


def verify(
    run: str | Path | Result | Iterable[Result],
    detector: Detector,
    *,
    transforms: str | Sequence[Transform | str] = "none",
) -> Iterator[Record]:
    """Judge what was saved anew, by the detector that was attacked or by another, and after more transforms.

    Args:
        run: the folder of one, or results of `attack`, all of one call.
        detector: who judges, by `load_detector`.
        transforms: more of them, as of `attack`, of each adversarial photo, beside the members of its group.

    Yields:
        A record per attacked photo: `members`, each with `fooled` and what is found, `unjudged`, transforms that it
            cannot be shown after and why, and `used`, of the budget; `error` where files cannot be read, `skipped`
            where this detector finds no target before the attack.

    Raises:
        DetguardError: there is no such run, or the detector lacks a class that it names.

    Examples:
        >>> import detguard
        >>> other = detguard.load_detector("detguard-n-hard")
        >>> for record in detguard.verify("runs/attack/001", other, transforms="jpeg:40"):  # doctest: +SKIP
        ...     print(record["key"], record["members"]["photo"]["fooled"] if "members" in record else "not judged")
    """
    detector = as_detector(detector)
    results = [run] if isinstance(run, Result) else [] if isinstance(run, str | Path) else list(run)
    folders = {Path(run)} if isinstance(run, str | Path) else {result.folder for result in results}
    if len(folders) != 1:
        raise DetguardError("`run`: expected a run's folder, or results of one attack")
    opened = Run.open(folders.pop(), "attack")
    chosen_by = opened.config["detector"]
    if opened.config["object"] and detector_config(detector, chosen_by["model"]) != chosen_by:
        raise DetguardError("`detector`: the run chose its objects by what its own detector found (`objects`)")
    more = parse_transforms(as_specs(transforms))
    options = AttackOptions.from_config(opened.config["attack"])
    keys = {result.key for result in results} if results else None
    judged = verify_run(opened, detector, parse_goal(opened.config, detector), more, options.budget, keys)
    return _while_kept(judged, results)


def _while_kept(records: Iterator[Record], results: Sequence[Result]) -> Iterator[Record]:
    """Records, while the files of the results are there."""
    yield from records
    del results
