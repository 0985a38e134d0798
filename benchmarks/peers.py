"""Attacks beside the Adversarial Robustness Toolbox: seconds per step and per success; training beside Ultralytics.

    pip install --no-deps adversarial-robustness-toolbox six scikit-learn joblib threadpoolctl cloudpickle
    OMP_NUM_THREADS=1 python benchmarks/peers.py --model ../shared/weights/yolo11n-coco.pt

ART's ProjectedGradientDescent on its PyTorchYolo, and detguard's loop: the same weights, frames that are the photos
themselves (640 x 480), objects that the detector finds over .25, growth of the training loss, L-inf 8, as many steps of
2 levels. A success: in the saved PNG, the detector's own predict path finds no person over .25. ART assigns anchors to
objects anew at every step and runs the network as it is trained; detguard assigns once and runs it as users do. With
one thread seconds are the processor's, which other programs change less, else the clock's. Attacks take turns, batch by
batch. "Until": no further step of a photo in which no person is found any more; of ART's targeted attack, whose target
is what was found but for persons, what stops it is counted in. Memory: the peak of a process that does that row alone.

Training: `harden --recipe finetune --learn labels`, and Ultralytics' `train` by SGD, on the same photos with labels, a
worker each, photos a second from its second batch on, without validation. Each augments in its own way.
"""

import copy
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import cv2
import numpy as np
import torch
import typer
import yaml

from detguard.attacks.budgets import Linf
from detguard.attacks.group import AttackOptions, attack_group
from detguard.detections import Detections
from detguard.detectors.load import load_detector, load_model
from detguard.engine import keep_freed_memory
from detguard.objectives import Vanish
from detguard.objectives.base import Objective
from detguard.objectives.degrade import Degrade
from detguard.photos import Photo, decode_photo, encode_png, find_photos, frames_tensor, read_photo

CONF, EPS, STEP, SHAPE = 0.25, 8, 2, (480, 640)
PERSON, BARE = 0, "the bare model, forward and backward"
Attack = Callable[[list[Photo], list[Detections]], list[Photo]]


def art_attack(
    model: str, frozen: bool, steps: int, fooled: Callable[[list[Photo]], list[bool]] | None = None
) -> Attack:
    """That of the Adversarial Robustness Toolbox; frozen: no gradient of parameters is computed.

    fooled: which photos are; then one step after the other towards what is found without persons, until they are.
    """
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.object_detection import PyTorchYolo

    network: Any = copy.deepcopy(load_model(model)[0]).float().requires_grad_(not frozen)
    whole = network.loss
    # ART numbers the parts of the loss, to which newer Ultralytics give names.
    network.loss = lambda batch: (lambda loss, parts: (loss, [*parts.values()]))(*whole(batch))
    estimator = PyTorchYolo(
        network,
        input_shape=(3, *SHAPE),
        clip_values=(0, 255),
        attack_losses=("loss_total",),
        device_type="cpu",
        is_ultralytics=True,
        model_name="yolo11n",
    )

    def moved(photos: list[Photo], found: list[Detections], count: int) -> list[Photo]:
        pgd = ProjectedGradientDescent(
            estimator, norm=np.inf, eps=EPS, eps_step=STEP, max_iter=count, batch_size=len(photos), verbose=False,
            targeted=fooled is not None,
        )  # fmt: skip
        labels = [{"boxes": d.boxes.numpy(), "labels": d.classes.numpy(), "scores": d.scores.numpy()} for d in found]
        changed = pgd.generate(np.stack(photos).transpose(0, 3, 1, 2).astype(np.float32), labels)
        return list(np.ascontiguousarray(changed.round().astype(np.uint8).transpose(0, 2, 3, 1)))

    def attack(photos: list[Photo], found: list[Detections]) -> list[Photo]:
        if fooled is None:
            return moved(photos, found, steps)
        others = [one.of(sorted({*one.classes.tolist()} - {PERSON})) for one in found]
        now, left = list(photos), list(range(len(photos)))
        for _ in range(steps):
            changed = moved([now[i] for i in left], [others[i] for i in left], 1)
            for i, photo in zip(left, changed, strict=True):
                low, high = (np.clip(photos[i].astype(int) + side, 0, 255) for side in (-EPS, EPS))
                now[i] = np.clip(photo, low, high).astype(np.uint8)
            left = [i for i, done in zip(left, fooled([now[i] for i in left]), strict=True) if not done]
            if not left:
                break
        return now

    return attack


def finetune(model: str, data: Path, imgsz: int, batch: int, batches: int) -> float:
    """Photos per second of `detguard harden --recipe finetune`, as its records tell."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--recipe", "finetune", "--learn", "labels", "--data", data, "--imgsz", imgsz, "--batch", batch]
        options += ["--photos", batch * batches, "--workers", 1, "--out", f"{folder}/run"]
        command = [sys.executable, "-m", "detguard", "-q", "harden", "--model", model, *options]
        subprocess.run([str(one) for one in command], check=True)
        records = [json.loads(line) for line in Path(folder, "run/results.jsonl").read_text().splitlines()]
    return median([one["photos_per_second"] for one in records if "photos_per_second" in one][1:])


def ultralytics_train(model: str, data: Path, imgsz: int, batch: int, batches: int) -> float:
    """Photos per second of its `train` from its second batch on, with as many batches."""
    from ultralytics import YOLO

    ends, yolo = list[float](), YOLO(model)

    def on_end(trainer: object) -> None:
        ends.append(time.perf_counter())
        if len(ends) == batches:
            raise StopIteration

    yolo.add_callback("on_train_batch_end", on_end)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(shutil.copytree(data.parent, f"{folder}/data"), data.name)  # it writes beside the labels
        here.write_text(yaml.safe_dump(yaml.safe_load(data.read_text()) | {"path": str(here.parent)}))
        with suppress(StopIteration):
            yolo.train(
                data=str(here), epochs=batches, imgsz=imgsz, batch=batch, device="cpu", workers=1, val=False,
                plots=False, save=False, verbose=False, project=folder, optimizer="SGD", nbs=batch,
            )  # fmt: skip
    return batch * (len(ends) - 2) / (ends[-1] - ends[1])


def main(
    model: Annotated[str, typer.Option()] = "yolo11n",
    photos: Annotated[Path, typer.Option()] = Path("../shared/data/coco256/images/val"),
    count: int = 8,
    steps: int = 10,
    most: Annotated[int, typer.Option(help="Steps of those that end at success.")] = 40,
    batches: str = "1,8",
    only: Annotated[str, typer.Option(help="A part of the names of the rows that are wanted.")] = "",
    data: Annotated[Path, typer.Option(help="What both train on.")] = Path("../shared/data/coco256/data.yaml"),
    train: Annotated[int, typer.Option(help="Batches of 16 photos to train for; 0: none.")] = 40,
) -> None:
    keep_freed_memory()
    one_thread = torch.get_num_threads() == 1
    if one_thread:
        cv2.setNumThreads(1)
    now = time.process_time if one_thread else time.perf_counter
    detector = load_detector(model, 640, device="cpu")
    assert detector.class_index("person") == PERSON
    judge = Vanish((PERSON,))
    chosen: list[tuple[Photo, Detections]] = []
    for file in find_photos([photos]):
        photo = read_photo(file)
        if photo.shape[:2] == SHAPE and len((found := detector.predict(photo, CONF)).of([PERSON])):
            chosen.append((photo, found))
        if len(chosen) == count:
            break

    def loop(objective: Objective, stop: bool) -> Attack:
        def attack(photos: list[Photo], found: list[Detections]) -> list[Photo]:
            last = most if stop else steps
            options = AttackOptions(budget=Linf(EPS), step=STEP, steps=last, stop=stop, batch=len(photos), conf=CONF)
            keyed = [(str(i), *pair) for i, pair in enumerate(zip(photos, found, strict=True))]
            done = {one.key: one.adversarial for one in attack_group(detector, keyed, objective, [], options)}
            return [done[key] for key, *_ in keyed]

        return attack

    def bare(photos: list[Photo], found: list[Detections]) -> list[Photo]:
        for _ in range(steps):
            frames = frames_tensor(photos).requires_grad_()
            detector.candidates(frames).logits.sum().backward()
        return photos

    def fooled(photos: list[Photo]) -> list[bool]:
        return [not len(found.of([PERSON])) for found in detector.detect(photos, CONF)]

    made: dict[str, Callable[[], Attack]] = {
        BARE: lambda: bare,
        "detguard, training loss": lambda: loop(Degrade(tuple(detector.class_names)), stop=False),
        "detguard, persons vanish, until they have": lambda: loop(judge, stop=True),
        "ART, training loss, parameters frozen": lambda: art_attack(model, True, steps),
        "ART, training loss, parameters as loaded": lambda: art_attack(model, False, steps),
        "ART, targeted, parameters frozen, until they have": lambda: art_attack(model, True, most, fooled),
    }
    try:
        attacks = {name: make() for name, make in made.items() if only in name}
    except ImportError as error:
        print(f"without ART, which cannot be imported ({error}); on top of this file stands how to install it")
        attacks = {name: make() for name, make in made.items() if only in name and "ART" not in name}
    if not only:
        print(f"{len(chosen)} photos of 640 x 480 px, {steps} steps, {torch.get_num_threads()} threads\n")
        print(
            "| attack | batch | ms per step and photo (median) | fooled, saved file | seconds per success | peak MiB |"
        )
        print("|---|---|---|---|---|---|")
    for size in map(int, batches.split(",")):
        spent, successes = defaultdict[str, list[float]](list), defaultdict[str, int](int)
        for first in range(0, len(chosen), size):
            originals, found = map(list, zip(*chosen[first : first + size], strict=True))
            for name, attack in attacks.items():
                begin = now()
                saved = [decode_photo(encode_png(photo)) for photo in attack(originals, found)]
                spent[name].append((now() - begin) / len(originals))
                for photo, clean, original in zip(saved, found, originals, strict=True):
                    assert Linf(EPS).used(photo, original) <= EPS
                    successes[name] += judge.success(clean, detector.predict(photo, CONF), judge.attacked(clean))
        for name, seconds in spent.items() if not only else ():
            whole = [] if name == BARE else [f"{successes[name]} of {len(chosen)}"]
            total = sum(seconds) * len(chosen) / len(seconds)
            whole += [f"{total / successes[name]:.2f}" if successes[name] else "-"] if whole else ["", ""]
            each = "" if "until" in name else f"{1e3 * median(seconds) / steps:.0f}"
            alone = [sys.argv[0], "--model", model, "--photos", photos, "--count", size, "--steps", 2, "--most", 2]
            peak = peak_of([*alone, "--batches", size, "--train", 0, "--only", name])
            print(f"| {name} | {size} | {each} | {' | '.join(whole)} | {peak} |", flush=True)
    if only:
        print(own_peak())
    elif train:
        print("\n| training | photos a second |\n|---|---|")
        for name, run in (("detguard harden --recipe finetune", finetune), ("Ultralytics train", ultralytics_train)):
            print(f"| {name} | {run(model, data, 320, 16, train):.1f} |", flush=True)


def peak_of(arguments: list[object]) -> str:
    """MiB that a run of this program for one row takes at the most, as it says itself."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], check=True, capture_output=True, text=True
    ).stdout.strip()


def own_peak() -> str:
    """MiB that this process has taken at the most, by Linux: of a child, `getrusage` counts its parent."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((str(int(line.split()[1]) // 1024) for line in lines if line.startswith("VmHWM")), "-")


if __name__ == "__main__":
    typer.run(main)
