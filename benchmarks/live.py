"""A stream that changes three times, and an ensemble that learns while it goes on: python benchmarks/live.py --out DIR.

600 labelled photos come at a steady rate: clean, in fog, at night, and attacked so that their objects vanish before
whichever ensemble is deployed at that moment. `detguard monitor --on-drift adapt` reads them through a pipe; twice it
is killed and goes on with `--resume`. Then every photo is shown to the first ensemble, and photos of each kind that
nobody learned from to the first and the last. Photos: the training part of VOC, with VOC's labels.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from torchvision.ops import box_convert
from ultralytics.utils import ROOT

import detguard
from detguard.data.corruptions import corrupt
from detguard.detections import Detections
from detguard.detectors.base import Detector
from detguard.files import write_file
from detguard.hardening.monitor import LOWEST_CONFIDENCE, quality
from detguard.photos import Photo, encode_png, photo_seed, read_photo
from detguard.transforms.parse import parse_transforms

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from voc_split import split

COCO = yaml.safe_load((ROOT / "cfg/datasets/coco.yaml").read_text())["names"]
# The classes that VOC labels, by COCO's numbers.
VOC = [COCO[i] for i in (0, 1, 2, 3, 4, 5, 6, 8, 14, 15, 16, 17, 18, 19, 39, 56, 57, 58, 60, 62)]
KINDS = ("clean", "fog", "night", "vanish")
NIGHT = parse_transforms("gamma:2.5,brightness:-0.35,noise:10")


def labelled(file: Path, shape: tuple[int, int]) -> list[dict[str, Any]]:
    """The objects of a photo of (height, width), as lines of a stream have them."""
    rows = [line.split() for line in (file.parent.parent / "labels" / f"{file.stem}.txt").read_text().splitlines()]
    size = torch.tensor([shape[1], shape[0]] * 2)
    boxes = torch.tensor([[float(v) for v in row[1:5]] for row in rows]).reshape(-1, 4)
    corners = (box_convert(boxes, "cxcywh", "xyxy") * size).tolist()
    return [{"class": COCO[int(row[0])], "box": box} for row, box in zip(rows, corners, strict=True)]


def shown_as(kind: str, file: Path, detector: Callable[[], Detector], eps: int, steps: int) -> Photo:
    """A photo as one of KINDS."""
    photo, seed = read_photo(file), photo_seed(file.name, 0)
    rng = np.random.default_rng(seed)
    if kind == "fog":
        return corrupt(photo, "fog", 4, seed % 2**32)
    if kind == "night":
        for transform in NIGHT:
            photo = transform.draw(rng)(photo)
    if kind == "vanish":
        victim = detector()
        known = [name for name in VOC if name in victim.class_names.values()]
        options: dict[str, Any] = {"transforms": "none", "budget": detguard.Linf(eps), "steps": steps, "margin": 0.5}
        (result,) = detguard.attack(victim, [file], objective=detguard.Vanish(known), **options)
        return photo if result.status == "no-target" else result.photo
    return photo


class Watched:
    """A monitor in a process of its own, which can be killed and goes on."""

    def __init__(self, run: Path, begin: list[str]) -> None:
        self.run, self.log = run, run.with_suffix(".log").open("ab")
        self.process = self._start(["--stream", "-", "--out", str(run), *begin])

    def _start(self, options: list[str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "detguard", "monitor", *options]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self.log, stderr=self.log)

    def records(self, name: str = "results.jsonl") -> list[dict[str, Any]]:
        """What the run holds; a line that is being written is left for the next time."""
        file = self.run / name
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]

    def send(self, lines: list[bytes]) -> None:
        """Photos to be read next."""
        assert self.process.stdin
        self.process.stdin.write(b"".join(lines))
        self.process.stdin.flush()

    def kill(self) -> int:
        """Kill it and go on; returns how many photos it has seen."""
        self.process.kill()
        self.process.wait()
        self.process = self._start(["--resume", str(self.run)])
        return len(self.records())

    def end(self) -> int:
        """Close the stream and wait; returns the exit code."""
        assert self.process.stdin
        self.process.stdin.close()
        return self.process.wait()


def f1_on(detector: Detector, records: list[dict[str, Any]]) -> list[float | None]:
    """F1 of each photo of lines."""
    values = []
    index = {name: i for i, name in detector.class_names.items()}
    for record in records:
        known = [o for o in record["objects"] if o["class"] in index]
        boxes = torch.tensor([o["box"] for o in known]).reshape(-1, 4)
        classes = torch.tensor([index[o["class"]] for o in known], dtype=torch.int64)
        (found,) = detector.detect([read_photo(record["photo"])], LOWEST_CONFIDENCE, multi_label=True)
        found = found.of([index[name] for name in VOC if name in index])
        values.append(quality(Detections(boxes, torch.ones(len(known)), classes), found).f1)
    return values


def average(values: list[float | None]) -> float:
    """Of the photos that have objects."""
    known = [value for value in values if value is not None]
    return mean(known) if known else float("nan")


def main(
    out: Annotated[Path, typer.Option(help="Folder for the stream's photos, the run and the plot.")],
    model: str = "detguard-n-hard",
    photos: int = 600,
    rate: Annotated[float, typer.Option(help="Photos per second.")] = 0.3,
    kills: Annotated[list[int], typer.Option(help="After which photos it is killed.")] = [230, 430],  # noqa: B006
    gather: int = 48,
    keep: int = 128,
    adapt: Annotated[str, typer.Option(help="Options of detguard adapt.")] = "--mode frozen --photos 480",
    eps: int = 4,
    steps: int = 20,
    judged: Annotated[int, typer.Option(help="Photos of each kind for the table.")] = 48,
    shared: Path = Path("../shared"),
) -> None:
    """Feed the stream, and say what came of it."""
    files = split(shared / "data/voc3608/images")[0]
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    files, rest = files[:photos], files[photos : photos + judged]
    (out / "stream").mkdir(parents=True)
    first = detguard.load_detector(model)
    options = ["--model", model, "--on-drift", "adapt", "--gather", str(gather), "--keep", str(keep), "--adapt", adapt]
    watched = Watched(out / "run", options)
    loaded: dict[str, Detector] = {model: first}

    def deployed() -> Detector:
        made = [e["model"] for e in watched.records("events.jsonl") if e["event"] == "deployed"]
        name = str(watched.run / made[-1]) if made else model
        if name not in loaded:
            loaded[name] = detguard.load_detector(name)
        return loaded[name]

    def line_of(kind: str, file: Path, name: str) -> bytes:
        photo = shown_as(kind, file, deployed, eps, steps)
        write_file(out / "stream" / name, encode_png(photo))
        objects = labelled(file, photo.shape[:2])
        return json.dumps({"photo": str(out / "stream" / name), "objects": objects, "classes": VOC}).encode() + b"\n"

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    while not (out / "run/config.yaml").exists():  # a monitor that is not there yet reads nothing
        time.sleep(0.5)
    lines: list[bytes] = []
    begun, late = time.monotonic(), 0
    for number, file in enumerate(files, 1):
        lines.append(line_of(KINDS[(number - 1) * len(KINDS) // photos], file, f"{number:04}.png"))
        time.sleep(max(0.0, begun + number / rate - time.monotonic()))
        late += time.monotonic() > begun + (number + 1) / rate
        watched.send(lines[-1:])
        if number in kills:
            seen = watched.kill()
            print(f"killed after photo {number} was sent, {seen} were recorded; goes on", flush=True)
            watched.send(lines[seen:])
    took = time.monotonic() - begun
    code = watched.end()
    records, events = watched.records(), watched.records("events.jsonl")
    numbers = [record["number"] for record in records]
    print(
        f"{photos} photos in {took / 60:.1f} min ({late} sent late), exit code {code}; recorded once and in order: "
        f"{numbers == list(range(1, photos + 1))}; errors: {sum('error' in r for r in records)}\n"
    )
    log = (out / "run.log").read_text(errors="replace").splitlines()
    print("\n".join(line for line in log if line.startswith("photo ")), "\n")

    alone = f1_on(first, records)
    print("F1 by part of the stream, of the ensembles that saw it and of the first one on the same photos\n")
    print("| photos | kind | seen by | deployed then | the first one | difference |\n|---|---|---|---|---|---|")
    changes = [0] + [e["number"] for e in events if e["event"] == "deployed"]
    borders = sorted({*changes, *(i * photos // len(KINDS) for i in range(len(KINDS) + 1)), photos})
    for low, high in pairwise(borders):
        kind = KINDS[low * len(KINDS) // photos]
        here = average([r.get("f1") for r in records[low:high]])
        there = average(alone[low:high])
        seen_by = sum(change <= low for change in changes) - 1
        figures = [f"{here:.3f}", f"{there:.3f}", f"{here - there:+.3f}"]
        cells = [f"{low + 1} to {high}", kind, f"ensemble {seen_by}", *figures]
        print("| " + " | ".join(cells) + " |")

    last = deployed()
    print(f"\n{judged} photos of each kind that nobody learned from; attacked ones are attacked anew for each\n")
    print("| kind | the first ensemble | the last one | difference |\n|---|---|---|---|")
    for kind in KINDS:
        found = []
        for detector in (first, last):
            told = []
            for file in rest:
                photo = shown_as(kind, file, lambda d=detector: d, eps, steps)  # type: ignore[misc]
                write_file(out / "judged.png", encode_png(photo))
                line = {"photo": str(out / "judged.png"), "objects": labelled(file, photo.shape[:2])}
                told += f1_on(detector, [line])
            found.append(average(told))
        print(f"| {kind} | {found[0]:.3f} | {found[1]:.3f} | {found[1] - found[0]:+.3f} |", flush=True)
    plot(out / "live.svg", [r.get("f1") for r in records], alone, events, photos)


def plot(
    file: Path, with_it: list[float | None], without: list[float | None], events: list[dict[str, Any]], photos: int
) -> None:
    """F1 over the stream, the mean over 32 photos, with and without adapting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    for values, label in ((without, "the first ensemble alone"), (with_it, "with --on-drift adapt")):
        smooth = [average(values[max(0, i - 31) : i + 1]) for i in range(len(values))]
        axes.plot(range(1, len(values) + 1), smooth, label=label)
    for i, kind in enumerate(KINDS):
        axes.axvline(i * photos / len(KINDS), color="0.8", zorder=0)
        axes.text(i * photos / len(KINDS) + 4, 0.01, kind, color="0.4")
    shown = [event for event in events if event["event"] in ("gathering", "deployed", "kept")]
    for i, event in enumerate(shown):
        name, style = {"gathering": ("drop told", ":"), "deployed": ("deployed", "-"), "kept": ("kept", "-.")}[
            event["event"]
        ]
        axes.axvline(event["number"], color="C3", linestyle=style, linewidth=1)
        axes.text(event["number"] + 2, 1 - 0.05 * (i % 2), name, fontsize=7)  # or those close together would be one
    axes.set(xlabel="photo", ylabel="F1, mean over 32 photos", ylim=(0, 1.05))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file)


if __name__ == "__main__":
    typer.run(main)
