"""Training steps of additive methods beside others: `python benchmarks/additive.py`.

On MiniLM (8 x 64 tokens with padding, float32, dropout off), one thread, CPU seconds, variants
interleaved in rotated order, medians and per-round ratios:

    parallel    a bottleneck beside every feed-forward block, and the same as a module swap
    krona       KronA, and a LoRA with as many parameters at the same weights
    smop        a router and prompts of 5 tokens, and one prompt of 5 tokens
    adamix      inference after `bake`, and that of one serial adapter

Where both compute the same, their outputs' largest relative difference stands beside the times.
Writes `benchmarks/additive.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from core import cpu, interleaved, summary
from peers import BASES
from torch import Tensor, nn
from train import stepping

import peftfx

BASE = next(iter(BASES.values()))
BOTTLENECK = 64


class Parallel(nn.Module):
    """Takes the place of an output's dense layer: h + 4 U relu(D z), z what the block reads."""

    def __init__(self, entry: nn.Module, below: nn.Module, width: int) -> None:
        super().__init__()
        self.below, self.down = below, nn.Linear(width, BOTTLENECK)
        self.up = nn.Linear(BOTTLENECK, width)
        self.seen: list[Tensor] = []
        entry.register_forward_pre_hook(lambda _, given: self.seen.append(given[0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.below(x) + 4 * self.up(F.relu(self.down(self.seen.pop())))


def swapped(model: Any, program: peftfx.Program) -> nn.Module:
    """The module swap, with the values of a program's parallel adapters."""
    model.requires_grad_(False)
    for layer, attachment in zip(model.encoder.layer, program.attachments, strict=True):
        swap = Parallel(layer.intermediate.dense, layer.output.dense, model.config.hidden_size)
        own = dict(program.branch(attachment).named_parameters())
        for part in ("down", "up"):
            getattr(swap, part).weight.data.copy_(own[part])
            getattr(swap, part).bias.data.copy_(own[f"{part}_bias"])
        layer.output.dense = swap
    return model


def moved(program: peftfx.Program) -> peftfx.Program:
    drawn = torch.Generator().manual_seed(2)
    for parameter in program.trainable_parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=drawn) * 0.02)
    return program


def training(made: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Of {name: (module, parameters)}; ratios are to the last one."""
    steps = {n: stepping(m.train(), p, BASE.inputs) for n, (m, p) in made.items()}
    return _timed({n: (lambda s=s: cpu(s)) for n, s in steps.items()}, rounds) | {
        "parameters": {n: sum(x.numel() for x in p) for n, (_, p) in made.items()}
    }


def inference(made: dict[str, Any], rounds: int) -> dict[str, Any]:
    def run(module: Any) -> Callable[[], float]:
        def once() -> None:
            with torch.no_grad():
                for _ in range(3):
                    module(**BASE.inputs)

        return lambda: cpu(once)

    return _timed({n: run(m.eval()) for n, (m, _) in made.items()}, rounds)


def _timed(actions: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    return {"seconds": summary(interleaved(actions, rounds), list(actions)[-1])}


def apart(one: Any, other: Any) -> float:
    with torch.no_grad():
        a, b = (m.eval()(**BASE.inputs).last_hidden_state for m in (one, other))
    return float((a - b).abs().max() / b.abs().max())


def measured(layers: int | None, rounds: int) -> dict[str, Any]:
    base = peftfx.capture(BASE.make(layers).requires_grad_(False), kwargs=BASE.inputs)

    def ours(text: str) -> tuple[Any, list[nn.Parameter]]:
        program = moved(peftfx.run(base, text))
        return program.module, program.trainable_parameters()

    program = moved(peftfx.run(base, f"parallel_adapter{{bottleneck={BOTTLENECK}}}"))
    swap = swapped(BASE.make(layers), program)
    theirs = swap, [p for p in swap.parameters() if p.requires_grad]
    pair = {"parallel_adapter": (program.module, program.trainable_parameters()), "swap": theirs}
    found = {"parallel": {"difference": apart(program.module, swap), **training(pair, rounds)}}
    pair = {"krona": ours("krona{where=q|v}"), "lora": ours("lora{rank=1,where=q|v}")}
    found["krona"] = training(pair, rounds)
    pair = {"smop": ours("smop{length=5}"), "prompt_tuning": ours("prompt_tuning{length=5}")}
    found["smop"] = training(pair, rounds)
    mixed = moved(peftfx.run(base, f"adamix{{bottleneck={BOTTLENECK}}}"))
    baked = peftfx.run(mixed, peftfx.controllers(mixed).finish())
    one = f"serial_adapter{{bottleneck={BOTTLENECK},norms=false,where=ffn}}"
    pair = {"adamix baked": (baked.module, []), "serial_adapter": ours(one)}
    found["adamix"] = inference(pair, rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("additive.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    environment = (
        f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores, 1 thread, Python "
        f"{platform.python_version()}, torch {torch.__version__}, CPU seconds, "
        f"{options.layers} layers, {options.rounds} rounds"
    )
    results = {"environment": environment, **measured(options.layers, options.rounds)}
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
