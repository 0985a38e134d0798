"""`detguard patch` and `detguard universal`: parse, call, show."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detguard import DetguardError, defaults
from detguard.cli.app import (
    Confidence,
    Device,
    EndToEnd,
    Eps,
    Fusion,
    ImageSize,
    Model,
    NmsIou,
    OutFolder,
    PatchSize,
    Resume,
    Seed,
    TopK,
    Trust,
    app,
    err,
    levels,
    only_resumes,
    out,
    progress_bar,
    stop_signals,
)
from detguard.cli.evaluate import show_warnings

if TYPE_CHECKING:
    from detguard.attacks.pictures import Learning, Picture, Stage
    from detguard.detectors.base import Detector
    from detguard.objectives.base import Objective
    from detguard.runs import Run

Data = Annotated[
    list[str] | None,
    typer.Option(
        help="A data.yaml or COCO json, whose labels say where targets are, or photos, where the detector says it; "
        "may be given several times."
    ),
]
Split = Annotated[str, typer.Option(help="Which split of a data.yaml.")]
Photos = Annotated[int, typer.Option(min=1, help="Photos that are shown, counted again when they come again.")]
Hours = Annotated[float | None, typer.Option(min=0.001, max=10_000, help="Learn so long instead.")]
Rate = Annotated[
    float, typer.Option(min=0.0001, max=1, help="Of Adam, as a share of the range of values; falls to zero.")
]
Batch = Annotated[int, typer.Option(min=1, help="Photos of a step.")]


@app.command(
    epilog="""Examples:

`detguard patch --data photos/ --target person`: a patch that hides who wears it from the bundled detector

`detguard patch --model yolo11n --data my/data.yaml --target person,bicycle --hours 2 --device cuda`

`detguard patch --resume runs/patch/001`: go on with one that was stopped

`detguard evaluate --data coco128 --protocols clean --patch runs/patch/001/patch.png`: what it does on other photos"""
)
def patch(
    context: typer.Context,
    data: Data = None,
    split: Split = defaults.Picture.split,
    target: Annotated[str, typer.Option(help="Classes that wear the patch and are to vanish, comma-separated.")] = (
        "person"
    ),
    model: Model = defaults.MODEL,
    imgsz: ImageSize = None,
    size: PatchSize = defaults.Picture.size,
    pixels: Annotated[int, typer.Option(min=8, max=4096, help="Side of patch.png, px.")] = defaults.Picture.pixels,
    print_cm: Annotated[
        float, typer.Option(min=0.1, max=10_000, help="Side of the patch when it is printed, cm.")
    ] = defaults.Picture.print_cm,
    photos: Photos = defaults.Picture.photos,
    hours: Hours = None,
    rate: Rate = defaults.Picture.rate,
    batch: Batch = defaults.Picture.batch,
    conf: Confidence = None,
    seed: Seed = defaults.Picture.seed,
    out_folder: OutFolder = None,
    resume: Resume = None,
    iou: NmsIou = None,
    end_to_end: EndToEnd = False,
    top_k: TopK = None,
    fusion: Fusion = None,
    device: Device = defaults.DEVICE,
    trust: Trust = False,
) -> None:
    """Make one square patch that hides the objects that wear it, on whatever photo; in a file to be printed.

    It learns on objects of all sizes, turned, tilted, brighter and darker. Ctrl-C saves and stops.
    Exit code: 0 done, 2 wrong use or unreadable input.
    """
    from detguard.attacks.patch import Patch
    from detguard.attacks.pictures import Learning

    if resume:
        return go_on(context, resume, "patch", device, trust)
    detector = loaded(model, imgsz, trust, device, end_to_end, top_k, fusion, iou)
    learning = Learning(photos, hours, rate, batch, conf or detector.conf, seed)
    config = {"target": target, "print_cm": print_cm}
    return begin(Patch(size, pixels), detector, model, data, split, learning, config, out_folder)


@app.command(
    epilog="""Examples:

`detguard universal --data photos/ --eps 8`: one perturbation after which nothing is found in whatever photo

`detguard universal --model yolo11n --data my/data.yaml --target person --hours 2 --device cuda`

`detguard evaluate --data coco128 --protocols clean --universal runs/universal/001/universal.png`: on other photos"""
)
def universal(
    context: typer.Context,
    data: Data = None,
    split: Split = defaults.Picture.split,
    target: Annotated[str, typer.Option(help="Classes that are to vanish, comma-separated, or all.")] = "all",
    model: Model = defaults.MODEL,
    imgsz: ImageSize = None,
    eps: Eps = str(defaults.Picture.eps),
    photos: Photos = defaults.Picture.photos,
    hours: Hours = None,
    rate: Rate = defaults.Picture.rate,
    batch: Batch = defaults.Picture.batch,
    conf: Confidence = None,
    seed: Seed = defaults.Picture.seed,
    out_folder: OutFolder = None,
    resume: Resume = None,
    iou: NmsIou = None,
    end_to_end: EndToEnd = False,
    top_k: TopK = None,
    fusion: Fusion = None,
    device: Device = defaults.DEVICE,
    trust: Trust = False,
) -> None:
    """Make one perturbation that hides objects when it is added to whatever photo, stretched to its size.

    universal.png holds 128 + the change of each value. Ctrl-C saves and stops.
    Exit code: 0 done, 2 wrong use or unreadable input.
    """
    from detguard.attacks.pictures import Learning
    from detguard.attacks.universal import Universal

    if resume:
        return go_on(context, resume, "universal", device, trust)
    most = levels(eps)
    if not isinstance(most, int) or not 1 <= most <= 127:
        raise DetguardError(f"--eps {eps}: expected whole levels of 1..127, as 128 + the change must fit a PNG")
    detector = loaded(model, imgsz, trust, device, end_to_end, top_k, fusion, iou)
    learning = Learning(photos, hours, rate, batch, conf or detector.conf, seed)
    kind = Universal(most, detector.imgsz)
    return begin(kind, detector, model, data, split, learning, {"target": target}, out_folder)


def loaded(*options: Any) -> "Detector":
    """The detector of the options, which are those of `load_detector`."""
    from detguard.detectors.load import load_detector

    with err.status("Loading the detector"):
        return load_detector(*options)


def begin(
    kind: "Picture", detector: "Detector", model: str, data: list[str] | None, split: str, learning: "Learning",
    config: dict[str, Any], out_folder: Path | None,
) -> None:  # fmt: skip
    """Learn a picture in a new run."""
    from detguard.detectors.load import detector_config
    from detguard.runs import Run

    if not data:
        raise DetguardError("--data: give photos, a data.yaml or a COCO instances json (or --resume RUN)")
    config |= {
        "detector": detector_config(detector, model), "data": data, "split": split, "picture": asdict(kind),  # type: ignore[call-overload]
        "learning": asdict(learning), "arguments": sys.argv[1:],
    }  # fmt: skip
    objective, photos = attacked_photos(detector, config)
    learn(Run.create(kind.kind, out_folder, config), detector, objective, photos, kind, learning)


def go_on(context: typer.Context, folder: Path, command: str, device: str, trust: bool) -> None:
    """Go on with a run."""
    from detguard.attacks.patch import Patch
    from detguard.attacks.pictures import Learning
    from detguard.attacks.universal import Universal
    from detguard.detectors.load import load_configured
    from detguard.runs import Run

    only_resumes(context)
    run = Run.resume(folder, command)
    with err.status("Loading the detector"):
        detector = load_configured(run.config["detector"], trust, device)
    kinds: dict[str, Any] = {one.kind: one for one in (Patch, Universal)}
    kind, learning = kinds[command](**run.config["picture"]), Learning(**run.config["learning"])
    learn(run, detector, *attacked_photos(detector, run.config), kind, learning)


def attacked_photos(detector: "Detector", config: dict[str, Any]) -> "tuple[Objective, list[Stage]]":
    """What is to vanish, and the photos of all sources that have some, by their labels or else by what is found.

    Raises:
        DetguardError: there are none, or a photo cannot be read.
    """
    from detguard.attacks.pictures import stages
    from detguard.data.sources import read_labelled, unlabelled
    from detguard.objectives import Vanish
    from detguard.photos import find_photos

    objective = Vanish([name.strip() for name in config["target"].split(",") if name.strip()]).on(detector)
    photos: list[Any] = []
    with err.status("Looking for targets"):
        for source in config["data"]:
            if unlabelled(source):
                photos += [(file, None) for file in find_photos([source])]
            else:
                labelled = read_labelled(source, config["split"], detector.class_names, show_warnings)
                photos += [(one.file, one.objects) for one in labelled]
        return objective, stages(detector, photos, objective, config["learning"]["conf"])


def learn(
    run: "Run", detector: "Detector", objective: "Objective", photos: "list[Stage]", kind: "Picture",
    learning: "Learning",
) -> None:  # fmt: skip
    """Learn the picture with live progress, and write it out with its page."""
    from detguard.attacks.patch import printable_png
    from detguard.attacks.pictures import learn_picture
    from detguard.photos import encode_png
    from detguard.reports.pictures import picture_page

    stopped = stop_signals()
    with progress_bar() as progress:
        task = progress.add_task(kind.kind, total=1.0)

        # A kill may come between a record and the checkpoint: what is learned anew is not told twice.
        known = max((record["batch"] for record in run.records()), default=0)

        def on_step(done: float, record: dict[str, Any] | None) -> bool:
            progress.update(task, completed=done)
            if record:
                if record["batch"] > known:
                    run.append({"stage": kind.kind, **record})
                progress.update(task, description=f"{kind.kind}: loss {record['loss']:.3g}")
            return bool(stopped)

        made = learn_picture(detector, photos, objective, kind, learning, on_step, run.path(f"state/{kind.kind}.pt"))
    file = run.path(f"{kind.kind}.png")
    printed = run.config.get("print_cm")
    run.write(file.name, printable_png(made, printed) if printed else encode_png(made))
    run.write("report.html", picture_page(run, detector, objective, photos, kind, made))
    if stopped:
        out.print(
            f"stopped early; go on with: detguard {kind.kind} --resume {run.folder}", highlight=False, soft_wrap=True
        )
    judged = f"--{kind.kind} {file}"
    if kind.kind == "patch":
        worn = detector.class_names[objective.classes[0]]
        judged += f" --patch-target '{worn}' --patch-size {run.config['picture']['size']:g}"
    out.print(
        f"results: {file}, open {run.folder / 'report.html'}; judge it on other photos: detguard evaluate "
        f"--protocols clean {judged} --data ...",
        highlight=False,
        soft_wrap=True,
    )
