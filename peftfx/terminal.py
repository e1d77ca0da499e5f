"""What commands show: lines, tables, and a bar while something runs."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

ERR = Console(stderr=True)


@contextlib.contextmanager
def progress(options: Any, text: str) -> Generator[None]:
    """A moving bar with the elapsed time while something runs (terminals only)."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(20),
        TimeElapsedColumn(),
    )
    quiet = options.json or not ERR.is_terminal
    with Progress(*columns, console=ERR, transient=True, disable=quiet) as bar:
        bar.add_task(escape(text), total=None)
        yield


def say(options: Any, text: str) -> None:
    """Prints a line, unless a JSON document is asked for."""
    if not options.json:
        print(text)


Row = Sequence[str]


def say_table(options: Any, head: Row, rows: Sequence[Row], right: Sequence[str] = ()) -> None:
    """Prints a table, unless a JSON document is asked for: on a terminal cells are folded to its
    width; anywhere else each row is one full line.

    Args:
        options: of the command.
        head: the names of the columns.
        rows: the cells.
        right: names of columns of numbers, which are aligned on the right and never folded.
    """
    if options.json:
        return
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(folded(head, rows, right, console.width))
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        )
        print("  ".join(cells).rstrip())


_NARROW = 24
"""Characters at which a word may be cut, if it is longer."""


def folded(head: Row, rows: Sequence[Row], right: Sequence[str], width: int) -> Table:
    """A table whose cells are folded to a width, between words where they have any.

    Where its columns would be too narrow for that, each row becomes lines of `name  cell`.
    """
    columns = list(zip(head, *rows, strict=True))
    whole = [max(map(len, column)) for column in columns]
    least = [
        most if name in right else _least(column)
        for name, most, column in zip(head, whole, columns, strict=True)
    ]
    over = sum(whole) + 2 * (len(head) - 1) - width
    if sum(whole) - sum(least) < over:
        return _lines(head, rows)
    for index in sorted(range(len(head)), key=lambda i: least[i] - whole[i]):  # the loosest first
        cut = min(max(over, 0), whole[index] - least[index])
        whole[index], over = whole[index] - cut, over - cut
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name, size in zip(head, whole, strict=True):
        table.add_column(
            name, justify="right" if name in right else "left", no_wrap=name in right,
            overflow="fold", width=size,
        )  # fmt: skip
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _least(column: Sequence[str]) -> int:
    """The width that a column of texts needs."""
    return min(_NARROW, max((len(word) for cell in column for word in cell.split()), default=1))


def _lines(head: Row, rows: Sequence[Row]) -> Table:
    """Each row as a heading and a line a cell."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for number, row in enumerate(rows):
        if number:
            table.add_row("", "")
        for index, (name, cell) in enumerate(zip(head, row, strict=True)):
            if cell or not index:
                table.add_row(name, f"[bold]{escape(cell)}[/]" if not index else escape(cell))
    return table
