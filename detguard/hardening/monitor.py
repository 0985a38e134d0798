"""Watching a detector's accuracy over a stream of labelled photos: a drop means that they are of a new kind."""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev, variance
from typing import Any, TypedDict

import numpy as np
import torch
from river.drift import ADWIN, KSWIN, PageHinkley

from detguard import DetguardError, defaults, first_line, is_out_of_memory
from detguard.data.entries import DataError
from detguard.data.stream import Labelled, Labels, as_line
from detguard.detections import Detections
from detguard.detectors.base import Detector
from detguard.evaluation.coco import f1, metrics_of_photos
from detguard.evaluation.views import LOWEST_CONFIDENCE, SHOWN_CONFIDENCE
from detguard.photos import Photo, PhotoError, read_hashed
from detguard.runs import Record, Run

# Of the levels before and after, so much must be lost: a change too small to matter is no alarm.
SMALLEST_DROP = 0.1
SIGMAS = 3.0
# Windows of photos that a change is looked for in: older ones are forgotten.
MOST_WINDOWS = 32
# How many windows KSWIN compares the last photos with: under that it does not look.
KSWIN_WINDOWS = 4
# Photos whose labels are waited for; those of older ones are no longer taken.
MOST_WAITING = 4096


class LikelihoodRatio:
    """Compares the means before and after every cut of what was seen (Siegmund & Venkatraman 1995, eq. 2.3).

    As river's detectors are used. window: a quarter of it is the least on either side of a cut.
    """

    # Standard errors: at 4.5 three of 40 steady streams of 400 photos raised an alarm, at 5 none of 120 did.
    SIGMAS = 5.0
    # Of one photo's F1, at least: a stream that is all alike is no proof that the next photo must be.
    DEVIATION = 0.05

    def __init__(self, window: int) -> None:
        self.least, self.most = max(4, window // 4), MOST_WINDOWS * window
        self.values: list[float] = []
        self.drift_detected = False

    def update(self, value: float) -> None:
        """Take the next value of the stream; `drift_detected` then says whether a change is seen."""
        self.values = [*self.values, value][-self.most :]
        total = len(self.values)
        before = np.arange(self.least, total - self.least + 1)
        if not len(before):
            return
        sums, squares = (np.cumsum(np.power(self.values, power)) for power in (1, 2))
        first, last = sums[before - 1], sums[-1] - sums[before - 1]
        after = total - before
        within = squares[-1] - first**2 / before - last**2 / after
        deviation = np.sqrt(np.maximum(within / (total - 2), self.DEVIATION**2))
        errors = np.abs(first / before - last / after) / (deviation * np.sqrt(1 / before + 1 / after))
        self.drift_detected = bool(errors.max() > self.SIGMAS)


def adwin(window: int) -> Any:
    """Adaptive windowing (Bifet & Gavalda 2007): cuts off the past where two parts of it differ."""
    # A generous delta: what it suspects must also pass `Monitor`'s test of significance.
    return ADWIN(delta=0.3, clock=1, grace_period=window // 2, min_window_length=max(4, window // 8))


def page_hinkley(window: int) -> Any:
    """Page-Hinkley (1954): the summed shortfall from the mean, in F1, over a threshold."""
    return PageHinkley(min_instances=window // 2, delta=0.05, threshold=window / 4, mode="down")


def kswin(window: int) -> Any:
    """Kolmogorov-Smirnov windowing (Raab et al. 2020): the last photos against a sample of those before."""
    return KSWIN(alpha=0.01, window_size=KSWIN_WINDOWS * window, stat_size=window // 2, seed=0)


# By each name, tests of which any may see a change: the likelihood ratio tells sudden drops first, ADWIN slow ones.
DRIFT: dict[str, tuple[Callable[[int], Any], ...]] = {
    "either": (LikelihoodRatio, adwin),
    "likelihood-ratio": (LikelihoodRatio,),
    "adwin": (adwin,),
    "page-hinkley": (page_hinkley,),
    "kswin": (kswin,),
}


def needed(kind: str, window: int) -> int:
    """How many photos a judgement by one of DRIFT needs: before them, that no drop was told means nothing."""
    return KSWIN_WINDOWS * window if kind == "kswin" else window


def least_told(values: Sequence[float], after: int) -> float:
    """The least fall of the last `after` of some values that `LikelihoodRatio` tells: a smaller one hides in noise.

    values: of a steady stream, more than `after`, newest last. The inverse of the test in `LikelihoodRatio.update`.
    """
    deviation = max(stdev(values), LikelihoodRatio.DEVIATION)
    errors = math.sqrt(1 / (len(values) - after) + 1 / after)
    return max(SMALLEST_DROP, LikelihoodRatio.SIGMAS * deviation * errors)


class Levels(TypedDict):
    """The mean F1 of the photos that a drop was told by, before it and from there on, and how many they are."""

    before: float
    photos_before: int
    after: float
    photos_after: int


@dataclass
class Monitor:
    """Told the quality of one photo after the other, in order; says where it has clearly dropped.

    kind: one of DRIFT; window: photos, by which each says after how many it judges (`needed`). After a change, up or
    down, it starts anew from there. levels: of the last drop that it told.

    Raises:
        DetguardError: no such kind.
    """

    kind: str = defaults.Monitor.drift
    window: int = defaults.Monitor.window
    values: list[float] = field(default_factory=list)
    levels: Levels | None = None

    def __post_init__(self) -> None:
        if self.kind not in DRIFT:
            raise DetguardError(f"`drift` {self.kind}: expected one of {', '.join(DRIFT)}")
        self._drifts = [make(self.window) for make in DRIFT[self.kind]]

    def add(self, value: float) -> int | None:
        """Take the quality of the next photo; where it dropped, how many photos ago it began, else None."""
        self.values = [*self.values, value][-MOST_WINDOWS * self.window :]
        for drift in self._drifts:
            drift.update(value)
        if not any(drift.drift_detected for drift in self._drifts):
            return None
        seen, began = len(self.values), self._changed()
        if began < len(self.values) and mean(self.values[:-began]) < mean(self.values[-began:]):
            self.values = self.values[-began:]  # a rise; what the detector saw may be a drop since then
            began = self._changed()
        before, after = self.values[:-began], self.values[-began:]
        dropped = bool(before) and mean(before) - mean(after) >= max(SMALLEST_DROP, SIGMAS * _error(before, after))
        if dropped:
            self.levels = Levels(
                before=mean(before), photos_before=len(before), after=mean(after), photos_after=len(after)
            )
            self.values = after
        for place, drift in enumerate(self._drifts):
            # The ratio keeps its past; a lasting change too small to tell would cost it again with every photo.
            forgot = drift.drift_detected and not isinstance(drift, LikelihoodRatio)
            if forgot or len(self.values) < seen:
                self._drifts[place] = DRIFT[self.kind][place](self.window)
                for known in self.values:  # the past that the next change is seen against
                    self._drifts[place].update(known)
        return began if dropped else None

    def _changed(self) -> int:
        """How many of the last photos are best told from those before: the cut that leaves least variance in both."""
        values, total = self.values, sum(self.values)
        best, cut, tail = 0.0, len(values), 0.0
        for count in range(1, len(values)):
            tail += values[-count]
            difference = (total - tail) / (len(values) - count) - tail / count
            if (between := count * (len(values) - count) * difference**2) > best:
                best, cut = between, count
        return cut


def _error(before: list[float], after: list[float]) -> float:
    """Standard error of the difference of two means."""
    return math.sqrt(sum(variance(part) / len(part) if len(part) > 1 else math.inf for part in (before, after)))


@dataclass(frozen=True)
class Quality:
    """What is measured on one photo of a stream. f1: at IoU .50 and confidence .25, against its labels; None: it has
    none that are known, so that it cannot tell a detector that finds nothing from one that is right.

    Without labels, as hints: confidence, the mean over the detections that a user would see; entropy of the gate's
    weights, nats, of an ensemble.
    """

    f1: float | None
    confidence: float
    entropy: float | None


def quality(objects: Detections, found: Detections) -> Quality:
    """The quality of what was found on a photo; `found`: down to a low confidence."""
    seen = found.above(SHOWN_CONFIDENCE)
    confidence = float(seen.scores.mean()) if len(seen) else 0.0
    entropy = None if found.experts is None else float(torch.special.entr(found.experts).sum())
    return Quality(f1(objects, seen) if len(objects) else None, confidence, entropy)


class Deployment:
    """Which detector sees which photo of a stream: here always the same."""

    def __init__(self, detector: Detector) -> None:
        self.first = detector

    def since(self, number: int) -> int:
        """The number of the photo after which the detector of another one was deployed; 0: from the beginning."""
        return 0

    def at(self, number: int) -> Detector:
        """The detector that is deployed when a photo of this number comes."""
        return self.first

    def file(self, number: int, photo: Path) -> Path:
        """Where a photo of the stream can be read, long after it came: here where it was."""
        return photo


class Numbered:
    """A `Monitor` of photos by their numbers."""

    def __init__(self, kind: str, window: int) -> None:
        self.monitor, self.numbers = Monitor(kind, window), deque[int](maxlen=MOST_WINDOWS * window)

    def add(self, number: int, value: float) -> int | None:
        """Take the quality of the next photo; where it dropped, the number of the photo since which it has."""
        self.numbers.append(number)
        count = self.monitor.add(value)
        return None if count is None else first_of(list(self.numbers), count)


def first_of(numbers: Sequence[int], count: int) -> int:
    """The number of the first photo of the last `count` that were judged, whose labels may come in another order.

    That from which on fewest of those before lie, and fewest of the last do not: one old photo whose labels come late
    is not the beginning.
    """
    before, after = np.sort(numbers[:-count]), np.sort(numbers[-count:])
    wrong = len(before) - np.searchsorted(before, after) + np.searchsorted(after, after)
    return int(after[wrong.argmin()])


@dataclass(frozen=True)
class Waiting:
    """A photo whose labels have not come; found: on it by the detector of its time, None where a run was resumed; size:
    its height and width, px; sha256: of its file, which may be another photo by then.
    """

    number: int
    photo: Labelled
    found: Detections | None = None
    size: tuple[int, int] | None = None
    sha256: str = ""


def alarmed(alarm: Record) -> int:
    """The number of the last photo of a drop: the one that raised the alarm, or the last that was judged by then."""
    return int(alarm["through"] if "through" in alarm else alarm["number"])


def latest(records: Iterable[Record]) -> list[Record]:
    """One record of each photo, with the labels that came later."""
    photos: dict[int, Record] = {}
    for record in records:
        photos[record["number"]] = photos.get(record["number"], {}) | record
    return list(photos.values())


class Watch:
    """What is known of a stream so far. count: photos that were seen; waiting: those whose labels have not come.

    Values of a detector are watched from the photo on that it was deployed at.
    """

    def __init__(self, deployed: Deployment, kind: str, window: int) -> None:
        self.deployed, self.kind, self.window = deployed, kind, window
        self.accuracy, self.hints, self._since = Numbered(kind, window), Numbered(kind, window), 0
        self.count, self.waiting = 0, dict[str, Waiting]()

    def _counts(self, number: int) -> bool:
        """Whether the detector that saw a photo is the one that is judged, which may change."""
        since = self.deployed.since(number)
        if since > self._since:
            self.accuracy, self.hints = Numbered(self.kind, self.window), Numbered(self.kind, self.window)
            self._since = since
        return since == self._since

    def wait(self, one: Waiting) -> None:
        """Keep a photo until its labels come; of very many the oldest is given up."""
        self.waiting[one.photo.id] = one
        if len(self.waiting) > MOST_WAITING:
            del self.waiting[next(iter(self.waiting))]

    def again(self, known: Record) -> None:
        """Take a record of the run as if its photo came now."""
        number = known["number"]
        judged = self._counts(number)
        self.count = max(self.count, number)
        if judged and known.get("f1") is not None:
            self.accuracy.add(number, known["f1"])
        if judged and "confidence" in known and known.get("labelled") is False:
            self.hints.add(number, known["confidence"])
        if known.get("labelled") is False and "error" not in known:
            told = {"id": known.get("id", ""), "time": known.get("time", ""), "judges": known.get("judges")}
            photo = Labelled(Path(known["photo"]), Detections.none(), labelled=False, **told)
            self.wait(Waiting(number, photo, sha256=known.get("sha256", "")))
        else:
            self.waiting.pop(known.get("id", ""), None)

    def judged(self, number: int, photo: Labelled, found: Detections) -> Record:
        """The `Quality` of a photo, and since when accuracy has dropped, or where it is without labels, confidence."""
        values, counts = quality(photo.objects, found), self._counts(number)
        began = self.accuracy.add(number, values.f1) if counts and values.f1 is not None else None
        hint = self.hints.add(number, values.confidence) if counts and not photo.labelled else None
        told: Record = {} if began is None else {"levels": self.accuracy.monitor.levels}
        if began is not None and (last := max(self.accuracy.numbers)) > number:  # by labels that came late
            told["through"] = last
        return {**asdict(values), "began": began} | told | ({} if hint is None else {"hint": hint})


class Windows:
    """AP50 of the photos of each window that have labels when it ends; where none has, once all have theirs.

    Of a window whose first photo it was not told of, as where a live stream is resumed, none.
    """

    def __init__(self, size: int) -> None:
        self.size, self.seen, self.open = size, 0, dict[int, list[tuple[Detections, Detections]]]()

    def ap50(
        self, number: int, pair: tuple[Detections, Detections] | None, waiting: Iterable[int], *, late: bool
    ) -> float | None:
        """That of the window of a photo, if this photo or its labels end it.

        pair: its objects and what was found, if it is labelled; waiting: the numbers of photos without labels; late:
        its labels came after it.
        """
        window, place = divmod(number - 1, self.size)
        if not late:
            self.seen = number
            if place == 0:
                self.open[window] = []
                self.open.pop(window - MOST_WAITING // self.size - 2, None)  # of which nobody waits for labels
        pairs = self.open.get(window)
        if pairs is None:
            return None
        if pair is not None:
            pairs.append(pair)
        over = place == self.size - 1
        if late:
            over = self.seen >= (window + 1) * self.size and all((n - 1) // self.size != window for n in waiting)
        if not (over and pairs):
            return None
        del self.open[window]
        return metrics_of_photos(*zip(*pairs, strict=True)).stats["AP50"]


def reaching_out(objects: Detections, size: tuple[int, int]) -> int:
    """How many boxes reach out of a photo of (height, width) by more than a pixel, which rounding may do."""
    low, high = objects.boxes[:, :2].amin(1), (objects.boxes[:, 2:] - torch.tensor(size[::-1])).amax(1)
    return int(((low < -1) | (high > 1)).sum())


def _joined(one: Labelled | Labels | DataError, earlier: Waiting | None, watch: Watch) -> Labelled:
    """A photo, with the labels that came after it.

    Raises:
        DataError: it is a line of a stream that is none, its id is that of a photo that waits for its labels, or the
            labels are of no photo that does.
    """
    if isinstance(one, DataError):
        raise one
    if isinstance(one, Labelled):
        if one.id in watch.waiting:
            number = watch.waiting.pop(one.id).number  # or labels of the one would be taken for the other's
            raise DataError(
                f"photo '{one.id}': photo {number} waits for labels by the same id, no more; give each its own"
            )
        return one
    if earlier is None:
        raise DataError(f"labels of '{one.id}': none of the last {MOST_WAITING} photos without labels is that")
    return one.of(earlier.photo)


def _read(photo: Path, copy: Path, sha256: str) -> tuple[Photo, str]:
    """A photo from its copy, and its SHA-256, as `read_hashed`; errors name the photo itself."""
    try:
        return read_hashed(copy, sha256)
    except PhotoError as error:
        raise PhotoError(str(error).replace(str(copy), str(photo))) from error


@contextmanager
def _full_for_a_while(photo: str) -> Iterator[None]:
    """Have a device that is full, as beside a training, be the error of a photo; any other error is the stream's."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise PhotoError(f"{photo}: cannot be looked at ({first_line(error)})") from error


def _counted_off(known: Counter[str], name: str) -> bool:
    """Whether one more of a name is known; it is then counted off."""
    known[name] -= 1
    return known[name] >= 0


def observe(
    run: Run,
    deployed: Deployment,
    photos: Iterable[Labelled | Labels | DataError],
    kind: str,
    window: int,
    *,
    again: bool = True,
) -> Iterator[Record]:
    """Watch what is deployed on photos in order, and append a record of each to the run: number, `as_line`, `Quality`,
    and `began`, where accuracy has dropped, the number of the photo since which it has; AP50 of `Windows`.
    Photos without labels that are known are shown, and not judged; where labels come later, there is a second record.

    A detector that takes another one's place is judged from there on. Where a photo without labels is shown and the
    confidence has dropped as accuracy would have to, its `hint` is the number of the photo since which it has.

    again: `photos` begin with those that the run has seen, whose records end with a window; else they are the next
    ones. An unreadable photo, one that the detector refuses, one that is another by the time that it is looked at again
    for its labels, and a line of a stream that is none, is a record with its error. `outside`: how many labelled boxes
    reach out of the photo, as those of another resolution do; `sha256`: of its file.
    """
    watch, names = Watch(deployed, kind, window), Counter[str]()
    for known in run.each():
        watch.again(known)
        if again:
            names[known["photo"]] += 1
    if again and isinstance(photos, Sequence):  # a data set, of which photos may be gone since, or new
        photos = [one for one in photos if not _counted_off(names, str(one.file))]
    elif again:
        photos = islice(photos, watch.count, None)
    windows = Windows(window)
    for one in photos:
        earlier = watch.waiting.pop(one.id, None) if isinstance(one, Labels) else None
        number = earlier.number if earlier else watch.count + 1
        watch.count = max(watch.count, number)
        record: Record = {"number": number, "photo": "", "objects": []}
        pair: tuple[Detections, Detections] | None = None
        found, size, sha256 = (earlier.found, earlier.size, earlier.sha256) if earlier else (None, None, "")
        detector, full = deployed.first, ""
        try:
            with _full_for_a_while(f"photo {number}"):
                if found is None:
                    detector = deployed.at(number)  # without whose file no photo can be seen
        except PhotoError as error:
            full = str(error)
        try:
            photo = _joined(one, earlier, watch)
            record |= as_line(photo, deployed.first.class_names)
            if found is None:
                shown, sha256 = _read(photo.file, deployed.file(number, photo.file), sha256)
                size = (shown.shape[0], shown.shape[1])
                if full:
                    raise PhotoError(full)
                with _full_for_a_while(str(photo.file)):
                    (found,) = detector.detect([shown], LOWEST_CONFIDENCE, multi_label=True)
        except DetguardError as error:  # of a detector, too, which may refuse a shape
            record |= {"error": str(error)} | ({"id": one.id} if isinstance(one, Labelled) and one.id else {})
        else:
            record["sha256"], found_known = sha256, photo.counted(found)
            if not photo.labelled:
                watch.wait(Waiting(number, photo, found, size, sha256))
            else:
                pair = photo.objects, found_known
                if size and (outside := reaching_out(photo.objects, size)):
                    record["outside"] = outside
            record |= watch.judged(number, photo, found_known)
        waiting = (other.number for other in watch.waiting.values())
        if (ap50 := windows.ap50(number, pair, waiting, late=earlier is not None)) is not None:
            record["AP50"] = ap50
        run.append(record)
        detector = deployed.first  # one that is replaced is not kept until the next photo comes
        yield record
