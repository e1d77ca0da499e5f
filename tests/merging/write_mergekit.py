"""Writes what mergekit makes of three small checkpoints: `mergekit.safetensors`, `mergekit.json`.

    pip install mergekit==0.1.5                    # in an environment of its own
    python tests/merging/write_mergekit.py

Where mergekit draws random numbers, it does so here from a seed for each tensor, as `peftfx merge`
does; everything else is mergekit as it is.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import generalized_task_arithmetic as task
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
BASE: dict[str, Any] = {"base_model": "base"}


def models(*parameters: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"model": m, "parameters": p} for m, p in zip("ab", parameters, strict=False)]


WEIGHTS = models({"weight": 0.7}, {"weight": 0.5})
SPARSE = models({"weight": 1.0, "density": 0.5}, {"weight": 0.4, "density": [0.9, 0.3]})
MERGES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": WEIGHTS},
    "linear_sum": {
        "merge_method": "linear", "models": models({"weight": 0.7}, {"weight": -0.3}),
        "parameters": {"normalize": False},
    },
    "linear_bf16": {"merge_method": "linear", "models": WEIGHTS, "out_dtype": "bfloat16"},
    "task_arithmetic": {
        **BASE, "merge_method": "task_arithmetic", "parameters": {"lambda": 0.8},
        "models": models(
            {"weight": [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.6}]}, {"weight": -0.5}
        ),
    },
    "ties": {**BASE, "merge_method": "ties", "models": SPARSE},
    "ties_sum": {
        **BASE, "merge_method": "ties", "models": SPARSE,
        "parameters": {"normalize": False, "lambda": 1.5},
    },
    "dare_linear": {**BASE, "merge_method": "dare_linear", "models": SPARSE},
    "dare_ties": {
        **BASE, "merge_method": "dare_ties", "models": SPARSE, "parameters": {"rescale": False},
    },
    "breadcrumbs": {
        **BASE, "merge_method": "breadcrumbs",
        "models": models({"weight": 1.0, "density": 0.5, "gamma": 0.2}, {"weight": 0.4}),
    },
    "breadcrumbs_ties": {
        **BASE, "merge_method": "breadcrumbs_ties", "models": SPARSE, "parameters": {"gamma": 0.1},
    },
    "della": {
        **BASE, "merge_method": "della", "models": SPARSE, "parameters": {"epsilon": 0.05},
    },
    "della_linear": {
        **BASE, "merge_method": "della_linear", "models": SPARSE, "parameters": {"epsilon": 0.05},
    },
    "slerp": {
        **BASE, "merge_method": "slerp",
        "slices": [{"sources": [
            {"model": "base", "layer_range": [0, 3]}, {"model": "a", "layer_range": [0, 3]},
        ]}],
        "parameters": {"t": [
            {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"value": 0.5},
        ]},
    },
    "stacked": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2]}]},
            {"sources": [{"model": "b", "layer_range": [1, 3], "parameters": {"scale": 0.5}}]},
        ],
    },
    "stacked_linear": {
        "merge_method": "linear", "parameters": {"weight": 0.5},
        "slices": [
            {"sources": [
                {"model": "a", "layer_range": [0, 2], "parameters": {"weight": [0.2, 0.8]}},
                {"model": "b", "layer_range": [1, 3]},
            ]},
            {"sources": [
                {"model": "base", "layer_range": [2, 3]}, {"model": "a", "layer_range": [0, 1]},
            ], "parameters": {"weight": [{"filter": "mlp", "value": [0.3, 0.9]}, {"value": 0.4}]}},
        ],
    },
    "stacked_ties": {
        **BASE, "merge_method": "ties", "parameters": {"weight": 0.7, "density": 0.5},
        "slices": [
            {"sources": [
                {"model": "base", "layer_range": [0, 3]}, {"model": "a", "layer_range": [0, 3]},
            ]},
            {"sources": [
                {"model": "base", "layer_range": [1, 2]}, {"model": "b", "layer_range": [2, 3]},
            ]},
        ],
    },
}  # fmt: skip
"""Name -> configuration, of the models base, a and b."""


def build(folder: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for name in ("base", "a", "b"):
        model.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.05)


def main() -> None:
    plain = task.GeneralizedTaskArithmeticMerge.merge_group

    def seeded(self: Any, group: Any, /, **parameters: Any) -> torch.Tensor:
        torch.manual_seed(zlib.crc32(f"0 {group.metadata.name}".encode()))
        return plain(self, group, **parameters)

    task.GeneralizedTaskArithmeticMerge.merge_group = seeded
    found: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        build(folder)
        for name in ("base", "a", "b"):
            held = load_file(folder / name / "model.safetensors")
            found |= {f"{name}/{n}": t for n, t in held.items()}
        for name, config in MERGES.items():
            text = yaml.safe_dump(config)
            for model in ("base", "a", "b"):
                text = text.replace(f"model: {model}\n", f"model: {folder / model}\n")
            options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False)
            run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)),
                      str(folder / name), options)  # fmt: skip
            for file in (folder / name).glob("*.safetensors"):
                found |= {f"{name}/{n}": t for n, t in load_file(file).items()}
        settings = json.loads((folder / "base" / "config.json").read_text())
    save_file(dict(sorted(found.items())), HERE / "mergekit.safetensors")
    about = {"mergekit": "0.1.5", "merges": MERGES, "model": settings}
    (HERE / "mergekit.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
