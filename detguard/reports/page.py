"""The report of a run: one HTML file with everything in it, which opens from disk and asks the network for nothing."""

import base64
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from detguard import __version__
from detguard.files import printable
from detguard.photos import Photo, encode_jpeg

# A page of this many photos is some megabytes; more would make browsers slow.
MOST_PHOTOS = 40
LONGEST_SIDE = 560
QUALITY = 85


@dataclass(frozen=True)
class Box:
    """One detection for the page: in per mille of the photo's width and height."""

    left: float
    top: float
    width: float
    height: float
    label: str
    hue: int


@dataclass(frozen=True)
class Item:
    """One photo of the gallery, before and after; outcome: what its filter is called; note: one line below it."""

    title: str
    outcome: str
    note: str
    before: str
    after: str
    ratio: float
    boxes_before: list[Box]
    boxes_after: list[Box]


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names the row. note: what a reader must know to read it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers only and stand to the right."""
        columns = zip(*self.rows, strict=True)
        return [all(re.fullmatch(r"[-+]?[\d.]*( ±[\d.]+)?", cell) for cell in column) for column in columns] or [
            False
        ] * len(self.head)


def gallery_item(
    title: str,
    outcome: str,
    note: str,
    before: Photo,
    found_before: Sequence[dict[str, Any]],
    after: Photo,
    found_after: Sequence[dict[str, Any]],
) -> Item:
    """An item from two photos of one shape and their detections as `Detections.records` gives them."""
    height, width = before.shape[:2]
    return Item(
        title,
        outcome,
        note,
        _data_url(before),
        _data_url(after),
        width / height,
        _boxes(found_before, width, height),
        _boxes(found_after, width, height),
    )


def render_page(
    title: str,
    subtitle: str,
    command: Sequence[str],
    tables: Sequence[Table],
    plots: dict[str, str],
    items: Iterable[Item],
    left_out: int = 0,
    sides: tuple[str, str] = ("before", "after"),
) -> bytes:
    """The page as UTF-8 bytes. plots: title -> SVG; left_out: photos not shown; sides: captions left and right."""
    items = list(items)
    environment = Environment(
        loader=PackageLoader("detguard", "reports"), autoescape=True, trim_blocks=True, finalize=_shown
    )
    return (
        environment.get_template("report.html.j2")
        .render(
            title=title,
            subtitle=subtitle,
            command=shlex.join(command),
            tables=tables,
            plots=plots,
            items=items,
            outcomes=Counter(item.outcome for item in items),
            left_out=left_out,
            sides=sides,
            version=__version__,
        )
        .encode(errors="backslashreplace")  # of file names that are not UTF-8
    )


def _shown(value: Any) -> Any:
    """Text as it is, with nothing in it that a browser would obey, as a change of direction."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _boxes(records: Sequence[dict[str, Any]], width: int, height: int) -> list[Box]:
    boxes = []
    for record in records:
        x1, y1, x2, y2 = record["box"]
        boxes.append(
            Box(
                round(1000 * x1 / width, 1),
                round(1000 * y1 / height, 1),
                round(1000 * (x2 - x1) / width, 1),
                round(1000 * (y2 - y1) / height, 1),
                f"{record['class']} {record['confidence']:.2f}",
                # Neighbouring names get hues far apart, the same in every page.
                sum(map(ord, record["class"])) * 137 % 360,
            )
        )
    return boxes


def _data_url(photo: Photo) -> str:
    scale = LONGEST_SIDE / max(photo.shape[:2])
    if scale < 1:
        photo = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(photo, QUALITY)).decode()
