"""Measure detectors in COCO numbers, from Python."""

import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from detguard import DetguardError, defaults
from detguard.classes import check_map
from detguard.data.dataset import read_dataset
from detguard.data.entries import LOST
from detguard.data.sources import OnData, warn_of
from detguard.detectors.base import Detector
from detguard.detectors.load import detector_config
from detguard.evaluation.cache import DEFAULT, Cache
from detguard.evaluation.metrics import Metrics
from detguard.evaluation.pictures import check_pictures
from detguard.evaluation.run import SEVERAL, Protocols, checkable
from detguard.evaluation.run import evaluate as run_protocols
from detguard.evaluation.views import LOWEST_CONFIDENCE, Subject
from detguard.ranks import ALONE, Ranks
from detguard.runs import Run
from detguard.schema import CONFIGS, Config, check, partly, several
from detguard.workflows.keywords import as_detectors, refuse_unknown

# White-box steps and starts: of detectors, and where one of them is a defence.
STEPS, RESTARTS = (20, 40), (1, 2)
# A data set, by its name, that detectors which are judged by it have mostly learned.
LEARNED = "coco128"
# Options, and the protocols to which they say something; those that show photos which can be saved.
USED_BY = {
    ("severities", "corruptions"): ("corruptions",),
    ("eps", "queries"): ("attack", "transfer", "blackbox", "checks"),
    ("steps", "restarts", "attacks"): ("attack", "transfer", "checks"),
}
SAVED = ("corruptions", "attack", "transfer", "blackbox")
# What stands for an option of `detguard evaluate`.
ELSEWHERE = {
    "fail_under": "on the command line alone; compare the figures that are returned",
    "resume": "on the command line alone: detguard evaluate --resume RUN; `cache` knows what was found before",
}


def plan(options: Config, detectors: int) -> Protocols:
    """The protocols that a run's config asks for, of so many detectors.

    Raises:
        DetguardError: one of them cannot be asked for.
    """
    known: Any = CONFIGS["evaluate"]["evaluate"]
    single = check({name: value for name, value in options.items() if name not in SEVERAL}, partly(known))
    wanted = Protocols(**options | single)  # which says what is wrong with those of several values
    several = check({name: list(getattr(wanted, name)) for name in SEVERAL}, partly(known))
    tuples: Config = {name: tuple(values) for name, values in several.items()}
    wanted = replace(wanted, **tuples)
    if "transfer" in wanted.protocols and detectors < 2:
        raise DetguardError("`protocols` transfer: needs two detectors or more, `detector` A `detector` B")
    return wanted


def only_of_protocols(given: Collection[str], asked: Protocols) -> None:
    """See that no option is given, of those by name, that says something of other protocols than those asked for.

    Raises:
        DetguardError: one is.
    """
    if asked.patch is None:
        _only_with(given, ("patch_target", "patch_size"), "`patch`")
    for names, protocols in USED_BY.items():
        if not set(protocols) & set(asked.protocols):
            _only_with(given, names, f"`protocols` {' or '.join(protocols)}")
    if "attack" not in asked.protocols and len(asked.eps) > 1 and "eps" in given:
        eps = ",".join(map(str, asked.eps))
        raise DetguardError(f"`eps` {eps}: several go with `protocols` attack; the others take one")
    if not set(SAVED) & set(asked.protocols) and not asked.by_files:
        other = f"`protocols` {' or '.join(SAVED)}, or `patch`, `universal` or `corruption_file`"
        _only_with(given, ("save_images",), other)


def only_of_gradients(given: Collection[str], asked: Protocols, detectors: Sequence[Detector]) -> None:
    """See that no option is given of white-box attacks where no detector has a gradient, nor of Square where all have.

    Raises:
        DetguardError: one is.
    """
    differentiable = [one.differentiable for one in detectors]
    if not any(differentiable):
        _only_with(given, ("steps", "restarts", "attacks"), "a detector that has a gradient")
    if all(differentiable) and not {"blackbox", "checks"} & set(asked.protocols):
        _only_with(given, ("queries",), "`protocols` blackbox or checks, or a detector without gradient")


def _only_with(given: Collection[str], names: Collection[str], other: str) -> None:
    if alone := [name for name in given if name in names]:
        raise DetguardError(f"`{alone[0]}`: goes with {other}")


def strength(detectors: Sequence[Detector], steps: int | None, restarts: int | None) -> dict[str, int]:
    """Steps and starts of the white-box attacks where they are not given: a defence is judged harder."""
    hard = any(detector.hardened for detector in detectors)
    return {
        "steps": STEPS[hard] if steps is None else steps,
        "restarts": RESTARTS[hard] if restarts is None else restarts,
    }


def load_subjects(
    detectors: Sequence[Detector],
    source: Config,
    batch: int,
    on_warning: Callable[[str], object] = warnings.warn,
    cache: Path = DEFAULT,
    on_data: OnData = warn_of,
    ranks: Ranks = ALONE,
) -> list[Subject]:
    """The detectors on the data set that a run's config names, each with a name of its own.

    batch: photos that go through a detector together; on_warning: called with what is no error; on_data: called with
    what was wrong with the data; ranks: share the cache.
    """
    images = Path(source["images"]) if source["images"] else None
    known = (name for one in detectors for name in one.class_names.values())
    class_map = check_map(source["class_map"], known)
    dataset = read_dataset(source["source"], source["split"], images, source["limit"], class_map)
    if source["source"] == LEARNED:
        on_warning(
            f"{LEARNED}: photos of COCO's training part; the bundled detectors and others trained on COCO have learned "
            "them, and their AP on other photos is lower"
        )
    subjects: list[Subject] = []
    ranks.given(lambda: Cache(cache, on_warning).begun)  # a damaged one is set aside before others open it
    kept = Cache(cache, on_warning, alone=ranks.count == 1)
    for detector in detectors:
        taken = [s.detector.name for s in subjects].count(detector.name)
        name = f"{detector.name}#{taken + 1}" if taken else detector.name
        names = detector.class_names
        only = source["classes"] and [
            one if one in names.values() else names[detector.class_index(one)] for one in source["classes"]
        ]
        ids = dataset.category_ids(names, only)
        counted = {a["category_id"] for a in dataset.annotations.anns.values() if not a["iscrowd"]}
        if not counted & set(ids.values()):
            raise DetguardError(f"{source['source']}: none of its labelled objects is of a class that is evaluated")
        if detector.nms_inside and (least := detector.nms_inside[0]) > LOWEST_CONFIDENCE:
            on_warning(
                f"{name}: its NMS is inside, at a confidence of {least:g} or so: what is less sure is missing from its "
                "AP; compare it with none that was exported without"
            )
        subjects.append(Subject(name, detector, dataset, ids, kept, batch))
    on_data(dataset.name, dataset.warnings)
    if len({tuple(sorted(s.category_ids.values())) for s in subjects}) > 1:
        counts = ", ".join(f"{s.name} {len(s.category_ids)}" for s in subjects)
        on_warning(f"the detectors know different classes of {dataset.name} ({counts}); `classes` makes them equal")
    return subjects


def warn_unchecked(
    subjects: Sequence[Subject], wanted: Protocols, on_warning: Callable[[str], object] = warnings.warn
) -> None:
    """Tell of detectors without a gradient that the checks, where they are asked for, leave them out.

    Raises:
        DetguardError: they leave all of them out, and nothing else is asked for.
    """
    if "checks" not in wanted.protocols:
        return
    if wanted.checks_alone and not checkable(subjects):
        names = ", ".join(subject.name for subject in subjects)
        raise DetguardError(f"`protocols` checks: {names}: no gradient, which they are of; ask for blackbox")
    for subject in subjects:
        if not subject.detector.differentiable:
            on_warning(f"{subject.name}: has no gradient, checks left out")


def evaluate(
    detector: Detector | Sequence[Detector],
    data: str | Path,
    *,
    split: str = defaults.Evaluate.split,
    images: str | Path | None = None,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    class_map: Mapping[str, str] | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    out: str | Path | None = None,
    cache: str | Path = DEFAULT,
    on_progress: Callable[[str, int], None] | None = None,
    **protocols: Any,
) -> Metrics:
    """COCO metrics of one or several detectors on clean, corrupted and attacked photos, by name: as in metrics.json.

    Args:
        detector: by `load_detector`; several give a row each.
        data: a data.yaml, a COCO instances json, or coco, coco128, voc.
        split: of a data.yaml.
        images: folder of the photos of a COCO json, by default beside it.
        classes: names of the only ones that count, by default all that data and detector have in common.
        limit: only the first so many photos.
        class_map: names of classes in the data -> the detector's, as {"pedestrian": "person"}.
        steps: of each white-box attack; by default 20, where a detector is a defence 40.
        restarts: starts of each white-box attack; by default 1, where a detector is a defence 2.
        out: folder for metrics.json, per_class.csv and what was found; by default none is kept (but for `cache`).
        cache: SQLite file of what was found before, which is not done again; by default runs/evaluate/cache.sqlite in
            the working folder.
        on_progress: called with what is being shown, and how many forward passes that was since the last call; those
            known from `cache` count.
        **protocols: the fields of `Protocols`: `protocols`, `severities`, `eps`, `attacks`, `queries`,
            `seed`, `batch`, `patch`, `patch_target`, `patch_size`, `universal`, `corruptions`, `corruption_file`,
            `save_images`.

    Raises:
        DetguardError: the data cannot be read, or an option is wrong.
        TypeError: `protocols` are no such fields.

    Examples:
        >>> import detguard
        >>> detector = detguard.load_detector("detguard-n")
        >>> metrics = detguard.evaluate(detector, "coco128", protocols=("clean", "attack"))  # doctest: +SKIP
        >>> metrics["detguard-n"]["attack"]["AP50"]  # doctest: +SKIP
    """
    refuse_unknown("evaluate", protocols, Protocols.__dataclass_fields__.keys(), ELSEWHERE)
    names = None if classes is None else list(several("classes", classes, ("person", "car")))
    detectors = as_detectors(detector)
    if protocols.get("save_images") and out is None:
        raise DetguardError("`save_images`: goes with `out`, the folder where they are kept")
    wanted = plan(protocols | strength(detectors, steps, restarts), len(detectors))
    said = protocols | {"steps": steps, "restarts": restarts}
    given = [name for name, value in said.items() if value is not None and value is not False]
    only_of_protocols(given, wanted)
    only_of_gradients(given, wanted, detectors)
    config: Config = {
        "detectors": [detector_config(one, one.source) for one in detectors],
        "data": {
            "source": str(data),
            "split": split,
            "images": None if images is None else str(images),
            "classes": names,
            "limit": limit,
            "class_map": dict(class_map or {}),
        },
        "evaluate": {k: list(v) if isinstance(v, tuple) else v for k, v in vars(wanted).items()},
        "arguments": [],
    }
    config = check(config, partly(CONFIGS["evaluate"]))
    subjects = load_subjects(detectors, config["data"], wanted.batch, cache=Path(cache))
    warn_unchecked(subjects, wanted)
    known = subjects[0].dataset.warnings[LOST].total
    for subject in subjects:
        check_pictures(subject, wanted.patches(subject.detector))
    _ = wanted.perturbations  # a wrong file leaves no run behind
    with tempfile.TemporaryDirectory() as temporary:
        run = Run.create("evaluate", Path(out or temporary), config)
        metrics = run_protocols(subjects, wanted, run, on_progress).metrics
    if left_out := subjects[0].dataset.warnings[LOST].total - known:
        warnings.warn(f"{subjects[0].dataset.name}: {left_out} more {LOST}", stacklevel=2)
    return metrics
