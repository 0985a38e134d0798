"""What users name as photos: folders, patterns, data sets, JSON lines; with their labels or without."""

import glob
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from detguard import DetguardError
from detguard.classes import check_map, left_out
from detguard.data.dataset import read_dataset
from detguard.data.entries import Faults
from detguard.data.stream import Labelled, as_line, in_order, read_lines, to_lines, unknown_boxes
from detguard.files import FileError, is_file, is_folder, read_yaml
from detguard.photos import SUFFIXES, find_photos

# Of a run, its photos with their labels.
LABELLED = "labelled.jsonl"
# Of a run of `detguard attack --data`; and how far a path may be inside of a run.
SAMPLES, DEEPEST = "samples/data.yaml", 5
# One that a caller names, or several.
Sources = str | Path | Sequence[str | Path]
# Told the name of data that was read, and what was wrong with it.
OnData = Callable[[str, Faults], object]


def listed(sources: Sources | None) -> list[str]:
    """One source or several, as text."""
    return [str(one) for one in ([sources] if isinstance(sources, str | Path) else sources or [])]


def warn_of(name: str, faults: Faults) -> None:
    """Warn of what was wrong with the data, counted by kind."""
    for kind, where in faults.items():
        warnings.warn(f"{name}: {where.total} {kind}", stacklevel=2)


def attack_run(path: Path) -> Path | None:
    """The folder of the run of `detguard attack` that a path is, or is in."""
    ways = [path.absolute()]
    with suppress(ValueError):  # of a null byte
        ways.append(Path(os.path.realpath(path)))  # a link may lead into one
    for folder in dict.fromkeys(one for way in ways for one in (way, *way.parents)[:DEEPEST]):
        if is_file(config := folder / "config.yaml"):
            with suppress(FileError):  # of another program
                found = read_yaml(config)
                return folder if isinstance(found, dict) and found.get("command") == "attack" else None
    return None


def with_samples(source: str) -> str:
    """A source of labelled photos; of a run of `detguard attack`, its samples, whose labels are those of clean photos.

    Raises:
        DetguardError: the run has none, or the source is another part of one: photos without their labels.
    """
    path = Path(source)
    if (run := attack_run(path)) is None or (run / SAMPLES).parent in path.absolute().parents:
        return source
    if not has_samples(whole_run(source, run)):
        raise DetguardError(f"{source}: an attack without samples; make one with: detguard attack --data PHOTOS")
    return str(run / SAMPLES)


def whole_run(source: str, run: Path) -> Path:
    """The run of an attack that a source is in, where it stands for all of it: the run itself, or its samples.

    Raises:
        DetguardError: it is another part: photos without their labels.
    """
    path, samples = Path(source).absolute(), (run / SAMPLES).parent
    if path not in (run, samples) and samples not in path.parents:
        raise DetguardError(f"{source}: is a part of an attack, without the labels of its photos; give the run, {run}")
    return run


def has_samples(run: Path) -> bool:
    """Whether the run of an attack has its photos as a data set."""
    return is_file(run / SAMPLES)


def unlabelled(source: str) -> bool:
    """Whether a source is a folder, a pattern or a file of photos; all others are data with labels, `read_labelled`."""
    path = Path(source)
    if attack_run(path):
        return False
    if is_folder(path):
        return not is_file(path / "data.yaml")
    return path.suffix.lower() in SUFFIXES or (not is_file(path) and glob.has_magic(source))


def refuse_attack(source: str) -> None:
    """See that photos are clean.

    Raises:
        DetguardError: they are of an attack.
    """
    if run := attack_run(Path(source)):
        raise DetguardError(
            f"{source}: photos of an attack, {run}, which fool whoever labels them; give clean ones here, "
            f"and to detguard harden the attack as `samples` {run}"
        )


def refuse_attacks(files: Sequence[Path]) -> None:
    """See that photos are clean whatever named them: links, and one of the others in each folder."""
    for file in {file if file.is_symlink() else file.parent: file for file in files}.values():
        refuse_attack(str(file))


def photo_files(source: str, on_data: OnData = warn_of) -> list[Path]:
    """The photos of a folder, a pattern, a file of JSON lines or a data set's training split.

    on_data: called with what was wrong with the data set.

    Raises:
        DetguardError: they are of an attack: what a detector says of them is not what is to be learned.
    """
    refuse_attack(source)
    if unlabelled(source):
        files = find_photos([source])
    elif Path(source).suffix == ".jsonl":
        files = [one.file for one in read_lines(source, {})]
    else:
        dataset = read_dataset(source, "train", labelled=False)
        on_data(dataset.name, dataset.warnings)
        files = list(dataset.files.values())
    refuse_attacks(files)
    return files


def read_labelled(
    source: str,
    split: str,
    class_names: dict[int, str],
    on_data: OnData = warn_of,
    images: Path | None = None,
    class_map: Mapping[str, str] | None = None,
) -> list[Labelled]:
    """The labelled photos of a data.yaml, a COCO json, a file of JSON lines or an attack run, by class indices.

    on_data: called with what was wrong with it; images: folder of the photos of a COCO json, by default beside it;
    class_map: names of its classes -> the detector's.
    """
    source = with_samples(source)
    class_map = check_map(class_map, class_names.values())
    if Path(source).suffix == ".jsonl":
        photos, faults = read_lines(source, class_names, class_map), Faults()
        if boxes := unknown_boxes(one.unknown for one in photos):
            faults.count(left_out(boxes, class_names.values()), sum(boxes.values()))
        on_data(source, faults)
        return photos
    dataset = read_dataset(source, split, images, class_map=class_map)
    ids = dataset.category_ids(class_names)
    photos = list(in_order(dataset, ids))
    on_data(dataset.name, dataset.warnings)
    return photos


def as_lines(photos: Sequence[Labelled], class_names: dict[int, str]) -> bytes:
    """Labelled photos as a run keeps them, for `read_labelled`."""
    return to_lines(as_line(one, class_names) for one in photos)
