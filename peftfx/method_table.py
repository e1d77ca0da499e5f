"""The table of methods on a terminal, or as lines."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .methods import Entry


def _rows(entries: list[Entry], counted: bool) -> list[tuple[str, ...]]:
    """The cells of the table of methods, its head first."""
    head = ("method", "class", "inserts", "folds", "paper", "trains")
    rows = [(e.name, e.group, e.inserts, e.folds, e.paper, _count(e.trainable)) for e in entries]
    return [row[: 5 + counted] for row in (head, *rows)]


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def print_methods(entries: list[Entry], counted: bool) -> None:
    """Folds cells to the width of a terminal; anything else gets one full line a row.

    Args:
        entries: see `methods`.
        counted: with how many parameters each trains.
    """
    rows = _rows(entries, counted)
    console = Console(highlight=False)
    if not console.is_terminal:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(map(str.ljust, row, widths)).rstrip())
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in rows[0]:
        right = name == "trains"
        table.add_column(name, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    console.print(table)
