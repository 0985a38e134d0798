"""`detguard harden`: parse, call, show."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from detguard import DetguardError, defaults
from detguard.classes import parse_map, parse_names
from detguard.cli.app import (
    ClassMap,
    Device,
    DryRun,
    Eps,
    ExistOk,
    Fusion,
    JsonMade,
    OutFolder,
    Resume,
    RunName,
    Seed,
    TopK,
    Trust,
    Workers,
    app,
    err,
    given,
    levels,
    only_resumes,
    out,
    progress_bar,
    run_folder,
    show_error,
    show_made,
    show_stopped,
    show_warning,
    start_ranks,
    stop_signals,
    tell_size,
)
from detguard.cli.evaluate import show_warnings

if TYPE_CHECKING:
    from detguard.hardening.judging import Judgement
    from detguard.reports.tables import Table
    from detguard.schema import Config
    from detguard.workflows.adapt import Adapting
    from detguard.workflows.harden import Hardening

Corruptions = Annotated[
    str | None, typer.Option(help="Kinds of corruptions of hard photos, as in fog,snow; default: all 15.")
]
Batch = Annotated[int, typer.Option(min=2, help="Photos per batch.")]
Rate = Annotated[
    float | None,
    typer.Option(
        min=1e-6,
        max=1,
        help=f"Highest learning rate, as a share of the weights; default: {defaults.Harden.rate:g}, and a third of it "
        "where MODEL is what harden made by the same recipe, and goes on.",
    ),
]


@app.command(
    epilog="""Examples:

`detguard harden --model best.pt --data photos/ --photos 200000`: a gated ensemble of three experts

`detguard harden --model best.pt --data photos/ --recipe pgd`: the baseline, one adversarially trained network

`detguard harden --model best.pt --data my/data.yaml --learn both`: by labels, too

`detguard harden --model best.pt --data photos/ --pretrain more/photos/`: on a backbone that is made robust first

`detguard harden --model best.pt --data photos/ --transforms median:3,jpeg:75`: against attacks that survive filters

`detguard harden --model best.pt --data photos/ --samples runs/attack/001`: with photos of an attack, too

`detguard harden --resume runs/harden/001`: go on with a run that was stopped"""
)
def harden(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            help="Of Ultralytics' YOLO families: bundled name, .pt or .safetensors file, or a name such as yolo11n; or "
            "what harden made, which goes on."
        ),
    ] = defaults.MODEL,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Folder or pattern of photos, or a data.yaml, COCO json or JSON lines; repeatable."),
    ] = None,
    recipe: Annotated[
        Literal["gated", "pgd", "mtd", "finetune"],
        typer.Option(
            help="gated: experts and a gate; baselines of one network: pgd, attacked; mtd, by the worse of an attack "
            "on classes and one on boxes; finetune, not attacked."
        ),
    ] = defaults.Harden.recipe,
    learn: Annotated[
        Literal["teacher", "labels", "both"],
        typer.Option(
            help="What is wanted of changed photos: what --teacher says of the clean ones, the labels of --data, or "
            "both."
        ),
    ] = defaults.Harden.learn,
    pretrain: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or pattern of any photos, by which the backbone is made robust first; repeatable. Needs no "
            "labels, nor the classes."
        ),
    ] = None,
    samples: Annotated[
        list[str] | None,
        typer.Option(
            help="Run of detguard attack, whose photos become a quarter of the adversarial frames; repeatable. "
            "What is in the clean ones is, by --learn, what --teacher says, their labels, or both."
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Detector to imitate, which may be larger and know more classes; default: --model. Needed where "
            "--model is hardened already."
        ),
    ] = None,
    mode: Annotated[
        Literal["full", "freeze-first"],
        typer.Option(help="What the joint stage trains: everything, or the adversarial expert and the gate."),
    ] = defaults.Harden.mode,
    split: Annotated[
        str,
        typer.Option(
            help="What experts do not share: backbone (whole networks, of which all but the adversarial start "
            "undefended), neck (and head), head, or from layer N."
        ),
    ] = defaults.Harden.split,
    photos: Annotated[
        int, typer.Option(min=1, help="Photos to see in all stages together, with repeats.")
    ] = defaults.Harden.photos,
    hours: Annotated[
        float | None,
        typer.Option(min=0.001, max=10_000, help="Hours to train in all stages together, instead of --photos."),
    ] = None,
    imgsz: Annotated[
        int | None, typer.Option(min=64, max=1280, help="Size of a frame; default: the model's own.")
    ] = None,
    crop: Annotated[
        int | None,
        typer.Option(
            min=64,
            max=1280,
            help="Side of the frames in training, parts of photos at the same scale; smaller is faster.",
        ),
    ] = None,
    attack: Annotated[
        Literal["free", "pgd", "fgsm"] | None,
        typer.Option(
            help="free: every step of the attack trains too; pgd: the last alone; fgsm: one, from the photo; default: "
            "free, by mtd pgd."
        ),
    ] = None,
    eps: Eps = str(defaults.Harden.eps),
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each attack; default: 2, by fgsm 1.")] = None,
    mix: Annotated[
        float, typer.Option(min=0, max=1, help="Share of other kinds in each expert's photos.")
    ] = defaults.Harden.mix,
    tune_normal: Annotated[
        bool, typer.Option("--tune-normal", help="Train the normal expert, too, instead of keeping --model as it is.")
    ] = False,
    transforms: Annotated[
        str,
        typer.Option(
            help="What attacked photos go through in training, each by one of these or by none, as in "
            "median:3,jpeg:75: what is learned is what survives."
        ),
    ] = defaults.Harden.transforms,
    top_k: TopK = None,
    fusion: Fusion = defaults.Harden.fusion,
    sparse: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="In the end, values of the adversarial expert within so many standard deviations of the mean of their "
            "channel are set to it, which leaves attacks less to move; 0: not.",
        ),
    ] = defaults.Harden.sparse,
    corruptions: Corruptions = None,
    class_map: ClassMap = None,
    batch: Batch = defaults.Harden.batch,
    rate: Rate = None,
    log: Annotated[
        str | None,
        typer.Option(
            metavar="TRACKER", help="Log losses to tensorboard, into the run; or to wandb, mlflow, ... of Accelerate's."
        ),
    ] = None,
    seed: Seed = defaults.Harden.seed,
    out_folder: OutFolder = None,
    name: RunName = None,
    exist_ok: ExistOk = False,
    as_json: JsonMade = False,
    resume: Resume = None,
    dry_run: DryRun = False,
    device: Device = defaults.DEVICE,
    workers: Workers = None,
    trust: Trust = False,
) -> None:
    """Train a detector that holds up under attacks: experts for normal, hard and adversarial photos, and their gate.

    No labels are needed: experts learn to say of a changed photo what the detector given says of the clean one, and
    with --learn what labels say. One in 20 photos (at most 32) is held out: AP clean and attacked, before and after.
    Ctrl-C saves and stops. Judge the result with `detguard evaluate --protocols clean,corruptions,attack,checks`.
    """
    from detguard.hardening.run import Plan
    from detguard.hardening.trackers import check_tracker, track
    from detguard.reports.hardening import hardening_page, judged_before_after, verdict
    from detguard.workflows.harden import Hardening

    if log:  # what is not installed leaves no run behind
        check_tracker(log)
    if resume:
        only_resumes(context)
        ranks = start_ranks(device)
        with err.status("Loading the detector"):
            job = Hardening.resume(resume, ranks, trust=trust)
    else:
        out_folder = run_folder(context)
        if dry_run:
            out_folder = Path(context.with_resource(TemporaryDirectory(prefix="detguard-")))
        if not data:
            raise DetguardError(
                "--data: give a folder or pattern of photos, a data.yaml or a COCO json (or --resume RUN)"
            )
        fields = Plan.__dataclass_fields__.keys() - {"pretrain"}  # of which there are photos
        plan: Config = {name: context.params[name] for name in given(context) if name in fields}
        plan |= {"eps": levels(eps)} if "eps" in plan else {}
        ranks = start_ranks(device)
        with err.status("Loading the detector"):
            job = Hardening.begin(
                model, data, plan, ranks, teacher=teacher, pretrain=pretrain or [], samples=samples or [], imgsz=imgsz,
                corruptions=None if corruptions is None else parse_names(corruptions), class_map=parse_map(class_map),
                out=out_folder, exist_ok=exist_ok, trust=trust,
                arguments=sys.argv[1:], on_data=show_warnings,
            )  # fmt: skip
        tell_size(imgsz, [job.given])
    out.quiet = out.quiet or as_json
    if dry_run:
        sys.exit(show_cost(job, workers, as_json=as_json))
    if log and job.ranks.first:
        track(job.run, log, show_warning)
    load(job, workers)
    if (passes := job.passes()) and not err.still:
        err.say(f"{passes:,} forward and backward passes of whole frames; --dry-run measures how long they take")
    sys.exit(run_training(
        job, lambda judged: hardening_page(job.run, judged), lambda judged: verdict(judged, job.run.config),
        judged_before_after, as_json=as_json,
    ))  # fmt: skip


def show_cost(job: "Hardening", workers: int | None, *, as_json: bool) -> int:
    """Say what the stages of a run take, which is then spent; returns the exit code."""
    from detguard.reports.hardening import cost_table
    from detguard.reports.tables import duration

    load(job, workers)
    with err.status("Measuring a batch of each stage"):
        costs = job.trial()
    if not job.ranks.first:
        return 0
    out.print(cost_table(costs))
    passes, seconds = (sum(getattr(cost, of) for cost in costs.values()) for of in ("passes", "seconds"))
    stages = {name: vars(cost) for name, cost in costs.items()}
    text = f"{passes:,} forward and backward passes in all: about {duration(seconds)}, as measured on a batch of each"
    show_made(f"{text} stage", as_json=as_json, passes=passes, seconds=seconds, stages=stages)
    return 2 if job.unread else 0


def load(job: "Hardening | Adapting", workers: int | None) -> None:
    """Read the photos of a run, and show those that cannot be read."""
    with err.status("Loading the photos"):
        job.load(workers)
    for message in job.unread:
        show_error(message)


def last_loss(losses: dict[str, float]) -> str:
    """What a progress bar says of the last record, where there is one."""
    return f": loss {losses['loss']:.2f}" if "loss" in losses else ""


def show_setback(name: str, losses: dict[str, float], shown: list[float]) -> None:
    """Say once that a stage has gone back; `shown`: what was printed of it."""
    at = losses.get("diverged")
    if at is not None and losses["setbacks"] not in shown:
        shown.append(losses["setbacks"])
        show_warning(f"{name}: diverged at batch {at:.0f}; it went back to its checkpoint, at half the rate")


def run_training(
    job: "Hardening | Adapting",
    page: "Callable[[Judgement], bytes]",
    verdict: "Callable[[Judgement], str]",
    table: "Callable[[Judgement], Table]",
    *,
    as_json: bool = False,
) -> int:
    """Train what a run that is loaded has not finished, with live progress; returns the exit code.

    page, verdict, table: what is told of how good the detector was on photos held out, and is.
    """
    run, stopped = job.run, stop_signals()
    with progress_bar() as progress:
        setbacks = dict[str, list[float]]()
        task = progress.add_task(run.config["command"], total=1.0)

        def on_stage(name: str, done: float, losses: dict[str, float]) -> bool:
            if done < progress.tasks[0].completed:  # begun anew: the time left is not that of what went before
                progress.reset(task)
            progress.update(task, completed=done, description=f"{name}{last_loss(losses)}")
            show_setback(name, losses, setbacks.setdefault(name, []))
            return bool(stopped)

        try:
            made = job.train(on_stage)
        except KeyboardInterrupt:
            return show_stopped(run)
    if not job.ranks.first:
        return 0
    run.write("report.html", page(job.judgement))
    out.say(verdict(job.judgement), style="bold")
    if (figures := table(job.judgement)).rows:
        out.print(figures)
    report, judge = run.folder / "report.html", f"detguard evaluate --model {shlex.quote(str(made.weights))} --data ..."
    show_made(f"results: {made.weights}, open {report}; judge it: {judge}", as_json=as_json, **asdict(made))
    return 2 if job.unread else 0
