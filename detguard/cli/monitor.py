"""`detguard monitor`: parse, call, show."""

import json
import shlex
import signal
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from detguard import DetguardError, defaults
from detguard.classes import parse_map, parse_names
from detguard.cli.adapt import Replay
from detguard.cli.app import (
    NOTHING,
    ClassMap,
    Device,
    EndToEnd,
    Every,
    ExistOk,
    Frames,
    Fusion,
    Images,
    ImageSize,
    Json,
    Model,
    NmsIou,
    OutFolder,
    Resume,
    RunName,
    Split,
    TopK,
    Trust,
    app,
    err,
    given,
    loaded,
    only_of_splits,
    only_resumes,
    only_with,
    out,
    progress_bar,
    run_folder,
    show_error,
    show_stopped,
    show_warning,
)
from detguard.cli.evaluate import show_warnings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detguard.data.entries import DataError
    from detguard.data.stream import Labelled, Labels
    from detguard.detectors.base import Detector
    from detguard.runs import Record, Run
    from detguard.schema import Config


# Photos that an option may ask for.
MOST = 10**6


@app.command(
    epilog="""Examples:

`detguard monitor --model best.pt --stream day/instances.json`: by the time of each photo, or the order of the file

`camera | detguard monitor --model best.pt --stream -`: labelled photos as JSON lines, as they come

`detguard monitor --resume runs/monitor/001`: go on with a stream that was stopped"""
)
def monitor(
    context: typer.Context,
    model: Model = defaults.MODEL,
    stream: Annotated[
        str | None,
        typer.Option(
            help="A COCO json, a data.yaml or a .jsonl file, or - for JSON lines as they come: {photo, objects: "
            "[{class, box}], time}; or, without labels and for hints alone, a video or the number of a camera."
        ),
    ] = None,
    every: Every = 1,
    frames: Frames = defaults.FRAMES,
    split: Split = defaults.Monitor.split,
    class_map: ClassMap = None,
    images: Images = None,
    detector: Annotated[
        Literal["either", "likelihood-ratio", "adwin", "page-hinkley", "kswin"],
        typer.Option(
            help="Test that tells a drop of accuracy from chance (not the model); either: the likelihood ratio or "
            "ADWIN, whichever is first."
        ),
    ] = defaults.Monitor.drift,
    window: Annotated[
        int,
        typer.Option(
            min=8,
            max=MOST,
            help='Photos before "no drop" is said, and that AP is over; a drop may be told after half of them (by '
            "kswin both after four times as many).",
        ),
    ] = defaults.Monitor.window,
    imgsz: ImageSize = None,
    top_k: TopK = None,
    fusion: Fusion = None,
    iou: NmsIou = None,
    end_to_end: EndToEnd = False,
    out_folder: OutFolder = None,
    name: RunName = None,
    exist_ok: ExistOk = False,
    on_drift: Annotated[
        Literal["tell", "adapt"],
        typer.Option(
            help="adapt: teach an ensemble what made its accuracy drop, while the stream goes on, and deploy what is "
            "better on the new kind of photos and no worse on old ones."
        ),
    ] = "tell",
    gather: Annotated[
        int,
        typer.Option(
            min=1, max=MOST, help="Of --on-drift adapt: photos of the new kind to gather before it is learned."
        ),
    ] = defaults.Monitor.gather,
    keep: Annotated[
        int,
        typer.Option(min=0, max=MOST, help="Of --on-drift adapt: photos before a drop, at random, that are replayed."),
    ] = defaults.Monitor.keep,
    adapt_options: Annotated[
        str,
        typer.Option("--adapt", metavar="OPTIONS", help='Further options of `detguard adapt`, as "--mode frozen".'),
    ] = "",
    replay: Replay = None,
    roll_back: Annotated[
        bool, typer.Option("--roll-back", help="With --resume: first go back to the ensemble before the last one.")
    ] = False,
    as_json: Json = False,
    resume: Resume = None,
    device: Device = defaults.DEVICE,
    trust: Trust = False,
) -> None:
    """Watch accuracy over a stream of labelled photos, and tell when it drops: photos of a new kind have come.

    Writes the photos of every drop to dropped.jsonl, which detguard adapt takes, and a page with the timeline.
    With --on-drift adapt the run keeps copies of the photos that it may learn from, so that the camera may delete them,
    and events.jsonl tells what was deployed when, and why.
    Exit code: 0 no drop, 1 a drop, 2 wrong use or unreadable photos (the rest is still watched), 3 too few to judge.
    """
    from detguard.data.inputs import is_camera
    from detguard.data.sources import read_labelled, unlabelled
    from detguard.detectors.gated import GatedDetector
    from detguard.detectors.load import detector_config, load_configured, load_model
    from detguard.hardening.adapt import JUDGED_ONE_IN
    from detguard.runs import Run
    from detguard.workflows.monitor import LIVE, is_filmed, open_stream

    if resume:
        only_resumes(context)
        run = Run.resume(resume, "monitor")
        with err.status("Loading the detector"):
            watched = load_configured(run.config["detector"], device, trust=trust)
        sys.exit(watch(run, watched, device, roll_back=roll_back, as_json=as_json))
    out_folder = run_folder(context)
    if roll_back:
        raise DetguardError("--roll-back: goes with --resume")
    if not stream:
        raise DetguardError("--stream: give a COCO json, a data.yaml, or - for JSON lines (or --resume RUN)")
    (watched,) = loaded(context, model, device=device)
    if on_drift == "adapt" and not isinstance(watched, GatedDetector):
        raise DetguardError(f"--on-drift adapt: {model} is no gated ensemble; make one of it with detguard harden")
    if on_drift == "adapt":
        if is_filmed(stream):
            raise DetguardError("--on-drift adapt: a video or camera has no labels, without which nothing is learned")
        if imgsz is not None and imgsz != (own := load_model(model, trust=trust)[1]):
            raise DetguardError(f"--imgsz {imgsz}: --on-drift adapt trains and judges at the ensemble's own {own} px")
        for option, count in (("--gather", gather), ("--keep", JUDGED_ONE_IN if replay else keep)):
            if count < JUDGED_ONE_IN:
                raise DetguardError(f"{option} {count}: expected {JUDGED_ONE_IN} or more, as one in so many judges")
        if by_rule := [o for name, o in given(context).items() if name in ("top_k", "fusion", "iou")]:
            show_warning(
                f"{by_rule[0]}: is for the stream alone; adapted ensembles are judged by the rule of their files"
            )
    else:
        only_with(context, ("gather", "keep", "replay", "adapt_options"), "--on-drift adapt")
    only_of_splits(context, [stream])
    if is_filmed(stream):
        only_with(context, ("split",), "a data.yaml")
        only_with(context, ("class_map",), "photos with labels")
    else:
        only_with(context, ("every",), "a video or a camera")
    if stream == LIVE or is_filmed(stream) or stream.lower().endswith(".jsonl"):
        only_with(context, ("images",), "a COCO json")
    if not is_camera(stream):
        only_with(context, ("frames",), "a camera")
    parsed = adapting_options(adapt_options, watched.model if on_drift == "adapt" else None, gather)
    renamed = parse_map(class_map)
    for source in replay or []:  # wrong data are an error now, not after a drop
        if not unlabelled(source):
            read_labelled(source, "train", watched.class_names, show_warnings, class_map=renamed)
        elif on_drift == "adapt" and keep:
            raise DetguardError(
                f"--replay {source}: a folder without labels cannot be replayed beside the stream's own, which have "
                "some; give a data.yaml, a COCO json or a .jsonl file (or --keep 0)"
            )
    config: Config = {
        "detector": detector_config(watched, model),
        "stream": {
            "source": stream, "split": split, "images": str(images) if images else None, "class_map": renamed,
            "every": every, "frames": frames,
        },
        "monitor": {"detector": detector, "window": window},
        "on_drift": on_drift,
        "replay": replay or [],
        "living": {"gather": gather, "keep": keep, "adapt": parsed},
        "arguments": sys.argv[1:],
    }  # fmt: skip
    # Wrong data leave no run behind.
    opens = stream == LIVE or is_filmed(stream)
    listed = None if opens else open_stream(config["stream"], watched, show_warnings)
    run = Run.create("monitor", out_folder, config, exist_ok=exist_ok)
    sys.exit(watch(run, watched, device, listed, as_json=as_json))


def adapting_options(text: str, network: Any, gathered: int) -> list[str]:
    """Options of `detguard adapt`, as from a shell, once it is known that it takes them.

    network: the ensemble that is to be adapted to so many photos at least, or None.

    Raises:
        DetguardError: it does not, or it would refuse them after the drop.
    """
    from detguard.data.corruptions import chosen_kinds
    from detguard.hardening.adapt import Adaptation, check_growth, choose_mode
    from detguard.workflows.living import check_options

    try:
        parts = shlex.split(text)
    except ValueError as error:
        raise DetguardError(f"--adapt '{text}': {error}") from error
    command = typer.main.get_group(app).commands["adapt"]
    check_options(parts)
    try:
        options = command.make_context("adapt", list(parts)).params
    except typer.TyperException as error:
        raise DetguardError(f"--adapt '{text}': {error.format_message()}") from error
    if network is not None:
        mode = choose_mode(gathered)[0] if options["mode"] == "auto" else options["mode"]
        plan = Adaptation(experts=options["experts"], expert=options["expert"], mode=mode, init=options["init"])
        check_growth(network, plan, options["max_experts"])
        chosen_kinds(None if options["corruptions"] is None else parse_names(options["corruptions"]))
    return parts


def watch(
    run: "Run",
    detector: "Detector",
    device: str,
    photos: "Sequence[Labelled] | None" = None,
    *,
    roll_back: bool = False,
    as_json: bool = False,
) -> int:
    """Watch what the run has not seen yet, photo by photo; returns the exit code."""
    from detguard.classes import left_out
    from detguard.data.inputs import is_camera
    from detguard.data.stream import from_lines, lines_of, unknown_boxes
    from detguard.hardening.monitor import needed, observe
    from detguard.reports.monitoring import drop_items, hides, monitor_page, timeline_table, verdict, when, windows
    from detguard.workflows.living import Living
    from detguard.workflows.monitor import DROPPED, LIVE, Drops, film, is_filmed, open_stream, recent

    out.quiet = out.quiet or as_json
    source, options = run.config["stream"], run.config["monitor"]
    live, filmed = source["source"] == LIVE, is_filmed(source["source"])
    if photos is None and not live and not filmed:
        photos = open_stream(source, detector, show_warnings)
    adapts, reached = run.config["on_drift"] == "adapt", False
    with err.status("Reading the run"):  # of months, for minutes
        if not live:  # seen again from the start of a window, for its AP, and not known before
            run.cut(sum(1 for _ in run.each()) // options["window"] * options["window"])
        living, dropping = Living(run, detector, device, out.say), Drops(run)

    def tell() -> "list[Record]":
        records = recent(run)
        items = drop_items(records, living)
        page = monitor_page(run, records, living.events, items, dropping.told, dropping.known)
        run.write("report.html", page)
        return records

    if roll_back:
        living.roll_back()
    shown: Iterable[Labelled | Labels | DataError]
    if live:
        shown = from_lines(lines_of(sys.stdin.buffer), detector.class_names, class_map=source["class_map"])
    else:
        shown = film(run, show_warning) if photos is None else photos
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as a service or a container is stopped
    with progress_bar() as progress:
        task = progress.add_task("monitor", total=None if photos is None else len(photos))
        try:
            for record in observe(run, living, shown, options["detector"], options["window"], again=not live):
                progress.update(task, completed=record["number"])
                began = dropping.saw(record)
                if as_json:
                    print(json.dumps(record), flush=True)
                if "error" in record:
                    show_error(record["error"])
                elif record["began"] is not None:
                    out.say(f"photo {when(record)}: accuracy has dropped since photo {when(began)}")
                elif "hint" in record:
                    out.say(
                        f"photo {record['number']}: a hint, without labels: confidence has dropped since photo "
                        f"{record['hint']}; labels would tell"
                    )
                if record.get("outside") and not reached:
                    reached = True
                    show_warning(
                        f"photo {record['number']}: {record['outside']} labelled boxes reach out of it; were they made "
                        "at another resolution? (later ones are counted in results.jsonl, `outside`)"
                    )
                happened = len(living.events)
                if adapts:
                    living.saw(record)
                if record.get("began") is not None or len(living.events) > happened:  # a live stream may never end
                    tell()
            if adapts:
                living.end(lambda _: progress.update(task, description="the stream is over; adapting"))
        except KeyboardInterrupt:
            living.stop()
            if not is_camera(source["source"]):
                tell()
                return show_stopped(run)
            show_warning("stopped; what a camera showed is gone, so that the run ends here")
        finally:
            signal.signal(signal.SIGTERM, before)
    records, drops, dropped = tell(), len(dropping.spans), len(dropping.written)
    least = needed(options["detector"], options["window"])
    known = dropping.known
    summary = verdict(records, options["detector"], options["window"], dropping.told, known, living.events)
    out.say(summary, style="bold")
    out.print(timeline_table(windows(records, options["window"])))
    told = known >= least and not hides(records, options["detector"], options["window"])
    calm = "no drop" if told else "too few to judge" if known < least else "too little to judge by"
    summary = f"{drops} drop(s), {dropped} photos in {run.folder / DROPPED}" if drops else calm
    summary = f"{summary}; {known} of {dropping.count} photos have objects of classes that the detector knows"
    if dropping.bare:
        summary = f"{summary}, {dropping.bare} have no labels yet and gave hints alone"
    if live and (boxes := unknown_boxes(r.get("unknown", ()) for r in records)):  # of a file it was said at first
        show_warning(f"{sum(boxes.values())} {left_out(boxes, detector.class_names.values())}")
    out.say(f"{summary}; results: {run.folder}, open {run.folder / 'report.html'}")
    if dropping.errors:
        return 2
    return 1 if drops else 0 if told else NOTHING
