"""Tell what training keeps, without weights or a run."""

from __future__ import annotations

import argparse
from typing import Any

from ..arguments import add_model
from ..programs import program_of
from ..terminal import say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    add_model(parser)
    parser.add_argument("passes", nargs="?", help="pipeline text or a .yaml recipe")
    parser.add_argument("--batch", type=int, help="rows, where the model leaves that open")
    parser.add_argument("--seq", type=int, help="tokens, where the model leaves that open")
    parser.add_argument("--optimizer", default="adamw", help="adamw, sgd, momentum, ...")


def command(options: Any) -> Any:
    """Runs the command."""
    program = program_of(options, options.passes, hollow=True).train()
    sizes = {n: s for n, s in (("batch", options.batch), ("seq", options.seq)) if s is not None}
    memory_report = program.memory(**sizes, optimizer=options.optimizer)
    say(options, str(memory_report))
    return memory_report.to_json()
