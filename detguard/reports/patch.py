"""The page of a patch run."""

from detguard.attacks.patch import Stage
from detguard.detectors.base import Detector
from detguard.objectives.base import Objective
from detguard.photos import Photo, read_photo
from detguard.reports.page import Item, gallery_item, render_page
from detguard.reports.plots import picture, training_plot
from detguard.runs import Run
from detguard.transforms.paste import paste_on_photo

MOST_SHOWN = 12


def patch_page(run: Run, detector: Detector, objective: Objective, photos: list[Stage], patch: Photo) -> bytes:
    """report.html of a patch run: the patch, its loss, and photos that it learned on, without and with it."""
    config = run.config
    records = run.records()
    plots = {f"The patch, {config['print_cm']:g} x {config['print_cm']:g} cm when printed": picture(patch)}
    if records:
        plots["Loss per object"] = training_plot(records, ("loss",))
    items = [_item(detector, objective, photo, patch, config["patch"]) for photo in photos[:MOST_SHOWN]]
    subtitle = (
        f"{detector.name} at {detector.imgsz} px; the photos below are some that it learned on: "
        "detguard evaluate --patch judges it on others"
    )
    command = ["detguard", *config["arguments"]]
    title = f"Patch: {config['target']} not found any more"
    return render_page(title, subtitle, command, [], plots, items, len(photos) - len(items))


def _item(detector: Detector, objective: Objective, stage: Stage, patch: Photo, options: dict[str, float]) -> Item:
    photo = read_photo(stage.file)
    attacked = objective.attacked(stage.objects)
    boxes = stage.letterbox.boxes_to_photo(stage.objects.boxes[attacked])
    shown = paste_on_photo(photo, patch, boxes, options["size"])
    before, after = (one.of(objective.classes) for one in detector.detect([photo, shown], options["conf"]))
    outcome = "all gone" if not len(after) else "fewer" if len(after) < len(before) else "not fewer"
    note = f"{len(boxes)} wear it; found: {len(before)}, then {len(after)}"
    names = detector.class_names
    return gallery_item(stage.file.name, outcome, note, photo, before.records(names), shown, after.records(names))
