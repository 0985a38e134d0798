"""A patch as a view: on every labelled object of a class, and beside it patches that mean nothing."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from typing_extensions import override

from detguard import DetguardError
from detguard.evaluation.views import Batch, Subject, View
from detguard.photos import Photo, photo_seed, read_photo
from detguard.transforms.paste import paste_on_photo

GREY, RANDOM, PATCH = "grey", "random", "patch"
GREY_LEVEL = 128
# Squares along a side of the random patch: noise of single pixels would be grey once it is shown smaller.
SQUARES = 16


@dataclass(frozen=True)
class Patched(View):
    """The photos with a patch on each labelled object of a class, at the resolution of the file, as 8-bit photos.

    kind: grey and random cover as much of an object as the patch, and tell what covering alone does; target: the
    detector's class index; size: side, as a share of the root of the area of an object's box; digest: of the patch,
    `uint8 [S, S, 3]`.
    """

    kind: str
    target: int
    size: float
    digest: str
    patch: Photo = field(compare=False, repr=False)

    @property
    @override
    def name(self) -> str:
        return self.kind if self.kind == PATCH else f"{self.kind} patch"

    @override
    def spec(self) -> object:
        return [type(self).__name__, self.kind, self.target, self.size, self.digest]

    @override
    def depends_on(self, subject: Subject, image: int) -> object:
        return [subject.labels[image], sorted(subject.category_ids)]

    @override
    def show(self, batch: Batch) -> list[Photo]:
        return [
            paste_on_photo(photo, self.patch, objects.of([self.target]).boxes, self.size)
            for photo, objects in zip(batch.photos, batch.objects, strict=True)
        ]


def patched(file: str, target: int, size: float, seed: int) -> list[Patched]:
    """The views of a patch: grey, random by `seed`, and the patch of a file.

    Raises:
        DetguardError: the file cannot be read, or is not square.
    """
    patch = read_photo(file)
    side = len(patch)
    if side != patch.shape[1]:
        raise DetguardError(f"`patch` {file}: {patch.shape[1]} x {side} px; expected a square, as detguard patch makes")
    rng = np.random.default_rng(photo_seed(RANDOM, seed))
    places = np.arange(side) * SQUARES // side
    noise = rng.integers(0, 256, (SQUARES, SQUARES, 3), dtype=np.uint8)[places][:, places]
    images = {GREY: np.full_like(patch, GREY_LEVEL), RANDOM: noise, PATCH: patch}
    return [
        Patched(kind, target, size, hashlib.sha256(image.tobytes()).hexdigest(), image)
        for kind, image in images.items()
    ]


def check_patch(subject: Subject, views: Sequence[Patched]) -> None:
    """See that the views of a patch have a class to be shown on.

    Raises:
        DetguardError: the data have no such class, or it is not evaluated.
    """
    for view in views:
        if view.target not in subject.category_ids:
            known = ", ".join(subject.detector.class_names[index] for index in sorted(subject.category_ids))
            name = subject.detector.class_names[view.target]
            raise DetguardError(f"`patch_target` {name}: not evaluated on {subject.dataset.name}; it has: {known}")
