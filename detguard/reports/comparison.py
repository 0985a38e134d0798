"""What `compare` shows: figures of several evaluate runs, each beside the first one's."""

from pathlib import Path

from detguard.reports.evaluation import COLUMNS, Metrics, headline, number, strength
from detguard.reports.page import Table, render_page
from detguard.reports.plots import plots


def short_names(folders: list[Path]) -> list[str]:
    """The folders by their last parts, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(folder) for folder in folders]


def differences(metrics: Metrics) -> dict[str, dict[str, float]]:
    """By name, how much every figure of each but the first is over the first one's; of attacks only where they are as
    strong.
    """
    (_, first), *others = metrics.items()
    found: dict[str, dict[str, float]] = {}
    for name, model in others:
        alike = {strength(one) if "attack" in one else "" for one in (model, first)}
        for protocol, title, show in COLUMNS:
            if not (protocol in model and protocol in first) or (protocol == "attack" and len(alike) > 1):
                continue
            value, base = show(model), show(first)
            if isinstance(value, float | int) and isinstance(base, float | int):
                found.setdefault(name, {})[title] = value - base
    return found


def comparison_table(metrics: Metrics) -> Table:
    """One row per figure, one column per model, the differences to the first beside them."""
    table, changes = headline(metrics, "Comparison"), differences(metrics)
    rows = [
        [row[0]]
        + [
            f"{cell} ({signed(changes[row[0]][title])})" if title in changes.get(row[0], {}) else cell
            for title, cell in zip(table.head[1:], row[1:], strict=True)
        ]
        for row in table.rows
    ]
    note = f"{table.note} In brackets: how much more than {next(iter(metrics))}." if changes else table.note
    return Table(table.title, table.head, rows, note).turned


def signed(value: float) -> str:
    """Like "+.012"; "0" of what rounds to it."""
    return f"{'-' if value < 0 else '+'}{number(abs(value))}" if abs(value) >= 0.0005 else "0"


def verdict(metrics: Metrics) -> str:
    """One sentence: what AP each model has gained or lost against the first."""
    first, found = next(iter(metrics)), differences(metrics)
    sentences = []
    for name, changes in found.items():
        parts = [f"{title} {signed(value)}" for title, value in changes.items() if title.endswith((" AP", "mPC"))]
        sentences.append(f"{name}: {', '.join(parts)}")
    return f"Against {first}: {'; '.join(sentences)}" if sentences else f"{first}: nothing to compare with"


def comparison_page(metrics: Metrics, command: list[str]) -> bytes:
    """The comparison as a page of its own."""
    title = f"Comparison of {', '.join(metrics)}"
    return render_page(title, verdict(metrics), "", command, [comparison_table(metrics)], plots(metrics, {}))
