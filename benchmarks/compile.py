"""What torch.compile makes of every method: `python -m benchmarks.compile` -> compile.json.

Each recipe trains three steps (controllers included) at three batch and sequence sizes through
the default backend, beside the uncompiled program. Graph breaks and graphs are counted by
`torch._dynamo.explain`, compilations by the graphs that reach the backend; seconds are CPU seconds
of this process and its compilers. `--only lora,dora` measures some recipes and keeps the others'
figures.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

import peftfx
from peftfx.demo.encoder import load_model
from tests.models import Decoder, batch, bert, randomise
from tests.recipes import METHODS
from tests.test_compile import inputs, made, train

FILE = Path(__file__).with_suffix(".json")
EXTRA = ("bank", "lower")


def seconds() -> float:
    usage = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def breaks(module: nn.Module, given: dict[str, Any]) -> dict[str, int]:
    """Graph breaks and graphs of one forward."""
    torch._dynamo.reset()
    found = torch._dynamo.explain(module)(**given)
    return {"breaks": found.graph_break_count, "graphs": found.graph_count}


def compiled(program: peftfx.Program) -> dict[str, Any]:
    """Figures of one program; the error is the largest of losses and first gradients, relative."""
    result: dict[str, Any] = breaks(program.module, inputs(program, 0))
    torch._dynamo.reset()
    counters.clear()
    plain = program.fork()
    want = train(plain, plain.module)
    forward = torch.compile(program.module, fullgraph=True, dynamic=True)
    start = seconds()
    got = train(program, forward)
    result["recompilations"] = counters["stats"]["unique_graphs"] - 1
    result["compile_seconds"] = round(seconds() - start, 1)
    scale = max((float(g.abs().max()) for g in want[1].values()), default=1.0)
    gaps = [float((a - b).abs() / b.abs()) for a, b in zip(got[0], want[0], strict=True)]
    gaps += [float((got[1][n] - g).abs().max()) / scale for n, g in want[1].items()]
    result["error"] = float(f"{max(gaps):.1e}")
    return result


def still(program: peftfx.Program) -> peftfx.Program:
    """Without the model's own dropout, whose random numbers differ when it is compiled."""
    for module in program.module.modules():
        for name in ("p", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return program


def peft_dora() -> dict[str, Any]:
    """Hugging Face PEFT's DoRA at the places of ours, in two layers of BERT's shape."""
    from peft import LoraConfig, get_peft_model

    where = r".*(query|key|value|intermediate\.dense|\d\.output\.dense)"
    config = LoraConfig(r=2, use_dora=True, target_modules=where)
    return breaks(get_peft_model(bert().train(), config), batch())


def cases() -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured, by name."""
    torch.manual_seed(0)
    base = peftfx.capture(Decoder(layers=2).eval(), kwargs=batch())

    def small(name: str) -> dict[str, Any]:
        return compiled(made(base, name))

    def mini(name: str) -> dict[str, Any]:
        program = peftfx.capture(load_model(), kwargs=batch())
        return compiled(still(randomise(peftfx.run(program, name), 0.02)))

    def ours() -> dict[str, Any]:
        program = peftfx.run(peftfx.capture(bert(), kwargs=batch()), "dora{rank=2}").train()
        return breaks(program.module, inputs(program, 0))

    found = {f"decoder {n}": lambda n=n: small(n) for n in (*EXTRA, *METHODS)}
    found |= {f"MiniLM {n}": lambda n=n: mini(n) for n in ("lora", "dora")}
    return {"bert dora": ours, "bert dora, PEFT": peft_dora, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names of cases, separated by commas")
    only = [n.strip() for n in parser.parse_args().only.split(",") if n.strip()]
    torch.set_num_threads(1)
    inductor.fallback_random = True
    data = json.loads(FILE.read_text()) if FILE.exists() else {}
    machine = f"{platform.machine()}, one thread, torch {torch.__version__}"
    for name, measure in cases().items():
        if only and not any(o in name for o in only):
            continue
        data[name] = {**measure(), "machine": machine}
        print(name, data[name], flush=True)
        FILE.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
