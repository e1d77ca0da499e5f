"""AutoPEFT's search against random search, on real sentiment: `python -m benchmarks.autopeft DATA`.

DATA is that of `benchmarks/learning.py`, and so are the model (MiniLM), the head, the texts and the
loop. The space: a bit for each of six layers, and sizes of serial and parallel adapters, prefixes
and LoRA. Every trial learns for the same few steps; its score is the accuracy on validation texts.
Both searches evaluate the same number of configurations, for each of several seeds, and nothing is
shared between them. What is compared is the hypervolume of the fronts in the plane of accuracy and
log parameters, whose reference is the accuracy of the head alone at the largest configuration, and
the held-out accuracy of each front's best configuration within a tenth of the largest one's
parameters.

Rows are written to `benchmarks/autopeft.json` as they come; searches go on where they were (a
SQLite file beside it, not committed). At the end the fronts are drawn (`docs/autopeft.svg`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import peftfx
from peftfx.demo.encoder import load_tokenizer
from peftfx.search import Space, Trial, draw_fronts, front_of, search, volume

from .learning import HEAD, Classifier, Run, Split, batches, loss, split_of, texts

SAMPLERS = {"AutoPEFT": "gp", "random": "random"}
SIZES = (0, 2, 8, 32, 128)
RATE = 3e-3
STARTUP = 6
PLOT = Path(__file__).parent.parent / "docs" / "autopeft.svg"


def space_of(base: peftfx.Program) -> Space:
    """Six layers, and four kinds of modules."""
    layers = sorted({s.layer for s in base.sites if s.layer is not None})
    sizes = {"serial": SIZES, "parallel": SIZES, "prefix": (0, 2, 4, 8, 16), "lora": (0, 2, 4, 8)}
    return Space(tuple(layers), sizes, rest=HEAD)


def learnt(program: peftfx.Program, split: Split, steps: int) -> Run:
    """A program after its steps."""
    tokenizer = load_tokenizer()
    run = Run(program, tokenizer)
    given = [run.batch(chosen) for chosen in batches(split.train, steps)]
    done = peftfx.fit(
        program, given, loss, lr=RATE, steps=steps, seed=0, dropout=False, progress=False
    )
    return Run(done.program, tokenizer)


def searched(
    base: peftfx.Program, split: Split, name: str, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One search: its trials, and what its best configuration does on held-out texts."""
    space = space_of(base)
    validation = split.validation[:: options.every]

    def evaluate(program: peftfx.Program) -> float:
        begun = time.process_time()
        accuracy = float(learnt(program, split, options.steps).right(validation).mean())
        text = program.history[0].text
        print(
            f"{name} {seed} {accuracy:.4f} {time.process_time() - begun:.0f} s {text}", flush=True
        )
        return accuracy

    found = search(
        base, space, evaluate, trials=options.trials, sampler=SAMPLERS[name], startup=STARTUP,
        seed=seed, storage=options.storage, name=f"{name} {seed}",
    )  # fmt: skip
    largest = peftfx.run(base, space.largest(*space.sizes))
    top = sum(p.numel() for p in largest.trainable_parameters())
    best = found.best(top // 10)
    held_out = float(
        learnt(peftfx.run(base, best.recipe), split, options.steps).right(split.held_out).mean()
    )
    rows = [[t.recipe, t.scores[0], t.parameters] for t in found.trials]
    return {"seed": seed, "trials": rows, "largest": top, "best": best.recipe, "held out": held_out}


def trials_of(row: dict[str, Any]) -> list[Trial]:
    """The trials of a row of the file."""
    return [Trial(n, r, (score,), count) for n, (r, score, count) in enumerate(row["trials"])]


def front_volume(trials: Sequence[Trial], floor: float, top: int) -> float:
    """Hypervolume of a front: accuracy above the floor by decades of parameters below the top."""
    points = [(t.scores[0], -math.log10(t.parameters)) for t in front_of(trials)]
    return volume(points, (floor, -math.log10(top)))


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """Hypervolumes and held-out accuracies of both, by seed and their means."""
    told: dict[str, Any] = {}
    for name, rows in figures["searches"].items():
        each = list(rows.values())
        floor = figures["head alone"]
        sizes = [round(front_volume(trials_of(r), floor, r["largest"]), 5) for r in each]
        scores = [round(r["held out"], 4) for r in each]
        told[name] = {
            "hypervolume": sizes, "mean hypervolume": round(statistics.fmean(sizes), 5),
            "held out": scores, "mean held out": round(statistics.fmean(scores), 4),
        }  # fmt: skip
    return told


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--trials", type=int, default=18)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--every", type=int, default=2, help="of the validation texts")
    parser.add_argument("--storage", default="autopeft.db")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    file = Path(__file__).with_suffix(".json")
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    task = (
        f"{options.trials} trials of {options.steps} steps, every {options.every}th validation text"
    )
    if figures.get("task") != task:
        figures = {"task": task, "searches": {n: {} for n in SAMPLERS}}
    figures["machine"] = (
        f"{platform.machine()}, {platform.system()}, torch {torch.__version__}, 1 thread"
    )
    split = split_of(texts(options.data))
    ids = torch.arange(32).view(2, 16)
    model = Classifier().eval().requires_grad_(False)
    base = peftfx.capture(model, kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    if "head alone" not in figures:
        head = learnt(peftfx.run(base, HEAD), split, options.steps)
        figures["head alone"] = float(head.right(split.validation[:: options.every]).mean())
    for seed in range(options.seeds):
        for name in SAMPLERS:
            if str(seed) not in figures["searches"][name]:
                found = searched(base, split, name, seed, options)
                figures["searches"][name][str(seed)] = found
                file.write_text(json.dumps(figures, indent=1) + "\n")
    figures["summary"] = summary(figures)
    file.write_text(json.dumps(figures, indent=1) + "\n")
    first = {n: trials_of(rows["0"]) for n, rows in figures["searches"].items()}
    draw_fronts(PLOT, first, "validation accuracy")
    print(json.dumps(figures["summary"], indent=1))


if __name__ == "__main__":
    main()
