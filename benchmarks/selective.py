"""What training less costs, beside LoRA: `python benchmarks/selective.py [DIRECTORY]`.

Steps, clock and memory of `train.py` (one process, one thread, CPU time, variants interleaved,
medians and per-round ratios) on MiniLM with 8 x 64 tokens, and on the language model in DIRECTORY
with 4 x 128. Variants, and each that can be also after `lower`:

    lora          rank 8 on all linears but the head
    masked        0.5 % of the entries of the same matrices (the last stage of `diff_pruning`)
    far           30 % of the neurons of all feed-forward blocks
    freeze        the upper half of the layers, and what stands above
    norm_tuning   all norms

`saved` is what the forward keeps for the backward (`Program.memory`), `artifact` the bytes on disk.
Writes `benchmarks/selective.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from core import cpu, interleaved, summary
from peers import BASES, tokens
from torch import Tensor, nn
from train import Step, peak, stepping

import peftfx

RECIPES = {
    "lora": "lora{rank=8,alpha=16,where=linear and not head}",
    "masked": "diff_pruning{density=0.005,bias=false,structured=false}",
    "far": "far{share=0.3}",
    "freeze": "freeze{layers=LAYERS}",
    "norm_tuning": "norm_tuning",
}
LOWERED = ("lora", "masked", "far")


def language_model(folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, tokens(4, 128, False)


def adapted(base: peftfx.Program, method: str) -> peftfx.Program:
    """A method's program; what settles has been moved at random before."""
    layers = 1 + max(s.layer for s in base.sites if s.layer is not None)
    program = peftfx.run(base, RECIPES[method].replace("LAYERS", str(layers // 2)))
    settling = peftfx.controllers(program).finish()
    for name, parameter in program.named_trainable_parameters().items():
        if settling and name.endswith(".w"):
            parameter.data.normal_(0, 1e-3, generator=torch.Generator().manual_seed(0))
    return peftfx.run(program, settling) if settling else program


def written(program: peftfx.Program) -> int:
    with tempfile.TemporaryDirectory() as folder:
        peftfx.save(program, Path(folder) / "adapter")
        return sum(f.stat().st_size for f in (Path(folder) / "adapter").rglob("*.safetensors"))


def measured(model: nn.Module, inputs: dict[str, Tensor], rounds: int) -> dict[str, Any]:
    base = peftfx.capture(model.requires_grad_(False), kwargs=inputs)
    rows, length = inputs["input_ids"].shape
    steps: dict[str, Step] = {}
    found: dict[str, dict[str, Any]] = {"trained": {}, "saved [MB]": {}, "artifact [kB]": {}}
    held: dict[str, float] = {}
    for method in RECIPES:
        plain = adapted(base, method)
        found["artifact [kB]"][method] = round(written(plain) / 1e3, 1)
        lowered = {f"{method} lowered": peftfx.run(plain, "lower")} if method in LOWERED else {}
        for name, program in {method: plain, **lowered}.items():
            parameters = program.train().trainable_parameters()
            steps[name] = stepping(program.module, parameters, inputs)
            steps[name]()
            found["trained"][name] = sum(p.numel() for p in parameters)
            found["saved [MB]"][name] = round(program.memory(rows, length).saved / 1e6, 1)
            held[name] = (peak(steps[name]) + 2 * sum(p.nbytes for p in parameters)) / 1e6
        print(method, {k: v[method] for k, v in found.items()}, flush=True)
    times = interleaved({n: (lambda s=s: cpu(s)) for n, s in steps.items()}, rounds)
    found["peak [MB]"] = {n: round(size, 1) for n, size in held.items()}
    found["peak [MB]"] |= {f"{n}/lora": round(held[n] / held["lora"], 3) for n in held}
    return {"step [s]": summary(times, "lora"), **found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, help="of a language model")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "environment": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores, "
        f"1 thread, Python {platform.python_version()}, torch {torch.__version__}, CPU seconds"
    }
    minilm = next(base for name, base in BASES.items() if "MiniLM" in name)
    models = {"MiniLM, 8 x 64": lambda: (minilm.make(None), minilm.inputs)}
    if options.folder:
        models[f"{options.folder.name}, 4 x 128"] = lambda: language_model(options.folder)
    for name, make in models.items():
        results[name] = measured(*make(), options.rounds)
        print(name, json.dumps(results[name], indent=1), flush=True)
    Path(__file__).with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
