"""Figures for every architecture of the zoo: `python -m benchmarks.zoo`.

Capture time, nodes, sites against the hand-written expectations, and the methods that work with
default options beside Hugging Face PEFT's default configurations on the same models; then the
cost of the captured module beside eager. One process, one thread, CPU time; overheads from
interleaved rotated rounds, with the outputs' equality beside them. Writes `benchmarks/zoo.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import RewriteError
from peftfx.rewriter.measure.compare import floats
from tests.expect import check
from tests.recipes import RECIPES
from tests.test_zoo import EXPECTED
from tests.zoo import ZOO

METHODS = ("lora", "ia3", "prefix_tuning", "prompt_tuning")
ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="architectures, separated by commas")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = [n for n in options.only.split(",") if n] or list(ZOO)
    peftfx.capture(ZOO["mlp"].build(), kwargs=ZOO["mlp"].inputs(3, 9))  # imports and warm-up
    table = {name: architecture(name) for name in names}
    counts = {
        side: sum(row[side][m] == "works" for row in table.values() for m in METHODS)
        for side in ("ours", "peft")
    }
    result = {
        "environment": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores, "
        f"1 thread, torch {torch.__version__}, python {platform.python_version()}",
        "architectures": table,
        "default configurations": {"tried": len(table) * len(METHODS), **counts},
        "overhead": {
            "minilm, 8 x 64": overhead("minilm", (8, 64), options.rounds, 1),
            "tiny bert, 2 x 8": overhead("bert", (2, 8), options.rounds, 40),
            "tiny llama, 2 x 8, padded": overhead("llama", (2, 8), options.rounds, 40, pad=2),
            # Eager looks at the mask's values and leaves it out where nothing is padded.
            "tiny llama, 2 x 8": overhead("llama", (2, 8), options.rounds, 40),
            "tiny llama, 2 x 8, causal": overhead(
                "llama", (2, 8), options.rounds, 40, passes="causal"
            ),
        },
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "architectures"}, indent=1))


def architecture(name: str) -> dict[str, Any]:
    """All figures of one architecture but its overhead."""
    entry = ZOO[name]
    inputs = entry.inputs(3, 9)
    model = entry.build()
    begun = time.process_time()
    program = peftfx.capture(model, kwargs=inputs)
    seconds = time.process_time() - begun
    row: dict[str, Any] = {
        "capture_seconds": round(seconds, 2),
        "nodes": len(program.module.graph.nodes),
        "sites": len(program.sites),
        "as_expected": _as_expected(name, program),
        "ours": {m: _ours(program, m, inputs) for m in METHODS},
        "peft": {m: _peft(entry.build(), m, inputs) for m in METHODS},
    }
    print(f"{name}: {json.dumps(row)}", flush=True)
    return row


def _as_expected(name: str, program: peftfx.Program) -> bool:
    try:
        check(program, EXPECTED[name])
    except AssertionError:
        return False
    return True


def _ours(program: peftfx.Program, method: str, inputs: dict[str, Tensor]) -> str:
    try:
        edited = peftfx.run(program, RECIPES[method])
    except RewriteError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    _backward(edited(**inputs))
    return "works"


def _peft(model: Any, method: str, inputs: dict[str, Tensor]) -> str:
    import peft

    task = _task(type(model).__name__)
    configs: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(),
        "ia3": lambda: peft.IA3Config(),
        "prefix_tuning": lambda: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=5),
        "prompt_tuning": lambda: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4),
    }
    try:
        adapted: Any = peft.get_peft_model(model, configs[method]())
        _backward(adapted(**inputs))
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is the figure
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return "works"


def _task(kind: str) -> Any:
    for part, task in (
        ("ConditionalGeneration", "SEQ_2_SEQ_LM"), ("CausalLM", "CAUSAL_LM"),
        ("LMHead", "CAUSAL_LM"), ("SequenceClassification", "SEQ_CLS"),
    ):  # fmt: skip
        if part in kind and not kind.startswith("Llava"):
            return task
    return "CAUSAL_LM" if kind.startswith("Llava") else "FEATURE_EXTRACTION"


def _backward(output: Any) -> None:
    sum((t.float().pow(2).mean() for t in floats(output)), torch.zeros(())).backward()


def overhead(
    name: str, size: tuple[int, int], rounds: int, repeats: int, pad: int = 0, passes: str = ""
) -> dict[str, Any]:
    """The captured module's CPU time over eager's, medians of per-round ratios.

    Args:
        size: batch and tokens; the last `pad` tokens of the first row are padding.
        passes: run on the captured program first.
    """
    model: Any = ZOO[name].build()
    inputs = ZOO[name].inputs(*size)
    if pad:
        inputs["attention_mask"][0, -pad:] = 0
    program = peftfx.capture(model, kwargs=ZOO[name].inputs(3, 9))
    program = peftfx.run(program, passes) if passes else program
    module = program.module
    given = {id(model): inputs, id(module): {n: inputs[n] for n in program.spec.names}}
    gap = max(
        float((a - b).detach().abs().max())
        for a, b in zip(floats(model(**inputs)), floats(module(**given[id(module)])), strict=True)
    )

    def timed(target: Any, backward: bool) -> float:
        begun = time.process_time()
        for _ in range(repeats):
            if backward:
                _backward(target(**given[id(target)]))
                target.zero_grad()
            else:
                with torch.no_grad():
                    target(**given[id(target)])
        return time.process_time() - begun

    found: dict[str, Any] = {"largest difference": gap}
    for kind, backward in (("forward", False), ("forward and backward", True)):
        sides = [model, module]
        ratios: list[float] = []
        for index in range(rounds + 1):
            order = sides[index % 2 :] + sides[: index % 2]
            times = {id(side): timed(side, backward) for side in order}
            if index:  # the first round warms up
                ratios.append(times[id(module)] / times[id(model)])
        found[kind] = {
            "ratio": round(statistics.median(ratios), 3),
            "from": round(min(ratios), 3),
            "to": round(max(ratios), 3),
        }
    return found


if __name__ == "__main__":
    main()
