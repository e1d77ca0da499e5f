"""Adapters of mlx-lm: its keys and its scale, against the formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from peftfx.exporters.formats import format_of, load_adapter
from peftfx.rewriter.errors import ArtifactError

from .peft_cases import base, inputs, output, program
from .test_hf_peft import near

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def saved(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "adapters.safetensors")
    return folder


def factors(name: str, rank: int = 3) -> dict[str, Tensor]:
    out, size = base("llama").get_submodule(name).weight.shape
    torch.manual_seed(rank)
    return {
        f"{name}.lora_a": torch.randn(size, rank),
        f"{name}.lora_b": torch.randn(rank, out) * 0.1,
    }


@pytest.mark.parametrize("scale", [None, 2.5])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_factors(kind: str, scale: float | None, tmp_path: Path) -> None:
    tensors = factors(QUERY) | factors(DOWN, 2)
    model = base("llama")
    with torch.no_grad():
        for name in (QUERY, DOWN):
            weight = model.get_submodule(name).weight
            a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
            weight += (a @ b).T * (20.0 if scale is None else scale)
            if kind == "dora":
                m = tensors[f"{name}.m"] = torch.rand(len(weight)) + 0.5
                weight *= m[:, None] / weight.norm(dim=1, keepdim=True)
        want = output(model(**inputs("llama")))
    parameters = {"rank": 3, "dropout": 0.0} | ({} if scale is None else {"scale": scale})
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters}
    folder = saved(tmp_path / "a", config, tensors)
    assert format_of(folder) == "mlx"
    near(output(load_adapter(program("llama"), folder)(**inputs("llama"))), want)


def test_whole_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    norm = torch.rand(32) + 0.5
    folder = saved(tmp_path / "a", {"fine_tune_type": "full"}, {"model.norm.weight": norm})
    model = base("llama")
    with torch.no_grad():
        model.model.norm.weight.copy_(norm)
        want = output(model(**inputs("llama")))
    near(output(load_adapter(program("llama"), folder)(**inputs("llama"))), want)


@pytest.mark.parametrize(
    ("config", "change", "text"),
    [
        ({"lora_parameters": {"alpha": 16}}, {}, "knows no alpha"),
        ({"fine_tune_type": "odd"}, {}, "fine_tune_type='odd' is not read"),
        ({}, {"model.layers.9.self_attn.q_proj.lora_a": torch.zeros(2, 2)}, "alone"),
        ({}, {"model.extra": torch.zeros(2)}, "not understood"),
    ],
)
def test_a_bad_adapter_is_refused(
    config: dict[str, Any], change: dict[str, Tensor], text: str, tmp_path: Path
) -> None:
    given = {"fine_tune_type": "lora", "lora_parameters": {"scale": 1.0}} | config
    folder = saved(tmp_path / "a", given, factors(QUERY) | change)
    with pytest.raises(ArtifactError, match=text):
        load_adapter(program("llama"), folder)
