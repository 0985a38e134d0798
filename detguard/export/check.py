"""Whether an exported file finds what the detector finds, and how fast each is."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor
from ultralytics.utils import ASSETS
from ultralytics.utils.ops import xywh2xyxy

from detguard.detections import Candidates, suppress
from detguard.detectors.base import Detector
from detguard.export.base import Deployment, Runtime
from detguard.photos import PADDING_LEVEL, Photo, frames_tensor, read_photo

# How far scores and boxes, px, may be from detguard's own.
SCORES, BOXES = 1e-3, 0.5
# Over which a candidate's box counts, as in evaluation: nobody is shown those of others.
SEEN = 0.001
PHOTOS = 8


@dataclass
class Verdict:
    """What the check saw.

    scores, boxes: the largest differences, probability and frame pixels; infinite where one finds what the other does
    not. compared: how many candidates or detections had a box to compare. milliseconds: per photo, by what ran it.
    """

    scores: float = 0.0
    boxes: float = 0.0
    compared: int = 0
    milliseconds: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether both are small, and something was compared."""
        return self.compared > 0 and self.scores <= SCORES and self.boxes <= BOXES

    def record(self) -> dict[str, object]:
        """What it saw, as JSON has it: null for what is infinite."""
        return {name: None if value == torch.inf else value for name, value in vars(self).items()}

    def add(self, scores: Tensor, boxes: Tensor, *, counted: bool = True) -> None:
        """Note differences of scores, of any shape, and of boxes, [n, 4], of a frame; counted: as more of them."""
        self.scores = max(
            self.scores, scores.abs().amax().nan_to_num(torch.inf, torch.inf).item() if scores.numel() else 0.0
        )
        self.boxes = max(
            self.boxes, boxes.abs().amax().nan_to_num(torch.inf, torch.inf).item() if boxes.numel() else 0.0
        )
        self.compared += counted * len(boxes)


def default_photos() -> list[Photo]:
    """The two photos that come with Ultralytics, mirrored and cropped: eight."""
    photos = []
    for name in ("bus", "zidane"):
        photo = read_photo(ASSETS / f"{name}.jpg")
        height, width = photo.shape[:2]
        photos += [photo, photo[:, ::-1], photo[: height * 2 // 3], photo[:, width // 3 :]]
    return [np.ascontiguousarray(photo) for photo in photos]


def frames_of(detector: Detector, photos: Sequence[Photo], *, square: bool) -> list[Tensor]:
    """The frame of each photo, float32 [1, 3, H, W]; `square`: padded to the size of a static graph."""
    frames = []
    for photo in photos:
        frame = detector.letterbox(photo.shape[:2])(photo)
        if square:
            height, width = (detector.imgsz - side for side in frame.shape[:2])
            frame = np.pad(frame, ((0, height), (0, width), (0, 0)), constant_values=PADDING_LEVEL)
        frames.append(frames_tensor([frame]))
    return frames


def check(wanted: Deployment, run: Runtime) -> Verdict:
    """Compare a file that was read back with the detector that it was written from, on the frames of `wanted`."""
    detector = wanted.detector
    verdict = Verdict()
    compare = compare_listed if wanted.graph.listed else compare_candidates
    with torch.no_grad():
        for frames in wanted.frames:
            compare(run(frames), detector.candidates(frames), wanted, verdict)
        beside = {"detguard": detector}
        if detector.experts:
            beside[f"{detector.experts[0]} expert alone"] = detector.variants()["route:0"]
        ways: dict[str, Callable[[Tensor], object]] = {"the file": run}
        ways |= {name: partial(_whole, one, wanted) if wanted.nms else one.candidates for name, one in beside.items()}
        verdict.milliseconds = {name: milliseconds(way, wanted.frames) for name, way in ways.items()}
    return verdict


def _whole(detector: Detector, wanted: Deployment, frames: Tensor) -> object:
    """What a detector finds in frames, by the NMS that the file has inside."""
    return suppress(detector.candidates(frames), wanted.conf, wanted.iou)


def compare_candidates(found: Tensor, ours: Candidates, wanted: Deployment, verdict: Verdict) -> None:
    """Compare all candidates of one frame, [1, 4 + C, N]."""
    scores, theirs = ours.logits.sigmoid(), found.transpose(1, 2)
    if theirs.shape[1:] != (scores.shape[1], scores.shape[2] + 4):
        verdict.scores = verdict.boxes = torch.inf
        return
    seen = scores.amax(2) > SEEN
    verdict.add(theirs[..., 4:] - scores, (xywh2xyxy(theirs[..., :4]) - ours.boxes)[seen])


def compare_listed(found: Tensor, ours: Candidates, wanted: Deployment, verdict: Verdict) -> None:
    """Compare the detections of one frame, [1, 300, 6]; those that hardly are over the confidence, one may lack."""
    (known,) = suppress(ours, wanted.conf, wanted.iou)
    rows = found[0][found[0, :, 4] > wanted.conf]
    listed = torch.cat([known.boxes, known.scores[:, None], known.classes[:, None].float()], 1)
    for some, others in ((listed, rows), (rows, listed)):
        sure = some[some[:, 4] > wanted.conf + SCORES]
        if not len(sure):
            continue
        if not len(others):
            verdict.scores = verdict.boxes = torch.inf
            return
        # By box, score and class at once, as two of a kind may share a place.
        gap = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e3, 1e6])
        nearest = others[((sure[:, None] - others).abs() * gap).sum(2).argmin(1)]
        other_class = sure[:, 5] != nearest[:, 5]
        scores = (sure[:, 4] - nearest[:, 4]).masked_fill(other_class, torch.inf)
        verdict.add(scores, sure[:, :4] - nearest[:, :4], counted=some is listed)


def milliseconds(run: Callable[[Tensor], object], frames: Sequence[Tensor]) -> float:
    """The median time of a frame, each after it was run once before."""
    spent = []
    for batch in frames:
        run(batch)
        began = time.perf_counter()
        run(batch)
        spent.append(time.perf_counter() - began)
    return 1e3 * median(spent)
