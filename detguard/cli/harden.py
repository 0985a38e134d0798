"""`detguard harden`: parse, call, show."""

import glob
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from detguard import DetguardError
from detguard.cli.app import (
    Device,
    Fusion,
    Model,
    OutFolder,
    Resume,
    Seed,
    TopK,
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
from detguard.cli.evaluate import names, show_warnings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detguard.data.stream import Labelled
    from detguard.ranks import Ranks
    from detguard.runs import Run

# Of a run that learns labels, its photos with them.
LABELLED = "labelled.jsonl"
Corruptions = Annotated[
    str | None, typer.Option(help="Kinds of corruptions of hard photos, as in fog,snow; default: all 15.")
]
Batch = Annotated[int, typer.Option(min=2, help="Photos per batch.")]
Rate = Annotated[float, typer.Option(min=1e-6, max=1, help="Highest learning rate, as a share of the weights.")]


@app.command(
    epilog="""Examples:

`detguard harden --model best.pt --data photos/ --photos 200000`: a gated ensemble of three experts

`detguard harden --model best.pt --data photos/ --recipe pgd`: the baseline, one adversarially trained network

`detguard harden --model best.pt --data my/data.yaml --learn both`: by labels, too

`detguard harden --model best.pt --data photos/ --pretrain more/photos/`: on a backbone that is made robust first

`detguard harden --resume runs/harden/001`: go on with a run that was stopped"""
)
def harden(
    model: Model = "detguard-n",
    data: Annotated[
        list[str] | None, typer.Option(help="Folder or pattern of photos, or a data.yaml or COCO json; repeatable.")
    ] = None,
    recipe: Annotated[
        Literal["gated", "pgd", "mtd", "finetune"],
        typer.Option(
            help="gated: experts and a gate; baselines of one network: pgd, attacked; mtd, by the worse of an attack "
            "on classes and one on boxes; finetune, not attacked."
        ),
    ] = "gated",
    learn: Annotated[
        Literal["teacher", "labels", "both"],
        typer.Option(
            help="What is wanted of changed photos: what --teacher says of the clean ones, the labels of --data, or "
            "both."
        ),
    ] = "teacher",
    pretrain: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or pattern of any photos, by which the backbone is made robust first; repeatable. Needs no "
            "labels, nor the classes."
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
    ] = "freeze-first",
    split: Annotated[
        str,
        typer.Option(
            help="What experts do not share: backbone (whole networks, of which all but the adversarial start "
            "undefended), neck (and head), head, or from layer N."
        ),
    ] = "backbone",
    photos: Annotated[int, typer.Option(min=1, help="Photos to see in all stages together, with repeats.")] = 100_000,
    hours: Annotated[
        float | None,
        typer.Option(min=0.01, max=10_000, help="Hours to train in all stages together, instead of --photos."),
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
    eps: Annotated[float, typer.Option(min=0.1, max=64, help="Budget of the attacks, levels of 255.")] = 4,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each attack; default: 2, by fgsm 1.")] = None,
    mix: Annotated[float, typer.Option(min=0, max=1, help="Share of other kinds in each expert's photos.")] = 0.2,
    top_k: TopK = None,
    fusion: Fusion = "bounded:0.25",
    sparse: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="In the end, values of the adversarial expert within so many standard deviations of the mean of their "
            "channel are set to it, which leaves attacks less to move; 0: not.",
        ),
    ] = 0.2,
    corruptions: Corruptions = None,
    batch: Batch = 32,
    rate: Rate = 3e-3,
    seed: Seed = 0,
    out_folder: OutFolder = None,
    resume: Resume = None,
    device: Device = "cpu",
    workers: Workers = None,
    trust: Trust = False,
) -> None:
    """Train a detector that holds up under attacks: experts for normal, hard and adversarial photos, and their gate.

    No labels are needed: experts learn to say of a changed photo what the detector given says of the clean one, and
    with --learn what labels say.
    Ctrl-C saves and stops. Judge the result with `detguard evaluate --protocols clean,corruptions,attack,checks`.
    """
    from detguard.detectors.gated import GatedNetwork
    from detguard.detectors.load import detector_config, load_configured, load_detector, load_model
    from detguard.hardening.run import Plan, check_teacher, split_layer
    from detguard.runs import Run

    if resume:
        if data:
            raise DetguardError("--resume: takes its model, data and options from the run; give no others")
        ranks = start_ranks(device)
        run = shared_run(ranks, lambda: Run.resume(resume, "harden"))
        with err.status("Loading the detector"):
            _, imitated = (load_configured(one, trust, str(ranks.device)) for one in run.config["detectors"])
            network = load_model(run.config["model"], trust)[0]
        sys.exit(run_hardening(run, network, imitated, ranks, workers))
    if not data:
        raise DetguardError("--data: give a folder or pattern of photos, a data.yaml or a COCO json (or --resume RUN)")
    # What a recipe or an attack cannot be without.
    attack = attack or ("pgd" if recipe == "mtd" else "free")
    steps = steps or (1 if attack == "fgsm" else 2)
    plan: dict[str, Any] = {
        "recipe": recipe, "learn": learn, "pretrain": bool(pretrain), "mode": mode, "split": split, "photos": photos,
        "hours": hours, "crop": crop, "attack": attack, "eps": eps, "steps": steps, "mix": mix, "top_k": top_k,
        "fusion": fusion, "sparse": sparse, "batch": batch, "rate": rate, "seed": seed,
    }  # fmt: skip
    Plan(**plan)  # a wrong option leaves no run behind
    ranks = start_ranks(device)
    with err.status("Loading the detector"):
        network = load_model(model, trust)[0]
        given, imitated = (load_detector(name, imgsz, trust, str(ranks.device)) for name in (model, teacher or model))
        check_teacher(network, imitated, teacher or model, recipe, bool(pretrain))
        if isinstance(network, GatedNetwork) and len(network.names) > 1:  # it has one already
            plan["split"] = split = str(network.split)
        split_layer(network.single(0) if isinstance(network, GatedNetwork) else network, split)
    class_names = known_classes(network)
    labelled = labelled_photos(data, learn, class_names) if learn != "teacher" else []
    files = [] if labelled else [str(file) for source in data for file in photo_files(source)]
    config = {
        "model": model,
        "detectors": [detector_config(given, model), detector_config(imitated, teacher or model)],
        "harden": plan,
        "corruptions": list(chosen_kinds(corruptions)),
        "arguments": sys.argv[1:],
        "photos": files,
        "pretrain": [str(file) for source in pretrain or [] for file in photo_files(source)],
    }
    kept = {LABELLED: as_lines(labelled, class_names)} if labelled else {}
    run = shared_run(ranks, lambda: Run.create("harden", out_folder, config, kept))
    sys.exit(run_hardening(run, network, imitated, ranks, workers))


def known_classes(network: Any) -> dict[int, str]:
    """The classes of a network to be hardened, by number; hardened ones keep them under another name."""
    from detguard.detectors.gated import GatedNetwork

    return network.class_names if isinstance(network, GatedNetwork) else network.names


def chosen_kinds(text: str | None) -> tuple[str, ...]:
    """The kinds of corruptions that an option names, by default all.

    Raises:
        DetguardError: one of them is not known.
    """
    from detguard.data.corruptions import KINDS

    kinds = tuple(KINDS) if text is None else tuple(names(text))
    if not kinds or not set(kinds) <= KINDS.keys():
        raise DetguardError(f"--corruptions {text}: expected some of {', '.join(KINDS)}")
    return kinds


def photo_files(source: str) -> list[Path]:
    """The photos of a folder, a pattern or a data set's training split; folders `images/train` and the like too."""
    from detguard.photos import find_photos

    if Path(source).suffix in (".yaml", ".yml", ".json"):
        from detguard.data.dataset import read_dataset

        return list(read_dataset(source, "train").files.values())
    return find_photos([source])


def labelled_photos(sources: list[str], learn: str, class_names: dict[int, str]) -> "list[Labelled]":
    """The labelled photos of --data, in the detector's class indices.

    Raises:
        DetguardError: some of it has no labels.
    """
    for source in filter(is_folder, sources):
        raise DetguardError(f"--learn {learn}: {source} has no labels; give a data.yaml or a COCO json (--data)")
    return [one for source in sources for one in read_labelled(source, "train", class_names)]


def is_folder(source: str) -> bool:
    """Whether a source is a folder or pattern of photos, without labels."""
    path = Path(source)
    return not (path / "data.yaml").is_file() if path.is_dir() else not path.exists() and glob.has_magic(source)


def as_lines(photos: "Sequence[Labelled]", class_names: dict[int, str]) -> bytes:
    """Labelled photos as a run keeps them, for `read_labelled`."""
    from detguard.data.stream import as_line

    return "".join(json.dumps(as_line(one, class_names)) + "\n" for one in photos).encode()


def read_labelled(source: str, split: str, class_names: dict[int, str]) -> "list[Labelled]":
    """The labelled photos of a data.yaml, a COCO json or a file of JSON lines, in the detector's class indices."""
    from detguard.data.dataset import read_dataset
    from detguard.data.stream import in_order, read_lines

    if Path(source).suffix == ".jsonl":
        return read_lines(source, class_names)
    dataset = read_dataset(source, split)
    show_warnings(dataset)
    return list(in_order(dataset, dataset.category_ids(class_names)))


def last_loss(losses: dict[str, float]) -> str:
    """What a progress bar says of the last record, where there is one."""
    return f": loss {losses['loss']:.2f}" if "loss" in losses else ""


def show_setback(name: str, losses: dict[str, float], shown: list[float]) -> None:
    """Say once that a stage has gone back; `shown`: what was said of it."""
    at = losses.get("diverged")
    if at is not None and losses["setbacks"] not in shown:
        shown.append(losses["setbacks"])
        show_warning(f"{name}: diverged at batch {at:.0f}; it went back to its checkpoint, at half the rate")


def run_hardening(run: "Run", network: Any, teacher: Any, ranks: "Ranks", workers: int | None) -> int:
    """Train what the run has not finished, with the network and teacher of its config; returns the exit code."""
    from detguard.data.batches import read_photos
    from detguard.detectors.gated import GatedNetwork
    from detguard.detectors.load import read_card
    from detguard.hardening.run import Plan, harden, passes
    from detguard.hardening.train import Setting
    from detguard.hardening.validation import Validation, file_of, hold_out
    from detguard.reports.hardening import hardening_page

    config = run.config
    plan, imgsz = Plan(**config["harden"]), config["detectors"][0]["imgsz"]
    class_names = known_classes(network)
    with err.status("Loading the photos"):
        photos: Sequence[Any] = [Path(file) for file in config["photos"]]
        if plan.learn != "teacher":  # as the run keeps them
            photos = ranks.given(lambda: read_labelled(str(run.folder / LABELLED), "", class_names))
        trained, held_out = hold_out(photos)
        source, broken = read_photos([(trained, 1.0)], imgsz)
        held, first = Validation.of(held_out, imgsz), None
        if plan.pretrain:
            kept = {file_of(one).name for one in held_out}
            files = [file for name in config.get("pretrain", []) if (file := Path(name)).name not in kept]
            first, unread = read_photos([(files, 1.0)], imgsz)
            broken += unread
    for message in broken:
        show_error(message)
    gated = isinstance(network, GatedNetwork)
    made_of = read_card(config["model"])["architecture"] if gated else str(network.yaml.get("yaml_file", ""))
    card: dict[str, Any] = {
        "architecture": Path(made_of).name,
        "classes": list(class_names.values()),
        "imgsz": imgsz,
        "licence": "AGPL-3.0-or-later",
        "hardened": {
            "from": Path(config["model"]).stem,
            "teacher": teacher.name,
            "corruptions": config["corruptions"],
            **config["harden"],
        },
    }
    kinds = chosen_kinds(",".join(config["corruptions"]))
    setting = Setting.on(ranks, workers, plan.batch, imgsz, plan.seed, kinds)
    stopped = stop_signals()
    # In forward-backward passes or seconds, so that the time left is right in stages with and without attacks.
    stages = plan.stages(network)
    costs = {s.name: s.seconds or passes(s, imgsz) * (s.number or 0) for s in stages}
    starts = {stage.name: sum(costs[before.name] for before in stages[:i]) for i, stage in enumerate(stages)}
    with progress_bar() as progress:
        setbacks = dict[str, list[float]]()
        task = progress.add_task("harden", total=sum(costs.values()))

        def on_batch(name: str, done: float, losses: dict[str, float]) -> bool:
            done = starts[name] + costs[name] * done
            progress.update(task, completed=done, description=f"{name}{last_loss(losses)}")
            show_setback(name, losses, setbacks.setdefault(name, []))
            return bool(stopped)

        try:
            made = harden(network, card, teacher, source, plan, setting, run, on_batch, held, first)
        except KeyboardInterrupt:
            show_error(f"stopped; go on with: detguard harden --resume {run.folder}")
            return 130
    ranks.end()
    if not ranks.first:
        return 0
    run.write("report.html", hardening_page(run))
    out.print(
        f"results: {made}, open {run.folder / 'report.html'}; judge it: detguard evaluate --model {made} --data ...",
        highlight=False,
        soft_wrap=True,
    )
    return 2 if broken else 0
