"""Tables on the terminal, and the numbers in them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as TerminalTable
from rich.text import Text

from detguard.detections import Detections
from detguard.files import printable
from detguard.reports.page import Table

# Letters of a word that are not broken into lines; paths and what is as long are.
LONGEST = 24


def counted(values: Iterable[bool | None]) -> tuple[int, int]:
    """How many of the values that are not None are true, and how many there are."""
    known = [v for v in values if v is not None]
    return sum(known), len(known)


def percents(rows: Sequence[Sequence[tuple[int, int]]]) -> list[list[str]]:
    """Cells like "98 % (49/50)" of parts and their wholes, or "-" of nothing.

    All have as many digits as tell the largest whole from one less.
    """
    most = max((whole for row in rows for _, whole in row), default=0)
    digits = max(0, len(str(most - 1)) - 2)
    return [
        [f"{100 * part / whole:.{digits}f} % ({part}/{whole})" if whole else "-" for part, whole in row] for row in rows
    ]


def counts(number: int, what: str) -> str:
    """Like "1 step", "20 steps" or "2 classes"; what: of one."""
    ending = "" if number == 1 else "es" if what.endswith(("s", "x")) else "s"
    return f"{number} {what}{ending}"


@dataclass(frozen=True)
class Fitted:
    """A table as wide as the terminal is: in columns, or where those would break words and numbers, row by row."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The title above, the note below; all as text of one colour."""
        table = self.table
        yield _text(table.title)
        widths = column_widths(table, options.max_width)
        if widths is None:
            for name, *cells in table.rows:
                yield _text(name)
                for head, cell in zip(table.head[1:], cells, strict=True):
                    yield _text(f"  {head}: {cell}" if head else f"  {cell}")
        else:
            shown = TerminalTable()
            for name, number, width in zip(table.head, table.numeric, widths, strict=True):
                shown.add_column(_text(name), justify="right" if number else "left", overflow="fold", width=width)
            for row in table.rows:
                shown.add_row(*map(_text, row))
            yield shown
        if table.note:
            yield _text(table.note)


def _text(text: str) -> Text:
    return Text(printable(text), overflow="fold")


def terminal_table(table: Table) -> Fitted:
    """A table for the terminal, its title above and its note below."""
    return Fitted(table.filled)


def column_widths(table: Table, width: int) -> list[int] | None:
    """Letters for each column of a table in so many, lines between them left out; None: some would break words.

    Numbers are not broken at all.
    """
    widths, least = list[int](), list[int]()
    for number, head, *cells in zip(table.numeric, table.head, *table.rows, strict=True):
        words = [*head.split(), *(cells if number else (word for cell in cells for word in cell.split()))]
        widths.append(max(cell_len(printable(cell)) for cell in (head, *cells)))
        least.append(min(widths[-1], LONGEST, max((cell_len(printable(word)) for word in words), default=0)))
    room = width - 3 * len(widths) - 1
    if sum(least) > room:
        return None
    while sum(widths) > room:
        widest = max(range(len(widths)), key=lambda i: widths[i] * (widths[i] > least[i]))
        widths[widest] -= 1
    return widths


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


def detections_table(file: str, detections: Detections, class_names: dict[int, str]) -> Fitted:
    """One row per detection: its number, best first, from 1; class, confidence, box in photo pixels."""
    rows = [
        [str(number), record["class"], f"{record['confidence']:.2f}", *(f"{v:.0f}" for v in record["box"])]
        for number, record in enumerate(detections.records(class_names), 1)
    ]
    return terminal_table(Table(file, ("number", "class", "confidence", "x1", "y1", "x2", "y2"), rows))
