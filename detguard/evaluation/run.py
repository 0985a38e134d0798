"""One `detguard evaluate`: the views that its protocols need, shown to each detector, scored and written out."""

import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from detguard import DetguardError, __version__, defaults
from detguard.data.corruptions import KINDS, SEVERITIES, chosen_kinds
from detguard.data.entries import LOST
from detguard.detectors.base import Detector
from detguard.evaluation.attacks import ATTACKS, WORST, WORST_PER_PHOTO, AttackSet, BlackBox, Transferred, attacks_on
from detguard.evaluation.bootstrap import error_95
from detguard.evaluation.checks import check_views, first_photos, run_checks
from detguard.evaluation.coco import Metrics
from detguard.evaluation.corruptions import PACKAGE
from detguard.evaluation.pictures import Changed, patched, perturbed
from detguard.evaluation.saved import save_views
from detguard.evaluation.score import expert_shares, metrics_of, results
from detguard.evaluation.views import Batch, Clean, Corrupted, Piped, Subject, View, fill, piped, results_of
from detguard.runs import Run

PROTOCOLS = ("clean", "corruptions", "attack", "transfer", "blackbox", "checks")
# Of a run, each model's AP under each protocol for each draw of the photos: what `compare` takes differences of.
DRAWS = "draws.json"
# Options that are of several values.
SEVERAL = ("protocols", "severities", "eps", "attacks", "corruptions")
# Of the corruptions only this severity's results are written: all of them would be gigabytes.
WRITTEN_SEVERITY = 3


@dataclass(frozen=True)
class Protocols:
    """What is measured and how; the options of `detguard evaluate`.

    Attributes:
        protocols: some of clean, corruptions, attack, transfer, blackbox and checks.
        severities: of the corruptions, some of 1..5.
        eps: budgets of attacks in levels of 255; the last one leads.
        steps: of each white-box attack.
        restarts: starts of each white-box attack.
        attacks: white-box ones: some of class, box, all, vanish and rank.
        queries: forwards per photo of the Square attack.
        seed: of all that is random.
        patch: file of a patch, to be judged on the labelled objects of the class `patch_target`.
        patch_target: name of that class.
        patch_size: side of the patch, as a share of the root of the area of an object's box.
        universal: file of a perturbation, to be judged on all photos.
        corruptions: which of the common ones.
        corruption_file: a pipeline of albumentations, to be judged on all photos.
        save_images: write what was shown, clean photos left out, as data sets of the run.

    Raises:
        DetguardError: an option is not one of those known.
    """

    protocols: tuple[str, ...] = defaults.Evaluate.protocols
    severities: tuple[int, ...] = defaults.Evaluate.severities
    eps: tuple[int, ...] = defaults.Evaluate.eps
    steps: int = 20
    restarts: int = 1
    attacks: tuple[str, ...] = defaults.Evaluate.attacks
    queries: int = defaults.Evaluate.queries
    seed: int = defaults.Evaluate.seed
    patch: str | None = None
    patch_target: str = defaults.Evaluate.patch_target
    patch_size: float = defaults.Evaluate.patch_size
    universal: str | None = None
    corruptions: tuple[str, ...] = tuple(KINDS)
    corruption_file: str | None = None
    save_images: bool = False

    def __post_init__(self) -> None:
        for name in SEVERAL:
            if isinstance(given := getattr(self, name), str) or not isinstance(given, Sequence):
                raise DetguardError(f"`{name}` {given!r}: expected a tuple or list, as {getattr(Protocols, name)[:2]}")
        for name in self.protocols:
            if name not in PROTOCOLS:
                raise DetguardError(f"`protocols` '{name}': expected some of {', '.join(PROTOCOLS)}")
        for severity in self.severities:
            if severity not in SEVERITIES:
                raise DetguardError(f"`severities` {severity}: expected some of 1,2,3,4,5")
        for eps in self.eps:
            if eps != int(eps) or not 0 < eps <= 255:
                raise DetguardError(f"`eps` {eps}: expected whole levels of 1..255")
        for attack in self.attacks:
            if attack not in ATTACKS:
                raise DetguardError(f"`attacks` '{attack}': expected some of {', '.join(ATTACKS)}")
        chosen_kinds(self.corruptions)
        _ = self.own_corruption  # a wrong file leaves no run behind
        for name in SEVERAL:  # what is given twice is done once
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        if not (self.protocols and self.severities and self.eps and self.attacks):
            raise DetguardError("`protocols`, `severities`, `eps`, `attacks`: each needs at least one value")

    def attack_sets(self, detector: Detector) -> list[AttackSet]:
        """The white-box attacks on a detector, by rising budget as given; on a gated one, those that know it too.

        Where there is no gradient, the Square attack alone.
        """
        names = attacks_on(detector, self.attacks)
        steps, restarts = (self.steps, self.restarts) if detector.differentiable else (self.queries, 1)
        return [AttackSet(names, eps, steps, restarts, self.seed) for eps in self.eps]

    @property
    def corrupted(self) -> list[Corrupted]:
        """The wanted kinds at all wanted severities."""
        return [Corrupted(kind, severity, self.seed) for kind in self.corruptions for severity in self.severities]

    @property
    def own_corruption(self) -> list[Piped]:
        """The user's own pipeline, if one is judged."""
        return [] if self.corruption_file is None else [piped(self.corruption_file, self.seed)]

    @property
    def blackbox(self) -> BlackBox:
        """The Square attack at the leading budget."""
        return BlackBox(self.eps[-1], self.queries, self.seed)

    def patches(self, detector: Detector) -> list[Changed]:
        """The patch and those that mean nothing, if one is judged."""
        if self.patch is None:
            return []
        return patched(self.patch, detector.class_index(self.patch_target), self.patch_size, self.seed)

    @property
    def perturbations(self) -> list[Changed]:
        """The universal perturbation and random signs, if one is judged."""
        return [] if self.universal is None else perturbed(self.universal, self.seed)

    def views(self, detector: Detector) -> list[View]:
        """What is shown of all photos, transfer left out; the clean photos always, to compare with."""
        views: list[View] = [Clean()]
        views += self.corrupted if "corruptions" in self.protocols else []
        if "attack" in self.protocols:
            views += self.attack_sets(detector)
        elif "transfer" in self.protocols:
            views.append(self.attack_sets(detector)[-1])
        views += [self.blackbox] if "blackbox" in self.protocols else []
        return views + self.own_corruption + self.patches(detector) + self.perturbations


@dataclass
class Evaluation:
    """What came out, by model: numbers for metrics.json, the metrics of each written view for plots and CSV, and the
    headline figures in each draw of the photos.
    """

    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    classes: list[tuple[str, str, str, dict[str, float | None]]] = field(default_factory=list)
    draws: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)


def work(subjects: list[Subject], wanted: Protocols) -> Iterator[tuple[Subject, list[View]]]:
    """What is to be shown, in order: each detector's own views, then what the others' attacks do to it, then checks."""
    for subject in subjects:
        yield subject, wanted.views(subject.detector)
    if "transfer" in wanted.protocols:
        for subject in subjects:
            yield subject, transfers(subject, subjects, wanted)
    if "checks" in wanted.protocols:
        for subject in checkable(subjects):
            yield first_photos(subject), check_views(wanted.attack_sets(subject.detector)[-1], wanted.queries)


def checkable(subjects: Iterable[Subject]) -> list[Subject]:
    """Those whose attacks go by a gradient, which the checks are of."""
    return [subject for subject in subjects if subject.detector.differentiable]


def transfers(subject: Subject, subjects: list[Subject], wanted: Protocols) -> list[View]:
    """The other detectors' adversarial photos."""
    return [Transferred(other, wanted.attack_sets(other.detector)[-1]) for other in subjects if other is not subject]


def evaluate(
    subjects: list[Subject], wanted: Protocols, run: Run, on_progress: Callable[[str, int], None] | None = None
) -> Evaluation:
    """Show everything, score it, and write metrics.json, draws.json, per_class.csv and detections/ of the run.

    on_progress: called with what is being shown and how much of the total `cost` is done.
    """
    filled = False
    while not filled:
        begun = [subject.cache.begun for subject in subjects]
        for subject, views in work(subjects, wanted):

            def on_batch(view: View, photos: int, name: str = subject.name) -> None:
                if on_progress:
                    on_progress(f"{name}: {view.name}", view.cost * photos)

            fill(subject, views, on_batch)
        filled = begun == [subject.cache.begun for subject in subjects]  # else what was there before is not any more
    evaluation = Evaluation()
    for subject in subjects:
        _score(subject, subjects, wanted, run, evaluation)
    run.write("metrics.json", (json.dumps(evaluation.metrics, indent=1) + "\n").encode())
    run.write(DRAWS, (json.dumps(evaluation.draws) + "\n").encode())
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("model", "view", "class", "AP", "AP50", "objects"))
    for model, view, name, row in evaluation.classes:
        writer.writerow((model, view, name, row["AP"], row["AP50"], row["objects"]))
    run.write("per_class.csv", table.getvalue().encode())
    if wanted.save_images:
        for subject in subjects:
            views = wanted.views(subject.detector)
            save_views(subject, views, run, lambda what: on_progress(what, 0) if on_progress else None)
    return evaluation


def total_cost(subjects: list[Subject], wanted: Protocols) -> int:
    """What `evaluate` has to show, in forward passes."""
    return sum(len(s.dataset.files) * sum(view.cost for view in views) for s, views in work(subjects, wanted))


@dataclass(frozen=True)
class Cost:
    """What an evaluation takes. passes: forward passes of one photo, a backward counted as two; left: those of them
    that the cache does not spare; seconds: of those left, by a batch of each detector that was measured.
    """

    passes: int
    left: int
    seconds: float


def measure_cost(subjects: list[Subject], wanted: Protocols) -> Cost:
    """How much there is to do, and about how long it takes here: what is beside the passes is not counted.

    Raises:
        DetguardError: no photo can be read.
    """
    passes = left = 0
    seconds, of_pass = 0.0, dict[int, float]()
    for subject, views in work(subjects, wanted):
        missing = sum(view.cost for view in views for image in subject.hashes if not view.cached(subject, image))
        passes += len(subject.hashes) * sum(view.cost for view in views)
        left += missing
        if missing:
            detector = id(subject.detector)
            if detector not in of_pass:
                of_pass[detector] = _seconds_of_pass(subject)
            seconds += missing * of_pass[detector]
    return Cost(passes, left, seconds)


def _seconds_of_pass(subject: Subject) -> float:
    for images in subject.batches():
        batch = Batch(subject, images)
        batch.drop_unreadable()
        if batch.images:
            subject.detect(batch.photos)  # the first pass of a shape takes longer
            begin = time.perf_counter()
            subject.detect(batch.photos)
            return (time.perf_counter() - begin) / len(batch.images)
    raise DetguardError(f"{subject.dataset.name}: no photo can be read")


def _score(subject: Subject, subjects: list[Subject], wanted: Protocols, run: Run, evaluation: Evaluation) -> None:
    curves = evaluation.curves.setdefault(subject.name, {})
    dataset, detector = subject.dataset, subject.detector
    gate: dict[str, list[float]] = {}
    kept = evaluation.draws.setdefault(subject.name, {})

    def measure(view: View, label: str, part: str = "", sizes: bool = False, write: bool = True) -> Metrics:
        seen = list(results_of(subject, view, part))
        shown = results(subject, seen)
        if write:
            file = f"detections/{subject.name}/{label.replace(' ', '-')}.json"
            run.write(file, json.dumps(shown).encode())
        metrics = metrics_of(subject, shown, sizes, drawn=True)
        if detector.experts:
            gate[label] = expert_shares(seen)
        evaluation.classes += [(subject.name, label, name, row) for name, row in metrics.per_class.items()]
        return metrics

    def in_each(drawn: Sequence[np.ndarray | None], of: Callable[..., np.ndarray]) -> np.ndarray:
        """The mean or least `of` several figures in each draw."""
        return of([one for one in drawn if one is not None], axis=0)

    def whole(figure: str, drawn: Sequence[np.ndarray | None], of: Callable[..., np.ndarray]) -> float | None:
        """The error of a figure that is the mean or least `of` several in each draw, which are kept for `compare`."""
        values = in_each(drawn, of)
        kept[figure] = [None if math.isnan(value) else round(float(value), 5) for value in values]
        return error_95(values, len(dataset.files))

    unchanged = measure(Clean(), "clean", sizes=True)
    clean, curves["clean"] = unchanged.stats, unchanged.precision
    found: dict[str, Any] = {
        "setting": {
            "version": __version__,
            "data": dataset.name,
            "photos": len(dataset.files),
            "photos_sha256": subject.photos_sha256,
            "classes": len(subject.category_ids),
            "unknown_classes": dataset.unknown(detector.class_names),
            "imgsz": detector.imgsz,
            "end_to_end": detector.end_to_end,
            "nms": None if detector.end_to_end else detector.iou,
            "seed": wanted.seed,
            "sha256": detector.state_hash(),
            "left_out": dataset.warnings[LOST].total,
        }
    }
    if "clean" in wanted.protocols:
        counts = {"photos": len(subject.dataset.files), "classes": len(subject.category_ids)}
        whole("clean", [unchanged.drawn], np.mean)
        found["clean"] = clean | counts
    if "corruptions" in wanted.protocols:
        kinds: dict[str, dict[str, dict[str, float | None]]] = {}
        lines = []
        drawn: dict[str, list[np.ndarray | None]] = {}
        for view in wanted.corrupted:
            metrics = measure(view, f"{view.kind} {view.severity}", write=view.severity == WRITTEN_SEVERITY)
            kinds.setdefault(view.kind, {})[str(view.severity)] = metrics.stats
            lines.append(metrics.precision)
            drawn.setdefault(view.kind, []).append(metrics.drawn)
        curves["corruptions, mean"] = [sum(values) / len(lines) for values in zip(*lines, strict=True)]
        found["corruptions"] = _corruption_summary(kinds, clean["AP"])
        for kind, summary in found["corruptions"]["kinds"].items():
            summary["AP_error"] = error_95(in_each(drawn[kind], np.mean), len(dataset.files))
        found["corruptions"]["AP_error"] = whole("corruptions", [one for of in drawn.values() for one in of], np.mean)
    if "attack" in wanted.protocols:
        budgets: dict[str, Any] = {}
        for attack in wanted.attack_sets(subject.detector):
            parts, of_parts = {}, []
            for part in attack.scored:
                worst = part == WORST
                sizes = worst or attack.eps == wanted.eps[-1]  # of which any may be the one that leads
                metrics = measure(attack, f"attack eps {attack.eps} {part}", part, sizes=sizes, write=worst)
                parts[part] = metrics.stats
                of_parts.append(metrics.drawn)
                if worst:
                    curves[f"attack eps {attack.eps}, {WORST_PER_PHOTO}"] = metrics.precision
            budgets[str(attack.eps)] = {stat: lowest(p[stat] for p in parts.values()) for stat in ("AP", "AP50")}
            budgets[str(attack.eps)]["AP_error"] = whole("attack", of_parts, np.min)  # the last budget leads
            budgets[str(attack.eps)] |= {"by": least_of(parts), "attacks": parts}
        leading = budgets[str(wanted.eps[-1])]
        found["attack"] = {stat: leading[stat] for stat in ("AP", "AP50", "AP_error", "by")} | {"eps": wanted.eps[-1]}
        if detector.differentiable:
            found["attack"] |= {"steps": wanted.steps, "restarts": wanted.restarts}
        else:
            found["attack"] |= {"queries": wanted.queries}
        found["attack"] |= {"seed": wanted.seed, "budgets": budgets}
    if "transfer" in wanted.protocols:
        measured = {
            view.source.name: measure(view, f"transfer from {view.source.name}")
            for view in transfers(subject, subjects, wanted)
            if isinstance(view, Transferred)
        }
        rows = {name: metrics.stats for name, metrics in measured.items()}
        found["transfer"] = {stat: lowest(r[stat] for r in rows.values()) for stat in ("AP", "AP50")}
        found["transfer"]["AP_error"] = whole("transfer", [m.drawn for m in measured.values()], np.min)
        found["transfer"] |= {"eps": wanted.eps[-1], "from": rows}
    if "blackbox" in wanted.protocols:
        metrics = measure(wanted.blackbox, "blackbox")
        curves[f"black box eps {wanted.eps[-1]}"] = metrics.precision
        whole("blackbox", [metrics.drawn], np.min)
        found["blackbox"] = metrics.stats | {"eps": wanted.eps[-1], "queries": wanted.queries, "seed": wanted.seed}
    for own in wanted.own_corruption:
        metrics = measure(own, own.name)
        whole("corruption_file", [metrics.drawn], np.min)
        found["corruption_file"] = metrics.stats | {"file": wanted.corruption_file}
    if wanted.patch is not None:
        name = detector.class_names[detector.class_index(wanted.patch_target)]
        of_class = {"clean": unchanged.per_class.get(name)}
        for worn in wanted.patches(detector):
            metrics = measure(worn, worn.name)
            of_class[worn.label] = metrics.per_class.get(name)
        found["patch"] = {"class": name, "size": wanted.patch_size, "file": wanted.patch, "shown": of_class}
    if added := wanted.perturbations:
        measured = {view.label: measure(view, view.name) for view in added}
        shown = {"clean": clean} | {label: metrics.stats for label, metrics in measured.items()}
        whole("universal", [measured["universal"].drawn], np.min)
        (eps,) = {view.how.bounds[1] for view in added}
        found["universal"] = {"eps": round(eps * 255), "file": wanted.universal, "shown": shown}
    if "checks" in wanted.protocols and checkable([subject]):
        found["checks"] = run_checks(subject, wanted.attack_sets(subject.detector)[-1], wanted.queries)
        found["checked"] = {"photos": len(first_photos(subject).dataset.files)}
        found["checked"] |= {"steps": wanted.steps, "queries": wanted.queries}
    if gate:
        found["gate"] = {"experts": list(detector.experts), "shares": gate}
    evaluation.metrics[subject.name] = found


def _corruption_summary(kinds: dict[str, dict[str, dict[str, float | None]]], clean: float | None) -> dict[str, Any]:
    """Mean AP under corruption (mPC) and its share of the clean AP (rPC), as Michaelis et al. (2019) define them."""
    means = {kind: {s: mean(row[s] for row in rows.values()) for s in ("AP", "AP50")} for kind, rows in kinds.items()}
    overall = {stat: mean(row[stat] for row in means.values()) for stat in ("AP", "AP50")}
    summary: dict[str, Any] = overall | {"mPC": overall["AP"]}
    summary["rPC"] = overall["AP"] / clean if clean and overall["AP"] is not None else None
    summary["kinds"] = {
        kind: means[kind] | {"made by": PACKAGE, "differs": "", "severities": rows} for kind, rows in kinds.items()
    }
    return summary


def mean(values: Any) -> float | None:
    """Mean of those that are not None."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def least_of(parts: dict[str, dict[str, float | None]]) -> str:
    """The part of an attack whose AP is the least."""
    return min(parts, key=lambda part: math.inf if (ap := parts[part]["AP"]) is None else ap)


def lowest(values: Any) -> float | None:
    """Least of those that are not None."""
    return min((v for v in values if v is not None), default=None)
