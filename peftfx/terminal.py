"""What commands show: lines, and a bar while something runs."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

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
