"""Teach hardened ensembles photos of a new kind, from Python."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from detguard import DetguardError, defaults
from detguard.attacks.samples import read_samples
from detguard.data.batches import PhotoSet, read_photos
from detguard.data.corruptions import chosen_kinds
from detguard.data.sources import (
    OnData,
    Sources,
    as_lines,
    attack_run,
    has_samples,
    listed,
    photo_files,
    read_labelled,
    unlabelled,
    warn_of,
)
from detguard.data.stream import Labelled
from detguard.detectors.base import Detector
from detguard.detectors.gated import GatedDetector, GatedNetwork
from detguard.detectors.load import (
    check_learner,
    detector_config,
    load_configured,
    load_detector,
    load_model,
    read_card,
)
from detguard.engine import with_gradients
from detguard.hardening.adapt import Adaptation, check_growth, choose_mode, set_aside
from detguard.hardening.adapt import adapt as train_experts
from detguard.hardening.judging import Figures, Judgement, answered, judge, judged_eps, readable
from detguard.hardening.train import Setting
from detguard.hardening.validation import ATTACKED, STEPS
from detguard.ranks import Ranks
from detguard.runs import Run, shared_run
from detguard.schema import CONFIGS, Config, check, partly
from detguard.schema import workers as shape_of_workers
from detguard.workflows.harden import OnStage, Trained, named, random_kept
from detguard.workflows.keywords import only_resumes, refuse_unknown

# Photos seen by default: so many for each new one, and at most.
VIEWS, MOST_VIEWS = 50, 5_000
AUTO = defaults.Adapt.mode
# Old photos that are judged under attack, at most: as many as tell of a collapse.
MOST_ATTACKED = 8
# What stands for an option of others.
ELSEWHERE = {"eps": "that of the ensemble's hardening"}
# Of a run, its new photos and the old ones that are labelled.
KEPT = ("new.jsonl", "replay.jsonl")


def load_ensemble(model: str, *, trust: bool) -> tuple[GatedNetwork, int]:
    """A gated ensemble and the frame size that it was made for.

    Raises:
        DetguardError: it is none, or cannot be read.
    """
    network, imgsz = load_model(model, trust=trust)
    if not isinstance(network, GatedNetwork):
        raise DetguardError(f"{model}: expected a gated ensemble; make one of it with detguard harden")
    return network, imgsz


def read_sources(
    new: Sequence[str],
    replay: Sequence[str],
    split: str,
    class_names: dict[int, str],
    on_data: OnData,
    class_map: Mapping[str, str] | None = None,
) -> tuple[list[Labelled], list[Labelled], list[Path]]:
    """New photos, and old ones with labels or without, each once; a photo that is new is not replayed.

    Labels of an attack that was made without any are what was found in its clean photos.

    Raises:
        DetguardError: there are none of a kind, or sources with labels and without.
    """

    def of(source: str) -> list[Labelled]:
        run = attack_run(Path(source))
        if run and not has_samples(run):
            return [one.attacked for one in read_samples(source, class_names, on_data, class_map)]
        return read_labelled(source, split, class_names, on_data, class_map=class_map)

    def labelled(sources: Sequence[str]) -> list[Labelled]:
        of_each = map(of, sources)
        # Each once: one that is held out by one line would not be by another.
        return list({one.file.resolve(): one for photos in of_each for one in photos}.values())

    shown = labelled(new)
    if not shown:
        raise DetguardError(f"`new` {', '.join(new)}: no photos there")
    if not any(len(one.objects) for one in shown):  # new experts would learn to find nothing
        known = f"{', '.join(class_names.values()):.200}"
        raise DetguardError(f"`new` {', '.join(new)}: no object there is of a class that the ensemble knows: {known}")
    folders = [source for source in replay if unlabelled(source)]
    if folders and len(folders) < len(replay):
        raise DetguardError("`replay`: give labelled photos or folders, not both")
    taken = {one.file.resolve() for one in shown}
    old = [one for one in labelled([] if folders else replay) if one.file.resolve() not in taken]
    files = [file for source in folders for file in photo_files(source, on_data) if file.resolve() not in taken]
    if replay and not (old or files):
        raise DetguardError(f"`replay` {', '.join(replay)}: no photos there but those that are new")
    return shown, old, files


def with_objects(photos: Sequence[Labelled]) -> list[Labelled]:
    """Those in which something is to be found, which F1 is of."""
    return [one for one in photos if len(one.objects)]


@dataclass
class Adapting:
    """A run of `adapt`. network: the ensemble that learns; imgsz: of its frames; ranks: the first of them writes."""

    run: Run
    network: GatedNetwork
    imgsz: int
    ranks: Ranks

    @classmethod
    def begin(
        cls,
        model: str,
        new: Sequence[str],
        plan: dict[str, Any],
        ranks: Ranks,
        *,
        replay: Sequence[str] = (),
        split: str = defaults.Adapt.split,
        class_map: Mapping[str, str] | None = None,
        max_experts: int = defaults.Adapt.max_experts,
        corruptions: Sequence[str] | None = None,
        out: Path | None = None,
        exist_ok: bool = False,
        trust: bool = False,
        arguments: Sequence[str] = (),
        on_warning: Callable[[str], object] = warnings.warn,
        on_data: OnData = warn_of,
    ) -> "Adapting":
        """A new run, once all that it asks for is known to go together.

        plan: the fields of `Adaptation` that are given, or AUTO as its mode; on_warning: called with what
            is no error; exist_ok: as of `Run.create`.

        Raises:
            DetguardError: it does not, or the ensemble or data cannot be read; no run is left behind.
        """
        network, imgsz = load_ensemble(model, trust=trust)
        sources = read_sources(new, replay, split, network.class_names, on_data, class_map)
        shown, why = len(sources[0]), "as given"
        plan = dict[str, Any](photos=min(VIEWS * shown, MOST_VIEWS), mode=AUTO) | plan
        if plan["mode"] == AUTO:
            plan["mode"], why = choose_mode(shown)
        if "keep" in plan and plan["mode"] == "frozen":
            on_warning("`keep` is without effect in `mode` frozen, where old experts stay what they are")
        if not replay:
            on_warning("without `replay` nothing tells the gate when not to ask the new experts")
        if network.rule.number and not network.rule.leads:
            on_warning(f"fusion {network.fusion} bounds what new experts may change of the adversarial one's answer")
        hardened = read_card(model).get("hardened")
        hardened = hardened if isinstance(hardened, dict) else {}
        eps, known = hardened.get("eps", Adaptation.eps), hardened.get("corruptions")
        kinds = chosen_kinds(corruptions or (list(map(str, known)) if isinstance(known, list) else None))
        known_fields: Any = CONFIGS["adapt"]["adapt"]
        adaptation = Adaptation(**check(plan | {"eps": eps}, partly(known_fields)))
        check_growth(network, adaptation, max_experts)
        config: Config = {
            "model": model,
            "detector": detector_config(load_detector(model, imgsz, "cpu", trust=trust), model),
            "data": {"new": list(new), "replay": list(replay), "split": split},
            "adapt": asdict(adaptation),
            "why": why,
            "corruptions": list(kinds),
            "arguments": list(arguments),
            "replayed": [str(file) for file in sources[2]],
        }
        config = check(config, partly(CONFIGS["adapt"]))
        kept = {name: as_lines(photos, network.class_names) for name, photos in zip(KEPT, sources[:2], strict=True)}
        run = shared_run(ranks, lambda: Run.create("adapt", out, config, kept, exist_ok=exist_ok))
        return cls(run, network, imgsz, ranks)

    @classmethod
    def resume(cls, folder: Path, ranks: Ranks, *, trust: bool = False) -> "Adapting":
        """A run to go on with.

        Raises:
            DetguardError: there is none, or its ensemble is no longer what it was.
        """
        run = shared_run(ranks, lambda: Run.resume(folder, "adapt"))
        check_learner(run.config, run.config["detector"])
        load_configured(run.config["detector"], "cpu", trust=trust)
        return cls(run, *load_ensemble(run.config["model"], trust=trust), ranks)

    def load(self, workers: int | None = None) -> None:
        """Read the photos; `unread` then says which could not be. workers: processes that make batches."""
        config, self.unread = self.run.config, list[str]()
        names = self.network.class_names
        # As the run keeps them: a stream that goes on, or a folder that grows, does not change what is learned.
        kept = self.ranks.given(lambda: [read_labelled(str(self.run.folder / name), "", names) for name in KEPT])
        old: list[Any] = kept[1] or [Path(file) for file in config["replayed"]]
        learned, judged = dict[str, PhotoSet](), dict[str, list[Any]]()
        for kind, (taught, held) in zip(("new", "old"), set_aside(kept[0], old), strict=True):
            if taught or kind == "new":  # plain, or the gate would learn what augmentation looks like
                learned[kind], unread = read_photos([(taught, 1.0)], self.imgsz, plain=True)
                self.unread += unread
            judged[kind], unread = readable(held)
            self.unread += unread
        self.ranks.must_agree(self.unread)
        self.new, self.old = learned["new"], learned.get("old")
        # Photos that are learned from, by kind.
        self.learned = {kind: len(photos) for kind, photos in learned.items()}
        self.plan = Adaptation(**config["adapt"])
        kinds = chosen_kinds(config["corruptions"])
        self.setting = Setting.on(self.ranks, workers, self.plan.batch, self.imgsz, self.plan.seed, kinds)
        self.network.to(self.ranks.device)
        if not self.ranks.first:  # which alone judges
            judged = {"new": [], "old": []}
        answers = dict[str, str]()
        if judged["old"] and not kept[1]:
            judged["old"] = answered(self._detector(), judged["old"], names)
            answers = dict.fromkeys(("old", ATTACKED), Path(config["model"]).stem)
        # Of others an attack can take nothing, and nobody could tell whether the ensemble still resists.
        judged[ATTACKED] = with_objects(judged["old"])[:MOST_ATTACKED]
        self.judged = {kind: photos for kind, photos in judged.items() if photos}
        counts, judging = ({kind: len(by(of)) for kind, of in self.judged.items()} for by in (list, with_objects))
        self.judgement = Judgement(counts, answers, with_objects=judging)

    def _detector(self) -> GatedDetector:
        """The ensemble as it is now, to be looked through."""
        return GatedDetector(copy.deepcopy(self.network), "", self.imgsz, str(self.ranks.device))

    def figures(self, on_stage: OnStage) -> Figures:
        """How good the ensemble is as it is now, on photos that it does not learn from; known to the first rank.

        Raises:
            KeyboardInterrupt: `on_stage` returned True, before a photo or a step of the attack.
        """
        if not self.judged:
            return {}
        steps = sum(map(len, self.judged.values())) + STEPS * (ATTACKED in self.judged)
        done = count(1)

        def on_step() -> None:
            # Others are in the training already, which stops them all.
            if on_stage("judging", min(next(done) / steps, 1.0), {}) and self.ranks.count == 1:
                raise KeyboardInterrupt

        detector, eps = self._detector(), judged_eps(self.plan.eps)
        return {
            kind: judge(detector, photos, eps if kind == ATTACKED else 0, on_step)
            for kind, photos in self.judged.items()
        }

    def train(self, on_stage: OnStage | None = None) -> Trained:
        """Grow and train what the run has not finished, after `load`, and judge it before and after.

        Raises:
            KeyboardInterrupt: `on_stage` returned True; `resume` goes on.
        """

        def told(name: str, share: float, losses: dict[str, float]) -> bool:
            return bool(on_stage and on_stage(name, share, losses))

        config, before = self.run.config, self.figures(told)
        card = read_card(config["model"])
        earlier = card.get("adapted")
        earlier = earlier if isinstance(earlier, list) else []
        card |= {"adapted": [*earlier, config["adapt"] | {"from": Path(config["model"]).stem}]}
        made = train_experts(
            self.network, card, self.new, self.old, self.plan, self.setting, self.run,
            lambda _, share, losses: told("adapt", share, losses), lambda share: told("whom to ask", share, {}),
        )  # fmt: skip
        self.ranks.end()
        self.judgement = judged = replace(self.judgement, before=before, after=self.figures(told))
        if self.ranks.first:
            judged.keep(self.run)
        return Trained(made, self.run.folder, self.unread, before, judged.after, judged.by)


@with_gradients
def adapt(
    detector: Detector | str | Path | None = None,
    new: Sources | None = None,
    *,
    replay: Sources | None = None,
    split: str = defaults.Adapt.split,
    class_map: Mapping[str, str] | None = None,
    max_experts: int = defaults.Adapt.max_experts,
    corruptions: Sequence[str] | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    device: str = defaults.DEVICE,
    workers: int | None = None,
    trust: bool = False,
    on_stage: OnStage | None = None,
    **plan: Any,
) -> Trained:
    """Teach a gated ensemble a new kind of photos by new experts, as `detguard adapt` does.

    Args:
        detector: the ensemble that `harden` made: its file, `weights/sparse.safetensors` of the run or a copy of it and
            its json, or by `load_detector`. Training begins with what its file holds: one that was changed since is to
            be saved first.
        new: labelled photos of the new kind: data.yaml, COCO json or JSON lines, as `monitor` writes them.
        replay: photos of kinds that it knows, as `new`, or folders of them; by default none.
        split: of a data.yaml.
        class_map: names of classes in the data -> the ensemble's, as {"pedestrian": "person"}.
        max_experts: beyond so many it is not to grow.
        corruptions: kinds that old photos are shown with, by default those that it was hardened with.
        out: folder of the run; by default the next of runs/adapt/.
        resume: a run's folder, to go on with, instead of all above and of `plan`.
        device: of torch, where to train: cpu, cuda, cuda:1 or mps.
        workers: processes that make batches, by default one per core.
        trust: as of `load_detector`.
        on_stage: called with the stage (judging, whom to ask, adapt), the share of it that is over, and the last
            losses; returns True to save and stop.
        **plan: the fields of `Adaptation`: `experts`, `expert` (adapter, head, whole), `mode` (full, frozen, or by
            default auto: by how many photos are new), `init`, `keep`, `photos` (by default 50 for each new one, 5,000
            at most), `batch`, `rate` and `seed`.

    Raises:
        DetguardError: the ensemble or photos cannot be read, or options do not go together.
        KeyboardInterrupt: `on_stage` returned True; go on with `resume`.
        TypeError: `plan` holds no such field.

    Examples:
        >>> import detguard
        >>> made = detguard.adapt("ensemble.safetensors", "dropped.jsonl", replay="day/data.yaml")  # doctest: +SKIP
        >>> made.before["new"]["AP50"], made.after["new"]["AP50"]  # doctest: +SKIP
    """
    arguments = locals()
    refuse_unknown("adapt", plan, Adaptation.__dataclass_fields__.keys() - {"eps"}, ELSEWHERE)
    workers = check({"workers": workers}, {"workers": shape_of_workers})["workers"]
    if resume is not None:
        only_resumes(adapt, arguments)
        job = Adapting.resume(Path(resume), Ranks.start(device), trust=trust)
    else:
        model, sources = named(detector, trust=trust), listed(new)
        if not sources:
            raise DetguardError("`new`: give labelled photos: a data.yaml, a COCO json or a .jsonl file (or `resume`)")
        job = Adapting.begin(
            model, sources, plan, Ranks.start(device), replay=listed(replay), split=split, class_map=class_map,
            max_experts=max_experts,
            corruptions=corruptions, out=None if out is None else Path(out), trust=trust,
        )  # fmt: skip
    job.load(workers)
    for message in job.unread:
        warnings.warn(message, stacklevel=2)
    with random_kept():
        return job.train(on_stage)
