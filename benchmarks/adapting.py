"""What an ensemble gains on a kind of photos that it was not hardened for, and what it forgets.

    python benchmarks/adapting.py --model runs/harden/001/weights/sparse.safetensors --kinds snow

The model should come from `detguard harden --corruptions` with all kinds but those. New photos: some of the street and
VOC photos, labelled by --labeller and shown as the new kind ("vanish": attacked by the objective that hides objects,
with the model before).
Judged on photos that nothing was trained on, by COCO's AP; attacked ones are attacked anew for each model. Then, with
more and more experts, what a photo costs when only k of them are asked.
"""

import copy
import time
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import typer
import yaml
from hardening import detguard, slug
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torchvision.ops import box_convert

from detguard.data.corruptions import SEVERITIES, corrupt
from detguard.data.dataset import Dataset, read_dataset
from detguard.detectors.base import Detector
from detguard.detectors.gated import GatedDetector
from detguard.detectors.load import load_detector
from detguard.engine import keep_freed_memory
from detguard.evaluation.attacks import WORST, AttackSet
from detguard.evaluation.cache import Cache
from detguard.evaluation.score import score
from detguard.evaluation.views import Batch, Clean, Corrupted, Subject, View, fill
from detguard.photos import Photo, read_photo
from detguard.reports.evaluation import number

SHARED = Path("../shared/data")
VANISH = "vanish"
OLD_KINDS = ("fog", "gaussian_noise", "defocus_blur", "brightness")
# Name -> options of `detguard adapt`; replay is added but to those without, which only lambda protects, if it is not 0.
ALONE = "no replay, no expert"
VARIANTS: dict[str, list[object]] = {"frozen": ["--mode", "frozen"]}
VARIANTS |= {f"full, lambda {keep}": ["--mode", "full", "--lambda", keep] for keep in (0, 1, 10)}
VARIANTS |= {f"{ALONE}, lambda {keep}": [*VARIANTS[f"full, lambda {keep}"], "--experts", 0] for keep in (0, 1, 10)}
# What the street photos' own labels were made by: at this size and confidence.
LABEL_SIZE, LABEL_CONFIDENCE = 640, 0.3


def subject_of(detector: Detector, dataset: Dataset, cache: Cache) -> Subject:
    return Subject(detector.name, detector, dataset, dataset.category_ids(detector.class_names), cache)


def labels_by(labeller: Detector, photos: dict[str, Path]) -> dict[str, str]:
    """What a detector finds on photos, as YOLO labels."""
    labels = {}
    for name, file in track(photos.items(), "labelling", transient=True):
        photo = read_photo(file)
        found = labeller.detect([photo], LABEL_CONFIDENCE)[0]
        size = torch.tensor([photo.shape[1], photo.shape[0]] * 2)
        boxes = box_convert(found.boxes, "xyxy", "cxcywh") / size
        rows = [(int(c), *box.tolist()) for c, box in zip(found.classes, boxes, strict=True)]
        labels[name] = "".join(" ".join(f"{value:g}" for value in row) + "\n" for row in rows)
    return labels


def labelled_folder(folder: Path, labels: dict[str, str], shown: dict[str, Photo], names: dict[int, str]) -> Path:
    """A data.yaml of photos, shown as they are to be learned, with the labels of what they were."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, photo in shown.items():
        cv2.imwrite(str(folder / "images" / f"{name}.png"), photo[..., ::-1])
        (folder / "labels" / f"{name}.txt").write_text(labels[name])
    (folder / "data.yaml").write_text(yaml.safe_dump({"path": ".", "train": "images", "names": names}))
    return folder / "data.yaml"


def drawn(count: int, seed: int) -> dict[str, Path]:
    """Photos of the street and VOC sets."""
    files = sorted(file for name in ("street1569", "voc3608") for file in (SHARED / name / "images").glob("*.jpg"))
    return {file.stem: file for file in np.random.default_rng(seed).permutation(np.array(files))[:count]}


def shown_as(kind: str, photos: dict[str, Path], clean: Path, detector: Detector, eps: int) -> dict[str, Photo]:
    """Photos as the new kind; attacked ones by way of their clean data.yaml, whose labels the attack needs."""
    if kind != VANISH:
        rng = np.random.default_rng(0)
        levels = {name: int(rng.choice(SEVERITIES)) for name in photos}
        return {n: corrupt(read_photo(f), kind, levels[n], i) for i, (n, f) in enumerate(photos.items())}
    dataset = read_dataset(clean, "train")
    subject = subject_of(detector, dataset, Cache())
    view = AttackSet((VANISH,), eps, 10)
    fill(subject, [view])
    shown = {}
    for images in track(subject.batches(), "attacked photos", transient=True):
        for image, photo in zip(images, view.show(Batch(subject, images)), strict=True):
            shown[dataset.files[image].stem] = photo
    return shown


def judged(file: str, dataset: Dataset, new: str, eps: int, cache: Cache) -> tuple[float | None, ...]:
    """AP on the new kind, on clean photos and, the mean, on old corruptions."""
    subject = subject_of(load_detector(file), dataset, cache)
    of_new: tuple[View, str] = (AttackSet((VANISH,), eps, 10), WORST) if new == VANISH else (Corrupted(new, 3, 0), "")
    views = [of_new, (Clean(), ""), *((Corrupted(kind, 3, 0), "") for kind in OLD_KINDS)]
    for view, _ in track(views, "judging", transient=True):
        fill(subject, [view])
    first, clean, *old = (score(subject, view, part).stats["AP"] for view, part in views)
    return first, clean, float(np.mean([value or 0 for value in old]))


def costs(file: str, dataset: Dataset, counts: tuple[int, ...], ks: tuple[int, ...], photos: int) -> Table:
    """Milliseconds per photo by number of experts and of those asked, the fastest of three rounds."""
    detector = load_detector(file)
    assert isinstance(detector, GatedDetector)
    shown = [read_photo(f) for f in list(dataset.files.values())[:photos]]
    grown = {}
    for count in counts:
        network = copy.deepcopy(detector.model)
        network.fusion = "average:0"  # by other rules the adversarial expert is asked besides the k
        extra = max(0, count - len(network.names))
        torch.manual_seed(0)
        network.grow([f"copy {i}" for i in range(extra)], 0)
        with torch.no_grad():  # as asked for as the old ones, so that photos differ in whom they ask
            network.gate.out.weight.normal_()
            network.gate.out.bias.zero_()
        grown[count] = network
    table = Table(title=f"{detector.name}: ms per photo, {photos} photos one by one, fastest of 3 rounds")
    for column in ("asked", *(f"K = {count}" for count in counts), "most against least"):
        table.add_column(column, justify="right")
    for k in ks:
        best = dict.fromkeys(counts, float("inf"))
        for _ in range(3):
            for count, network in grown.items():
                network.top_k = k
                one = GatedDetector(network, "", detector.imgsz)
                began = time.perf_counter()
                for photo in shown:
                    one.detect([photo])
                best[count] = min(best[count], (time.perf_counter() - began) / len(shown) * 1e3)
        row = [f"{ms:.1f}" for ms in best.values()]
        table.add_row(str(k), *row, f"{100 * (max(best.values()) / min(best.values()) - 1):+.1f} %")
    return table


def main(
    model: Annotated[str, typer.Option(help="A gated ensemble that was hardened without the kinds.")],
    kinds: str = "snow,glass_blur,vanish",
    variants: Annotated[str, typer.Option(help="Some of the variants, separated by semicolons.")] = ";".join(VARIANTS),
    labeller: Annotated[str, typer.Option(help="What labels the new photos.")] = "../shared/weights/yolo11n-coco.pt",
    new: Annotated[int, typer.Option(help="Photos of the new kind.")] = 600,
    photos: Annotated[int, typer.Option(help="Photos seen in adapting.")] = 5_000,
    rate: float = 1e-3,
    data: str = str(SHARED / "coco256/data.yaml"),
    limit: int | None = None,
    eps: int = 2,
    out: Path = Path("runs/benchmark/adapting"),
) -> None:
    keep_freed_memory()
    detector, dataset, cache = load_detector(model), read_dataset(data, limit=limit), Cache()
    names = yaml.safe_load((SHARED / "coco256/data.yaml").read_text())["names"]
    fresh, replayed = drawn(2 * new, 0), {}
    for name in list(fresh)[new:]:
        replayed[name] = fresh.pop(name)
    labels = labels_by(load_detector(labeller, LABEL_SIZE), fresh | replayed)
    replay, clean = out / "replay/data.yaml", out / "clean/data.yaml"
    for file, photos_of in ((replay, replayed), (clean, fresh)):
        if not file.exists():
            labelled_folder(file.parent, labels, {n: read_photo(f) for n, f in photos_of.items()}, names)
    for kind in kinds.split(","):
        table = Table(
            title=f"{detector.name}, {new} new photos, {photos} seen; {len(dataset.files)} of {dataset.name}, AP "
            f"before > after; corruptions at severity 3, vanish: eps {eps}, 10 steps, seed 0"
        )
        for column in ("new kind", "variant", "new kind AP", "clean AP", f"old AP ({', '.join(OLD_KINDS)})"):
            table.add_column(column, justify="left" if column in ("new kind", "variant") else "right")
        folder = out / kind
        if not (folder / "data.yaml").exists():
            labelled_folder(folder, labels, shown_as(kind, fresh, clean, detector, eps), names)
        before = judged(model, dataset, kind, eps, cache)
        for name in variants.split(";"):
            run = out / f"{kind}-{slug(name)}"
            options = [*VARIANTS[name], "--photos", photos, "--rate", rate]
            options += [] if name.startswith(ALONE) else ["--replay", replay]
            detguard("adapt", run, "--model", model, "--new", folder / "data.yaml", *options)
            after = judged(str(run / "weights/adapted.safetensors"), dataset, kind, eps, cache)
            table.add_row(kind, name, *(f"{number(a)} > {number(b)}" for a, b in zip(before, after, strict=True)))
        Console(width=170).print(table)
    Console(width=170).print(costs(model, dataset, (3, 6, 12), (1, 2), 40))


if __name__ == "__main__":
    typer.run(main)
