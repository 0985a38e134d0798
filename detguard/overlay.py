"""Pictures of detections: boxes on a photo, and before | after | difference."""

import colorsys
import math
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from detguard.detections import Detections
from detguard.files import printable
from detguard.photos import Photo, largest_difference

DIFFERENCE_GAIN = 10
# Relative, of a colour under white letters: contrast is then 4.5 : 1 or more (WCAG 2.2, success criterion 1.4.3).
LUMINANCE = 0.18


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Matplotlib's font, which has letters of most scripts; where it is, as to import matplotlib takes long.
    package = find_spec("matplotlib")
    assert package
    assert package.origin
    return ImageFont.truetype(Path(package.origin).with_name("mpl-data") / "fonts/ttf/DejaVuSans-Bold.ttf", size)


@cache
def class_colour(name: str) -> tuple[int, int, int]:
    """The colour of a class, RGB 0..255, dark enough for white letters; the same in every picture and page."""
    # By the name, which all that is kept of a detection has; its hash spreads alike names over the circle.
    hue = crc32(printable(name).encode()) * 0.618034 % 1
    for lightness in range(42, 0, -1):
        parts = colorsys.hls_to_rgb(hue, lightness / 100, 0.75)
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        if 0.2126 * red + 0.7152 * green + 0.0722 * blue <= LUMINANCE:
            break
    r, g, b = (round(255 * part) for part in parts)
    return r, g, b


def difference(before: Photo, after: Photo) -> Photo:
    """How two photos differ, x DIFFERENCE_GAIN around grey."""
    return np.clip(128 + DIFFERENCE_GAIN * (after.astype(np.int16) - before), 0, 255).astype(np.uint8)


def draw_detections(photo: Photo, detections: Detections, class_names: dict[int, str]) -> Photo:
    """The photo, `uint8 [H, W, 3]`, with a labelled box for each detection, best on top; labels under each other."""
    image = Image.fromarray(photo)
    draw = ImageDraw.Draw(image)
    unit = max(photo.shape[:2]) / 640
    line, font = max(2, round(2.5 * unit)), _font(max(11, round(14 * unit)))
    shown, taken = [], list[tuple[float, float, float, float]]()
    for box, score, index in zip(
        detections.boxes.tolist(), detections.scores.tolist(), detections.classes.tolist(), strict=True
    ):
        if not (box[0] <= box[2] and box[1] <= box[3] and all(map(math.isfinite, box))):
            continue  # a stranger's network gives what it likes
        label = f" {printable(class_names[index])} {score:.2f} "
        left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
        width, height = right - left, bottom - top + 2 * line
        x = min(max(0, box[0]), max(0, photo.shape[1] - width))
        first = box[1] - height if box[1] >= height else box[1]
        y = _under(taken, x, first, width, height)
        y = first if y + height > photo.shape[0] else y
        taken.append((x, y, width, height))
        shown.append((box, class_colour(class_names[index]), label, (x, y, x + width, y + height), (left, top)))
    for box, colour, *_ in reversed(shown):
        draw.rectangle(box, outline=colour, width=line)
    for _, colour, label, place, (left, top) in reversed(shown):
        draw.rectangle(place, fill=colour)
        at = (place[0] - left, place[1] + line - top)
        draw.text(at, label, fill="white", font=font, stroke_width=1, stroke_fill=(0, 0, 0))
    return np.asarray(image)


def _under(taken: list[tuple[float, float, float, float]], x: float, y: float, width: float, height: float) -> float:
    """The first y from `y` down at which a label lies on none of those that are there, (x, y, width, height)."""
    for left, top, wide, high in sorted(taken, key=lambda one: one[1]):
        if x < left + wide and left < x + width and y < top + high and top < y + height:
            y = top + high
    return y


def before_after(
    before: Photo, found_before: Detections, after: Photo, found_after: Detections, class_names: dict[int, str]
) -> Photo:
    """Side by side: before and after with their detections, and the difference x10 around grey, each captioned."""
    largest = largest_difference(before, after)
    panels = [
        (f"before: {_summary(found_before, class_names)}", draw_detections(before, found_before, class_names)),
        (f"after: {_summary(found_after, class_names)}", draw_detections(after, found_after, class_names)),
        (f"difference x{DIFFERENCE_GAIN} (at most {largest} of 255 levels)", difference(before, after)),
    ]
    height, width = before.shape[:2]
    font_size = max(12, round(width / 32))
    bar, gap = round(font_size * 1.9), max(4, width // 100)
    sheet = Image.new("RGB", (3 * width + 2 * gap, height + bar), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (caption, panel) in enumerate(panels):
        x = i * (width + gap)
        sheet.paste(Image.fromarray(panel), (x, bar))
        font = _font(font_size)
        while draw.textlength(caption, font=font) > width - font_size and font.size > 8:
            font = _font(int(font.size) - 1)
        draw.text((x + font_size // 2, bar / 2), caption, fill=(20, 20, 20), font=font, anchor="lm")
    return np.asarray(sheet)


def _summary(detections: Detections, class_names: dict[int, str]) -> str:
    """Like "4 person, 1 bus"."""
    counts: dict[str, int] = {}
    for index in detections.classes.tolist():
        counts[class_names[index]] = counts.get(class_names[index], 0) + 1
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{n} {printable(name)}" for name, n in ranked) or "nothing found"
