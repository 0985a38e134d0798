"""The closing tables of the commands."""

from collections import Counter
from collections.abc import Sequence
from statistics import mean, median

from rich.table import Table

from detguard.attacks.run import THRESHOLDS
from detguard.detections import Detections
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
    table = Table(title=title, title_justify="left")
    table.add_column("judged from file")
    for threshold in THRESHOLDS:
        table.add_column(f"conf {threshold:g}", justify="right")
    names = list(dict.fromkeys(name for r in records for name in r["members"]))
    for name in names:
        table.add_row(
            "photo (png)" if name == "photo" else name,
            *(
                rate([r["members"][name]["success"][f"{t:g}"] for r in records if name in r["members"]])
                for t in THRESHOLDS
            ),
        )
    table.add_section()
    gone = [[r["members"]["photo"]["objects_gone"][f"{t:g}"] for r in records] for t in THRESHOLDS]
    table.add_row("objects (png)", *(share(sum(g for g, _ in pairs), sum(n for _, n in pairs)) for pairs in gone))
    if len(names) > 1:
        together: list[str] = []
        for t in THRESHOLDS:
            values = [[m["success"][f"{t:g}"] for m in r["members"].values()] for r in records]
            together.append(rate([None if None in v else all(v) for v in values]))
        table.add_row("all members", *together)
    return table


def attack_summary(records: Sequence[Record]) -> Table:
    """Photos, objects, iterations, budget used, image quality and time of an attack run."""
    attacked = [r for r in records if r["status"] in ("fooled", "failed")]
    statuses = Counter(r["status"] for r in records)
    table = Table(show_header=False, box=None, pad_edge=False)
    skipped = [
        f"{statuses[s]} {label}"
        for s, label in (("no-target", "without target"), ("error", "unreadable"))
        if statuses[s]
    ]
    table.add_row("photos", f"{statuses['fooled']} of {len(attacked)} fooled" + "".join(f", {s}" for s in skipped))
    if attacked:
        fates = Counter(o["outcome"] for r in attacked for o in r["objects"])
        table.add_row("objects", ", ".join(f"{fates[f]} {f}" for f in ("vanished", "relabelled", "kept") if fates[f]))
        steps = [r["iterations"] for r in attacked]
        table.add_row("iterations", f"median {median(steps):g}, mean {mean(steps):.1f}, most {max(steps)}")
        table.add_row("largest difference", f"{max(r['difference'] for r in attacked)} of 255 levels")
        table.add_row(
            "PSNR, SSIM", f"{mean(r['psnr'] for r in attacked):.1f} dB, {mean(r['ssim'] for r in attacked):.3f}"
        )
        table.add_row(
            "time",
            f"{sum(r['seconds'] for r in attacked):.1f} s, {mean(r['seconds'] for r in attacked):.1f} s per photo",
        )
    return table


def detections_table(file: str, detections: Detections, class_names: dict[int, str]) -> Table:
    """One row per detection: class, confidence, box in photo pixels."""
    table = Table(title=file, title_justify="left")
    for column in ("class", "confidence", "x1", "y1", "x2", "y2"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for record in detections.records(class_names):
        table.add_row(record["class"], f"{record['confidence']:.2f}", *(f"{v:.0f}" for v in record["box"]))
    return table
