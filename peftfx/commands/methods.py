"""List the methods, with what they train on a model.

JSON: a list of `{name, group, paper, inserts, folds, trainable, refused}`.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..arguments import add_model
from ..methods import methods
from ..programs import program_of
from ..terminal import progress, say, say_table


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    add_model(parser, optional=True)


def command(options: Any) -> Any:
    """Runs the command."""
    program = program_of(options) if options.model else None
    with progress(options, "running every method"):
        entries = methods(program)
    head = ("method", "class", "inserts", "folds", "paper", "trains")
    rows = [(e.name, e.group, e.inserts, e.folds, e.paper, _count(e.trainable)) for e in entries]
    shown = len(head) if program else len(head) - 1
    say_table(options, head[:shown], [row[:shown] for row in rows], ("trains",))
    for entry in entries:
        if entry.refused:
            say(options, f"{entry.name}: {entry.refused}")
    return [entry.to_json() for entry in entries]


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"
