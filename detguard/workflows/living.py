"""A detector that learns while its stream goes on: what `detguard monitor --on-drift adapt` does after a drop.

Another process adapts the ensemble to the photos since the drop, while the stream is read and judged as before. What it
made takes the ensemble's place only where it is better on photos of the new kind, and no worse on those of old ones.
"""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from typing_extensions import override

from detguard import DetguardError, first_line
from detguard.data.sources import as_lines, read_labelled, unlabelled
from detguard.data.stream import to_lines
from detguard.detectors.base import Detector
from detguard.detectors.gated import MOST_EXPERTS, GatedNetwork
from detguard.detectors.load import load_detector
from detguard.engine import die_with
from detguard.files import MAX_ANNOTATIONS, MAX_PHOTO, FileError, parse_json, read_file
from detguard.hardening.adapt import JUDGED_ONE_IN
from detguard.hardening.judging import FIGURES, Figures, Judgement
from detguard.hardening.monitor import MOST_WAITING, MOST_WINDOWS, Deployment, Monitor
from detguard.hardening.validation import ATTACKED
from detguard.runs import Record, Run
from detguard.workflows.monitor import LIVE, MOST_RECENT

EVENTS = "events.jsonl"
# Of a run, copies of the photos that may still be learned from.
PHOTOS = "photos"
# What may be lost of the F1 of old kinds, as they are and attacked, of which there are few: as much as chance moves it.
LOST, LOST_ATTACKED = 0.01, 0.05
# And of the F1 of attacked ones, what is left at least, of what there was: of little, the above might be all.
LEFT_ATTACKED = 0.5
# What becomes of an adaptation, and of a detector that it replaced.
DEPLOYED, KEPT, ROLLED_BACK = "deployed", "kept", "rolled back"
# Multiples of it one after the other are evenly spread (Knuth 1973, 6.4).
GOLDEN = 2654435761
# While photos are gathered, it is seen whether F1 has risen again whenever there are so many more.
LOOK_EVERY = 8
# Of the processes that adapt: the stream comes first.
NICENESS = 5
# Seconds: between looks at it, or for it to save and end; and without a file that it has written, though it saves every
# three minutes while it learns.
PATIENCE, STALLED = 60, 6 * 3600
# Options of `detguard adapt` that a user may give; where it reads and writes is up to the monitor.
OPTIONS = (
    "--experts", "--expert", "--mode", "--init", "--lambda", "--max-experts", "--photos", "--corruptions", "--batch",
    "--rate", "--seed", "--workers",
)  # fmt: skip


@dataclass(eq=False)
class Living(Deployment):
    """The ensembles of a stream, each adapted from the one before it.

    run: of the monitor, whose config says how many photos are gathered after a drop (`gather`), how many old ones are
    replayed (`keep`), and which options `detguard adapt` gets. report: called with what has happened, in a line.

    Of photos, those are remembered, and kept as copies in the run, that a drop may reach back to, those that wait for
    labels, those of a reservoir of `keep` judged ones of all that came (Vitter 1985, algorithm R), and those that are
    being gathered or learned. A drop may reach back as far as `Monitor` remembers: so many photos with known objects.

    failures: how often what adapts has ended without a verdict; waits: the photo at which it is tried again; over:
    whether the stream is.
    """

    RETRIES: ClassVar[int] = 3

    run: Run
    first: Detector
    device: str = "cpu"
    report: Callable[[str], object] = print
    child: subprocess.Popen[bytes] | None = field(default=None, init=False)
    failures: int = field(default=0, init=False)
    over: bool = field(default=False, init=False)
    waits: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.options = self.run.config["living"]
        check_options(self.options["adapt"])
        self.events = self.run.records(name=EVENTS)
        self.seen, self.reservoir, self.judged, self.number = dict[int, Record](), list[int](), 0, 0
        self.turns = 0  # of those that were judged, among them photos of which nothing is known any more
        self.turn_of = dict[str, int]()  # by SHA-256, of the last of them: a file that comes again keeps its turn
        self.remembered = deque[int](maxlen=MOST_WINDOWS * self.run.config["monitor"]["window"])
        self.learned = self._learned() if self.last["event"] == "adapting" else set[int]()
        self.passed = set[int]()  # since which photos there are drops that are still to be learned
        if self.run.config["on_drift"] == "adapt":
            for count, record in enumerate(self.run.each(), 1):
                self._pass(record)
                self._take(record)
                if count % MOST_WAITING == 0:  # with each of them, months would take hours; with none, all memory
                    self._forget()
            self._forget()
        self._loaded = ("", self.first)
        self._written = -1.0, 0.0
        self._unsaid = 0  # how long the log of what adapts was when it was started last

    def _change(self, number: float) -> Record:
        """The event by which the ensemble that sees a photo was deployed; of the first one, the beginning."""
        changes = [e for e in self.events if e["event"] in (DEPLOYED, ROLLED_BACK) and e["number"] < number]
        return changes[-1] if changes else {"number": 0, "model": self.run.config["detector"]["model"]}

    @override
    def since(self, number: int) -> int:
        return int(self._change(number)["number"])

    def model(self, number: int) -> str:
        """The file of the ensemble that sees a photo, or the name of the first one."""
        return self._found(str(self._change(number)["model"]))

    def _found(self, model: str) -> str:
        """Where an ensemble of an event is: events name those of the run as they lie in it, wherever that is now."""
        return model if model == self.run.config["detector"]["model"] else str(self.run.path(model).absolute())

    @override
    def at(self, number: int) -> Detector:
        model = self.model(number)
        if model == self.run.config["detector"]["model"]:
            return self.first
        if self._loaded[0] != model:
            self._load(model)
        return self._loaded[1]

    def _load(self, model: str) -> None:
        self._loaded = "", self.first  # before there is room for the next one
        network = getattr(self.first, "model", None)  # its rule may be one that was asked for, not that of its card
        if not isinstance(network, GatedNetwork):
            file = self.run.folder / EVENTS
            raise DetguardError(f"{file}: tells of ensembles, and {self.first.name} is none; delete it")
        top_k, fusion = network.top_k or MOST_EXPERTS, network.fusion
        made = load_detector(model, self.first.imgsz, self.device, top_k, fusion, self.first.iou)
        self._loaded = model, made

    @override
    def file(self, number: int, photo: Path) -> Path:
        """The run's copy of a photo, where there is one to be: the camera may delete its own, or write the next one
        over it, and what is learned from is to be what was judged.
        """
        if number in self.seen:
            return Path(self.seen[number]["photo"])
        if self.run.config["on_drift"] != "adapt" or number <= self.number:
            return photo
        copy = self.run.path(self._copy(number, photo))
        with suppress(OSError):
            copy.unlink(missing_ok=True)  # of a photo of that number which a kill left without a record
        with suppress(FileError):  # of a full disk, too: `_remember` will say so, once what was found is recorded
            self._keep(number, photo)
        return copy if copy.exists() else photo

    @staticmethod
    def _copy(number: int, photo: Path) -> str:
        return f"{PHOTOS}/{number}{photo.suffix[:8]}"

    def _keep(self, number: int, photo: Path) -> None:
        """Copy a photo into the run, unless the camera has deleted it: whoever reads it is told."""
        try:
            data = read_file(photo, MAX_PHOTO)
        except FileError:
            return
        self.run.write(self._copy(number, photo), data)

    @property
    def last(self) -> Record:
        """The last event of the log; one without a name where nothing has happened yet."""
        return self.events[-1] if self.events else {"event": ""}

    def _pass(self, record: Record) -> None:
        """Take note of a drop that is not learned yet, if a photo tells of one, of the ensemble that is deployed."""
        ends = {"gathering": "began", ROLLED_BACK: "number"}
        over = max((event[ends[event["event"]]] for event in self.events if event["event"] in ends), default=0)
        if (record.get("began") or 0) > over:
            self.passed.add(record["began"])

    def _gather(self) -> None:
        """Begin to gather photos since the first of the drops that wait: those since are learned after it."""
        began = min(self.passed)
        self.passed.remove(began)
        self._note({"event": "gathering", "number": self.number, "began": began})

    def saw(self, record: Record) -> None:
        """Do what is to be done after a photo: begin to gather after a drop, to adapt, or to deploy what was made."""
        self._pass(record)
        self._remember(record, copied=True)
        if self.last["event"] == "adapting":
            if self.child is None:  # stopped before it was over, or to be tried again
                if self.number >= self.waits:
                    self._start(self.last)
            elif self.child.poll() is not None:
                self._judge()
            elif self._stalled():
                self.child.kill()
        elif self.last["event"] == "gathering":
            photos = self._photos(self.last["began"], self.number)
            enough = len(photos) >= self.options["gather"] and not self._few(photos)
            rose = self._rose() if len(photos) % LOOK_EVERY == 0 or enough else None
            if rose is not None or enough:
                self._adapt(rose)
        elif self.passed:
            self._gather()

    def end(self, wait: Callable[[subprocess.Popen[bytes]], object] | None = None) -> None:
        """The stream is over: adapt to what has been gathered, and wait for what is under way.

        wait: is shown the process first.
        """
        self.over = True
        while self.passed or self.last["event"] in ("gathering", "adapting"):
            if self.last["event"] == "gathering":
                photos, rose = self._photos(self.last["began"], self.number), self._rose()
                if rose is None and self._live and self._few(photos):
                    self.report(f"photo {self.number}: {too_few(len(photos))}; a resumed run goes on gathering")
                    return
                self._adapt(rose)
            if self.last["event"] != "adapting":
                if self.passed:
                    self._gather()
                continue
            if self.child is None:
                self._start(self.last)
            if self.child is None:
                self._failed("it could not be started")
            else:
                if wait:
                    wait(self.child)
                while self.child.poll() is None:
                    with suppress(subprocess.TimeoutExpired):
                        self.child.wait(PATIENCE)
                    if self._stalled():
                        self.child.kill()
                self._judge()
            if self._given_up_for_now():
                return

    def _given_up_for_now(self) -> bool:
        """At the end of a stream, whether what has failed is left to a resumed run; else the next try has to wait."""
        if not self.failures:
            return False
        if self._live:
            return True
        time.sleep(self.failures * PATIENCE)
        return False

    def stop(self) -> None:
        """Have the process that adapts save and end; a resumed run goes on with it."""
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(signal.SIGINT)
            try:
                self.child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.child.kill()  # what it saved last is there
                self.child.wait()

    @property
    def _live(self) -> bool:
        """Whether photos come as JSON lines, of which others may follow when the run is resumed."""
        return bool(self.run.config["stream"].get("source") == LIVE)

    @staticmethod
    def _log(folder: str) -> str:
        """What the process that adapts in a folder of the run says, as a file of the run."""
        return f"{folder}.log"

    def _stalled(self) -> bool:
        """Whether the process that adapts has written nothing for so long that it never will: it saves in minutes."""
        name, times = self.last["folder"], list[float]()
        folder = self.run.path(name)
        for file in (self.run.path(self._log(name)), folder / "results.jsonl", *(folder / "state").glob("*.pt")):
            with suppress(OSError):  # it is just being replaced
                times.append(file.stat().st_mtime)
        # By a clock of its own: that of files may be another machine's, or be set.
        if self._written[0] != (last := max(times, default=0.0)):
            self._written = last, time.monotonic()
        return time.monotonic() - self._written[1] > STALLED

    def roll_back(self) -> None:
        """Have the ensemble before the last one deployed see the photos that follow.

        Raises:
            DetguardError: none was deployed.
        """
        models = [self.run.config["detector"]["model"]]
        for event in self.events:
            if event["event"] == DEPLOYED:
                models.append(event["model"])
            elif event["event"] == ROLLED_BACK:
                models = models[:-1]
        if len(models) < 2:
            raise DetguardError("`roll_back`: the run has deployed nothing that could be taken back")
        if self.last["event"] in ("gathering", "adapting"):  # by what is taken back
            self.stop()
            self.child = None
            self._close(KEPT, self.last_model, "rolled back")
        self._close(ROLLED_BACK, models[-2])
        self.passed.clear()  # they were of what is taken back

    def _remember(self, record: Record, *, copied: bool = False) -> None:
        """Take what is known of a photo, and let go of what is no longer needed; copied: as `_take`."""
        self._take(record, copied=copied)
        self._forget()

    def _take(self, record: Record, *, copied: bool = False) -> None:
        """Take what is known of a photo; copied: while it can still be read, a copy of it."""
        number = record["number"]
        first, self.number = number > self.number, max(number, self.number)
        again = self.seen.get(number, {}).get("f1") is not None  # as a resumed run sees its last window
        if number in self.seen or first:
            copy = self._copy(number, Path(record["photo"]))
            if copied and first and "error" not in record and not self.run.path(copy).exists():
                self._keep(number, Path(record["photo"]))
            kept = {"photo": str(self.run.path(copy).absolute())} if self.run.path(copy).exists() else {}
            self.seen[number] = self.seen.get(number, {}) | record | kept
        if record.get("f1") is None or again:
            return
        self.turns += 1
        turn = self.turn_of.setdefault(record.get("sha256", str(number)), self.turns)
        if len(self.turn_of) > MOST_RECENT:
            del self.turn_of[next(iter(self.turn_of))]
        if number in self.seen:
            self.seen[number]["turn"] = turn
            self.remembered.append(number)
            self.judged += 1
            place = self.judged - 1
            if place >= self.options["keep"]:
                place = int(np.random.default_rng(self.judged).integers(self.judged))
            if place < self.options["keep"]:
                self.reservoir[place : place + 1] = [number]

    def _forget(self) -> None:
        """Let go of the photos that nothing can be learned from any more, and of their copies."""
        recent = min(self.remembered) - 1 if len(self.remembered) == self.remembered.maxlen else 0
        recent = max(recent, self.number - MOST_RECENT)
        since = min(self.passed, default=self.number + 1)
        since = min(since, self.last["began"]) if self.last["event"] == "gathering" else since
        bare = [n for n, known in self.seen.items() if known.get("labelled") is False and "error" not in known]
        waiting = bare[-MOST_WAITING:]
        # While one kind is learned, the next one may come for hours, and be over.
        gathered = [one["number"] for one in self._photos(since, self.number)][: self.options["gather"]]
        needed = self.learned.union(self.reservoir, waiting, gathered)
        # Of photos without known objects nothing can be learned, unless their labels come.
        gone = [n for n, known in self.seen.items() if n <= recent or known.get("f1") is None]
        for number in [n for n in gone if n not in needed]:
            file = Path(self.seen.pop(number)["photo"])
            if file.parent == self.run.path(PHOTOS).absolute():
                with suppress(OSError):  # it takes room, and nothing else
                    file.unlink(missing_ok=True)

    def _learned(self) -> set[int]:
        """The numbers of the photos that are being learned."""
        files = [self.run.path(f"{self.last['folder']}.{name}.jsonl") for name in ("new", "replay")]
        lines = [line for file in files if file.exists() for line in read_file(file, MAX_ANNOTATIONS).splitlines()]
        copies = self.run.path(PHOTOS).resolve()
        try:
            photos = [Path(parse_json(line)["photo"]) for line in lines]
            # By their names: the run may lie elsewhere now.
            return {
                int(photo.stem) for photo in photos if photo.parent.name == PHOTOS and (copies / photo.name).exists()
            }
        except (ValueError, KeyError, TypeError) as error:
            raise DetguardError(f"{self.run.folder}: not photos that detguard wrote there ({error})") from error

    def _photos(self, began: int, number: int) -> list[Record]:
        """Those with known objects of a part of the stream."""
        return [r for n, r in self.seen.items() if began <= n <= number and r.get("f1") is not None]

    def _rose(self) -> int | None:
        """Of the photos since a drop, the first one of those on which F1 has risen again: they are of an old kind.

        By the likelihood ratio, whichever test tells of drops: of the others some want more photos than are gathered.
        """
        window = min(self.run.config["monitor"]["window"], self.options["gather"])
        watching, photos = Monitor(window=window), self._photos(self.last["began"], self.number)
        for count, one in enumerate(photos, 1):
            if (ago := watching.add(1 - one["f1"])) is not None:  # where F1 rises, what it lacks drops
                return int(photos[count - ago]["number"])
        return None

    def _few(self, new: Sequence[Record]) -> bool:
        """Whether photos are too few to be learned: one judges, and others have to be left."""
        gather = self.options["gather"]
        # Of a few files that come again and again none may ever judge by itself.
        return len(new) < min(JUDGED_ONE_IN, gather) or (len(new) < 2 * gather and not any(map(judges, new)))

    def _adapt(self, rose: int | None) -> None:
        """Begin to learn what was gathered, or give it up: of few photos one would judge, and none be left to learn.

        rose: since which photo F1 has risen again, so that those from there on are not of the new kind.
        """
        number, began = self.number, self.last["began"]
        count = 1 + sum(e["event"] == "adapting" for e in self.events)
        folder = f"adapted/{count:03d}"
        new = self._photos(began, number if rose is None else rose - 1)
        known = [one["number"] for one in self._photos(1, began - 1)]
        again = "" if rose is None else f"accuracy has risen again since photo {rose}; "
        if self._few(new):
            self._close(KEPT, self.last_model, again + too_few(len(new)))
            return
        if rose is not None:
            self.report(f"photo {number}: {again}{len(new)} photos of the new kind came before")
        # When it began is an estimate, and few photos of the new kind among old ones keep new experts from being asked.
        known = known[: -self.run.config["monitor"]["window"] // 2] or known
        old = set(known)
        drawn = [n for n in self.reservoir if n in old]
        # Where the reservoir has since taken in new ones, recent ones make up for them.
        others = old - set(drawn)
        drawn += [n for n in np.random.default_rng(count).permutation(known).tolist() if n in others]
        if judging := next((n for n in drawn if judges(self.seen[n])), None):  # of few none may
            drawn.remove(judging)
            drawn.insert(0, judging)
        replayed = [self.seen[n] for n in sorted(drawn[: self.options["keep"]])]
        try:
            renamed = self._renamed()
        except DetguardError as error:  # they were there when the run began
            self._close(KEPT, self.last_model, str(error))
            return
        self.learned = {one["number"] for one in (*new, *replayed)}
        self.run.write(f"{folder}.new.jsonl", to_lines(with_judges(new)))
        self.run.write(f"{folder}.replay.jsonl", to_lines(with_judges(replayed)) + renamed)
        self._note({"event": "adapting", "number": number, "began": began, "folder": folder, "model": self.last_model})
        self._start(self.last)

    @property
    def _class_map(self) -> dict[str, str]:
        """Names of classes in the data -> the ensemble's."""
        return dict(self.run.config["stream"]["class_map"])

    def _renamed(self) -> bytes:
        """The user's own photos to replay, where their classes have other names; photos of the run have theirs."""
        names, sources = self.first.class_names, [str(source) for source in self.run.config["replay"]]
        if not self._class_map:
            return b""
        of_each = [read_labelled(s, "train", names, class_map=self._class_map) for s in sources if not unlabelled(s)]
        return b"".join(as_lines(photos, names) for photos in of_each)

    def _start(self, event: Record) -> None:
        name = event["folder"]
        folder, new, old = (self.run.path(f"{name}{end}") for end in ("", ".new.jsonl", ".replay.jsonl"))
        log = self._log(name)
        with suppress(OSError):  # so that what is judged is what it writes itself
            (folder / FIGURES).unlink()
        command = [sys.executable, "-m", "detguard", "adapt", "--device", self.device]
        try:
            if (folder / "config.yaml").exists():
                command += ["--resume", str(folder), *self._workers]
            else:
                command += ["--model", self._found(event["model"]), "--new", str(new), "--out", str(folder)]
                replayed = [s for s in map(str, self.run.config["replay"]) if unlabelled(s) or not self._class_map]
                if not old.exists() or old.stat().st_size:  # that it is gone, the child says for good
                    replayed.append(str(old))
                command += [part for source in replayed for part in ("--replay", source)] + self.options["adapt"]
            with self.run.opened(log) as said:
                self._unsaid = said.tell()
                # Away from the terminal's process group, so that Ctrl-C reaches the monitor alone; never left behind.
                self.child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    start_new_session=True,
                    preexec_fn=partial(die_with, os.getpid()) if os.name == "posix" else None,
                )
            self.run.path(log).touch()  # from where on it is waited for
        except (OSError, subprocess.SubprocessError) as error:  # no memory or no room just now
            self.waits = self.number + self.run.config["monitor"]["window"]
            self.report(f"photo {self.number}: adapting could not be started ({error}); it is tried again")
            return
        if hasattr(os, "setpriority"):
            own = os.getpriority(os.PRIO_PROCESS, 0)  # over which nobody but root may go back
            os.setpriority(os.PRIO_PROCESS, self.child.pid, max(NICENESS, own))

    @property
    def _workers(self) -> list[str]:
        """Of the options of `detguard adapt`, that which no run keeps."""
        given = self.options["adapt"]
        places = [i for i, part in enumerate(given) if part.partition("=")[0] == "--workers"]
        return [part for i in places for part in given[i : i + 1 + ("=" not in given[i])]]

    @property
    def last_model(self) -> str:
        """The ensemble that was deployed last, as events name it: a resumed run goes back to photos before that."""
        return str(self._change(math.inf)["model"])

    def _judge(self) -> None:
        assert self.child is not None
        code, event, self.child = self.child.returncode, self.last, None
        folder = self.run.path(event["folder"])
        if not (code in (0, 2) and (folder / FIGURES).exists()):  # 2: some photos could not be read
            log, said = self.run.path(self._log(event["folder"])), b""
            with suppress(FileError):  # whoever cleans up may have taken it
                said = read_file(log)[self._unsaid :]
            errors = [line for line in said.decode(errors="replace").splitlines() if line.startswith("error: ")]
            why = f"adapting ended with exit code {code}, see {log}" + (f" ({errors[-1]})" if errors else "")
            # Growth over its limit it will not take later; of memory or a disk there may be more.
            self._failed(why, for_good=bool(errors) and "max_experts" in errors[-1].replace("-", "_"))
            return
        try:
            found = Judgement.kept(folder)
        except DetguardError as error:
            self._failed(str(error))
            return
        fits, why = verdict(found.before, found.after, found.with_objects)
        made = f"{event['folder']}/weights/adapted.safetensors"
        if fits:
            try:
                self._load(self._found(made))
            except (DetguardError, MemoryError, RuntimeError) as error:  # as of a device that is full
                self._failed(f"{why}, but it cannot be loaded ({first_line(error)})", found)
                return
        self._close(DEPLOYED if fits else KEPT, made if fits else event["model"], why, found)

    def _failed(self, why: str, found: Judgement = Judgement(), *, for_good: bool = False) -> None:
        """What adapts has come to no good end: it is tried again, later each time, and in the end given up."""
        self.failures += 1
        if for_good or self.failures > self.RETRIES:
            self._close(KEPT, self.last["model"], why, found)
            return
        self.waits = self.number + self.failures * self.run.config["monitor"]["window"]
        by = "a resumed run tries it again" if self.over and self._live else "it is tried again"
        self.report(f"photo {self.number}: {why}; {by}")

    def _close(self, event: str, model: str, why: str = "", found: Judgement = Judgement()) -> None:
        figures = {"before": found.before, "after": found.after}
        if self.last["event"] == "adapting":  # or what is not used would fill the disk in a year
            for part in ("state", *(["weights"] if event == KEPT else [])):
                shutil.rmtree(self.run.path(self.last["folder"]) / part, ignore_errors=True)
        self.learned, self.failures, self.waits = set(), 0, 0
        self._note({"event": event, "number": self.number, "model": model, "why": why} | figures)

    def _note(self, event: Record) -> None:
        self.run.append(event, EVENTS)
        self.events.append(event)
        own = "model" in event and event["model"] != self.run.config["detector"]["model"]
        self.report(event_line(event | ({"model": str(self.run.folder / event["model"])} if own else {})))


def judges(photo: Record) -> bool:
    """Whether a photo judges what is learned: one in JUDGED_ONE_IN, in each adaptation the same.

    By their turns, not their numbers: of those that are judged each third or each 55th may have been labelled.
    """
    return bool(photo["turn"] * GOLDEN % 2**32 < 2**32 / JUDGED_ONE_IN)


def with_judges(records: Sequence[Record]) -> list[Record]:
    """Photos of a stream with whether they judge what is learned; of so few old ones that none does, the last."""
    judging = {one["turn"] for one in records if judges(one)} or {one["turn"] for one in records[-1:]}
    return [one | {"judges": one["turn"] in judging} for one in records]


def too_few(count: int) -> str:
    """Why so many photos are not learned from."""
    return f"{count} photos of the new kind are too few"


def check_options(parts: Sequence[str]) -> None:
    """See that options of `detguard adapt` are some that a user may give.

    Raises:
        DetguardError: they are not.
    """
    for part in parts:
        if part.startswith("--") and part.partition("=")[0] not in OPTIONS:
            raise DetguardError(f"`adapt` {part}: expected some of {', '.join(OPTIONS)}")


def verdict(before: Figures, after: Figures, photos: Mapping[str, int]) -> tuple[bool, str]:
    """Whether what was made by adapting is to take the place of what it was made from, and why.

    before, after: figures of photos that were not learned from, by kind: new, old, and old ones attacked; photos: how
    many of these have objects, which F1 is of.
    """
    known = {of: (before[of]["F1"], after[of]["F1"]) for of in before.keys() & after.keys() & photos.keys()}
    judged = {of: (was, now) for of, (was, now) in known.items() if was is not None and now is not None}
    if missing := " and ".join(kind for kind in ("new", "old", ATTACKED) if kind not in judged):
        return False, f"there are no {missing} photos with objects to judge it by"
    new, old, attacked = (judged[kind] for kind in ("new", "old", ATTACKED))
    why = (
        f"F1 {new[0]:.3f} -> {new[1]:.3f} on {photos['new']} new photos, "
        f"{old[0]:.3f} -> {old[1]:.3f} on {photos['old']} old ones, "
        f"{attacked[0]:.3f} -> {attacked[1]:.3f} on {photos[ATTACKED]} attacked ones"
    )
    resists = attacked[1] >= max(attacked[0] - LOST_ATTACKED, attacked[0] * LEFT_ATTACKED)
    return new[1] > new[0] and old[1] >= old[0] - LOST and resists, why


def event_line(event: Record) -> str:
    """An event of the log as one line for people."""
    number = event["number"]
    match event["event"]:
        case "gathering":
            return f"photo {number}: gathering photos of the new kind, since photo {event['began']}"
        case "adapting":
            return f"photo {number}: adapting to the photos since {event['began']}, {event['folder']}"
        case "deployed":
            return f"photo {number}: deployed {event['model']}: {event['why']}"
        case "kept":
            return f"photo {number}: kept {event['model']}: {event['why']}"
    return f"photo {number}: rolled back to {event['model']}"
