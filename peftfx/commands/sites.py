"""List the places that passes can rewrite."""

from __future__ import annotations

import argparse
from typing import Any

from ..arguments import add_model
from ..drawing import check_drawing, draw_sites
from ..programs import program_of
from ..rewriter.program.site_table import Sites
from ..terminal import say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    add_model(parser)
    parser.add_argument("--where", help="a selector, such as '(q|v) and layer>=6'")
    parser.add_argument("--draw", metavar="FILE", help="draw them too: a name in .svg or .png")


def command(options: Any) -> Any:
    """Runs the command."""
    if options.draw:
        check_drawing(options.draw)
    program = program_of(options)
    chosen = program.sites.select(options.where) if options.where else list(program.sites)
    say(options, str(Sites(tuple(chosen))))
    say(options, f"{len(chosen)} of {len(program.sites)} sites; inputs: {program.spec}")
    if options.draw:
        draw_sites(program, options.draw, options.where)
        say(options, f"drawn to {options.draw}")
    return [
        {"id": s.id, "kind": s.kind, "role": s.role, "layer": s.layer, "about": s.describe()}
        for s in chosen
    ]
