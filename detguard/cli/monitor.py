"""`detguard monitor`: parse, call, show."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from detguard import DetguardError, defaults
from detguard.cli.adapt import Replay, run_adaptation, start_adaptation
from detguard.cli.app import (
    Device,
    Fusion,
    ImageSize,
    Model,
    NmsIou,
    OutFolder,
    Resume,
    TopK,
    Trust,
    app,
    err,
    out,
    progress_bar,
    show_error,
    start_ranks,
)
from detguard.cli.evaluate import show_warnings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detguard.data.stream import Labelled
    from detguard.detectors.base import Detector
    from detguard.runs import Run


@app.command(
    epilog="""Examples:

`detguard monitor --model best.pt --stream day/instances.json`: by the time of each photo, or the order of the file

`camera | detguard monitor --model best.pt --stream -`: labelled photos as JSON lines, as they come

`detguard monitor --resume runs/monitor/001`: go on with a stream that was stopped"""
)
def monitor(
    model: Model = defaults.MODEL,
    stream: Annotated[
        str | None,
        typer.Option(help="A COCO json or data.yaml, or - for JSON lines: {photo, objects: [{class, box}]}."),
    ] = None,
    split: Annotated[str, typer.Option(help="Which split of a data.yaml.")] = defaults.Monitor.split,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the photos of a COCO json; default: beside it.")
    ] = None,
    detector: Annotated[
        Literal["likelihood-ratio", "adwin", "page-hinkley", "kswin"],
        typer.Option(help="What tells a drop from chance."),
    ] = defaults.Monitor.drift,
    window: Annotated[
        int, typer.Option(min=8, help="Photos that a judgement needs, and that AP is over.")
    ] = defaults.Monitor.window,
    imgsz: ImageSize = None,
    top_k: TopK = None,
    fusion: Fusion = None,
    iou: NmsIou = None,
    out_folder: OutFolder = None,
    on_drift: Annotated[
        Literal["tell", "adapt"], typer.Option(help="adapt: then teach an ensemble what made its accuracy drop.")
    ] = "tell",
    replay: Replay = None,
    resume: Resume = None,
    device: Device = "cpu",
    trust: Trust = False,
) -> None:
    """Watch accuracy over a stream of labelled photos, and tell when it drops: photos of a new kind have come.

    Writes the photos of every drop to dropped.jsonl, which detguard adapt takes, and a page with the timeline.
    Exit code: 0 no drop, 1 a drop, 2 wrong use or unreadable photos (the rest is still watched).
    """
    from detguard.data.sources import read_labelled, unlabelled
    from detguard.detectors.load import detector_config, load_configured, load_detector
    from detguard.runs import Run
    from detguard.workflows.monitor import LIVE, open_stream

    if resume:
        if stream:
            raise DetguardError("--resume: takes its stream and options from the run; give no others")
        run = Run.resume(resume, "monitor")
        with err.status("Loading the detector"):
            watched = load_configured(run.config["detector"], trust, device)
        sys.exit(watch(run, watched, device, trust=trust))
    if not stream:
        raise DetguardError("--stream: give a COCO json, a data.yaml, or - for JSON lines (or --resume RUN)")
    with err.status("Loading the detector"):
        watched = load_detector(model, imgsz, trust, device, top_k=top_k, fusion=fusion, iou=iou)
    if on_drift == "adapt" and not watched.hardened:
        raise DetguardError(f"--on-drift adapt: {model} is no gated ensemble; make one of it with detguard harden")
    for source in replay or []:  # wrong data are told now, not when the stream has ended
        if not unlabelled(source):
            read_labelled(source, "train", watched.class_names, show_warnings)
    config: dict[str, Any] = {
        "detector": detector_config(watched, model),
        "stream": {"source": stream, "split": split, "images": str(images) if images else None},
        "monitor": {"detector": detector, "window": window},
        "on_drift": on_drift,
        "replay": replay or [],
        "arguments": sys.argv[1:],
    }
    # Wrong data leave no run behind.
    listed = None if stream == LIVE else open_stream(config["stream"], watched, show_warnings)
    sys.exit(watch(Run.create("monitor", out_folder, config), watched, device, listed, trust))


def watch(
    run: "Run", detector: "Detector", device: str, photos: "Sequence[Labelled] | None" = None, trust: bool = False
) -> int:
    """Watch what the run has not seen yet, photo by photo; returns the exit code."""
    from detguard.data.stream import from_lines, lines_of
    from detguard.hardening.monitor import observe
    from detguard.reports.monitoring import monitor_page, timeline_table, windows
    from detguard.reports.tables import terminal_table
    from detguard.workflows.monitor import DROPPED, LIVE, open_stream, write_dropped

    source, options = run.config["stream"], run.config["monitor"]
    live = source["source"] == LIVE
    if photos is None and not live:
        photos = open_stream(source, detector, show_warnings)
    shown = from_lines(lines_of(sys.stdin.buffer), detector.class_names) if photos is None else photos
    with progress_bar() as progress:
        task = progress.add_task("monitor", total=None if photos is None else len(photos))
        try:
            for record in observe(run, detector, shown, options["detector"], options["window"], again=not live):
                progress.update(task, completed=record["number"])
                if "error" in record:
                    show_error(record["error"])
                elif record["began"] is not None:
                    message = f"photo {record['number']}: accuracy has dropped since photo {record['began']}"
                    out.print(message, highlight=False, soft_wrap=True)
                    write_dropped(run, run.records())  # a live stream may never end
        except KeyboardInterrupt:
            show_error(f"stopped; go on with: detguard monitor --resume {run.folder}")
            return 130
    records = run.records()
    drops, dropped = write_dropped(run, records)
    run.write("report.html", monitor_page(run, records))
    out.print(terminal_table(timeline_table(windows(records, options["window"]))))
    judged = sum(r.get("f1") is not None for r in records)
    calm = "no drop" if judged >= options["window"] else "too few to judge"
    told = f"{drops} drop(s), {dropped} photos in {run.folder / DROPPED}" if drops else calm
    told = f"{told}; {judged} of {len(records)} photos have objects of classes that the detector knows"
    out.print(f"{told}; results: {run.folder}, open {run.folder / 'report.html'}", highlight=False, soft_wrap=True)
    code = 2 if any("error" in r for r in records) else int(bool(drops))
    if not drops or run.config["on_drift"] != "adapt":
        return code
    folder, new = run.folder / "adapted", [str(run.folder / DROPPED)]
    if (folder / "config.yaml").exists():
        from detguard.workflows.adapt import Adapting

        ranks = start_ranks(device)
        with err.status("Loading the ensemble"):
            job = Adapting.resume(folder, ranks, trust)
    else:
        model, replay = run.config["detector"]["model"], run.config["replay"]
        job = start_adaptation(model, new, {}, start_ranks(device), replay=replay, out=folder, trust=trust)
    return run_adaptation(job) or code
