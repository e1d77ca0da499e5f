"""List the places that passes can rewrite.

JSON: a list of `{id, kind, role, layer, about}`.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..arguments import add_model
from ..drawing import check_drawing, draw_sites
from ..outputs import check_file
from ..programs import program_of
from ..rewriter.program.selector import words
from ..terminal import say, say_table


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    add_model(parser)
    parser.add_argument("--where", help="a selector, such as '(q|v) and layer>=6'")
    parser.add_argument("--draw", metavar="FILE", help="draw them too: a name in .svg or .png")


def command(options: Any) -> Any:
    """Runs the command."""
    if options.draw:
        check_drawing(options.draw)
        check_file(options.draw)
    if options.where:
        words(options.where)  # malformed ones are told before a model is loaded
    program = program_of(options)
    chosen = program.sites.select(options.where) if options.where else list(program.sites)
    rows = [(s.id, s.kind, s.role, "" if s.layer is None else str(s.layer), s.describe())
            for s in chosen]  # fmt: skip
    say_table(options, ("site", "kind", "role", "layer", "about"), rows)
    say(options, f"{len(chosen)} of {len(program.sites)} sites; inputs: {program.spec}")
    if options.draw:
        draw_sites(program, options.draw, options.where)
        say(options, f"drawn to {options.draw}")
    return [
        {"id": s.id, "kind": s.kind, "role": s.role, "layer": s.layer, "about": s.describe()}
        for s in chosen
    ]
