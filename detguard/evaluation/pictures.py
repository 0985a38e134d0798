"""Pictures that were learned on other photos as views, a patch or a universal perturbation, and beside each those that
mean nothing.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from typing_extensions import override

from detguard import DetguardError
from detguard.attacks.patch import Patch
from detguard.attacks.pictures import Picture
from detguard.attacks.universal import LARGEST, NOTHING, Universal, largest_change
from detguard.evaluation.views import Batch, Subject, View
from detguard.photos import Photo, photo_seed, read_photo

GREY, RANDOM = "grey", "random"
PATCH, UNIVERSAL = Patch.kind, Universal.kind
GREY_LEVEL = 128
# Squares along a side of the random patch: noise of single pixels would be grey once it is shown smaller.
SQUARES = 16


@dataclass(frozen=True)
class Changed(View):
    """The photos changed by a picture at the resolution of the file, as 8-bit photos.

    label: of this picture, such as grey; how: what the picture does; targets: the detector's classes that are attacked,
    none: whatever there is; digest: of the picture, `uint8 [S, S, 3]`.
    """

    label: str
    how: Picture
    targets: tuple[int, ...]
    digest: str
    picture: Photo = field(compare=False, repr=False)

    @property
    @override
    def name(self) -> str:
        return self.label if self.label == self.how.kind else f"{self.label} {self.how.kind}"

    @override
    def spec(self) -> object:
        return [type(self).__name__, self.how.kind, asdict(self.how), self.label, self.targets, self.digest]  # type: ignore[call-overload]

    @override
    def depends_on(self, subject: Subject, image: int) -> object:
        return [subject.labels[image], sorted(subject.category_ids)] if self.targets else None

    @override
    def show(self, batch: Batch) -> list[Photo]:
        return [
            self.how.on_photo(photo, self.picture, objects.of(self.targets).boxes)
            for photo, objects in zip(batch.photos, batch.objects, strict=True)
        ]


def patched(file: str, target: int, size: float, seed: int) -> list[Changed]:
    """The views of a patch: grey, random by `seed`, and the patch of a file.

    Raises:
        DetguardError: the file cannot be read, or is not square.
    """
    patch = _read_square("`patch`", file)
    places = np.arange(len(patch)) * SQUARES // len(patch)
    noise = _random(seed).integers(0, 256, (SQUARES, SQUARES, 3), dtype=np.uint8)[places][:, places]
    images = {GREY: np.full_like(patch, GREY_LEVEL), RANDOM: noise, PATCH: patch}
    return _views(Patch(size, len(patch)), (target,), images)


def perturbed(file: str, seed: int) -> list[Changed]:
    """The views of a universal perturbation: random signs by `seed` at its budget, and that of a file.

    Raises:
        DetguardError: the file cannot be read, is not square, or changes nothing or too much.
    """
    perturbation = _read_square("`universal`", file)
    eps = largest_change(perturbation)
    if not 1 <= eps <= LARGEST:
        why = f"changes by up to {eps} levels" if eps else "changes nothing"
        raise DetguardError(f"`universal` {file}: {why}; expected one that detguard universal has made")
    signs = NOTHING + eps * _random(seed).choice(np.array([-1, 1]), perturbation.shape)
    images = {RANDOM: signs.astype(np.uint8), UNIVERSAL: perturbation}
    return _views(Universal(eps, len(perturbation)), (), images)


def _views(how: Picture, targets: tuple[int, ...], images: dict[str, Photo]) -> list[Changed]:
    return [
        Changed(label, how, targets, hashlib.sha256(image.tobytes()).hexdigest(), image)
        for label, image in images.items()
    ]


def _random(seed: int) -> np.random.Generator:
    return np.random.default_rng(photo_seed(RANDOM, seed))


def _read_square(option: str, file: str) -> Photo:
    picture = read_photo(file)
    height, width = picture.shape[:2]
    if height != width:
        raise DetguardError(f"{option} {file}: {width} x {height} px; expected a square, as detguard makes it")
    return picture


def check_pictures(subject: Subject, views: Sequence[Changed]) -> None:
    """See that the views of a patch have a class to be shown on.

    Raises:
        DetguardError: the data have no such class, or it is not evaluated.
    """
    for target in {target for view in views for target in view.targets} - subject.category_ids.keys():
        known = ", ".join(subject.detector.class_names[index] for index in sorted(subject.category_ids))
        name = subject.detector.class_names[target]
        raise DetguardError(f"`patch_target` {name}: not evaluated on {subject.dataset.name}; it has: {known}")
