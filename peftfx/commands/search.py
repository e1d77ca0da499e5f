"""Search with the model that the demo exported.

JSON: a list of `{score, function, line, about}`.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..terminal import say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    parser.add_argument("query", help="what the function does, in words")
    parser.add_argument("--out", default="demo-output", help="the demo's directory")
    parser.add_argument("--count", type=int, default=5, help="number of answers")


def command(options: Any) -> Any:
    """Runs the command."""
    from ..demo import search as run_search

    result = run_search(options.query, options.out, count=options.count)
    for answer in result:
        say(
            options,
            f"{answer['score']:.3f}  {answer['function']}:{answer['line']}  {answer['about']}",
        )
    return result
