"""The page of a monitor run: how accuracy went over the stream, and where it dropped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from detguard import DetguardError, is_out_of_memory
from detguard.data.entries import DataError
from detguard.data.stream import Labelled, from_records
from detguard.evaluation.run import mean
from detguard.evaluation.views import SHOWN_CONFIDENCE
from detguard.hardening.monitor import (
    DRIFT,
    MOST_WINDOWS,
    Deployment,
    Levels,
    LikelihoodRatio,
    alarmed,
    latest,
    least_told,
    needed,
)
from detguard.photos import read_photo
from detguard.reports.evaluation import FOLDED, number
from detguard.reports.marks import marked, of_labels
from detguard.reports.page import Item, pair, panel, render_page
from detguard.reports.plots import Window, timeline_plot
from detguard.reports.tables import Table, counts
from detguard.runs import Record, Run
from detguard.workflows.living import DEPLOYED, ROLLED_BACK, event_line

# Photos of drops on the page.
MOST_SHOWN = 12


def windows(records: list[Record], size: int) -> list[Window]:
    """The photos of a stream by window of `size`; F1 and AP50 are of those with known objects."""
    made, records = list[Window](), latest(records)
    for start in range(0, len(records), size):
        part = [r for r in records[start : start + size] if "f1" in r]
        if not part:
            continue
        row: Window = {
            "first": part[0]["number"],
            "last": part[-1]["number"],
            "judged": sum(r["f1"] is not None for r in part),
            "f1": mean(r["f1"] for r in part),
            "AP50": next((r["AP50"] for r in records[start : start + size] if "AP50" in r), None),
            "confidence": mean(r["confidence"] for r in part),
            "entropy": mean(r["entropy"] for r in part),
            "alarms": [r["number"] for r in part if r["began"] is not None],
            "hints": [r["number"] for r in part if "hint" in r],
        }
        made.append(row)
    return made


def timeline_table(rows: list[Window]) -> Table:
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
    note = (
        "F1 at IoU .50 and confidence .25, of photos with known objects; AP50 of those whose labels are there when the "
        "window ends. Hints need no labels and are no alarm."
    )
    return Table("Windows", head, cells, note, folded=len(cells) > FOLDED)


def events_table(events: list[Record]) -> Table:
    """What was learned from a stream and what became of it, in words."""
    rows = [[event["event"], event_line(event).replace("\n", " ")] for event in events]
    note = (
        "What is better on photos of the new kind, and no worse on old ones, takes over; F1 of photos not learned from."
    )
    return Table("Events", ["event", "what"], rows, note)


def verdict(
    records: Sequence[Record],
    kind: str,
    window: int,
    told: Sequence[Record] = (),
    known: int | None = None,
    events: Sequence[Record] = (),
) -> str:
    """Whether and since when accuracy has dropped, or that there were too few photos to judge by.

    Where it has not, how large a drop would have had to be: that none was told says nothing of smaller ones.
    told, known: where the records are the end of a longer stream, those of all drops, as `Drops` has them, and how
    many of its photos have known objects. events: of a stream that is learned from.
    """
    least, records = needed(kind, window), latest([*told, *records])
    judged = [r for r in records if r.get("f1") is not None]
    alarms = [r for r in judged if r["began"] is not None]
    if not alarms:
        known = len(judged) if known is None else known
        if known < least:
            return f"Too few to judge: {known} photos have known objects, {least} are needed"
        values = judged_last(records, window)
        if hides(records, kind, window):
            return (
                f"Too little to judge by: mean F1 {number(mean(values))} of {len(values)} photos with known objects is "
                "too low for a drop to show for certain"
            )
        calm = f"No drop on {known} photos with known objects: mean F1 {number(mean(values))}"
        calm += f" of the last {len(values)}" if len(values) < known else ""
        return f"{calm}. {unseen(values, window)}" if LikelihoodRatio in DRIFT[kind] and len(values) > window else calm
    (first, *_), more = drops(records), f", and {len(alarms) - 1} more later" if len(alarms) > 1 else ""
    before, photos_before, after, photos_after = first.cells
    return (
        f"F1 dropped from {before} ({photos_before} photos) to {after} ({photos_after}) since about photo "
        f"{when(first.began)}, detected at photo {when(first.alarm)}{more}{since_change(records, events)}"
    )


def since_change(records: Sequence[Record], events: Sequence[Record]) -> str:
    """What the detector that took over last has found since, as a sentence that goes on; empty where none has."""
    changes = [event for event in events if event["event"] in (DEPLOYED, ROLLED_BACK)]
    if not changes:
        return ""
    last, what = changes[-1]["number"], "Adapted" if changes[-1]["event"] == DEPLOYED else "Rolled back"
    since = [r for r in records if r["number"] > last]
    values = [r["f1"] for r in since if r.get("f1") is not None]
    photos = counts(len(values), "photo") + " with known objects"
    if since and since[-1]["number"] - last > len(since):  # of a longer stream
        photos = f"the last {photos}"
    return f". {what} at photo {last}: {f'mean F1 {number(mean(values))} of ' * bool(values)}{photos} since"


def judged_last(records: Sequence[Record], window: int) -> list[float]:
    """F1 of the last photos with known objects, as many as a drop is looked for in."""
    return [float(r["f1"]) for r in records if r.get("f1") is not None][-MOST_WINDOWS * window :]


def hides(records: Sequence[Record], kind: str, window: int) -> bool:
    """Whether accuracy is so low or scattered that a drop of as many photos may not be told; one record of each."""
    values = judged_last(records, window)
    if LikelihoodRatio not in DRIFT[kind] or len(values) <= window:
        return False
    return fmean(values) <= least_told(values, len(values) // 2)


def unseen(values: Sequence[float], window: int) -> str:
    """What might not have been told of the photos whose F1 these are, more than a window: not by `LikelihoodRatio`."""
    last, half = least_told(values, window), least_told(values, len(values) // 2)
    if fmean(values) <= last or len(values) < 3 * window:
        return f"One by less than {number(half)} over half of them might not show"
    return f"One by less than {number(last)} in the last {window}, or {number(half)} over half of them, might not show"


def when(record: Record) -> str:
    """The number of a photo, with its time where it has one; of an alarm by late labels, of the drop's last photo."""
    if "through" in record:
        return str(record["through"])
    return f"{record['number']} ({record['time']})" if record.get("time") else str(record["number"])


@dataclass(frozen=True)
class Drop:
    """A drop: the photo since which accuracy has dropped, as is estimated, the one at which it was detected, and what
    it was told by.
    """

    began: Record
    alarm: Record
    levels: Levels | None

    @property
    def cells(self) -> list[str]:
        """F1 before, of how many photos, and the same of after."""
        if self.levels is None:
            return ["-"] * 4
        told = self.levels
        return [number(told["before"]), str(told["photos_before"]), number(told["after"]), str(told["photos_after"])]


def drops(records: Sequence[Record]) -> list[Drop]:
    """Those of a stream, of which there is one record of each photo."""
    by_number = {r["number"]: r for r in records}
    alarms = [r for r in records if r.get("began") is not None]
    return [Drop(by_number.get(r["began"], {"number": r["began"], "photo": ""}), r, r.get("levels")) for r in alarms]


def drops_table(found: Sequence[Drop]) -> Table:
    """One row per drop: when it began, when it was detected, and F1 before and since."""
    rows = [
        [
            when(drop.began),
            Path(drop.began["photo"]).name,
            when(drop.alarm),
            *drop.cells,
        ]
        for drop in found
    ]
    head = ["began at photo", "file", "detected at photo", "F1 before", "photos before", "F1 since", "photos since"]
    note = "Where it began is an estimate: where the photos before and after are best told apart by their F1."
    return Table("Drops", head, rows, note)


def dropped(records: Sequence[Record]) -> list[Record]:
    """The photos of every drop that have known objects, the least F1 first."""
    spans = [(r["began"], alarmed(r)) for r in records if r.get("began") is not None]
    found = [r for r in records if r.get("f1") is not None and any(a <= r["number"] <= b for a, b in spans)]
    return sorted(found, key=lambda r: r["f1"])


def drop_items(records: Sequence[Record], deployed: Deployment) -> list[Item]:
    """The photos of every drop, the least F1 first, as labelled and as found by the detector that saw each.

    Photos that cannot be read any more are left out, as are those whose file is another one by now, and those for which
    the detector's device has no room just now.
    """
    items = []
    for record in dropped(records)[:MOST_SHOWN]:
        try:
            detector = deployed.at(record["number"])
            (labelled,) = from_records([record], detector.class_names)
            if not isinstance(labelled, Labelled):
                raise labelled if isinstance(labelled, DataError) else DetguardError("labels without a photo")
            photo = read_photo(deployed.file(record["number"], labelled.file), record.get("sha256", ""))
            found = labelled.counted(detector.detect([photo], SHOWN_CONFIDENCE, multi_label=True)[0])
        except Exception as error:
            if not isinstance(error, DetguardError) and not is_out_of_memory(error):
                raise
            continue
        names = detector.class_names
        sides = (
            panel(f"labelled: {len(labelled.objects)}", photo, of_labels(labelled.objects, names)),
            panel(f"found: F1 {record['f1']:.2f}", photo, marked(labelled.objects, found, names)),
        )
        outcome = "nothing right" if record["f1"] == 0 else "partly right" if record["f1"] < 1 else "all right"
        title = f"photo {record['number']}: {labelled.file.name}"
        items.append(Item(title, outcome, record.get("time", ""), [pair(*sides)]))
    return items


def monitor_page(
    run: Run,
    records: list[Record],
    events: list[Record],
    items: Sequence[Item] = (),
    told: Sequence[Record] = (),
    known: int | None = None,
) -> bytes:
    """report.html of a monitor run; events: of one whose detector learns; items: photos of its drops; told, known: as
    in `verdict`.
    """
    options = run.config["monitor"]
    rows = windows(records, options["window"])
    records = latest(records)
    alarms = [r for r in records if r.get("began") is not None]
    photos = counts(len(records), "photo")
    if records and records[0]["number"] > 1:  # of a longer stream
        photos = f"the last {photos}"
    subtitle = f"{photos}, {counts(len(alarms), 'alarm')}; {options['detector']}, windows of {options['window']}"
    plots = {}
    if rows:
        changes = [event["number"] for event in events if event["event"] in (DEPLOYED, ROLLED_BACK)]
        deployed = [number for number in changes if number >= rows[0]["first"]]  # or all photos would be at one end
        line = timeline_plot(rows, [(r["began"], alarmed(r)) for r in alarms], deployed)
        plots["Accuracy over the stream"] = line
    title = f"Monitor: {run.config['detector']['model']}"
    tables = [drops_table(drops(records))] * bool(alarms) + [events_table(events)] * bool(events)
    tables.append(timeline_table(rows))
    summary = verdict(records, options["detector"], options["window"], told, known, events)
    command = ["detguard", *run.config["arguments"]]
    left_out = len(dropped(records)) - len(items) if items else 0
    gallery = "From where each drop began to its alarm, the least F1 first."
    return render_page(title, summary, subtitle, command, tables, plots, items, left_out, gallery)
