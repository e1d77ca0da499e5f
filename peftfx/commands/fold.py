"""Merge a saved adapter into the model's weights.

`--out` says what is written: one file with the tensors under their original names, or a directory
that `from_pretrained` loads, with the base's other files. A directory is written file by file;
without `--stream`, the model is loaded, and what folding promises is measured on it first.

A directory's files are written one after the other: killed at any time, the same command goes on,
and once all are there, it has nothing to do. It says what rounding to the files' dtype left of what
was learnt, by place, and `peftfx-fold.json` in the directory by weight. Where that is too little,
`--mode` leaves some of the adapter in `adapter/` beside the files, in PEFT's format.

JSON: `{records, tensors, out}`; of a directory also `{changed, left_out, shares, resumed,
nothing_to_do}`, with `--stream` those and `{notes, out}`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..arguments import add_mismatch, add_model
from ..directories import identity
from ..drawing import check_drawing
from ..exporters.hf_names import checkpoint_of
from ..models import is_gguf_model, load_model
from ..outputs import check_directory, check_file
from ..programs import program_of, report, say_directory, write_model
from ..rewriter.errors import OptionError
from ..rewriter.files.files import write_file, write_tensors
from ..rewriter.files.job import finished
from ..rewriter.run.run import run
from ..rewriter.storage.stream import RECORD, WEIGHT_FORMATS, fold_checkpoint, said_again
from ..terminal import progress, say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    add_model(parser)
    parser.add_argument("adapter", help="an adapter, of any format that is read")
    about = "a .safetensors file for the merged weights, or a new directory: a whole model again"
    parser.add_argument("--out", required=True, help=about)
    streaming = "fold shard by shard into a directory, for models that memory does not hold"
    parser.add_argument("--stream", action="store_true", help=streaming)
    about = "with --stream: where the weights are, if MODEL is no directory"
    parser.add_argument("--weights", metavar="DIR", help=about)
    about = "an adapter on a table that is the head, too: see peftfx passes fold (default: refuse)"
    parser.add_argument("--tied", choices=["refuse", "keep", "untie", "both"], help=about)
    about = (
        "into a directory: keep leaves the branches of weights where less than --least of their "
        "change would survive rounding, residual a branch of --rank beside each weight"
    )
    parser.add_argument("--mode", choices=["fold", "keep", "residual"], default="fold", help=about)
    about = "with --mode keep: the share of a change that has to survive (default: 0.5)"
    parser.add_argument("--least", type=float, metavar="SHARE", help=about)
    about = "with --mode residual: the rank of what is not folded (default: 8)"
    parser.add_argument("--rank", type=int, help=about)
    about = "into a directory: draw what rounding left of each change, in .svg or .png"
    parser.add_argument("--draw", metavar="FILE", help=about)
    add_mismatch(parser)


def command(options: Any) -> Any:
    """Runs the command."""
    file = Path(options.out).suffix.lower() == ".safetensors"
    if options.draw:
        check_drawing(options.draw)
        check_file(options.draw)
        if file:
            raise OptionError("--draw goes with a directory: --out DIR. Give one, or leave it out.")
    least, rank = _left_beside(options, file)
    if options.stream or not file:
        _check_directory(options)
    if options.stream or least or rank:
        return write_model(options, options.weights, least, rank)
    if options.weights:
        raise OptionError("--weights goes with --stream; without, MODEL has its own weights.")
    if not file:
        return _fold_into_directory(options)
    check_file(options.out)
    program = program_of(options, f"fold{{tied={options.tied or 'refuse'}}}")
    records = report(options, program)
    state = program.export_state_dict()
    write_file(options.out, write_tensors(state))
    say(options, f"{len(state)} tensors under their original names: {options.out}")
    return {"records": records, "tensors": len(state), "out": options.out}


def _left_beside(options: Any, file: bool) -> tuple[float, int]:
    """What `--mode`, `--least` and `--rank` say, as `to_directory` takes it."""
    mode = options.mode
    for option, needs in (("least", "keep"), ("rank", "residual")):
        if getattr(options, option) is not None and mode != needs:
            raise OptionError(f"--{option} goes with --mode {needs}. Add that, or leave it out.")
    if mode == "fold":
        return 0.0, 0
    if file:
        raise OptionError(f"--mode {mode} leaves an adapter beside the model: give --out DIR.")
    least = 0.5 if options.least is None else options.least
    rank = 8 if options.rank is None else options.rank
    if not 0 < least <= 1 or rank < 1:
        raise OptionError("--least is above 0 and at most 1, --rank at least 1. Give such a one.")
    return (least, 0) if mode == "keep" else (0.0, rank)


def _fold_into_directory(options: Any) -> Any:
    """Measured in memory first; the files are then written as with `--stream`."""
    check_directory(options.out, RECORD)
    if is_gguf_model(options.model):
        return write_model(options)
    made_of = identity(options.model, options.adapter)
    if (record := finished(options.out, RECORD, made_of)) is not None:
        done, records = said_again(options.out, record), []
    else:
        program = program_of(options)
        with progress(options, "folding"):
            records = report(options, run(program, "fold"))
        with progress(options, f"writing {options.out} file by file"):
            files = checkpoint_of(options.model, load_model(options.model, hollow=True).model)
            done = fold_checkpoint(
                program, files, options.out, made_of=made_of,
                model=Path(options.model).resolve().name,
            )  # fmt: skip
    say_directory(options, done)
    return {
        "records": records, "tensors": len(done.changed), "changed": done.changed,
        "left_out": done.left_out, "shares": done.shares, "resumed": done.resumed,
        "nothing_to_do": done.nothing_to_do, "out": options.out,
    }  # fmt: skip


def _check_directory(options: Any) -> None:
    """Whether a directory is a form for what is folded."""
    source = options.weights or options.model
    if options.out.endswith(WEIGHT_FORMATS):
        raise OptionError(
            f"{options.out}: folded weights are a .safetensors file, or a directory. Choose one."
        )
    if options.tied not in (None, "refuse"):
        raise OptionError(
            f"--tied {options.tied}: the files of a directory hold what they held, no tensor more. "
            "Give --out a .safetensors file."
        )
    if not Path(source).is_dir() and not is_gguf_model(source):
        raise OptionError(
            f"weights for a directory come from one with safetensors files, which {source!r} is "
            f"not. Add --weights DIR (with --stream): the checkpoint of the model that "
            f"{options.model} makes; or give --out a .safetensors file."
        )
