"""Watch a detector's accuracy over labelled photos, from Python."""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detguard import DetguardError, defaults
from detguard.classes import check_map
from detguard.data.entries import DataError
from detguard.data.inputs import as_photos, is_camera, is_video
from detguard.data.sources import OnData, read_labelled, warn_of
from detguard.data.stream import Labelled, from_records, to_lines
from detguard.detections import Detections
from detguard.detectors.base import Detector
from detguard.detectors.load import detector_config
from detguard.files import JsonObject, Temporary
from detguard.hardening.monitor import MOST_WINDOWS, Deployment, Monitor, alarmed, latest, observe
from detguard.photos import as_photo, encode_png
from detguard.runs import INPUTS, Record, Run
from detguard.schema import CONFIGS, Config, check, partly
from detguard.workflows.keywords import as_detector

# Of a run, the photos of its drops.
DROPPED = "dropped.jsonl"
# Photos without known objects may lie between those of a drop: of all together so many are remembered.
MOST_RECENT = 100_000
# Of a stream of months, the photos that a page tells of.
MOST_TOLD = 20_000
# Of records of drops, what is told of them.
TOLD = ("number", "photo", "time", "f1", "began", "levels", "through")
# Instead of a data set: photos as they come.
LIVE = "-"


def open_stream(source: Config, detector: Detector, on_data: OnData = warn_of) -> Sequence[Labelled]:
    """The labelled photos of the data set that a run's config names, in order."""
    images = Path(source["images"]) if source["images"] else None
    return read_labelled(source["source"], source["split"], detector.class_names, on_data, images, source["class_map"])


def is_filmed(source: str) -> bool:
    """Whether a stream is a video or a camera, whose frames have no labels."""
    return is_video(source) or is_camera(source)


def film(run: Run, on_warning: Callable[[str], object] = warnings.warn) -> Iterator[Labelled]:
    """The frames of the video or camera that a run watches, as photos without labels, kept in the run.

    on_warning: called where a video has damaged parts.

    Raises:
        DetguardError: as `as_photos`, or frames of a camera are asked for again.
    """
    stream = run.config["stream"]
    source, every, frames = stream["source"], stream["every"], stream["frames"]
    if is_camera(source) and any(run.each()):
        raise DetguardError(f"{run.folder}: what the camera showed is gone; begin a new run")
    files = as_photos([source], run.path(INPUTS), every, frames, on_warning)
    return (Labelled(file, Detections.none(), id=file.stem, labelled=False) for file in files)


def recent(run: Run) -> list[Record]:
    """One record of each of a run's last photos, from the start of a window: of months, memory would not hold all."""
    window, records = run.config["monitor"]["window"], latest(run.each(last=2 * MOST_TOLD))
    last = max((record["number"] for record in records), default=0)
    return [record for record in records if record["number"] > max(0, last - MOST_TOLD) // window * window]


class Drops:
    """Has the photos of each drop in dropped.jsonl as soon as it is told, without reading all records of days again.

    Of the photos that were seen, those are remembered that a drop may reach back to; those whose labels come later are
    added then. spans: the first and last photo of each drop; told: what verdicts say of these two.

    Of the whole stream, of which memory would not hold all records: last: the number of its last line; count: its
    photos; known: those with known objects; bare: those whose labels have not come; errors: those that could not be
    read, and lines that are none.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.spans, self.told = run, list[tuple[int, int]](), list[Record]()
        self.last = self.count = self.known = self.bare = self.errors = 0
        self.judged = deque[int](maxlen=MOST_WINDOWS * run.config["monitor"]["window"])
        self.recent, self.written = dict[int, Record](), set[int]()
        lines = b"".join(self._take(record)[1] for record in run.each())
        run.write(DROPPED, lines)  # of a run that is gone on with, what was cut off is gone

    def saw(self, record: Record) -> Record:
        """Take the next record; where it tells of a drop, that of the photo which it began with is returned."""
        first, lines = self._take(record)
        if lines:
            self.run.append_lines(lines, DROPPED)
        return first

    def _take(self, record: Record) -> tuple[Record, bytes]:
        """As `saw`, and the lines of photos of drops that are not written yet."""
        number, began = record["number"], record.get("began")
        self.errors += "error" in record
        self.known += record.get("f1") is not None
        if number <= self.last:  # labels that came
            self.bare -= 1
        else:
            self.count += bool(record["photo"])
            self.bare += record.get("labelled") is False and "error" not in record
        self.last = max(self.last, number)
        if "f1" in record and record.get("labelled", True):
            self.recent[number] = self.recent.pop(number, {}) | record
        if record.get("f1") is not None:
            self.judged.append(number)
        oldest = min(self.judged) if len(self.judged) == self.judged.maxlen else 0
        while len(self.recent) > MOST_RECENT or (self.recent and next(iter(self.recent)) < oldest):
            del self.recent[next(iter(self.recent))]
        if began is not None:
            self.spans.append((began, alarmed(record)))
        new = [n for n in sorted(self.recent) if began <= n <= alarmed(record)] if began is not None else [number]
        new = [n for n in new if n in self.recent and n not in self.written and self._dropped(n)]
        self.written.update(new)
        lines = to_lines(self.recent[n] for n in new)
        if began is None:
            return record, lines
        first = self.recent.get(began, {"number": began, "photo": ""})
        self.told += [{key: one[key] for key in TOLD if key in one} for one in (first, record)]
        return first, lines

    def _dropped(self, number: int) -> bool:
        return any(began <= number <= told for began, told in self.spans)


def monitor(
    detector: Detector,
    photos: str | Path | Iterable[Mapping[str, object]],
    *,
    drift: str = defaults.Monitor.drift,
    window: int = defaults.Monitor.window,
    split: str = defaults.Monitor.split,
    images: str | Path | None = None,
    class_map: Mapping[str, str] | None = None,
    out: str | Path | None = None,
) -> Iterator[Record]:
    """Watch accuracy photo by photo, and tell when it drops: photos of a new kind have come.

    Args:
        detector: by `load_detector`.
        photos: a data.yaml, a COCO json, a file of JSON lines; or photos as they come, {"photo": a path or a photo as
            `attack` takes it, "objects": [{"class": "person", "box": [x1, y1, x2, y2]}]}, boxes in pixels.
        drift: what tells a drop from chance: either (likelihood-ratio or adwin, whichever is first),
            likelihood-ratio, adwin, page-hinkley or kswin.
        window: photos that AP is over, 8 or more; a drop may be told after half as many, by kswin after four times
            as many.
        split: of a data.yaml.
        images: folder of the photos of a COCO json, by default beside it; of no other photos.
        class_map: names of classes in the data -> the detector's, as {"pedestrian": "person"}.
        out: folder of a run as `detguard monitor` writes it, with the photos of every drop in dropped.jsonl, which
            `adapt` takes; by default a temporary one, in which photos from memory stay until the next one comes.

    Yields:
        A record per photo: `number`, `photo`, `objects`, `f1` against its labels, `confidence` and, of an ensemble, the
            `entropy` of its gate; `began`, where accuracy has dropped, the number of the photo since which it has, else
            None; `AP50` of a window where it ends, over its photos that are labelled by then, or else where its last
            labels come; or `error`, where a photo cannot be read or its labels are wrong.
            A photo without "objects" but with an "id" is not `labelled` yet, and `hint` tells since which photo the
            confidence has dropped; when {"id", "objects"} come, the photo gets a second record.

    Raises:
        DetguardError: an option is wrong, the data set cannot be read, or `out` holds a run already.

    Examples:
        >>> import detguard
        >>> detector = detguard.load_detector("detguard-n")
        >>> for record in detguard.monitor(detector, "day/instances.json"):  # doctest: +SKIP
        ...     if record.get("began"):
        ...         print(f"accuracy has dropped since photo {record['began']}")
    """
    detector = as_detector(detector)
    check_map(class_map or {}, detector.class_names.values())
    if images is not None and not (isinstance(photos, str | Path) and Path(photos).suffix == ".json"):
        raise DetguardError("`images`: is for a COCO json alone, whose photos may lie elsewhere; leave it out")
    source = {
        "source": str(photos) if isinstance(photos, str | Path) else LIVE,
        "split": split,
        "images": None if images is None else str(images),
        "class_map": dict(class_map or {}),
        "every": 1,
        "frames": defaults.FRAMES,
    }
    config: Config = {
        "detector": detector_config(detector, detector.source),
        "stream": source,
        "monitor": {"detector": drift, "window": window},
        "on_drift": "tell",
        "replay": [],
        "living": {"gather": defaults.Monitor.gather, "keep": defaults.Monitor.keep, "adapt": []},
        "arguments": [],
    }
    config = check(config, partly(CONFIGS["monitor"]))
    Monitor(drift, config["monitor"]["window"])  # which knows the kinds
    shown = open_stream(source, detector) if isinstance(photos, str | Path) else photos
    kept = Temporary() if out is None else None
    run = Run.create("monitor", kept.folder if kept else Path(str(out)), config)
    return _monitor(detector, shown, run, kept)


def _monitor(detector: Detector, photos: Iterable[Any], run: Run, kept: Temporary | None) -> Iterator[Record]:
    stream, options = run.config["stream"], run.config["monitor"]
    if stream["source"] == LIVE:
        given = (_on_disk(run, number, photo) for number, photo in enumerate(photos, 1))
        photos = from_records(given, detector.class_names, class_map=stream["class_map"])
    drops = Drops(run)
    for record in observe(run, Deployment(detector), photos, options["detector"], options["window"]):
        drops.saw(record)
        yield record
        if kept and Path(record["photo"]).parent == run.path(INPUTS):  # a stream may never end
            Path(record["photo"]).unlink(missing_ok=True)


def _on_disk(run: Run, number: int, photo: Any) -> JsonObject | DataError:
    """A labelled photo whose photo is a path: one in memory becomes a file of the run. What is none stays as it is."""
    source = photo.get("photo") if isinstance(photo, Mapping) else None
    if source is None:
        return dict(photo) if isinstance(photo, Mapping) else photo
    if isinstance(source, str | Path):
        return dict(photo) | {"photo": str(source)}
    name = f"{INPUTS}/photo-{number:03}.png"
    try:
        run.write(name, encode_png(as_photo(source)))
    except DetguardError as error:
        return DataError(f"`photos` {number}: {error}")
    return dict(photo) | {"photo": str(run.path(name))}
