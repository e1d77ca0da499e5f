"""Write what a fine-tuned model changed as an adapter of its base.

JSON: `{out, to, lost, sites, trained, left}`: `lost` is the share of the changes' norm that the
ranks do not hold, `sites` says it for each weight.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..exporters.formats import FORMATS, save_adapter
from ..models import load_model
from ..passes.merging.extract_lora import ExtractLora
from ..rewriter.capture.capture import capture
from ..rewriter.run.run import run
from ..rewriter.storage.stream import load_weights


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    parser.add_argument("model", help="the base: a Hugging Face directory")
    parser.add_argument("fine_tuned", help="a directory with the fine-tuned safetensors files")
    parser.add_argument("out", help="the adapter")
    parser.add_argument("--rank", type=int, help="of each weight")
    parser.add_argument("--energy", type=float, help="share of each change's square that is kept")
    about = "leave out what is no matrix (norms, biases), and say so"
    parser.add_argument("--low-rank-only", action="store_true", help=about)
    parser.add_argument("--to", choices=FORMATS, default="peft", help="default: peft")


def command(options: Any) -> Any:
    """Runs the command."""
    item = ExtractLora(rank=options.rank, energy=options.energy, whole=not options.low_rank_only)
    named = load_model(options.model, True)
    program = load_weights(capture(named.model, kwargs=named.example), options.model)
    program = run(program, item, sources=[options.fine_tuned])
    save_adapter(program, options.out, options.to)
    record = program.history[-1]
    if not options.json:
        print(record)
        print(f"{options.fine_tuned} as {options.to}: {options.out}")
    found = record.plan.decisions
    return {
        "out": options.out, "to": options.to, "lost": found["lost"], "sites": found["forms"],
        "trained": found["trained"], "left": found["left"],
    }  # fmt: skip
