"""The report of a run: one HTML file with everything in it, which opens from disk and asks the network for nothing."""

import base64
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from detguard import __version__
from detguard.detections import Found
from detguard.files import printable
from detguard.overlay import DIFFERENCE_GAIN, class_colour, difference
from detguard.photos import Photo, encode_jpeg, largest_difference
from detguard.reports.tables import Table

# A page of this many photos is some megabytes; more would make browsers slow.
MOST_PHOTOS = 40
# What is said of boxes that nobody found, by their kind.
WITHOUT_CONFIDENCE = {"missed": " missed", "labelled": ""}
LONGEST_SIDE = 560
QUALITY = 85
# Of a difference, which is noise: as much as all else on the page otherwise.
DIFFERENCE_SIDE, DIFFERENCE_QUALITY = 420, 60


@dataclass(frozen=True)
class Box:
    """One detection for the page: in per mille of the photo's width and height.

    kind: found, missed or false, where that is known and colours the box; else its class does, as of what is labelled.
    """

    left: float
    top: float
    width: float
    height: float
    label: str
    colour: str
    kind: str


@dataclass(frozen=True)
class Panel:
    """One picture with its boxes; file: of the run's folder, shown instead where it is there and a reader zooms."""

    caption: str
    image: str
    ratio: float
    boxes: list[Box] = field(default_factory=list)
    file: str = ""


@dataclass(frozen=True)
class Pair:
    """A photo before and after, beside each other or under a slider; name: of the detector, where there are several."""

    before: Panel
    after: Panel
    difference: Panel | None = None
    name: str = ""


@dataclass(frozen=True)
class Item:
    """One photo of the gallery; outcome: what its filter is called; note: one line below it; copies: what transforms
    made of it; files: of the run's folder, by what they are called.
    """

    title: str
    outcome: str
    note: str
    pairs: list[Pair]
    copies: list[Panel] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Files or folders by their last parts, as many as tell them apart."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in paths]


def panel(caption: str, photo: Photo, found: Sequence[Found] = (), file: str = "") -> Panel:
    """A photo and what was found in it, as `Detections.records` gives it.

    A record may tell its `kind` as well, see `Box`.
    """
    height, width = photo.shape[:2]
    image = _data_url(photo, LONGEST_SIDE, QUALITY, cv2.INTER_AREA)
    return Panel(caption, image, width / height, _boxes(found, width, height), linked(file))


def pair(before: Panel, after: Panel, photos: tuple[Photo, Photo] | None = None, name: str = "") -> Pair:
    """Two panels of one shape; photos: theirs, where they differ and the difference is to be shown."""
    if photos is None:
        return Pair(before, after, None, name)
    # Not averaged over neighbours, which would make noise look smaller than it is.
    image = _data_url(difference(*photos), DIFFERENCE_SIDE, DIFFERENCE_QUALITY, cv2.INTER_NEAREST)
    caption = f"difference x {DIFFERENCE_GAIN}, at most {largest_difference(*photos)} of 255"
    return Pair(before, after, Panel(caption, image, before.ratio), name)


def linked(file: str) -> str:
    """A path in the run's folder as a link of the page, which leads to no other host."""
    try:
        return "./" + quote(file, errors="surrogateescape") if file else ""
    except UnicodeEncodeError:  # of a lone surrogate that no file system has
        return "./" + quote(file, errors="backslashreplace")


def render_page(
    title: str,
    verdict: str,
    subtitle: str,
    command: Sequence[str],
    tables: Sequence[Table],
    plots: dict[str, str],
    items: Iterable[Item] = (),
    left_out: int = 0,
    gallery: str = "",
) -> bytes:
    """The page as UTF-8 bytes.

    verdict: what came out, in one sentence; plots: title -> SVG; left_out: photos not shown; gallery: what a reader
    must know of the photos.
    """
    items = list(items)
    environment = Environment(
        loader=PackageLoader("detguard", "reports"), autoescape=True, trim_blocks=True, finalize=_shown
    )
    kinds = {box.kind for item in items for pair in item.pairs for box in pair.before.boxes + pair.after.boxes}
    return (
        environment.get_template("report.html.j2")
        .render(
            title=title,
            verdict=verdict,
            subtitle=subtitle,
            command=shlex.join(command),
            tables=[table.filled for table in tables],
            plots=plots,
            items=items,
            outcomes=Counter(item.outcome for item in items),
            kinds=[kind for kind in ("found", "missed", "false") if kind in kinds],
            left_out=left_out,
            gallery=gallery,
            version=__version__,
        )
        .encode(errors="backslashreplace")  # of file names that are not UTF-8
    )


def _shown(value: object) -> object:
    """Text as it is, with nothing in it that a browser would obey, as a change of direction."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _boxes(records: Sequence[Found], width: int, height: int) -> list[Box]:
    boxes = []
    for record in records:
        x1, y1, x2, y2 = record["box"]
        kind = record.get("kind", "")
        boxes.append(
            Box(
                round(1000 * x1 / width, 1),
                round(1000 * y1 / height, 1),
                round(1000 * (x2 - x1) / width, 1),
                round(1000 * (y2 - y1) / height, 1),
                record["class"] + WITHOUT_CONFIDENCE.get(kind, f" {record['confidence']:.2f}"),
                "rgb({} {} {})".format(*class_colour(record["class"])),
                kind,
            )
        )
    return boxes


def _data_url(photo: Photo, side: int, quality: int, interpolation: int) -> str:
    scale = side / max(photo.shape[:2])
    if scale < 1:
        height, width = (max(1, round(length * scale)) for length in photo.shape[:2])
        photo = cv2.resize(photo, (width, height), interpolation=interpolation).astype(np.uint8, copy=False)
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(photo, quality)).decode()
