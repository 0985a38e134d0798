"""The closing tables of the commands."""

from collections import Counter
from collections.abc import Sequence
from statistics import mean, median

from rich.table import Table as TerminalTable

from detguard.attacks.run import PHOTO, THRESHOLDS
from detguard.detections import Detections
from detguard.reports.page import Table
from detguard.runs import Record


def rate(values: Sequence[bool | None]) -> str:
    """Like "98 % (49/50)" of the values that are not None."""
    counted = [v for v in values if v is not None]
    return share(sum(counted), len(counted))


def share(part: int, whole: int) -> str:
    """Like "98 % (49/50)", or "-" of nothing."""
    return f"{100 * part / whole:.4g} % ({part}/{whole})" if whole else "-"


def survival_table(records: Sequence[Record], title: str) -> Table:
    """Success rate of each member (rows) at each threshold (columns), over what was found clean at that threshold."""
    head = ["judged from file", *(f"conf {t:g}" for t in THRESHOLDS)]
    names = list(dict.fromkeys(name for r in records for name in r["members"]))
    rows = [
        [
            "photo (png)" if name == PHOTO else name,
            *(
                rate([r["members"][name]["success"][f"{t:g}"] for r in records if name in r["members"]])
                for t in THRESHOLDS
            ),
        ]
        for name in names
    ]
    gone = [[r["members"][PHOTO]["objects_gone"][f"{t:g}"] for r in records] for t in THRESHOLDS]
    if any(number for pairs in gone for _, number in pairs):
        shares = (share(sum(g for g, _ in pairs), sum(n for _, n in pairs)) for pairs in gone)
        rows.append(["objects not kept (png)", *shares])
    if len(names) > 1:
        together: list[str] = []
        for t in THRESHOLDS:
            values = [[m["success"][f"{t:g}"] for m in r["members"].values()] for r in records]
            together.append(rate([None if None in v else all(v) for v in values]))
        rows.append(["all members", *together])
    note = "Photos that fool the detector at each confidence; - where nothing was found."
    return Table(title, head, rows, note)


def attack_summary(records: Sequence[Record]) -> list[list[str]]:
    """Rows of name and value: photos, objects, detections, iterations, budget used, image quality and time of a run."""
    attacked = [r for r in records if r["status"] in ("fooled", "failed")]
    statuses = Counter(r["status"] for r in records)
    skipped = [
        f"{statuses[s]} {label}"
        for s, label in (("no-target", "without target"), ("error", "unreadable"))
        if statuses[s]
    ]
    rows = [["photos", f"{statuses['fooled']} of {len(attacked)} fooled" + "".join(f", {s}" for s in skipped)]]
    if attacked:
        fates = Counter(o["outcome"] for r in attacked for o in r["objects"])
        steps = [r["iterations"] for r in attacked]
        quality = f"{mean(r['psnr'] for r in attacked):.1f} dB, {mean(r['ssim'] for r in attacked):.3f}"
        seconds = [r["seconds"] for r in attacked]
        found = [d for r in attacked for d in r["members"][PHOTO]["detections"]]
        before, wrong = sum(len(r["clean"]) for r in attacked), sum(d["wrong"] for d in found)
        if fates:
            rows.append(
                ["objects", ", ".join(f"{fates[f]} {f}" for f in ("vanished", "relabelled", "kept") if fates[f])]
            )
        rows += [
            ["detections", f"{before} before, {len(found)} after, {wrong} of them wrong"],
            ["iterations", f"median {median(steps):g}, mean {mean(steps):.1f}, most {max(steps)}"],
            ["largest difference", f"{max(r['difference'] for r in attacked)} of 255 levels"],
            ["PSNR, SSIM", quality],
            ["time", f"{sum(seconds):.1f} s, {mean(seconds):.1f} s per photo"],
        ]
    return rows


def terminal_table(table: Table) -> TerminalTable:
    """A table for the terminal."""
    shown = TerminalTable(title=table.title, title_justify="left", caption=table.note, caption_justify="left")
    for name, number in zip(table.head, table.numeric, strict=True):
        shown.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*row)
    return shown


def terminal_list(rows: Sequence[Sequence[str]]) -> TerminalTable:
    """Rows of name and value for the terminal, without lines."""
    table = TerminalTable(show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def detections_table(file: str, detections: Detections, class_names: dict[int, str]) -> TerminalTable:
    """One row per detection: its number, best first, from 1; class, confidence, box in photo pixels."""
    rows = [
        [str(number), record["class"], f"{record['confidence']:.2f}", *(f"{v:.0f}" for v in record["box"])]
        for number, record in enumerate(detections.records(class_names), 1)
    ]
    return terminal_table(Table(file, ("number", "class", "confidence", "x1", "y1", "x2", "y2"), rows))
