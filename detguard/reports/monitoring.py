"""The page of a monitor run: how accuracy went over the stream, and where it dropped."""

from typing import Any

from detguard.evaluation.run import mean
from detguard.hardening.monitor import latest
from detguard.reports.evaluation import number
from detguard.reports.page import Table, render_page
from detguard.reports.plots import timeline_plot
from detguard.runs import Record, Run
from detguard.workflows.living import DEPLOYED, ROLLED_BACK, in_words


def windows(records: list[Record], size: int) -> list[dict[str, Any]]:
    """Means of the photos of a stream by window: first and last photo, how many have known objects to be judged by, f1
    of those, AP50, hints, and the alarms in it.
    """
    made, records = [], latest(records)
    for start in range(0, len(records), size):
        part = [r for r in records[start : start + size] if "f1" in r]
        if not part:
            continue
        row: dict[str, Any] = {"first": part[0]["number"], "last": part[-1]["number"]}
        row["judged"] = sum(r["f1"] is not None for r in part)
        for key in ("f1", "confidence", "entropy"):
            row[key] = mean(r[key] for r in part)
        row["AP50"] = next((r["AP50"] for r in records[start : start + size] if "AP50" in r), None)
        row["alarms"] = [r["number"] for r in part if r["began"] is not None]
        row["hints"] = [r["number"] for r in part if "hint" in r]
        made.append(row)
    return made


def timeline_table(rows: list[dict[str, Any]]) -> Table:
    """One row per window."""
    hints = any(row["entropy"] is not None for row in rows)
    head = [
        "photos",
        "with objects",
        "F1",
        "AP50",
        "confidence (hint)",
        *(["gate entropy (hint)"] if hints else []),
        "alarm at",
    ]
    cells = [
        [
            f"{row['first']} to {row['last']}",
            str(row["judged"]),
            number(row["f1"]),
            number(row["AP50"]),
            number(row["confidence"]),
            *([number(row["entropy"])] if hints else []),
            ", ".join([*map(str, row["alarms"]), *(f"{hint} (hint)" for hint in row["hints"])]) or "-",
        ]
        for row in rows
    ]
    note = "F1 at IoU .50 and confidence .25, of photos with known objects. Hints need no labels and are no alarm."
    return Table("Windows", head, cells, note)


def events_table(events: list[Record]) -> Table:
    """What was learned from a stream and what became of it, in words."""
    rows = [[event["event"], in_words(event).replace("\n", " ")] for event in events]
    note = (
        "What is better on photos of the new kind, and no worse on old ones, takes over; F1 of photos not learned from."
    )
    return Table("Events", ["event", "what"], rows, note)


def monitor_page(run: Run, records: list[Record], events: list[Record]) -> bytes:
    """report.html of a monitor run; events: of one whose detector learns."""
    options = run.config["monitor"]
    rows = windows(records, options["window"])
    records = latest(records)
    alarms = [r for r in records if r.get("began") is not None]
    subtitle = f"{len(records)} photos, {len(alarms)} alarm(s); {options['detector']}, windows of {options['window']}"
    deployed = [event["number"] for event in events if event["event"] in (DEPLOYED, ROLLED_BACK)]
    plots = {}
    if rows:
        line = timeline_plot(rows, [(r["began"], r["number"]) for r in alarms], deployed)
        plots["Accuracy over the stream"] = line
    title = f"Monitor: {run.config['detector']['model']}"
    tables = [events_table(events)] * bool(events) + [timeline_table(rows)]
    return render_page(title, subtitle, ["detguard", *run.config["arguments"]], tables, plots, [])
