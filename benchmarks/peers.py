"""Seconds per gradient step and per success, beside the Adversarial Robustness Toolbox.

    pip install --no-deps adversarial-robustness-toolbox six scikit-learn joblib threadpoolctl cloudpickle
    OMP_NUM_THREADS=1 python benchmarks/peers.py --model ../shared/weights/yolo11n-coco.pt

ART's ProjectedGradientDescent on its PyTorchYolo, and detguard's loop: the same weights, frames that are the photos
themselves (640 x 480), objects that the detector finds over .25, growth of the training loss, L-inf 8, as many steps of
2 levels. A success: in the saved PNG, the detector's own predict path finds no person over .25. ART assigns anchors to
objects anew at every step and runs the network as it is trained; detguard assigns once and runs it as users do. With
one thread seconds are the processor's, which other programs change less, else the clock's. Attacks take turns, batch by
batch.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import cv2
import numpy as np
import torch
import typer

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
Attack = Callable[[list[Photo], list[Detections]], list[Photo]]


def art_attack(model: str, frozen: bool, steps: int) -> Attack:
    """That of the Adversarial Robustness Toolbox; frozen: no gradient of parameters is computed."""
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

    def attack(photos: list[Photo], found: list[Detections]) -> list[Photo]:
        pgd = ProjectedGradientDescent(
            estimator, norm=np.inf, eps=EPS, eps_step=STEP, max_iter=steps, batch_size=len(photos), verbose=False
        )
        labels = [{"boxes": d.boxes.numpy(), "labels": d.classes.numpy(), "scores": d.scores.numpy()} for d in found]
        moved = pgd.generate(np.stack(photos).transpose(0, 3, 1, 2).astype(np.float32), labels)
        return list(np.ascontiguousarray(moved.round().astype(np.uint8).transpose(0, 2, 3, 1)))

    return attack


def main(
    model: Annotated[str, typer.Option()] = "yolo11n",
    photos: Annotated[Path, typer.Option()] = Path("../shared/data/coco256/images/val"),
    count: int = 8,
    steps: int = 10,
    batches: str = "1,8",
) -> None:
    keep_freed_memory()
    one_thread = torch.get_num_threads() == 1
    if one_thread:
        cv2.setNumThreads(1)
    now = time.process_time if one_thread else time.perf_counter
    detector = load_detector(model, 640, device="cpu")
    person = detector.class_index("person")
    judge = Vanish((person,))
    chosen: list[tuple[Photo, Detections]] = []
    for file in find_photos([photos]):
        photo = read_photo(file)
        if photo.shape[:2] == SHAPE and len((found := detector.predict(photo, CONF)).of([person])):
            chosen.append((photo, found))
        if len(chosen) == count:
            break

    def loop(objective: Objective, stop: bool) -> Attack:
        def attack(photos: list[Photo], found: list[Detections]) -> list[Photo]:
            options = AttackOptions(budget=Linf(EPS), step=STEP, steps=steps, stop=stop, batch=len(photos), conf=CONF)
            keyed = [(str(i), *pair) for i, pair in enumerate(zip(photos, found, strict=True))]
            done = {one.key: one.adversarial for one in attack_group(detector, keyed, objective, [], options)}
            return [done[key] for key, *_ in keyed]

        return attack

    def bare(photos: list[Photo], found: list[Detections]) -> list[Photo]:
        for _ in range(steps):
            frames = frames_tensor(photos).requires_grad_()
            detector.candidates(frames).logits.sum().backward()
        return photos

    everything = tuple(detector.class_names)
    attacks: dict[str, Attack] = {
        "the bare model, forward and backward": bare,
        "detguard, training loss": loop(Degrade(everything), stop=False),
        "detguard, persons vanish, until they have": loop(judge, stop=True),
    }
    try:
        attacks["ART, parameters frozen"] = art_attack(model, True, steps)
        attacks["ART, parameters as loaded"] = art_attack(model, False, steps)
    except ImportError as error:
        print(f"without ART, which cannot be imported ({error}); on top of this file stands how to install it")
    print(f"{len(chosen)} photos of 640 x 480 px, {steps} steps, {torch.get_num_threads()} threads\n")
    print("| attack | batch | ms per step and photo (median) | fooled, saved file | seconds per success |")
    print("|---|---|---|---|---|")
    for size in map(int, batches.split(",")):
        spent, fooled = defaultdict[str, list[float]](list), defaultdict[str, int](int)
        for first in range(0, len(chosen), size):
            originals, found = map(list, zip(*chosen[first : first + size], strict=True))
            for name, attack in attacks.items():
                begin = now()
                saved = [decode_photo(encode_png(photo)) for photo in attack(originals, found)]
                spent[name].append((now() - begin) / len(originals))
                for photo, clean, original in zip(saved, found, originals, strict=True):
                    assert Linf(EPS).used(photo, original) <= EPS
                    fooled[name] += judge.success(clean, detector.predict(photo, CONF), judge.attacked(clean))
        for name, seconds in spent.items():
            whole = [] if name.startswith("the bare") else [f"{fooled[name]} of {len(chosen)}"]
            total = sum(seconds) * len(chosen) / len(seconds)
            whole += [f"{total / fooled[name]:.2f}" if fooled[name] else "-"] if whole else ["", ""]
            each = "" if "until" in name else f"{1e3 * median(seconds) / steps:.0f}"
            print(f"| {name} | {size} | {each} | {' | '.join(whole)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
