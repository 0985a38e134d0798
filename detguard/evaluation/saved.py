"""What an evaluation showed to its detectors, as data sets that others read."""

from collections.abc import Callable
from contextlib import closing, nullcontext

from detguard.data.writing import LIST, DatasetWriter
from detguard.evaluation.views import Altered, Batch, Clean, Corrupted, Makers, Subject, View
from detguard.files import is_file
from detguard.photos import encode_png
from detguard.runs import Run, photo_keys

FOLDER = "datasets"


def save_view(subject: Subject, view: View, run: Run) -> str:
    """Write the images of a view and the labels of their photos as a data set of the run; returns its folder.

    Images are PNGs, to the bit what the detector was shown; labels are those of the data set, boxes unchanged. A data
    set that is there already is left as it is: its list is written last.
    """
    name = view.name.replace(" ", "-")
    folder = f"{FOLDER}/{name}" if isinstance(view, Corrupted) else f"{FOLDER}/{subject.name}-{name}"
    dataset = subject.dataset
    made = DatasetWriter(lambda file, data: run.write(f"{folder}/{file}", data), dataset.categories)
    if is_file(run.path(f"{folder}/{LIST}")):
        return folder
    names = dict(zip(dataset.files, photo_keys(list(dataset.files.values())), strict=True))
    wanted = [(view, image) for images in subject.batches() for image in images if isinstance(view, Altered)]
    with closing(makers) if (makers := Makers.of(subject, wanted)) else nullcontext():
        for images in subject.batches():
            batch = Batch(subject, images, makers)
            if not makers:  # which read photos themselves
                batch.drop_unreadable()
            shown = view.show(batch)  # which may take some out of it
            for image, photo in zip(batch.images, shown, strict=True):
                objects = dataset.annotations.imgToAnns.get(image, [])
                size = photo.shape[1], photo.shape[0]
                made.add(f"{names[image]}.png", encode_png(photo), size, objects, image)
    made.close()
    return folder


def save_views(
    subject: Subject, views: list[View], run: Run, on_view: Callable[[str], object] | None = None
) -> list[str]:
    """Write all views but the clean one as data sets of the run; returns their folders."""
    folders = []
    for view in views:
        if not isinstance(view, Clean):
            if on_view:
                on_view(f"{subject.name}: saving {view.name}")
            folders.append(save_view(subject, view, run))
    return folders
