"""Harden detectors, from Python."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from detguard import DetguardError, defaults
from detguard.attacks.samples import KEPT, Sample, kept_samples, load_samples, read_samples, sample_lines
from detguard.data.batches import PhotoSet, Samples, read_photos
from detguard.data.corruptions import chosen_kinds
from detguard.data.entries import DataError
from detguard.data.sources import (
    LABELLED,
    OnData,
    Sources,
    as_lines,
    listed,
    photo_files,
    read_labelled,
    refuse_attack,
    refuse_attacks,
    unlabelled,
    warn_of,
)
from detguard.data.stream import Labelled
from detguard.detectors.base import Detector
from detguard.detectors.custom import is_custom
from detguard.detectors.gated import GatedNetwork
from detguard.detectors.load import (
    build_model,
    check_learner,
    detector_config,
    find_weights,
    fused,
    load_configured,
    load_detector,
    load_model,
    read_card,
)
from detguard.engine import with_gradients
from detguard.files import JsonObject
from detguard.hardening.judging import Figures, Judgement, answered, judge, judged_eps, readable
from detguard.hardening.run import Plan, check_teacher, passes, same_layers, split_layer
from detguard.hardening.run import harden as train_stages
from detguard.hardening.trackers import check_tracker, track
from detguard.hardening.train import Setting, Stage
from detguard.hardening.validation import ATTACKED, Validation, contents, hold_out
from detguard.ranks import Ranks
from detguard.runs import Run, shared_run
from detguard.schema import CONFIGS, Config, check, partly
from detguard.schema import workers as shape_of_workers
from detguard.workflows.keywords import as_specs, only_resumes, refuse_unknown

# Told the stage, the share that is over (of all stages; by `adapt`, of this one), and the losses of the last record;
# True saves and stops.
OnStage = Callable[[str, float, dict[str, float]], object]


@dataclass(frozen=True)
class Trained:
    """What came of a training.

    Attributes:
        weights: file for `load_detector`.
        folder: of the run.
        unread: what was wrong with photos that were left out.
        before: F1, AP (with AP_error, half of its 95 % interval) and AP50 of the detector that was given, on photos
            that were held out: by `harden` `clean` and `attacked`, by `adapt` `new`, `old` and `attacked` (a few of the
            old ones); {} where none were.
        after: the same of what has come of it.
        by: of each kind, what was to be found: "labels", or the name of the detector whose answers counted as right.
    """

    weights: Path
    folder: Path
    unread: list[str]
    before: Figures
    after: Figures
    by: dict[str, str]


def known_classes(network: Any) -> dict[int, str]:
    """The classes of a network to be hardened, by number; hardened ones keep them under another name."""
    return network.class_names if isinstance(network, GatedNetwork) else network.names


def architecture_of(model: str, network: Any) -> str:
    """The name of the yaml that a network to be hardened was made from; model: its file or name."""
    made_of = read_card(model)["architecture"] if isinstance(network, GatedNetwork) else network.yaml.get("yaml_file")
    return Path(str(made_of or "")).name


def check_architecture(network: Any, architecture: str, classes: list[str], model: str) -> None:
    """See that what is made of a fused network can be loaded again, which is by the name of its architecture.

    Raises:
        DetguardError: no such architecture comes with Ultralytics, or it has other layers.
    """
    try:
        known = same_layers(network, fused(build_model(architecture, classes)))
    except DetguardError:
        known = False
    if not known:
        named = architecture or "an architecture without a name"
        raise DetguardError(
            f"{model}: is of {named}, not as Ultralytics ships it, so that what is made of it could not be loaded "
            "again; give a detector of one of its own architectures"
        )


@dataclass(frozen=True)
class Cost:
    """What a stage takes: photos that it sees, with repeats, passes of whole frames, forward and backward, and time."""

    photos: int
    passes: int
    seconds: float


class Trial(Plan):
    """A plan of two batches per stage, of which the first takes longer."""

    @override
    def stages(self, model: Any = None) -> list[Stage]:
        return [replace(stage, number=2, seconds=None) for stage in super().stages(model)]


@dataclass
class Hardening:
    """A run of `harden`.

    network: what learns; given: the detector that it was; teacher: what it imitates; ranks: the first of them writes.
    """

    run: Run
    network: Any
    given: Detector
    teacher: Detector
    ranks: Ranks

    @classmethod
    def begin(
        cls,
        model: str,
        data: Sequence[str],
        plan: Config,
        ranks: Ranks,
        *,
        teacher: str | None = None,
        pretrain: Sequence[str] = (),
        samples: Sequence[str] = (),
        imgsz: int | None = None,
        corruptions: Sequence[str] | None = None,
        class_map: Mapping[str, str] | None = None,
        out: Path | None = None,
        exist_ok: bool = False,
        trust: bool = False,
        arguments: Sequence[str] = (),
        on_data: OnData = warn_of,
    ) -> "Hardening":
        """A new run, once all that it asks for is known to go together. plan: the fields of `Plan` that are given.

        samples: runs of `attack`, of which all photos become adversarial frames; exist_ok: as of `Run.create`.

        Raises:
            DetguardError: it does not, or a detector or data cannot be read; no run is left behind.
        """
        kinds = chosen_kinds(corruptions)
        network = load_model(model, trust=trust)[0]
        wanted = Plan.of(plan | {"pretrain": bool(pretrain)}, network)
        given, imitated = (
            load_detector(name, imgsz, str(ranks.device), trust=trust) for name in (model, teacher or model)
        )
        check_teacher(network, imitated, teacher or model, wanted.recipe, pretrain=wanted.pretrain)
        kept, names = asdict(wanted), known_classes(network)
        base = network.single(0) if isinstance(network, GatedNetwork) else fused(network)
        split_layer(base, wanted.split)
        check_architecture(base, architecture_of(model, network), list(names.values()), model)
        stride = int(base.model[-1].stride.max())
        if wanted.crop is not None and wanted.crop % stride:
            raise DetguardError(f"`crop` {wanted.crop}: expected a multiple of {stride}, the largest stride of {model}")
        if wanted.crop is not None and wanted.crop > given.imgsz:
            raise DetguardError(
                f"`crop` {wanted.crop}: expected at most the {given.imgsz} px of the frames it is cut from"
            )
        learns_labels = wanted.learn != "teacher"
        if class_map and all(map(unlabelled, data)):
            raise DetguardError("`class_map`: renames classes of labels, and `data` has none")
        for source in filter(unlabelled, data if learns_labels else []):
            raise DetguardError(f"`learn` {wanted.learn}: {source} has no labels; give a data.yaml or a COCO json")
        labelled, photos = list[Labelled](), list[Path]()
        for source in data:
            refuse_attack(source)
            found = list[Labelled]()
            if learns_labels:
                found = read_labelled(source, "train", names, on_data, class_map=class_map)
            elif not unlabelled(source):
                with suppress(DataError):  # none of its classes is known; the teacher answers for its photos, too
                    found = read_labelled(source, "train", names, on_data, class_map=class_map)
            refuse_attacks([one.file for one in found])
            labelled += found
            photos += [] if learns_labels else [one.file for one in found] or photo_files(source, on_data)
        if learns_labels and not any(len(one.objects) for one in labelled):
            raise DetguardError(f"`learn` {wanted.learn}: no object in `data` is of a class that {model} knows")
        if not learns_labels:  # which then only judge
            of_file = {one.file: one for one in labelled}
            labelled = [of_file[file] for file in hold_out(photos)[1] if file in of_file]
        if samples and not wanted.made_by.attacked:
            raise DetguardError(f"`samples`: `recipe` {wanted.recipe} sees no attacks; leave one of them out")
        attacks = [one for source in samples for one in read_samples(source, names, on_data)]
        config: Config = {
            "model": model,
            "detectors": [detector_config(given, model), detector_config(imitated, teacher or model)],
            "harden": kept,
            "corruptions": list(kinds),
            "arguments": list(arguments),
            "photos": list(map(str, photos)),
            "pretrain": [str(file) for source in pretrain for file in photo_files(source, on_data)],
            "samples": list(samples),
        }
        config = check(config, partly(CONFIGS["harden"]))
        files = {LABELLED: as_lines(labelled, names)} if labelled else {}
        files |= {KEPT: sample_lines(attacks, names)} if attacks else {}
        run = shared_run(ranks, lambda: Run.create("harden", out, config, files, exist_ok=exist_ok))
        return cls(run, network, given, imitated, ranks)

    @classmethod
    def resume(cls, folder: Path, ranks: Ranks, *, trust: bool = False) -> "Hardening":
        """A run to go on with.

        Raises:
            DetguardError: there is none, or its detectors are no longer what they were.
        """
        run = shared_run(ranks, lambda: Run.resume(folder, "harden"))
        check_learner(run.config, run.config["detectors"][0])
        given, imitated = (load_configured(one, str(ranks.device), trust=trust) for one in run.config["detectors"])
        return cls(run, load_model(run.config["model"], trust=trust)[0], given, imitated, ranks)

    def load(self, workers: int | None = None) -> None:
        """Read the photos; `unread` then says which could not be. workers: processes that make batches."""
        config = self.run.config
        self.plan, imgsz = Plan(**config["harden"]), config["detectors"][0]["imgsz"]
        names = known_classes(self.network)
        photos: Sequence[Any] = [Path(file) for file in config["photos"]]
        labelled = self.ranks.given(lambda: self._labelled(names))
        if self.plan.learn != "teacher":
            photos, labelled = labelled, []
        trained, held_out = hold_out(photos)
        self.source, self.unread = read_photos([(trained, 1.0)], imgsz)
        self.held_out, unread = readable(held_out)
        self.unread += unread
        self.held = Validation.of(self.held_out, imgsz)
        judging = [one for one in labelled if one.file in self.held_out]
        if any(len(one.objects) for one in judging):
            self.held_out = judging
        self.first: PhotoSet | None = None
        self.samples: Samples | None = None
        kept = set(contents(held_out))

        def others(entries: list[Any], photos: list[Path]) -> list[Any]:
            if not kept:
                return entries
            return [one for one, name in zip(entries, contents(photos), strict=True) if name not in kept]

        if config["samples"]:
            attacks: list[Sample] = self.ranks.given(lambda: kept_samples(self.run.folder / KEPT, names))
            self.samples, unread = load_samples(others(attacks, [one.clean for one in attacks]), imgsz)
            self.unread += unread
        if self.plan.pretrain:
            files = [Path(file) for file in config["pretrain"]]
            self.first, unread = read_photos([(others(files, files), 1.0)], imgsz)
            self.unread += unread
        self.ranks.must_agree(self.unread)
        kinds = chosen_kinds(config["corruptions"])
        self.setting = Setting.on(self.ranks, workers, self.plan.batch, imgsz, self.plan.seed, kinds)

    def _labelled(self, names: dict[int, str]) -> list[Labelled]:
        """The photos whose labels the run keeps."""
        file = self.run.folder / LABELLED
        return read_labelled(str(file), "", names) if file.exists() or self.plan.learn != "teacher" else []

    def card(self) -> JsonObject:
        """What the json beside the weights is to say."""
        config = self.run.config
        timed = {"photos"} if self.plan.hours is not None else set()  # which nobody has counted
        return {
            "architecture": architecture_of(config["model"], self.network),
            "classes": list(known_classes(self.network).values()),
            "imgsz": config["detectors"][0]["imgsz"],
            "licence": "AGPL-3.0-or-later",
            "hardened": {
                "from": Path(config["model"]).stem,
                "teacher": self.teacher.name,
                "corruptions": config["corruptions"],
                "samples": 0 if self.samples is None else len(self.samples.clean),
                **{name: value for name, value in config["harden"].items() if name not in timed},
            },
        }

    def passes(self) -> int:
        """Forward and backward passes of whole frames in all stages that are left; 0 of a plan in hours.

        The first rank alone says it: others may not see the run.
        """
        if not self.ranks.first or self.plan.hours is not None:
            return 0
        stages = [
            s for s in self.plan.stages(self.network) if not self.run.path(f"weights/{s.name}.safetensors").exists()
        ]
        size = self.setting.size
        return round(self.plan.batch * sum(passes(stage, size) * (stage.number or 0) for stage in stages))

    def trial(self) -> dict[str, Cost]:
        """What each stage takes, by a batch that is trained on as it would be, after `load`; the run is then spent.

        Validation, and what waits for photos, come on top.
        """
        ends: dict[str, list[float]] = {}

        def on_batch(name: str, done: float, losses: dict[str, float]) -> bool:
            if self.ranks.device.type != "cpu":
                torch.accelerator.synchronize(self.ranks.device)
            ends.setdefault(name, []).append(time.perf_counter())
            return False

        trial = Trial(**asdict(self.plan) | {"sparse": 0.0})
        train_stages(
            self.network, self.card(), self.teacher, self.source, trial, self.setting, self.run, on_batch,
            first=self.first, samples=self.samples,
        )  # fmt: skip
        self.ranks.end()
        costs = {}
        for stage in self.plan.stages(self.network):
            begin, end = ends[stage.name]
            batches = stage.number or (stage.seconds or 0) / (end - begin)
            photos = batches * self.plan.batch
            of_photo = passes(stage, self.setting.size)
            costs[stage.name] = Cost(round(photos), round(photos * of_photo), batches * (end - begin))
        return costs

    def train(self, on_stage: OnStage | None = None) -> Trained:
        """Train what the run has not finished, after `load`.

        Raises:
            KeyboardInterrupt: `on_stage` returned True; `resume` goes on.
        """
        # In forward-backward passes or seconds, so that the time left is right in stages with and without attacks.
        stages = self.plan.stages(self.network)
        costs = {s.name: s.seconds or passes(s, self.setting.size) * (s.number or 0) for s in stages}
        starts = {stage.name: sum(costs[before.name] for before in stages[:i]) for i, stage in enumerate(stages)}

        def on_batch(name: str, done: float, losses: dict[str, float]) -> bool:
            share = (starts[name] + costs[name] * done) / sum(costs.values())
            return bool(on_stage and on_stage(name, share, losses))

        arguments = (self.network, self.card(), self.teacher, self.source, self.plan, self.setting, self.run, on_batch)
        made = train_stages(*arguments, self.held, self.first, self.samples)
        self.ranks.end()

        def on_step() -> None:
            if on_stage and on_stage("judging", 1.0, {}):
                raise KeyboardInterrupt

        self.judgement = self.judge(made, on_step) if self.ranks.first and self.held_out else Judgement()
        judged = self.judgement
        return Trained(made, self.run.folder, self.unread, judged.before, judged.after, judged.by)

    def judge(self, made: Path, on_step: Callable[[], None]) -> Judgement:
        """How good the detector that was given is on the photos held out, clean and attacked, and what was made of it.

        What is to be found is what labels say, where photos have some, or else what the teacher shows.
        """
        photos = [one for one in self.held_out if isinstance(one, Labelled)]
        answers = {} if photos else dict.fromkeys(("clean", ATTACKED), self.teacher.name)
        photos = photos or answered(self.teacher, self.held_out, known_classes(self.network))
        hardened = load_detector(made, self.given.imgsz, device=str(self.ranks.device))
        attacks = {"clean": 0, ATTACKED: judged_eps(self.plan.eps)}
        before, after = (
            {kind: judge(detector, photos, eps, on_step) for kind, eps in attacks.items()}
            for detector in (self.given, hardened)
        )
        judgement = Judgement(dict.fromkeys(attacks, len(photos)), answers, before, after)
        judgement.keep(self.run)
        return judgement


@with_gradients
def harden(
    detector: Detector | str | Path | None = None,
    data: Sources | None = None,
    *,
    teacher: Detector | str | Path | None = None,
    pretrain: Sources | None = None,
    samples: Sources | None = None,
    imgsz: int | None = None,
    corruptions: Sequence[str] | None = None,
    class_map: Mapping[str, str] | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    device: str = defaults.DEVICE,
    workers: int | None = None,
    trust: bool = False,
    log: str | None = None,
    on_stage: OnStage | None = None,
    **plan: Any,
) -> Trained:
    """Train a detector that holds up under attacks, as `detguard harden` does.

    Args:
        detector: a name or file, or by `load_detector` (then of its frames, where `imgsz` says no other). Training
            begins with what its file holds: one that was changed since is to be saved first.
        data: folders or patterns of photos, or data.yaml, COCO json or JSON lines files.
        teacher: detector to imitate, as `detector`; by default the same.
        pretrain: photos by which the backbone is made robust first, by default none.
        samples: runs of `attack`, whose photos become a quarter of the adversarial frames; what is wanted of them is,
            by `learn`, what the teacher says of the clean ones, their labels, or both.
        imgsz: longest side of a frame, px, by default the detector's.
        corruptions: kinds of hard photos, by default all 15.
        class_map: names of classes in labelled data -> the detector's, as {"pedestrian": "person"}.
        out: folder of the run; by default the next of runs/harden/.
        resume: a run's folder, to go on with, instead of all above and of `plan`.
        device: of torch, where to train: cpu, 0, cuda:1 or mps; by default a GPU where CUDA finds one.
        workers: processes that make batches, by default one per core.
        trust: as of `load_detector`.
        log: tensorboard, wandb, mlflow or another of Accelerate's trackers that losses go to.
        on_stage: called with the stage, the share of all that is over, and the last losses; returns True to save
            and stop.
        **plan: the fields of `Plan`: `recipe`, `learn`, `mode`, `split`, `photos`, `hours`, `crop`, `attack`, `eps`,
            `steps`, `mix`, `tune_normal`, `transforms` (also as `attack` takes them), `top_k`, `fusion`, `sparse`,
            `batch`, `rate` and `seed`.

    Raises:
        DetguardError: a detector or photos cannot be read, or options do not go together.
        KeyboardInterrupt: `on_stage` returned True; go on with `resume`.
        TypeError: `plan` holds no such field.

    Examples:
        >>> import detguard
        >>> made = detguard.harden("detguard-n", "photos/", recipe="pgd", hours=2)  # doctest: +SKIP
        >>> hardened = detguard.load_detector(made.weights)  # doctest: +SKIP
    """
    arguments = locals()
    refuse_unknown("harden", plan, Plan.__dataclass_fields__.keys() - {"pretrain"})
    if plan.get("transforms") is not None:
        plan = plan | {"transforms": as_specs(plan["transforms"])}
    workers = check({"workers": workers}, {"workers": shape_of_workers})["workers"]
    if log is not None:
        check_tracker(log)
    if resume is not None:
        only_resumes(harden, arguments)
        job = Hardening.resume(Path(resume), Ranks.start(device), trust=trust)
    else:
        size = imgsz or (detector.imgsz if isinstance(detector, Detector) else None)
        model, sources = named(detector, size, trust=trust), listed(data)
        if not sources:
            raise DetguardError("`data`: give a folder or pattern of photos, a data.yaml or a COCO json (or `resume`)")
        job = Hardening.begin(
            model, sources, plan, Ranks.start(device),
            teacher=None if teacher is None else named(teacher, size, "teacher", trust=trust),
            pretrain=listed(pretrain), samples=listed(samples), imgsz=size,
            corruptions=corruptions, class_map=class_map, out=None if out is None else Path(out), trust=trust,
        )  # fmt: skip
    if log is not None and job.ranks.first:
        track(job.run, log)
    job.load(workers)
    for message in job.unread:
        warnings.warn(message, stacklevel=2)
    with random_kept():
        return job.train(on_stage)


def random_kept() -> AbstractContextManager[None]:
    """Within it, seeds are set for training; after it, the caller's random numbers go on as if they had not been."""
    return torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else [])


def named(
    given: Detector | str | Path | None, imgsz: int | None = None, role: str = "detector", *, trust: bool = False
) -> str:
    """The name or file of a detector, with which training begins.

    imgsz: longest side of its frames there, by default its own; role: the argument that it is.

    Raises:
        DetguardError: there is none, or what it holds is not the detector that is given.
    """
    source = given.source if isinstance(given, Detector) else str(given or "")
    if not source and not given:
        raise DetguardError(f"`{role}`: give a name, a file, or a detector by load_detector (or `resume`)")
    if not source or is_custom(source):
        kind = source or type(given).__name__
        raise DetguardError(
            f"`{role}`: {kind} has no file, with which training begins; give one of Ultralytics' YOLO families"
        )
    if not isinstance(given, Detector):
        return source
    save = "save it to a file first, as a YOLO object by model.save('mine.pt'), and give that"
    try:
        find_weights(source)
    except DetguardError as error:
        raise DetguardError(
            f"`{role}`: is in memory alone, and training begins with a file; {save} ({error})"
        ) from error
    loaded = load_detector(source, imgsz, str(given.device), trust=trust)
    was, now = (detector_config(one, source) for one in (given, loaded))
    for name in ("imgsz", "end_to_end", "top_k", "fusion", "iou"):
        if was[name] != now[name] and (name, imgsz) != ("imgsz", loaded.imgsz):
            raise DetguardError(
                f"`{role}`: its `{name}` {was[name]} would be lost, as training begins with {source}; load it without"
            )
    if was["sha256"] != now["sha256"]:
        raise DetguardError(f"`{role}`: no longer what {source} holds, with which training begins; {save}")
    return source
