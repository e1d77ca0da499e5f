"""Write several adapters as one, by their true changes.

Adapters may be of any formats; what `combine` does is in `peftfx passes combine`.

JSON: `{out, to, members, error, lost}`: what re-compressing lost at the worst weight, and what the
format lost of each change.
"""

from __future__ import annotations

import argparse
from typing import Any, get_args, get_type_hints

from ..exporters.formats import FORMATS, load_adapter, save_adapter
from ..models import load_model
from ..passes.merging.combine import Combine
from ..rewriter.capture.capture import capture
from ..rewriter.run.run import run


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    parser.add_argument("model", help="the base: a Hugging Face directory, or module:function")
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


def command(options: Any) -> Any:
    """Runs the command."""
    names = tuple(f"member{i}" for i in range(len(options.adapters)))
    item = Combine(
        names=names, weights=None if options.weights is None else tuple(options.weights),
        method=options.method, density=options.density, rank=options.rank, energy=options.energy,
        seed=options.seed,
    )  # fmt: skip
    named = load_model(options.model)
    base = capture(named.model, kwargs=named.example)
    members = [load_adapter(base, path) for path in options.adapters]
    program = run(base, item, sources=members)
    lost = save_adapter(program, options.out, options.to)
    record = program.history[-1]
    if not options.json:
        print(record)
        print(f"{len(members)} adapters as one, as {options.to}: {options.out}")
    return {
        "out": options.out, "to": options.to, "members": options.adapters,
        "error": record.certificate.measured.get("error", 0.0), "lost": dict(lost),
    }  # fmt: skip
