"""MAITE's object detection protocols: what detguard has for MAITE's tasks, and MAITE's models as detectors.

`maite.tasks.evaluate(model=Model(detector), dataset=Dataset(file, detector.class_names), metric=CocoMetric())`

Images are [3, H, W] RGB, uint8 or floats in 0..1; boxes are [x1, y1, x2, y2] in pixels. The protocols are structural:
nothing of MAITE is imported here.
"""

import hashlib
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from typing_extensions import override

from detguard import DetguardError, defaults
from detguard.data.dataset import read_dataset
from detguard.detections import MAX_DETECTIONS, Candidates, Detections
from detguard.detectors.base import Detector
from detguard.evaluation.attacks import attack_objective, attacked, pgd_options
from detguard.evaluation.coco import metrics_of_photos
from detguard.evaluation.corruptions import PUBLISHED, corrupt
from detguard.evaluation.metrics import STATS
from detguard.evaluation.views import LOWEST_CONFIDENCE
from detguard.photos import Letterbox, Photo, Source, as_photo, photo_seed, read_photo
from detguard.schema import check, one_of, whole

Images = Sequence[ArrayLike]
Batch = tuple[Images, Sequence["Boxes"], Sequence[Mapping[str, object]]]
# A logit of nothing at all, and how near to 0 and 1 a score may be.
NONE, SURE = -30.0, 1e-6


class Boxes(Protocol):
    """Objects of one image, as MAITE's models and data sets give them."""

    @property
    def boxes(self) -> ArrayLike:
        """[N, 4] xyxy, pixels."""

    @property
    def labels(self) -> ArrayLike:
        """[N], class indices."""

    @property
    def scores(self) -> ArrayLike:
        """[N], or of every class, [N, C]."""


@dataclass(frozen=True)
class Target:
    """Objects of one image. boxes: float32 [N, 4] xyxy, pixels; labels: int64 [N]; scores: float32 [N], 1 of labels."""

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]

    @classmethod
    def of(cls, found: Detections) -> "Target":
        """Detections in the form that MAITE's protocols want."""
        return cls(found.boxes.numpy(), found.classes.numpy(), found.scores.numpy())


def detections(target: Boxes) -> Detections:
    """What MAITE calls a target as detections, best first; of scores per class, [N, C], the highest."""
    scores = np.asarray(target.scores, np.float32)
    scores = scores.max(1) if scores.ndim == 2 and len(scores) else scores.reshape(-1)
    boxes = torch.from_numpy(np.array(target.boxes, np.float32).reshape(-1, 4))
    found = Detections(boxes, torch.from_numpy(scores.copy()), torch.from_numpy(np.array(target.labels, np.int64)))
    return found[found.scores.argsort(descending=True, stable=True)]


class Model:
    """A detector as MAITE's model; down to the confidence of .001 that COCO scores.

    Args:
        detector: by `load_detector`.
        conf: confidence over which an object counts as found.
    """

    def __init__(self, detector: Detector, conf: float = LOWEST_CONFIDENCE) -> None:
        self.detector, self.conf = detector, conf
        self.metadata: dict[str, object] = {"id": detector.name, "index2label": dict(detector.class_names)}

    def __call__(self, batch: Images) -> list[Target]:
        """What is found in images."""
        photos = [to_photo(image) for image in batch]
        return [Target.of(found) for found in self.detector.detect(photos, self.conf, multi_label=True)]


class Dataset:
    """A data set that detguard reads as MAITE's, labelled by the class indices of a detector.

    Args:
        source: a data.yaml, a COCO instances json, or a name of one, as of `detguard evaluate`.
        class_names: those of the detector, class index -> name; objects of other classes are left out.
        split: of a data.yaml.
        images: folder of the photos of a json; by default found beside it.
        limit: only the first so many photos.

    Raises:
        DetguardError: the data cannot be read, or have no class in common with the detector.
    """

    def __init__(
        self,
        source: str | Path,
        class_names: dict[int, str],
        *,
        split: str = defaults.Evaluate.split,
        images: Path | None = None,
        limit: int | None = None,
    ) -> None:
        self._dataset = read_dataset(source, split, images, limit)
        self._ids = self._dataset.category_ids(class_names)
        self._images = list(self._dataset.files)
        self.metadata: dict[str, object] = {
            "id": self._dataset.name,
            "index2label": {index: class_names[index] for index in self._ids},
        }

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Photo, Target, dict[str, object]]:
        image = self._images[index]
        file = self._dataset.files[image]
        found = Target.of(self._dataset.objects(image, self._ids))
        return np.ascontiguousarray(read_photo(file).transpose(2, 0, 1)), found, {"id": image, "file_name": file.name}


class CocoMetric:
    """The 12 COCO numbers by hotcoco over all images since `reset`.

    As `detguard evaluate` has them, but that MAITE's targets know no crowds, and no areas other than those of boxes.
    """

    def __init__(self) -> None:
        self.metadata = {"id": "detguard-coco"}
        self.reset()

    def reset(self) -> None:
        """Forget all images that were counted so far."""
        self._found: list[Detections] = []
        self._labelled: list[Detections] = []

    def update(self, preds: Sequence[Boxes], targets: Sequence[Boxes], metadatas: Sequence[object]) -> None:
        """Add a batch: what was found in its images, and what is labelled."""
        self._found += map(detections, preds)
        self._labelled += map(detections, targets)

    def compute(self) -> dict[str, float]:
        """AP, AP50, ... by name; NaN where there is nothing to measure, as of AP where nothing is labelled."""
        stats = metrics_of_photos(self._labelled, self._found, sizes=True).stats
        return {name: float("nan") if (value := stats[name]) is None else value for name in STATS}


class Corruption:
    """One of the 15 corruptions as published, as MAITE's augmentation; the same for the same id of an image.

    Args:
        kind: as fog.
        severity: 1..5.
        seed: of what is random in it.

    Raises:
        DetguardError: there is no such kind or severity.
    """

    def __init__(self, kind: str, severity: int, seed: int = 0) -> None:
        check({"kind": kind, "severity": severity}, {"kind": one_of(*PUBLISHED), "severity": whole(1, 5)})
        self.kind, self.severity, self.seed = kind, severity, seed
        self.metadata = {"id": f"{kind}-{severity}"}

    def __call__(self, batch: Batch) -> Batch:
        """The batch with its images corrupted."""
        images, targets, metadatas = batch
        seeds = [photo_seed(f"{one['id']}/{self.metadata['id']}", self.seed) % 2**32 for one in metadatas]
        changed = [
            like(corrupt(to_photo(image), self.kind, self.severity, seed), image)
            for image, seed in zip(images, seeds, strict=True)
        ]
        return changed, targets, metadatas


class Attack:
    """A white-box attack on the objects that are labelled, as MAITE's augmentation: 8-bit images within the budget.

    Args:
        detector: what is attacked, and whose class indices label the images.
        eps: largest change of a pixel value, 1..255 whole levels of 255.
        steps: of PGD, at least 1.
        attack: class, box or all of the training loss, vanish or rank, as of `detguard evaluate --attacks`.
        seed: of what is random.

    Raises:
        DetguardError: no such attack, `eps` or `steps`, or the detector has no gradient.
    """

    def __init__(self, detector: Detector, eps: int = 4, steps: int = 20, attack: str = "all", seed: int = 0) -> None:
        if not detector.differentiable:
            raise DetguardError(f"{detector.name}: has no gradient; a white-box attack needs one")
        check({"eps": eps, "steps": steps}, {"eps": whole(1, 255), "steps": whole(1)})
        self.detector, self.eps, self.steps, self.seed = detector, eps, steps, seed
        self.objective = attack_objective(attack, sorted(detector.class_names), detector)
        self.metadata = {"id": f"{attack}-eps{eps}-steps{steps}-on-{detector.name}"}

    def __call__(self, batch: Batch) -> Batch:
        """The batch with its images attacked."""
        images, targets, metadatas = batch
        keys = [f"{number}/{one['id']}" for number, one in enumerate(metadatas)]
        given = zip(keys, map(to_photo, images), map(detections, targets), strict=True)
        options = pgd_options(self.eps, self.steps, len(keys), self.seed)
        done = attacked(self.detector, given, self.objective, options)
        return [like(photo, image) for photo, image in zip(done, images, strict=True)], targets, metadatas


class MaiteDetector(Detector):
    """A model of MAITE as a detector, which only predicts: it is judged, and attacked by its scores alone.

    Args:
        model: with `metadata["index2label"]`; is given images of their own size, uint8 [3, H, W] RGB.
        imgsz: longest side of its frames, px, which is only shown.

    Raises:
        DetguardError: the model does not say its classes.
    """

    differentiable = False
    end_to_end = True

    def __init__(self, model: Callable[[Images], Iterable[Boxes]], imgsz: int = 640) -> None:
        metadata = getattr(model, "metadata", {})
        if not (names := metadata.get("index2label")):
            raise DetguardError(f"{type(model).__name__}: its metadata has no index2label; expected MAITE's model")
        self.name, self.class_names = str(metadata["id"]), {int(k): str(v) for k, v in names.items()}
        self.imgsz, self.device, self.model = imgsz, torch.device("cpu"), nn.Module()
        self._maite = model
        self._state = hashlib.sha256(uuid.uuid4().bytes).hexdigest()

    @override
    def state_hash(self) -> str:
        """One of its own: weights that cannot be seen may change, so nothing of it is found in a cache later."""
        return self._state

    @override
    def letterbox(self, photo_shape: tuple[int, int]) -> Letterbox:
        return Letterbox.whole(photo_shape)

    @override
    def candidates(self, frames: Tensor) -> Candidates:
        images = (frames * 255).round().to(torch.uint8).cpu().numpy()
        found = [detections(one)[:MAX_DETECTIONS] for one in self._maite(list(images))]
        if len(found) != len(images):
            raise DetguardError(f"{self.name}: answers for {len(found)} of {len(images)} images; expected one for each")
        if undeclared := {int(label) for one in found for label in one.classes} - set(self.class_names):
            labels = ", ".join(map(str, sorted(undeclared)))
            raise DetguardError(f"{self.name}: finds labels that its index2label does not name: {labels}")
        # As many for every image, whatever its neighbours in the batch are.
        logits = torch.full((len(found), MAX_DETECTIONS, max(self.class_names) + 1), NONE)
        boxes = torch.zeros(len(found), MAX_DETECTIONS, 4)
        for i, one in enumerate(found):
            logits[i, torch.arange(len(one)), one.classes] = one.scores.clamp(SURE, 1 - SURE).logit()
            boxes[i, : len(one)] = one.boxes
        return Candidates(logits, boxes, end_to_end=True)

    @override
    def predict(self, source: Source, conf: float, iou: float | None = None) -> Detections:
        return self.detect([source], conf)[0]


def to_photo(image: ArrayLike) -> Photo:
    """An image, [3, H, W] RGB of uint8 or floats in 0..1, as `uint8 [H, W, 3]`."""
    return as_photo(torch.as_tensor(np.ascontiguousarray(image)))  # of one that is turned round, torch takes no view


def like(photo: Photo, image: ArrayLike) -> NDArray[np.generic]:
    """A photo, `uint8 [H, W, 3]`, as an image of the type of another: uint8, or floats in 0..1."""
    changed, kind = np.ascontiguousarray(photo.transpose(2, 0, 1)), np.asarray(image).dtype
    return (changed / 255).astype(kind) if kind.kind == "f" else changed
