"""Fold many adapters of one base, each into a directory of its own.

The base is captured once at most, and each shard is read once for all adapters. One that fails does
not keep the others; the exit code is then that of the first that failed. Killed at any time, the
same command goes on. `fold-all.json` in `--out` says what became of each.

JSON: `{base, adapters: [{adapter, out, status, changed, least_left, lost, resumed, notes, error,
kind, seconds}]}`; `status` is `done`, `nothing to do` or `failed`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..arguments import add_model
from ..many import REPORT, Outcome, fold_all
from ..outputs import check_folder
from ..programs import capturing_of
from ..rewriter.errors import (
    BaseMismatchError,
    CorruptFileError,
    FoldError,
    RewriteError,
    SystemFailedError,
    VerifyError,
)
from ..terminal import progress, say, say_table

ERRORS: Mapping[str, type[RewriteError]] = {
    "contract": VerifyError, "base": BaseMismatchError, "damage": CorruptFileError,
    "system": SystemFailedError, "usage": FoldError,
}  # fmt: skip
"""By kind, which is the exit code's."""
HEAD = ("adapter", "status", "tensors", "least left", "CPU s", "why")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    add_model(parser)
    parser.add_argument("adapters", nargs="+", help="adapters, of any formats that are read")
    about = "a directory for theirs, which are called like the adapters"
    parser.add_argument("--out", required=True, metavar="DIR", help=about)
    about = "processes, each with a part of the adapters (default: 1)"
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help=about)
    about = "where the weights are, if MODEL is no directory"
    parser.add_argument("--weights", metavar="DIR", help=about)


def command(options: Any) -> Any:
    """Runs the command."""
    check_folder(options.out)
    capturing = capturing_of(options)
    with progress(options, f"folding {len(options.adapters)} adapters"):
        outcomes = fold_all(
            options.model, options.adapters, options.out, jobs=options.jobs,
            weights=options.weights, capturing=capturing,
        )  # fmt: skip
    say_table(options, HEAD, [_row(o) for o in outcomes], HEAD[2:5])
    say(options, f"told in {options.out}/{REPORT}")
    told = {"base": options.model, "adapters": [asdict(o) for o in outcomes]}
    failed = [o for o in outcomes if o.status == "failed"]
    if failed:
        first = failed[0]
        error = ERRORS.get(first.kind, FoldError)(
            f"{len(failed)} of {len(outcomes)} adapters were not folded, first {first.adapter}: "
            f"{first.error}"
        )
        error.report = told
        raise error
    return told


def _row(one: Outcome) -> tuple[str, ...]:
    failed = one.status == "failed"
    figures = ("-", "-") if failed else (str(one.changed), f"{one.least_left:.1%}")
    return one.adapter, one.status, *figures, f"{one.seconds:.1f}", one.error
