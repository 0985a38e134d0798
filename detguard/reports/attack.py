"""The page of an attack run, and its verdict."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from detguard import DetguardError
from detguard.attacks.group import AttackOptions
from detguard.attacks.run import PHOTO
from detguard.detectors.base import Detector
from detguard.objectives import Fabricate, Flood, Mislabel
from detguard.objectives.base import ALL, SEPARATOR
from detguard.objectives.parse import GOALS, wanted
from detguard.photos import read_photo
from detguard.reports.attack_tables import attack_summary, judged, least_budgets, survival_table
from detguard.reports.page import MOST_PHOTOS, Item, linked, pair, panel, render_page, short_names
from detguard.reports.plots import least_budget_plot
from detguard.reports.tables import Table, counts
from detguard.runs import Record, Run
from detguard.schema import Config

# Transformed copies of one photo that are shown.
MOST_COPIES = 6
# Failed photos that a verdict names.
MOST_NAMED = 5
# Photos that were not attacked, of a table.
MOST_LEFT_OUT = 50


def verdict(records: Sequence[Record], options: AttackOptions, goal: Config) -> str:
    """One sentence: how many photos were fooled, within which budget, and after which transforms; goal: of the run."""
    attacked = [r for r in records if r["status"] in ("fooled", "failed")]
    without, unread = (sum(record["status"] == status for record in records) for status in ("no-target", "error"))
    members = list(dict.fromkeys(name for record in attacked for name in record["members"]))[1:]
    others = list(dict.fromkeys(name for record in attacked for name in record.get("also", {})))
    fooled = sum(record["status"] == "fooled" for record in attacked)
    also = f", also after {' and '.join(members)}" if 0 < len(members) <= MOST_NAMED else ""
    if len(members) > MOST_NAMED:
        also = f", also after each of {len(members)} transforms"
    also = also + (f", and {' and '.join(others)} as well" if others else "") if fooled else ""
    # What decides is every member: a photo that fools and whose copy does not is none that is fooled.
    summary = f"{options.budget}: {fooled} of {len(attacked)} photos fooled{also} (confidence {options.conf:g})"
    summary += f"; {without} {GOALS[goal['goal']].spared}" if without else ""
    return summary + (f"; {unread} not attacked, see the errors" if unread else "")


def failures(attacked: Sequence[Record], goal: Config, conf: float) -> list[str]:
    """Of each photo that was not fooled its name and the members that were not, worst first; goal, conf: of the run."""
    return [f"{record['key']}: {left}" for record in attacked if (left := _left_in(record, goal, conf))]


def _left_in(record: Record, goal: Config, conf: float) -> str:
    """The members of a photo that were not fooled, and why, worst first; none: ""."""
    left = {name: member for name, member in judged(record).items() if not member["fooled"]}
    if goal["goal"] not in (Fabricate.kind, Flood.kind):
        worst = sorted(left.items(), key=lambda one: -one[1]["confidence"])
        lacking = [
            *([f"not found as {goal.get('to') or 'wanted'}"] if goal["goal"] == Mislabel.kind else []),
            *(["another class in its place"] if goal.get("strict") else []),
            *(["others not kept"] if goal.get("keep_others") else []),
        ]
        other = ", or ".join(lacking)  # why it is none though nothing of the target is left
        why = {
            name: f"confidence {one['confidence']:.2f}" if one["confidence"] > conf or not other else other
            for name, one in worst
        }
        return ", ".join(f"{name} ({reason})" for name, reason in why.items())
    classes = [name.strip().lower() for name in goal["target"].split(SEPARATOR)]
    new = goal["goal"] == Fabricate.kind
    found = {
        name: sum((one["wrong"] or not new) and (ALL in classes or one["class"].lower() in classes) for one in of_one)
        for name, of_one in ((name, member["detections"]) for name, member in left.items())
    }
    least = goal["count"] or getattr(GOALS[goal["goal"]], "count", 1)
    words = f"of {least} {'new' if new else 'found'}"
    return ", ".join(f"{name} ({number} {words})" for name, number in sorted(found.items(), key=lambda one: one[1]))


def not_attacked(records: Sequence[Record], config: Config) -> Table:
    """What no attack was made on and why, errors first; config: of the run."""
    unread = [why.partition(": ") for why in config.get("left_out", [])]
    left = sorted((r for r in records if r["status"] in ("error", "no-target")), key=lambda r: r["status"])
    every = [[source, why] for source, _, why in unread]
    every += [[record["key"], record.get("error") or _spared(record, config)] for record in left]
    rows = every[:MOST_LEFT_OUT]
    note = f"And {more} more." if (more := len(every) - len(rows)) else ""
    return Table("Not attacked", ["photo", "why"], rows, note, folded=len(rows) > 2 * MOST_NAMED)


def _spared(record: Record, goal: Config) -> str:
    return GOALS[goal["goal"]].spared + (f" for {record['detector']}" if "detector" in record else "")


def attack_page(run: Run, records: list[Record], detectors: Sequence[Detector]) -> bytes:
    """report.html of an attack run on detectors, from its records; photos that can no longer be read are left out."""
    options = AttackOptions.from_config(run.config["attack"])
    attacked = [r for r in records if r["status"] in ("fooled", "failed")]
    rate = survival_table(attacked, f"Success rate. Goal: {wanted(run.config)}", options.conf)
    tables = [rate, Table("Result", ["", ""], attack_summary(records, options, run.config))]
    if rows := [[record["key"], left] for record in attacked if (left := _left_in(record, run.config, options.conf))]:
        tables.append(Table("Not fooled", ["photo", "by what is left in"], rows, folded=len(rows) > 2 * MOST_NAMED))
    tables += [table for table in (not_attacked(records, run.config),) if table.rows]
    shown = _shown(attacked)
    named = short_names([Path(record["photo"]) for record in shown])
    items = [item for record, name in zip(shown, named, strict=True) if (item := _item(run, record, options, name))]
    fooled = " and ".join(f"{one.name} at {one.imgsz} px" for one in detectors)
    subtitle = f"{fooled}, budget {options.budget}, confidence {options.conf}"
    if options.black_box:
        subtitle += f", black box: at most {options.queries} queries"
    command = ["detguard", *run.config["arguments"]]
    title = f"Attack. Goal: {wanted(run.config)}"
    plots = {}
    if options.smallest:
        plots["Success over budget"] = least_budget_plot(least_budgets(attacked), options.budget.unit)
    summary = verdict(records, options, run.config)
    return render_page(title, summary, subtitle, command, tables, plots, items, len(attacked) - len(items))


def _shown(attacked: Sequence[Record]) -> list[Record]:
    """The photos of the gallery: those that failed, on at most half of it, and those that lost most objects."""

    def lost(record: Record) -> int:
        return sum(one["outcome"] != "kept" for one in record["objects"])

    failed = [r for r in attacked if r["status"] == "failed"]
    fooled = sorted((r for r in attacked if r["status"] == "fooled"), key=lost, reverse=True)
    room = max(MOST_PHOTOS // 2, MOST_PHOTOS - len(fooled))
    return (failed[:room] + fooled)[:MOST_PHOTOS]


def _item(run: Run, record: Record, options: AttackOptions, name: str) -> Item | None:
    members, files = record["members"], record["files"]
    try:
        before, after = read_photo(record["photo"]), read_photo(run.path(files[PHOTO]))
        copies = [
            panel(_judged(name, member), read_photo(run.path(files[name])), member["detections"], files[name])
            for name, member in list(members.items())[: MOST_COPIES + 1]
            if name != PHOTO
        ]
    except DetguardError:
        return None
    if before.shape != after.shape:  # another photo has taken its place
        return None
    found = members[PHOTO]["detections"]
    fates = Counter(o["outcome"] for o in record["objects"])
    reached = [f"{count} of {len(record['objects'])} objects {fate}" for fate, count in sorted(fates.items())]
    if new := sum(d["wrong"] for d in found):
        reached.append(f"{new} of {len(found)} detections wrong")
    if "candidates" in record:
        reached.append("{} candidates before NMS, then {}".format(*record["candidates"]))
    spent = f"{record['queries']} queries" if options.black_box else counts(record["iterations"], "iteration")
    reached += [spent, counts(record["difference"], "level"), f"{record['psnr']} dB"]
    if record["status"] == "failed":
        reached.append("not fooled: " + _left_in(record, run.config, options.conf))
    shown = pair(
        panel(f"before: {len(record['clean'])} found", before, record["clean"]),
        panel(f"after: {len(found)} found", after, found, files[PHOTO]),
        (before, after),
    )
    overlay = {"before and after, full size": linked(f"overlays/{record['key']}.png")}
    links = overlay | {"png" if name == PHOTO else name: linked(file) for name, file in files.items()}
    return Item(
        record["key"] if "/" not in name else name, record["status"], ", ".join(reached), [shown], copies, links
    )


def _judged(name: str, member: Record) -> str:
    return f"{name}: {'fooled' if member['fooled'] else 'NOT fooled'}, {len(member['detections'])} found"
