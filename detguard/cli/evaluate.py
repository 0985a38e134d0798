"""`detguard evaluate` and `compare`: parse, call, show."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detguard import DetguardError, defaults
from detguard.classes import parse_map, parse_names
from detguard.cli.app import (
    MODELS,
    NOTHING,
    ClassMap,
    Device,
    DryRun,
    EndToEnd,
    ExistOk,
    Fusion,
    Images,
    ImageSize,
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
    show_error,
    show_made,
    show_stopped,
    show_warning,
    start_ranks,
    tell_apart,
)

if TYPE_CHECKING:
    from detguard.data.entries import Faults
    from detguard.evaluation.floors import Floors
    from detguard.evaluation.metrics import Draws, Metrics
    from detguard.evaluation.run import Cost, Protocols
    from detguard.evaluation.views import Subject
    from detguard.ranks import Ranks
    from detguard.runs import Run

# Warnings of one kind that are shown one by one; the rest is counted.
MOST_SHOWN = 3


@app.command(
    epilog="""Examples:

`detguard evaluate --data my/data.yaml`: clean, corrupted and attacked AP of the bundled detector

`detguard evaluate --model yolo11n --model yolov8n --data my/data.yaml --protocols clean,corruptions`

`detguard evaluate --model best.pt --data instances_val.json --protocols attack,blackbox,checks --eps 2,4,8`

`detguard evaluate --data data.yaml --protocols clean --patch runs/patch/001/patch.png`: what a patch does to persons

`detguard evaluate --data data.yaml --protocols clean --universal runs/universal/001/universal.png`: one change for all

`detguard evaluate --resume runs/evaluate/001`: go on with a run that was stopped"""
)
def evaluate(
    context: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"{MODELS}; repeatable; default: detguard-n."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A data.yaml (Ultralytics), a COCO instances json, or coco, coco128, voc.")
    ] = None,
    split: Split = defaults.Evaluate.split,
    images: Images = None,
    classes: Annotated[str | None, typer.Option(help="Only these classes, comma-separated.")] = None,
    class_map: ClassMap = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many photos.")] = None,
    imgsz: ImageSize = None,
    protocols: Annotated[
        str, typer.Option(help="What to measure: clean, corruptions, attack, transfer, blackbox, checks.")
    ] = ",".join(defaults.Evaluate.protocols),
    severities: Annotated[str, typer.Option(help="Of the corruptions, 1 to 5.")] = ",".join(
        map(str, defaults.Evaluate.severities)
    ),
    corruptions: Annotated[
        str | None, typer.Option(help="Only these of the 15 corruptions, as fog,snow; mPC is then of them.")
    ] = None,
    corruption_file: Annotated[
        Path | None,
        typer.Option(help="A pipeline of your own, as albumentations.save writes it (.json or .yaml), to be judged."),
    ] = None,
    eps: Annotated[str, typer.Option(help="Attack budgets, as 2,4 or 2/255,4/255; the last one leads.")] = ",".join(
        map(str, defaults.Evaluate.eps)
    ),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of each white-box attack; default: 20, of a hardened detector 40.")
    ] = None,
    restarts: Annotated[
        int | None,
        typer.Option(
            min=1, help="Starts of each attack, at the photo, then at random; default: 1, of a hardened detector 2."
        ),
    ] = None,
    attacks: Annotated[
        str,
        typer.Option(
            help="White-box attacks: on the loss (class, box, all), on confidence (vanish), and on the order of what "
            "is found (rank)."
        ),
    ] = ",".join(defaults.Evaluate.attacks),
    queries: Annotated[
        int, typer.Option(min=1, help="Forward passes of the black-box attack per photo.")
    ] = defaults.Evaluate.queries,
    patch: Annotated[
        Path | None,
        typer.Option(help="A patch, as of detguard patch, to be judged on every labelled object of a class."),
    ] = None,
    patch_target: Annotated[str, typer.Option(help="The class that wears the patch.")] = defaults.Evaluate.patch_target,
    patch_size: PatchSize = defaults.Evaluate.patch_size,
    universal: Annotated[
        Path | None, typer.Option(help="A perturbation, as of detguard universal, to be added to every photo.")
    ] = None,
    save_images: Annotated[
        bool,
        typer.Option(
            "--save-images",
            help="Write each corrupted and attacked set into the run as a data set: images, YOLO labels, data.yaml, "
            "COCO json.",
        ),
    ] = False,
    fail_under: Annotated[
        str | None,
        typer.Option(
            metavar="AP=X",
            help="Exit code 1 where a model's figure is lower: AP=.2 of every protocol, clean.AP50=.6 of one.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print metrics.json instead of tables.")] = False,
    seed: Seed = defaults.Evaluate.seed,
    batch: Annotated[
        int, typer.Option(min=1, help="Photos of one shape that go through a detector together; more on a GPU.")
    ] = defaults.Evaluate.batch,
    out_folder: OutFolder = None,
    name: RunName = None,
    exist_ok: ExistOk = False,
    resume: Resume = None,
    dry_run: DryRun = False,
    end_to_end: EndToEnd = False,
    top_k: TopK = None,
    fusion: Fusion = None,
    iou: NmsIou = None,
    device: Device = defaults.DEVICE,
    trust: Trust = False,
) -> None:
    """Measure detectors in COCO numbers on clean, corrupted and attacked photos; makes tables, plots and a page.

    What was found on a photo is kept in runs/evaluate/cache.sqlite and used again; the file may be deleted.
    Exit code: 0 done, 1 less than --fail-under, 2 wrong use, or photos that could not be read (the rest is still done),
    3 checks alone, of too little to judge by.
    """
    from detguard.data.entries import LOST
    from detguard.detectors.load import detector_config, load_configured
    from detguard.evaluation.corruptions import PUBLISHED
    from detguard.evaluation.floors import read_floors
    from detguard.evaluation.pictures import check_pictures
    from detguard.evaluation.run import measure_cost
    from detguard.runs import Run, shared_run
    from detguard.workflows.evaluate import (
        RESTARTS,
        STEPS,
        load_subjects,
        only_of_gradients,
        only_of_protocols,
        plan,
        strength,
        warn_unchecked,
    )

    ranks = start_ranks(device)
    device = str(ranks.device) if ranks.count > 1 else device
    run: Run | None = None
    if resume:
        only_resumes(context)
        run = shared_run(ranks, lambda: Run.resume(resume, "evaluate"))
        config = run.config
        with err.status("Loading the detectors"):
            detectors = [load_configured(c, device, trust=trust) for c in config["detectors"]]
        tell_apart(detectors)
    else:
        out_folder = run_folder(context)
        if not data:
            raise DetguardError("--data: give a data.yaml, a COCO instances json or a known name (or --resume RUN)")
        only_of_splits(context, [data])
        models = model or [defaults.MODEL]
        config = {
            "detectors": [],
            "data": {
                "source": data, "split": split, "images": str(images) if images else None,
                "classes": None if classes is None else parse_names(classes), "limit": limit,
                "class_map": parse_map(class_map),
            },
            "evaluate": {
                "protocols": parse_names(protocols), "severities": whole_numbers("--severities", severities),
                "eps": [levels(one) for one in parse_names(eps)],
                "steps": steps or STEPS[0], "restarts": restarts or RESTARTS[0],
                "attacks": parse_names(attacks), "queries": queries, "seed": seed,
                "batch": batch,
                "patch": str(patch) if patch else None, "patch_target": patch_target, "patch_size": patch_size,
                "universal": str(universal) if universal else None, "save_images": save_images,
                "corruption_file": str(corruption_file) if corruption_file else None,
                "corruptions": list(PUBLISHED) if corruptions is None else parse_names(corruptions),
            },
            "arguments": sys.argv[1:],
        }  # fmt: skip
        asked = plan(config["evaluate"], len(models))
        only_of_protocols(given(context), asked)
        detectors = loaded(context, *models, device=device)
        tell_apart(detectors)
        only_of_gradients(given(context), asked, detectors)
        config["evaluate"] |= strength(detectors, steps, restarts)
        config["detectors"] = [detector_config(d, name) for d, name in zip(detectors, models, strict=True)]
    wanted = plan(config["evaluate"], len(detectors))
    floors = {} if fail_under is None else read_floors(fail_under, wanted.protocols)
    with err.status("Reading the annotations"):
        subjects = load_subjects(
            detectors, config["data"], wanted.batch, show_warning, on_data=show_warnings, ranks=ranks
        )
    warn_unchecked(subjects, wanted, show_warning)
    for subject in subjects:  # a wrong patch leaves no run behind
        check_pictures(subject, wanted.patches(subject.detector))
    lost = len(subjects[0].dataset.warnings[LOST])
    with err.status("Measuring a batch"):
        cost = measure_cost(subjects, wanted, ranks.count)
    if dry_run:
        if ranks.first:
            show_made(cost_line(cost), as_json=as_json, **asdict(cost))
        sys.exit(0)
    if not err.still:
        err.say(cost_line(cost))
    run = run or shared_run(ranks, lambda: Run.create("evaluate", out_folder, config, exist_ok=exist_ok))
    sys.exit(run_evaluation(run, subjects, wanted, lost, floors, ranks, cost.passes, as_json=as_json))


def cost_line(cost: "Cost") -> str:
    """What an evaluation takes, in one line."""
    from detguard.reports.tables import duration

    if not cost.left:
        return f"{cost.passes:,} forward passes, all of them known already"
    known = f", {cost.passes - cost.left:,} of them known already" if cost.left < cost.passes else ""
    more = f", and the time to corrupt {cost.altered:,} photos, about .02 s of a core each" if cost.altered else ""
    return f"{cost.passes:,} forward passes{known}: about {duration(cost.seconds)}, as measured on one batch{more}"


def whole_numbers(option: str, text: str) -> list[int]:
    """From "2,4" to [2, 4].

    Raises:
        DetguardError: not whole numbers.
    """
    try:
        return [int(number) for number in parse_names(text) or [text]]
    except ValueError:
        raise DetguardError(f"{option} '{text}': expected whole numbers, as in 2,4") from None


def show_warnings(_: str, faults: "Faults") -> None:
    """What was wrong with data: counted by kind, the first few in full; photos that are lost count in the exit code."""
    from detguard.data.entries import LOST

    err.lost = err.lost or LOST in faults
    for kind in faults:
        first, *places = fault_lines(faults, kind)
        show_warning(first)
        for line in places:
            err.say(f"  {line}")


def fault_lines(faults: "Faults", kind: str) -> list[str]:
    """How often data have a fault, and where first."""
    where = faults[kind]
    more = [f"and {where.total - MOST_SHOWN} more"] if where and where.total > MOST_SHOWN else []
    return [f"{where.total} {kind}", *where[:MOST_SHOWN], *more]


def run_evaluation(
    run: "Run",
    subjects: "list[Subject]",
    wanted: "Protocols",
    warned: int,
    floors: "Floors",
    ranks: "Ranks",
    passes: int,
    *,
    as_json: bool,
) -> int:
    """Evaluate what the cache does not hold yet, write everything out, show the tables; returns the exit code.

    warned: how many photos that cannot be read were shown before; as_json: show the metrics instead of tables;
    ranks: each evaluates its share of the photos, and the first writes and shows; passes: there are in all.
    """
    from detguard.data.entries import LOST
    from detguard.evaluation.floors import shortfalls
    from detguard.evaluation.run import evaluate
    from detguard.reports.evaluation import evaluation_page, tables, verdict

    dataset = subjects[0].dataset
    with progress_bar() as progress:
        task = progress.add_task("evaluate", total=passes)
        try:
            evaluation = evaluate(
                subjects, wanted, run, lambda what, done: progress.update(task, description=what, advance=done), ranks
            )
        except KeyboardInterrupt:
            return show_stopped(run)
    if not ranks.first:
        return 0
    command = ["detguard", *run.config["arguments"]]
    run.write("report.html", evaluation_page(subjects, evaluation, wanted, command))
    if as_json:
        print(json.dumps(evaluation.metrics))
    else:
        out.say(verdict(evaluation.metrics), style="bold")
        first, *others = tables(evaluation.metrics)
        for table in (first.turned, *others):
            out.print(table)
        out.say(f"results: {run.folder}, open {run.folder / 'report.html'}")
        if wanted.save_images and (made := run.folder / "datasets").exists():
            out.say(f"data sets: {made}")
    short = list(shortfalls(evaluation.metrics, floors))
    for line in short:
        show_error(line)
    for line in dataset.warnings[LOST][warned:]:
        show_error(line)
    if dataset.warnings[LOST]:
        return 2
    checks = [check for found in evaluation.metrics.values() for check in found.get("checks", {}).values()]
    if wanted.checks_alone and any(check["passed"] is None for check in checks):
        return NOTHING
    return int(bool(short))


@app.command(
    epilog="""Examples:

`detguard compare runs/evaluate/001 runs/evaluate/002`

`detguard compare runs/evaluate/001 runs/evaluate/002 --page comparison.html`"""
)
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of evaluate runs.", metavar="RUN RUN...")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per run and model instead of a table.")
    ] = False,
    page: Annotated[Path | None, typer.Option(help="Write the comparison as a page to this .html file, too.")] = None,
) -> None:
    """Show the results of several evaluate runs side by side, and which differences are more than chance.

    Figures of other photos or budgets are not compared: a warning says why.
    """
    from detguard.evaluation.metrics import DRAWS, METRICS, read_draws, read_metrics
    from detguard.files import write_file
    from detguard.reports.comparison import comparison_page, comparison_tables, differences
    from detguard.reports.page import short_names
    from detguard.runs import Run

    if page is not None and page.suffix != ".html":
        raise DetguardError(f"--page {page}: expected a file that ends in .html")
    metrics: Metrics = {}
    draws: Draws = {}
    for folder, short in zip(folders, short_names(folders), strict=True):
        made = Run.open(folder, "evaluate").folder
        found, drawn = read_metrics(made / METRICS), read_draws(made / DRAWS)
        metrics |= {f"{short}: {name}": row for name, row in found.items()}
        draws |= {f"{short}: {name}": drawn.get(name, {}) for name in found}
    changes, warnings = differences(metrics, draws)
    if as_json:
        for name, row in metrics.items():
            over = {k: {"value": d.value, "error": d.error} for k, d in changes.get(name, {}).items()}
            print(json.dumps({"name": name, "metrics": row, "difference": over}))
    else:
        for table in comparison_tables(metrics, changes):
            out.print(table)
    for line in warnings:
        show_warning(line)
    if page is not None:
        write_file(page, comparison_page(metrics, changes, warnings, ["detguard", *sys.argv[1:]]))
        if not as_json:
            out.say(f"page: {page}")
