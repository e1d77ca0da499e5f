"""Adapt a real embedding model to a code base for search.

JSON: what the report shows.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..outputs import check_folder


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    parser.add_argument("--source", help="a Python source tree (default: the standard library)")
    parser.add_argument("--all", action="store_true", help="compare all methods")
    parser.add_argument("--out", default="demo-output", help="directory for report and model")


def command(options: Any) -> Any:
    """Runs the command."""
    from ..demo import demo as run_demo

    check_folder(options.out)
    return run_demo(
        source=options.source, all_methods=options.all, output=options.out, json=options.json
    )
