"""Show what passes change in the graph.

JSON: `{diff}`.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..arguments import add_passes
from ..programs import program_of
from ..rewriter.errors import OptionError
from ..terminal import say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    add_passes(parser)


def command(options: Any) -> Any:
    """Runs the command."""
    if not options.passes and not options.adapter:
        raise OptionError("diff needs passes or --adapter: peftfx diff MODEL 'lora{rank=8}'.")
    text = program_of(options, options.passes).diff()
    say(options, text)
    return {"diff": text}
