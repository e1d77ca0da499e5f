"""Write a verified ONNX file.

JSON: `{out, opset, nodes, bytes, parity, tolerance, data, rounding, notes}`.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..arguments import add_adapter, add_model
from ..outputs import check_file
from ..programs import program_of
from ..rewriter.errors import OptionError
from ..terminal import progress, say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    add_model(parser)
    parser.add_argument("passes", nargs="?", help="pipeline text, such as fold")
    add_adapter(parser)
    parser.add_argument("--out", required=True, help="the ONNX file")
    about = "the adapter's factors are inputs, for .onnx_adapter files"
    parser.add_argument("--slots", action="store_true", help=about)
    parser.add_argument("--opset", type=int, help="operator set (default: newest that passes)")
    about = "difference allowed, of the largest output (default: 1e-5, more in half precision)"
    parser.add_argument("--tolerance", type=float, help=about)
    about = "what half precision in the model becomes (bfloat16 runs in no CPU runtime)"
    parser.add_argument("--dtype", choices=["float32", "float16"], help=about)


def command(options: Any) -> Any:
    """Runs the command."""
    from ..exporters.onnx.export import check_opset, export_onnx

    check_file(options.out, ".onnx")
    check_opset(options.opset)
    if options.tolerance is not None and not options.tolerance > 0:
        raise OptionError(
            f"--tolerance {options.tolerance} must be above 0, as 1e-5. Give such a one."
        )
    program = program_of(options, options.passes)
    with progress(options, "exporting to ONNX and running it"):
        report = export_onnx(
            program, options.out, opset=options.opset, tolerance=options.tolerance,
            dtype=getattr(torch, options.dtype) if options.dtype else None, slots=options.slots,
        )  # fmt: skip
    say(options, str(report))
    if report.data is not None:
        say(options, f"its weights are in {report.data}; keep the two together")
    return {
        "out": str(report.path), "opset": report.opset, "nodes": report.nodes,
        "bytes": report.size, "parity": dict(report.parity), "tolerance": report.tolerance,
        "data": str(report.data) if report.data else None, "rounding": report.rounding,
        "notes": list(report.notes),
    }  # fmt: skip
