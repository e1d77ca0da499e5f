"""Write what a fine-tuned model changed as an adapter of its base.

JSON: `{out, to, lost, sites, trained, left}`: `lost` is the share of the changes' norm that the
ranks do not hold, `sites` says it for each weight.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..arguments import add_model
from ..exporters.formats import FORMATS, save_adapter
from ..outputs import check_adapter
from ..passes.merging.extract_lora import ExtractLora
from ..programs import program_of
from ..rewriter.errors import OptionError
from ..rewriter.run.run import run
from ..rewriter.storage.filling import load_weights
from ..terminal import progress, say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    add_model(parser)
    parser.add_argument("fine_tuned", help="a directory with the fine-tuned safetensors files")
    parser.add_argument("out", help="the adapter")
    parser.add_argument("--rank", type=int, help="of each weight")
    parser.add_argument("--energy", type=float, help="share of each change's square that is kept")
    about = "leave out what is no matrix (norms, biases), and say so"
    parser.add_argument("--low-rank-only", action="store_true", help=about)
    parser.add_argument("--to", choices=FORMATS, default="peft", help="default: peft")


def command(options: Any) -> Any:
    """Runs the command."""
    if options.rank is None and options.energy is None:
        raise OptionError("extract needs a rank or an energy. Give one: --rank 16 or --energy 0.9.")
    item = ExtractLora(rank=options.rank, energy=options.energy, whole=not options.low_rank_only)
    check_adapter(options.out, options.to)
    program = load_weights(program_of(options, hollow=True), options.model)
    with progress(options, "decomposing what changed"):
        program = run(program, item, sources=[options.fine_tuned])
    save_adapter(program, options.out, options.to)
    record = program.history[-1]
    say(options, str(record))
    say(options, f"{options.fine_tuned} as {options.to}: {options.out}")
    found = record.plan.decisions
    return {
        "out": options.out, "to": options.to, "lost": found["lost"], "sites": found["forms"],
        "trained": found["trained"], "left": found["left"],
    }  # fmt: skip
