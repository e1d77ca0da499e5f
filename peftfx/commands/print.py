"""Print the graph, after passes if given.

JSON: `{text}`.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..arguments import add_passes
from ..programs import program_of
from ..terminal import say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    add_passes(parser)


def command(options: Any) -> Any:
    """Runs the command."""
    text = program_of(options, options.passes).text()
    say(options, text)
    return {"text": text}
