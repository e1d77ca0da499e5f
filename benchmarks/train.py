"""Training steps beside Hugging Face PEFT, eager and compiled: `python benchmarks/train.py`.

A step is forward, backward, AdamW and zero_grad, in float32, with dropout probabilities of zero so
that losses can be compared. One process, one thread, CPU time, variants interleaved in rotated
order, medians and per-round ratios. Memory is what torch's allocator holds at most during a step
beyond the model and its adapter (activations, gradients, temporaries), with AdamW's state; it is
exact, and the same in every run. `rss` repeats LoRA's by the system's word, a process a variant.

PEFT has no bottleneck adapter: there, the peer is the usual module swap. `ours` is the rewritten
graph, `lowered` the same after `lower{target=cpu}`. A Llama without padding runs after
`causal`, except with a prefix, whose mask is not causal. Writes `benchmarks/train.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
from core import cpu, interleaved, resident, summary
from peers import BASES, Base, match, peer
from torch import Tensor, nn

import peftfx

Step = Callable[[], float]

METHODS = {
    "lora": "lora{rank=8,alpha=16,where=linear and not head}",
    "dora": "dora{rank=8,alpha=16,where=linear and not head}",
    "ia3": "ia3",
    "serial_adapter": "serial_adapter{bottleneck=64}",
    "prefix_tuning": "prefix_tuning{length=20,shift_positions=true}",
}


def recipe(method: str, base: Base, lowered: bool) -> str:
    causal = "causal{length=512};" if base.causal and method != "prefix_tuning" else ""
    return causal + METHODS[method] + (";lower{target=cpu}" if lowered else "")


def stepping(module: Any, parameters: list[nn.Parameter], inputs: dict[str, Tensor]) -> Step:
    """One training step; returns its loss."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> float:
        outputs = module(**inputs)
        mask = inputs.get("attention_mask")
        loss = (
            outputs.loss if mask is None
            else (outputs.last_hidden_state * mask[..., None]).pow(2).mean()
        )  # fmt: skip
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def peak(step: Step) -> int:
    """Bytes that torch's allocator holds at most during a step, beyond what it held before."""
    with torch.profiler.profile(profile_memory=True) as found:
        step()
    events: Any = found.profiler.kineto_results.events()  # pyright: ignore
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = most = 0
    for _, size in sorted(changes, key=lambda c: c[0]):
        held += size
        most = max(most, held)
    return most


def variants(
    method: str, base: Base, program: peftfx.Program, layers: int | None
) -> dict[str, Any]:
    """What is timed, by name: module and trained parameters; every one has the same adapter."""
    other = peer(method, base, base.make(layers)).train()
    found: dict[str, Any] = {"peft": (other, [p for p in other.parameters() if p.requires_grad])}
    for name in ("ours", "lowered") if method in ("lora", "dora") else ("ours",):
        made = peftfx.run(program, recipe(method, base, name == "lowered")).train()
        match(made, other)
        found[name] = made.module, made.trainable_parameters()
    return found


def losses(step: Step, parameters: list[nn.Parameter]) -> list[float]:
    """Of three steps, which are then undone."""
    before = [p.detach().clone() for p in parameters]
    found = [step() for _ in range(3)]
    for parameter, value in zip(parameters, before, strict=True):
        parameter.data.copy_(value)
    return found


def measured(made: dict[str, Any], base: Base, rounds: int, compiled: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    steps = {
        n: stepping(torch.compile(module) if compiled else module, parameters, base.inputs)
        for n, (module, parameters) in made.items()
    }
    curves = {n: losses(step, made[n][1]) for n, step in steps.items()}
    theirs = curves["peft"]
    state = {n: 8 * sum(p.numel() for p in parameters) for n, (_, parameters) in made.items()}
    held = {n: peak(step) + state[n] for n, step in steps.items()}
    times = interleaved({n: (lambda s=s: cpu(s)) for n, s in steps.items()}, rounds)
    ours = [n for n in made if n != "peft"]
    return {
        "step [s]": summary(times, "peft"),
        "peak [MB]": {n: round(b / 1e6, 1) for n, b in held.items()}
        | {f"{n}/peft": round(held[n] / held["peft"], 3) for n in ours},
        "largest relative difference of three losses": max(
            abs(a / b - 1) for n in ours for a, b in zip(curves[n], theirs, strict=True)
        ),
    }


def rss(base: Base, variant: str, layers: int | None) -> dict[str, int]:
    """MB that LoRA's training adds to a loaded model, and all of the process (one a variant)."""
    program = peftfx.capture(base.make(layers).requires_grad_(False), kwargs=base.inputs)
    module, parameters = variants("lora", base, program, layers)[variant]
    step = stepping(module, parameters, base.inputs)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    for _ in range(3):
        step()
    return {"training": resident("VmHWM") - before, "process": resident("VmHWM")}


def all_rss(name: str, quick: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for variant in ("peft", "ours", "lowered"):
        command = [sys.executable, __file__, "--rss", name, variant, *["--quick"] * quick]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[variant] = json.loads(done.stdout.splitlines()[-1])
    for variant in ("ours", "lowered"):
        pairs = ((k, found[variant][k], v) for k, v in found["peft"].items())
        found[f"{variant}/peft"] = {k: round(mine / v, 3) for k, mine, v in pairs}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two layers, one round")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--models", nargs="*", default=list(BASES))
    parser.add_argument("--modes", nargs="*", default=["eager", "compiled", "rss"])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--rss", nargs=2, metavar=("MODEL", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    layers, rounds = (2, 1) if options.quick else (None, options.rounds)
    if options.rss:
        print(json.dumps(rss(BASES[options.rss[0]], options.rss[1], layers)))
        return
    results: dict[str, Any] = {
        "environment": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores, "
        f"1 thread, Python {platform.python_version()}, torch {torch.__version__}, CPU seconds"
    }
    for name in options.models:
        base = BASES[name]
        found = results[name] = {}
        program = peftfx.capture(base.make(layers).requires_grad_(False), kwargs=base.inputs)
        for mode in (m for m in options.modes if m != "rss"):
            for method in options.methods:
                made = variants(method, base, program, layers)
                row = measured(made, base, rounds, mode == "compiled")
                found.setdefault(method, {})[mode] = row
                print(name, method, mode, json.dumps(row), flush=True)
        if "rss" in options.modes and "lora" in found:
            found["lora"]["resident memory [MB]"] = all_rss(name, options.quick)
            print(name, json.dumps(found["lora"]["resident memory [MB]"]), flush=True)
        if not options.quick:
            options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
