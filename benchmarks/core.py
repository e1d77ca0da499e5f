"""Figures of the core on MiniLM, beside Hugging Face PEFT: `make bench`.

One process, one thread, CPU time, variants interleaved in rotated order, medians and per-round
ratios; the outputs' equality is printed beside the times. Peak memory takes one process a
variant. Writes `benchmarks/core.json` with the environment line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

import peftfx
from peftfx.demo.encoder import model_directory

TARGETS = ["query", "key", "value", "dense"]
TEXT = "lora{rank=8,alpha=16.0,where=linear}"
VARIANTS = ("peft", "graph", "lowered")


def model() -> nn.Module:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded: Any = AutoModel.from_pretrained(model_directory())
    return loaded.eval().requires_grad_(False)


def inputs(rows: int = 16, tokens: int = 64) -> dict[str, Tensor]:
    ids = torch.randint(5, 30000, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def capture() -> peftfx.Program:
    return peftfx.capture(model(), kwargs=inputs(2, 16))


def peft_model() -> Any:
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    return peft.get_peft_model(model(), config).eval()  # pyright: ignore[reportArgumentType]


def cpu(action: Callable[[], object]) -> float:
    begun = time.process_time()
    action()
    return time.process_time() - begun


def interleaved(actions: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    names = list(actions)
    times: dict[str, list[float]] = {n: [] for n in names}
    for index in range(rounds + 1):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            seconds = actions[name]()
            if index:
                times[name].append(seconds)
    return times


def summary(times: dict[str, list[float]], base: str) -> dict[str, Any]:
    found: dict[str, Any] = {n: round(statistics.median(t), 4) for n, t in times.items()}
    for name, values in times.items():
        if name != base:
            ratios = [v / b for v, b in zip(values, times[base], strict=True)]
            found[f"{name}/{base}"] = round(statistics.median(ratios), 3)
    return found


def trainable(variant: str) -> tuple[Any, list[nn.Parameter]]:
    """A module and its parameters with the same branch values in every variant."""
    if variant == "peft":
        module = peft_model()
        named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        keys = {
            n.replace("base_model.model.", "").replace(".lora_A.default.weight", ".a")
            .replace(".lora_B.default.weight", ".b"): p for n, p in named.items()
        }  # fmt: skip
    else:
        program = peftfx.run(
            capture(), TEXT + (";lower{target=cpu}" if variant == "lowered" else "")
        )
        program.eval()
        module = program.module
        held = program.named_trainable_parameters()
        keys = {n.removeprefix("peftfx.lora.").replace(".delta.", "."): p for n, p in held.items()}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in sorted(keys):
            keys[name].copy_(torch.randn(keys[name].shape, generator=generator) * 0.02)
    return module, list(keys.values())


def step(module: Any, parameters: list[nn.Parameter], batch: dict[str, Tensor]) -> float:
    for parameter in parameters:
        parameter.grad = None
    loss = module(**batch).last_hidden_state.pow(2).mean()
    loss.backward()
    return float(loss.detach())


def steps(rounds: int) -> dict[str, Any]:
    batch = inputs()
    made = {v: trainable(v) for v in VARIANTS}
    losses = {v: step(*made[v], batch) for v in VARIANTS}
    norms = {v: float(torch.stack([p.grad.norm() for p in made[v][1] if p.grad is not None]).norm())
             for v in VARIANTS}  # fmt: skip
    actions = {v: (lambda v=v: cpu(lambda: step(*made[v], batch))) for v in VARIANTS}
    return {"seconds": summary(interleaved(actions, rounds), "peft"), "loss": losses,
            "gradient norm": norms}  # fmt: skip


def insertion(rounds: int) -> dict[str, Any]:
    import peft

    base = capture()
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    seconds: dict[str, list[float]] = {"plan": [], "fork": [], "edit": [], "check": []}
    item = peftfx.parse(TEXT).passes[0]

    def ours() -> float:
        begun = time.process_time()
        program = peftfx.run(base, item)
        total = time.process_time() - begun
        record = program.history[-1].seconds
        for name, values in seconds.items():
            values.append(record[name])
        return total

    def theirs() -> float:
        fresh: Any = model()
        return cpu(lambda: peft.get_peft_model(fresh, config))

    times = interleaved({"peft": theirs, "peftfx, all of run()": ours}, rounds)
    parts = {n: round(statistics.median(v), 4) for n, v in seconds.items()}
    return {**summary(times, "peft"), "parts of run() [wall s]": parts,
            "pure insertion (plan + edit)": round(parts["plan"] + parts["edit"], 4)}  # fmt: skip


def folding(rounds: int) -> dict[str, Any]:
    program, _ = trainable_program()
    batch = inputs(4, 16)
    want = program(**batch).last_hidden_state

    def theirs() -> float:
        module = trainable("peft")[0]
        return cpu(module.merge_and_unload)

    edit: list[float] = []

    def ours() -> float:
        begun = time.process_time()
        folded = peftfx.run(program, "fold")
        total = time.process_time() - begun
        edit.append(folded.history[-1].seconds["edit"])
        return total

    times = interleaved({"peft": theirs, "peftfx, all of run()": ours}, rounds)
    folded = peftfx.run(program, "fold")
    gap = (folded(**batch).last_hidden_state - want).abs().max() / want.abs().max()
    return {**summary(times, "peft"), "pure fold [wall s]": round(statistics.median(edit), 4),
            "error": float(gap)}  # fmt: skip


def trainable_program() -> tuple[peftfx.Program, list[nn.Parameter]]:
    program = peftfx.run(capture(), TEXT)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in program.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return program, program.trainable_parameters()


def memory(variant: str) -> dict[str, int]:
    """Run in a process of its own: peak resident memory of three training steps with AdamW."""
    module, parameters = trainable(variant)
    before = resident("VmRSS")
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for _ in range(3):
        step(module, parameters, inputs())
        optimizer.step()
    return {"process": resident("VmHWM"), "training": resident("VmHWM") - before}


def resident(field: str) -> int:
    """MB of this process: `VmRSS` now, `VmHWM` at most (`ru_maxrss` would inherit the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(int(next(n for n in lines if n.startswith(field)).split()[1]) / 1024)


def environment() -> str:
    """The machine class and versions."""
    return (
        f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores, 1 thread, Python "
        f"{platform.python_version()}, torch {torch.__version__}, CPU seconds"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", choices=VARIANTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.memory:
        print(json.dumps(memory(options.memory)))
        return
    rounds = options.rounds
    captures = [cpu(capture) for _ in range(3)]
    peaks: dict[str, dict[str, int]] = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--memory", variant]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[variant] = json.loads(done.stdout.splitlines()[-1])
    with tempfile.TemporaryDirectory() as folder:
        report = peftfx.export_onnx(trainable_program()[0], Path(folder) / "m.onnx")
    results = {
        "environment": environment(),
        "capture of MiniLM [s], model loading included": round(statistics.median(captures), 2),
        "inserting LoRA on all linears [s]": insertion(rounds),
        "folding [s]": folding(rounds),
        "training step, 16 x 64 tokens": steps(rounds),
        "peak memory [MB]": {**peaks, **{
            f"{v}/peft": {k: round(peaks[v][k] / peaks["peft"][k], 3) for k in peaks[v]}
            for v in VARIANTS[1:]}},
        "ONNX parity, of the largest output": report.error,
    }  # fmt: skip
    text = json.dumps(results, indent=1)
    Path(__file__).with_suffix(".json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
