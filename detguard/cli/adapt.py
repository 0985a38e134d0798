"""`detguard adapt`: parse, call, show."""

import copy
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from detguard import DetguardError
from detguard.cli.app import (
    Device,
    OutFolder,
    Resume,
    Seed,
    Trust,
    Workers,
    app,
    err,
    out,
    progress_bar,
    shared_run,
    show_error,
    show_warning,
    start_ranks,
    stop_signals,
)
from detguard.cli.harden import (
    Batch,
    Rate,
    as_lines,
    chosen_kinds,
    is_folder,
    last_loss,
    photo_files,
    read_labelled,
    show_setback,
)

if TYPE_CHECKING:
    from detguard.data.stream import Labelled
    from detguard.detectors.gated import GatedNetwork
    from detguard.ranks import Ranks
    from detguard.runs import Run

    # New photos, and old ones with labels or without.
    Sources = tuple[list[Labelled], list[Labelled], list[Path]]

# Photos seen by default: so many for each new one, and at most.
VIEWS, MOST_VIEWS = 50, 5_000
# Of a run, its new photos and the old ones that are labelled.
KEPT = ("new.jsonl", "replay.jsonl")
Replay = Annotated[
    list[str] | None,
    typer.Option(help="Photos of kinds that it knows: as --new, or a folder, labelled by what it finds; repeatable."),
]


@app.command(
    epilog="""Examples:

`detguard adapt --model hard.safetensors --new runs/monitor/001/dropped.jsonl --replay day/data.yaml`

`detguard adapt --model hard.safetensors --new fog/data.yaml --replay photos/ --experts 2 --mode full --lambda 10`

`detguard adapt --resume runs/adapt/001`: go on with a run that was stopped"""
)
def adapt(
    model: Annotated[str | None, typer.Option(help="A gated ensemble, as detguard harden makes it.")] = None,
    new: Annotated[
        list[str] | None,
        typer.Option(help="Labelled photos of a new kind: a data.yaml, a COCO json or JSON lines; repeatable."),
    ] = None,
    replay: Replay = None,
    split: Annotated[str, typer.Option(help="Which split of a data.yaml.")] = "train",
    experts: Annotated[int, typer.Option(min=0, help="New experts.")] = 1,
    mode: Annotated[
        Literal["auto", "full", "frozen"],
        typer.Option(
            help="full: all learns; frozen: new experts and their gate rows; auto: by how many photos are new."
        ),
    ] = "auto",
    init: Annotated[
        Literal["best", "fresh"], typer.Option(help="New experts start as the best old one, or from random weights.")
    ] = "best",
    keep: Annotated[
        float, typer.Option("--lambda", min=0, max=1e6, help="Weight of staying what old experts were, in --mode full.")
    ] = 1.0,
    max_experts: Annotated[int, typer.Option(min=1, max=64, help="Refuse to grow beyond so many experts.")] = 12,
    photos: Annotated[
        int | None,
        typer.Option(min=1, help="Photos to see, new and old, with repeats; default: 50 per new photo, 5,000 at most."),
    ] = None,
    corruptions: Annotated[
        str | None, typer.Option(help="Kinds of corruptions of old photos; default: those that it was hardened with.")
    ] = None,
    batch: Batch = 16,
    rate: Rate = 1e-3,
    seed: Seed = 0,
    out_folder: OutFolder = None,
    resume: Resume = None,
    device: Device = "cpu",
    workers: Workers = None,
    trust: Trust = False,
) -> None:
    """Teach a gated ensemble a new kind of photos by new experts, without forgetting the kinds that it knows.

    One in five labelled photos (at most 64) is kept for the figures before and after. Ctrl-C saves and stops.
    """
    from detguard.runs import Run

    if resume:
        if model or new or replay:
            raise DetguardError("--resume: takes its model, data and options from the run; give no others")
        ranks = start_ranks(device)
        run = shared_run(ranks, lambda: Run.resume(resume, "adapt"))
        sys.exit(resume_adaptation(run, trust, ranks, workers))
    if not model:
        raise DetguardError("--model: give the gated ensemble that detguard harden made (or --resume RUN)")
    if not new:
        raise DetguardError("--new: give labelled photos of the new kind: a data.yaml, a COCO json or a .jsonl file")
    plan = {
        "experts": experts, "mode": mode, "init": init, "keep": keep, "batch": batch, "rate": rate, "seed": seed,
    } | ({"photos": photos} if photos else {})  # fmt: skip
    sys.exit(
        start_adaptation(
            model, new, replay or [], plan, start_ranks(device), split, max_experts, corruptions, out_folder, trust,
            workers,
        )
    )  # fmt: skip


def start_adaptation(
    model: str,
    new: list[str],
    replay: list[str],
    plan: dict[str, Any],
    ranks: "Ranks",
    split: str = "train",
    max_experts: int = 12,
    corruptions: str | None = None,
    out_folder: Path | None = None,
    trust: bool = False,
    workers: int | None = None,
) -> int:
    """Make a run of what the options say, and do it; returns the exit code."""
    from detguard.detectors.load import detector_config, load_detector, read_card
    from detguard.hardening.adapt import Adaptation, check_growth, choose_mode
    from detguard.runs import Run

    with err.status("Loading the ensemble and the labels"):
        network, imgsz = load_ensemble(model, trust)
        sources = read_sources(new, replay, split, network.class_names)
    count = len(sources[0])
    why = "as --mode says"
    if plan["mode"] == "auto":
        mode, why = choose_mode(count)
        plan = plan | {"mode": mode}
        out.print(f"--mode auto: {mode}, {why}", highlight=False, soft_wrap=True)
    if not replay:
        show_warning("without --replay nothing tells the gate when not to ask the new experts")
    if network.rule.number or network.rule.leads:
        show_warning(f"fusion {network.fusion} bounds what new experts may change of the adversarial one's answer")
    hardened = read_card(model).get("hardened")
    hardened = hardened if isinstance(hardened, dict) else {}
    eps, known = hardened.get("eps", Adaptation.eps), hardened.get("corruptions")
    corruptions = corruptions or (",".join(map(str, known)) if isinstance(known, list) else None)
    # Wrong options leave no run behind.
    adaptation = Adaptation(**({"photos": min(VIEWS * count, MOST_VIEWS)} | plan), eps=eps)
    check_growth(network, adaptation, max_experts)
    config = {
        "model": model,
        "detector": detector_config(load_detector(model, imgsz, trust), model),
        "data": {"new": new, "replay": replay, "split": split},
        "adapt": asdict(adaptation),
        "why": why,
        "corruptions": list(chosen_kinds(corruptions)),
        "arguments": sys.argv[1:],
    }
    kept = {name: as_lines(photos, network.class_names) for name, photos in zip(KEPT, sources[:2], strict=True)}
    config |= {"replayed": [str(file) for file in sources[2]]}
    run = shared_run(ranks, lambda: Run.create("adapt", out_folder, config, kept))
    return run_adaptation(run, network, imgsz, ranks, workers)


def resume_adaptation(run: "Run", trust: bool, ranks: "Ranks", workers: int | None = None) -> int:
    """Go on with a run; returns the exit code."""
    from detguard.detectors.load import load_configured

    with err.status("Loading the ensemble"):
        load_configured(run.config["detector"], trust)
        network, imgsz = load_ensemble(run.config["model"], trust)
    return run_adaptation(run, network, imgsz, ranks, workers)


def load_ensemble(model: str, trust: bool) -> "tuple[GatedNetwork, int]":
    """A gated ensemble and the frame size that it was made for."""
    from detguard.detectors.gated import GatedNetwork
    from detguard.detectors.load import load_model

    network, imgsz = load_model(model, trust)
    if not isinstance(network, GatedNetwork):
        raise DetguardError(f"{model}: expected a gated ensemble; make one of it with detguard harden")
    return network, imgsz


def read_sources(new: list[str], replay: list[str], split: str, class_names: dict[int, str]) -> "Sources":
    """New photos, and old ones with labels or without; a photo that is new is not replayed."""

    def labelled(sources: list[str]) -> "list[Labelled]":
        return [one for source in sources for one in read_labelled(source, split, class_names)]

    shown = labelled(new)
    if not shown:
        raise DetguardError(f"--new {', '.join(new)}: no photos there")
    folders = [source for source in replay if is_folder(source)]
    if folders and len(folders) < len(replay):
        raise DetguardError("--replay: give labelled photos or folders, not both")
    taken = {one.file.resolve() for one in shown}
    old = [one for one in labelled([] if folders else replay) if one.file.resolve() not in taken]
    files = [file for source in folders for file in photo_files(source) if file.resolve() not in taken]
    if replay and not (old or files):
        raise DetguardError(f"--replay {', '.join(replay)}: no photos there but those that are new")
    return shown, old, files


def run_adaptation(run: "Run", network: "GatedNetwork", imgsz: int, ranks: "Ranks", workers: int | None = None) -> int:
    """Grow and train what the run has not finished, with live progress; returns the exit code."""
    from detguard.data.batches import read_photos
    from detguard.detectors.gated import GatedDetector
    from detguard.detectors.load import read_card
    from detguard.hardening import adapt as adapting
    from detguard.hardening.train import Setting
    from detguard.photos import PhotoError, read_photo
    from detguard.reports.adaptation import adaptation_page, judged_table
    from detguard.reports.tables import terminal_table

    config, broken = run.config, list[str]()
    # As the run keeps them: a stream that goes on, or a folder that grows, does not change what is learned.
    kept = ranks.given(lambda: [read_labelled(str(run.folder / name), "", network.class_names) for name in KEPT])
    shown, labelled = kept
    files = [Path(file) for file in config["replayed"]]

    def readable(one: "Labelled") -> bool:
        try:
            read_photo(one.file)
        except PhotoError as error:
            broken.append(str(error))
            return False
        return True

    card = read_card(config["model"])
    with err.status("Loading the photos"):
        (shown, new_judged), (labelled, old_judged) = map(adapting.hold_out, (shown, labelled))
        new, unread = read_photos([(shown, 1.0)], imgsz, plain=True)
        broken += unread
        old = None
        if labelled or files:  # plain as well, or the gate would learn what augmentation looks like
            old, unread = read_photos([(labelled or files, 1.0)], imgsz, plain=True)
            broken += unread
        judged = {
            "new": [one for one in new_judged if readable(one)],
            "old": [one for one in old_judged if readable(one)],
        }
    for message in broken:
        show_error(message)
    plan = adapting.Adaptation(**config["adapt"])
    kinds = chosen_kinds(",".join(config["corruptions"]))
    setting = Setting.on(ranks, workers, plan.batch, imgsz, plan.seed, kinds)
    network.to(ranks.device)
    stopped = stop_signals()

    def figures() -> dict[str, dict[str, float | None]]:
        if not ranks.first:
            return {}
        detector = GatedDetector(copy.deepcopy(network), "", imgsz, str(ranks.device))
        with err.status("Judging"):
            return {kind: adapting.judge(detector, photos) for kind, photos in judged.items() if photos}

    before = figures()
    card |= {"adapted": [*card.get("adapted", []), config["adapt"] | {"from": Path(config["model"]).stem}]}
    with progress_bar() as progress:
        task = progress.add_task("adapt", total=plan.number)

        setbacks = list[float]()

        def on_batch(number: int, done: float, losses: dict[str, float]) -> bool:
            progress.update(task, completed=number + 1, description=f"adapt{last_loss(losses)}")
            show_setback("adapt", losses, setbacks)
            return bool(stopped)

        try:
            made = adapting.adapt(network, card, new, old, plan, setting, run, on_batch)
        except KeyboardInterrupt:
            show_error(f"stopped; go on with: detguard adapt --resume {run.folder}")
            return 130
    ranks.end()
    after = figures()
    if not ranks.first:
        return 0
    run.write("report.html", adaptation_page(run, before, after))
    out.print(terminal_table(judged_table(before, after)))
    text = f"results: {made}, open {run.folder / 'report.html'}; judge it: detguard evaluate --model {made} --data ..."
    out.print(text, highlight=False, soft_wrap=True)
    return 2 if broken else 0
