"""Merge a saved adapter into the model's weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..arguments import add_model
from ..models import is_gguf_model
from ..programs import program_of, report, write_model
from ..rewriter.errors import OptionError
from ..rewriter.files.files import write_file, write_tensors
from ..terminal import say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    add_model(parser)
    parser.add_argument("adapter", help="an adapter, of any format that is read")
    parser.add_argument("--out", required=True, help="safetensors file for the merged weights")
    streaming = "fold shard by shard; --out is then a new model directory"
    parser.add_argument("--stream", action="store_true", help=streaming)
    about = "with --stream: where the weights are, if MODEL is no directory"
    parser.add_argument("--weights", metavar="DIR", help=about)
    parser.add_argument("--tied", default="refuse", choices=["refuse", "keep", "untie", "both"])


def command(options: Any) -> Any:
    """Runs the command."""
    if options.stream:
        return _fold_stream(options)
    if options.weights:
        raise OptionError("--weights goes with --stream; without, MODEL has its own weights.")
    program = program_of(options, f"fold{{tied={options.tied}}}")
    records = report(options, program)
    state = program.export_state_dict()
    write_file(options.out, write_tensors(state))
    say(options, f"{len(state)} tensors under their original names: {options.out}")
    return {"records": records, "tensors": len(state), "out": options.out}


def _fold_stream(options: Any) -> Any:
    """Shard by shard, for models that memory does not hold; the new directory is a model again."""
    source = options.weights or options.model
    if not Path(source).is_dir() and not is_gguf_model(source):
        raise OptionError(
            f"fold --stream reads the weights from a directory with safetensors files, which "
            f"{source!r} is not. Add --weights DIR: the checkpoint of the model that "
            f"{options.model} makes."
        )
    return write_model(options, options.weights)
