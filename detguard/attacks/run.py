"""Attack many photos into a run folder, and judge the saved files by the detector's own public predict path."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from detguard import DetguardError
from detguard.attacks.budgets import Budget
from detguard.attacks.group import (
    STEADY,
    AttackOptions,
    Attempt,
    NoRoomError,
    Victim,
    attack_group,
    check_told,
    in_copy,
    room_for,
)
from detguard.attacks.smallest import attack_smallest
from detguard.detections import Detections, box_iou, logit
from detguard.detectors.base import Detector
from detguard.files import is_file
from detguard.objectives.base import SAME_OBJECT_IOU, Objective, new, outcomes
from detguard.objectives.parse import parse_goal
from detguard.overlay import before_after
from detguard.photos import MIN_SIDE, Photo, encode_png, frames_tensor, largest_difference, photo_seed, read_photo
from detguard.runs import Record, Run, RunError
from detguard.schema import ATTACKED, Config, misfit
from detguard.transforms.base import Drawn, Transform
from detguard.transforms.parse import parse_transforms

THRESHOLDS = (0.05, 0.1, 0.25, 0.5)
PHOTO = "photo"
NOTHING = Detections.none()
# Of what `verify` draws at random.
VERIFY_SEED = 2**31


@dataclass(frozen=True)
class Job:
    """One attack run: who is to be fooled, the first of whom the records are about, how, and where results go."""

    victims: Sequence[Victim]
    transforms: Sequence[Transform]
    options: AttackOptions
    run: Run


def plan_attack(config: Config, detectors: Sequence[Detector]) -> tuple[list[Victim], list[Transform], AttackOptions]:
    """What a run's config asks for, on its detectors.

    Raises:
        DetguardError: unknown class or transform, options that do not go together or not with the group, a detector
            without a gradient where one is needed, or of several, objects chosen by numbers, or two of one name.
    """
    victims = [Victim(detector, parse_goal(config, detector)) for detector in detectors]
    transforms = parse_transforms(config["transforms"])
    options = AttackOptions.from_config(config["attack"])
    options.check(1 + len(transforms), len(victims))
    mask, names = config["attack"]["mask"], [detector.name for detector in detectors]
    if mask in ("inside", "outside") and not victims[0].objective.needs_target:
        raise DetguardError(f"`mask` {mask}: of objects that are attacked, and this goal attacks none; give corners")
    if options.smallest and options.steps < STEADY - 1 and any(transform.random for transform in transforms):
        raise DetguardError(
            f"`steps` {options.steps}: with `smallest`, random transforms have to fool {STEADY} times in a row; give "
            f"{STEADY - 1} or more"
        )
    for detector in detectors:
        options.check_detector(detector)
    if len(detectors) > 1 and config["object"]:
        raise DetguardError("`objects`: numbers what one detector finds; with several `detector`, choose by `box`")
    if len(set(names)) < len(names):
        raise DetguardError(f"`detector`: {', '.join(names)}; each must have a name of its own")
    return victims, transforms, options


def attack_photos(
    job: Job, files: dict[str, Path], on_step: Callable[[Sequence[Attempt]], None] | None = None
) -> Iterator[Record]:
    """Attack `files` (key -> file); yields each photo's record once its files are on disk and it is appended.

    A photo that cannot be read, that a detector refuses, or whose results cannot be written, gives a record with
    status "error"; so does one for which a device has too little memory, by itself, where it had enough for another.

    Raises:
        NoRoomError: there is too little memory, and no photo of the run has been attacked yet.
    """
    groups = [dict(files)]
    while groups:
        group = groups.pop()
        try:
            for record in _attack_all(job, dict(group), on_step):
                del group[record["key"]]
                yield record
            continue
        except NoRoomError as error:
            if not any(record["status"] in ("fooled", "failed") for record in job.run.each()):
                raise
            keys, reason = error.keys, str(error)
        # Only here what the step held is free again.
        groups.append(group)
        if len(keys) > 1:
            groups += [{key: group.pop(key)} for key in keys]
            continue
        (key,) = keys
        file = group.pop(key)
        advice = "make it smaller, or try `device` cpu"
        full = DetguardError(f"{file}: out of memory on {job.victims[0].detector.device} ({reason}); {advice}")
        yield _append(job.run, failure(key, file, full))


def _attack_all(
    job: Job, files: dict[str, Path], on_step: Callable[[Sequence[Attempt]], None] | None
) -> Iterator[Record]:
    """As `attack_photos`, to the first that there is no room for."""
    started: dict[str, tuple[float, list[Detections]]] = {}
    first, *also = job.victims
    unattackable: list[Record] = []

    def readable() -> Iterator[tuple[str, Photo, Detections]]:
        for key, file in files.items():
            try:
                photo = read_photo(file)
                _check_copies(job, file, photo)  # in the midst of a group, an error would end those of others, too
                begin = time.perf_counter()
                # From the pixels that were read, not the file: a CMYK or 16-bit file is attacked as it was read.
                with room_for(key):
                    clean = [
                        victim.detector.predict(photo, lowest_threshold(job.options.conf)) for victim in job.victims
                    ]
            except DetguardError as error:
                unattackable.append(_append(job.run, failure(key, file, error)))
                continue
            there = clean[0].above(job.options.conf)
            if blind := blind_one(job.victims, clean, job.options.conf):
                record = {"key": key, "photo": str(file), "status": "no-target"}
                unattackable.append(_append(job.run, record | ({"detector": blind.name} if also else {})))
                continue
            attacked = there[first.objective.attacked(there)].boxes
            if job.options.budget.on(photo.shape[:2], attacked).empty:
                nothing = DetguardError(f"{file}: `mask` leaves nothing of this photo that may change")
                unattackable.append(_append(job.run, failure(key, file, nothing)))
                continue
            started[key] = time.perf_counter() - begin, clean
            yield key, photo, there

    search = attack_smallest if job.options.smallest else attack_group
    arguments = (first.objective, job.transforms, job.options, on_step, also)
    try:
        for attempt in search(first.detector, readable(), *arguments):
            yield from unattackable
            unattackable.clear()
            file = files[attempt.key]
            spent, clean = started.pop(attempt.key)
            begin = time.perf_counter()
            try:
                with room_for(attempt.key):
                    record = save_attempt(job, attempt, file, clean)
            except DetguardError as error:
                record = failure(attempt.key, file, error)
            spent += attempt.seconds + time.perf_counter() - begin
            yield _append(job.run, record | {"seconds": round(spent, 2)})
    except NoRoomError:
        yield from unattackable
        raise
    yield from unattackable


def _check_copies(job: Job, file: Path, photo: Photo) -> None:
    """See that the copies of a photo can be made and shown to all detectors.

    Raises:
        DetguardError: one cannot.
    """
    try:
        for transform in job.transforms:
            for end in (transform.low, transform.high) if isinstance(transform, Drawn) else (transform,):
                shape = picture_of(end.draw(np.random.default_rng(0)), photo).shape[:2]
                for victim in job.victims:  # of which one may refuse a shape
                    victim.detector.letterbox(shape)
    except DetguardError as error:
        raise DetguardError(f"{file}: {error}") from error


def picture_of(transform: Transform, photo: Photo) -> Photo:
    """What a transform makes of a photo, to be shown to a detector.

    Raises:
        DetguardError: it cannot be made, or is too small.
    """
    copy = transform(photo)
    height, width = copy.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise DetguardError(f"after {transform} it has {width} x {height} px, too few to detect on")
    return copy


def blind_one(victims: Sequence[Victim], clean: Sequence[Detections], conf: float) -> Detector | None:
    """The first detector that found in the clean photo nothing that it could be fooled of, or all that is wanted."""
    for victim, one in zip(victims, clean, strict=True):
        found, objective = one.above(conf), victim.objective
        there = not objective.needs_target and objective.success(found, found)
        if there or (objective.needs_target and not objective.attacked(found).any()):
            return victim.detector
    return None


def failure(key: str, file: Path, error: DetguardError) -> Record:
    """The record of a photo that could not be read, or whose results could not be written."""
    return {"key": key, "photo": str(file), "status": "error", "error": str(error)}


def _append(run: Run, record: Record) -> Record:
    try:
        run.append(record)
    except DetguardError as error:
        if run.gone:  # and nothing more can be done
            raise
        return record | {"status": "error", "error": str(error)}
    return record


def lowest_threshold(conf: float) -> float:
    """The confidence to predict at, so that all THRESHOLDS and `conf` can be read off one prediction."""
    return min(*THRESHOLDS, conf)


def save_attempt(job: Job, attempt: Attempt, file: Path, clean: Sequence[Detections]) -> Record:
    """Save the adversarial photo and its group, then judge what was saved against all `clean` detections, by detector.

    Raises:
        DetguardError: a file cannot be written, or what is read back breaks the budget.
    """
    run, key, conf, first = job.run, attempt.key, job.options.conf, job.victims[0]
    drawn = dict(zip(map(str, job.transforms), attempt.drawn, strict=True))
    names = {PHOTO: f"adversarial/{key}.png"}
    names |= {name: f"group/{key}/{str(t).replace(':', '-')}{t.suffix}" for name, t in drawn.items()}
    run.write(names[PHOTO], encode_png(attempt.adversarial))
    for name, transform in drawn.items():
        run.write(names[name], transform.encode(attempt.adversarial))
    saved, budget = read_photo(run.path(names[PHOTO])), attempt.rule.budget
    used = attempt.used_by(saved, run.path(names[PHOTO]))
    paths = {name: run.path(path) for name, path in names.items()}
    found = [find_in(victim.detector, paths, conf) for victim in job.victims]
    members, *others = [
        judge_members(victim, before, after, conf, drawn, attempt.photo)
        for victim, before, after in zip(job.victims, clean, found, strict=True)
    ]
    fooled = all(one["fooled"] for judged in (members, *others) for one in judged.values())
    names_of = first.detector.class_names
    counted = {}
    if first.objective.counts_candidates:
        counted["candidates"] = candidates_over(first.detector, [attempt.photo, saved], conf)
    objects = attempt.clean[attempt.attacked]
    after = found[0][PHOTO].above(conf)
    overlay = before_after(attempt.photo, attempt.clean, saved, after, names_of)
    run.write(f"overlays/{key}.png", encode_png(overlay))
    return {
        "key": key,
        "photo": str(file),
        "status": "fooled" if fooled else "failed",
        "iterations": attempt.steps,
        "queries": attempt.queries,
        "difference": largest_difference(saved, attempt.photo),
        "used": min(round(used, 3), budget.eps),
        "eps": budget.eps,
        "psnr": round(min(cv2.PSNR(saved, attempt.photo), 100.0), 2),
        "ssim": round(structural_similarity(saved, attempt.photo), 4),
        "objects": [
            {**record, "outcome": outcome}
            for record, outcome in zip(objects.records(names_of), outcomes(objects, after), strict=True)
        ],
        "clean": attempt.clean.records(names_of),
        "members": members,
        "also": {one.detector.name: judged for one, judged in zip(job.victims[1:], others, strict=True)},
        "files": names,
        "draws": {name: str(t) for name, t in drawn.items() if str(t) != name},
    } | counted


def candidates_over(detector: Detector, photos: Sequence[Photo], conf: float) -> list[int]:
    """How many candidates of each photo are over a confidence before NMS: what NMS and all after it take time for."""
    counts = []
    for photo in photos:
        frame = detector.letterbox(photo.shape[:2])(photo)
        with torch.no_grad():
            logits = detector.candidates(frames_tensor([frame], detector.device)).logits
        counts.append(int((logits.amax(2) > logit(conf)).sum()))
    return counts


def find_in(detector: Detector, paths: Mapping[str, Path], conf: float) -> dict[str, Detections]:
    """What a detector finds in files, by their names, down to all THRESHOLDS."""
    return {name: detector.predict(path, lowest_threshold(conf)) for name, path in paths.items()}


def judge_members(
    victim: Victim,
    clean: Detections,
    found: Mapping[str, Detections],
    conf: float,
    drawn: Mapping[str, Transform],
    photo: Photo,
) -> dict[str, Record]:
    """What `judge` says of each member of a group, by what was found in it.

    drawn: the transforms of members; photo: as it was before the attack.
    """
    shape, names, lowest = photo.shape[:2], victim.detector.class_names, lowest_threshold(conf)
    judged = {}
    for name, one in found.items():
        transform = drawn.get(name)
        copied = victim.found_in_copy(transform, photo, lowest)
        least = victim.detector.nms_inside[0] if victim.detector.nms_inside else 0.0
        judged[name] = judge(victim.objective, clean, one, conf, names, transform, shape, copied, least)
    return judged


def drawn_transforms(record: Record) -> dict[str, Transform]:
    """The transforms of the members of a record, as they were drawn.

    Raises:
        DetguardError: a member is called by no transform.
    """
    specs = {name: record["draws"].get(name, name) for name in record["files"] if name != PHOTO}
    parsed = {name: parse_transforms(spec) for name, spec in specs.items()}
    if wrong := [name for name, transforms in parsed.items() if len(transforms) != 1]:
        raise RunError(f"not a record that detguard wrote (files.{wrong[0]}: expected one transform)")
    return {name: transforms[0] for name, transforms in parsed.items()}


def judge(
    objective: Objective,
    clean: Detections,
    found: Detections,
    conf: float,
    class_names: dict[int, str],
    transform: Transform | None = None,
    shape: tuple[int, int] = (0, 0),
    copied: Detections = NOTHING,
    least: float = 0.0,
) -> Record:
    """Whether one member fools the detector at `conf` and at each of THRESHOLDS.

    None: in the photo there is nothing to fool at that one, or the detector tells nothing under `least`, a higher one.

    confidence: of the best detection of a target class, where some objects alone are attacked the best in their places;
    objects_not_kept: at each of THRESHOLDS, how many of the attacked objects vanished or were relabelled, and how many
    there were in the member; detections: what is found at `conf`, and whether that is wrong: nothing of its class was
    in its place (IoU >= 0.5) at `conf` before. transform, shape: of the member and of the photo, where `found` lies in
    a picture that a transform made of it. copied: what was found in the clean copy (`Victim.found_in_copy`).
    """
    success: dict[str, bool | None] = {}
    gone: dict[str, list[int]] = {}

    def before(threshold: float) -> tuple[Detections, torch.Tensor]:
        over = clean.above(threshold)
        return in_copy(transform, shape, over, objective.attacked(over), copied.above(threshold))

    for threshold in THRESHOLDS:
        (objects, attacked), after = before(threshold), found.above(threshold)
        # Of the whole photo: a copy that shows half of an object, or none, is to fool as well.
        something = bool(objective.attacked(clean.above(threshold)).any()) or not objective.needs_target
        told = something and threshold >= least
        success[f"{threshold:g}"] = objective.success(objects, after, attacked) if told else None
        fates = outcomes(objects[attacked], after)
        gone[f"{threshold:g}"] = [sum(fate != "kept" for fate in fates), len(fates)]
    (objects, attacked), after = before(conf), found.above(conf)
    wrong = new(objects, after).tolist()
    left = found.of(objective.classes)
    if objective.needs_target and len(objects[~attacked].of(objective.classes)):
        left = left[(box_iou(left.boxes, objects[attacked].boxes) >= SAME_OBJECT_IOU).any(1)]
    return {
        "fooled": objective.success(objects, after, attacked),
        "confidence": round(float(left.scores.max()), 4) if len(left) else 0.0,
        "success": success,
        "objects_not_kept": gone,
        "detections": [{**record, "wrong": one} for record, one in zip(after.records(class_names), wrong, strict=True)],
    }


def structural_similarity(a: Photo, b: Photo) -> float:
    """Mean SSIM of two photos (Wang et al. 2004), window 11, over the three channels."""
    from kornia.metrics import ssim  # late: takes long to import

    return float(ssim(frames_tensor([a]), frames_tensor([b]), 11).mean())


def verify_run(
    run: Run,
    detector: Detector,
    objective: Objective,
    transforms: Sequence[Transform],
    budget: Budget,
    keys: Collection[str] | None = None,
) -> Iterator[Record]:
    """Judge the saved files of a run anew, by default all, and the adversarial photos after further `transforms`.

    Yields per attacked photo: key, photo, group (names of its members), members (name -> `judge`), unjudged (further
    transforms that this photo cannot be shown after -> why), used (of the budget); or key, error; or key, skipped:
    another detector than the one attacked, which finds no target in the clean photo. What is random in a transform is
    drawn by the photo's key, not as the attack drew it; of one that is a member of the group, too, as "rotate:-8..8,
    drawn anew" beside the saved copy.

    Raises:
        DetguardError: the detector does not tell what it finds at the run's confidence.
    """
    conf = float(run.config["attack"]["conf"])
    check_told(detector, conf)
    lowest, victim = lowest_threshold(conf), Victim(detector, objective)
    for record in run.records(checked=False):
        if record.get("status") not in ("fooled", "failed") or (keys is not None and record["key"] not in keys):
            continue
        try:
            if wrong := misfit(record, ATTACKED):
                raise RunError(f"not a record that detguard wrote ({wrong})")
            paths = {name: run.path(path) for name, path in record["files"].items()}
            # Reading says clearly what is wrong with a damaged file, which the predict path does not.
            saved = {name: read_photo(path) for name, path in paths.items()}[PHOTO]
            if not is_file(record["photo"]):
                raise RunError(
                    f"{record['photo']}: the photo as it was before the attack is not there; put it back, or where "
                    "that is a relative path, work in the folder where the attack was started"
                )
            original = read_photo(record["photo"])
            clean = detector.predict(original, lowest)
            if blind_one([victim], [clean], conf):
                yield {"key": record["key"], "skipped": "no target"}
                continue
            found = find_in(detector, paths, conf)
            rng = np.random.default_rng(photo_seed(record["key"], VERIFY_SEED))
            again = [t for t in transforms if str(t) in found]
            further = {str(t): t.draw(rng) for t in transforms if t not in again}
            # Of a random member there is the copy that the attack drew last; another draw is another copy.
            further |= {f"{t}, drawn anew": drawn for t in again if (drawn := t.draw(rng)) is not t}
            members = judge_members(victim, clean, found, conf, drawn_transforms(record), original)
            attacked = torch.tensor([o["box"] for o in record["objects"]]).view(-1, 4)
            used = budget.on(original.shape[:2], attacked).used(saved, original)
        except (DetguardError, ValueError) as error:  # ValueError: photos of two shapes
            yield {"key": str(record.get("key")), "error": str(error)}
            continue
        unjudged = {}
        for name, transform in further.items():
            try:
                one = {name: detector.predict(picture_of(transform, saved), lowest)}
                members |= judge_members(victim, clean, one, conf, {name: transform}, original)
            except (DetguardError, ValueError) as error:
                unjudged[name] = str(error)
        yield {
            "key": record["key"],
            "photo": record["photo"],
            "group": list(paths),
            "members": members,
            "unjudged": unjudged,
            "used": used,
        }
