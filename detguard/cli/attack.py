"""`detguard attack`, `detect` and `verify`: parse, call, show."""

import json
import math
import sys
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import MofNCompleteColumn, track

from detguard import DetguardError, defaults
from detguard.classes import parse_map
from detguard.cli.app import (
    MODELS,
    NOTHING,
    PHOTOS,
    ClassMap,
    Confidence,
    ConfidenceOfAll,
    Device,
    EndToEnd,
    Every,
    ExistOk,
    Frames,
    Fusion,
    ImageSize,
    Json,
    Model,
    NmsIou,
    OutFolder,
    Recursive,
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
    only_with,
    out,
    progress_bar,
    run_folder,
    show_error,
    show_lost,
    show_stopped,
    show_warning,
    start_ranks,
    tell_apart,
)
from detguard.cli.evaluate import fault_lines, show_warnings, whole_numbers

# Torch and the detectors take seconds to import: only commands that need them do, so that --help is quick.
if TYPE_CHECKING:
    from detguard.attacks.group import Attempt
    from detguard.attacks.run import Job
    from detguard.data.entries import Faults
    from detguard.data.stream import Labelled
    from detguard.ranks import Ranks
    from detguard.runs import Record


@app.command(
    epilog="""Examples:

`detguard attack bus.jpg`: no pedestrian is found any more, not even after median blur and JPEG

`detguard attack photos/ --target person,bicycle --eps 8 --transforms median:3,median:5,jpeg:50,jpeg:75`

`detguard attack bus.jpg --target bus --to train --model yolo11n`: the bus is found as a train

`detguard attack bus.jpg --object 3 --keep-others`: the third object that `detect` lists vanishes, the others stay

`detguard attack empty.jpg --goal fabricate`: a person is found where there is none

`detguard attack bus.jpg --black-box --eps 16 --queries 2000`: by scores alone, as of a detector that only predicts

`detguard attack --resume runs/attack/001`: go on with a run that was stopped"""
)
def attack(
    context: typer.Context,
    photos: Annotated[list[str] | None, PHOTOS] = None,
    recursive: Recursive = False,
    every: Every = 1,
    frames: Frames = defaults.FRAMES,
    data: Annotated[
        str | None,
        typer.Option(
            help="Photos of a data.yaml, a COCO json or a folder, instead of PHOTO; the run then holds what was made "
            "of them as a data set, samples/data.yaml, with their labels, or what was found in the clean photos."
        ),
    ] = None,
    split: Split = defaults.Evaluate.split,
    class_map: ClassMap = None,
    goal: Annotated[
        str | None,
        typer.Option(
            metavar="GOAL",
            help="vanish: objects are not found; mislabel: found as --to; untargeted: gone or of another class; "
            "fabricate: found where there are none; flood: found in masses. Default: vanish, with --to mislabel.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help='Classes to attack, comma-separated, or all; "person->car,bus->train" says what each is found as. '
            "Default: person; all for untargeted, flood, --object and --box."
        ),
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="Have the objects found as this class; other: as any but their own.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Nothing else may be found in the place of a vanished object.")
    ] = False,
    objects: Annotated[
        str | None, typer.Option("--object", help="Attack only these, by their numbers in `detguard detect`, as 1,3.")
    ] = None,
    box: Annotated[
        str | None,
        typer.Option(metavar="X1,Y1,X2,Y2", help="Attack only objects whose middle lies in this box, photo pixels."),
    ] = None,
    keep_others: Annotated[
        bool, typer.Option("--keep-others", help="All that is not attacked must still be found, as what it was.")
    ] = False,
    loss: Annotated[
        Literal["logit", "confidence"],
        typer.Option(help="How candidates are weighed: by logits, which do not saturate, or by plain confidence."),
    ] = defaults.Attack.measure,
    count: Annotated[
        int | None,
        typer.Option(min=1, max=300, help="Objects to find: new ones for fabricate (1), in all for flood (100)."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"{MODELS}; repeatable: the same photo must fool all of them; default: detguard-n."),
    ] = None,
    imgsz: ImageSize = None,
    conf: ConfidenceOfAll = None,
    eps: Annotated[
        str,
        typer.Option(
            metavar="LEVELS",
            help="Budget: largest change of a pixel value, as 4 or 4/255; of --norm l2, of the whole photo, black to "
            "white counted as 1.",
        ),
    ] = str(defaults.Attack.eps),
    norm: Annotated[Literal["linf", "l2"], typer.Option(help="How the budget is measured.")] = defaults.Attack.norm,
    mask: Annotated[
        str | None,
        typer.Option(
            help="Where it may be spent: inside or outside the objects attacked, or corners of a polygon, "
            "x1,y1,x2,y2,x3,y3,... in pixels; default: everywhere."
        ),
    ] = None,
    smallest: Annotated[
        bool, typer.Option("--smallest", help="Search for the least budget up to --eps that fools, photo by photo.")
    ] = False,
    black_box: Annotated[
        bool,
        typer.Option("--black-box", help="Search by the scores alone (Square attack), without a gradient."),
    ] = False,
    queries: Annotated[
        int, typer.Option(min=2, help="Of --black-box: most forwards per photo, each of the photo or one copy of it.")
    ] = defaults.Attack.queries,
    step: Annotated[
        float | None,
        typer.Option(
            min=0.0001,
            max=1e5,
            help="Change per iteration, in the unit of --eps; default: 1 level, of l2 a fifth of --eps.",
        ),
    ] = None,
    rule: Annotated[
        Literal["steepest", "sign", "normalized", "raw", "adam", "apgd"],
        typer.Option(
            help="How it moves: steepest is by signs in linf and along the gradient in l2; apgd finds its own steps."
        ),
    ] = defaults.Attack.rule,
    steps: Annotated[int, typer.Option(min=1, help="Most iterations.")] = defaults.Attack.steps,
    transforms: Annotated[
        str,
        typer.Option(
            help="Group members beside the photo, or none: median:3|5|7, gaussian:K, motion:K, defocus:K, jpeg:Q, "
            "webp:Q, h264:F, resize:F, rotate:D, crop:S, flip:h|v, stretch:F, perspective:S, brightness:S, "
            "contrast:S, gamma:G, hue:D, invert:S, posterize:B, noise:S, corrupt:fog-2, albumentations:NAME. A..B "
            "instead of a number draws one anew in each iteration. Or a preset: network, driving, print."
        ),
    ] = defaults.Attack.transforms,
    aggregate: Annotated[
        Literal["mean", "weighted", "max"],
        typer.Option(help="How the members' gradients (or losses, of --black-box) become one: mean, weighted or max."),
    ] = defaults.Attack.aggregate,
    schedule: Annotated[
        Literal["worst", "group"],
        typer.Option(
            help="Who is stepped against: the worst member alone until it is fooled, which costs less, or the whole "
            "group each time (as other --aggregate than mean, --rule apgd and random members always are)."
        ),
    ] = defaults.Attack.schedule,
    weights: Annotated[str | None, typer.Option(help="For --aggregate weighted: photo first, e.g. 1,1,2.")] = None,
    gradient: Annotated[
        Literal["straight-through", "exact"], typer.Option(help="Through transforms: straight-through or exact.")
    ] = defaults.Attack.gradient,
    momentum: Annotated[
        float, typer.Option(min=0, max=1, help="Share of earlier gradients in each step.")
    ] = defaults.Attack.momentum,
    random_start: Annotated[
        bool, typer.Option("--random-start", help="Start from random noise within the budget.")
    ] = False,
    margin: Annotated[
        float,
        typer.Option(
            min=0, max=0.99, help="Search until confidence is this share under --conf: survives more transforms."
        ),
    ] = defaults.Attack.margin,
    as_json: Json = False,
    seed: Seed = defaults.Attack.seed,
    batch: Annotated[int, typer.Option(min=1, help="Photos attacked at once.")] = defaults.Attack.batch,
    out_folder: OutFolder = None,
    name: RunName = None,
    exist_ok: ExistOk = False,
    resume: Resume = None,
    end_to_end: EndToEnd = False,
    top_k: TopK = None,
    fusion: Fusion = None,
    iou: NmsIou = None,
    device: Device = defaults.DEVICE,
    trust: Trust = False,
) -> None:
    """Change photos a little, so that the detector no longer finds the target, in the saved file and its transforms.

    Or finds it as something else, or what is not there: --goal.

    Exit code: 0 all succeeded, 1 some attacks failed, 2 wrong use or unreadable input (the rest is still done),
    3 nothing to attack: no photo has a target.
    """
    from detguard.attacks.budgets import parse_budget
    from detguard.attacks.group import AttackOptions
    from detguard.data.entries import LOST
    from detguard.data.inputs import as_photos, find_inputs
    from detguard.data.sources import LABELLED, as_lines, read_labelled, unlabelled
    from detguard.detectors.load import load_configured
    from detguard.objectives.parse import read_goal
    from detguard.photos import find_photos
    from detguard.runs import Run, shared_run
    from detguard.workflows.attack import attack_config, attack_job

    if resume:
        only_resumes(context)
    else:
        out_folder = run_folder(context)
    ranks = start_ranks(device)
    device = str(ranks.device) if ranks.count > 1 else device
    if resume:
        run = shared_run(ranks, lambda: Run.resume(resume, "attack"))
        with err.status("Loading the detector"):
            detectors = [
                load_configured(one, device, trust=trust) for one in (run.config["detector"], *run.config["also"])
            ]
        tell_apart(detectors)
        for why in run.config.get("left_out", []):
            show_lost(why)
    else:
        if photos and data:
            raise DetguardError("--data: instead of PHOTO; leave one of them out")
        if not photos and not data:
            raise DetguardError("PHOTO: give photos, folders or patterns, or --data (or --resume RUN)")
        if not data:
            only_with(context, ("class_map", "split"), "--data")
        else:
            only_of_splits(context, [data])
        other = "--rule apgd" if rule == "apgd" else ""
        other = "--black-box" if black_box else f"--aggregate {aggregate}" if aggregate != "mean" else other
        if other and schedule == "worst" and "schedule" in given(context):
            raise DetguardError(f"--schedule worst: {other} steps against the whole group; leave one of them out")
        if norm == "l2" and "/" in eps:
            raise DetguardError(f"--eps {eps}: of --norm l2, expected a number in which black to white counts as 1")
        files = find_inputs(photos, recursive=recursive) if photos else []
        shares = numbers("--weights", weights, "1,1,2")
        options = AttackOptions(
            budget=parse_budget(norm, levels(eps), mask), smallest=smallest, steps=steps, rule=rule,
            black_box=black_box, queries=queries, step=step, aggregate=aggregate,
            weights=tuple(shares) if shares else None, schedule=schedule, gradient=gradient, momentum=momentum,
            random_start=random_start, margin=margin, seed=seed, batch=batch,
        )  # fmt: skip
        objective = read_goal({
            "goal": goal, "target": target, "to": to, "strict": strict, "loss": loss, "count": count,
            "object": None if objects is None else whole_numbers("--object", objects),
            "box": numbers("--box", box, "10,20,200,300", 4), "keep_others": keep_others,
        })  # fmt: skip
        detectors = loaded(context, *(model or [defaults.MODEL]), device=device)
        tell_apart(detectors)
        options = replace(options, conf=conf or detectors[0].conf)
        kept, left_out = {}, list[str]()

        def on_data(name: str, faults: "Faults") -> None:
            show_warnings(name, faults)
            if LOST in faults:
                left_out.append(f"{name}: {'; '.join(fault_lines(faults, LOST))}")

        if data and unlabelled(data):
            if class_map:
                raise DetguardError(f"--map {class_map}: renames classes of labels, and --data {data} has none")
            if split != defaults.Evaluate.split:
                raise DetguardError(f"--split {split}: is of a data.yaml, and --data {data} has no splits")
            files = [str(file) for file in find_photos([data], recursive=recursive)]
        elif data:
            only_with(context, ("recursive",), "PHOTO, or --data of a folder without labels")
            labelled = read_labelled(data, split, detectors[0].class_names, on_data, class_map=parse_map(class_map))
            files = [str(one.file) for one in labelled]
            kept = {LABELLED: as_lines(labelled, detectors[0].class_names)}
        config = attack_config(
            detectors, options, objective=objective, transforms=transforms, samples=data is not None,
            arguments=sys.argv[1:],
        )  # fmt: skip

        only_of_films(context, files)
        config["left_out"] = left_out

        def lost(why: str) -> None:
            left_out.append(why)
            show_lost(why)

        shown = partial(
            as_photos, files, every=every, frames=frames, on_warning=show_warning, on_error=None if exist_ok else lost
        )
        with err.status("Reading the photos"):
            run = shared_run(
                ranks, lambda: Run.create("attack", out_folder, config, kept, exist_ok=exist_ok, photos=shown)
            )
    run.share(ranks)
    out.quiet = out.quiet or as_json
    sys.exit(run_attack(attack_job(run, detectors), ranks, as_json=as_json))


def only_of_films(context: typer.Context, sources: Sequence[str]) -> None:
    """See that --every and --frames are not given where no source has frames; an address may be of a video.

    Raises:
        DetguardError: they are.
    """
    from detguard.data.inputs import is_address, is_camera, is_video

    if not any(is_camera(one) or is_video(one) or is_address(one) for one in sources):
        only_with(context, ("every",), "a video or a camera")
    if not any(map(is_camera, sources)):
        only_with(context, ("frames",), "a camera")


def numbers(option: str, text: str | None, example: str, count: int | None = None) -> list[float] | None:
    """From "1,1,2" to [1.0, 1.0, 2.0]; count: how many there must be, any by default.

    Raises:
        DetguardError: not numbers, or not so many.
    """
    if text is None:
        return None
    try:
        read = [float(number) for number in text.split(",")]
    except ValueError:
        read = []
    if not read or not all(map(isfinite, read)) or count not in (None, len(read)):
        raise DetguardError(f"{option} '{text}': expected {count or ''} numbers, as in {example}".replace("  ", " "))
    return read


def run_attack(job: "Job", ranks: "Ranks", *, as_json: bool = False) -> int:
    """Attack what the run has not done yet, with live progress and a closing table; returns the exit code.

    ranks: each attacks its share of the photos; the first shows and closes the run.
    """
    from detguard.attacks.run import attack_photos
    from detguard.runs import photo_keys

    files = photo_keys([Path(p) for p in job.run.config["photos"]])
    places = {key: number for number, key in enumerate(files)}

    def in_order(records: "list[Record]") -> "list[Record]":
        return sorted(records, key=lambda record: places.get(record["key"], len(places)))

    def tidied() -> "list[Record]":
        # What failed to read or write before a stop is tried again; the rest stays as it is.
        before = [r for r in job.run.records() if r["status"] != "error"]
        job.run.keep(before)
        return before

    before = ranks.given(tidied)
    if before:
        out.print(f"{len(before)} photos done before")
    done = {r["key"] for r in before}
    waiting = dict([pair for pair in files.items() if pair[0] not in done][ranks.rank :: ranks.count])
    here: list[Record] = []
    with progress_bar(MofNCompleteColumn()) as progress:
        task = progress.add_task("attack", total=len(done) + len(waiting), completed=len(done))

        def on_step(active: Sequence["Attempt"]) -> None:
            progress.update(task, description=f"{active[0].key[:32]}: {active[0].progress}")

        try:
            for record in attack_photos(job, waiting, on_step):
                here.append(record)
                progress.advance(task)
                if ranks.first:
                    show_record(job, record, as_json=as_json)
        except KeyboardInterrupt:
            return show_stopped(job.run)
    made = ranks.gathered(here)
    if not ranks.first:
        ranks.end()
        return 0
    for record in made[len(here) :]:  # the first's own come first
        show_record(job, record, as_json=as_json)
    kept = job.run.records()
    if kept != (ordered := in_order(kept)):
        job.run.keep(ordered)
    code = show_attack(job, in_order([*before, *made]), files)
    ranks.end()
    return code


def show_attack(job: "Job", records: "list[Record]", files: dict[str, Path]) -> int:
    """Show what came of a run that is done, and write its page and its samples; returns the exit code."""
    from detguard.objectives.parse import wanted
    from detguard.reports.attack import MOST_NAMED, attack_page, failures, verdict
    from detguard.reports.attack_tables import attack_summary, survival_table
    from detguard.reports.tables import terminal_list

    attacked = [r for r in records if r["status"] in ("fooled", "failed")]
    if attacked:
        out.say(verdict(records, job.options, job.run.config), style="bold")
        title = f"Success rate. Goal: {wanted(job.run.config)}"
        out.print(survival_table(attacked, title, job.options.conf))
        failed = failures(attacked, job.run.config, job.options.conf)
        for line in failed[:MOST_NAMED]:
            out.say(f"not fooled: {line}")
        if len(failed) > MOST_NAMED:
            out.say(f"and {len(failed) - MOST_NAMED} more")
        job.run.write("report.html", attack_page(job.run, records, [one.detector for one in job.victims]))
    out.print(terminal_list(attack_summary(records, job.options, job.run.config)))
    if attacked and job.run.config["samples"]:
        show_samples(job, attacked, files)
    page = f", open {job.run.folder / 'report.html'}" if attacked else ""
    out.say(f"results: {job.run.folder}{page}")
    statuses = {r["status"] for r in records}
    return 2 if "error" in statuses else NOTHING if not attacked else 1 if "failed" in statuses else 0


def show_record(job: "Job", record: "Record", *, as_json: bool) -> None:
    """Show what needs to be shown at once of a photo that is done."""
    from detguard.objectives.parse import sought

    if as_json:
        print(json.dumps(record))
    if record["status"] == "error":
        show_error(record["error"])
    elif record["status"] == "no-target":
        of = f" by {record['detector']}" if "detector" in record else ""
        targets = job.victims[0].objective.needs_target
        found = f"no {sought(job.run.config)} found" if targets else "what is wanted is found already"
        out.say(f"{record['photo']}: skipped, {found}{of} (confidence {job.options.conf:g})")


def show_samples(job: "Job", attacked: list["Record"], files: dict[str, Path]) -> None:
    """Write what was made of the photos as a data set, and say where."""
    from detguard.attacks.samples import FOLDER, write_samples
    from detguard.data.sources import LABELLED
    from detguard.data.stream import read_lines
    from detguard.objectives.parse import GOALS

    names, labels = job.victims[0].detector.class_names, {}
    kept = job.run.folder / LABELLED
    if kept.is_file():
        by_file = defaultdict[str, deque["Labelled"]](deque)  # a photo may be there twice, with other labels
        for one in read_lines(kept, names):
            by_file[str(one.file)].append(one)
        labels = {key: by_file[str(file)].popleft() for key, file in files.items() if by_file[str(file)]}
    if not (count := write_samples(job.run, attacked, labels, names)):
        show_warning("no samples: there is no class that all photos are labelled for; attack those of each alone")
        return
    out.say(
        f"samples: {count} images, {'labelled as the data set' if labels else 'labels are what was found before'}, "
        f"{job.run.folder / FOLDER / 'data.yaml'}; photos {GOALS[job.run.config['goal']].spared} are left out"
    )


@app.command(
    epilog="""Examples:

`detguard detect bus.jpg`: a table of boxes, and the photo with boxes under runs/detect/

`detguard detect photos/ --json > boxes.jsonl`: one JSON object per photo

`detguard detect drive.mp4 --every 30`: frames of a video"""
)
def detect(
    context: typer.Context,
    photos: Annotated[list[str], PHOTOS],
    recursive: Recursive = False,
    every: Every = 1,
    frames: Frames = defaults.FRAMES,
    model: Model = defaults.MODEL,
    imgsz: ImageSize = None,
    conf: Confidence = None,
    as_json: Json = False,
    out_folder: OutFolder = None,
    name: RunName = None,
    exist_ok: ExistOk = False,
    end_to_end: EndToEnd = False,
    top_k: TopK = None,
    fusion: Fusion = None,
    iou: NmsIou = None,
    device: Device = defaults.DEVICE,
    trust: Trust = False,
) -> None:
    """Show what a detector finds in photos: as a table or JSON, and drawn on the photo."""
    from detguard.data.inputs import as_photos, find_inputs
    from detguard.detectors.load import detector_config
    from detguard.overlay import draw_detections
    from detguard.photos import encode_png, read_photo
    from detguard.reports.tables import detections_table
    from detguard.runs import Run, photo_keys

    out_folder = run_folder(context)
    sources = find_inputs(photos, recursive=recursive)
    only_of_films(context, sources)
    (detector,) = loaded(context, model, device=device)
    conf = conf or detector.conf
    if detector.nms_inside and conf < detector.nms_inside[0]:
        show_warning(
            f"--conf {conf:g}: the NMS of {model} is inside it, at {detector.nms_inside[0]:g} or so, and gives no less"
        )
    config = {"detector": detector_config(detector, model), "conf": conf, "arguments": sys.argv[1:]}
    shown = partial(
        as_photos, sources, every=every, frames=frames, on_warning=show_warning,
        on_error=None if exist_ok else show_lost,
    )  # fmt: skip
    with err.status("Reading the photos"):
        run = Run.create("detect", out_folder, config, exist_ok=exist_ok, photos=shown)
    code = 0
    for key, file in photo_keys([Path(one) for one in run.config["photos"]]).items():
        try:
            photo = read_photo(file)
            found = detector.predict(photo, conf)
            run.write(f"overlays/{key}.png", encode_png(draw_detections(photo, found, detector.class_names)))
            record = {"key": key, "photo": str(file), "detections": found.records(detector.class_names)}
            run.append(record)
        except DetguardError as error:
            show_error(str(error))
            code = 2
            continue
        if as_json:
            print(json.dumps(record))
        else:
            if len(found):
                out.print(detections_table(str(file), found, detector.class_names))
            else:
                out.say(f"{file}: nothing found over confidence {conf:g}")
    if not as_json:
        out.say(f"results: {run.folder}")
    sys.exit(code)


@app.command(
    epilog="""Examples:

`detguard verify runs/attack/001`: judge the saved files of a run once more

`detguard verify runs/attack/001 --transforms jpeg:40,gaussian:3,resize:0.5`: and after these

`detguard verify runs/attack/001 --json > judged.jsonl`: what is found on each photo and each copy of it, with boxes"""
)
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of an attack run.", metavar="RUN")],
    transforms: Annotated[
        str,
        typer.Option(
            help="Further transforms of the adversarial photo, which the exit code does not depend on; a range that "
            "is in the group is drawn anew."
        ),
    ] = "none",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per photo, with what is found on each member.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Judge by this detector, not the one attacked: do the photos fool it, too?")
    ] = None,
    device: Device = defaults.DEVICE,
    trust: Trust = False,
) -> None:
    """Read the saved files of an attack again, run the detector on each, and print survival per transform.

    Compares with the original photos, where they were. With --model another detector judges, on the photos in which it
    finds the target before the attack.

    Exit code: 0 every file of the group still fools the detector within its budget, 1 not, 2 unreadable files,
    3 nothing to judge: no photo was attacked, or the detector finds no target in any.
    """
    from detguard.attacks.group import AttackOptions
    from detguard.detectors.load import load_configured, load_detector
    from detguard.objectives.parse import GOALS
    from detguard.reports.attack_tables import survival_table
    from detguard.runs import Run
    from detguard.workflows.attack import verify as judge_run

    run = Run.open(folder, "attack")
    with err.status("Loading the detector"):
        other = None if model is None else load_detector(model, trust=trust, device=device)
        detector = other or load_configured(run.config["detector"], device, trust=trust)
    if model is None and (also := [one["model"] for one in run.config["also"]]):
        show_warning(
            f"judged by {detector.name} alone; the run attacked {', '.join(also)} as well: judge that by verify --model"
        )
    judged = judge_run(folder, detector, transforms=transforms)
    options = AttackOptions.from_config(run.config["attack"])
    budget, spared = options.budget, GOALS[run.config["goal"]].spared
    records, code, without = [], 0, 0
    total = sum(r.get("status") in ("fooled", "failed") for r in run.records(checked=False))
    for record in track(judged, "verify", total, console=err, transient=True, disable=not err.moves):
        if "error" in record:
            show_error(f"{folder}: {record['key']}: {record['error']}")
            code = 2
        elif "skipped" in record:
            without += 1
        else:
            records.append(record)
            for name, why in record["unjudged"].items():
                show_warning(f"{folder}: {record['key']}: {name} not judged: {why}")
            if as_json:
                used = record["used"]  # without bound where it changed what it must not
                print(json.dumps(record | {"used": used if math.isfinite(used) else None}))
    if without:
        show_warning(f"{without} photos left out: before the attack {spared} to {detector.name}")
    if records:
        used = max(r["used"] for r in records)
        if not as_json:
            title = f"{folder}: success rate, judged by {detector.name}"
            out.print(survival_table(records, title, options.conf))
            out.print(f"most of the budget used: {used:.4g} of {budget}")
        fooled = [all(r["members"][name]["fooled"] for name in r["group"]) for r in records]
        if not as_json:
            attacked = {one["sha256"] for one in (run.config["detector"], *run.config["also"])}
            fool = "fool" if other and other.state_hash() not in attacked else "still fool"
            told = f"{sum(fooled)} of {len(records)} photos {fool} {detector.name}, with every saved copy"
            out.say(told, style="bold")
        code = code or int(used > budget.eps or not all(fooled))
    elif not code:
        why = f"before the attack all are {spared} to {detector.name}" if without else "no photo of it was attacked"
        err.say(f"{folder}: nothing to judge: {why}")
    sys.exit(code if records else code or NOTHING)
