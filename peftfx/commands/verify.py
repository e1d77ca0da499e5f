"""Measure every promise of passes or an adapter again.

JSON: `{certificates}`, a list of texts.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..arguments import add_passes
from ..programs import program_of
from ..terminal import progress, say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    add_passes(parser)


def command(options: Any) -> Any:
    """Runs the command."""
    program = program_of(options, options.passes)
    with progress(options, "measuring every contract again"):
        certificates = program.verify()
    lines = [str(c) for c in certificates] or ["the captured graph is well formed"]
    for line in lines:
        say(options, f"ok  {line}")
    return {"certificates": lines}
