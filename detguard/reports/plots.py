"""Plots of all kinds of runs, each as the text of one SVG."""

import base64
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any, Literal, TypedDict

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from detguard.detectors.gated import EXPERTS
from detguard.evaluation.metrics import Metrics, ModelMetrics
from detguard.files import printable
from detguard.photos import Photo, encode_png
from detguard.runs import Record

COLOURS = ("#2563eb", "#d9480f", "#0f766e", "#9333ea", "#b8860b", "#be185d")
# Of more models or experts than colours: those after them have another marker, and bars are hatched.
LOOKS = [
    (colour, marker, hatch) for marker, hatch in zip("osD^", ("", "//", "xx", ".."), strict=True) for colour in COLOURS
]
FEW = 20
INK = "#16202c"
# Colours of the page, which change with its light or dark mode.
OF_THE_PAGE = {INK: "currentColor"} | {c: f"var(--plot-{i}, {c})" for i, c in enumerate(COLOURS, 1)}
STYLE: Any = {
    "svg.hashsalt": "detguard",  # the same plot is the same file
    "text.parse_math": False,  # a name with two $ is a name
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "savefig.transparent": True,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}


class Window(TypedDict):
    """Photos of a stream that follow each other: numbers of the first and the last, how many have known objects, means.

    alarms, hints: of those of them that came with one, the numbers.
    """

    first: int
    last: int
    judged: int
    f1: float | None
    AP50: float | None
    confidence: float | None
    entropy: float | None
    alarms: list[int]
    hints: list[int]


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font has not, and names too long for their places
        yield Figure((width, height), layout="constrained")


def _text(name: str) -> str:
    """A name as a label: matplotlib leaves out of legends those that begin with an underscore."""
    return f" {printable(name)}" if name.startswith("_") else printable(name)


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.DOTALL)
    # In attributes alone, where the colours of lines and letters are.
    text = re.sub(r'(?<=[ "])((?:fill|stroke): )(#[0-9a-f]{6})', lambda m: m[1] + OF_THE_PAGE.get(m[2], m[2]), text)
    # As wide as the page allows, up to 1.4 of its own size: what it says in points becomes the limit.
    width = figure.get_figwidth() * 72 * 1.4
    return re.sub(r"<svg [^>]*>", lambda tag: _sized(tag[0], width), text[text.index("<svg") :], count=1)


def _sized(tag: str, width: float) -> str:
    return re.sub(r' (height|width)="[^"]*"', "", tag).replace("<svg ", f'<svg style="--width:{width:.0f}px" ')


def plots(metrics: Metrics, curves: dict[str, dict[str, list[float]]]) -> dict[str, str]:
    """All plots that the metrics allow: title -> SVG."""
    made: dict[str, str] = {}
    if any("corruptions" in m for m in metrics.values()):
        made["AP by corruption and severity"] = corruption_plot(metrics)
    if any("attack" in m for m in metrics.values()):
        made["AP by attack budget"] = budget_plot(metrics)
    if any(len(c) > 1 for c in curves.values()):
        made["Precision and recall at IoU .50, before and after"] = precision_plot(curves)
    return made


def corruption_plot(metrics: Metrics) -> str:
    """One small panel per corruption: AP over severity, a line per model, its clean AP dashed."""
    found = {model: m["corruptions"]["kinds"] for model, m in metrics.items() if "corruptions" in m}
    kinds = list(dict.fromkeys(kind for rows in found.values() for kind in rows))
    columns, lines = min(len(kinds), 5), math.ceil(len(kinds) / 5)
    with _figure(max(2 * columns, 4), 1.9 * lines + 0.7) as figure:
        axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
        for axis in axes[len(kinds) :]:
            axis.set_axis_off()
        for axis, kind in zip(axes, kinds, strict=False):
            for (colour, marker, _), (model, rows) in zip(cycle(LOOKS), found.items(), strict=False):
                if kind not in rows:
                    continue
                points = {int(s): r["AP"] for s, r in rows[kind]["severities"].items()}
                axis.plot(
                    *zip(*sorted(points.items()), strict=True),
                    f"{marker}-",
                    ms=3.5,
                    lw=1.6,
                    color=colour,
                    label=_text(model),
                )
                if (clean := _clean_ap(metrics[model])) is not None:
                    axis.axhline(clean, color=colour, ls="--", lw=0.9)
            axis.set_title(kind.replace("_", " "), fontsize=10)
            axis.set_xticks(range(1, 6))
            axis.set_xlim(0.7, 5.3)
        axes[0].set_ylim(0)  # of all, once all is drawn
        dashed = any(_clean_ap(metrics[model]) is not None for model in found)
        figure.supxlabel("severity (dashed: clean)" if dashed else "severity", fontsize=10)
        figure.supylabel("AP", fontsize=10)
        _legend(figure)
        return _svg(figure)


def _clean_ap(found: ModelMetrics) -> float | None:
    return found["clean"]["AP"] if "clean" in found else None


def _legend(figure: Figure, columns: int = 4) -> None:
    """Above all panels, of what any of them shows."""
    shown = [axis.get_legend_handles_labels() for axis in figure.axes]
    lines = {label: line for of_axis in shown for line, label in zip(*of_axis, strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=columns, frameon=False)


def budget_plot(metrics: Metrics) -> str:
    """AP over the budget: the least of all attacks drawn strong, each attack alone and the worst per photo thin."""
    with _figure(6.4, 3.8) as figure:
        axis = figure.subplots()
        for (colour, marker, _), (model, found) in zip(cycle(LOOKS), metrics.items(), strict=False):
            if "attack" not in found:
                continue
            budgets = found["attack"]["budgets"]
            clean = _clean_ap(found)
            start = [] if clean is None else [(0, clean)]
            for run in next(iter(budgets.values()))["attacks"]:
                points = start + [(int(e), b["attacks"][run]["AP"]) for e, b in budgets.items()]
                axis.plot(*zip(*sorted(points), strict=True), ":", lw=0.8, alpha=0.5, color=colour)
            points = start + [(int(e), b["AP"]) for e, b in budgets.items()]
            axis.plot(
                *zip(*sorted(points), strict=True),
                f"{marker}:",
                lw=2.2,
                color=colour,
                label=_text(f"{model}, least of all"),
            )
        axis.plot([], [], ":", lw=0.8, color="grey", label="each attack alone, and the worst of them per photo")
        axis.set_xlabel("budget (levels of 255); dots are measured, lines only join them")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel("AP")
        axis.set_xlim(0)
        axis.set_ylim(0)
        _legend(figure, 1)
        return _svg(figure)


def least_budget_plot(least: Sequence[float | None], unit: str) -> str:
    """Share of photos that fool over the budget, from the least one of each; None: more than was tried."""
    with _figure(6.4, 3.2) as figure:
        axis = figure.subplots()
        reached = sorted(size for size in least if size is not None)
        shares = [100 * (number + 1) / len(least) for number in range(len(reached))]
        axis.step([0, *reached], [0, *shares], where="post", lw=2.2, color=COLOURS[0])
        axis.set_xlabel(f"budget, {unit}")
        axis.set_ylabel(f"% of {len(least)} photos that fool")
        axis.set_xlim(0)
        axis.set_ylim(0, 102)
        return _svg(figure)


def gate_plot(experts: list[str], shares: dict[str, list[float]]) -> str:
    """One bar per kind of photos, divided by the gate's mean weights."""
    with _figure(7.5, 0.9 + 0.26 * len(shares)) as figure:
        axis = figure.subplots()
        kinds, left = list(map(_text, shares)), [0.0] * len(shares)
        for number, ((colour, _, hatch), name) in enumerate(zip(cycle(LOOKS), experts, strict=False)):
            widths = [weights[number] for weights in shares.values()]
            axis.barh(kinds, widths, left=left, color=colour, hatch=hatch, label=_text(name), height=0.75)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_xlabel("mean weight")
        axis.grid(visible=False)
        _legend(figure)
        return _svg(figure)


def training_plot(records: list[Record], kinds: Sequence[str] = EXPERTS, what: str = "loss") -> str:
    """Losses, or what else, of all stages of a training over its batches: a panel per stage, a line per kind."""
    stages = list(dict.fromkeys(record["stage"] for record in records))
    with _figure(max(5.0, min(3.4 * len(stages), 14)), 3.6) as figure:
        row = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
        for axis, stage in zip(row, stages, strict=True):
            of_stage = [record for record in records if record["stage"] == stage]
            for colour, kind in zip(COLOURS, kinds, strict=False):
                points = [(record["batch"], record[kind]) for record in of_stage if kind in record]
                if points:
                    # A short run has few records: of one alone there is no line.
                    dots = "o" if len(points) < FEW else ""
                    axis.plot(*zip(*points, strict=True), lw=1.6, marker=dots, ms=4, color=colour, label=_text(kind))
            axis.set_title(_text(stage), fontsize=10)
            axis.set_xlabel("batch")
            axis.set_xlim(0, 1.05 * max(1, *(record["batch"] for record in of_stage)))
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        row[0].set_ylim(0, 1.05 * row[0].get_ylim()[1])
        row[0].set_ylabel(what)
        _legend(figure)
        return _svg(figure)


def timeline_plot(rows: list[Window], alarms: list[tuple[int, int]], deployed: Sequence[int] = ()) -> str:
    """Accuracy and hints by window over a stream; each alarm a line where it came, shaded from where the drop began.

    deployed: after which photos another detector took over; dashed lines.
    """
    with _figure(9, 3.8) as figure:
        axis = figure.subplots()
        at = [(row["first"] + row["last"]) / 2 for row in rows]
        lines: list[tuple[Literal["f1", "AP50", "confidence", "entropy"], str, float, str]] = [
            ("f1", "F1", 2.2, "-"),
            ("AP50", "AP50", 1.6, "-"),
            ("confidence", "confidence (hint)", 1.1, "--"),
            ("entropy", "gate entropy (hint)", 1.1, ":"),
        ]
        for colour, (key, label, width, style) in zip(COLOURS, lines, strict=False):
            points = [(x, row[key]) for x, row in zip(at, rows, strict=True) if row[key] is not None]
            if points:
                axis.plot(*zip(*points, strict=True), style, marker="o", ms=3, lw=width, color=colour, label=label)
        for began, number in alarms:
            axis.axvspan(began, number, color="#be185d", alpha=0.12, lw=0)
            axis.axvline(number, color="#be185d", lw=1.4)
        axis.plot([], [], color="#be185d", lw=1.4, label="alarm")
        for number in deployed:
            axis.axvline(number + 0.5, color="#15803d", lw=1.4, ls="--")
        if deployed:
            axis.plot([], [], color="#15803d", lw=1.4, ls="--", label="another detector")
        axis.set_xlabel("photo")
        axis.set_ylim(0)
        _legend(figure)
        return _svg(figure)


def picture(photo: Photo) -> str:
    """A small photo among the plots, pixel by pixel."""
    height, width = photo.shape[:2]
    data = base64.b64encode(encode_png(photo)).decode()
    return (
        f'<svg viewBox="0 0 {width} {height}" style="--width:256px;image-rendering:pixelated">'
        f'<image width="{width}" height="{height}" href="data:image/png;base64,{data}"/></svg>'
    )


def precision_plot(curves: dict[str, dict[str, list[float]]]) -> str:
    """Precision over recall, one panel per model: the clean photos, and what was done to them."""
    with _figure(min(5.2 * len(curves), 15), 4.2) as figure:
        row = figure.subplots(1, len(curves), sharex=True, sharey=True, squeeze=False)[0]
        for axis, (model, lines) in zip(row, curves.items(), strict=True):
            for (colour, marker, _), (label, curve) in zip(cycle(LOOKS), lines.items(), strict=False):
                if curve:
                    width, marked = (2.2 if label == "clean" else 1.5), marker if marker != LOOKS[0][1] else ""
                    axis.plot(
                        [i / 100 for i in range(101)], curve, lw=width, marker=marked, ms=3, markevery=10, color=colour,
                        label=label,
                    )  # fmt: skip
            axis.set_title(_text(model), fontsize=10)
            axis.set_xlabel("recall")
            axis.set_xlim(0, 1)
            axis.set_ylim(0, 1)
            axis.legend(frameon=False, fontsize=9)
        row[0].set_ylabel("precision, mean over classes")
        return _svg(figure)
