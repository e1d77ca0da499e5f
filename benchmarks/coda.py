"""Time of a BERT-base-shaped encoder, dense and routed by CoDA: `python benchmarks/coda.py`.

One process, one thread, CPU time, variants interleaved in rotated order, medians and per-round
ratios; forward, and forward with backward to the adapters. FLOPs are counted beside the times.
Writes `benchmarks/coda.json` with the environment line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import peftfx

VARIANTS = {"dense": "", "reduction 3": "coda{reduction=3}", "reduction 5": "coda{reduction=5}"}


def inputs(tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(5, 1000, (1, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def base(layers: int) -> peftfx.Program:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model: Any = BertModel(BertConfig(vocab_size=1000, num_hidden_layers=layers))
    return peftfx.capture(model.eval(), kwargs={n: t.repeat(2, 1) for n, t in inputs(16).items()})


def forward(program: peftfx.Program, batch: dict[str, Tensor]) -> float:
    begun = time.process_time()
    with torch.no_grad():
        program(**batch)
    return time.process_time() - begun


def step(program: peftfx.Program, batch: dict[str, Tensor]) -> float:
    begun = time.process_time()
    program(**batch).last_hidden_state.pow(2).mean().backward()
    return time.process_time() - begun


def interleaved(actions: dict[str, Any], rounds: int) -> dict[str, Any]:
    names = list(actions)
    times: dict[str, list[float]] = {n: [] for n in names}
    for index in range(rounds + 1):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            seconds = actions[name]()
            if index:
                times[name].append(seconds)
    found: dict[str, Any] = {n: round(statistics.median(t), 3) for n, t in times.items()}
    for name in names[1:]:
        ratios = [d / t for d, t in zip(times[names[0]], times[name], strict=True)]
        found[f"{names[0]} / {name}"] = round(statistics.median(ratios), 2)
    return found


def flops(program: peftfx.Program, batch: dict[str, Tensor]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        program(**batch)
    return round(counter.get_total_flops() / 1e9, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    captured, batch = base(options.layers), inputs(options.tokens)
    made = {n: peftfx.run(captured, text) if text else captured for n, text in VARIANTS.items()}
    routed = {n: p for n, p in made.items() if VARIANTS[n]}
    # The dense program trains an adapter too, or its backward would do nothing.
    trained = {"lora": peftfx.run(captured, "lora{rank=8}"), **routed}
    figures = {
        "machine": f"{platform.machine()}, {platform.system()}, torch {torch.__version__}",
        "model": f"BERT-base shape, {options.layers} layers, 1 x {options.tokens} tokens",
        "GFLOP": {n: flops(p, batch) for n, p in made.items()},
        "forward [CPU s]": interleaved(
            {n: (lambda p=p: forward(p, batch)) for n, p in made.items()}, options.rounds
        ),
        "step [CPU s]": interleaved(
            {n: (lambda p=p: step(p, batch)) for n, p in trained.items()}, options.rounds
        ),
    }
    text = json.dumps(figures, indent=2)
    Path(__file__).with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
