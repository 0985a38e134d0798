"""One `detguard harden`: the stages of a recipe, each resumable, from a detector to a gated ensemble on disk."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel

from detguard import DetguardError, defaults
from detguard.data.batches import PhotoSet, Samples, batches
from detguard.detectors.base import Detector
from detguard.detectors.fusion import parse_fusion
from detguard.detectors.gated import EXPERTS, GatedNetwork, backbone_end
from detguard.detectors.load import fused, save_gated
from detguard.detectors.ultralytics import UltralyticsDetector
from detguard.hardening.adversary import Adversary
from detguard.hardening.loop import BatchLog, Validate, load_made
from detguard.hardening.losses import LEARN, MAPS, imitation_loss
from detguard.hardening.members import parse_members
from detguard.hardening.memory import check_memory
from detguard.hardening.recipes import RECIPES, Recipe
from detguard.hardening.train import ADVERSARIAL, HARD, NORMAL, Setting, Stage, learned_parameters, train_stage
from detguard.hardening.validation import Validation, figures
from detguard.runs import Run
from detguard.schema import CONFIGS, check, partly

MODES = ("full", "freeze-first")
# Logit margins that attacks add in turn, but where an expert learns to resist: alone, an attack on the result is blind
# to a sure gate, and the gate learns nothing of those that know it.
MARGINS = (0.0, 0.3, 1.0, 3.0)
# Share of the first stage over which the budget grows: a detector that breaks at once has nothing to learn from.
RAMP = 0.2
# Weight of the error of feature maps where a whole network learns.
FEATURES = 5.0
# Weight of the gate's cross-entropy; rates of stages that go on from what an expert knows already, among the others.
GATE, JOINT_RATE, APART_RATE = 0.3, 0.1, 0.3
# Of what has been trained: at the whole rate, it lost in hours what it had learned in them (benchmarks/README.md).
AGAIN_RATE = 1 / 3
# Of a backbone that was made robust first: its rate beside that of the rest, and what a pass costs of a whole one.
BACKBONE_RATE, BACKBONE_COST = 0.1, 0.45
# What a photo costs where three whole networks answer: 10.1 a second were learned, and 17.1 by one of them alone.
JOINT_COST = 1.7
STRIDE = 32
# Batches of clean photos on which means and deviations of channels are measured.
MEASURED = 8
# Of the adversarial frames, those from photos of attacks, where some are given.
SAMPLED = 0.25


@dataclass(frozen=True)
class Plan:
    """How to harden; the options of `detguard harden`.

    Attributes:
        recipe: gated (an ensemble), or the baselines of one network: pgd, mtd, finetune.
        learn: what is wanted of changed photos: what the `teacher` says of the clean one, its `labels`, or `both`.
        pretrain: whether the backbone learns first, from photos of its own.
        tune_normal: whether the normal expert learns, too, where it is a whole network.
        mode: what the joint stage trains: full, everything; freeze-first, the adversarial expert and the gate.
        split: what experts do not share: backbone (whole networks), neck (and head), head, or from layer N.
        photos: seen in all stages together, with repeats.
        hours: that all stages have together, instead.
        crop: side of training frames, px, in whole strides; by default whole frames.
        attack: free, pgd or fgsm.
        eps: budget of attacks in training, levels of 255.
        steps: of each of them.
        transforms: specs of what attacked frames go through (see `detguard.hardening.members.parse_members`).
        mix: share of other kinds in each expert's photos, 0..1.
        top_k: experts that are evaluated per photo, by default all.
        fusion: how the experts' answers become one, `bounded:B` or `average:F` (see `detguard.detectors.fusion`).
        sparse: standard deviations from the mean of a channel within which the robust expert, once trained, sets values
            to it; 0: none.
        batch: frames per batch, of all processes together.
        rate: learning rate, in proportion to weights; of what goes on after a whole run, by default a third of it.
        seed: of all that is random.

    Raises:
        DetguardError: an option is not one of those known.
    """

    recipe: str = defaults.Harden.recipe
    learn: str = defaults.Harden.learn
    pretrain: bool = False
    mode: str = defaults.Harden.mode
    split: str = defaults.Harden.split
    photos: int = defaults.Harden.photos
    hours: float | None = None
    crop: int | None = None
    attack: str = "free"
    eps: float = defaults.Harden.eps
    steps: int = 2
    mix: float = defaults.Harden.mix
    tune_normal: bool = False
    transforms: str = defaults.Harden.transforms
    top_k: int | None = None
    fusion: str = defaults.Harden.fusion
    sparse: float = defaults.Harden.sparse
    batch: int = defaults.Harden.batch
    rate: float = defaults.Harden.rate
    seed: int = defaults.Harden.seed

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise DetguardError(f"`recipe` {self.recipe}: expected one of {', '.join(RECIPES)}")
        if self.pretrain and "pretrain" not in self.made_by.stages:
            raise DetguardError(f"`pretrain`: `recipe` {self.recipe} sees no attacks; leave one of them out")
        if self.tune_normal and not self.apart:
            raise DetguardError(
                "`tune_normal`: goes with `recipe` gated and `split` backbone; on a shared trunk the normal expert "
                "always learns"
            )
        if self.learn not in LEARN:
            raise DetguardError(f"`learn` {self.learn}: expected one of {', '.join(LEARN)}")
        if self.mode not in MODES:
            raise DetguardError(f"`mode` {self.mode}: expected one of {', '.join(MODES)}")
        if self.top_k is not None and not 1 <= self.top_k <= len(self.experts):
            raise DetguardError(f"`top_k` {self.top_k}: expected 1 to {len(self.experts)}, the number of experts")
        if self.crop is not None and self.crop % STRIDE:
            raise DetguardError(f"`crop` {self.crop}: expected a multiple of {STRIDE}, the stride of detectors")
        if self.made_by.attack not in (None, self.attack):
            raise DetguardError(f"`attack` {self.attack}: `recipe` {self.recipe} takes {self.made_by.attack} alone")
        if not 0.1 <= self.eps <= 64:
            raise DetguardError(f"`eps` {self.eps:g}: expected .1 to 64 levels of 255")
        if not 0 <= self.sparse <= 1:
            raise DetguardError(f"`sparse` {self.sparse:g}: expected 0 (none) to 1 standard deviations")
        if parse_members(self.transforms) and not self.made_by.attacked:
            raise DetguardError(f"`transforms`: `recipe` {self.recipe} sees no attacks; leave one of them out")
        parse_fusion(self.fusion)
        Adversary(self.eps, self.steps, self.attack)  # which knows what it can be

    @classmethod
    def of(cls, given: dict[str, Any], model: Any = None) -> "Plan":
        """Of options by name; those that are left out, or None, are what the recipe, the attack and `model` need.

        Raises:
            DetguardError: an option is not one of those known, or without effect beside the others.
        """
        given = {name: value for name, value in given.items() if value is not None}
        known: Any = CONFIGS["harden"]["harden"]
        given = check(given, partly(known))
        name = given.get("recipe", cls.recipe)
        recipe = RECIPES.get(name, RECIPES[cls.recipe])  # others are refused below
        if unused := sorted(recipe.unused & given.keys()):
            raise DetguardError(f"`{unused[0]}`: does nothing in `recipe` {name}; leave one of them out")
        if {"photos", "hours"} <= given.keys():
            raise DetguardError("`hours`: instead of `photos`; leave one of them out")
        if isinstance(model, GatedNetwork) and len(model.names) > 1:
            if "split" in given and split_layer(model.single(0), given["split"]) != model.split:
                raise DetguardError(
                    f"`split` {given['split']}: the experts of this ensemble have layers from {model.split} on for "
                    "themselves, and keep them; leave it out"
                )
            given["split"] = str(model.split)
            if recipe.gated:
                given = {"fusion": model.fusion, "top_k": model.top_k} | given
        given.setdefault("attack", recipe.attack or cls.attack)
        given.setdefault("steps", 1 if given["attack"] == "fgsm" else cls.steps)
        plan = cls(**given)
        return replace(plan, rate=AGAIN_RATE * plan.rate) if plan.goes_on(model) and "rate" not in given else plan

    @property
    def made_by(self) -> Recipe:
        """The recipe itself."""
        return RECIPES[self.recipe]

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts of the ensemble; the baselines have one."""
        return self.made_by.experts(self.recipe)

    @property
    def apart(self) -> bool:
        """Whether experts are whole networks: normal and hard ones then start from the undefended detector."""
        return self.made_by.gated and self.split in ("backbone", "0")

    def goes_on(self, model: Any) -> bool:
        """Whether a model has been through all stages of the recipe: it can bear the whole budget at once."""
        if not isinstance(model, GatedNetwork):
            return False
        return len(model.names) > 1 or self.recipe in model.names or (_robust(model) and not self.made_by.gated)

    def stages(self, model: Any = None) -> list[Stage]:
        """What is trained of a model, in order: nothing that it is already, robust, or by itself for normal photos."""
        again = self.goes_on(model)
        done = {"adversarial"} if _robust(model) and not again else set()
        done |= {"normal"} if self.apart and not self.tune_normal else set()
        done |= set() if self.pretrain else {"pretrain"}
        shares = {n: share for n, share in self.made_by.stages.items() if n not in done}
        stages = [self.stage(name, self.photos * share / sum(shares.values())) for name, share in shares.items()]
        if again:
            stages = [replace(stage, ramp=0.0) for stage in stages]
        if self.hours is None:
            return stages
        # As many photos of each stage as they would be by number: hours go by what they cost.
        costs = [shares[stage.name] * self._cost(stage) for stage in stages]
        seconds = [3600 * self.hours * cost / sum(costs) for cost in costs]
        return [replace(stage, number=None, seconds=s) for stage, s in zip(stages, seconds, strict=True)]

    def _cost(self, stage: Stage) -> float:
        """What a photo of a stage costs; where whole networks answer together, all of them run."""
        return passes(stage, self.crop or 1) * (JOINT_COST if stage.route is None and self.apart else 1)

    def stage(self, name: str, photos: float) -> Stage:
        """One stage of a recipe, of so many photos."""
        last = len(self.experts) - 1
        whole = {"trunk": True, "aims": self.made_by.aims, "features": FEATURES}
        frozen = (last,) if self.mode == "freeze-first" else None
        joint = {"trunk": self.mode == "full", "experts": frozen, "margins": MARGINS, "size": self.crop}
        # On a robust backbone a growing budget gained nothing: a divergence of 13.4 under attack with it, 13.0 without
        # (YOLO11n, 90 batches of 12 crops in all; clean 2.0 by both).
        first = {"backbone": BACKBONE_RATE} if self.pretrain else {"ramp": RAMP}
        other = {"trunk": False, "size": self.crop, "margins": MARGINS, "features": FEATURES if self.apart else 0.0}
        # Expert that learns, its kind of frames, options.
        parts: dict[str, tuple[int | None, int | None, dict[str, Any]]] = {
            "pretrain": (last, ADVERSARIAL, {"trunk": True, "size": self.crop, "ramp": RAMP, "learn": MAPS}),
            "adversarial": (last, ADVERSARIAL, whole | {"size": self.crop} | first),
            "finetune": (0, NORMAL, {"trunk": True, "size": self.crop}),
            "normal": (0, NORMAL, other),
            "hard": (1, HARD, other),
            "joint": (None, None, joint),
        }
        route, kind, options = parts[name]
        options.setdefault("learn", self.learn)
        share = [1 / 3] * 3 if kind is None else [self.mix / 2] * 3
        if kind is not None:
            share[kind] = 1 - self.mix
        if not self.made_by.attacked:
            share = [1 - self.mix, self.mix, 0.0]
        adversary = Adversary(self.eps, self.steps, self.attack)
        if self.attack == "free" and kind in (NORMAL, HARD):  # few frames are attacked, the others learn once
            adversary = replace(adversary, method="pgd")
        elif self.attack == "free":  # its first update is on clean frames
            share = [0.0, share[HARD], 1 - share[HARD]]
        options["transforms"] = parse_members(self.transforms)
        options |= {"gate": GATE if self.made_by.gated else 0.0, "rate": self.rate}
        goes_on = self.apart and name in ("normal", "hard")
        options["rate"] *= JOINT_RATE if name == "joint" else APART_RATE if goes_on else 1
        number = max(1, round(photos / self.batch))
        return Stage(name, number, route, share=(share[0], share[1], share[2]), adversary=adversary, **options)


def _robust(model: Any) -> bool:
    """Whether a model has been hardened by attacks; fine-tuning has none."""
    return isinstance(model, GatedNetwork) and any(
        name not in RECIPES or RECIPES[name].attacked for name in model.names
    )


def passes(stage: Stage, size: int) -> float:
    """About how many forward and backward passes of a frame of `size` pixels a photo of this stage costs."""
    steps = stage.adversary.steps * len(stage.aims)
    of_stage = stage.adversary.updates if stage.adversary.method == "free" else 1 + stage.share[ADVERSARIAL] * steps
    return of_stage * ((stage.size or size) / size) ** 2 * (BACKBONE_COST if stage.learn == MAPS else 1)


def split_layer(model: Any, split: str) -> int:
    """The number of the first layer that experts have for themselves.

    split: "head" (heads alone), "neck" (neck and head: from the first upsampling on), "backbone" (whole networks), or
    the number of a layer.

    Raises:
        DetguardError: none of these.
    """
    last = len(model.model) - 1
    named = {"head": last, "neck": backbone_end(model.model), "backbone": 0}
    if split in named:
        return named[split]
    if not split.isdecimal() or int(split) > last:
        raise DetguardError(f"`split` {split}: expected head, neck, backbone or the number of a layer, 0 to {last}")
    return int(split)


def check_teacher(model: Any, teacher: Detector, name: str, recipe: str = "gated", *, pretrain: bool = False) -> None:
    """See that a detector can be imitated by the network to start from, unfused or a hardened one.

    It may be larger and know more classes: `narrowed` leaves those of the network. name: as the user gave it. pretrain:
    whether its feature maps are imitated first.

    Raises:
        DetguardError: it is not of a family that can be hardened, has another kind of head, or lacks classes.
    """
    if not isinstance(model, (GatedNetwork, DetectionModel)) or isinstance(model, RTDETRDetectionModel):
        raise DetguardError(
            f"`detector`: only Ultralytics' YOLO families can be hardened, not a {type(model).__name__}"
        )
    if isinstance(model, GatedNetwork) and len(model.names) > 1 and model.names != list(EXPERTS):
        raise DetguardError(f"`detector`: has the experts {', '.join(model.names)}; detguard adapt goes on with others")
    if isinstance(teacher.model, GatedNetwork):
        raise DetguardError(f"{name}: is hardened, and nothing to imitate; give `teacher`, the detector it was made of")
    if not isinstance(teacher, UltralyticsDetector) or teacher.stretch:
        raise DetguardError(f"{name}: expected a detector of Ultralytics' YOLO families, not hardened (`teacher`)")
    base: Any = model.single(model.robust) if isinstance(model, GatedNetwork) else fused(model)
    theirs_model: Any = teacher.model
    heads = [base.model[-1], theirs_model.model[-1]]
    ours, theirs = ((head.stride.tolist(), head.reg_max, head.end2end) for head in heads)
    if ours != theirs:
        raise DetguardError(f"`teacher` {name}: boxes are made in another way than `detector`'s; expected its family")
    if lacking := set(base.names.values()) - set(teacher.class_names.values()):
        raise DetguardError(f"`teacher` {name}: lacks classes that `detector` has: {', '.join(sorted(lacking))}")
    if pretrain and isinstance(model, GatedNetwork):
        raise DetguardError("`pretrain`: `detector` is hardened already, with its backbone; leave one of them out")
    if pretrain and not same_layers(base, teacher.model, heads=False):
        raise DetguardError(
            f"`pretrain`: `teacher` {name} has other feature maps; expected the architecture of `detector`"
        )
    alone = isinstance(model, GatedNetwork) and len(model.names) == 1
    if alone and RECIPES[recipe].gated and not same_layers(base, narrowed(teacher.model, list(base.names.values()))):
        raise DetguardError(
            f"`teacher` {name}: expected the architecture and classes of `detector`, whose undefended experts it is"
        )


def same_layers(one: Any, other: Any, *, heads: bool = True) -> bool:
    """Whether the layers of two models, with their `heads` or without, have weights of the same shapes."""
    end = None if heads else -1
    ours, theirs = ([p.shape for layer in list(m.model)[:end] for p in layer.parameters()] for m in (one, other))
    return ours == theirs


def narrowed(model: Any, classes: list[str]) -> Any:
    """A fused detection model that knows some of its classes alone, in the order given; itself where that is all."""
    if list(model.names.values()) == classes:
        return model
    numbers = {name: number for number, name in model.names.items()}
    rows = [numbers[name] for name in classes]
    model = copy.deepcopy(model)
    head = model.model[-1]
    for branch in (head.one2one if head.end2end else head.one2many)["cls_head"]:
        last = branch[-1]
        last.weight, last.bias = (nn.Parameter(p.detach()[rows], requires_grad=False) for p in (last.weight, last.bias))
    head.nc, head.no = len(rows), head.no - head.nc + len(rows)
    model.names = dict(enumerate(classes))
    return model


def harden(
    model: Any,
    card: dict[str, Any],
    teacher: Detector,
    source: PhotoSet,
    plan: Plan,
    setting: Setting,
    run: Run,
    on_batch: Callable[[str, float, dict[str, float]], bool] | None = None,
    held: Validation = Validation([]),
    first: PhotoSet | None = None,
    samples: Samples | None = None,
) -> Path:
    """Train all stages that the run has not finished; returns the file of the ensemble.

    model: the unfused detector to start from, a single hardened network, or an ensemble whose experts go on; card:
    what the json beside the weights is to say (architecture, classes, imgsz); on_batch: called with the stage, the
    share of it that is over, and losses; returns True to save and stop; held: photos to validate on; first: photos
    that the backbone learns from, where the plan has it learn first; samples: a share of the adversarial frames
    (SAMPLED).

    Raises:
        KeyboardInterrupt: `on_batch` returned True; resume with the same run.
    """
    torch.manual_seed(plan.seed)  # of the gate's first weights
    if isinstance(model, GatedNetwork):
        model.drop_sparse()
    base = model.single(model.robust) if isinstance(model, GatedNetwork) else fused(model)
    split = split_layer(base, plan.split) if plan.made_by.gated else 0
    network = GatedNetwork(base, split, plan.experts, top_k=plan.top_k, fusion=plan.fusion)
    ranks = setting.ranks
    imitated = narrowed(teacher.model, list(base.names.values()))
    undefended = GatedNetwork(imitated, 0, ("undefended",)).requires_grad_(False).to(ranks.device)
    again = plan.goes_on(model)
    if again and plan.made_by.gated:
        network.load_state_dict(model.state_dict())
    elif plan.apart and _robust(model):  # and what it was made from
        for expert in range(len(plan.experts) - 1):
            network.experts[expert] = copy.deepcopy(undefended.experts[0])
    network.to(ranks.device).to(memory_format=torch.channels_last)

    def path(name: str) -> Path:
        return ranks.given(lambda: run.path(name))

    stages = {path(f"weights/{stage.name}.safetensors"): stage for stage in plan.stages(model)}
    if not same_layers(base, imitated, heads=False):  # whose maps mean other things
        stages = {made: replace(stage, features=0.0) for made, stage in stages.items()}
    stages = {made: replace(stage, sampled=SAMPLED if samples else 0.0) for made, stage in stages.items()}
    for made, stage in stages.items():  # all at once, or one might be found too large hours later
        if ranks.given(lambda made=made: not made.exists()):  # type: ignore[misc]
            _check_memory(network, stage, setting)
    for made, stage in stages.items():
        # On a shared trunk they start from what it was trained with.
        if stage.name in ("normal", "hard") and not (plan.apart or again):
            network.experts[stage.route or 0] = copy.deepcopy(network.experts[len(plan.experts) - 1])
        if load_made(network, made, ranks):
            continue
        checkpoint = path(f"state/{stage.name}.pt")
        validate = None

        def on_stage(number: int, done: float, losses: dict[str, float], name: str = stage.name) -> bool:
            return bool(on_batch and on_batch(name, done, losses))

        if every := held.every(stage, setting, passes(stage, setting.size)):
            start = again and stage.name == "adversarial"  # which may only lose, where they are robust already
            losses = partial(held.losses, network, undefended, stage, setting)
            validate = Validate(every, losses, figures, start)
        log = BatchLog(run, stage.name, stage.number, setting.batch, ranks)
        shown = first if stage.learn == MAPS and first else source
        train_stage(network, undefended, shown, stage, setting, checkpoint, on_stage, log, validate, samples)
        if ranks.first:
            save_gated(network, card, made)
    if not plan.sparse or not plan.made_by.attacked:
        return made
    made = path("weights/sparse.safetensors")
    if ranks.first and not made.exists():
        network.sparsen(measured_frames(source, setting), plan.sparse)
        save_gated(network, card, made)
    return made


def measured_frames(source: PhotoSet, setting: Setting) -> Iterator[Tensor]:
    """The clean frames by which channels are measured, float32 [N, 3, H, W], all by one process.

    Those of one batch after the other of each process, so that they are the same of how many there are, and no more at
    once than in training.
    """
    for rank in range(setting.ranks.count):
        ranks = replace(setting.ranks, rank=rank, control=None)
        for batch in batches(source, setting.batch, setting.size, setting.seed, 0, MEASURED, ranks=ranks):
            yield batch.clean


def _check_memory(network: GatedNetwork, stage: Stage, setting: Setting) -> None:
    learned_parameters(network, stage)

    def loss(frames: Tensor) -> Tensor:
        found = setting.run(network, frames, stage.route)[0]
        return imitation_loss(found, found)

    check_memory(network, loss, stage.size or setting.size, setting.batch, setting.ranks)
