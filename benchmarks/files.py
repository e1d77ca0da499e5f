"""Adapters' files beside Hugging Face PEFT, on a real language model: `--model DIRECTORY`.

    python -m benchmarks.files --model DIRECTORY

LoRA of rank 8 on all linears but the head. One thread, CPU seconds with garbage left where it is
meanwhile, variants in turns, medians; `least` is the smallest, which a busy machine disturbs least.
Conversion is beside reading and writing the same tensors with safetensors alone. Writes
`benchmarks/files.json`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import peftfx
from peftfx.exporters.formats import convert

from .compiler import LINEARS, cpu, ids, language_model, moved

WEIGHTS = "adapter_model.safetensors"
AIMS = {"read": 2.0, "write": 2.0, "convert": 1.5}
"""Of the time of the first variant of a row."""

Prepared = Callable[[], Callable[[], object]]


def measured(row: dict[str, Prepared], rounds: int) -> dict[str, Any]:
    """Medians and least CPU seconds in rotated order, and their ratios to the first variant."""
    names, times = list(row), {n: list[float]() for n in row}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(cpu(row[name]()))
    first = names[0]
    medians = {n: statistics.median(t) for n, t in times.items()}
    least = {n: min(t) for n, t in times.items()}
    return {
        n: {
            "seconds": round(medians[n], 4), "least": round(least[n], 4),
            "ratio": round(medians[n] / medians[first], 2),
            "ratio of least": round(least[n] / least[first], 2),
        }
        for n in names
    }  # fmt: skip


def compared(path: Path, rounds: int, place: Path) -> dict[str, Any]:
    import peft

    model = language_model(path, torch.float32)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS)

    def adapted(**options: Any) -> Any:
        made = peft.get_peft_model(copy.deepcopy(model), config)  # pyright: ignore
        moved(p for p in made.parameters() if p.requires_grad)
        return made

    theirs, source = adapted(), place / "adapter"
    theirs.save_pretrained(str(source))
    base = peftfx.capture(model, kwargs=ids())
    ours = peftfx.load_peft(base, source)
    with torch.no_grad():
        want, got = theirs.eval()(**ids()).logits, ours(**ids()).logits
    difference = float((want - got).abs().max() / want.abs().max())

    def fresh() -> Callable[[], object]:
        held = copy.deepcopy(model)
        return lambda: peft.PeftModel.from_pretrained(held, str(source))

    def tensors() -> None:
        save_file(load_file(source / WEIGHTS), place / "tensors.safetensors")

    def converting(to: str, given: Path | None) -> Prepared:
        return lambda: lambda: convert(source, place / f"as-{to}", to, given)

    formats = ["plain-lora", "kohya", "onnx_adapter"]
    formats += ["gguf"] if importlib.util.find_spec("gguf") else []
    rows: dict[str, dict[str, Prepared]] = {
        "read": {
            "peft": fresh,
            "onto a program": lambda: lambda: peftfx.load_peft(base, source),
        },
        "write": {
            "peft": lambda: lambda: theirs.save_pretrained(str(place / "theirs")),
            "peftfx": lambda: lambda: peftfx.save_peft(ours, place / "ours"),
        },
        "convert": {
            "its tensors alone": lambda: tensors,
            **{f"to {to}, with the base's headers": converting(to, path) for to in formats},
            **{f"to {to}": converting(to, None) for to in formats if to != "gguf"},
        },
    }
    sites = len(load_file(source / WEIGHTS)) // 2
    result: dict[str, Any] = {"sites": sites, "logits, of the largest": difference, "aims": AIMS}
    return result | {name: measured(row, rounds) for name, row in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a directory, of a Llama")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        result = compared(options.model, options.rounds, Path(place))
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    result["load"] = round(os.getloadavg()[0], 1)
    text = json.dumps(result, indent=1, sort_keys=True) + "\n"
    (Path(__file__).parent / "files.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
