"""Regions: what runs on some tokens is one submodule of its block, and computes as in place."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import peftfx
from peftfx.rewriter.blocks.module import Region

from .models import batch, first, moved, randomise
from .test_blocks import check, measured, same, step
from .zoo import ZOO

TEXTS = {
    "encoder": "coda{reduction=3,bottleneck=8}",
    "bert": "coda{reduction=3,bottleneck=8}",
    "decoder": "coda{reduction=3,bottleneck=8,causal=prefill}",
}
BLOCKS = {"bert": "encoder.layer"}


def routed(captured: Any, name: str, text: str = "") -> peftfx.Program:
    base = captured[name][1]
    program = randomise(peftfx.run(base, text or TEXTS[name]), 0.2).eval()
    inputs = sample(program, 4, 11)
    assert moved(first(base(**inputs)), first(program(**inputs))) > 0.01
    return program.train()


def sample(program: Any, rows: int, tokens: int, pad: int = 0) -> dict[str, Tensor]:
    given = batch(rows, tokens, pad=pad)
    return {n: given[n] if n in given else given["input_ids"] for n in program.spec.names}


def outlined(program: peftfx.Program, inputs: dict[str, Tensor]) -> Any:
    """The outlined program, compared with the flat one; no parameter of a block is read outside."""
    module = check(program, inputs)
    read = {str(n.target) for n in module.graph.find_nodes(op="get_attr")}
    assert not {n for n in read for b in module.blocks if n.startswith(f"{b.path}.")}
    return module


def entering(module: Any, inputs: dict[str, Tensor]) -> list[tuple[Any, ...]]:
    """What each region gets in one forward pass, and after it what it returns."""
    seen: list[tuple[Any, ...]] = []
    handles = [
        r.register_forward_hook(lambda _, i, o: seen.append((*i, o))) for r in module.regions
    ]
    with torch.no_grad():
        module(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def flops(module: Any, inputs: dict[str, Tensor]) -> dict[str, int]:
    """By the path of the submodule."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**inputs)
    counts = counter.get_flop_counts()
    return {n.partition(".")[2]: sum(c.values()) for n, c in counts.items()}


@pytest.mark.parametrize("name", TEXTS)
def test_a_region_is_one_submodule(captured: Any, name: str) -> None:
    """It gets ceil(n / 3) tokens and costs what the dense block costs on as many."""
    program = routed(captured, name)
    module = outlined(program, sample(program, 4, 11, pad=3)).eval()
    place = BLOCKS.get(name, "layers")
    assert [r.path for r in module.regions] == [f"{place}.{i}.region" for i in range(2)]
    for i, region in enumerate(module.regions):
        assert type(region) is Region and region is module.get_submodule(region.path)
        assert not list(region.parameters()) and not list(region.children())
        assert region.label == f"s0.layer{i}.attn+s0.layer{i}.ffn"
        assert region.branch == program.attachments[i].path
        assert f"(region): Region({region.label}, tokens chosen by {region.branch})" in str(module)
    dense = peftfx.outline(captured[name][1].fork()).eval()
    for tokens in (11, 7, 2):
        slots = max(2, math.ceil(tokens / 3))
        for *values, result in entering(module, sample(program, 4, tokens)):
            assert result.shape == values[0].shape == (4, slots, 32)
        counted = flops(module, sample(program, 4, tokens))
        want = flops(dense, sample(program, 4, slots))
        for i in range(2):
            assert counted[f"{place}.{i}.region"] == want[f"{place}.{i}"] > 0


@pytest.mark.parametrize("name", ["t5", "vit"])
def test_architectures(zoo: Any, name: str) -> None:
    """An encoder in front of a decoder, with biases of scores; a fixed number of tokens."""
    program = randomise(peftfx.run(zoo[name], TEXTS["encoder"]), 0.2)
    module = outlined(program, ZOO[name].inputs(4, 11)).eval()
    slots = 4 if name == "t5" else 6  # of 11 and of 17
    results = [values[-1] for values in entering(module, ZOO[name].inputs(4, 11))]
    assert [tuple(result.shape) for result in results] == [(4, slots, 32)] * 2
    if name == "t5":
        counted = flops(module, ZOO[name].inputs(4, 11))
        dense = flops(peftfx.outline(zoo[name].fork()).eval(), ZOO[name].inputs(4, slots))
        for region, block in zip(module.regions, module.blocks, strict=False):
            assert counted[region.path] == dense[block.path] > 0
    assert [r.label for r in module.regions] == [
        f"s0.layer{i}.attn+s0.layer{i}.ffn" for i in range(2)
    ]
    assert all(r.path == f"{b.path}.region" for b in module.blocks for r in b.regions)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
@pytest.mark.parametrize("where", ["attn", "ffn"])
def test_one_sublayer(captured: Any, name: str, where: str) -> None:
    text = TEXTS[name].replace("}", f",where={where}}}")
    program = routed(captured, name, text)
    module = outlined(program, sample(program, 4, 11, pad=3)).eval()
    assert [r.label for r in module.regions] == [f"s0.layer{i}.{where}" for i in range(2)]
    counted = flops(module, sample(program, 4, 11))
    size = {"attn": "query|key|value|dense|proj", "ffn": "fc|gate|up|down"}[where]
    for block in module.blocks:
        own = [m.numel() for n, m in block.named_parameters() if _is(n, size) and m.dim() == 2]
        linears = 2 * 4 * 4 * sum(own)
        extra = counted[f"{block.path}.region"] - linears
        assert extra == 0 if where == "ffn" else 0 <= extra < linears


def _is(name: str, words: str) -> bool:
    return any(word in name for word in words.split("|"))


def test_several_of_one_block(captured: Any) -> None:
    """Alike in any order of the passes."""
    text = "coda{name=a,where=attn,bottleneck=8};coda{name=b,where=ffn and layer>=1,reduction=2}"
    program = routed(captured, "encoder", text)
    module = outlined(program, sample(program, 4, 11, pad=3)).eval()
    assert {r.path: r.label for r in module.regions} == {
        "layers.0.region": "s0.layer0.attn",
        "layers.1.region": "s0.layer1.attn",
        "layers.1.region1": "s0.layer1.ffn",
    }
    seen = entering(module, sample(program, 4, 11))
    assert [values[0].shape[1] for values in seen] == [4, 4, 6]
    again = peftfx.run(captured["encoder"][1], ";".join(reversed(text.split(";")))).eval()
    again.module.load_state_dict(program.module.state_dict())
    given = sample(program, 4, 11, pad=3)
    assert torch.equal(first(again(**given)), first(program.eval()(**given)))


@pytest.mark.parametrize(
    "other",
    ["lora{rank=2}", "dora{rank=2}", "serial_adapter{bottleneck=4}", "prefix_tuning{length=3}",
     "diff_pruning"],
)  # fmt: skip
def test_with_other_methods(captured: Any, other: str) -> None:
    """Branches inside are called; expressions of weights and prefix keys enter."""
    program = routed(captured, "encoder", f"{other};{TEXTS['encoder']}")
    assert len(outlined(program, sample(program, 4, 11, pad=3)).regions) == 2


def test_checkpointed_blocks(captured: Any) -> None:
    """With the same dropout; a block with nothing that trains but in its region is one, too."""
    program = routed(captured, "encoder")
    inputs = sample(program, 4, 11, pad=3)
    module = peftfx.outline(program, checkpoint=True).train()
    assert all(b.checkpointed for b in module.blocks)
    same(step(program.module, inputs), step(module, inputs))
    assert module.report(inputs).total == measured(module, inputs)
    for name, parameter in program.module.named_parameters():
        parameter.requires_grad_(name == "layers.1.fc1.weight")
    module = peftfx.outline(program, checkpoint=True)
    assert [b.checkpointed for b in module.blocks] == [False, True]


def test_a_region_by_itself(captured: Any) -> None:
    """Called, checkpointed and compiled alone; gradients reach its block's parameters."""
    program = routed(captured, "decoder", f"lora{{rank=2}};{TEXTS['decoder']}").eval()
    module = peftfx.outline(program)
    (*values, want), _ = entering(module, sample(program, 4, 11, pad=3))
    region = module.regions[0]
    learnt = program.named_trainable_parameters()
    inside = [p for n, p in learnt.items() if n.startswith("peftfx.lora.layers.0")]
    results: list[tuple[Tensor, ...]] = []
    for run in (region, lambda *v: checkpoint(region, *v, use_reentrant=False)):
        result = run(*values)
        assert torch.equal(result, want)
        results.append(torch.autograd.grad(result.square().sum(), inside))
    assert inside and all(bool(g.abs().max() > 0) for g in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    compiled = torch.compile(region, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*values), want)
    torch._dynamo.reset()


def test_a_module_like_others(captured: Any) -> None:
    """Copies, other devices, parameters on the CPU."""
    program = routed(captured, "encoder")
    inputs = sample(program, 4, 11)
    module = peftfx.outline(program)
    copied = copy.deepcopy(module)
    assert all(r.root is copied for r in copied.regions)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    same(step(program.module, inputs), step(module, inputs))
    copied.load_state_dict(program.module.state_dict(), strict=True)
    same(step(program.module, inputs), step(copied, inputs))
    abstract = copied.to("meta")
    assert first(abstract(**{n: t.to("meta") for n, t in inputs.items()})).is_meta
    replaced = module.blocks[0].get_parameter("fc1.weight").detach().clone().zero_()
    module.blocks[0].get_submodule("fc1")._parameters["weight"] = nn.Parameter(replaced)
    moves = peftfx.inline(module)
    assert torch.equal(moves.module.get_parameter("layers.0.fc1.weight"), replaced)
    same(step(moves.module, inputs), step(module, inputs))


def test_offload(captured: Any) -> None:
    """What a region reads is fetched, too."""
    program = routed(captured, "encoder")
    inputs = sample(program, 4, 11, pad=3)
    module = peftfx.outline(program, offload=True).train()
    fetched = [n for r in module.regions for n in r.graph.nodes if n.target == "offload"]
    assert len(fetched) == 32
    assert module.report(inputs).without == measured(program.module, inputs)
    same(step(program.module, inputs), step(module, inputs))


def test_compiles_in_one_piece(captured: Any) -> None:
    program = routed(captured, "tiny", TEXTS["decoder"]).eval()
    module = peftfx.outline(program, checkpoint=[0]).eval()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, tokens in ((4, 11), (2, 7)):
        inputs = sample(program, rows, tokens)
        want, got = step(program.module, inputs), step(compiled, inputs)
        torch.testing.assert_close(got[1], want[1])
        torch.testing.assert_close(
            {n.removeprefix("_orig_mod."): g for n, g in got[2].items()}, want[2]
        )
    torch._dynamo.reset()
