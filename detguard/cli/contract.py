"""`detguard check-detector`: does a detector keep what every detector promises?"""

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from detguard import defaults
from detguard.cli.app import Device, ImageSize, Trust, app, loaded, out, show_made, with_dashes


@app.command(
    epilog="""Examples:

`detguard check-detector adapter:make --trust`: the detector that `make("cpu")` of your adapter.py returns

`detguard check-detector yolo11n --photo street.jpg`"""
)
def check_detector(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="module:factory, or anything that --model takes elsewhere.", metavar="MODEL")
    ],
    photo: Annotated[
        Path | None, typer.Option(help="A photo in which something is found; default: one that Ultralytics ships.")
    ] = None,
    conf: Annotated[float, typer.Option(min=0.001, max=0.999, help="What is found over it is compared.")] = 0.05,
    imgsz: ImageSize = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object of all promises instead of a table.")
    ] = False,
    device: Device = defaults.DEVICE,
    trust: Trust = False,
) -> None:
    """Test on a photo that what is attacked is what users run, that the gradient reaches it, and that nothing changes.

    Exit code: 0 all that could be tested are kept, if doubtfully, 1 some are not.
    """
    from ultralytics.utils import ASSETS

    from detguard.detectors.contract import Broken, Doubtful, Skipped, check_contract
    from detguard.photos import read_photo
    from detguard.reports.tables import Table

    (detector,) = loaded(context, model, device=device)
    promises = list(check_contract(detector, read_photo(photo or ASSETS / "bus.jpg"), conf))
    counted = Counter(p.state for p in promises)
    broken, doubtful, skipped = (counted[one] for one in (Broken.state, Doubtful.state, Skipped.state))
    rows = [
        [p.name, p.state, with_dashes(p.seen), p.remedy if p.state in (Broken.state, Doubtful.state) else ""]
        for p in promises
    ]
    if broken:
        text = f"{broken} of {len(promises)} broken"
    elif doubtful:
        text = f"{doubtful} of {len(promises)} doubtful: look at them before you believe a figure of this detector"
    else:
        kept = f"{len(promises) - skipped} kept, {skipped} skipped" if skipped else f"all {len(promises)} kept"
        text = f"{kept}: it can be attacked{'' if detector.differentiable else ' by --black-box,'} and judged"
    out.quiet = out.quiet or as_json
    out.print(Table(f"{detector.name}: promises", ["promise", "", "seen", "look at"], rows))
    records = [dict(zip(("promise", "state", "seen", "remedy"), row, strict=True)) for row in rows]
    show_made(text, as_json=as_json, model=model, passed=not broken, promises=records)
    sys.exit(1 if broken else 0)
