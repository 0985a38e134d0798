"""The page of a run of `detguard patch` or `detguard universal`."""

from collections import Counter

from detguard.attacks.pictures import Picture, Stage
from detguard.detectors.base import Detector
from detguard.objectives.base import Objective
from detguard.photos import Photo, read_photo
from detguard.reports.page import Item, pair, panel, render_page
from detguard.reports.plots import picture as plotted
from detguard.reports.plots import training_plot
from detguard.runs import Run

MOST_SHOWN = 12


def picture_page(
    run: Run, detector: Detector, objective: Objective, photos: list[Stage], kind: Picture, picture: Photo
) -> bytes:
    """report.html of the run: the picture, its loss, and photos that it learned on, without and with it."""
    config = run.config
    records = run.records()
    printed = f", {config['print_cm']:g} x {config['print_cm']:g} cm when printed" if "print_cm" in config else ""
    shown, done = kind.shown(picture)
    plots = {f"The {kind.kind} picture{printed}{done}": plotted(shown)}
    if records:
        plots["Loss per object"] = training_plot(records, ("loss",))
    items = [_item(run, detector, objective, photo, kind, picture) for photo in photos[:MOST_SHOWN]]
    outcomes = Counter(item.outcome for item in items)
    verdict = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    verdict = f"{config['target']} on {len(items)} of the {len(photos)} photos that it learned on: {verdict}"
    subtitle = f"{detector.name} at {detector.imgsz} px; detguard evaluate --{kind.kind} judges it on other photos"
    command = ["detguard", *config["arguments"]]
    title = f"{kind.kind.capitalize()}. Goal: {config['target']} not found any more"
    return render_page(title, verdict, subtitle, command, [], plots, items, len(photos) - len(items))


def _item(run: Run, detector: Detector, objective: Objective, stage: Stage, kind: Picture, picture: Photo) -> Item:
    photo = read_photo(stage.file)
    boxes = stage.letterbox.boxes_to_photo(stage.objects.boxes[stage.attacked])
    shown = kind.on_photo(photo, picture, boxes)
    conf = run.config["learning"]["conf"]
    before, after = (one.of(objective.classes) for one in detector.detect([photo, shown], conf))
    outcome = "all gone" if not len(after) else "fewer" if len(after) < len(before) else "not fewer"
    outcome = outcome if len(before) else "none found without it"
    note = f"{len(boxes)} attacked; found: {len(before)}, then {len(after)}"
    names = detector.class_names
    sides = (
        panel(f"without: {len(before)} found", photo, before.records(names)),
        panel(f"with: {len(after)} found", shown, after.records(names)),
    )
    return Item(stage.file.name, outcome, note, [pair(*sides)])
