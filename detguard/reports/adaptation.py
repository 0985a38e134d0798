"""The page of an adapt run: what the ensemble knew of new and old photos before and after, and how it learned."""

from collections.abc import Mapping
from pathlib import Path

from detguard.hardening.judging import Judgement, judged_eps
from detguard.hardening.validation import ATTACKED, STEPS
from detguard.reports.judged import before_after, judged_table
from detguard.reports.page import render_page
from detguard.reports.plots import training_plot
from detguard.reports.tables import Table, counts
from detguard.runs import Run
from detguard.schema import Config


def verdict(judged: Judgement) -> str:
    """One sentence: AP before and after on each kind of photos that were held out."""
    parts = []
    for kind, count in judged.photos.items():
        by = f" (no labels: agreement with {judged.answers[kind]})" if kind in judged.answers else ""
        parts.append(f"{count} {kind} photos held out{by}: {before_after(judged, kind)}")
    return "; ".join(parts) or "No photos were held out to judge by: judge it by detguard evaluate"


def judged_before_after(judged: Judgement, config: Config) -> Table:
    """Figures before and after of each kind of photos; config: of the run."""
    eps = judged_eps(config["adapt"]["eps"])
    by = f"by PGD of {STEPS} steps on the loss"
    note = f"Attacked are the first of the old ones with objects, at {eps} of 255 levels, {by}."
    return judged_table(judged, note if ATTACKED in judged.photos else "")


def adaptation_page(run: Run, judged: Judgement, learned: Mapping[str, int]) -> bytes:
    """report.html of an adapt run; learned: how many photos of each kind it was taught by."""
    records = list({r["batch"]: r for r in run.records() if "photos_per_second" in r}.values())
    kinds = ("new", "new, grown", "old", "moved")
    plots = {"Losses": training_plot(records, kinds)} if records else {}
    plan = run.config["adapt"]
    seen = plan["batch"] * max((record["batch"] for record in records), default=0)
    taught = " and ".join(f"{count} {kind}" for kind, count in learned.items())
    subtitle = (
        f"Learned from {taught} photos, {seen} seen with repeats, in batches of {plan['batch']}; "
        f"{counts(plan['experts'], 'new expert')}, {plan['mode']} ({run.config['why']}), lambda {plan['keep']}, "
        f"old photos attacked at {plan['eps']:g} of 255 levels, seed {plan['seed']}"
    )
    command = ["detguard", *run.config["arguments"]]
    title = f"Adapting {Path(run.config['model']).stem}"
    tables = [judged_before_after(judged, run.config)] if judged.photos else []
    return render_page(title, verdict(judged), subtitle, command, tables, plots)
