"""`detguard patch`: parse, call, show."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detguard import DetguardError
from detguard.cli.app import (
    Confidence,
    Device,
    EndToEnd,
    Fusion,
    ImageSize,
    Model,
    NmsIou,
    OutFolder,
    PatchSize,
    Seed,
    TopK,
    Trust,
    app,
    err,
    out,
    progress_bar,
    stop_signals,
)
from detguard.cli.evaluate import show_warnings

if TYPE_CHECKING:
    from detguard.attacks.patch import PatchOptions, Stage
    from detguard.detectors.base import Detector
    from detguard.objectives.base import Objective
    from detguard.runs import Run

PATCH = "patch.png"


@app.command(
    epilog="""Examples:

`detguard patch --data photos/ --target person`: a patch that hides who wears it from the bundled detector

`detguard patch --model yolo11n --data my/data.yaml --target person,bicycle --hours 2 --device cuda`

`detguard evaluate --data coco128 --protocols clean --patch runs/patch/001/patch.png`: what it does on other photos"""
)
def patch(
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A data.yaml or COCO json, whose labels say where targets are, or photos, where the detector says it; "
            "may be given several times."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Which split of a data.yaml.")] = "train",
    target: Annotated[str, typer.Option(help="Classes that wear the patch and are to vanish, comma-separated.")] = (
        "person"
    ),
    model: Model = "detguard-n",
    imgsz: ImageSize = None,
    size: PatchSize = 0.3,
    pixels: Annotated[int, typer.Option(min=8, max=4096, help="Side of patch.png, px.")] = 128,
    print_cm: Annotated[
        float, typer.Option(min=0.1, max=10_000, help="Side of the patch when it is printed, cm.")
    ] = 20,
    photos: Annotated[
        int, typer.Option(min=1, help="Photos that are shown, counted again when they come again.")
    ] = 4000,
    hours: Annotated[float | None, typer.Option(min=0.001, max=10_000, help="Learn so long instead.")] = None,
    rate: Annotated[
        float, typer.Option(min=0.0001, max=1, help="Of Adam, in 0..1 of brightness; falls to zero.")
    ] = 0.03,
    batch: Annotated[int, typer.Option(min=1, help="Photos of a step.")] = 8,
    conf: Confidence = 0.25,
    seed: Seed = 0,
    out_folder: OutFolder = None,
    iou: NmsIou = None,
    end_to_end: EndToEnd = False,
    top_k: TopK = None,
    fusion: Fusion = None,
    device: Device = "cpu",
    trust: Trust = False,
) -> None:
    """Make one square patch that hides the objects that wear it, on whatever photo; in a file to be printed.

    It learns on objects of all sizes, turned, tilted, brighter and darker. Ctrl-C ends the learning, and what was
    learned is kept. Exit code: 0 done, 2 wrong use or unreadable input.
    """
    from detguard.attacks.patch import PatchOptions
    from detguard.detectors.load import detector_config, load_detector
    from detguard.objectives import Vanish
    from detguard.runs import Run

    if not data:
        raise DetguardError("--data: give photos, a data.yaml or a COCO instances json")
    options = PatchOptions(size, pixels, photos, hours, rate, batch, conf, seed)
    with err.status("Loading the detector"):
        detector = load_detector(model, imgsz, trust, device, end_to_end, top_k, fusion, iou)
    targets = tuple(detector.class_index(name) for name in target.split(",") if name.strip())
    if not targets:
        raise DetguardError("--target: name at least one class, as in person,bus")
    objective = Vanish(targets)
    with err.status("Looking for targets"):
        learned = wearers(detector, data, split, objective, conf)
    config: dict[str, Any] = {
        "detector": detector_config(detector, model),
        "data": data, "split": split, "target": target, "patch": asdict(options), "print_cm": print_cm,
        "arguments": sys.argv[1:],
    }  # fmt: skip
    run_patch(Run.create("patch", out_folder, config), detector, objective, learned, options)


def wearers(detector: "Detector", sources: list[str], split: str, objective: "Objective", conf: float) -> "list[Stage]":
    """The photos of all sources that have targets, by their labels or else by what is found on them.

    Raises:
        DetguardError: there are none, or a photo cannot be read.
    """
    from detguard.attacks.patch import stages
    from detguard.data.sources import read_labelled, unlabelled
    from detguard.photos import find_photos

    photos: list[Any] = []
    for source in sources:
        if unlabelled(source):
            photos += [(file, None) for file in find_photos([source])]
        else:
            labelled = read_labelled(source, split, detector.class_names, show_warnings)
            photos += [(one.file, one.objects) for one in labelled]
    return stages(detector, photos, objective, conf)


def run_patch(
    run: "Run", detector: "Detector", objective: "Objective", photos: "list[Stage]", options: "PatchOptions"
) -> None:
    """Learn the patch with live progress, and write it out with its page."""
    from detguard.attacks.patch import printable_png, train_patch
    from detguard.reports.patch import patch_page

    stopped = stop_signals()
    with progress_bar() as progress:
        task = progress.add_task("patch", total=1.0)

        def on_step(done: float, record: dict[str, Any] | None) -> bool:
            progress.update(task, completed=done)
            if record:
                run.append({"stage": "patch", **record})
                progress.update(task, description=f"patch: loss {record['loss']:.3g}")
            return bool(stopped)

        made = train_patch(detector, photos, objective, options, on_step)
    run.write(PATCH, printable_png(made, run.config["print_cm"]))
    run.write("report.html", patch_page(run, detector, objective, photos, made))
    file, worn = run.path(PATCH), detector.class_names[objective.classes[0]]
    if stopped:
        out.print("stopped early; the patch is what it was then")
    out.print(
        f"results: {file}, open {run.folder / 'report.html'}; judge it on other photos: detguard evaluate "
        f"--protocols clean --patch {file} --patch-target '{worn}' --patch-size {options.size:g} --data ...",
        highlight=False,
        soft_wrap=True,
    )
