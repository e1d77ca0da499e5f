"""List the methods, with what they train on a model."""

from __future__ import annotations

import argparse
from typing import Any

from ..method_table import print_methods
from ..methods import methods
from ..programs import program_of
from ..terminal import progress


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    parser.add_argument("model", nargs="?", help="a model directory, or module:function")


def command(options: Any) -> Any:
    """Runs the command."""
    program = program_of(options) if options.model else None
    with progress(options, "running every method"):
        entries = methods(program)
    if not options.json:
        print_methods(entries, program is not None)
        for entry in entries:
            if entry.refused:
                print(f"{entry.name}: {entry.refused}")
    return [entry.to_json() for entry in entries]
