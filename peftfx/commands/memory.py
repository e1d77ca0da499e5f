"""Tell what training keeps, without weights or a run.

JSON: bytes by part, `{sizes, training, optimizer_name, parameters, gradients, optimizer, saved,
total, by_method, by_role, by_site}`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ..arguments import add_model
from ..programs import program_of
from ..rewriter.errors import OptionError
from ..rewriter.training.memory import states_of
from ..terminal import say, say_table


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    add_model(parser)
    parser.add_argument("passes", nargs="?", help="pipeline text or a .yaml recipe")
    parser.add_argument("--batch", type=int, help="rows, where the model leaves that open")
    parser.add_argument("--seq", type=int, help="tokens, where the model leaves that open")
    parser.add_argument("--optimizer", default="adamw", help="adamw, sgd, momentum, ...")


def command(options: Any) -> Any:
    """Runs the command."""
    states_of(options.optimizer)
    for name, size in (("batch", options.batch), ("seq", options.seq)):
        if size is not None and size < 1:
            raise OptionError(f"--{name} {size} is below 1. Give one of 1 or more.")
    program = program_of(options, options.passes, hollow=True).train()
    sizes = {n: s for n, s in (("batch", options.batch), ("seq", options.seq)) if s is not None}
    memory_report = program.memory(**sizes, optimizer=options.optimizer)
    found = memory_report.to_json()
    say(options, str(memory_report).partition("\n")[0])
    rows = [_row("all", found)]
    for title in ("method", "role"):
        groups = sorted(found[f"by_{title}"].items(), key=lambda item: -item[1]["total"])
        rows += [_row(f"{title} {n or 'elsewhere'}", g) for n, g in groups if g["total"]]
    say_table(options, ("MiB of", *_PARTS), rows, _PARTS)
    return found


_PARTS = ("parameters", "gradients", "optimizer", "saved", "total")


def _row(name: str, share: Mapping[str, int]) -> tuple[str, ...]:
    sizes = (share[part] for part in _PARTS)
    return name, *(f"{size / 2**20:,.2f}" if size else "-" for size in sizes)
