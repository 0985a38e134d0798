"""Harden a detector, watch as night falls, teach the night: `python examples/harden_and_watch.py photos/ runs/mine`."""

import sys
from pathlib import Path

import numpy as np

import detguard
from detguard.photos import find_photos, read_photo


def main(photos: str, folder: str, *, quick: bool = False) -> detguard.Trained:
    """Harden detguard-n on a folder of photos, and return what came of teaching it those that made accuracy drop.

    quick: a few small frames, to see that it runs; the detector is the worse for it.
    """
    few = {"photos": 8, "batch": 4, "workers": 1} if quick else {}
    size = {"imgsz": 64, "steps": 1} if quick else {}
    made = detguard.harden(
        "detguard-n", photos, out=Path(folder) / "hardened", **few, **size,
        on_stage=lambda stage, done, losses: print(f"{done:.0%} {stage}"),
    )  # fmt: skip

    detector = detguard.load_detector("detguard-n")
    files = find_photos([photos])
    labels = {file: detector.predict(file, 0.4).records(detector.class_names) for file in files}
    stream = (  # photo by photo: thousands need no memory
        {"photo": (read_photo(file) * light).astype(np.uint8), "objects": labels[file]}
        for light in (1, 0.02)
        for file in files * 6
    )
    for record in detguard.monitor(detector, stream, window=32, out=Path(folder) / "watched"):
        if record.get("began"):
            print(f"photo {record['number']}: accuracy has dropped since photo {record['began']}")

    new = Path(folder) / "watched" / "dropped.jsonl"
    return detguard.adapt(made.weights, new, replay=photos, out=Path(folder) / "adapted", **few)


if __name__ == "__main__":
    result = main(sys.argv[1], sys.argv[2])
    print(f"{result.weights}: {result.before} before, {result.after} after")
