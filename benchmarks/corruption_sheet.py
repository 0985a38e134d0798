"""The 15 corruptions of one photo at severities 1, 3 and 5, as one picture.

python benchmarks/corruption_sheet.py [PHOTO] --out docs/corruptions.jpg
"""

from pathlib import Path
from typing import Annotated

import cv2
import matplotlib
import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont
from ultralytics.utils import ASSETS

from detguard.data.corruptions import KINDS, corrupt
from detguard.photos import read_photo

TILE = (216, 162)


def main(
    photo: Annotated[Path, typer.Argument()] = ASSETS / "bus.jpg",
    out: Annotated[Path, typer.Option()] = Path("docs/corruptions.jpg"),
) -> None:
    pixels = read_photo(photo)
    if photo == ASSETS / "bus.jpg":
        pixels = pixels[320:927]  # as wide as the tiles
    pixels = np.ascontiguousarray(pixels)
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 15)
    columns, bar = 2, 24
    rows = -(-len(KINDS) // columns)
    sheet = Image.new("RGB", (columns * (3 * TILE[0] + 18), rows * (TILE[1] + bar + 8)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, kind in enumerate(KINDS):
        x, y = number // rows * (3 * TILE[0] + 18), number % rows * (TILE[1] + bar + 8)
        draw.text((x + 2, y + 2), f"{kind.replace('_', ' ')}: severity 1, 3, 5", fill="black", font=font)
        for i, severity in enumerate((1, 3, 5)):
            tile = cv2.resize(corrupt(pixels, kind, severity, 0), TILE, interpolation=cv2.INTER_AREA)
            sheet.paste(Image.fromarray(tile), (x + i * (TILE[0] + 2), y + bar))
    sheet.save(out, quality=88)
    print(f"{out}: {sheet.width} x {sheet.height}")


if __name__ == "__main__":
    typer.run(main)
