"""What attacks reach, by goal and threat: python benchmarks/threats.py COMMAND, one of those of --help.

Photos are the first of coco256 val in which the detector finds a person over .25; figures are judged from saved files.
"""

import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import typer

import detguard
from detguard.attacks.budgets import L2, Linf, parse_budget
from detguard.detectors.base import Detector
from detguard.engine import keep_freed_memory
from detguard.objectives import Fabricate, Flood, Mislabel, Untargeted, Vanish
from detguard.photos import PADDING_LEVEL, Photo, find_photos, read_photo
from detguard.reports.tables import counted, percents
from detguard.transforms.parse import parse_transforms

app = typer.Typer()
SHARED = Path("../shared")
PHOTOS = SHARED / "data/coco256/images/val"
GOALS: dict[str, dict[str, Any]] = {
    "vanish": {},
    "vanish, others stay": {"objective": Vanish(keep_others=True)},
    "mislabel": {"objective": Mislabel({"person": "car"})},
    "untargeted": {"objective": Untargeted()},
    "fabricate": {"objective": Fabricate(count=2)},
    "flood": {"objective": Flood(count=60)},
}
THREATS: dict[str, dict[str, Any]] = {
    "L-inf 8": {"budget": Linf(8), "step": 2},
    "L2 8": {"budget": L2(8)},
    "L-inf 16 inside": {"budget": parse_budget("linf", 16, "inside"), "step": 3},
}
JUDGES = "jpeg:60,gaussian:3"


def with_person(detector: Detector, most: int) -> list[Path]:
    """The first photos in which the detector finds a person."""
    found = []
    for file in find_photos([PHOTOS]):
        if len(detector.predict(read_photo(file), 0.25).of([detector.class_index("person")])):
            found.append(file)
            if len(found) == most:
                break
    return found


def rate(values: Iterable[bool | None]) -> str:
    """Like "98 % (49/50)" of the values that are not None."""
    return percents([[counted(values)]])[0][0]


def row(cells: list[str]) -> None:
    """One row of a table in markdown."""
    print(f"| {' | '.join(cells)} |", flush=True)


def header(cells: list[str]) -> None:
    """The first two rows."""
    row(cells)
    print("|---" * len(cells) + "|")


def made(detector: Detector, files: list[Path], **options: Any) -> tuple[list[detguard.Result], float]:
    """Results of an attack, and seconds per photo."""
    begun = time.perf_counter()
    results = list(detguard.attack(detector, files, **options))
    return results, (time.perf_counter() - begun) / len(files)


@app.command()
def matrix(
    model: list[str] = ["detguard-n", "detguard-n-hard", "../shared/weights/yolo11n-coco.pt"],  # noqa: B006
    most: int = 12,
    steps: int = 40,
) -> None:
    """Each goal by each threat on detectors of several families at 320 px, with the default group, on the same photos.

    A cell: photos whose whole group fools from file, of those with something to attack; the share of their photos that
    still fool after transforms that were not in the group; mean iterations; seconds of the processor per photo.
    """
    keep_freed_memory()
    files = with_person(detguard.load_detector("detguard-n", 320), most)
    print(f"320 px, {len(files)} photos, at most {steps} iterations, seed 0; survival of {JUDGES}\n")
    header(["detector", "goal", *THREATS])
    for name in model:
        detector = detguard.load_detector(name, 320)
        for goal, wish in GOALS.items():
            cells = []
            for threat in THREATS.values():
                if threat["budget"].config().get("mask") and goal in ("fabricate", "flood"):
                    cells.append("no objects to be inside of")
                    continue
                begun = time.process_time()
                results = list(detguard.attack(detector, files, steps=steps, **threat, **wish))
                seconds = (time.process_time() - begun) / len(files)
                attacked = [r for r in results if r.members]
                fooled = [r for r in attacked if r.success]
                verified = list(detguard.verify(fooled, detector, transforms=JUDGES)) if fooled else []
                kept = [r["members"][t]["fooled"] for r in verified for t in JUDGES.split(",")]
                survival = f"{100 * mean(kept):.0f} %" if kept else "-"
                iterations = mean(r.record["iterations"] for r in attacked)
                cells.append(f"{len(fooled)}/{len(attacked)}, {survival}, {iterations:.0f} it, {seconds:.1f} s")
            row([detector.name, goal, *cells])


FIXED = "median:3,jpeg:75,rotate:5,crop:0.9,brightness:0.2"
RANGES = "median:3,jpeg:75,rotate:-12..12,crop:0.8..1,brightness:-0.3..0.3,motion:3..9,noise:4..10"
UNSEEN = "rotate:3,rotate:8,crop:0.85,motion:7,noise:8"
GROUPS = {"default": "median:3,jpeg:75", "fixed": FIXED, "ranges": RANGES}


def judged(detector: Detector, results: list[detguard.Result], specs: str) -> Iterator[str]:
    """The share of photos that fool after each transform, where its picture of the clean photo shows the target."""
    person = detector.class_index("person")
    for transform in parse_transforms(specs):
        kept = []
        for result in results:
            clean = read_photo(result.record["photo"])
            if len(detector.predict(transform(clean), 0.25).of([person])):
                kept.append(not len(detector.predict(transform(result.photo), 0.25).of([person])))
        yield rate(kept)


@app.command()
def geometry(
    model: str = "detguard-n", imgsz: int | None = None, most: int = 12, steps: int = 100, eps: int = 8,
    group: list[str] = list(GROUPS),  # noqa: B006
) -> None:  # fmt: skip
    """Survival of transforms that moved pixels: the default group, one of fixed transforms, one of ranges."""
    keep_freed_memory()
    detector = detguard.load_detector(model, imgsz)
    files = with_person(detector, most)
    print(f"{model} at {detector.imgsz} px, {len(files)} photos, eps {eps}, at most {steps} iterations\n")
    header(["group", "photo", *FIXED.split(","), *UNSEEN.split(","), "iterations", "s per photo"])
    for name in group:
        results, seconds = made(
            detector, files, transforms=GROUPS[name], budget=Linf(eps), steps=steps, schedule="group"
        )
        cells = [rate([r.members["photo"]["fooled"] for r in results]), *judged(detector, results, f"{FIXED},{UNSEEN}")]
        iterations = mean(r.record["iterations"] for r in results)
        row([f"{name}: `{GROUPS[name]}`", *cells, f"{iterations:.1f}", f"{seconds:.1f}"])


@app.command()
def transfer(
    first: str = "yolo11n", second: str = "yolov8n", third: str = "detguard-n", most: int = 12, eps: int = 8
) -> None:
    """Photos made for one detector before another that was not attacked: plain, momentum, diverse, two at once."""
    keep_freed_memory()
    names = {
        name: name if name.startswith("detguard") else f"{SHARED}/weights/{name}-coco.pt"
        for name in (first, second, third)
    }
    detectors = {name: detguard.load_detector(file, 320) for name, file in names.items()}
    header(["made for", "how", "fools its own", "fools the other", "s per photo"])
    diverse = "median:3,jpeg:75,stretch:0.9..1.1,crop:0.8..1"
    for source, target in ((first, second), (second, first)):
        own, other = detectors[source], detectors[target]
        files = [f for f in with_person(own, most) if len(other.predict(read_photo(f), 0.25).of([0]))]
        ways: dict[str, tuple[Any, dict[str, Any]]] = {
            "plain": (own, {"transforms": "none"}),
            "momentum": (own, {"transforms": "none", "momentum": 1.0, "margin": 0.9}),
            "momentum, diverse group": (own, {"transforms": diverse, "momentum": 1.0, "margin": 0.9}),
            f"the same, and {third}": (
                [own, detectors[third]],
                {"transforms": diverse, "momentum": 1.0, "margin": 0.9},
            ),
        }
        for way, (attacked, options) in ways.items():
            results, seconds = made(attacked, files, budget=Linf(eps), steps=60, **options)
            fools = [not len(other.predict(r.photo, 0.25).of([0])) for r in results]
            row(
                [
                    source,
                    way,
                    rate([r.members["photo"]["fooled"] for r in results]),
                    f"{target}: {rate(fools)}",
                    f"{seconds:.1f}",
                ]
            )


@app.command()
def smallest(model: list[str] = ["detguard-n", "detguard-n-hard"], most: int = 12, steps: int = 40) -> None:  # noqa: B006
    """The least budget by which persons vanish from the photo alone, median over photos, by two rules."""
    keep_freed_memory()
    header(["detector", "budget", "rule", "least, median", "fooled", "s per photo"])
    for name in model:
        detector = detguard.load_detector(name)
        files = with_person(detector, most)
        for budget, rule in ((Linf(32), "steepest"), (L2(32), "steepest"), (L2(32), "apgd")):
            options: dict[str, Any] = {"budget": budget, "rule": rule, "smallest": True, "steps": steps}
            results, seconds = made(detector, files, transforms="none", **options)
            used = sorted(r.used if r.success else float("inf") for r in results)
            least = (used[(len(used) - 1) // 2] + used[len(used) // 2]) / 2
            fooled = rate([r.success for r in results])
            row([f"{detector.name}, {detector.imgsz} px", budget.kind, rule, f"{least:.3g}", fooled, f"{seconds:.1f}"])


@app.command()
def foolbox(
    model: list[str] = ["detguard-n", "../shared/weights/yolo11n-coco.pt"],  # noqa: B006
    most: int = 24, steps: int = 30, peer_steps: int = 300,
) -> None:  # fmt: skip
    """The least L2 change by which persons vanish, beside foolbox's DDN (pip install foolbox), from 8-bit photos.

    Photos as large as the frame, so that both change the same pixels. `peer_steps` are DDN's gradient steps: at least
    as many as ours takes at `steps` per size (the table says how many that were).
    """
    from foolbox import Misclassification, PyTorchModel
    from foolbox.attacks import DDNAttack

    keep_freed_memory()
    header(["detector", "attack", "least L2, median", "mean", "fooled from 8 bits", "gradient steps", "s per photo"])
    for name in model:
        detector = detguard.load_detector(name, 320)
        person = detector.class_index("person")
        photos = [frame_of(detector, read_photo(file)) for file in with_person(detector, most)]
        photos = [p for p in photos if len(detector.predict(p, 0.25).of([person]))]

        for rule in ("steepest", "apgd"):
            options: dict[str, Any] = {"budget": L2(32), "rule": rule, "smallest": True, "steps": steps}
            results, seconds = made(detector, photos, transforms="none", **options)
            taken = mean(r.record["iterations"] for r in results)
            peer_row(detector, person, rule, photos, [r.photo for r in results], taken, seconds)

        begun, made_by_ddn = time.perf_counter(), []
        for photo in photos:
            x = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
            network = PyTorchModel(Found(detector, person).eval(), (0, 1))
            _, (changed,), _ = DDNAttack(steps=peer_steps)(
                network, x, Misclassification(torch.tensor([1])), epsilons=[None]
            )
            # What it found seldom survives rounding, so it is given the least enlargement that does.
            for scale in (1 + i / 50 for i in range(151)):
                rounded = ((x + scale * (changed - x))[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
                if not len(detector.predict(rounded, 0.25).of([person])):
                    break
            made_by_ddn.append(rounded)
        seconds = (time.perf_counter() - begun) / len(photos)
        peer_row(detector, person, "foolbox DDN, enlarged", photos, made_by_ddn, peer_steps, seconds)


class Found(torch.nn.Module):
    """A classifier of photos, for foolbox: 0, and how far the surest person is over the threshold."""

    def __init__(self, detector: Detector, person: int) -> None:
        super().__init__()
        self.detector, self.person = detector, person

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, 2] of photos, float32 [B, 3, H, W], 0..1."""
        box = self.detector.letterbox((x.shape[2], x.shape[3]))
        top, left = box.offset
        pad = (left, box.frame[1] - x.shape[3] - left, top, box.frame[0] - x.shape[2] - top)
        frames = torch.nn.functional.pad(x, pad, value=PADDING_LEVEL / 255)
        over = self.detector.candidates(frames).logits[:, :, self.person].amax(1) + math.log(3)  # .25 has logit -log 3
        return torch.stack([torch.zeros_like(over), over], 1)


def frame_of(detector: Detector, photo: Photo) -> Photo:
    """A photo resized as for the detector, without the padding."""
    box = detector.letterbox(photo.shape[:2])
    (top, left), (height, width) = box.offset, box.resized
    return box(photo)[top : top + height, left : left + width].copy()


def peer_row(
    detector: Detector, person: int, how: str, before: list[Photo], after: list[Photo], steps: float, seconds: float
) -> None:
    """How large the changes are, and on how many photos no person is found."""
    norms = [float(((a.astype(float) - b) / 255).__pow__(2).sum() ** 0.5) for a, b in zip(after, before, strict=True)]
    fooled = [not len(detector.predict(photo, 0.25).of([person])) for photo in after]
    row(
        [
            detector.name,
            how,
            f"{median(norms):.2f}",
            f"{mean(norms):.2f}",
            rate(fooled),
            f"{steps:.0f}",
            f"{seconds:.1f}",
        ]
    )


if __name__ == "__main__":
    app()
