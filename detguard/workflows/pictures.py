"""Learn one picture for many photos, from Python: a patch, or a universal perturbation."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from detguard import DetguardError, defaults
from detguard.attacks.patch import Patch, printable_png
from detguard.attacks.pictures import Learning, Picture, Stage, learn_picture, stages
from detguard.attacks.universal import Universal
from detguard.classes import parse_names
from detguard.data.sources import OnData, Sources, listed, read_labelled, unlabelled, warn_of
from detguard.detections import Detections
from detguard.detectors.base import Detector
from detguard.detectors.load import detector_config, load_configured
from detguard.objectives import Vanish
from detguard.objectives.base import Objective
from detguard.photos import Photo, encode_png, find_photos
from detguard.runs import Record, Run
from detguard.schema import CONFIGS, Config, check, partly
from detguard.workflows.keywords import as_detector, only_resumes, refuse_unknown

KINDS: dict[str, type[Patch] | type[Universal]] = {kind.kind: kind for kind in (Patch, Universal)}
# Called with the share that is done, 0..1, and the mean loss since the last time where there is one; True stops.
OnPicture = Callable[[float, float | None], object]


@dataclass(frozen=True)
class Learned:
    """A picture that was learned.

    Attributes:
        picture: the picture as it is saved, `uint8 [S, S, 3]` RGB.
        file: its PNG, which `detguard evaluate --patch` or `--universal` judges on other photos.
        folder: of the run.
    """

    picture: Photo
    file: Path
    folder: Path


@dataclass
class PictureJob:
    """A run of `patch` or `universal`: the detector and the photos that the picture learns on."""

    run: Run
    detector: Detector
    objective: Objective
    photos: list[Stage]
    kind: Picture
    learning: Learning

    @classmethod
    def begin(
        cls, kind: Picture, detector: Detector, data: Sequence[str], learning: Learning, *, target: str,
        split: str = defaults.Picture.split, class_map: Mapping[str, str] | None = None, out: Path | None = None,
        exist_ok: bool = False, arguments: Sequence[str] = (), on_data: OnData = warn_of, **kept: Any,
    ) -> "PictureJob":  # fmt: skip
        """A new run. target: classes that are to vanish, comma-separated, or all; kept: more that its config says.

        exist_ok: as of `Run.create`.

        Raises:
            DetguardError: an option is wrong, or no photo shows such an object; no run is left behind.
        """
        if not data:
            raise DetguardError("`data`: give photos, a data.yaml or a COCO instances json (or `resume`)")
        config: Config = {
            "target": target, **kept, "detector": detector_config(detector, detector.source), "data": list(data),
            "split": split, "class_map": dict(class_map or {}), "picture": dict(vars(kind)),
            "learning": asdict(learning), "arguments": list(arguments),
        }  # fmt: skip
        config = check(config, partly(CONFIGS[kind.kind]))
        objective, photos, config["shown"] = _attacked_photos(detector, config, on_data)
        run = Run.create(kind.kind, out, config, exist_ok=exist_ok)
        return cls(run, detector, objective, photos, kind, learning)

    @classmethod
    def resume(
        cls,
        folder: Path,
        command: str,
        device: str = defaults.DEVICE,
        on_data: OnData = warn_of,
        *,
        trust: bool = False,
    ) -> "PictureJob":
        """A run to go on with. command: `patch` or `universal`.

        Raises:
            DetguardError: there is none, or its detector or its photos are no longer what they were.
        """
        run = Run.resume(folder, command)
        detector = load_configured(run.config["detector"], device, trust=trust)
        kind, learning = KINDS[command](**run.config["picture"]), Learning(**run.config["learning"])
        objective, photos, shown = _attacked_photos(detector, run.config, on_data)
        if run.config.get("shown", shown) != shown:
            raise DetguardError(f"{folder}: its photos or their labels have changed; restore them, or begin a new run")
        return cls(run, detector, objective, photos, kind, learning)

    def learn(self, on_step: OnPicture | None = None) -> Learned:
        """Learn the picture to its end, or until `on_step` returns True; what is learned is saved either way."""
        name, run = self.kind.kind, self.run
        # A kill may come between a record and the checkpoint: what is learned anew is recorded once.
        known = max((record["batch"] for record in run.records()), default=0)

        def on_batch(done: float, record: Record | None) -> bool:
            if record and record["batch"] > known:
                run.append({"stage": name, **record})
            stop = bool(on_step and on_step(done, record["loss"] if record else None))
            run.must_be_there()  # what comes next may be a checkpoint
            return stop

        state = run.path(f"state/{name}.pt")
        made = learn_picture(self.detector, self.photos, self.objective, self.kind, self.learning, on_batch, state)
        printed = run.config.get("print_cm")
        run.write(f"{name}.png", printable_png(made, printed) if printed else encode_png(made))
        return Learned(made, run.path(f"{name}.png"), run.folder)


def _digest(photos: Sequence[tuple[Path, Detections | None]]) -> str:
    """Of what is learned on: the photos by their names, in order, and their labels."""
    digest = hashlib.sha256()
    for file, objects in photos:
        labels = None if objects is None else [objects.boxes.tolist(), objects.classes.tolist()]
        digest.update(json.dumps([str(file), labels]).encode())
    return digest.hexdigest()


def _attacked_photos(detector: Detector, config: Config, on_data: OnData) -> tuple[Objective, list[Stage], str]:
    """What is to vanish, the photos of all sources that have some, by their labels or else by what is found, and
    `_digest` of all.
    """
    bare = all(map(unlabelled, config["data"]))
    if bare and config["class_map"]:
        raise DetguardError("`class_map`: renames classes of labels, and `data` has none")
    if bare and config["split"] != defaults.Picture.split:
        raise DetguardError(f"`split` {config['split']}: is of a data.yaml, and `data` has no splits")
    objective = Vanish(parse_names(config["target"])).on(detector)
    photos, names = list[tuple[Path, Detections | None]](), detector.class_names
    for source in config["data"]:
        if unlabelled(source):
            photos += [(file, None) for file in find_photos([source])]
        else:
            labelled = read_labelled(source, config["split"], names, on_data, class_map=config["class_map"])
            photos += [(one.file, one.objects) for one in labelled]
    return objective, stages(detector, photos, objective, config["learning"]["conf"]), _digest(photos)


def patch(
    detector: Detector | None = None,
    data: Sources | None = None,
    *,
    target: str = "person",
    size: float = defaults.Picture.size,
    pixels: int = defaults.Picture.pixels,
    print_cm: float = defaults.Picture.print_cm,
    split: str = defaults.Picture.split,
    class_map: Mapping[str, str] | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    device: str = defaults.DEVICE,
    trust: bool = False,
    on_step: OnPicture | None = None,
    **learning: Any,
) -> Learned:
    """Learn one square patch that hides the objects that wear it, as `detguard patch` does.

    Args:
        detector: what is attacked, by `load_detector`; it needs a gradient.
        data: folders or patterns of photos, on which the detector says where targets are, or data.yaml or COCO json
            files, whose labels say it.
        target: classes that wear the patch and are to vanish, comma-separated.
        size: side of the patch, a share of the root of the area of an object's box.
        pixels: side of the PNG, px, 8..4096.
        print_cm: side when it is printed, cm.
        split: which split of a data.yaml.
        class_map: names of classes in the data -> the detector's, as {"pedestrian": "person"}.
        out: folder of the run; by default the next of runs/patch/.
        resume: a run's folder, to go on with, instead of all above and of `learning`.
        device: with `resume`, what its detector runs on, as of `load_detector`.
        trust: with `resume`, of its detector, as of `load_detector`.
        on_step: called with the share that is done, 0..1, and every ten steps with the mean loss since (else None);
            returns True to save and stop.
        **learning: the fields of `Learning`: `photos`, `hours`, `rate`, `batch`, `conf` (by default the detector's own)
            and `seed`.

    Raises:
        DetguardError: an option is wrong, a photo cannot be read, none shows a target, or the detector has no gradient.
        TypeError: `learning` holds no such field.

    Examples:
        >>> import detguard
        >>> detector = detguard.load_detector("detguard-n")
        >>> made = detguard.patch(detector, "photos/", target="person", photos=2000)  # doctest: +SKIP
        >>> made.picture.shape, made.file  # doctest: +SKIP
    """
    return _made(patch, locals(), lambda _: Patch(size, pixels), print_cm=print_cm)


def universal(
    detector: Detector | None = None,
    data: Sources | None = None,
    *,
    target: str = "all",
    eps: int = defaults.Picture.eps,
    split: str = defaults.Picture.split,
    class_map: Mapping[str, str] | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    device: str = defaults.DEVICE,
    trust: bool = False,
    on_step: OnPicture | None = None,
    **learning: Any,
) -> Learned:
    """Learn one perturbation that hides objects when it is added to whatever photo, as `detguard universal` does.

    Args:
        detector: what is attacked, by `load_detector`; it needs a gradient.
        data: as of `patch`.
        target: classes that are to vanish, comma-separated, or all.
        eps: most that a value changes by, whole levels of 255, 1..127, as 128 + the change must fit a PNG.
        split: which split of a data.yaml.
        class_map: as of `patch`.
        out: folder of the run; by default the next of runs/universal/.
        resume: as of `patch`.
        device: as of `patch`.
        trust: as of `patch`.
        on_step: as of `patch`.
        **learning: as of `patch`.

    Raises:
        DetguardError: an option is wrong, a photo cannot be read, none shows a target, or the detector has no gradient.
        TypeError: `learning` holds no such field.

    Examples:
        >>> import detguard
        >>> detector = detguard.load_detector("detguard-n")
        >>> made = detguard.universal(detector, "photos/", eps=8, photos=2000)  # doctest: +SKIP
    """
    return _made(universal, locals(), lambda attacked: Universal.of(eps, attacked.imgsz))


def _made(function: Callable[..., Learned], given: Config, kind: Callable[[Detector], Picture], **kept: Any) -> Learned:
    """What `patch` or `universal` learns by its arguments, as of `locals()`; kept: more that a new run keeps."""
    name, device, trust, learning = function.__name__, given["device"], given["trust"], given["learning"]
    refuse_unknown(name, learning, Learning.__dataclass_fields__)
    if given["resume"] is not None:
        only_resumes(function, given)
        return PictureJob.resume(Path(given["resume"]), name, device, trust=trust).learn(given["on_step"])
    if device != defaults.DEVICE or trust:
        raise DetguardError("`device` and `trust`: go with `resume`; else say them to `load_detector`")
    detector = as_detector(given["detector"])
    if {"photos", "hours"} <= learning.keys():
        raise DetguardError("`hours`: instead of `photos`; leave one of them out")
    begun = PictureJob.begin(
        kind(detector), detector, listed(given["data"]), Learning(**{"conf": detector.conf, **learning}),
        target=given["target"], split=given["split"], class_map=given["class_map"],
        out=None if given["out"] is None else Path(given["out"]), **kept,
    )  # fmt: skip
    return begun.learn(given["on_step"])
