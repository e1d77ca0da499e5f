"""Merge whole models by a mergekit configuration.

Models are merged whole, or in slices of layers that are stacked. It goes tensor by tensor; the same
command goes on where it was killed, and has nothing to do where all is there.

JSON: `{out, tensors, resumed, notes}`.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..exporters.merge import merge
from ..terminal import say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    parser.add_argument("config", help="a mergekit configuration (YAML) of models in directories")
    parser.add_argument("out", help="the new model directory")
    parser.add_argument("--seed", type=int, default=0, help="of dare and della (default: 0)")


def command(options: Any) -> Any:
    """Runs the command."""
    done = merge(options.config, options.out, seed=options.seed)
    kept = f", {done.resumed} of them written before" if done.resumed else ""
    say(options, f"{done.tensors} tensors merged{kept}: {done.directory}")
    for note in done.notes:
        say(options, note)
    return {
        "out": options.out, "tensors": done.tensors, "resumed": done.resumed, "notes": done.notes,
    }  # fmt: skip
