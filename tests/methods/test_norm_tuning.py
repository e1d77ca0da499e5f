"""Norm tuning against the plain model, and both ways with PEFT's LN_TUNING."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftfx
from peftfx.rewriter.errors import SelectorError

from ..models import batch, first, llama, randomise
from .common import check


def test_norm_tuning_equals_its_reference(hand: Any) -> None:
    name, model, base = hand
    program = randomise(peftfx.run(base, "norm_tuning"))
    values = {n: p.detach() for n, p in program.named_trainable_parameters().items()}
    width, scales = 32, 5
    assert sum(v.numel() for v in values.values()) == width * scales * (
        2 if name == "encoder" else 1
    )
    other = copy.deepcopy(model)
    assert not other.load_state_dict(values, strict=False).unexpected_keys
    inputs = batch(4, 11, pad=3)
    check(program, base, other(**inputs), inputs)
    scale = peftfx.run(base, "norm_tuning{bias=false}").named_trainable_parameters()
    assert set(scale) == {n for n in values if n.endswith("weight")}


def test_pefts_files_both_ways(tmp_path: Path) -> None:
    model = llama().eval()
    config = peft.LNTuningConfig(target_modules=["input_layernorm", "norm"])
    theirs: Any = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    base = peftfx.capture(model, kwargs=batch())
    loaded = peftfx.load_peft(base, tmp_path / "theirs")
    want = first(theirs(**batch()))
    torch.testing.assert_close(first(loaded(**batch())), want, rtol=1e-5, atol=1e-5)

    recipe = peftfx.from_peft_config(config)
    assert str(recipe) == "norm_tuning{where=name:input_layernorm|name:norm}"
    ours = randomise(peftfx.run(base, recipe))
    assert len(ours.trainable_parameters()) == len(loaded.trainable_parameters()) == 3
    peftfx.save_peft(ours, tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LN_TUNING"
    keys = load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()
    assert keys == load_file(tmp_path / "theirs" / "adapter_model.safetensors").keys()
    again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours"))
    torch.testing.assert_close(
        first(again.eval()(**batch())), first(ours(**batch())), rtol=1e-5, atol=1e-5
    )


def test_a_model_without_norms_is_refused() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4, elementwise_affine=False))
    base = peftfx.capture(plain, (torch.randn(2, 4),))
    with pytest.raises(SelectorError, match=r"works on norm sites, and the model has none.*Choose"):
        peftfx.run(base, "norm_tuning")
