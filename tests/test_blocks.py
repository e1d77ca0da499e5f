"""Blocks: outlined programs compute, differentiate and save exactly like flat ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import peftfx

from .models import batch

Result = tuple[Any, list[Tensor], dict[str, Tensor]]


def step(module: Any, inputs: dict[str, Tensor], seed: int = 0) -> Result:
    """Output, its tensors, and the gradient of every parameter."""
    torch.manual_seed(seed)
    module.zero_grad()
    output = module(**inputs)
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
    sum(t.square().sum() for t in tensors if t.requires_grad).backward()  # type: ignore
    held = module.named_parameters()
    return output, tensors, {n: p.grad.clone() for n, p in held if p.grad is not None}


def same(one: Result, other: Result) -> None:
    """Bit for bit."""
    assert type(one[0]) is type(other[0])
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    assert set(one[2]) == set(other[2]) and one[2]
    assert [n for n, g in one[2].items() if not torch.equal(g, other[2][n])] == []


def check(program: peftfx.Program, inputs: dict[str, Tensor]) -> Any:
    """The outlined program, after comparing it with the flat one in both modes."""
    text, module = program.text(), peftfx.outline(program)
    flat, outlined = dict(program.module.named_parameters()), dict(module.named_parameters())
    assert set(flat) == set(outlined) and all(flat[n] is outlined[n] for n in flat)
    assert set(program.module.state_dict()) == set(module.state_dict())
    for mode in (True, False):
        same(step(program.train(mode).module, inputs), step(module.train(mode), inputs))
    again = peftfx.inline(module)
    assert again.text() == program.text() == text
    assert all(flat[n] is p for n, p in again.module.named_parameters())
    same(step(program.module, inputs), step(again.module, inputs))
    return module


@pytest.mark.parametrize("name", ["encoder", "decoder", "fused", "tied", "bert", "llama"])
def test_models(captured: Any, name: str) -> None:
    inputs = batch(4, 11, pad=3)
    if name == "fused":
        del inputs["attention_mask"]
    module = check(captured[name][1].fork(), inputs)
    place = {"bert": "encoder.layer", "llama": "model.layers"}.get(name, "layers")
    assert [b.path for b in module.blocks] == [f"{place}.{i}" for i in range(2)]
    assert all(b is module.get_submodule(b.path) for b in module.blocks)
