"""Time of an evaluation, and the share of it inside the model's forward and backward.

    python benchmarks/evaluate_time.py --model ../shared/weights/yolo11n-coco.pt --data ../shared/data/coco256/data.yaml

Runs `clean,corruptions,attack`, by default as `evaluate` does, with an empty cache in this process and counts the time
within the detector's forward (decoding of boxes included) and within autograd (the loss's own backward included); of
corruptions that processes make ahead it is the waiting.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import detguard.data.corruptions
import detguard.evaluation.run
import detguard.evaluation.views
from detguard.data.dataset import read_dataset
from detguard.detectors.load import load_detector
from detguard.engine import keep_freed_memory
from detguard.evaluation.cache import Cache
from detguard.evaluation.run import Protocols, evaluate
from detguard.evaluation.views import Makers, Subject
from detguard.runs import Run


def main(
    model: Annotated[str, typer.Option()] = "detguard-n",
    data: Annotated[str, typer.Option()] = "../shared/data/coco256/data.yaml",
    imgsz: int = 320,
    severities: str = "1,2,3,4,5",
    steps: int = Protocols.steps,
    limit: int | None = None,
) -> None:
    keep_freed_memory()
    spent: Counter[str] = Counter()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - begin

        return call

    detector = load_detector(model, imgsz)
    detector.candidates = timed("forward", detector.candidates)
    torch.autograd.grad = timed("backward", torch.autograd.grad)
    detguard.evaluation.views.corrupt = timed("corruptions", detguard.evaluation.views.corrupt)
    Makers.photo = timed("corruptions ahead", Makers.photo)
    detguard.evaluation.views.read_photo = timed("reading photos", detguard.evaluation.views.read_photo)
    detguard.evaluation.run.metrics_of = timed("COCO metrics", detguard.evaluation.run.metrics_of)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        dataset = read_dataset(data, limit=limit)
        cache = Cache(Path(folder) / "cache.sqlite")
        subject = Subject(detector.name, detector, dataset, dataset.category_ids(detector.class_names), cache)
        wanted = Protocols(severities=tuple(map(int, severities.split(","))), steps=steps)
        evaluate([subject], wanted, Run.create("evaluate", Path(folder) / "run", {}))
        total = time.perf_counter() - begin
    setting = f"{len(dataset.files)} photos, severities {severities}, {steps} steps, {torch.get_num_threads()} threads"
    print(f"{detector.name}, {imgsz} px, {setting}")
    for name, seconds in spent.most_common():
        print(f"{name:16s} {seconds:7.1f} s  {100 * seconds / total:5.1f} %")
    print(f"{'rest':16s} {total - spent.total():7.1f} s  {100 * (1 - spent.total() / total):5.1f} %")
    model_share = 100 * (spent["forward"] + spent["backward"]) / total
    print(f"{'total':16s} {total:7.1f} s; in the model's forward and backward: {model_share:.1f} %")


if __name__ == "__main__":
    typer.run(main)
