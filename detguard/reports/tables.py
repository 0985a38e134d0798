"""Tables on the terminal, and the numbers in them."""

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table as TerminalTable

from detguard.detections import Detections
from detguard.reports.page import Table


def rate(values: Sequence[bool | None]) -> str:
    """Like "98 % (49/50)" of the values that are not None."""
    counted = [v for v in values if v is not None]
    return share(sum(counted), len(counted))


def share(part: int, whole: int) -> str:
    """Like "98 % (49/50)", or "-" of nothing; in whole percents where one more would be a percent or more."""
    return f"{100 * part / whole:{'.4g' if whole > 100 else '.0f'}} % ({part}/{whole})" if whole else "-"


def terminal_table(table: Table) -> Group:
    """A table for the terminal, its title above and its note below, as wide as the terminal is."""
    table = table.filled
    shown = TerminalTable()
    for name, number in zip(table.head, table.numeric, strict=True):
        shown.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*row)
    return Group(table.title, shown, *([table.note] if table.note else []))


def duration(seconds: float) -> str:
    """Like "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def terminal_list(rows: Sequence[Sequence[str]]) -> TerminalTable:
    """Rows of name and value for the terminal, without lines."""
    table = TerminalTable(show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def detections_table(file: str, detections: Detections, class_names: dict[int, str]) -> Group:
    """One row per detection: its number, best first, from 1; class, confidence, box in photo pixels."""
    rows = [
        [str(number), record["class"], f"{record['confidence']:.2f}", *(f"{v:.0f}" for v in record["box"])]
        for number, record in enumerate(detections.records(class_names), 1)
    ]
    return terminal_table(Table(file, ("number", "class", "confidence", "x1", "y1", "x2", "y2"), rows))
