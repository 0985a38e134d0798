"""One `detguard evaluate`: the views that its protocols need, shown to each detector, scored and written out."""

import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import cast

import numpy as np

from detguard import DetguardError, __version__, defaults
from detguard.data.entries import LOST
from detguard.detectors.base import Detector
from detguard.evaluation.attacks import ATTACKS, SQUARE, WORST, WORST_PER_PHOTO, AttackSet, Transferred, attacks_on
from detguard.evaluation.bootstrap import error_95
from detguard.evaluation.checks import check_views, first_photos, run_checks
from detguard.evaluation.coco import CocoMetrics, coco_results
from detguard.evaluation.compare import Compared
from detguard.evaluation.corruptions import PUBLISHED, SEVERITIES
from detguard.evaluation.metrics import (
    DRAWS,
    METRICS,
    SCHEMA,
    Attack,
    BlackBoxStats,
    Budget,
    Corruption,
    Corruptions,
    Draws,
    Figure,
    Metrics,
    ModelMetrics,
    OfClass,
    Patch,
    Setting,
    Severity,
    Spent,
    Transfer,
    UniversalStats,
)  # fmt: skip
from detguard.evaluation.pictures import PATCH, UNIVERSAL, Changed, patched, perturbed
from detguard.evaluation.saved import save_views
from detguard.evaluation.score import expert_shares, metrics_of
from detguard.evaluation.views import (
    LOWEST_CONFIDENCE,
    Altered,
    Batch,
    Clean,
    Corrupted,
    Piped,
    Subject,
    View,
    fill,
    piped,
    results_of,
)
from detguard.ranks import ALONE, Ranks
from detguard.runs import Run
from detguard.schema import several

PROTOCOLS = ("clean", "corruptions", "attack", "transfer", "blackbox", "checks")
# Options that are of several values.
SEVERAL = ("protocols", "severities", "eps", "attacks", "corruptions")
# Of the corruptions only this severity's results are written: all of them would be gigabytes.
WRITTEN_SEVERITY = 3
# Hex digits that tell a file from another one.
CONTENT = 16


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
        batch: photos of one frame shape that go through the detector together; on a GPU, more are faster. Figures by
            another batch differ as rounding does.
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
    batch: int = defaults.Evaluate.batch
    patch: str | None = None
    patch_target: str = defaults.Evaluate.patch_target
    patch_size: float = defaults.Evaluate.patch_size
    universal: str | None = None
    corruptions: tuple[str, ...] = PUBLISHED
    corruption_file: str | None = None
    save_images: bool = False

    def __post_init__(self) -> None:
        for name in SEVERAL:
            object.__setattr__(self, name, several(name, getattr(self, name), getattr(Protocols, name)[:2]))
        known = {"protocols": PROTOCOLS, "severities": SEVERITIES, "attacks": ATTACKS, "corruptions": PUBLISHED}
        for name, some in known.items():
            for one in getattr(self, name):
                if one not in some:
                    raise DetguardError(f"`{name}` {one}: expected some of {', '.join(map(str, some))}")
        for eps in self.eps:
            if not isinstance(eps, Real) or not 0 < eps <= 255 or eps != int(eps):
                raise DetguardError(f"`eps` {eps}: expected whole levels of 1..255")
        if self.batch < 1:
            raise DetguardError(f"`batch` {self.batch}: expected 1 or more photos")
        _ = self.own_corruption  # a wrong file leaves no run behind
        for name in SEVERAL:  # what is given twice is done once
            # By its last place: the last budget leads.
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name)[::-1]))[::-1])
            if not getattr(self, name):
                raise DetguardError(f"`{name}`: needs at least one value")

    def attack_sets(self, detector: Detector) -> list[AttackSet]:
        """The white-box attacks on a detector, by rising budget as given; on a gated one, those that know it too.

        Where there is no gradient, the Square attack alone.
        """
        names = attacks_on(detector, self.attacks)
        steps, restarts = (self.steps, self.restarts) if detector.differentiable else (self.queries, 1)
        return [AttackSet(names, eps, steps, restarts, self.seed) for eps in self.eps]

    @property
    def by_files(self) -> bool:
        """Whether files of the user's own are to be judged, beside the protocols."""
        return any(one is not None for one in (self.patch, self.universal, self.corruption_file))

    @property
    def checks_alone(self) -> bool:
        """Whether nothing but the checks is asked for."""
        return self.protocols == ("checks",) and not self.by_files

    @property
    def corrupted(self) -> list[Corrupted]:
        """The wanted kinds at all wanted severities."""
        return [Corrupted(kind, severity, self.seed) for kind in self.corruptions for severity in self.severities]

    @property
    def own_corruption(self) -> list[Piped]:
        """The user's own pipeline, if one is judged."""
        return [] if self.corruption_file is None else [piped(self.corruption_file, self.seed)]

    @property
    def blackbox(self) -> AttackSet:
        """The Square attack at the leading budget."""
        return AttackSet((SQUARE,), self.eps[-1], self.queries, seed=self.seed)

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
        views += [*self.own_corruption, *self.patches(detector), *self.perturbations]
        return list(dict.fromkeys(views))  # without a gradient, the attack is the black box


@dataclass
class Evaluation:
    """What came out, by model: numbers for metrics.json, the metrics of each written view for plots and CSV, and the
    headline figures in each draw of the photos.
    """

    metrics: Metrics = field(default_factory=dict)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    classes: list[tuple[str, str, str, OfClass]] = field(default_factory=list)
    draws: Draws = field(default_factory=dict)


def work(subjects: list[Subject], wanted: Protocols) -> Iterator[tuple[Subject, Sequence[View]]]:
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


def transfers(subject: Subject, subjects: Sequence[Subject], wanted: Protocols) -> list[Transferred]:
    """The other detectors' adversarial photos, as views."""
    return [Transferred(other, wanted.attack_sets(other.detector)[-1]) for other in subjects if other is not subject]


def evaluate(
    subjects: list[Subject],
    wanted: Protocols,
    run: Run,
    on_progress: Callable[[str, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Show everything, score it, and write metrics.json, draws.json, per_class.csv and detections/ of the run.

    on_progress: called with what is being shown, and how much of the total `cost` that was since the last call; ranks:
    each shows its share, and the first alone scores: for the others nothing comes out.
    """
    filled = False
    while not filled:
        begun = [subject.cache.begun for subject in subjects]
        for subject, views in work(subjects, wanted):

            def on_batch(view: View, photos: int, name: str = subject.name) -> None:
                if on_progress:
                    on_progress(f"{name}: {view.name}", view.cost * photos)

            fill(subject, views, on_batch, ranks)
        filled = begun == [subject.cache.begun for subject in subjects]  # else what was there before is not any more
    ranks.end()
    evaluation = Evaluation()
    if not ranks.first:
        return evaluation
    for subject in subjects:
        evaluation.metrics[subject.name] = Scorer(subject, subjects, wanted, run, evaluation).metrics()
    run.write(METRICS, (json.dumps(evaluation.metrics, indent=1) + "\n").encode())
    run.write(DRAWS, (json.dumps(evaluation.draws) + "\n").encode())
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("model", "view", "class", "AP", "AP50", "objects", "AP_error"))
    for model, view, name, row in evaluation.classes:
        writer.writerow((model, view, name, row["AP"], row["AP50"], row["objects"], row["AP_error"]))
    run.write("per_class.csv", table.getvalue().encode(errors="backslashreplace"))  # of file names, any bytes
    if wanted.save_images:
        for subject in subjects:
            views = wanted.views(subject.detector)
            save_views(subject, views, run, lambda what: on_progress(what, 0) if on_progress else None)
    return evaluation


@dataclass(frozen=True)
class Cost:
    """What an evaluation takes. passes: forward passes of one photo, a backward counted as two; left: those of them
    that the cache does not spare; seconds: of those left, by a batch of each detector that was measured, shared out;
    altered: photos that are to be corrupted before, which is not in the seconds.
    """

    passes: int
    left: int
    seconds: float
    altered: int = 0


def measure_cost(subjects: list[Subject], wanted: Protocols, processes: int = 1) -> Cost:
    """How much there is to do, and about how long so many processes take: what is beside the passes is not counted.

    Raises:
        DetguardError: no photo can be read.
    """
    passes = left = altered = 0
    seconds, of_pass = 0.0, dict[int, float]()
    for subject, views in work(subjects, wanted):
        images = [image for image in subject.hashes if image in subject.dataset.files]  # measuring may drop one
        lacking = [(view, sum(not view.cached(subject, image) for image in images)) for view in views]
        missing = sum(view.cost * photos for view, photos in lacking)
        altered += sum(photos for view, photos in lacking if isinstance(view, Altered))
        passes += len(images) * sum(view.cost for view in views)
        left += missing
        if missing:
            detector = id(subject.detector)
            if detector not in of_pass:
                of_pass[detector] = _seconds_of_pass(subject)
            seconds += missing * of_pass[detector] / processes
    return Cost(passes, left, seconds, altered)


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


@dataclass
class Scorer:
    """The figures of one subject, from what the cache holds; what else is shown or compared goes into `evaluation`."""

    subject: Subject
    subjects: list[Subject]
    wanted: Protocols
    run: Run
    evaluation: Evaluation

    def __post_init__(self) -> None:
        self.curves = self.evaluation.curves.setdefault(self.subject.name, {})
        self.draws = self.evaluation.draws.setdefault(self.subject.name, {})
        self.gate: dict[str, list[float]] = {}
        self.photos = len(self.subject.dataset.files)

    def metrics(self) -> ModelMetrics:
        """The figures of every protocol that was asked for, as metrics.json holds them."""
        wanted, detector = self.wanted, self.subject.detector
        found: ModelMetrics = {"setting": self.setting()}
        clean = self.measure(Clean(), "clean", sizes=True)
        self.curves["clean"] = clean.precision
        if "clean" in wanted.protocols:
            self.error([clean], np.mean, "clean")
            found["clean"] = {**clean.stats, "photos": self.photos, "classes": len(self.subject.category_ids)}
        if "corruptions" in wanted.protocols:
            found["corruptions"] = self.corruptions(clean.stats["AP"])
        if "attack" in wanted.protocols:
            found["attack"] = self.attack()
        if "transfer" in wanted.protocols:
            found["transfer"] = self.transfer()
        if "blackbox" in wanted.protocols:
            found["blackbox"] = self.blackbox()
        for own in wanted.own_corruption:
            metrics = self.measure(own, own.name)
            self.error([metrics], np.mean, "corruption_file")
            found["corruption_file"] = {
                **metrics.stats,
                "file": wanted.corruption_file,
                "content": own.digest[:CONTENT],
            }
        if wanted.patch is not None:
            found["patch"] = self.patch(wanted.patch, clean)
        if wanted.universal is not None:
            found["universal"] = self.universal(wanted.universal, clean)
        if "checks" in wanted.protocols and checkable([self.subject]):
            few = len(first_photos(self.subject).dataset.files)
            found["checks"] = run_checks(self.subject, wanted.attack_sets(detector)[-1], wanted.queries)
            found["checked"] = {"photos": few, "steps": wanted.steps, "queries": wanted.queries}
        if self.gate:
            found["gate"] = {"experts": list(detector.experts), "shares": self.gate}
        return found

    def measure(
        self, view: View, label: str, part: str = "", *, sizes: bool = False, write: bool = True
    ) -> CocoMetrics:
        """COCO metrics of a part of a view; `write`: what was found into detections/ of the run."""
        seen = list(results_of(self.subject, view, part))
        name = self.subject.name
        if write:
            # Photo by photo: all as Python objects at once would be ten times as large.
            photos = (coco_results(image, one, self.subject.category_ids) for image, one in seen)
            lines = (json.dumps(some)[1:-1].encode() for some in photos if some)
            self.run.write(f"detections/{name}/{label.replace(' ', '-')}.json", b"[" + b", ".join(lines) + b"]")
        metrics = metrics_of(self.subject, seen, sizes=sizes, drawn=True)
        if self.subject.detector.experts:
            self.gate[label] = expert_shares(seen)
        self.evaluation.classes += [(name, label, of_class, row) for of_class, row in metrics.per_class.items()]
        return metrics

    def error(
        self, parts: Iterable[CocoMetrics], of: Callable[..., np.ndarray], protocol: Compared | None = None
    ) -> float | None:
        """The error of a figure that is the mean or least `of` several; as a protocol's its draws are kept."""
        drawn = of([part.drawn for part in parts], axis=0)
        if protocol:
            self.keep(protocol, drawn)
        return error_95(drawn, self.photos)

    def keep(self, protocol: Compared, drawn: np.ndarray) -> None:
        """A protocol's figure in each draw of the photos, for `compare`."""
        self.draws[protocol] = [None if math.isnan(value) else round(float(value), 5) for value in drawn]

    def setting(self) -> Setting:
        """The setting that the figures belong to: data, photos, seed, steps, NMS and versions."""
        dataset, detector = self.subject.dataset, self.subject.detector
        setting: Setting = {
            "schema": SCHEMA,
            "version": __version__,
            "data": dataset.name,
            "photos": self.photos,
            "photos_sha256": self.subject.photos_sha256,
            "classes": len(self.subject.category_ids),
            "unknown_classes": dataset.unknown(detector.class_names),
            "imgsz": detector.imgsz,
            "end_to_end": detector.end_to_end,
            "nms": None if detector.listed else detector.iou,
            "seed": self.wanted.seed,
            "sha256": detector.state_hash(),
            "left_out": dataset.warnings[LOST].total,
        }
        if detector.nms_inside and detector.nms_inside[0] > LOWEST_CONFIDENCE:
            setting["nms_inside"] = detector.nms_inside[0]
        return setting

    def corruptions(self, clean: float | None) -> Corruptions:
        """The figures under each kind of corruption at each severity, with mPC and rPC."""
        shown: dict[str, dict[Severity, CocoMetrics]] = {}
        for view in self.wanted.corrupted:
            severity = cast(Severity, str(view.severity))
            metrics = self.measure(view, f"{view.kind} {severity}", write=view.severity == WRITTEN_SEVERITY)
            shown.setdefault(view.kind, {})[severity] = metrics
        each = [metrics for rows in shown.values() for metrics in rows.values()]
        lines = zip(*(metrics.precision for metrics in each), strict=True)
        self.curves["corruptions, mean"] = [sum(values) / len(each) for values in lines]
        kinds: dict[str, Corruption] = {
            kind: {
                **figure([m.stats for m in rows.values()], mean, self.error(rows.values(), np.mean)),
                "severities": {severity: m.stats for severity, m in rows.items()},
            }
            for kind, rows in shown.items()
        }
        overall = figure(kinds.values(), mean, self.error(each, np.mean, "corruptions"))
        share = overall["AP"] / clean if clean and overall["AP"] is not None else None
        return {**overall, "mPC": overall["AP"], "rPC": share, "kinds": kinds}

    def attack(self) -> Attack:
        """The figures under each attack at each budget."""
        wanted, differentiable = self.wanted, self.subject.detector.differentiable
        budgets = {str(attack.eps): self.budget(attack) for attack in wanted.attack_sets(self.subject.detector)}
        leading = budgets[str(wanted.eps[-1])]
        spent: Spent = {"queries": wanted.queries}
        if differentiable:
            spent = {"steps": wanted.steps, "restarts": wanted.restarts}
        return {
            "AP": leading["AP"],
            "AP50": leading["AP50"],
            "AP_error": leading["AP_error"],
            "by": leading["by"],
            "eps": wanted.eps[-1],
            **spent,
            "seed": wanted.seed,
            "budgets": budgets,
        }

    def budget(self, attack: AttackSet) -> Budget:
        """The figures under each attack at one budget."""
        shown: dict[str, CocoMetrics] = {}
        for part in attack.scored:
            worst = part == WORST
            sizes = worst or attack.eps == self.wanted.eps[-1]  # of which any may be the one that leads
            shown[part] = self.measure(attack, f"attack eps {attack.eps} {part}", part, sizes=sizes, write=worst)
        self.curves[f"attack eps {attack.eps}, {WORST_PER_PHOTO}"] = shown[WORST].precision
        parts = {part: metrics.stats for part, metrics in shown.items()}
        # The draws that are kept are those of the last budget, which leads.
        least = figure(parts.values(), lowest, self.error(shown.values(), np.min, "attack"))
        return {**least, "by": least_of(parts), "attacks": parts}

    def transfer(self) -> Transfer:
        """The figures under the attacks that were made for the other models."""
        views = transfers(self.subject, self.subjects, self.wanted)
        shown = {view.source.name: self.measure(view, f"transfer from {view.source.name}") for view in views}
        rows = {name: metrics.stats for name, metrics in shown.items()}
        least = figure(rows.values(), lowest, self.error(shown.values(), np.min, "transfer"))
        spent: Spent = {"steps": self.wanted.steps, "restarts": self.wanted.restarts}
        if not all(view.source.detector.differentiable for view in views):
            spent["queries"] = self.wanted.queries
        return {
            **least,
            "eps": self.wanted.eps[-1],
            **spent,
            "attacks": list(self.wanted.attacks),
            "from": rows,
            "sources": {view.source.name: view.source.detector.state_hash() for view in views},
        }

    def blackbox(self) -> BlackBoxStats:
        """The figures under the Square attack, which uses no gradient."""
        wanted = self.wanted
        metrics = self.measure(wanted.blackbox, "blackbox", WORST)
        self.curves[f"black box eps {wanted.eps[-1]}"] = metrics.precision
        self.error([metrics], np.mean, "blackbox")
        return {**metrics.stats, "eps": wanted.eps[-1], "queries": wanted.queries, "seed": wanted.seed}

    def patch(self, file: str, clean: CocoMetrics) -> Patch:
        """With a patch, and with those that mean nothing."""
        detector, wanted = self.subject.detector, self.wanted
        name = detector.class_names[detector.class_index(wanted.patch_target)]
        shown, views = {"clean": clean.per_class.get(name)}, wanted.patches(detector)
        for worn in views:
            metrics = self.measure(worn, worn.name)
            shown[worn.label] = metrics.per_class.get(name)
            if worn.label == PATCH and name in metrics.drawn_classes:
                self.keep("patch", metrics.drawn_classes[name])
        content = contents(views, PATCH)
        return {"class": name, "size": wanted.patch_size, "file": file, "content": content, "shown": shown}

    def universal(self, file: str, clean: CocoMetrics) -> UniversalStats:
        """Under a universal perturbation, and under signs that mean nothing."""
        views = self.wanted.perturbations
        shown = {view.label: self.measure(view, view.name) for view in views}
        self.error([shown[UNIVERSAL]], np.mean, "universal")
        (eps,) = {view.how.bounds[1] for view in views}
        rows = {"clean": clean.stats} | {label: metrics.stats for label, metrics in shown.items()}
        return {"eps": round(eps * 255), "file": file, "content": contents(views, UNIVERSAL), "shown": rows}


def contents(views: Sequence[Changed], label: str) -> str:
    """The start of the digest of the user's own picture among those that are shown."""
    return next(view.digest[:CONTENT] for view in views if view.label == label)


def figure(rows: Iterable[Figure], of: Callable[[Iterable[float | None]], float | None], error: float | None) -> Figure:
    """The mean or least `of` several figures."""
    rows = list(rows)
    return {"AP": of(row["AP"] for row in rows), "AP50": of(row["AP50"] for row in rows), "AP_error": error}


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of those that are not None."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def least_of(parts: Mapping[str, Figure]) -> str:
    """The part of an attack whose AP is the least."""
    return min(parts, key=lambda part: math.inf if (ap := parts[part]["AP"]) is None else ap)


def lowest(values: Iterable[float | None]) -> float | None:
    """Least of those that are not None."""
    return min((v for v in values if v is not None), default=None)
