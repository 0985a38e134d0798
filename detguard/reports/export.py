"""The table of an exported file."""

from detguard.export.check import Verdict
from detguard.reports.tables import Table


def verdict_table(verdict: Verdict, photos: int) -> Table:
    """Largest differences from the detector that was exported, and the time of a photo by each way of running it."""
    rows = [
        ["largest difference of a score", f"{verdict.scores:.2g}"],
        ["largest difference of a box, px", f"{verdict.boxes:.2g}"],
        ["boxes compared", str(verdict.compared)],
        *([f"ms per photo, {name}", f"{value:.1f}"] for name, value in verdict.milliseconds.items()),
    ]
    return Table(f"check on {photos} photos", ("", "result"), rows)
