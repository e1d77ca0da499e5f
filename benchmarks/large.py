"""Figures for models larger than memory: `python benchmarks/large.py`.

A 7-billion-parameter Llama configuration captured on meta and adapted; a fold that streams
through shards; the capture cache. One process a figure (so that peak memory is its own), one
thread, CPU time. Writes `benchmarks/large.json` with the environment line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

import peftfx

MIB = 2**20
EVERYWHERE = "lora{rank=8,where=linear and not head}"


def cpu(action: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.process_time()
    result = action()
    return round(time.process_time() - begun, 3), result


def peak() -> float:
    """Peak resident memory of this process, MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def hollow_llama(layers: int, width: int, inner: int, vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=width // 128,
        num_key_value_heads=width // 128, max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def seven_billion() -> nn.Module:
    return hollow_llama(32, 4096, 11008, 32000)


def minilm() -> nn.Module:
    from transformers import AutoModel
    from transformers.utils import logging

    from peftfx.demo.encoder import model_directory

    logging.disable_progress_bar()
    loaded: Any = AutoModel.from_pretrained(model_directory())
    return loaded.eval()


def inputs() -> dict[str, Tensor]:
    ids = torch.arange(2 * 16).view(2, 16)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def capture_figures(_: Path) -> dict[str, Any]:
    model = seven_billion()
    before = peak()
    captured, program = cpu(lambda: peftfx.capture(model, kwargs=inputs()))
    inserted, adapted = cpu(lambda: peftfx.run(program, f"{EVERYWHERE};ia3"))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "nodes": len(program.module.graph.nodes), "sites": len(program.sites),
        "capture seconds": captured, "lora and ia3 seconds": inserted,
        "trainable": sum(p.numel() for p in adapted.trainable_parameters()),
        "peak MiB": peak(), "of it before capture MiB": before,
    }  # fmt: skip


def cache_figures(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, build in (("MiniLM", minilm), ("Llama 7B on meta", seven_billion)):
        first, second = build(), build()
        cpu(lambda m=first: peftfx.capture(m, kwargs=inputs()))  # imports and warm-up
        traced, one = cpu(lambda m=first: peftfx.capture(m, kwargs=inputs()))
        one = peftfx.capture(first, kwargs=inputs(), cache=directory)
        recalled, two = cpu(lambda m=second: peftfx.capture(m, kwargs=inputs(), cache=directory))
        found[name] = {
            "traced seconds": traced, "recalled seconds": recalled, "cache": two.cached,
            "times faster": round(traced / recalled, 1),
            "same text and sites": one.text() == two.text() and one.sites == two.sites,
        }  # fmt: skip
    return found


def write_shards(model: nn.Module, directory: Path, limit: int) -> None:
    """Random bfloat16 weights, one shard in memory at a time."""
    import safetensors.torch

    groups: list[list[str]] = [[]]
    size = 0
    state = model.state_dict()
    for name, tensor in state.items():
        if size + tensor.nbytes > limit and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    generator = torch.Generator().manual_seed(0)
    listed: dict[str, str] = {}
    for index, names in enumerate(groups):
        file = f"model-{index + 1:05}-of-{len(groups):05}.safetensors"
        tensors = {
            n: torch.randn(state[n].shape, generator=generator).mul_(0.02).to(state[n].dtype)
            for n in names
        }
        safetensors.torch.save_file(tensors, directory / file)
        listed |= dict.fromkeys(names, file)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in state.values())},
        "weight_map": listed,
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def medium() -> nn.Module:
    return hollow_llama(12, 2048, 5632, 32000)


def make_figures(directory: Path) -> dict[str, Any]:
    """Writes the checkpoint and an adapter trained on it, for the fold below."""
    (directory / "base").mkdir()
    model = medium()
    write_shards(model, directory / "base", 300 * MIB)
    program = peftfx.run(peftfx.capture(model, kwargs=inputs()), EVERYWHERE)
    program = peftfx.load_weights(program, directory / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in program.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).mul_(0.01))
    peftfx.save(program, directory / "adapter")
    return {}


def fold_figures(directory: Path) -> dict[str, Any]:
    program = peftfx.capture(medium(), kwargs=inputs())
    before = peak()
    seconds, done = cpu(
        lambda: peftfx.fold_checkpoint(
            program, directory / "base", directory / "folded", adapter=directory / "adapter"
        )
    )
    sizes = [p.stat().st_size for p in (directory / "folded").glob("*.safetensors")]
    adapter = sum(p.stat().st_size for p in (directory / "adapter").iterdir())
    return {
        "checkpoint MiB": round(sum(sizes) / MIB), "shards": len(sizes),
        "largest shard MiB": round(max(sizes) / MIB), "adapter MiB": round(adapter / MIB, 1),
        "tensors changed": len(done.changed), "delta lost": round(done.lost, 4),
        "fold seconds": seconds, "peak MiB": peak(), "of it before the fold MiB": before,
        "peak of the fold MiB": round(peak() - before, 1),
    }  # fmt: skip


FIGURES = {
    "capture": capture_figures, "cache": cache_figures, "make": make_figures, "fold": fold_figures,
}  # fmt: skip


def environment() -> str:
    return (
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, "
        f"{os.cpu_count()} cores, one thread, CPU seconds"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figure", nargs="?", choices=FIGURES)
    parser.add_argument("directory", nargs="?", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.figure:
        print(json.dumps(FIGURES[options.figure](options.directory)))
        return
    report: dict[str, Any] = {"environment": environment()}
    with tempfile.TemporaryDirectory() as directory:
        for name in FIGURES:
            command = [sys.executable, "-W", "ignore", __file__, name, directory]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            report[name] = json.loads(done.stdout.splitlines()[-1])
            if report[name]:
                print(name, json.dumps(report[name], indent=1))
    del report["make"]
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
