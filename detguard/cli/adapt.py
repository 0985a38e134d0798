"""`detguard adapt`: parse, call, show."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from detguard import DetguardError, defaults
from detguard.classes import parse_map, parse_names
from detguard.cli.app import (
    ClassMap,
    Device,
    ExistOk,
    JsonMade,
    OutFolder,
    Resume,
    RunName,
    Seed,
    Split,
    Trust,
    Workers,
    app,
    err,
    given,
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
    stop_signals,
)
from detguard.cli.evaluate import show_warnings
from detguard.cli.harden import Batch, last_loss, show_judgement, show_setback

if TYPE_CHECKING:
    from detguard.ranks import Ranks
    from detguard.workflows.adapt import Adapting

Replay = Annotated[
    list[str] | None,
    typer.Option(help="Photos of kinds that it knows: as --new, or a folder, labelled by what it finds; repeatable."),
]


T = TypeVar("T")


@app.command(
    epilog="""Examples:

`detguard adapt --model runs/harden/001/weights/sparse.safetensors --new dropped.jsonl --replay day/data.yaml`

`detguard adapt --model ensemble.safetensors --new fog/data.yaml --replay photos/ --experts 2 --mode full --lambda 10`

`detguard adapt --resume runs/adapt/001`: go on with a run that was stopped"""
)
def adapt(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="A gated ensemble, as detguard harden makes it.")] = None,
    new: Annotated[
        list[str] | None,
        typer.Option(
            help="Labelled photos of a new kind: a data.yaml, a COCO json, JSON lines, or a run of detguard attack "
            "--data; repeatable."
        ),
    ] = None,
    replay: Replay = None,
    split: Split = defaults.Adapt.split,
    class_map: ClassMap = None,
    experts: Annotated[int, typer.Option(min=0, help="New experts.")] = defaults.Adapt.experts,
    expert: Annotated[
        Literal["head", "adapter", "whole"],
        typer.Option(
            help="What a new expert has of its own: its head, small changes of another one's layers, or all of it."
        ),
    ] = defaults.Adapt.expert,
    mode: Annotated[
        Literal["auto", "full", "frozen"],
        typer.Option(help="full: all learns; frozen: new experts alone; auto: by how many photos are new."),
    ] = defaults.Adapt.mode,
    init: Annotated[
        Literal["best", "fresh"], typer.Option(help="New experts start as the best old one, or from random weights.")
    ] = defaults.Adapt.init,
    keep: Annotated[
        float, typer.Option("--lambda", min=0, max=1e6, help="Weight of staying what old experts were, in --mode full.")
    ] = defaults.Adapt.keep,
    max_experts: Annotated[
        int, typer.Option(min=1, max=64, help="Refuse to grow beyond so many experts.")
    ] = defaults.Adapt.max_experts,
    photos: Annotated[
        int | None,
        typer.Option(min=1, help="Photos to see, new and old, with repeats; default: 50 per new photo, 5,000 at most."),
    ] = None,
    corruptions: Annotated[
        str | None, typer.Option(help="Kinds of corruptions of old photos; default: those that it was hardened with.")
    ] = None,
    batch: Batch = defaults.Adapt.batch,
    rate: Annotated[
        float, typer.Option(min=1e-6, max=1, help="Highest learning rate, as a share of the weights.")
    ] = defaults.Adapt.rate,
    seed: Seed = defaults.Adapt.seed,
    out_folder: OutFolder = None,
    name: RunName = None,
    exist_ok: ExistOk = False,
    as_json: JsonMade = False,
    resume: Resume = None,
    device: Device = defaults.DEVICE,
    workers: Workers = None,
    trust: Trust = False,
) -> None:
    """Teach a gated ensemble a new kind of photos by new experts, without forgetting the kinds that it knows.

    One in five photos of each kind (at most 64) is kept for the figures before and after. Ctrl-C saves and stops.
    """
    from detguard.hardening.adapt import Adaptation
    from detguard.workflows.adapt import Adapting

    out.quiet = out.quiet or as_json
    if resume:
        only_resumes(context)
        ranks = start_ranks(device)
        with err.status("Loading the ensemble"):
            job = Adapting.resume(resume, ranks, trust=trust)
    else:
        out_folder = run_folder(context)
        if not model:
            raise DetguardError("--model: give the gated ensemble that detguard harden made (or --resume RUN)")
        if not new:
            raise DetguardError(
                "--new: give labelled photos of the new kind: a data.yaml, a COCO json or a .jsonl file"
            )
        only_of_splits(context, [*new, *(replay or [])])
        plan = {name: context.params[name] for name in given(context) if name in Adaptation.__dataclass_fields__}
        kinds = None if corruptions is None else parse_names(corruptions)
        job = start_adaptation(
            model, new, plan, start_ranks(device), replay=replay or [], split=split,
            class_map=parse_map(class_map), max_experts=max_experts,
            corruptions=kinds, out=out_folder, exist_ok=exist_ok, trust=trust,
        )  # fmt: skip
    sys.exit(run_adaptation(job, workers, as_json=as_json))


def start_adaptation(model: str, new: list[str], plan: dict[str, Any], ranks: "Ranks", **options: Any) -> "Adapting":
    """Make a run of what the options say, those of `Adapting.begin`."""
    from detguard.workflows.adapt import AUTO, Adapting

    with err.status("Loading the ensemble and the labels"):
        job = Adapting.begin(
            model, new, plan, ranks, arguments=sys.argv[1:], on_warning=show_warning, on_data=show_warnings, **options
        )
    if plan.get("mode", AUTO) == AUTO:
        config = job.run.config
        out.say(f"--mode auto: {config['adapt']['mode']}, {config['why']}")
    return job


def run_adaptation(job: "Adapting", workers: int | None, *, as_json: bool = False) -> int:
    """Grow and train what the run has not finished, with live progress; returns the exit code."""
    from detguard.reports.adaptation import adaptation_page, judged_before_after, verdict
    from detguard.workflows.harden import Trained

    run = job.run
    with err.status("Loading the photos"):
        job.load(workers)
    for message in job.unread:
        show_error(message)
    stopped = stop_signals()

    def judge_by(figures: Callable[[Callable[[], None]], T]) -> T:
        with progress_bar() as progress:
            judging = progress.add_task("judging", total=job.looks)

            def on_photo() -> None:
                if stopped and job.ranks.count == 1:  # others are in the training already, which stops them all
                    raise KeyboardInterrupt
                progress.advance(judging)

            return figures(on_photo)

    try:
        before = judge_by(job.figures)
        made = train_adaptation(job, stopped)
        judged = judge_by(partial(job.judgement, before))
    except KeyboardInterrupt:
        return show_stopped(run)
    if not job.ranks.first:
        return 0
    run.write("report.html", adaptation_page(run, judged, job.learned))
    show_judgement(verdict(judged), judged_before_after(judged, run.config))
    judge = f"detguard evaluate --model {shlex.quote(str(made))} --data ..."
    text = f"results: {made}, open {run.folder / 'report.html'}; judge it: {judge}"
    show_made(text, as_json=as_json, **asdict(Trained(made, run.folder, job.unread, before, judged.after, judged.by)))
    return 2 if job.unread else 0


def train_adaptation(job: "Adapting", stopped: list[int]) -> Path:
    """Train with live progress; returns the file of the ensemble.

    Raises:
        KeyboardInterrupt: a signal was noted in `stopped`.
    """
    with progress_bar() as progress:
        fitting = progress.add_task("whom to ask", total=1.0, visible=False)
        task = progress.add_task("adapt", total=1.0, visible=False)
        setbacks = list[float]()

        def on_fit(done: float) -> bool:
            progress.update(fitting, completed=done, visible=done < 1)
            return bool(stopped)

        def on_batch(_: int, done: float, losses: dict[str, float]) -> bool:
            progress.update(task, completed=done, description=f"adapt{last_loss(losses)}", visible=True)
            show_setback("adapt", losses, setbacks)
            return bool(stopped)

        return job.train(on_batch, on_fit)
