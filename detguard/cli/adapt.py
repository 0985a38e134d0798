"""`detguard adapt`: parse, call, show."""

import sys
from typing import Annotated, Literal

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
    run_folder,
    show_warning,
    start_ranks,
)
from detguard.cli.evaluate import show_warnings
from detguard.cli.harden import Batch, load, run_training

Replay = Annotated[
    list[str] | None,
    typer.Option(help="Photos of kinds that it knows: as --new, or a folder, labelled by what it finds; repeatable."),
]


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
            "(without --data, by what was found in the clean photos); repeatable."
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
    from detguard.reports.adaptation import adaptation_page, judged_before_after, verdict
    from detguard.workflows.adapt import AUTO, Adapting

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
        ranks = start_ranks(device)
        with err.status("Loading the ensemble and the labels"):
            job = Adapting.begin(
                model, new, plan, ranks, replay=replay or [], split=split, class_map=parse_map(class_map),
                max_experts=max_experts, corruptions=kinds, out=out_folder, exist_ok=exist_ok, trust=trust,
                arguments=sys.argv[1:], on_warning=show_warning, on_data=show_warnings,
            )  # fmt: skip
        if mode == AUTO:
            out.say(f"--mode auto: {job.run.config['adapt']['mode']}, {job.run.config['why']}")
    load(job, workers)
    sys.exit(run_training(
        job, lambda judged: adaptation_page(job.run, judged, job.learned), verdict,
        lambda judged: judged_before_after(judged, job.run.config), as_json=as_json,
    ))  # fmt: skip
