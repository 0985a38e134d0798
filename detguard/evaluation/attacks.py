"""Attacks as views: white-box on the training loss and on confidence, transferred, and black-box."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from typing_extensions import override

from detguard import DetguardError
from detguard.attacks.budgets import Linf
from detguard.attacks.group import AttackOptions, Attempt, attack_group
from detguard.detections import Detections
from detguard.detectors.base import Detector
from detguard.evaluation.cache import foreign, pack
from detguard.evaluation.coco import value_left
from detguard.evaluation.views import Batch, Subject, View
from detguard.objectives.base import Objective
from detguard.objectives.parse import KINDS
from detguard.photos import Photo, decode_photo, encode_png
from detguard.training_loss import GAINS
from detguard.transforms.base import Transform

ATTACKS = ("class", "box", "all", "vanish", "rank")
# Of what has no gradient, the only one.
SQUARE = "square"
WORST = "worst"
# What it is called where it is shown: not the least figure of all attacks, which may be of one alone.
WORST_PER_PHOTO = "worst attack per photo"
PHOTO = "photo"
# The vanish attack goes on until nothing is over this confidence: COCO counts detections far below .25.
VANISH_BELOW = 0.02


# Weights of the gate's logits beside the training loss, whose gradient may be far larger or smaller.
GATE_TERMS = (1, 10, 100)
LEAD_TERMS = (10, 100)


def attack_name(run: str) -> str:
    """What a part of an attack is called where it is shown: of `class-0` "class, start 1"."""
    if run == WORST:
        return WORST_PER_PHOTO
    attack, restart = run.rsplit("-", 1)
    return f"{attack}, start {int(restart) + 1}"


def attacks_on(detector: Detector, names: Sequence[str]) -> tuple[str, ...]:
    """The attacks `names`, and for a gated ensemble those that know of its gate; SQUARE where there is no gradient.

    gate:W: the whole loss, and W times the logits by which the gate prefers its adversarial expert;
    route:I, rank:I: the whole loss, or the order, of expert I alone, whatever the gate says and however it is fused;
    lead:I:W: the whole loss of expert I, which was grown, and W times the logits by which the gate asks the adversarial
    one rather than it;
    dense: the whole loss of all experts, where top-k leaves some out.
    """
    if not detector.differentiable:
        return (SQUARE,)
    ways = list(detector.variants())
    routes = [way for way in ways if way.startswith("route:")]
    gate = [f"gate:{weight}" for weight in GATE_TERMS] if detector.experts else []
    ranks = [way.replace("route:", "rank:") for way in routes]
    leads = [f"lead:{leader}:{weight}" for leader in detector.leaders for weight in LEAD_TERMS]
    return (*names, *gate, *leads, *routes, *ranks, *(way for way in ways if way not in routes))


def attack_objective(name: str, targets: Sequence[int], detector: Detector) -> Objective:
    """The objective of one of ATTACKS, or of those that `attacks_on` a detector adds, on the classes `targets`.

    class, box, all: the training loss or its parts; vanish: the confidence of any of the classes; rank: objects under
    what is not there.
    """
    kind, _, value = name.partition(":")
    if name == "vanish" or (kind == "rank" and (not value or value.isdigit())):
        return KINDS[kind](tuple(targets))
    if kind in ("gate", "route") and value.isdigit():
        return KINDS["degrade"](tuple(targets), gate=float(value) if kind == "gate" else 0.0, robust=detector.robust)
    if kind == "lead" and value.replace(":", "", 1).isdigit():
        leader, weight = value.split(":")
        return KINDS["degrade"](tuple(targets), gate=float(weight), robust=detector.robust, towards=int(leader))
    parts = {"class": ("class",), "box": ("box", "distance"), "all": tuple(GAINS), "dense": tuple(GAINS)}
    if name not in parts:
        raise DetguardError(f"`attacks` '{name}': expected some of {', '.join(ATTACKS)}")
    return KINDS["degrade"](tuple(targets), parts[name])


@dataclass(frozen=True)
class AttackSet(View):
    """White-box PGD by several attacks and restarts, or SQUARE alone, and the worst of them for each photo, as 8-bit
    photos.

    eps: levels of 255; steps: of each, of SQUARE its queries. Part "worst" holds the detections of the worst attack on
    each photo, "photo" its PNG.
    """

    attacks: tuple[str, ...]
    eps: int
    steps: int
    restarts: int = 1
    seed: int = 0

    @property
    @override
    def name(self) -> str:
        if self.black_box:
            return f"blackbox-eps{self.eps}-queries{self.steps}"
        return f"attack-eps{self.eps}-steps{self.steps}"

    @property
    def black_box(self) -> bool:
        """Whether it uses no gradient."""
        return self.attacks == (SQUARE,)

    @property
    def runs(self) -> tuple[str, ...]:
        """One name per attack and restart."""
        return tuple(f"{attack}-{restart}" for attack in self.attacks for restart in range(self.restarts))

    @property
    def scored(self) -> tuple[str, ...]:
        """The parts that are detections: the worst per photo, and each run's own."""
        return (WORST, *self.runs)

    @property
    @override
    def parts(self) -> tuple[str, ...]:
        return (*self.scored, PHOTO)

    @property
    @override
    def cost(self) -> int:
        return len(self.runs) * (self.steps + 1 if self.black_box else 3 * self.steps + 2)

    @override
    def depends_on(self, subject: Subject, image: int) -> object:
        return [subject.labels[image], sorted(subject.category_ids)]

    @override
    def show(self, batch: Batch) -> list[Photo]:
        """The worst photos, from the cache."""
        return [kept_photo(batch.subject, self, image) for image in batch.images]

    @override
    def entries(self, batch: Batch) -> list[dict[str, bytes]]:
        subject = batch.subject
        entries: list[dict[str, bytes]] = [{} for _ in batch.images]
        scored = sorted(subject.category_ids)
        worst: list[tuple[tuple[float, float], str, Photo] | None] = [None for _ in batch.images]
        for run in self.runs:
            attack, restart = run.rsplit("-", 1)
            photos = self.attack(batch, attack, int(restart))
            for i, found in enumerate(subject.detect(photos)):
                entries[i][run] = pack(found)
                left = value_left(batch.objects[i], found.of(scored))
                best = worst[i]
                if best is None or left < best[0]:
                    worst[i] = left, run, photos[i]
        for entry, best in zip(entries, worst, strict=True):
            assert best is not None
            entry[WORST] = entry[best[1]]
            entry[PHOTO] = encode_png(best[2])
        return entries

    def attack(self, batch: Batch, name: str, restart: int) -> list[Photo]:
        """The photos of a batch after one attack; restart 0 starts at the photo, later ones at random."""
        subject = batch.subject
        if name == SQUARE:
            return square_photos(batch, self.eps, self.steps, self.seed + restart)
        options = pgd_options(self.eps, self.steps, len(batch.images), self.seed + restart, random_start=restart > 0)
        objective = attack_objective(name, sorted(subject.category_ids), subject.detector)
        kind, _, value = name.partition(":")
        way = f"route:{value.partition(':')[0]}" if kind in ("rank", "lead") else name
        detector = subject.detector.variants().get(way, subject.detector)
        return attacked_photos(batch, detector, objective, options)


def pgd_options(eps: int, steps: int, batch: int, seed: int = 0, *, random_start: bool = False) -> AttackOptions:
    """White-box PGD as detectors are judged by it. eps: levels of 255; batch: photos attacked together."""
    return AttackOptions(
        conf=VANISH_BELOW,
        budget=Linf(eps),
        # Large steps, and momentum as MI-FGSM has it (Dong et al. 2018): small steps are lost in 8-bit rounding.
        step=max(eps / 2, 1) if steps > 2 else eps,
        momentum=0.75,
        steps=steps,
        gradient="exact",
        random_start=random_start,
        seed=seed,
        batch=batch,
        stop=False,
    )


def square_photos(batch: Batch, eps: int, queries: int, seed: int) -> list[Photo]:
    """The photos of a batch after so many queries each of the Square attack on the whole training loss.

    Of detectors that tell what they have found and no more, on the order of what is found.
    """
    subject = batch.subject
    # By the training loss, an object that is no longer told of would count for the attacker no more.
    kind = "rank" if subject.detector.listed and not subject.detector.differentiable else "all"
    objective = attack_objective(kind, sorted(subject.category_ids), subject.detector)
    # Neither loss asks for a confidence; one under what an NMS inside tells would be refused.
    conf = max(AttackOptions.conf, (subject.detector.nms_inside or (0.0,))[0])
    options = AttackOptions(
        conf=conf,
        budget=Linf(eps),
        black_box=True,
        queries=max(queries, 2),
        seed=seed,
        batch=len(batch.images),
        stop=False,
    )
    return attacked_photos(batch, subject.detector, objective, options)


def attacked_photos(batch: Batch, detector: Detector, objective: Objective, options: AttackOptions) -> list[Photo]:
    """The photos of a batch after an attack on what is labelled in them."""
    keys = [batch.subject.hashes[image] for image in batch.images]
    return attacked(detector, zip(keys, batch.photos, batch.objects, strict=True), objective, options)


def attacked(
    detector: Detector,
    photos: Iterable[tuple[str, Photo, Detections]],
    objective: Objective,
    options: AttackOptions,
    on_step: Callable[[Sequence[Attempt]], None] | None = None,
    transforms: Sequence[Transform] = (),
) -> list[Photo]:
    """The photos after an attack, in the order in which they are given; arguments as of `attack_group`.

    Raises:
        DetguardError: one has gone over its budget, so that no figure would be right.
    """
    # They end in another order, and by none of its parts is one told: a photo may be there twice, with other labels.
    given = [(key, photo[:], objects) for key, photo, objects in photos]
    done = attack_group(detector, given, objective, transforms, options, on_step)
    made = dict[int, Photo]()
    for attempt in done:
        made[id(attempt.photo)] = attempt.adversarial
        attempt.used_by(attempt.adversarial, attempt.key)
    return [made[id(photo)] for _, photo, _ in given]


def kept_photo(subject: Subject, attack: AttackSet, image: int) -> Photo:
    """The photo of the worst attack, `uint8 [H, W, 3]`, from the cache.

    Raises:
        DetguardError: as `View.kept`, or it is no photo of that size.
    """
    photo, entry = decode_photo(attack.kept(subject, image, PHOTO)), subject.dataset.annotations.imgs[image]
    height, width = photo.shape[:2]
    if (height, width) != (entry["height"], entry["width"]):
        raise foreign(f"{width} x {height} px", subject.cache.file)
    return photo


@dataclass(frozen=True)
class Transferred(View):
    """The worst photos of an attack on another detector, which must be in the cache."""

    source: Subject
    attacks: AttackSet

    @property
    @override
    def name(self) -> str:
        return f"transfer-from-{self.source.name}-eps{self.attacks.eps}"

    @override
    def spec(self) -> object:
        return [self.source.state, self.attacks.spec()]

    @override
    def depends_on(self, subject: Subject, image: int) -> object:
        return self.attacks.depends_on(self.source, image)

    @override
    def show(self, batch: Batch) -> list[Photo]:
        return [kept_photo(self.source, self.attacks, image) for image in batch.images]
