"""Check that a checkpoint is what folding an adapter into a model gives.

It is computed from files alone, in float64, tensor by tensor, and not by the rules that fold. A
tensor is `equal` (bit for bit), `folded` (as expected, up to one rounding), `differs`, `not folded`
(as in the base), `missing`, `extra` or of `other shape`; `of the change` is which part of the
learnt change is there: 1 once, 0 not at all, 2 twice. If one is wrong, the exit code is 1.

Where `fold --mode` left an adapter in `adapter/`, a tensor is right `with adapter/`: the files and
what it adds, together.

JSON: `{good, counts, rest, tensors}`; `rest` is the path of that adapter, or null, and a tensor
`{name, state, roundings, present}`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from ..exporters.adapter_changes import describe
from ..exporters.base import checkpoint
from ..exporters.formats import format_of, in_out_of
from ..merge_check import Verdict, check_merge, opened, rest_beside
from ..rewriter.errors import VerifyError
from ..rewriter.storage.safetensors_checkpoint import Checkpoint
from ..terminal import progress, say, say_table


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    parser.add_argument("model", help="the directory of the base's safetensors files")
    parser.add_argument("adapter", help="of any format that is read")
    about = "what was written: a directory of safetensors files, or one file"
    parser.add_argument("merged", help=about)
    parser.add_argument("--component", default="", help="which adapter of a file with several")
    parser.add_argument("--all", action="store_true", help="list the tensors that are right, too")


def command(options: Any) -> Any:
    """Runs the command."""
    kind = format_of(options.adapter)
    before, merged = Checkpoint.read(options.model), opened(options.merged)
    base = checkpoint(options.model, kind == "peft" and in_out_of(options.adapter))
    with progress(options, f"reading {options.adapter}"):
        adapter = describe(options.adapter, base, options.component)
        rest = rest_beside(options.merged)
    if rest is not None:
        say(options, f"{rest.path} has what was not folded, and counts: load it with the files")
    with progress(options, "comparing tensor by tensor"):
        verdicts = list(check_merge(before, base.tensors.aliases, adapter, merged, rest))
    wrong = [v for v in verdicts if not v.good]
    shown = verdicts if options.all else wrong
    if shown:
        head = ("tensor", "is", "of the change", "roundings")
        say_table(options, head, [_row(v) for v in shown], head[2:])
    counted = Counter(v.state for v in verdicts)
    summary = ", ".join(f"{n} {state}" for state, n in sorted(counted.items()))
    say(options, f"{len(verdicts)} tensors: {summary}")
    report = {
        "good": not wrong, "counts": dict(counted),
        "rest": None if rest is None else rest.path,
        "tensors": [
            {"name": v.name, "state": v.state, "roundings": v.roundings, "present": v.present}
            for v in shown
        ],
    }  # fmt: skip
    if wrong:
        error = VerifyError(
            f"{options.merged} is not what folding {options.adapter} into {options.model} gives: "
            f"{len(wrong)} of {len(verdicts)} tensors are not as they should be, first "
            f"{wrong[0].name} ({wrong[0].state})."
        )
        error.report = report
        raise error
    return report


def _row(verdict: Verdict) -> tuple[str, ...]:
    present = "" if verdict.present is None else f"{verdict.present:.3g}"
    roundings = f"{verdict.roundings:.3g}" if verdict.roundings else ""
    return verdict.name, verdict.state, present, roundings
