"""What the compiler costs beside Hugging Face PEFT, on a real language model: `--model DIRECTORY`.

One thread, CPU seconds with garbage left where it is meanwhile (as timeit does), PEFT and peftfx
in turns, medians. Peak memory is measured in a process of its own. Writes
`benchmarks/compiler.json`; with `--only WORD`, over the parts whose names hold that.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peftfx
from peftfx.rewriter.run.run import apply_plan

from . import core

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT = "lora{rank=8,alpha=16.0,where=linear and not head}"

Row = dict[str, Callable[[], Callable[[], object]]]
"""Variant -> prepares, and gives what is timed."""


def cpu(action: Callable[[], object]) -> float:
    gc.disable()
    try:
        return core.cpu(action)
    finally:
        gc.enable()


def measured(row: Row, rounds: int) -> dict[str, Any]:
    """Median CPU seconds of each variant in rotated order, and their ratios to the first."""
    names, times = list(row), {n: list[float]() for n in row}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(cpu(row[name]()))
    found: dict[str, Any] = {n: round(statistics.median(t), 3) for n, t in times.items()}
    first = found[names[0]] or 1e-9
    return found | {f"{n}/{names[0]}": round(found[n] / first, 1) for n in names[1:]}


def language_model(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return loaded.eval().requires_grad_(False)


def ids() -> dict[str, Tensor]:
    drawn = torch.randint(5, 30000, (2, 16), generator=torch.Generator().manual_seed(1))
    return {"input_ids": drawn, "attention_mask": torch.ones_like(drawn)}


def moved(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def large(path: Path, dtype: torch.dtype, rounds: int, cache: Path) -> dict[str, Any]:
    """Inserting, saving, loading and folding LoRA on all linears but the head."""
    import peft

    model = language_model(path, dtype)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS)
    captured: list[peftfx.Program] = []

    def capture() -> None:
        captured.append(peftfx.capture(model, kwargs=ids(), cache=cache))

    capturing = {"capture": round(cpu(capture), 3), "recalled": round(cpu(capture), 3)}
    base = captured[0]
    (item,) = peftfx.parse(TEXT).passes
    program = peftfx.run(base, item)  # the sizes of the base are tried once
    plan = item.plan(base)

    def adapted() -> Any:
        other = peft.get_peft_model(copy.deepcopy(model), config)  # pyright: ignore
        moved(p for p in other.parameters() if p.requires_grad)
        return other

    moved(program.trainable_parameters())
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours", Path(folder) / "theirs"
        peftfx.save(program, ours)
        other = adapted()
        other.save_pretrained(theirs)
        peftfx.load(model, ours, cache=cache)  # the first time it captures

        def fresh(call: Callable[[Any], object]) -> Callable[[], object]:
            held = copy.deepcopy(model)
            return lambda: call(held)

        rows: dict[str, Row] = {
            "insert": {
                "peft": lambda: fresh(lambda m: peft.get_peft_model(m, config)),
                "checked": lambda: lambda: peftfx.run(base, item),
                "unchecked": lambda: lambda: apply_plan(base, item, plan, check=False),
            },
            "load": {
                "peft": lambda: fresh(lambda m: peft.PeftModel.from_pretrained(m, theirs)),
                "onto a program": lambda: lambda: peftfx.load(base, ours),
                "onto the model, cached": lambda: lambda: peftfx.load(model, ours, cache=cache),
            },
            "save": {
                "peft": lambda: lambda: other.save_pretrained(theirs),
                "peftfx": lambda: lambda: peftfx.save(program, ours),
            },
            "fold": {
                "peft": lambda: adapted().merge_and_unload,
                "checked": lambda: lambda: peftfx.run(program, "fold"),
                "unchecked": lambda: lambda: folded(program),
            },
        }
        return {"capture": capturing} | {n: measured(row, rounds) for n, row in rows.items()}


def folded(program: peftfx.Program) -> peftfx.Program:
    (item,) = peftfx.parse("fold").passes
    return apply_plan(program, item, item.plan(program), check=False)


def many(count: int, cache: Path) -> dict[str, Any]:
    """One adapter after the other on MiniLM, the same in PEFT; loading them, and without one."""
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=core.TARGETS)
    other: Any = peft.get_peft_model(core.model(), config)  # pyright: ignore
    base = peftfx.capture(core.model(), kwargs=core.inputs(2, 16), cache=cache)
    peftfx.run(base, core.TEXT)
    programs, ours, theirs = [base], list[float](), list[float]()
    for index in range(count):
        theirs.append(cpu(lambda i=index: other.add_adapter(f"a{i}", config)))
        text = core.TEXT.replace("}", f",name=a{index}}}")
        ours.append(cpu(lambda t=text: programs.append(peftfx.run(programs[-1], t))))
    program, six = programs[-1], programs[6]
    with tempfile.TemporaryDirectory() as folder:
        peftfx.save(program, folder)
        loading = cpu(lambda: peftfx.load(base, folder))
    removing = cpu(lambda: program.without("a0"))
    return {
        "peft": round(sum(theirs), 3), "peftfx": round(sum(ours), 3),
        "first": round(ours[0], 3), "last": round(ours[-1], 3),
        "load all": round(loading, 3), "without one": round(removing, 3),
        "of six: verify": round(cpu(six.verify), 3),
        "of six: without one": round(cpu(lambda: six.without("a0")), 3),
    }  # fmt: skip


def outlining() -> dict[str, float]:
    """CPU seconds of the whole of `outline` by layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    seconds: dict[str, float] = {}
    for layers in (48, 96):
        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=layers, vocab_size=64,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        program = peftfx.capture(model, kwargs={n: t % 64 for n, t in ids().items()})
        seconds[str(layers)] = round(
            min(cpu(lambda p=program: peftfx.outline(p)) for _ in "123"), 3
        )
    return seconds | {"96/48": round(seconds["96"] / seconds["48"], 2)}


def peak(path: Path, variant: str, cache: Path) -> int:
    """Run in a process of its own: MB that a fold adds to the peak of resident memory."""
    import peft

    model = language_model(path, torch.float32)
    if variant == "peft":
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS)
        other: Any = peft.get_peft_model(model, config)  # pyright: ignore
        moved(p for p in other.parameters() if p.requires_grad)
        fold: Callable[[], object] = other.merge_and_unload
    else:
        program = peftfx.run(peftfx.capture(model, kwargs=ids(), cache=cache), TEXT)
        moved(program.trainable_parameters())
        del model
        fold = lambda: peftfx.run(program, "fold")  # noqa: E731
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = core.resident("VmRSS")
    fold()
    return core.resident("VmHWM") - before


def peaks(path: Path, cache: Path) -> dict[str, int]:
    """`peak` of both variants."""
    command = [sys.executable, "-m", "benchmarks.compiler", "--model", str(path)]
    command += ["--cache", str(cache), "--peak"]
    found: dict[str, int] = {}
    for variant in ("peft", "peftfx"):
        done = subprocess.run([*command, variant], capture_output=True, text=True, check=True)
        found[variant] = int(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="a folder of transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="a word of the parts to measure again")
    parser.add_argument("--peak", choices=("peft", "peftfx"), help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.peak:
        print(peak(options.model, options.peak, options.cache))
        return
    file = Path(__file__).with_suffix(".json")
    results: dict[str, Any] = json.loads(file.read_text()) if options.only else {}
    with tempfile.TemporaryDirectory() as folder:
        cache, model, rounds = Path(folder), options.model, options.rounds
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "135 M parameters, 210 linears, float32 [s]":
                lambda: large(model, torch.float32, rounds, cache),
            "135 M parameters, 210 linears, bfloat16 [s]":
                lambda: large(model, torch.bfloat16, rounds, cache),
            "adapters on MiniLM [s]": lambda: {str(n): many(n, cache) for n in (8, 16)},
            "peak memory added by a fold [MB]": lambda: dict(peaks(model, cache)),
            "outline of 48 and 96 layers [s]": lambda: dict(outlining()),
        }  # fmt: skip
        for name, part in parts.items():
            if options.only in name:
                load = f"load average {os.getloadavg()[0]:.0f}"
                results[name] = {"environment": f"{core.environment()}, {load}"} | part()
                file.write_text(json.dumps(results, indent=1) + "\n")
                print(name, json.dumps(results[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
