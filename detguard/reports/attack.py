"""The page of an attack run."""

from collections import Counter

from detguard import DetguardError
from detguard.attacks.group import AttackOptions
from detguard.attacks.run import PHOTO
from detguard.detectors.base import Detector
from detguard.objectives.parse import wanted
from detguard.photos import read_photo
from detguard.reports.page import MOST_PHOTOS, Item, Table, gallery_item, render_page
from detguard.reports.plots import least_budget_plot
from detguard.reports.tables import attack_summary, least_budgets, survival_table
from detguard.runs import Record, Run


def attack_page(run: Run, records: list[Record], detector: Detector) -> bytes:
    """report.html of an attack run, from its records; photos that can no longer be read are left out."""
    options = AttackOptions.from_config(run.config["attack"])
    attacked = [r for r in records if r["status"] in ("fooled", "failed")]
    rate = survival_table(attacked, f"Success rate: {wanted(run.config)}")
    tables = [Table("Result", ["", ""], attack_summary(records, options)), rate]
    items = [item for record in attacked[:MOST_PHOTOS] if (item := _item(run, record, options))]
    subtitle = f"{detector.name} at {detector.imgsz} px, budget {options.budget}, confidence {options.conf}"
    if options.black_box:
        subtitle += f", black box: at most {options.queries} queries"
    command = ["detguard", *run.config["arguments"]]
    title = f"Attack: {wanted(run.config)}"
    plots = {}
    if options.smallest:
        plots["Success over budget"] = least_budget_plot(least_budgets(attacked), options.budget.unit)
    return render_page(title, subtitle, command, tables, plots, items, len(attacked) - len(items))


def _item(run: Run, record: Record, options: AttackOptions) -> Item | None:
    try:
        before, after = read_photo(record["photo"]), read_photo(run.path(record["files"]["photo"]))
    except DetguardError:
        return None
    found = record["members"][PHOTO]["detections"]
    fates = Counter(o["outcome"] for o in record["objects"])
    reached = [f"{count} of {len(record['objects'])} objects {fate}" for fate, count in sorted(fates.items())]
    if new := sum(d["wrong"] for d in found):
        reached.append(f"{new} of {len(found)} detections wrong")
    if "candidates" in record:
        reached.append("{} candidates before NMS, then {}".format(*record["candidates"]))
    spent = "queries" if options.black_box else "iterations"
    note = ", ".join([*reached, f"{record[spent]} {spent}", f"{record['difference']} levels", f"{record['psnr']} dB"])
    return gallery_item(record["key"], record["status"], note, before, record["clean"], after, found)
