"""What `evaluate` and `compare` show: tables of metrics, and the page of a run."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from detguard.detections import Detections
from detguard.evaluation.attacks import WORST
from detguard.evaluation.checks import PHOTOS
from detguard.evaluation.coco import f1
from detguard.evaluation.run import Evaluation, Protocols
from detguard.evaluation.views import SHOWN_CONFIDENCE, Batch, Clean, Subject, View
from detguard.photos import read_photo
from detguard.reports.page import MOST_PHOTOS, Item, Table, gallery_item, render_page
from detguard.reports.plots import gate_plot, plots

Metrics = dict[str, dict[str, Any]]


def number(value: float | None) -> str:
    """Like ".444", as the field prints AP; "-" of nothing."""
    return "-" if value is None else f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def _checks(found: dict[str, Any]) -> str:
    failed = [name for name, check in found["checks"].items() if not check["passed"]]
    return f"failed: {', '.join(failed)}" if failed else "passed"


def _strength(found: dict[str, Any]) -> str:
    """How an attack was made; of what has no gradient, by the Square attack."""
    attack = found["attack"]
    spent = f"{attack['steps']} steps" if "steps" in attack else f"Square, {attack['queries']} queries"
    return f"eps {attack['eps']}, {spent}"


def _of_class(found: dict[str, Any], kind: str, stat: str) -> float | None:
    """AP or AP50 of the class that wears a patch, with one kind of patch; None: no such object is labelled."""
    row: dict[str, float | None] | None = found["patch"]["shown"][kind]
    return row[stat] if row else None


COLUMNS: tuple[tuple[str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("clean", "clean AP", lambda m: number(m["clean"]["AP"])),
    ("clean", "clean AP50", lambda m: number(m["clean"]["AP50"])),
    ("corruptions", "mPC", lambda m: number(m["corruptions"]["mPC"])),
    ("corruptions", "rPC", lambda m: number(m["corruptions"]["rPC"])),
    ("corruption_file", "own corruption AP", lambda m: number(m["corruption_file"]["AP"])),
    ("attack", "attack", _strength),
    ("attack", "attacked AP", lambda m: number(m["attack"]["AP"])),
    ("attack", "attacked AP50", lambda m: number(m["attack"]["AP50"])),
    ("transfer", "transfer AP", lambda m: number(m["transfer"]["AP"])),
    ("blackbox", "black box AP", lambda m: number(m["blackbox"]["AP"])),
    ("patch", "patch AP", lambda m: f"{number(_of_class(m, 'patch', 'AP'))} ({m['patch']['class']})"),
    ("universal", "universal AP", lambda m: f"{number(m['universal']['shown']['universal']['AP'])}"),
    ("checks", "checks", _checks),
)
# What figures are of; in the title of a table whose models have it in common.
SETTINGS: tuple[tuple[str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("setting", "data", lambda m: str(m["setting"]["data"])),
    ("clean", "photos", lambda m: f"{m['clean']['photos']} photos"),
    ("clean", "classes", lambda m: f"{m['clean']['classes']} classes"),
    ("setting", "frame", lambda m: f"{m['setting']['imgsz']} px"),
)


def headline(metrics: Metrics, title: str) -> Table:
    """One row per model, with what was measured of any of them; what all have in common is told above."""

    def values(protocol: str, show: Callable[[dict[str, Any]], str]) -> set[str]:
        return {show(m) if protocol in m else "-" for m in metrics.values()}

    common = [values(protocol, show) for protocol, _, show in SETTINGS]
    title = ", ".join([title, *(value for found in common if len(found) == 1 for value in found if value != "-")])
    columns = [c for c in COLUMNS if any(c[0] in found for found in metrics.values())]
    columns += [c for c, found in zip(SETTINGS, common, strict=True) if len(found) > 1]
    rows = [
        [name, *(show(m) if protocol in m else "-" for protocol, _, show in columns)] for name, m in metrics.items()
    ]
    note = "AP is COCO's AP (.50:.95)."
    if any("attack" in m for m in metrics.values()):
        note += " Attacked: the least of the worst case per photo and of each attack alone; eps in levels of 255."
    if blind := [name for name, m in metrics.items() if "queries" in m.get("attack", {})]:
        note += f" {', '.join(blind)}: no gradient, so that no white-box attack is made; Square goes by scores alone."
    if any("corruptions" in m for m in metrics.values()):
        note += " mPC: mean AP over the corruptions; rPC: its share of the clean AP."
    return Table(title, ["model", *(name for _, name, _ in columns)], rows, note)


def tables(metrics: Metrics) -> list[Table]:
    """All tables of a run, the headline first."""
    made = [headline(metrics, "Result")]
    attacked = {name: m["attack"] for name, m in metrics.items() if "attack" in m}
    if attacked:
        budgets = [(name, eps, b) for name, a in attacked.items() for eps, b in a["budgets"].items()]
        runs = list(dict.fromkeys(run for _, _, b in budgets for run in b["attacks"]))
        rows = [
            ["worst case" if run == WORST else run]
            + [number(b["attacks"][run]["AP"]) if run in b["attacks"] else "-" for _, _, b in budgets]
            for run in runs
        ]
        first = next(iter(attacked.values()))
        note = f"AP, on 8-bit photos, seed {first['seed']}."
        if white := next((a for a in attacked.values() if "steps" in a), None):
            note += f" PGD with {white['steps']} steps, {white['restarts']} start(s)."
        if black := next((a for a in attacked.values() if "queries" in a), None):
            note += f" Square, of detectors without a gradient: {black['queries']} queries of scores."
        title = "White-box attacks" if white else "Attacks without a gradient"
        heads = [f"{name}, eps {eps}" for name, eps, _ in budgets]
        made.append(Table(title, ["attack", *heads], rows, note))
    corrupted = {name: m["corruptions"]["kinds"] for name, m in metrics.items() if "corruptions" in m}
    if corrupted:
        first_kinds = next(iter(corrupted.values()))
        rows = [
            [
                kind.replace("_", " "),
                *(number(k[kind]["AP"]) for k in corrupted.values()),
                row["made by"],
                row["differs"],
            ]
            for kind, row in first_kinds.items()
        ]
        head = ["corruption", *corrupted, "made by", "differs from ImageNet-C"]
        severities = list(next(iter(first_kinds.values()))["severities"])
        note = (
            f"AP, mean over severities {', '.join(severities)}."
            if len(severities) > 1
            else f"AP at severity {severities[0]}."
        )
        made.append(Table("Corruptions", head, rows, note))
    patched = {name: m for name, m in metrics.items() if "patch" in m}
    if patched:
        first_patch = next(iter(patched.values()))["patch"]
        kinds = list(first_patch["shown"])
        rows = [
            [name, *(number(_of_class(m, kind, stat)) for stat in ("AP", "AP50") for kind in kinds)]
            for name, m in patched.items()
        ]
        head = ["model", *(f"{kind} {stat}" for stat in ("AP", "AP50") for kind in kinds)]
        note = (
            f"On each labelled {first_patch['class']}, with a side of {first_patch['size']:g} of the root of its box's "
            "area; grey and random tell what covering as much of it does alone."
        )
        made.append(Table(f"Patch: AP of {first_patch['class']}", head, rows, note))
    perturbed = {name: m["universal"] for name, m in metrics.items() if "universal" in m}
    if perturbed:
        first_universal = next(iter(perturbed.values()))
        rows = [
            [name, *(number(row[stat]) for stat in ("AP", "AP50") for row in m["shown"].values())]
            for name, m in perturbed.items()
        ]
        head = ["model", *(f"{kind} {stat}" for stat in ("AP", "AP50") for kind in first_universal["shown"])]
        note = f"One change for all photos, of at most {first_universal['eps']} levels; random: signs of that size."
        made.append(Table("Universal perturbation", head, rows, note))
    for name, m in metrics.items():
        if "gate" in m:
            shares = gate_by_kind(m["gate"]["shares"])
            rows = [[kind, *(f"{w:.2f}" for w in weights)] for kind, weights in shares.items()]
            note = "Mean weight of each expert by the gate. Equal rows mean that the gate tells nothing apart."
            made.append(Table(f"Which expert spoke: {name}", ["photos", *m["gate"]["experts"]], rows, note))
    checked = {name: m["checks"] for name, m in metrics.items() if "checks" in m}
    if checked:
        rows = [
            [
                f"{name}: {check}",
                "passed" if c["passed"] else "FAILED",
                number(c["value"]),
                number(c["limit"]),
                c["what"] if c["passed"] else f"{c['what']}: {c['meaning']}. What to do: {c['remedy']}.",
            ]
            for name, checks in checked.items()
            for check, c in checks.items()
        ]
        head = ["check", "", "value", "at most", "what"]
        made.append(Table("Checks of the attack itself", head, rows, f"On at most the first {PHOTOS} photos."))
    return made


def gate_by_kind(shares: dict[str, list[float]]) -> dict[str, list[float]]:
    """The gate's weights by kind of photos: severities of one corruption together, of attacks the worst case."""
    kinds: dict[str, list[list[float]]] = {}
    for label, weights in shares.items():
        if label.startswith("attack") and not label.endswith(WORST):
            continue
        kinds.setdefault(re.sub(r" \d$", "", label).replace("_", " "), []).append(weights)
    return {kind: [sum(w) / len(w) for w in zip(*rows, strict=True)] for kind, rows in kinds.items()}


def evaluation_page(
    subjects: Sequence[Subject], evaluation: Evaluation, wanted: Protocols, command: Sequence[str]
) -> bytes:
    """report.html of an evaluate run."""
    data = subjects[0].dataset
    each = max(1, MOST_PHOTOS // len(subjects))
    changed = bool(wanted.patch or wanted.universal) or bool(
        {"attack", "transfer", "corruptions"} & set(wanted.protocols)
    )
    sides = ("before", "after") if changed else ("labelled", "found")
    items = [item for subject in subjects for item in _gallery(subject, _shown_view(subject, wanted), each)]
    shown = f"{data.name}, {len(data.files)} photos"
    left_out = sum(max(0, len(s.dataset.files) - each) for s in subjects)
    title = f"Evaluation of {', '.join(s.name for s in subjects)}"
    made = plots(evaluation.metrics, evaluation.curves)
    for name, found in evaluation.metrics.items():
        if "gate" in found:
            made[f"Which expert spoke: {name}"] = gate_plot(
                found["gate"]["experts"], gate_by_kind(found["gate"]["shares"])
            )
    return render_page(title, shown, command, tables(evaluation.metrics), made, items, left_out, sides)


def _shown_view(subject: Subject, wanted: Protocols) -> View | None:
    """What the gallery shows beside the clean photos, if anything."""
    if wanted.patch is not None:
        return wanted.patches(subject.detector)[-1]
    if wanted.universal is not None:
        return wanted.perturbations[-1]
    if {"attack", "transfer"} & set(wanted.protocols):
        return wanted.attack_sets(subject.detector)[-1]
    return wanted.corrupted[-1] if "corruptions" in wanted.protocols else None


def _gallery(subject: Subject, view: View | None, count: int) -> Iterator[Item]:
    names, scored = subject.detector.class_names, list(subject.category_ids)
    for image, file in list(subject.dataset.files.items())[:count]:
        photo, objects = read_photo(file), subject.objects(image)
        clean = Clean().load(subject, image).above(SHOWN_CONFIDENCE).of(scored)
        if view is None:
            before, after, shown = objects, clean, photo
        else:
            before = clean
            after = view.load(subject, image, WORST if WORST in view.parts else "").above(SHOWN_CONFIDENCE).of(scored)
            shown = view.show(Batch(subject, [image]))[0]
        scores = [f1(objects, found) for found in (clean, after)]
        note = f"{view.name}: " if view else ""
        note += f"{_count(objects)} labelled, F1 {scores[0]:.2f}" + (f" to {scores[1]:.2f}" if view else "")
        if subject.detector.experts:
            spoke = [_speaker(found, subject.detector.experts) for found in (clean, after)]
            note += f"; spoke: {spoke[0]}" + (f", then {spoke[1]}" if view else "")
        yield gallery_item(
            f"{subject.name}: {file.name}",
            _outcome(*scores) if view else _quality(scores[1]),
            note,
            photo,
            before.records(names),
            shown,
            after.records(names),
        )


def _speaker(found: Detections, names: Sequence[str]) -> str:
    """The expert with the largest weight on a photo, like "normal .93"."""
    if found.experts is None:
        return "-"
    best = int(found.experts.argmax())
    return f"{names[best]} {number(float(found.experts[best]))}"


def _count(objects: Detections) -> str:
    return f"{len(objects)} object" + ("" if len(objects) == 1 else "s")


def _quality(score: float) -> str:
    return "all right" if score == 1 else "partly right" if score else "nothing right"


def _outcome(before: float, after: float) -> str:
    """What its F1 at IoU .50 and confidence .25 says of a photo."""
    if before == 0:
        return "wrong before"
    if after == 0:
        return "nothing right left"
    return "worse" if after < 0.9 * before else "unharmed"
