"""What an ensemble gains on a kind of photos that it was not hardened for, and what it forgets.

    python benchmarks/adapting.py --model runs/harden/001/weights/sparse.safetensors

The model should come from `detguard harden --corruptions` with all kinds but those. New photos: some of VOC's, with its
labels (20 classes; the others are unlabelled), shown as the new kind; "vanish": attacked by the objective that hides
objects, with the model before. Replayed: others of VOC's, and COCO's 128 training photos. Judged by AP on photos that
nothing was trained on: VOC's held-out ones in the new kind, by the classes that the new photos have, COCO's in the new
kind, clean, in old kinds and attacked, by all that the model knows. Attacked ones are attacked anew for each model,
by "attacked" the worst per photo of attacks on the loss, its classes, the adversarial expert's, and that of each expert
that was grown, with the logits that ask for it.

It runs at idle priority; a killed one goes on where it was, and --minutes ends it between two rows. Rows come by seed,
then variant, then kind, and each is kept in rows.jsonl.
"""

import copy
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import numpy as np
import torch
import typer
from hardening import VOC, detguard, slug
from rich.console import Console
from rich.progress import track
from rich.table import Table
from typing_extensions import override

from detguard.data.corruptions import SEVERITIES
from detguard.data.dataset import Dataset, read_dataset
from detguard.data.stream import as_line, in_order, to_lines
from detguard.detectors.base import Detector
from detguard.detectors.gated import GatedDetector
from detguard.detectors.load import load_detector
from detguard.engine import keep_freed_memory
from detguard.evaluation.attacks import LEAD_TERMS, WORST, AttackSet
from detguard.evaluation.cache import Cache
from detguard.evaluation.score import score
from detguard.evaluation.views import Batch, Clean, Corrupted, Subject, View, fill
from detguard.files import write_file
from detguard.photos import Photo, encode_png, read_photo
from detguard.reports.evaluation import number

COCO = Path("../shared/data/coco256/data.yaml")
VANISH, NIGHT = "vanish", "fog_at_night"
KINDS = ("snow", "glass_blur", NIGHT, "motion_blur", VANISH)
OLD_KINDS = ("fog", "gaussian_noise", "defocus_blur", "brightness")
# Name -> options of `detguard adapt`; replay is added but to the last.
UNPROTECTED = "unprotected"
VARIANTS: dict[str, list[object]] = {
    "frozen, head": ["--mode", "frozen", "--expert", "head"],
    "full, lambda 1": ["--mode", "full", "--lambda", 1],
    UNPROTECTED: ["--mode", "full", "--lambda", 0, "--experts", 0],
    "full, lambda 0": ["--mode", "full", "--lambda", 0],
    "full, lambda 10": ["--mode", "full", "--lambda", 10],
    "frozen, adapter": ["--mode", "frozen", "--expert", "adapter"],
    "frozen, whole": ["--mode", "frozen", "--expert", "whole"],
}
# Of what is judged: the photos, then how they are shown; one row has a figure of each before and after.
FIGURES = ("new kind, VOC", "new kind, COCO", "clean, COCO", "old kinds, COCO", "attacked, COCO")


@dataclass(frozen=True)
class FogAtNight(Corrupted):
    """Photos in fog, with a quarter of their light."""

    @override
    def show(self, batch: Batch) -> list[Photo]:
        return [(photo * 0.25).astype(np.uint8) for photo in super().show(batch)]


def view_of(kind: str, severity: int, eps: int) -> tuple[View, str]:
    """A kind as a view, and the part of it that is judged."""
    if kind == VANISH:
        return AttackSet((VANISH,), eps, 10), WORST
    return (FogAtNight("fog", severity, 0) if kind == NIGHT else Corrupted(kind, severity, 0)), ""


def subject_of(detector: Detector, dataset: Dataset, cache: Cache) -> Subject:
    return Subject(detector.name, detector, dataset, dataset.category_ids(detector.class_names), cache)


def drawn(dataset: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """So many photos of a data set, and as many others."""
    images = np.random.default_rng(seed).permutation(list(dataset.files))[: 2 * count].tolist()
    parts = (sorted(images[:count]), sorted(images[count:]))
    first, second = (replace(dataset, files={image: dataset.files[image] for image in part}) for part in parts)
    return first, second


def lines_of(dataset: Dataset, detector: Detector, files: dict[int, Path] | None = None) -> bytes:
    """The photos of a data set as JSON lines for `detguard adapt`; files: others in their place."""
    shown = replace(dataset, files=files or dataset.files)
    return to_lines(
        as_line(replace(one, file=one.file.absolute()), detector.class_names)
        for one in in_order(shown, dataset.category_ids(detector.class_names))
    )


def write_new(folder: Path, kind: str, dataset: Dataset, detector: Detector, eps: int) -> Path:
    """Photos of a data set as the new kind, corruptions at severities drawn at random, and their labels."""
    made = folder / "new.jsonl"
    if made.exists():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    images, files = list(dataset.files), dict[int, Path]()
    levels = [SEVERITIES[0]] if kind == VANISH else SEVERITIES
    drawn = np.random.default_rng(0).choice(levels, len(images))
    for level in levels:
        of_level = {image: dataset.files[image] for image, one in zip(images, drawn, strict=True) if one == level}
        subject, (view, _) = subject_of(detector, replace(dataset, files=of_level), Cache()), view_of(kind, level, eps)
        if kind == VANISH:
            fill(subject, [view])
        for batch in track(subject.batches() if of_level else [], f"{kind}, new photos", transient=True):
            for image, photo in zip(batch, view.show(Batch(subject, batch)), strict=True):
                files[image] = folder / f"{image}.png"
                write_file(files[image], encode_png(photo))
    write_file(made, lines_of(dataset, detector, {image: files[image] for image in images}))
    return made


def judged(
    file: str, voc: Dataset, coco: Dataset, kind: str, eps: int, cache: Cache, attacked: int
) -> list[float | None]:
    """AP by FIGURES; the last one by the first so many photos, and the worst attack on each."""
    detector = load_detector(file)
    assert isinstance(detector, GatedDetector)
    first = replace(coco, files=dict(list(coco.files.items())[:attacked]))
    # By way of the fused answer, and of each expert that may lead, led there or not.
    leads = [f"lead:{leader}:{weight}" for leader in detector.leaders for weight in LEAD_TERMS]
    worst = AttackSet(("all", "class", f"route:{detector.robust}", *leads), eps, 10)
    on_voc, on_coco = (subject_of(detector, dataset, cache) for dataset in (voc, coco))
    of_new = view_of(kind, 3, eps)
    shown = [(on_voc, *of_new), (on_coco, *of_new), (on_coco, Clean(), "")]
    shown += [(on_coco, *view_of(old, 3, eps)) for old in OLD_KINDS]
    shown += [(subject_of(detector, first, cache), worst, WORST)] if attacked else []
    for subject, view, _ in track(shown, "judging", transient=True):
        fill(subject, [view])
    found = [score(subject, view, part).stats["AP"] for subject, view, part in shown]
    of_old = fmean(value or 0 for value in found[3 : 3 + len(OLD_KINDS)])
    return [*found[:3], of_old, found[-1] if attacked else None]


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    """Before > after of each kind and variant; over several seeds the mean, and the deviation of one of them."""
    table = Table(title=title)
    for column in ("new kind", "variant", "seeds", *FIGURES):
        table.add_column(column, justify="left" if column in ("new kind", "variant") else "right")
    for kind, variant in dict.fromkeys((row["kind"], row["variant"]) for row in rows):
        part = [row for row in rows if (row["kind"], row["variant"]) == (kind, variant)]
        cells = []
        for index in range(len(FIGURES)):
            before, after = ([row[when][index] or 0 for row in part] for when in ("before", "after"))
            spread = f" ± {number(stdev(after))}" if len(part) > 1 else ""
            cells.append(f"{number(fmean(before))} > {number(fmean(after))}{spread}")
        table.add_row(kind, variant, str(len(part)), *cells)
    return table


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
            for layer in (network.gate.out, network.kinds or network.gate.out):
                layer.weight.normal_()
                layer.bias.zero_()
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
    kinds: str = ",".join(KINDS),
    variants: Annotated[str, typer.Option(help="Some of the variants, separated by semicolons.")] = ";".join(VARIANTS),
    seeds: str = "0,1,2",
    new: Annotated[int, typer.Option(help="Photos of the new kind, and as many of VOC's to replay.")] = 600,
    photos: Annotated[int, typer.Option(help="Photos seen in adapting.")] = 5_000,
    rate: float = 1e-3,
    limit: Annotated[int | None, typer.Option(help="Judge on the first so many photos of each set.")] = None,
    eps: int = 2,
    attacked: Annotated[int, typer.Option(help="Judge under attack on the first so many photos of COCO's.")] = 8,
    minutes: Annotated[float | None, typer.Option(help="Begin no row after so many.")] = None,
    idle: Annotated[bool, typer.Option(help="Take only the time that nobody else wants (Linux).")] = True,
    with_costs: Annotated[bool, typer.Option(help="Also what a photo costs by number of experts.")] = False,
    out: Path = Path("runs/benchmark/adapting"),
) -> None:
    keep_freed_memory()
    if idle and hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    if not (VOC / "data.yaml").exists():
        subprocess.run([sys.executable, "scripts/voc_split.py", "--out", VOC], check=True)
    detector, cache, began = load_detector(model), Cache(), time.monotonic()
    train, old = read_dataset(VOC / "data.yaml", "train"), read_dataset(COCO, "train")
    voc, coco = read_dataset(VOC / "data.yaml", "val", limit=limit), read_dataset(COCO, "val", limit=limit)
    done, kept = list[dict[str, Any]](), out / "rows.jsonl"
    asked = {"model": detector.state_hash(), "new": new, "photos": photos, "rate": rate, "limit": limit, "eps": eps}
    asked["attacked"] = attacked
    if kept.exists():
        done = [json.loads(line) for line in kept.read_text().splitlines()]
        if any(row["asked"] != asked for row in done):
            raise SystemExit(f"{kept}: rows of other options; choose another --out")
    wanted = [(k, v, int(s)) for s in seeds.split(",") for v in variants.split(";") for k in kinds.split(",")]
    for kind, variant, seed in wanted:
        if any((row["kind"], row["variant"], row["seed"]) == (kind, variant, seed) for row in done):
            continue
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            break
        fresh, replayed = drawn(train, new, seed)
        file = write_new(out / f"{kind}-{seed}", kind, fresh, detector, eps)
        replay = out / f"replay-{seed}.jsonl"
        write_file(replay, lines_of(replayed, detector) + lines_of(old, detector))
        run = out / f"{kind}-{seed}-{slug(variant)}"
        options = [*VARIANTS[variant], "--photos", photos, "--rate", rate, "--seed", seed]
        options += [] if variant == UNPROTECTED else ["--replay", replay]
        detguard("adapt", run, "--model", model, "--new", file, *options)
        row = {"kind": kind, "variant": variant, "seed": seed, "asked": asked}
        for when, weights in (("before", model), ("after", str(run / "weights/adapted.safetensors"))):
            row[when] = judged(weights, voc, coco, kind, eps, cache, attacked)
        done.append(row)
        write_file(kept, "".join(json.dumps(row) + "\n" for row in done).encode())
        print(f"{(time.monotonic() - began) / 60:.1f} min: {kind}, {variant}, seed {seed}: {row}", flush=True)
    title = (
        f"{detector.name}, {new} new photos, {photos} seen, AP before > after on {len(voc.files)} of VOC, "
        f"{len(coco.files)} of COCO; {len(done)} of {len(wanted)} rows; severity 3, vanish: eps {eps}, 10 steps; "
        f"attacked: the first {attacked}, eps {eps}, 10 steps, worst per photo"
    )
    Console(width=170).print(table_of(done, title))
    if with_costs:
        Console(width=170).print(costs(model, coco, (3, 6, 12), (1, 2), 40))


if __name__ == "__main__":
    typer.run(main)
