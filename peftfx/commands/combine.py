"""Write several adapters as one, by their true changes.

Adapters may be of any formats; what `combine` does is in `peftfx passes combine`.

JSON: `{out, to, members, error, lost}`: what re-compressing lost at the worst weight, and what the
format lost of each change.
"""

from __future__ import annotations

import argparse
from typing import Any, get_args, get_type_hints

from ..arguments import add_mismatch, add_model
from ..exporters.formats import FORMATS, format_of, load_adapter, save_adapter
from ..outputs import check_adapter
from ..passes.merging.combine import Combine
from ..programs import program_of
from ..rewriter.run.run import run
from ..terminal import progress, say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    add_model(parser)
    parser.add_argument("adapters", nargs="+", help="of any format that is read")
    parser.add_argument("--out", required=True, help="the new adapter")
    parser.add_argument("--to", choices=FORMATS, default="peft", help="default: peft")
    parser.add_argument("--weights", nargs="+", type=float, help="one each (default: 1)")
    methods = get_args(get_type_hints(Combine)["method"])
    parser.add_argument("--method", choices=methods, default="linear", help="default: linear")
    parser.add_argument("--density", type=float, default=1.0, help="share of entries that is kept")
    parser.add_argument("--rank", type=int, help="re-compress to this rank")
    parser.add_argument("--energy", type=float, help="re-compress to this share of the square")
    parser.add_argument("--seed", type=int, default=0, help="of dare and della (default: 0)")
    add_mismatch(parser)


def command(options: Any) -> Any:
    """Runs the command."""
    names = tuple(f"member{i}" for i in range(len(options.adapters)))
    item = Combine(
        names=names, weights=None if options.weights is None else tuple(options.weights),
        method=options.method, density=options.density, rank=options.rank, energy=options.energy,
        seed=options.seed,
    )  # fmt: skip
    check_adapter(options.out, options.to)
    for path in options.adapters:
        format_of(path)
    base = program_of(options)
    allow = options.allow_base_mismatch
    members = [load_adapter(base, path, allow_base_mismatch=allow) for path in options.adapters]
    with progress(options, "combining"):
        program = run(base, item, sources=members)
    lost = save_adapter(program, options.out, options.to)
    record = program.history[-1]
    say(options, str(record))
    say(options, f"{len(members)} adapters as one, as {options.to}: {options.out}")
    return {
        "out": options.out, "to": options.to, "members": options.adapters,
        "error": record.certificate.measured.get("error", 0.0), "lost": dict(lost),
    }  # fmt: skip
