"""What `compare` shows: figures of several evaluate runs, and how much each is over the first one's."""

from detguard.evaluation.compare import (
    Compared,
    Difference,
    also_unlike,
    ap_of,
    difference,
    drawn_of,
    same_photos,
    unlike,
)
from detguard.evaluation.metrics import DRAWS, Draws, Metrics
from detguard.reports.evaluation import headline, number
from detguard.reports.page import render_page
from detguard.reports.plots import plots
from detguard.reports.tables import Table

# What is compared, by protocol.
FIGURES: dict[Compared, str] = {
    "clean": "clean AP", "corruptions": "mPC", "corruption_file": "own corruption AP", "attack": "attacked AP",
    "transfer": "transfer AP", "blackbox": "black box AP", "patch": "patch AP", "universal": "universal AP",
}  # fmt: skip
# By model, figure -> how much more it is than the first model's.
Changes = dict[str, dict[str, Difference]]


def differences(metrics: Metrics, draws: Draws) -> tuple[Changes, list[str]]:
    """Each model's figures less those of the first, and what keeps them from being compared.

    draws: of each model, by protocol, its AP in each draw of the photos.
    """
    (name, first), *others = metrics.items()
    changes: Changes = {}
    warnings = []
    for other, m in others:
        if not same_photos(first, m):
            counts = f"{m['setting']['photos']} and {first['setting']['photos']} photos"
            warnings.append(f"{other}: other photos, labels or classes than {name} ({counts}); not compared with it")
            continue
        changes[other] = {}
        for protocol, figure in FIGURES.items():
            if protocol not in m or protocol not in first:
                continue
            before, after = ap_of(first, protocol), ap_of(m, protocol)
            left_out = unlike(first, m, protocol)
            if not all(protocol in draws[one] for one in (name, other)):
                left_out.append(f"not in every {DRAWS}; write it anew by `detguard evaluate --resume RUN`")
            if before is None or after is None:
                continue
            if left_out:
                warnings.append(f"{other}: {figure} not compared with {name}: {'; '.join(left_out)}")
                continue
            drawn = (draws[name][protocol], draws[other][protocol])
            changes[other][figure] = difference(before, after, drawn, drawn_of(first, protocol))
        if also := also_unlike(first, m):
            warnings.append(f"{other}: compared with {name} all the same: {'; '.join(also)}")
    return changes, warnings


def comparison_tables(metrics: Metrics, changes: Changes) -> list[Table]:
    """A row per figure, a column per model; then how much more it is than the first one's."""
    made = [headline(metrics, "Comparison").turned]
    figures = [figure for figure in FIGURES.values() if any(figure in one for one in changes.values())]
    if figures:
        rows = [
            [figure, *(difference_cell(found[figure]) if figure in found else "-" for found in changes.values())]
            for figure in figures
        ]
        note = "With half of the 95 % interval, by the same draws of the same photos; noise: there may be none."
        made.append(Table(f"Difference to {next(iter(metrics))}", ["", *changes], rows, note))
    return made


def difference_cell(found: Difference) -> str:
    """Like "-.102 ±.031", or "+.012 ±.031 noise"."""
    value = f"{found.value:+.3f}".replace("0.", ".", 1)
    if found.error is None:
        return f"{value}, too few photos to tell"
    return f"{value} ±{number(found.error)}{' noise' if abs(found.value) <= found.error else ''}"


def verdict(metrics: Metrics, changes: Changes) -> str:
    """One sentence: what each model has gained or lost against the first."""
    first = _called(next(iter(metrics)))
    sentences = [
        f"{_called(name)} has {', '.join(f'{figure} {difference_cell(one)}' for figure, one in found.items())}"
        for name, found in changes.items()
        if found
    ]
    return f"Against {first}, {'; '.join(sentences)}" if sentences else f"{first}: nothing to compare with"


def _called(name: str) -> str:
    """A model as it is called in a sentence; name: after its run, as "001: detguard-n"."""
    run, _, model = name.rpartition(": ")
    return f"{model} ({run})" if run else model


def comparison_page(metrics: Metrics, changes: Changes, warnings: list[str], command: list[str]) -> bytes:
    """The comparison as a page of its own."""
    title = f"Comparison of {', '.join(metrics)}"
    made, left_out = comparison_tables(metrics, changes), [[line] for line in warnings]
    if left_out:
        made.append(Table("Left out, or compared with a reservation", ["why"], left_out))
    return render_page(title, verdict(metrics, changes), "", command, made, plots(metrics, {}))
