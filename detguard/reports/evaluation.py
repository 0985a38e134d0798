"""What `evaluate` and `compare` show: tables of metrics, and the page of a run."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from detguard import defaults
from detguard.detections import Detections
from detguard.evaluation.attacks import ATTACKS, WORST, WORST_PER_PHOTO, AttackSet, attack_name
from detguard.evaluation.bootstrap import FEWEST, RESAMPLES
from detguard.evaluation.checks import PHOTOS
from detguard.evaluation.coco import f1, outside
from detguard.evaluation.compare import Compared, ap_of
from detguard.evaluation.corruptions import PUBLISHED, SEVERITIES
from detguard.evaluation.metrics import Figure, Metrics, ModelMetrics, OfClass, Spent, Stat, Stats
from detguard.evaluation.pictures import GREY, Changed
from detguard.evaluation.run import Evaluation, Protocols, transfers
from detguard.evaluation.views import SHOWN_CONFIDENCE, Batch, Clean, Subject, View
from detguard.photos import read_photo
from detguard.reports.marks import marked, of_labels
from detguard.reports.page import MOST_PHOTOS, Item, Pair, pair, panel, render_page, short_names
from detguard.reports.plots import gate_plot, plots
from detguard.reports.tables import Table, counts

# A photo as a view shows it.
CHANGED = "changed"
ALL_KINDS = f"all {len(PUBLISHED)}"
# Rows over which a table is shown by its title alone.
FOLDED = 14
# Why the worst per photo is not the least.
ABOVE = (
    f"The {WORST_PER_PHOTO} is chosen by confidence x precision, since a photo has no AP of its own: over all photos, "
    "and on few above all, it may leave a higher AP than one attack alone."
)
GALLERY = (
    f"F1 and boxes: confidence {SHOWN_CONFIDENCE}, IoU .50. A candidate counts for every class over that confidence, "
    "as in COCO's AP; where a detector's users see its surest class only (detguard detect), what is found here may be "
    "hidden from them by a surer wrong class."
)
# COCO's numbers in words.
NUMBERS: dict[Stat, str] = {
    "AP": "AP, IoU .50 to .95",
    "AP50": "AP50, IoU .50",
    "AP75": "AP75, IoU .75",
    "APs": "AP, small: under 32 x 32 px",
    "APm": "AP, medium",
    "APl": "AP, large: over 96 x 96 px",
    "AR1": "recall, 1 detection a photo",
    "AR10": "recall, 10 detections a photo",
    "AR100": "recall, 100 detections a photo",
    "ARs": "recall, small",
    "ARm": "recall, medium",
    "ARl": "recall, large",
}


def number(value: float | None, digits: int = 3) -> str:
    """Like ".444", as the field prints AP; "-" of nothing."""
    if value is None:
        return "-"
    shown = f"{value:.{digits}f}"
    return shown.replace("0.", ".", 1) if abs(value) < 1 else shown


def apart(value: float | None, limit: float | None) -> tuple[str, str]:
    """Two figures with as many digits as tell them apart, three or more: what misses a limit does not look like it."""
    if value is None or limit is None or value == limit:
        return number(value), number(limit)
    digits = next(n for n in range(3, 18) if f"{value:.{n}f}" != f"{limit:.{n}f}" or n == 17)
    return number(value, digits), number(limit, digits)


def with_error(stats: Figure | None) -> str:
    """AP and half of its 95 % interval, like ".444 ±.031"; AP alone where there were too few photos for one.

    stats: None of nothing.
    """
    if stats is None:
        return number(None)
    error = stats.get("AP_error")
    return number(stats["AP"]) + (f" ±{number(error)}" if error is not None and stats["AP"] is not None else "")


# What a check is called by whether it passed; None: neither.
JUDGED = {True: "passed", False: "FAILED", None: "too little to judge"}


def _judged(found: ModelMetrics, *, passed: bool | None) -> list[str]:
    return [name for name, check in found["checks"].items() if check["passed"] is passed]


def _checks(found: ModelMetrics) -> str:
    """Which checks did not pass, and what they were made on: of few photos and steps "passed" says little."""
    on = found.get("checked")
    made = f" (photos: {on['photos']}, steps: {on['steps']}, queries: {on['queries']})" if on else ""
    left = [(word, _judged(found, passed=how)) for word, how in (("failed", False), (JUDGED[None], None))]
    return ("; ".join(f"{word}: {', '.join(names)}" for word, names in left if names) or JUDGED[True]) + made


def corrupted_by(found: ModelMetrics) -> str:
    """By what the mean is over: of a selection its kinds, since that is not what others call mPC."""
    kinds = found["corruptions"]["kinds"]
    severities = list(next(iter(kinds.values()))["severities"])
    named = ", ".join(kind.replace("_", " ") for kind in kinds)
    by = named if len(kinds) < 4 else f"{len(kinds)} of {len(PUBLISHED)}"
    if len(severities) < len(SEVERITIES):
        return f"{by} at severity {','.join(severities)}"
    return ALL_KINDS if len(kinds) == len(PUBLISHED) else by


def _corrupted(found: ModelMetrics) -> str:
    return "corrupted" if (by := corrupted_by(found)) == ALL_KINDS else f"corrupted ({by})"


def _black_box(found: ModelMetrics) -> str:
    return f"by {found['blackbox']['queries']} black-box queries at {found['blackbox']['eps']}/255"


def strength(eps: int, spent: Spent) -> str:
    """How an attack was made; of what has no gradient, by the Square attack."""
    how = counts(spent["steps"], "step") if "steps" in spent else f"Square, {spent['queries']} queries"
    starts = f", {spent['restarts']} starts" if spent.get("restarts", 1) > 1 else ""
    return f"eps {eps}, {how}{starts}"


def alone(names: Collection[str]) -> str:
    """Like " by class, rank alone" of white-box attacks that are fewer than those made by default; else "".

    names: of all attacks that were made, those that know of an ensemble's gate among them.
    """
    made = [name for name in ATTACKS if name in names]
    if not made or set(defaults.Evaluate.attacks) <= set(made):
        return ""
    return f" by {', '.join(made)} alone" + (" and what is made for ensembles" if set(names) - set(made) else "")


def _by(found: ModelMetrics) -> str:
    attack = found["attack"]
    return alone({run.rpartition("-")[0] for run in attack["budgets"][str(attack["eps"])]["attacks"] if run != WORST})


def _transferred(found: ModelMetrics) -> str:
    return f"by transferred attacks at {found['transfer']['eps']}/255{alone(found['transfer']['attacks'])}"


def _nms(iou: float | None) -> str:
    return "no NMS after the model" if iou is None else f"multi-label NMS at IoU {number(iou)}"


def _patched(m: ModelMetrics) -> str:
    shown = m["patch"]["shown"]
    others = [f"{number(one['AP'])} {label}" for label, one in shown.items() if one and label in ("clean", GREY)]
    return f"for {m['patch']['class']} with the patch ({', '.join(others)})"


# Of a table that shows figures or words of each model: protocol, title, and what to show.
COLUMNS: tuple[tuple[str, str, Callable[[ModelMetrics], str]], ...] = (
    ("clean", "clean AP", lambda m: with_error(m["clean"])),
    ("clean", "clean AP50", lambda m: number(m["clean"]["AP50"])),
    ("corruptions", "corruptions", corrupted_by),
    ("corruptions", "mPC", lambda m: with_error(m["corruptions"])),
    ("corruptions", "rPC", lambda m: number(m["corruptions"]["rPC"])),
    ("corruption_file", "own corruption AP", lambda m: with_error(m["corruption_file"])),
    ("attack", "attack", lambda m: strength(m["attack"]["eps"], m["attack"]) + _by(m)),
    ("attack", "attacked AP", lambda m: with_error(m["attack"])),
    ("attack", "attacked AP50", lambda m: number(m["attack"]["AP50"])),
    ("transfer", "transfer", lambda m: f"eps {m['transfer']['eps']}{alone(m['transfer']['attacks'])}"),
    ("transfer", "transfer AP", lambda m: with_error(m["transfer"])),
    ("blackbox", "black box", lambda m: strength(m["blackbox"]["eps"], {"queries": m["blackbox"]["queries"]})),
    ("blackbox", "black box AP", lambda m: with_error(m["blackbox"])),
    ("patch", "patch on", lambda m: str(m["patch"]["class"])),
    ("patch", "patch AP", lambda m: with_error(m["patch"]["shown"]["patch"])),
    ("universal", "universal AP", lambda m: with_error(m["universal"]["shown"]["universal"])),
    ("checks", "checks", _checks),
)
# The parts of a verdict: protocol, and words behind its AP.
VERDICT: tuple[tuple[Compared, Callable[[ModelMetrics], str]], ...] = (
    ("clean", lambda m: "clean"),
    ("corruptions", _corrupted),
    ("corruption_file", lambda m: "corrupted by your own"),
    ("attack", lambda m: f"attacked at {m['attack']['eps']}/255{_by(m)}"),
    ("transfer", _transferred),
    ("blackbox", _black_box),
    ("patch", _patched),
    ("universal", lambda m: "by the universal perturbation"),
)
# What figures are of; in the title of a table whose models have it in common.
SETTINGS: tuple[tuple[str, str, Callable[[ModelMetrics], str]], ...] = (
    ("setting", "data", lambda m: str(m["setting"]["data"])),
    ("setting", "photos", lambda m: counts(m["setting"]["photos"], "photo")),
    ("setting", "classes", lambda m: counts(m["setting"]["classes"], "class")),
    ("setting", "frame", lambda m: f"{m['setting']['imgsz']} px"),
    ("setting", "NMS", lambda m: _nms(m["setting"]["nms"])),
    ("setting", "seed", lambda m: f"seed {m['setting']['seed']}"),
    ("setting", "version", lambda m: f"detguard {m['setting']['version']}"),
)


def headline(metrics: Metrics, title: str) -> Table:
    """One row per model, with what was measured of any of them; what all have in common stands above."""

    def values(protocol: str, show: Callable[[ModelMetrics], str]) -> set[str]:
        return {show(m) if protocol in m else "-" for m in metrics.values()}

    common = [values(protocol, show) for protocol, _, show in SETTINGS]
    title = ", ".join([title, *(value for found in common if len(found) == 1 for value in found if value != "-")])
    columns = [c for c in COLUMNS if any(c[0] in found for found in metrics.values())]
    columns += [c for c, found in zip(SETTINGS, common, strict=True) if len(found) > 1]
    rows = [
        [name, *(show(m) if protocol in m else "-" for protocol, _, show in columns)] for name, m in metrics.items()
    ]
    note = "AP is COCO's AP (.50:.95)."
    if any("±" in cell for row in rows for cell in row):
        note += f" ±: half of the 95 % interval, by {RESAMPLES} draws of as many of the photos, with replacement."
    elif any("AP_error" in m.get("clean", {}) for m in metrics.values()):
        note += f" Fewer than {FEWEST} photos: too few to say how far AP may be off."
    if lost := max((m["setting"]["left_out"] for m in metrics.values()), default=0):
        note += f" {lost} more photos of the data could not be read, or not be shown, and are left out."
    for name, m in metrics.items():
        if unknown := m["setting"]["unknown_classes"]:
            boxes = f"{counts(sum(unknown.values()), 'box')} of {counts(len(unknown), 'class')}"
            note += f" Left out for {name}: {boxes} that it does not know."
    for name, m in metrics.items():
        if inside := m["setting"].get("nms_inside"):
            note += f" {name}: its NMS is inside; its AP misses what is less sure than {number(inside)} or so."
    if any("attack" in m for m in metrics.values()):
        note += (
            f" Attacked: the least of each attack alone and of the {WORST_PER_PHOTO}, of AP50 that of its own; eps in "
            f"levels of 255."
        )
    if blind := [name for name, m in metrics.items() if "queries" in m.get("attack", {})]:
        note += f" {', '.join(blind)}: no gradient, so that no white-box attack is made; Square goes by scores alone."
    if any("corruptions" in m for m in metrics.values()):
        note += " mPC: mean AP over the corruptions; rPC: its share of the clean AP."
    return Table(title, ["model", *(name for _, name, _ in columns)], rows, note)


def tables(metrics: Metrics) -> list[Table]:
    """All tables of a run, the headline first."""
    return [headline(metrics, "Result"), *(table for made in TABLES for table in made(metrics))]


def _attacks(metrics: Metrics) -> Iterator[Table]:
    attacked = {name: m["attack"] for name, m in metrics.items() if "attack" in m}
    if not attacked:
        return
    budgets = [(name, eps, b["attacks"]) for name, a in attacked.items() for eps, b in a["budgets"].items()]
    runs = list(dict.fromkeys(run for _, _, attacks in budgets for run in attacks))
    rows = [[attack_name(run), *(with_error(attacks.get(run)) for _, _, attacks in budgets)] for run in runs]
    note = f"AP, on 8-bit photos, seed {next(iter(attacked.values()))['seed']}. {ABOVE}"
    if white := next((a for a in attacked.values() if "steps" in a), None):
        note += f" PGD with {counts(white['steps'], 'step')}, {counts(white['restarts'], 'start')}."
    if any(":" in run for run in runs):
        note += (
            " Of ensembles: route:I forces expert I, rank:I goes against the order of what it finds, gate:W adds W "
            "times the gate's logits to the loss, and lead:I:W those that lead photos to expert I, which was grown."
        )
    if black := next((a for a in attacked.values() if "queries" in a), None):
        note += f" Square, of detectors without a gradient: {black['queries']} queries of scores."
    title = "White-box attacks" if white else "Attacks without a gradient"
    yield Table(title, ["attack", *(f"{name}, eps {eps}" for name, eps, _ in budgets)], rows, note)


def _corruptions(metrics: Metrics) -> Iterator[Table]:
    corrupted = {name: m["corruptions"]["kinds"] for name, m in metrics.items() if "corruptions" in m}
    if not corrupted:
        return
    first = next(iter(corrupted.values()))
    rows = [[kind.replace("_", " "), *(with_error(k[kind]) for k in corrupted.values())] for kind in first]
    severities = list(next(iter(first.values()))["severities"])
    note = f"AP, mean over severities {', '.join(severities)}"
    if len(severities) == 1:
        note = f"AP at severity {severities[0]}"
    note += ", as published, by imagecorruptions-imaug."
    yield Table("Corruptions", ["corruption", *corrupted], rows, note, folded=len(rows) > FOLDED)


def _patches(metrics: Metrics) -> Iterator[Table]:
    patched = {name: m["patch"] for name, m in metrics.items() if "patch" in m}
    if not patched:
        return
    first = next(iter(patched.values()))
    note = (
        f"On each labelled {first['class']}, with a side of {first['size']:g} of the root of its box's area; grey and "
        f"random tell what covering as much of it does alone. No ±: under {FEWEST} photos have an object of it."
    )
    yield _pictures(f"Patch: AP of {first['class']}", {name: p["shown"] for name, p in patched.items()}, note)


def _perturbations(metrics: Metrics) -> Iterator[Table]:
    perturbed = {name: m["universal"] for name, m in metrics.items() if "universal" in m}
    if not perturbed:
        return
    first = next(iter(perturbed.values()))
    note = f"One change for all photos, of at most {counts(first['eps'], 'level')}; random: signs of that size."
    yield _pictures("Universal perturbation", {name: p["shown"] for name, p in perturbed.items()}, note)


def _pictures(title: str, shown: Mapping[str, Mapping[str, Figure | None]], note: str) -> Table:
    """AP and AP50 of each model, in columns, by the kind of picture that it was shown."""
    figures = [[of[kind] for of in shown.values()] for kind in next(iter(shown.values()))]
    rows = [
        [kind, *(cell for figure in row for cell in (with_error(figure), number(figure and figure["AP50"])))]
        for kind, row in zip(next(iter(shown.values())), figures, strict=True)
    ]
    return Table(title, ["picture", *(f"{name} {stat}" for name in shown for stat in ("AP", "AP50"))], rows, note)


def _gates(metrics: Metrics) -> Iterator[Table]:
    for name, m in metrics.items():
        if "gate" in m:
            shares = gate_by_kind(m["gate"]["shares"])
            rows = [[kind, *(f"{w:.2f}" for w in weights)] for kind, weights in shares.items()]
            note = "Mean weight of each expert by the gate. Equal rows mean that the gate does not distinguish them."
            yield Table(f"Expert weights: {name}", ["photos", *m["gate"]["experts"]], rows, note)


def _checked(metrics: Metrics) -> Iterator[Table]:
    rows = [
        [
            f"{name}: {check}",
            JUDGED[c["passed"]],
            *apart(c["value"], c["limit"]),
            c["what"] if c["passed"] else f"{c['what']}: {c['meaning']}. What to do: {c['remedy']}.",
        ]
        for name, m in metrics.items()
        for check, c in m.get("checks", {}).items()
    ]
    if rows:
        head = ["check", "result", "value", "at most", "what"]
        yield Table(
            "Checks of the attack itself", head, rows, f"On the first photos with labelled objects, at most {PHOTOS}."
        )


# Of each, the tables that metrics allow.
TABLES = (_attacks, _corruptions, _patches, _perturbations, _gates, _checked)


def gate_by_kind(shares: dict[str, list[float]]) -> dict[str, list[float]]:
    """The gate's weights by kind of photos: severities of one corruption together, of attacks the worst per photo."""
    kinds: dict[str, list[list[float]]] = {}
    for label, weights in shares.items():
        if label.startswith("attack") and not label.endswith(WORST):
            continue
        kind = re.fullmatch(rf"({'|'.join(PUBLISHED)}) \d", label)
        kinds.setdefault(kind[1].replace("_", " ") if kind else label, []).append(weights)
    return {kind: [sum(w) / len(w) for w in zip(*rows, strict=True)] for kind, rows in kinds.items()}


def verdict(metrics: Metrics) -> str:
    """One sentence: the AP of each model as it was measured, and checks that failed."""
    sentences = []
    for name, found in metrics.items():
        figures = [f"{number(ap_of(found, key))} {words(found)}" for key, words in VERDICT if key in found]
        parts = [f"AP {', '.join(figures)}"] if figures else []
        if "checks" in found:
            failed, unjudged = _judged(found, passed=False), _judged(found, passed=None)
            told = [f"FAILED ({', '.join(failed)})"] if failed else []
            told += [f"have too little to judge by ({', '.join(unjudged)})"] if unjudged else []
            if told or not figures:
                parts.append(f"the attack's own checks {' and '.join(told) or 'hold'}")
        photos = f" ({counts(found['setting']['photos'], 'photo')})" if figures else ""
        sentences.append(f"{name}: {', '.join(parts)}{photos}" if parts else f"{name}: nothing was measured")
    return "; ".join(sentences)


def numbers_table(metrics: Metrics) -> Table:
    """COCO's 12 numbers of the clean photos, and of the attack of least AP where one was measured."""
    columns: dict[str, Stats] = {}
    for name, found in metrics.items():
        label = f"{name}, " if len(metrics) > 1 else ""
        if "clean" in found:
            columns[f"{label}clean"] = found["clean"]
        if "attack" in found:
            eps, by = found["attack"]["eps"], found["attack"]["by"]
            columns[f"{label}eps {eps}, {attack_name(by)}"] = found["attack"]["budgets"][str(eps)]["attacks"][by]
    rows = [[words, *(number(stats.get(stat)) for stats in columns.values())] for stat, words in NUMBERS.items()]
    note = (
        "- where there are no objects of that size. Sizes are the labels' own areas (of COCO those of masks), else of "
        "boxes, in the photo's own pixels."
    )
    if any("attack" in found for found in metrics.values()):
        note += " Attacked: by the attack of least AP, the headline's; another one may leave less AP50."
    return Table("COCO's 12 numbers: by size, and recall", ["", *columns], rows if columns else [], note)


def classes_table(evaluation: Evaluation, eps: int) -> Table:
    """AP of each class, most objects first, on the clean photos and under the attack of least AP at `eps`."""
    by = {name: m["attack"]["by"] for name, m in evaluation.metrics.items() if "attack" in m}
    named = {attack_name(run) for run in by.values()}
    attacked = f"eps {eps}, {named.pop() if len(named) == 1 else 'least'}"
    shown = ("clean", attacked)
    found: dict[tuple[str, str], dict[str, OfClass]] = {}
    for model, label, name, row in evaluation.classes:
        view = attacked if label == f"attack eps {eps} {by.get(model)}" else label
        if view in shown:
            found.setdefault((name, model), {})[view] = row
    views = [view for view in shown if any(view in rows for rows in found.values())]
    several = len(evaluation.metrics) > 1
    head = ["class", *(["model"] if several else []), "objects"]
    for view in views:
        head += [f"AP {view}", *(["AP50 clean"] if view == "clean" else [])]
    rows = []
    for (name, model), by_view in sorted(found.items(), key=lambda item: -_objects(item[1])):
        cells = []
        for view in views:
            of_view = by_view.get(view)
            cells += [with_error(of_view), *([number(of_view and of_view["AP50"])] if view == "clean" else [])]
        rows.append([name, *([model] if several else []), str(_objects(by_view)), *cells])
    note = f"Classes without labelled objects are left out. No ±: under {FEWEST} photos have an object of the class."
    if by:
        note += " Attacked: by the attack of least AP, the headline's"
        note += f" ({', '.join(f'{name}: {attack_name(run)}' for name, run in by.items())})." if several else "."
    return Table(f"AP of {len({name for name, _ in found})} classes", head, rows, note, folded=len(rows) > FOLDED)


def _objects(by_view: dict[str, OfClass]) -> int:
    return next(iter(by_view.values()))["objects"]


def evaluation_page(
    subjects: Sequence[Subject], evaluation: Evaluation, wanted: Protocols, command: Sequence[str]
) -> bytes:
    """Render report.html of an evaluate run."""
    data, metrics = subjects[0].dataset, evaluation.metrics
    views = [_shown_view(subject, subjects, wanted) for subject in subjects]
    items = _gallery(subjects, views, MOST_PHOTOS // len(subjects))
    title = f"Evaluation of {', '.join(s.name for s in subjects)}"
    made = plots(metrics, evaluation.curves)
    for name, found in metrics.items():
        if "gate" in found:
            made[f"Expert weights: {name}"] = gate_plot(found["gate"]["experts"], gate_by_kind(found["gate"]["shares"]))
    first, *others = tables(metrics)
    more = [table for table in (numbers_table(metrics), classes_table(evaluation, wanted.eps[-1])) if table.rows]
    left_out = len(data.files) - len(items)
    shown = f"{data.name}, {counts(len(data.files), 'photo')}"
    return render_page(title, verdict(metrics), shown, command, [first, *more, *others], made, items, left_out, GALLERY)


def _shown_view(subject: Subject, subjects: Sequence[Subject], wanted: Protocols) -> View | None:
    """What the gallery shows beside the clean photos, if anything."""
    if wanted.patch is not None:
        return wanted.patches(subject.detector)[-1]
    if wanted.universal is not None:
        return wanted.perturbations[-1]
    if "attack" in wanted.protocols:
        return wanted.attack_sets(subject.detector)[-1]
    if "transfer" in wanted.protocols:
        return transfers(subject, subjects, wanted)[-1]
    return wanted.corrupted[-1] if "corruptions" in wanted.protocols else None


@dataclass(frozen=True)
class Seen:
    """What a detector finds on one photo: clean, and as a view shows it; None: no view but the clean one."""

    objects: Detections
    clean: Detections
    after: Detections | None

    @property
    def scores(self) -> tuple[float, float]:
        """F1 before and after; without a view 1 and what it is, so that the worst photos are those that lose most."""
        clean = f1(self.objects, self.clean)
        return (1.0, clean) if self.after is None else (clean, f1(self.objects, self.after))

    @property
    def loss(self) -> float:
        """How much F1 an attacked or corrupted photo has lost against the clean one."""
        return self.scores[0] - self.scores[1]


def _seen(subject: Subject, view: View | None, image: int) -> Seen:
    scored = list(subject.category_ids)
    clean = Clean().load(subject, image).above(SHOWN_CONFIDENCE).of(scored)
    after = None
    if view is not None:
        after = view.load(subject, image, WORST if WORST in view.parts else "").above(SHOWN_CONFIDENCE).of(scored)
    objects, crowds = subject.objects(image), subject.dataset.objects(image, subject.category_ids, crowds=True)
    return Seen(objects, outside(crowds, objects, clean), None if after is None else outside(crowds, objects, after))


def _gallery(subjects: Sequence[Subject], views: Sequence[View | None], count: int) -> list[Item]:
    """The photos on which the detectors lose most, one detector under the other."""
    pairs = list(zip(subjects, views, strict=True))
    files = subjects[0].dataset.files
    loss = {image: max(_seen(subject, view, image).loss for subject, view in pairs) for image in files}
    objects = {image: len(subjects[0].objects(image)) for image in files}
    ranked = sorted(files, key=lambda image: (loss[image], objects[image]), reverse=True)
    shown = ranked[:count]
    titles = short_names([files[image] for image in shown])
    return [_item(pairs, image, title) for image, title in zip(shown, titles, strict=True)]


def _item(pairs: Sequence[tuple[Subject, View | None]], image: int, title: str) -> Item:
    file = pairs[0][0].dataset.files[image]
    photo, made, worst, outcomes = read_photo(file), list[Pair](), None, dict[str, str]()
    for subject, view in pairs:
        seen, names = _seen(subject, view, image), subject.detector.class_names
        outcomes[subject.name] = _outcome_of(seen)
        if worst is None or seen.loss > worst.loss:
            worst = seen
        before = panel(f"clean: F1 {f1(seen.objects, seen.clean):.2f}", photo, marked(seen.objects, seen.clean, names))
        weighed = ""
        if experts := subject.detector.experts:
            heaviest = [_heaviest(found, experts) for found in (seen.clean, seen.after) if found is not None]
            weighed = f"most weight: {', then '.join(heaviest)}"
        name = "; ".join(part for part in (subject.name if len(pairs) > 1 else "", weighed) if part)
        if view is None or seen.after is None:
            there = panel(f"labelled: {_count(seen.objects)}", photo, of_labels(seen.objects, names))
            made.append(pair(there, before, name=name))
            continue
        shown = view.show(Batch(subject, [image]))[0]
        right = marked(seen.objects, seen.after, names)
        after = panel(f"{CHANGED}: F1 {f1(seen.objects, seen.after):.2f}", shown, right)
        small = isinstance(view, AttackSet) or (isinstance(view, Changed) and not view.targets)
        made.append(pair(before, after, (photo, shown) if small else None, name))
    assert worst is not None
    outcome = _outcome_of(worst)
    if len(pairs) > 1:
        outcome += f" ({', '.join(name for name, one in outcomes.items() if one == outcome)})"
    how = "".join(f"; {CHANGED}: {view.name}" for view in {view.name: view for _, view in pairs if view}.values())
    return Item(title, outcome, f"{_count(worst.objects)} labelled{how}", made)


def _outcome_of(seen: Seen) -> str:
    """What became of a photo before one detector, in a few words to filter by."""
    if len(seen.objects):
        return _quality(seen.scores[1]) if seen.after is None else _outcome(*seen.scores)
    return "nothing to find" if seen.scores[1] else "false alarms only"  # where F1 is all or nothing


def _heaviest(found: Detections, names: Sequence[str]) -> str:
    """The expert with the largest weight on a photo, like "normal .93"."""
    if found.experts is None:
        return "-"
    best = int(found.experts.argmax())
    return f"{names[best]} {number(float(found.experts[best]))}"


def _count(objects: Detections) -> str:
    return counts(len(objects), "object")


def _quality(score: float) -> str:
    return "all right" if score == 1 else "partly right" if score else "nothing right"


def _outcome(before: float, after: float) -> str:
    """What its F1 at IoU .50 and confidence .25 says of a photo."""
    if before == 0:
        return "wrong before"
    if after == 0:
        return "nothing right left"
    if after < before:
        return "worse" if after < 0.9 * before else "a little worse"
    return "unharmed"
