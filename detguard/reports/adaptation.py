"""The page of an adapt run: what the ensemble knew of new and old photos before and after, and how it learned."""

from collections.abc import Mapping
from pathlib import Path

from detguard.reports.evaluation import number
from detguard.reports.page import Table, render_page
from detguard.reports.plots import training_plot
from detguard.runs import Run

Judged = dict[str, dict[str, float | None]]


def verdict(before: Judged, after: Judged, photos: Mapping[str, int]) -> str:
    """One sentence: AP before and after on each kind of photos that were held out."""
    parts = [
        f"AP on {photos[kind]} {kind} photos {number(figures['AP'])} before, {number(after[kind]['AP'])} after"
        for kind, figures in before.items()
    ]
    return "; ".join(parts) or "No photos were held out to judge by"


def judged_table(before: Judged, after: Judged, photos: Mapping[str, int]) -> Table:
    """Figures before and after of each kind of photos, of which there are so many."""
    rows = [
        [f"{photos[kind]} {kind} photos", figure, number(value), number(after[kind][figure])]
        for kind, figures in before.items()
        for figure, value in figures.items()
    ]
    note = "On labelled photos that were not trained on. F1 at IoU .50 and confidence .25."
    return Table("Before and after", ["photos", "figure", "before", "after"], rows, note)


def adaptation_page(run: Run, before: Judged, after: Judged, photos: Mapping[str, int]) -> bytes:
    """report.html of an adapt run; photos: how many of each kind it was judged by."""
    records = list({r["batch"]: r for r in run.records() if "photos_per_second" in r}.values())
    kinds = ("new", "old", "gate", "moved")
    plots = {"Losses": training_plot(records, kinds)} if records else {}
    plan = run.config["adapt"]
    subtitle = (
        f"{plan['experts']} new expert(s), {plan['mode']} ({run.config['why']}), lambda {plan['keep']}, "
        f"{plan['photos']} photos seen, seed {plan['seed']}"
    )
    command = ["detguard", *run.config["arguments"]]
    title = f"Adapting {Path(run.config['model']).stem}"
    tables = [judged_table(before, after, photos)] if before else []
    return render_page(title, verdict(before, after, photos), subtitle, command, tables, plots)
