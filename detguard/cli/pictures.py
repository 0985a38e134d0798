"""`detguard patch` and `detguard universal`: parse, call, show."""

import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from detguard import DetguardError, defaults
from detguard.classes import parse_map
from detguard.cli.app import (
    ClassMap,
    Confidence,
    Device,
    EndToEnd,
    Eps,
    ExistOk,
    Fusion,
    ImageSize,
    JsonMade,
    Model,
    NmsIou,
    OutFolder,
    PatchSize,
    Resume,
    RunName,
    Seed,
    Split,
    TopK,
    Trust,
    app,
    err,
    given,
    levels,
    loaded,
    only_of_splits,
    only_resumes,
    out,
    progress_bar,
    run_folder,
    show_made,
    show_stopped,
    stop_signals,
)
from detguard.cli.evaluate import show_warnings

if TYPE_CHECKING:
    from collections.abc import Callable

    from detguard.attacks.pictures import Picture
    from detguard.detectors.base import Detector
    from detguard.workflows.pictures import PictureJob

Data = Annotated[
    list[str] | None,
    typer.Option(
        help="A data.yaml or COCO json, whose labels say where targets are, or photos, where the detector says it; "
        "may be given several times."
    ),
]
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

`detguard evaluate --data data.yaml --protocols clean --patch runs/patch/001/patch.png`: what it does on other photos"""
)
def patch(
    context: typer.Context,
    data: Data = None,
    split: Split = defaults.Picture.split,
    class_map: ClassMap = None,
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
    name: RunName = None,
    exist_ok: ExistOk = False,
    as_json: JsonMade = False,
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
    Exit code: 0 done, 2 wrong use or unreadable input, 130 stopped.
    """
    from detguard.attacks.patch import Patch

    make(context, lambda _: Patch(size, pixels), print_cm=print_cm)


@app.command(
    epilog="""Examples:

`detguard universal --data photos/ --eps 8`: one perturbation after which nothing is found in whatever photo

`detguard universal --model yolo11n --data my/data.yaml --target person --hours 2 --device cuda`

`detguard evaluate --data data.yaml --protocols clean --universal runs/universal/001/universal.png`: on other photos"""
)
def universal(
    context: typer.Context,
    data: Data = None,
    split: Split = defaults.Picture.split,
    class_map: ClassMap = None,
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
    name: RunName = None,
    exist_ok: ExistOk = False,
    as_json: JsonMade = False,
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
    Exit code: 0 done, 2 wrong use or unreadable input, 130 stopped.
    """
    from detguard.attacks.universal import Universal

    make(context, lambda detector: Universal.of(levels(eps), detector.imgsz))


def make(context: typer.Context, kind: "Callable[[Detector], Picture]", **kept: float) -> None:
    """Learn a picture in a new run, or go on with one, by a command's options; kept: more that a new run keeps."""
    from detguard.attacks.pictures import Learning
    from detguard.workflows.pictures import PictureJob

    options, command = context.params, str(context.command.name)
    device = options["device"]
    if options["resume"]:
        only_resumes(context)
        with err.status("Loading the detector and looking for targets"):
            job = PictureJob.resume(options["resume"], command, device, show_warnings, trust=options["trust"])
        return learn(job, as_json=options["as_json"])
    out_folder, data = run_folder(context), options["data"] or []
    only_of_splits(context, data or [""])
    (detector,) = loaded(context, options["model"], device=device)
    if options["hours"] is not None and "photos" in given(context):
        raise DetguardError("--hours: instead of --photos; leave one of them out")
    learning = {name: options[name] for name in Learning.__dataclass_fields__}
    learning["conf"] = learning["conf"] or detector.conf
    with err.status("Looking for targets"):
        job = PictureJob.begin(
            kind(detector), detector, data, Learning(**learning), target=options["target"], split=options["split"],
            class_map=parse_map(options["class_map"]), out=out_folder, exist_ok=options["exist_ok"],
            arguments=sys.argv[1:], on_data=show_warnings, **kept,
        )  # fmt: skip
    learn(job, as_json=options["as_json"])


def learn(job: "PictureJob", *, as_json: bool) -> None:
    """Learn the picture with live progress, and write it out with its page."""
    from detguard.reports.pictures import picture_page

    out.quiet = out.quiet or as_json
    stopped, kind, run, ended = stop_signals(), job.kind, job.run, False
    with progress_bar() as progress:
        task = progress.add_task(kind.kind, total=1.0)

        def on_step(done: float, loss: float | None) -> bool:
            nonlocal ended
            ended = done >= 1
            progress.update(task, completed=done)
            if loss is not None:
                progress.update(task, description=f"{kind.kind}: loss {loss:.3g}")
            return bool(stopped)

        learned = job.learn(on_step)
    run.write("report.html", picture_page(run, job.detector, job.objective, job.photos, kind, learned.picture))
    early = bool(stopped) and not ended
    shown = run.config["detector"]
    judged = "" if shown["model"] == defaults.MODEL else f"--model {shlex.quote(shown['model'])} "
    arguments = run.config["arguments"]
    judged += "--end-to-end " if shown["end_to_end"] else ""
    judged += "--trust " if "--trust" in arguments else ""
    for option in ("imgsz", "top_k", "fusion", "iou"):
        word = f"--{option.replace('_', '-')}"
        # A run that was begun from Python has no arguments, and may have any of them.
        asked = shown[option] is not None and (not arguments or any(one.startswith(word) for one in arguments))
        judged += f"{word} {shown[option]} " if asked else ""
    judged += f"--{kind.kind} {shlex.quote(str(learned.file))}"
    if kind.kind == "patch":
        worn, *others = (job.detector.class_names[one] for one in job.objective.classes)
        judged += f" --patch-target {shlex.quote(worn)} --patch-size {run.config['picture']['size']:g}"
        if others:
            out.print(f"evaluate judges it on one class at a time: on {worn} as below, then on {', '.join(others)}")
    elif len(job.objective.classes) < len(job.detector.class_names):
        hidden = ",".join(job.detector.class_names[one] for one in job.objective.classes)
        judged += f" --classes {shlex.quote(hidden)}"
    text = f"results: {learned.file}, open {run.folder / 'report.html'}; judge it on other photos: "
    text += f"detguard evaluate --protocols clean {judged} --data ..."
    show_made(text, as_json=as_json, file=learned.file, folder=learned.folder, stopped=early)
    if early:
        sys.exit(show_stopped(run))
