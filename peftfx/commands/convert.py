"""Write an adapter in another library's format, or a whole model (hf).

JSON: `{out, to, lost}`: what was lost, parameter -> share of the norm of its change; with `--to hf`
as `fold --stream`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ..arguments import add_capturing, add_mismatch
from ..exporters.formats import FORMATS, format_of, save_adapter
from ..exporters.formats import convert as convert_files
from ..exporters.plain_lora import worst
from ..models import is_gguf_model
from ..outputs import check_adapter
from ..programs import program_of, write_model
from ..rewriter.errors import OptionError
from ..terminal import say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    parser.add_argument("adapter", help="of any format that is read; for hf, or a GGUF model")
    parser.add_argument("out", help="the new directory, or file")
    about = "its model, where sizes or numbers of weights are needed: a directory, whose files are "
    parser.add_argument("--base", metavar="MODEL", help=f"{about}read, or module:function")
    about = "build and capture it: for stacks of experts, and where its files use other names"
    parser.add_argument("--capture", action="store_true", help=about)
    parser.add_argument("--component", default="", help="which adapter of a file with several")
    parser.add_argument("--to", required=True, choices=(*FORMATS, "hf"))
    parser.add_argument("--rank", type=int, help="of plain-lora (default: the adapter's largest)")
    add_capturing(parser)
    add_mismatch(parser)


def command(options: Any) -> Any:
    """Runs the command."""
    if options.rank is not None and options.rank < 1:
        raise OptionError(f"--rank {options.rank} is below 1. Give a rank of 1 or more.")
    if options.to == "hf":
        return _whole_model(options)
    check_adapter(options.out, options.to)
    whole = {"peftfx", "adapterhub"} & {options.to, format_of(options.adapter)}
    if whole or options.capture or ":" in (options.base or ""):
        lost = _convert_captured(options)
    else:
        lost = convert_files(
            options.adapter, options.out, options.to, options.base, options.rank, options.component
        )
    say(options, f"{options.adapter} as {options.to}: {options.out}")
    if lost:
        most = ", ".join(f"{name} {share:.2g}" for name, share in worst(lost))
        say(options, f"{len(lost)} changes lost a share of their norm, most of all {most}")
    return {"out": options.out, "to": options.to, "lost": dict(lost)}


def _whole_model(options: Any) -> Any:
    """The adapter folded into its base, or a GGUF model, as a Hugging Face directory."""
    if options.base is None and not is_gguf_model(options.adapter):
        raise OptionError(
            f"--to hf writes a whole model, and {options.adapter} is an adapter. Add --base MODEL: "
            "the model that it is folded into."
        )
    whole = options.base is None
    options.model = options.adapter if whole else options.base
    options.adapter = None if whole else options.adapter
    return write_model(options)


def _convert_captured(options: Any) -> Mapping[str, float]:
    """With the model as a program, which our own format and stacks of experts need."""
    if options.base is None:
        raise OptionError(
            f"converting {options.adapter} to {options.to} needs its model. Add --base MODEL: a "
            "Hugging Face model directory, or module:function."
        )
    options.model = options.base
    program = program_of(options)
    return save_adapter(program, options.out, options.to, rank=options.rank)
