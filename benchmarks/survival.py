"""Do attacked photos still fool the detector from file, and after filtering and compression? One table per question.

    python benchmarks/survival.py group      # one image against the group, judged by the group's transforms
    python benchmarks/survival.py unseen     # a larger group against transforms that were not in it
    python benchmarks/survival.py mislabel   # bus -> train
    python benchmarks/survival.py rules      # aggregates and gradient rules on the same photos

Runs are kept under runs/benchmarks/ and go on where they stopped. Success is judged on the saved files, by the
detector's own predict path.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from detguard.attacks.budgets import Linf
from detguard.attacks.group import AttackOptions
from detguard.attacks.run import Job, attack_photos, plan_attack, verify_run
from detguard.detectors.load import detector_config, load_detector
from detguard.engine import keep_freed_memory
from detguard.photos import find_photos
from detguard.reports.tables import rate
from detguard.runs import Record, Run, photo_keys
from detguard.transforms.parse import parse_transforms

UNSEEN = "jpeg:40,jpeg:60,jpeg:85,jpeg:95,gaussian:3,resize:0.7,resize:0.5"
GROUP = "median:3,jpeg:75"
LARGE = "median:3,median:5,jpeg:50,jpeg:75"

app = typer.Typer(help=__doc__)
Model = Annotated[Path, typer.Option()]
Photos = Annotated[Path, typer.Option()]
SHARED = Path("../shared")
MODEL = SHARED / "weights/yolo11n-coco.pt"
PHOTOS = SHARED / "data/coco256/images/val"


def attack(
    name: str,
    model: Path,
    photos: Path,
    transforms: str,
    further: str,
    most: int,
    target: str,
    to: str | None,
    eps: int,
    **options: Any,
) -> tuple[list[Record], list[Record]]:
    """Attack (or finish attacking) a folder; returns the records of the attack and of judging its files anew."""
    keep_freed_memory()
    detector = load_detector(model)
    files = [str(file) for file in find_photos([photos])]
    base = AttackOptions(**{"steps": 60, "schedule": "group", "budget": Linf(eps), **options})
    config = {
        "detector": detector_config(detector, str(model)), "also": [], "samples": False,
        "goal": "vanish" if to is None else "mislabel",
        "target": target, "to": to, "strict": False, "object": None, "box": None, "keep_others": False, "loss": "logit",
        "count": None, "transforms": transforms, "photos": files, "arguments": [], "attack": base.config(),
    }  # fmt: skip
    plan = plan_attack(config, [detector])
    folder = Path("runs/benchmarks") / name
    run = Run.resume(folder, "attack") if (folder / "config.yaml").exists() else Run.create("attack", folder, config)
    if {k: v for k, v in run.config.items() if k not in ("command", "versions")} != config:
        shutil.rmtree(folder)
        run = Run.create("attack", folder, config)
    records = run.records()
    done = {record["key"] for record in records}
    waiting = {key: file for key, file in photo_keys([Path(f) for f in files]).items() if key not in done}
    attacked = sum(r["status"] != "no-target" for r in records)
    for record in track(attack_photos(Job(*plan, run), waiting), name, total=len(waiting)):
        records.append(record)
        attacked += record["status"] != "no-target"
        if attacked >= most:
            break
    records = [r for r in records if r["status"] in ("fooled", "failed")]
    goal, more = plan[0][0].objective, parse_transforms(further)
    verified = verify_run(run, detector, goal, more, base.budget)
    judged = list(track(verified, f"{name}: verify", len(records)))
    return records, judged


def survival(judged: Sequence[Record], name: str) -> str:
    return rate([r["members"][name]["fooled"] for r in judged])


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def describe(records: Sequence[Record]) -> list[str]:
    success = rate([r["members"]["photo"]["fooled"] for r in records])
    steps = [r["iterations"] for r in records]
    used = max(r["difference"] for r in records)
    quality = f"{mean(r['psnr'] for r in records):.1f} dB / {mean(r['ssim'] for r in records):.3f}"
    return [
        success,
        f"{mean(steps):.1f} / {max(steps)}",
        str(used),
        quality,
        f"{mean(r['seconds'] for r in records):.1f}",
    ]


COLUMNS = ["success from file", "iterations mean / most", "levels used", "PSNR / SSIM", "s per photo"]


@app.command()
def group(model: Model = MODEL, photos: Photos = PHOTOS, most: int = 1000) -> None:
    """A single image against the group, by each schedule and with momentum, eps 4, at most 60 iterations."""
    rows = []
    ways: list[tuple[str, str, dict[str, Any]]] = [("single image", "none", {}), ("group", GROUP, {})]
    ways += [
        ("worst member in turn", GROUP, {"schedule": "worst"}),
        ("group, momentum .9", GROUP, {"momentum": 0.9}),
        ("worst, momentum .9", GROUP, {"schedule": "worst", "momentum": 0.9}),
    ]
    for name, transforms, options in ways:
        folder = name.split()[0] if not options else name.replace(" ", "-").replace(",", "")
        records, judged = attack(folder, model, photos, transforms, GROUP, most, "person", None, eps=4, **options)
        stepped = (
            1 if options.get("schedule") == "worst" else 1 + (0 if transforms == "none" else len(transforms.split(",")))
        )
        frames = f"{sum(r['queries'] for r in records)} / {sum(r['iterations'] for r in records) * stepped}"
        survived = [survival(judged, t) for t in GROUP.split(",")]
        rows.append([f"{name}: {transforms}", *describe(records), frames, *survived])
    print(f"{model.name}, conf 0.25, eps 4, step 1, at most 60 iterations, {torch.get_num_threads()} threads")
    print_table(["attack", *COLUMNS, "frames forward / backward", *GROUP.split(",")], rows)


@app.command()
def unseen(
    model: Model = MODEL,
    photos: Photos = PHOTOS,
    most: int = 1000,
    margins: str = "0.05,0.97",
    eps: int = 8,
    step: float = 1,
) -> None:
    """A group of four transforms against transforms that were not in it, for each --margin."""
    rows = []
    for margin in map(float, margins.split(",")):
        name = f"unseen-{eps}-{margin:g}-{step:g}"
        records, judged = attack(
            name, model, photos, LARGE, UNSEEN, most, "person", None, eps=eps, margin=margin, step=step
        )
        rows.append([f"{margin:g}", *describe(records), *(survival(judged, t) for t in UNSEEN.split(","))])
    print(f"{model.name}, group {LARGE}, conf 0.25, eps {eps}, step {step:g}, at most 60 iterations")
    print_table(["margin", *COLUMNS, *UNSEEN.split(",")], rows)


@app.command()
def mislabel(model: Model = MODEL, photos: Photos = SHARED / "data/coco256/images/*/*", most: int = 1000) -> None:
    """Bus found as train, in place (IoU >= 0.5), in the group and after unseen JPEG."""
    further = "jpeg:60,jpeg:90"
    rows = []
    for name, transforms in (("bus as train, single", "none"), ("bus as train, group", GROUP)):
        records, judged = attack(
            name.replace(", ", "-").replace(" ", "-"),
            model,
            photos,
            transforms,
            f"{GROUP},{further}",
            most,
            "bus",
            "train",
            eps=4,
        )
        rows.append([name, *describe(records), *(survival(judged, t) for t in f"{GROUP},{further}".split(","))])
    print(f"{model.name}, conf 0.25, eps 4, step 1, at most 60 iterations")
    print_table(["attack", *COLUMNS, *GROUP.split(","), *further.split(",")], rows)


@app.command()
def rules(model: Model = MODEL, photos: Photos = PHOTOS, most: int = 16) -> None:
    """The three aggregates and both gradient rules on the same photos."""
    rows = []
    further = "jpeg:60,gaussian:3,resize:0.7"
    for gradient in ("straight-through", "exact"):
        for aggregate, weights in (("mean", None), ("weighted", (1.0, 1.0, 2.0)), ("max", None)):
            name = f"rules-{gradient}-{aggregate}"
            options = {"aggregate": aggregate, "weights": weights, "gradient": gradient}
            records, judged = attack(name, model, photos, GROUP, further, most, "person", None, eps=4, **options)
            all_members = rate([r["status"] == "fooled" for r in records])
            shown = aggregate if weights is None else f"{aggregate} {','.join(f'{w:g}' for w in weights)}"
            row = [gradient, shown, all_members, *describe(records)[1:]]
            rows.append([*row, *(survival(judged, t) for t in further.split(","))])
    print(f"{model.name}, group {GROUP}, conf 0.25, eps 4, step 1, at most 60 iterations")
    print_table(["gradient", "aggregate", "whole group fooled", *COLUMNS[1:], *further.split(",")], rows)


if __name__ == "__main__":
    app()
