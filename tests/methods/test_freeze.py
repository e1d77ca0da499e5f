"""Freezing all but the top layers, against plain PyTorch, and what is kept below the boundary."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import OptionError
from peftfx.rewriter.sites.order import layers_above

from ..models import batch, first
from ..zoo import ZOO


def names(program: peftfx.Program) -> set[str]:
    return set(program.named_trainable_parameters())


def layered(model: nn.Module, *prefixes: str) -> set[str]:
    return {n for n, _ in model.named_parameters() if n.startswith(prefixes)}


def leaves(output: Tensor) -> list[Tensor]:
    """The parameters at the ends of the graph behind an output."""
    stack: list[Any] = [output.grad_fn]
    seen: set[Any] = {*stack}
    while stack:
        fresh = {node for node, _ in stack.pop().next_functions if node is not None} - seen
        seen |= fresh
        stack += fresh
    return [node.variable for node in seen if hasattr(node, "variable")]


def learn(module: Any, parameters: Any) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        (first(module(**batch(seed=seed))) - 1).square().mean().backward()
        optimizer.step()


def test_freeze_equals_plain_training(hand: Any) -> None:
    name, model, base = hand
    program = peftfx.run(base, "freeze{layers=1}")
    above = ("layers.1.", "pooler.") if name == "encoder" else ("layers.1.", "norm.", "head.")
    assert names(program) == layered(model, *above)
    assert names(peftfx.run(base, "freeze")) == layered(model, *above)  # a quarter of two is one
    reference = copy.deepcopy(model).requires_grad_(False)
    for n, parameter in reference.named_parameters():
        parameter.requires_grad_(n.startswith(above))
    learn(program, program.trainable_parameters())
    learn(reference, [p for p in reference.parameters() if p.requires_grad])
    torch.testing.assert_close(first(program(**batch())), first(reference(**batch())))
    torch.testing.assert_close(program.export_state_dict(), dict(reference.state_dict()))


def test_options_add_and_leave_out(captured: Any) -> None:
    model, base = captured["decoder"]
    layer = layered(model, "layers.1.")
    norms = {n for n in layered(model, "layers.1.", "norm.") if "norm" in n}
    assert names(peftfx.run(base, "freeze{layers=1,head=false}")) == layer
    assert names(peftfx.run(base, "freeze{layers=1,head=false,norms=false}")) == layer - norms
    assert names(peftfx.run(base, "freeze{layers=0}")) == layered(model, "norm.", "head.")
    every = peftfx.run(base, "freeze{layers=2,embeddings=true}")
    assert names(every) == {n for n, _ in model.named_parameters()}
    assert "tables train" in str(every.history[-1])
    assert names(peftfx.run(base, "freeze{layers=2,where=q|v,head=false}")) == {
        f"layers.{i}.{p}_proj.weight" for i in (0, 1) for p in "qv"
    }


def test_nothing_below_the_boundary_is_kept(captured: Any) -> None:
    """By the bytes of each layer, and by what the graph behind the output ends in."""
    _, base = captured["encoder"]
    program = peftfx.run(base, "freeze{layers=1}").train()
    everywhere = peftfx.run(base, "freeze{layers=2}").train().memory(4, 32)
    memory = program.memory(4, 32)
    assert memory.by_layer[0].saved == 0 == memory.by_layer[0].gradients
    assert everywhere.by_layer[0].saved > 0.8 * everywhere.by_layer[1].saved
    assert memory.by_layer[1].saved == everywhere.by_layer[1].saved
    assert memory.saved < 0.6 * everywhere.saved
    output = first(program(**batch(4, 32)))
    held = program.named_trainable_parameters()
    reached = {id(p) for p in leaves(output)}
    assert reached == {id(p) for n, p in held.items() if not n.startswith("pooler.")}


def test_layers_are_counted_from_the_outputs(zoo: Any) -> None:
    """Through a decoder into its encoder, through stages, and past shared weights."""
    t5 = layers_above(zoo["t5"])
    assert t5["decoder.block.1.layer.2.DenseReluDense.wo.weight"] == 0 == t5["lm_head.weight"]
    assert t5["encoder.block.1.layer.1.DenseReluDense.wo.weight"] == 2
    assert t5["encoder.final_layer_norm.weight"] == 2 and t5["shared.weight"] == 4
    program = peftfx.run(zoo["t5"], "freeze{layers=2}")
    assert all(n.startswith("decoder.") for n in names(program))
    assert "lm_head.weight: it is tied to shared.weight" in str(program.history[-1])
    three = names(peftfx.run(zoo["t5"], "freeze{layers=3}"))
    assert "shared.weight" not in three  # the decoder's, but the encoder's, too
    assert "encoder.block.1.layer.0.SelfAttention.q.weight" in three
    tied = peftfx.run(zoo["t5"], "freeze{layers=2,embeddings=true}")
    assert "shared.weight" in names(tied)
    swin = layers_above(zoo["swin"])
    between = "swin.encoder.layers.0.downsample.reduction.weight"
    assert swin["swin.encoder.layers.0.blocks.1.mlp.fc1.weight"] == 2 == swin[between]
    assert between not in names(peftfx.run(zoo["swin"], "freeze{layers=2}"))
    assert between in names(peftfx.run(zoo["swin"], "freeze{layers=3}"))
    with pytest.raises(OptionError, match=r"top 1 of 2 layers alone.*Choose more layers"):
        peftfx.run(zoo["albert"], "freeze{layers=1}")
    assert len(names(peftfx.run(zoo["albert"], "freeze{layers=2}"))) == 18


def test_wrong_numbers_of_layers_are_refused(captured: Any) -> None:
    _, base = captured["decoder"]
    with pytest.raises(OptionError, match=r"layers=3, but it must be at most 2.*Choose at most 2"):
        peftfx.run(base, "freeze{layers=3}")
    with pytest.raises(OptionError, match=r"layers=-1, but it must be none, or at least 0"):
        peftfx.run(base, "freeze{layers=-1}")
    with pytest.raises(OptionError, match=r"nothing is left to train.*Choose layers=1"):
        peftfx.run(base, "freeze{layers=0,head=false}")
    inputs = ZOO["mlp"].inputs(2, 3)
    plain = peftfx.capture(ZOO["mlp"].build(), kwargs=inputs)
    with pytest.raises(OptionError, match=r"this model has no layers. Use train"):
        peftfx.run(plain, "freeze")
