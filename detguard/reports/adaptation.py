"""The page of an adapt run: what the ensemble knew of new and old photos before and after, and how it learned."""

from pathlib import Path

from detguard.reports.evaluation import number
from detguard.reports.page import Table, render_page
from detguard.reports.plots import training_plot
from detguard.runs import Run

Judged = dict[str, dict[str, float | None]]


def judged_table(before: Judged, after: Judged) -> Table:
    """Figures before and after of each kind of photos."""
    rows = [
        [f"{kind} photos", figure, number(value), number(after[kind][figure])]
        for kind, figures in before.items()
        for figure, value in figures.items()
    ]
    note = "On labelled photos that were not trained on. F1 at IoU .50 and confidence .25."
    return Table("Before and after", ["photos", "figure", "before", "after"], rows, note)


def adaptation_page(run: Run, before: Judged, after: Judged) -> bytes:
    """report.html of an adapt run."""
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
    return render_page(title, subtitle, command, [judged_table(before, after)], plots, [])
