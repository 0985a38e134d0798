"""Tables of the page and the terminal, and the numbers in them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as TerminalTable
from rich.text import Text

from detguard.detections import Detections
from detguard.files import printable

# Letters of a word that are not broken into lines; paths and what is as long are.
LONGEST = 24
# Letters that fit beside each other on a phone, and of one cell before it is broken into lines.
WIDE, LONG = 46, 14


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names the row. note: what a reader must know to read it.

    folded: shown on the page by its title alone until it is opened.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    folded: bool = False

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers only and stand to the right."""
        columns = zip(*self.rows, strict=True)
        found = [all(re.fullmatch(r"[-+]?[\d.]*( ±[\d.]+)?", cell) for cell in column) for column in columns]
        return found or [False] * len(self.head)

    @property
    def filled(self) -> "Table":
        """The same without columns that are empty in every row."""
        kept = [i for i in range(len(self.head)) if i == 0 or not self.rows or any(row[i] for row in self.rows)]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Table(self.title, [self.head[i] for i in kept], rows, self.note, self.folded)

    @property
    def turned(self) -> "Table":
        """The same with rows as columns: of few rows with many columns, which do not fit beside each other."""
        head, *rows = zip(self.head, *self.rows, strict=True)
        return Table(self.title, ["", *head[1:]], rows, self.note, self.folded)

    @property
    def wide(self) -> bool:
        """Whether a phone shows each row as a card: where its longest words do not fit beside each other."""
        widths = [
            max(*map(len, head.split() or [""]), *(len(cell) for cell in column), 0)
            for head, *column in zip(self.head, *self.rows, strict=True)
        ]
        return len(widths) > 2 and sum(2 + min(width, LONG) for width in widths) > WIDE

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """On a terminal: as wide as that is, in columns, or where those would break words and numbers, row by row.

        The title above, the note below; all as text of one colour.
        """
        table = self.filled
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


def _text(text: str) -> Text:
    return Text(printable(text), overflow="fold")


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


def detections_table(file: str, detections: Detections, class_names: dict[int, str]) -> Table:
    """One row per detection: its number, best first, from 1; class, confidence, box in photo pixels."""
    rows = [
        [str(number), record["class"], f"{record['confidence']:.2f}", *(f"{v:.0f}" for v in record["box"])]
        for number, record in enumerate(detections.records(class_names), 1)
    ]
    return Table(file, ("number", "class", "confidence", "x1", "y1", "x2", "y2"), rows)
