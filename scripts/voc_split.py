"""Set 400 photos of VOC aside for judging, by a hash of their names, and train on the others alone.

    python scripts/voc_split.py --shared ../shared --out runs/data/voc

makes a data.yaml with the splits train and val, of copies of the photos and their labels: VOC's 20 classes, named as
COCO does.
"""

import argparse
import hashlib
import shutil
from pathlib import Path

import yaml
from ultralytics.utils import ROOT, YAML

HELD_OUT = 400


def split(folder: Path) -> tuple[list[Path], list[Path]]:
    """The photos of a folder to train on, and those to judge on: whose names have the smallest SHA-256."""
    by_hash = sorted(folder.glob("*.jpg"), key=lambda file: hashlib.sha256(file.name.encode()).hexdigest())
    return sorted(by_hash[HELD_OUT:]), sorted(by_hash[:HELD_OUT])


def main() -> None:
    """Make the data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, default=Path("runs/data/voc"))
    args = parser.parse_args()
    used: set[int] = set()
    source = args.shared / "data/voc3608"
    for name, photos in zip(("train", "val"), split(source / "images"), strict=True):
        for part in ("images", "labels"):
            (args.out / part / name).mkdir(parents=True, exist_ok=True)
        for photo in photos:
            label = source / "labels" / f"{photo.stem}.txt"
            shutil.copyfile(photo, args.out / "images" / name / photo.name)
            shutil.copyfile(label, args.out / "labels" / name / label.name)
            used |= {int(line.split()[0]) for line in label.read_text().splitlines()}
    names = YAML.load(ROOT / "cfg" / "datasets" / "coco.yaml")["names"]
    config = {"path": ".", "train": "images/train", "val": "images/val", "names": {k: names[k] for k in sorted(used)}}
    (args.out / "data.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


if __name__ == "__main__":
    main()
