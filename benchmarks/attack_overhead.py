"""Cost of one attack iteration against the bare forward + backward of the same group batch, in one process.

    python benchmarks/attack_overhead.py [PHOTO] [--model ...] [--rounds 15]

The two are measured in turns, so that a machine that slows down slows both; the ratio is of the medians. With one
thread (OMP_NUM_THREADS=1) it is the processor's time, which other programs change less, else the clock's.
"""

import time
from pathlib import Path
from statistics import median
from typing import Annotated

import cv2
import torch
import typer
from ultralytics.utils import ASSETS

from detguard.attacks.budgets import Linf
from detguard.attacks.group import AttackOptions, attack_group
from detguard.detectors.load import load_detector
from detguard.engine import keep_freed_memory
from detguard.objectives import Vanish
from detguard.photos import frames_tensor, read_photo
from detguard.transforms.parse import parse_transforms


def main(
    photo: Annotated[Path, typer.Argument()] = ASSETS / "bus.jpg",
    model: str = "detguard-n",
    imgsz: int = 640,
    transforms: str = "median:3,jpeg:75",
    rounds: int = 15,
) -> None:
    keep_freed_memory()
    if torch.get_num_threads() == 1:
        cv2.setNumThreads(1)
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    detector = load_detector(model, imgsz)
    pixels = read_photo(photo)
    group = parse_transforms(transforms)
    # No budget: the photo never changes, so every iteration does the full work and none succeeds.
    options = AttackOptions(budget=Linf(0), steps=3 * rounds, schedule="group")
    clean = detector.predict(pixels, options.conf)
    loop = attack_group(detector, [("photo", pixels, clean)], Vanish((0,)), group, options, on_step=lambda _: tick())
    letterbox = detector.letterbox(pixels.shape[:2])
    members = frames_tensor([letterbox(pixels)] * (1 + len(group)))
    bare: list[float] = []
    whole: list[float] = []
    started = 0.0

    def tick() -> None:
        nonlocal started
        if started:
            whole.append(now() - started)
        frames = members.clone().requires_grad_()
        begin = now()
        # The simplest loss there is: the backward needs one, and nothing else is counted.
        detector.candidates(frames).logits[..., 0].sum().backward()
        bare.append(now() - begin)
        started = now()

    list(loop)
    bare, whole = bare[2:], whole[2:]
    size = f"photo {pixels.shape[1]} x {pixels.shape[0]}, frame {letterbox.frame[1]} x {letterbox.frame[0]}"
    print(f"{size}, {model}, {torch.get_num_threads()} threads")
    print("| | ms per iteration (median) | ratio |\n|---|---|---|")
    print(f"| bare forward + backward of {len(members)} frames | {1e3 * median(bare):.1f} | 1 |")
    print(f"| detguard's iteration | {1e3 * median(whole):.1f} | {median(whole) / median(bare):.3f} |")


if __name__ == "__main__":
    typer.run(main)
