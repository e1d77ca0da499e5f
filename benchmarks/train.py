"""Training steps beside Hugging Face PEFT, eager and compiled: `python benchmarks/train.py`.

A step is forward, backward, AdamW and zero_grad, in float32, with dropout probabilities of zero so
that losses can be compared. One process, one thread, CPU time, variants interleaved in rotated
order, medians and per-round ratios. Memory is what torch's allocator holds at most during a step
beyond the model and its adapter (activations, gradients, temporaries), with AdamW's state; it is
exact, and the same in every run, as is what autograd keeps of a forward pass for the backward
(`saved`: distinct storages, without parameters). `rss` repeats the memory of LoRA and DoRA by the
system's word, a process a variant.

PEFT has no bottleneck adapter: there, the peer is the usual module swap. `ours` is the rewritten
graph, `lowered` the same after `lower{target=cpu}`, `recompute` that with cheap values computed
again and the loss with its gradient, `budget` that with as few blocks computed again as keep it
within `SAVED`, if it is not. `mixed` is inference: eight adapters in one batch. A Llama without
padding runs after `causal`, except with a prefix, whose mask is not causal. `--directory` adds a
real model of that kind. Methods are the lines of `peers.ENTRIES`; those that are not run keep their
figures in `benchmarks/train.json`.

`--device cuda` has models, clock and memory of `gpu.py` instead, and both targets of `lower`;
writes `benchmarks/train-cuda.json`. In bfloat16 losses should agree to 1 %, in float32 to 1e-4.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "8" if "cuda" in sys.argv else "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import gpu
import torch
from core import cpu, interleaved, resident, summary
from peers import BASES, ENTRIES, Base, match, peer, real
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.blocks.substitutes import watched

SAVED = {"lora": 0.45, "dora": 0.3}
"""What `budget` may keep for the backward pass, of what PEFT keeps."""

Step = Callable[[], float]


def recipe(method: str, base: Base, lowering: str = "") -> str:
    causal = "causal{length=512};" if base.causal and method != "prefix_tuning" else ""
    return causal + ENTRIES[method].recipe + lowering


def lowered(base: Base) -> dict[str, str]:
    """Lowered variants by name."""
    on_device = isinstance(base, gpu.DeviceBase)
    return gpu.VARIANTS if on_device else {"lowered": ";lower{target=cpu}"}


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


def saved(module: Any, inputs: dict[str, Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass: distinct storages, without parameters."""
    known = {p.untyped_storage()._cdata for p in module.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def seen(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda t: t), watched(module, seen):
        module(**inputs)
    return sum(storage.nbytes() for storage in found.values())


def variants(
    method: str, base: Base, program: peftfx.Program, layers: int | None
) -> dict[str, Any]:
    """What is timed, by name: module and trained parameters; every one has the same adapter."""
    other = peer(method, base, base.make(layers)).train()
    found: dict[str, Any] = {"peft": (other, [p for p in other.parameters() if p.requires_grad])}
    lowers = ENTRIES[method].lowers
    for name, lowering in {"ours": "", **(lowered(base) if lowers else {})}.items():
        ours = peftfx.run(program, recipe(method, base, lowering)).train()
        match(method, ours, other)
        found[name] = ours.module, ours.trainable_parameters()
        if name == "lowered":
            outlined = peftfx.outline(ours, recompute=True, fuse_loss=True)
            found["recompute"] = outlined, ours.trainable_parameters()
            budget = int(SAVED[method] * saved(other, base.inputs))
            if isinstance(base, gpu.DeviceBase) or saved(outlined, base.inputs) <= budget:
                continue
            within = peftfx.outline(ours, recompute=True, fuse_loss=True)
            within.peftfx_outlined.checkpoint(budget, base.inputs)
            found["budget"] = within, ours.trainable_parameters()
    if lowers and getattr(base, "dtype", torch.float32) != torch.float32:
        narrow = peer(method, base, base.make(layers), autocast_adapter_dtype=False).train()
        for own, like in zip(narrow.parameters(), other.parameters(), strict=True):
            own.data.copy_(like.data)
        found["peft 16-bit"] = narrow, [p for p in narrow.parameters() if p.requires_grad]
    return found


@contextlib.contextmanager
def undone(parameters: list[nn.Parameter]) -> Generator[None]:
    """Gives parameters their values back."""
    before = [p.detach().clone() for p in parameters]
    yield
    for parameter, value in zip(parameters, before, strict=True):
        parameter.data.copy_(value)


def losses(step: Step, parameters: list[nn.Parameter]) -> list[float]:
    """Of three steps, which are then undone."""
    with undone(parameters):
        return [step() for _ in range(3)]


def measured(made: dict[str, Any], base: Base, rounds: int, compiled: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    steps = {
        n: stepping(torch.compile(module) if compiled else module, parameters, base.inputs)
        for n, (module, parameters) in made.items()
    }
    curves = {n: losses(step, made[n][1]) for n, step in steps.items()}
    theirs = curves["peft"]
    state = {n: 2 * sum(p.nbytes for p in parameters) for n, (_, parameters) in made.items()}
    on_device = isinstance(base, gpu.DeviceBase)
    clock, most = (gpu.seconds, gpu.peak) if on_device else (cpu, peak)
    kept = {} if compiled else {n: saved(m, base.inputs) for n, (m, _) in made.items()}
    with undone([p for _, parameters in made.values() for p in parameters]):
        held = {n: most(step) + state[n] for n, step in steps.items()}
        times = interleaved({n: (lambda s=s: clock(s)) for n, s in steps.items()}, rounds)
    ours = [n for n in made if n != "peft"]
    return {
        "step [s]": summary(times, "peft"),
        "peak [MB]": megabytes(held),
        **({"saved [MB]": megabytes(kept)} if kept else {}),
        "largest relative difference of three losses": max(
            abs(a / b - 1) for n in ours for a, b in zip(curves[n], theirs, strict=True)
        ),
    }


def mixed(base: Base, program: peftfx.Program, rounds: int, layers: int | None) -> dict[str, Any]:
    """A forward pass in which every row has its own of eight LoRAs, and of one that is folded."""
    names = [f"a{index}" for index in range(8)]
    rows = len(base.inputs["input_ids"])
    text, inputs = ENTRIES["lora"].recipe, base.inputs
    one = peftfx.run(program, text)
    each = [text.replace("lora{", f"lora{{name={n},") for n in names]
    bank = peftfx.run(program, ";".join((*each, "bank")))
    lowered = peftfx.run(bank, "lower")
    other: Any = peer("lora", base, base.make(layers), adapter_name=names[0])
    for name in names[1:]:
        other.add_adapter(name, other.peft_config[names[0]])
    ids, own = torch.arange(rows) % 8, [names[i % 8] for i in range(rows)]
    folded = peftfx.run(one, "fold")
    for module in (other, bank, lowered, folded):
        module.eval()
    calls: dict[str, Callable[[], object]] = {
        "peft": lambda: other(**inputs, adapter_names=own),
        "bank": lambda: bank(**inputs, adapter=ids),
        "lowered": lambda: lowered(**inputs, adapter=ids),
        "one, folded": lambda: folded(**inputs),
    }
    with torch.no_grad():
        times = interleaved({n: (lambda c=c: cpu(c)) for n, c in calls.items()}, rounds)
    return {"forward [s]": summary(times, "peft")}


def megabytes(held: dict[str, int]) -> dict[str, float]:
    """With ratios to PEFT's."""
    ratios = {f"{n}/peft": round(b / held["peft"], 3) for n, b in held.items() if n != "peft"}
    return {n: round(b / 1e6, 1) for n, b in held.items()} | ratios


def rss(base: Base, method: str, variant: str, layers: int | None) -> dict[str, int]:
    """MB that training adds to a loaded model, and all of the process (one a variant)."""
    program = peftfx.capture(
        base.make(layers).requires_grad_(False), kwargs=base.inputs, cache=True
    )
    module, parameters = variants(method, base, program, layers)[variant]
    step = stepping(module, parameters, base.inputs)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    for _ in range(3):
        step()
    return {"training": resident("VmHWM") - before, "process": resident("VmHWM")}


def all_rss(name: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    same = [*["--quick"] * options.quick]
    if options.directory:
        same += ["--directory", str(options.directory)]
    variants = ("peft", "ours", "lowered", "recompute")
    for variant in variants:
        command = [sys.executable, __file__, "--rss", name, method, variant, *same]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[variant] = json.loads(done.stdout.splitlines()[-1])
    for variant in variants[1:]:
        pairs = ((k, found[variant][k], v) for k, v in found["peft"].items())
        found[f"{variant}/peft"] = {k: round(mine / v, 3) for k, mine, v in pairs}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two layers, one round")
    parser.add_argument("--methods", nargs="*", default=list(ENTRIES))
    parser.add_argument("--models", nargs="*", help="words of their names; default all")
    parser.add_argument("--modes", nargs="*", default=["eager", "compiled", "rss", "mixed"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--directory", type=Path, help="of a real model of Llama's kind")
    parser.add_argument("--rss", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    layers, rounds = (2, 1) if options.quick else (None, options.rounds)
    on_device = options.device == "cuda"
    if not on_device:
        torch.set_num_threads(1)
    bases: dict[str, Any] = gpu.bases() if on_device else BASES
    if options.directory:
        bases = bases | real(options.directory)
    if options.rss:
        name, method, variant = options.rss
        print(json.dumps(rss(bases[name], method, variant, layers)))
        return
    out = options.out or Path(__file__).with_name("train-cuda.json" if on_device else "train.json")
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    results |= {
        "environment": gpu.environment() if on_device else
        f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores, "
        f"1 thread, Python {platform.python_version()}, torch {torch.__version__}, CPU seconds"
    }  # fmt: skip
    for name, base in bases.items():
        if options.models and not any(word in name for word in options.models):
            continue
        found: dict[str, Any] = results.setdefault(name, {})
        model = base.make(layers).requires_grad_(False)
        example = getattr(base, "example", base.inputs)
        program = peftfx.capture(model, kwargs=example, cache=True)
        print(name, "captured", flush=True)
        if "mixed" in options.modes and not on_device and "lora" in options.methods:
            row = mixed(base, program, rounds, layers)
            found["eight adapters in one batch"] = row
            print(name, json.dumps(row), flush=True)
        for method in options.methods:
            modes = [m for m in options.modes if m in timed(base, method)]
            made = variants(method, base, program, layers) if modes else {}
            for mode in modes:
                row = measured(made, base, rounds, mode == "compiled")
                found.setdefault(method, {})[mode] = row
                print(name, method, mode, json.dumps(row), flush=True)
            if "rss" in options.modes and ENTRIES[method].lowers and not on_device:
                row = all_rss(name, method, options)
                found.setdefault(method, {})["resident memory [MB]"] = row
                print(name, method, json.dumps(row), flush=True)
            if not options.quick:
                out.write_text(json.dumps(results, indent=1) + "\n")


def timed(base: Base, method: str) -> list[str]:
    """In which modes a method is timed."""
    if not isinstance(base, gpu.DeviceBase):
        return ["eager", "compiled"]
    chosen = {"eager": base.methods, "compiled": base.compiled}
    return [mode for mode, methods in chosen.items() if method in methods]


if __name__ == "__main__":
    main()
