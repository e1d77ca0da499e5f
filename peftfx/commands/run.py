"""Apply passes and save the adapter.

JSON: `{records, trainable, out}`; a record is `{pass, adapter, edited, skipped, certificate,
seconds}`.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..arguments import add_adapter, add_model
from ..outputs import check_directory
from ..programs import program_of, report
from ..rewriter.storage.artifact import MANIFEST, save
from ..terminal import say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    add_model(parser)
    parser.add_argument("passes", help="pipeline text or a .yaml recipe")
    add_adapter(parser)
    parser.add_argument("--out", help="directory for the adapter")
    about = "a safetensors file with the model's inputs [samples, ...], for passes that need data"
    parser.add_argument("--data", metavar="FILE", help=about)
    parser.add_argument("--batch", type=int, default=8, help="samples of --data in a batch")


def command(options: Any) -> Any:
    """Runs the command."""
    if options.out:
        check_directory(options.out, MANIFEST)
    program = program_of(options, options.passes)
    records = report(options, program)
    count = sum(p.numel() for p in program.trainable_parameters())
    say(options, f"{count:,} trainable parameters")
    if options.out:
        save(program, options.out)
        say(options, f"saved to {options.out}")
    return {"records": records, "trainable": count, "out": options.out}
