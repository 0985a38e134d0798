"""The photos of an attack as a data set: what others train and evaluate on, with labels where transforms took them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from detguard import DetguardError
from detguard.attacks.run import PHOTO, drawn_transforms
from detguard.classes import check_map
from detguard.data.batches import PhotoSet, Samples, as_kept, shrunk
from detguard.data.sources import OnData, attack_run, has_samples, read_labelled, warn_of, whole_run
from detguard.data.stream import Labelled, as_line, read_lines
from detguard.data.writing import DatasetWriter, as_objects
from detguard.detections import Detections
from detguard.files import MAX_ANNOTATIONS, MAX_PHOTO, parse_json, read_file
from detguard.photos import Photo, encode_png, photo_size, read_photo
from detguard.runs import Record, Run
from detguard.transforms.base import Transform, seen
from detguard.transforms.parse import parse_transforms

FOLDER = "samples"
# Of a run that learns from them.
KEPT = "samples.jsonl"


def write_samples(
    run: Run, records: Iterable[Record], labels: Mapping[str, Labelled], class_names: dict[int, str]
) -> int:
    """Write the attacked photos of a run and their groups as `samples/`: YOLO labels, data.yaml and a COCO json.

    labels: key of a photo -> what is labelled in it; what was found in the clean photo where it has none.
    class_names: all that was looked for. The data set has those of them that are labelled in every photo, as in others
    it would say that there are none. Returns how many images it has: none, where no class is left.
    """
    known = set(class_names).intersection(*(one.known for one in labels.values() if one.known is not None))
    names = {index: name for index, name in class_names.items() if index in known}
    if not names:
        return 0
    made = DatasetWriter(lambda name, data: run.write(f"{FOLDER}/{name}", data), names)
    for record in records:
        key, files = record["key"], record["files"]
        objects = labels[key].objects if key in labels else Detections.from_records(record["clean"], class_names)
        objects = objects.of(list(names))
        drawn = drawn_transforms(record)
        for file, name in _names(record).items():
            here = _there(drawn.get(name), run.path(files[PHOTO]), objects)
            source = run.path(file)
            stem = _stem(key, name, source)
            made.add(f"{stem}{source.suffix}", read_file(source, MAX_PHOTO), photo_size(source), as_objects(here))
    made.close()
    return len(made)


def _there(transform: Transform | None, photo: Path, objects: Detections) -> Detections:
    """Where the objects of a photo lie in what a transform makes of it."""
    width, height = photo_size(photo)
    return seen(transform, (height, width), objects, torch.ones(len(objects), dtype=torch.bool))[0]


def _names(record: Record) -> dict[str, str]:
    """The files of a record, each with the name of a member: random ones that drew the same are one file."""
    return {file: name for name, file in record["files"].items()}


def _stem(key: str, name: str, file: Path) -> str:
    return f"{key}--{PHOTO if name == PHOTO else file.stem}"


@dataclass(frozen=True)
class Sample:
    """A photo of an attack, with the objects of the clean photo where they lie in it.

    clean: file of the clean photo; transform: spec of the one that made this member of the group, or "none".
    """

    attacked: Labelled
    clean: Path
    transform: str

    def photos(self) -> tuple[Photo, Photo]:
        """The attacked photo and the clean one, as far as the transform has moved its pixels.

        Raises:
            DetguardError: one cannot be read, or they are not of one size.
        """
        attacked, clean = read_photo(self.attacked.file), read_photo(self.clean)
        for transform in parse_transforms(self.transform):
            if warp := transform.warp(clean.shape[:2]):
                clean = warp(clean)
        if clean.shape != attacked.shape:
            raise DetguardError(f"{self.clean}: no longer the photo that {self.attacked.file} was made of")
        return attacked, clean


def read_samples(
    source: str,
    class_names: dict[int, str],
    on_data: OnData = warn_of,
    class_map: Mapping[str, str] | None = None,
) -> list[Sample]:
    """The photos of an attack, all members of their groups, beside the clean ones.

    source: the run's folder, its `samples` or their data.yaml. Labels are those of its samples, or else what was found
    in the clean photo, of the classes that were found in any: others its detector may not know. class_map: names of
    its classes -> those of `class_names`.

    Raises:
        DetguardError: it is no attack or a part of one, or holds no photos.
    """
    folder = attack_run(Path(source))
    if folder is None:
        raise DetguardError(f"`samples` {source}: expected a run of detguard attack; give other photos as `data`")
    run = Run.open(whole_run(source, folder), "attack")
    labelled = has_samples(folder)
    photos = read_labelled(str(folder), "train", class_names, on_data, class_map=class_map) if labelled else []
    known = {one.file.stem: one for one in photos}
    called = check_map(class_map, class_names.values())
    records = [one for one in run.records() if "files" in one]
    clean = [[a | {"class": called.get(a["class"], a["class"])} for a in one["clean"]] for one in records]
    index = {name: number for number, name in class_names.items()}
    found_of = tuple(sorted({index[a["class"]] for one in clean for a in one if a["class"] in index}))
    samples = []
    for record, objects in zip(records, clean, strict=True):
        drawn = drawn_transforms(record)
        for file, name in _names(record).items():
            path, transform = run.path(file), drawn.get(name)
            label = known.get(_stem(record["key"], name, path))
            if label is None:
                found = Detections.from_records(objects, class_names)
                here = _there(transform, run.path(record["files"][PHOTO]), found)
                label = Labelled(path, replace(here, scores=torch.ones(len(here))), found_of)
            samples.append(Sample(replace(label, file=path), Path(record["photo"]), str(transform or "none")))
    if not samples:
        raise DetguardError(f"`samples` {source}: no attacked photos there")
    return samples


def sample_lines(samples: Iterable[Sample], class_names: dict[int, str]) -> bytes:
    """Photos of attacks as a run keeps them, for `kept_samples`."""
    return "".join(
        json.dumps(as_line(one.attacked, class_names) | {"clean": str(one.clean), "transform": one.transform}) + "\n"
        for one in samples
    ).encode()


def kept_samples(file: Path, class_names: dict[int, str]) -> list[Sample]:
    """What `sample_lines` kept.

    Raises:
        DetguardError: the file cannot be read, or a line is wrong.
    """
    attacked, data = read_lines(file, class_names), read_file(file, MAX_ANNOTATIONS)
    try:
        lines = map(parse_json, data.splitlines())
        sources = [(Path(line["clean"]), str(line["transform"])) for line in lines]
        return [Sample(one, *rest) for one, rest in zip(attacked, sources, strict=True)]
    except (ValueError, KeyError, TypeError) as error:
        raise DetguardError(f"{file}: not one that detguard wrote ({error})") from error


def load_samples(samples: Sequence[Sample], size: int) -> tuple[Samples | None, list[str]]:
    """Photos of attacks for frames of `size` pixels, at the size at which a detector sees them, and what is unreadable.

    Resized further they would fool nobody.
    """
    attacked, clean, labels, unread = list[bytes](), list[bytes](), list[Labelled](), list[str]()
    for one in samples:
        try:
            pair = one.photos()
        except DetguardError as error:
            unread.append(str(error))
            continue
        shown = [shrunk(photo, size, plain=True) for photo in pair]
        for photo, kept in zip(shown, (attacked, clean), strict=True):
            kept.append(encode_png(photo))
        labels.append(as_kept(one.attacked, pair[0], shown[0]))
    if not labels:
        return None, unread
    alike = [1.0] * len(labels)
    return Samples(PhotoSet.of(attacked, alike, plain=True), PhotoSet.of(clean, alike, labels, plain=True)), unread
