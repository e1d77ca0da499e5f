"""What CoDA learns of code search, and what limits it: `python -m benchmarks.coda_learning`.

MiniLM with `coda`, 120 steps of 32 pairs on the first split, MRR on its held-out functions at a
third of the tokens, beside the untouched model. `annealed`: the blocks run on all tokens at first,
on a half after a quarter of the steps, on a third after another one (the paper starts from
checkpoints adapted to sparse blocks). `all tokens` and `half` show what each share of the tokens is
worth to the same adapters. `one direction` starts all routers equal, so that blocks choose alike.
Rows are written to `benchmarks/coda_learning.json` as they come and not computed twice.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

import peftfx
from peftfx.demo.corpus import Pair, Split, make_splits, read_corpus
from peftfx.demo.encoder import (
    CODE_TOKENS,
    QUERY_TOKENS,
    load_model,
    load_tokenizer,
    pool,
)
from peftfx.demo.evaluation import mrr
from peftfx.demo.experiment import encoder_of, score
from peftfx.demo.training import Settings, batches, contrastive_loss
from peftfx.passes.additive.coda import CoDABranch

RATE = 3e-3
ANNEALED = (1, 1, 2, 2, 3, 3, 3, 3)
"""n / k of the tokens in each eighth of the steps."""
ROWS: dict[str, tuple[str, tuple[int, ...], bool]] = {
    "all tokens": ("coda{reduction=1}", (1,), False),
    "half": ("coda{reduction=2}", (2,), False),
    "a third": ("coda", (3,), False),
    "a third, annealed": ("coda", ANNEALED, False),
    "a third, annealed, one direction": ("coda", ANNEALED, True),
    "a third, annealed, LoRA in the blocks": ("coda;lora{rank=8,where=linear}", ANNEALED, False),
}
"""Name -> recipe, n / k in equal stretches of the steps, whether routers start equal."""


def routers(program: peftfx.Program) -> list[CoDABranch]:
    return [m for m in program.module.modules() if isinstance(m, CoDABranch)]


def share(program: peftfx.Program, reduction: int) -> None:
    """Lets the blocks run on 1 / reduction of the tokens."""
    for branch in routers(program):
        branch.reduction = reduction


def row(base: peftfx.Program, split: Split, name: str, steps: int) -> dict[str, Any]:
    """Trains one variant and scores it at the share of tokens that it ended with."""
    recipe, plan, equal = ROWS[name]
    tokenizer, settings = load_tokenizer(), Settings(RATE, steps=steps, seed=split.seed)
    program = peftfx.run(base, recipe)
    if equal:
        first, *others = routers(program)
        with torch.no_grad():
            for branch in others:
                branch.router.copy_(first.router)
    forward, taken = encoder_of(program), 0

    def embedded(texts: list[str], length: int) -> Tensor:
        ids, mask = tokenizer(texts, length).tensors()
        return pool(forward(ids, mask), mask)

    def loss(chosen: Sequence[Pair]) -> Tensor:
        nonlocal taken
        share(program, plan[taken * len(plan) // steps])
        taken += 1
        queries = embedded([p.query for p in chosen], QUERY_TOKENS)
        codes = embedded([p.code for p in chosen], CODE_TOKENS)
        return contrastive_loss(queries, codes, settings.temperature)

    begun = time.process_time()
    done = peftfx.fit(
        program, batches(split.train, settings), lr=RATE, steps=steps, dropout=False,
        forward=loss, progress=False,
    )  # fmt: skip
    share(done.program, plan[-1])
    tenth = max(1, steps // 10)
    return {
        "recipe": recipe,
        "MRR": round(mrr(score(done.program, tokenizer, split.test)), 4),
        "loss at the end": round(sum(done.losses[-tenth:]) / tenth, 3),
        "training [CPU s]": round(time.process_time() - begun),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = Path(__file__).with_suffix(".json")
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if figures.get("steps") != options.steps:
        figures = {"steps": options.steps, "rows": {}}
    figures["machine"] = (
        f"{platform.machine()}, {platform.system()}, torch {torch.__version__}, 1 thread"
    )
    split = make_splits(read_corpus(None))[0]
    ids = torch.arange(32).view(2, 16)
    model = load_model().requires_grad_(False)
    base = peftfx.capture(model, kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    figures["untouched MRR"] = round(mrr(score(base, load_tokenizer(), split.test)), 4)
    for name in options.rows:
        if name not in figures["rows"]:
            figures["rows"][name] = row(base, split, name, options.steps)
            print(name, figures["rows"][name], flush=True)
            file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
