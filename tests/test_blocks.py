"""Blocks: outlined programs compute, differentiate and save exactly like flat ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

import peftfx
from peftfx.rewriter.blocks import offload
from peftfx.rewriter.errors import BlockError, CaptureError

from . import models
from .models import batch, first, moved
from .recipes import METHODS, least_change
from .zoo import ZOO

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
    same(step(module, inputs), step(peftfx.outline(program, recompute=True), inputs))
    again = peftfx.inline(module)
    assert again.text() == program.text() == text
    assert all(flat[n] is p for n, p in again.module.named_parameters())
    same(step(program.module, inputs), step(again.module, inputs))
    return module


@pytest.mark.parametrize("name", ["encoder", "decoder", "fused", "bert", "llama"])
def test_models(captured: Any, name: str) -> None:
    inputs = batch(4, 11, pad=3)
    if name == "fused":
        del inputs["attention_mask"]
    module = check(captured[name][1].fork(), inputs)
    place = {"bert": "encoder.layer", "llama": "model.layers"}.get(name, "layers")
    assert [b.path for b in module.blocks] == [f"{place}.{i}" for i in range(2)]
    assert all(b is module.get_submodule(b.path) for b in module.blocks)


@pytest.mark.parametrize("base", ["encoder", "decoder"])
@pytest.mark.parametrize("name", METHODS)
def test_methods(captured: Any, base: str, name: str) -> None:
    """Branches, shared values and expressions of weights are part of blocks, or enter them."""
    before, _ = captured.start(base, name)
    program = models.randomise(captured.placed(base, name))
    given = batch(4, 11, pad=3)
    change = moved(first(before.eval()(**given)), first(program.eval()(**given)))
    assert change > least_change(name, base)
    check(program, program.spec.bind((), given))


@pytest.mark.parametrize(
    "recipe", ["lora{rank=2};fold", "lora{rank=2};lower", "causal;serial_adapter{bottleneck=4}"]
)
def test_rewritten(captured: Any, recipe: str) -> None:
    program = peftfx.run(captured["decoder"][1], recipe)
    for parameter in program.module.parameters():
        parameter.requires_grad_(True)
    given = {n: t for n, t in batch(4, 11).items() if n in program.spec.names}
    check(models.randomise(program), given)


@pytest.mark.parametrize(("name", "count"), [("t5", 4), ("gpt2", 2), ("vit", 2), ("dit", 2)])
def test_architectures(zoo: Any, name: str, count: int) -> None:
    program = models.randomise(peftfx.run(zoo[name], "lora{rank=2,where=q|v}"))
    module = check(program, ZOO[name].inputs(4, 11))
    assert len(module.blocks) == count


def tuned(captured: Any, name: str, where: str = "q|v") -> peftfx.Program:
    return models.randomise(peftfx.run(captured[name][1], f"lora{{rank=2,where={where}}}")).train()


def measured(module: Any, inputs: dict[str, Tensor]) -> int:
    """Bytes of the distinct storages that a forward pass saves, without parameters."""
    known = {p.untyped_storage()._cdata for p in module.parameters()}
    held: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            held[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = module(**inputs)
    del output
    return sum(s.nbytes() for s in held.values())


@pytest.mark.parametrize("which", [True, [1], [-2]])
def test_checkpointed(captured: Any, which: Any) -> None:
    """Dropout is drawn again alike, and the report is what autograd saves."""
    program, inputs = tuned(captured, "encoder"), batch(4, 11, pad=3)
    module = peftfx.outline(program, checkpoint=which).train()
    same(step(program.module, inputs), step(module, inputs))
    report = module.report(inputs)
    assert report.total == measured(module, inputs) < report.without
    assert report.without == measured(program.module, inputs)
    assert f"{report.total:,} bytes saved" in str(report)


def test_budget(captured: Any) -> None:
    program, inputs = tuned(captured, "decoder"), batch(4, 11)
    free = peftfx.outline(program).report(inputs)
    chosen: list[int] = []
    for budget in (free.without, free.without - 1):
        module = peftfx.outline(program, checkpoint=budget, inputs=inputs)
        chosen.append(sum(b.checkpointed for b in module.blocks))
        assert measured(module, inputs) <= budget
    assert chosen == [0, 1]
    smallest = peftfx.outline(program, checkpoint=True).report(inputs).total
    with pytest.raises(BlockError, match=f"at least {smallest:,} "):
        peftfx.outline(program, checkpoint=smallest - 1, inputs=inputs)
    peftfx.outline(program, checkpoint=smallest, inputs=inputs)
    with pytest.raises(BlockError, match="blocks 0 to 1"):
        peftfx.outline(program, checkpoint=[2])


def test_nothing_below_the_first_trainable_site(captured: Any) -> None:
    program, inputs = tuned(captured, "decoder", "layer>=1 and q"), batch(4, 11)
    module = peftfx.outline(program)
    assert module.report(inputs).rows[0].kept == 0
    module.gradient_checkpointing_enable()
    assert [b.checkpointed for b in module.blocks] == [False, True]
    same(step(program.module, inputs), step(module, inputs))
    module.gradient_checkpointing_disable()
    assert not any(b.checkpointed for b in module.blocks)
    with pytest.raises(BlockError, match="use_reentrant"):
        module.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("checkpoint", [False, True])
def test_offload(captured: Any, monkeypatch: pytest.MonkeyPatch, checkpoint: bool) -> None:
    """A frozen parameter is copied once forward and once for each use backward, never kept."""
    program, inputs = tuned(captured, "encoder"), batch(4, 11, pad=3)
    alive: list[Any] = []
    most = 0

    def fetch(weight: Tensor, device: torch.device) -> Tensor:
        nonlocal most
        copied = weight.detach().to(device, copy=True)
        alive.append(StorageWeakRef(copied.untyped_storage()))
        most = max(most, sum(not ref.expired() for ref in alive))
        return copied

    monkeypatch.setattr(offload, "fetch", fetch)
    module = peftfx.outline(program, checkpoint=checkpoint, offload=True).train()
    assert module.report(inputs).without == measured(program.module, inputs)
    alive.clear()
    with torch.no_grad():
        module(**inputs)
    frozen = [p for b in module.blocks for p in b.parameters()]
    assert len(alive) == len(frozen) == 32
    output = first(module(**inputs))
    assert most <= 3 and all(ref.expired() for ref in alive)
    kept = len(alive)
    output.sum().backward()
    assert len(alive) > kept
    same(step(program.module, inputs), step(module, inputs))
    assert not any(b.kept and b.kept._recipes for b in module.blocks)
    moves = peftfx.outline(program, offload=True).to("meta")
    assert {p.device.type for p in moves.blocks[0].parameters()} == {"cpu"}
    for held in (moves, peftfx.inline(moves).base.module):
        assert not held.get_parameter("layers.1.query.weight").is_meta
        assert held.get_parameter("words.weight").is_meta
    with pytest.raises(BlockError, match="nothing in the blocks is frozen"):
        peftfx.outline(captured["encoder"][1].fork(), offload=True)


def test_a_module_like_others(captured: Any) -> None:
    """Copies, saved states, other devices, groups of blocks."""
    program, inputs = tuned(captured, "decoder"), batch(4, 11)
    module = peftfx.outline(program, checkpoint=True)
    copied = copy.deepcopy(module)
    assert not set(map(id, copied.parameters())) & set(map(id, module.parameters()))
    assert copied.blocks[0].root is copied
    same(step(program.module, inputs), step(copied, inputs))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    copied.load_state_dict(program.module.state_dict(), strict=True)
    same(step(program.module, inputs), step(peftfx.inline(copied).module, inputs))
    abstract = copied.to("meta")
    output = abstract(**{n: t.to("meta") for n, t in inputs.items()})
    again = peftfx.inline(abstract).module(**{n: t.to("meta") for n, t in inputs.items()})
    assert first(output).is_meta and first(again).is_meta
    with pytest.raises(CaptureError, match="keeps its dtype"):
        module.half()
    assert [len(unit) for unit in module.units(1)] == [2]
    with pytest.raises(BlockError, match="2 blocks cannot be put into 3 groups"):
        module.units(3)


def test_compiles_in_one_piece(captured: Any) -> None:
    program = tuned(captured, "tiny").eval()
    module = peftfx.outline(program, checkpoint=[0]).eval()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, tokens in ((4, 11), (2, 7)):
        inputs = batch(rows, tokens)
        want, got = step(program.module, inputs), step(compiled, inputs)
        torch.testing.assert_close(got[1], want[1])
        got[2].update({n.removeprefix("_orig_mod."): got[2].pop(n) for n in list(got[2])})
        torch.testing.assert_close(got[2], want[2])
    torch._dynamo.reset()


class Shared(nn.Module):
    """One layer run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.embed = models.EncoderLayer(32, 4, 64), nn.Embedding(64, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.layer(self.layer(x, None), None)


class Mixed(nn.Module):
    """Layers whose parameters are in lists by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.up = nn.ModuleList(nn.Linear(32, 64) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(64, 32) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Shared, "the parameters of s0.layer0 are all shared with others"),
        (Mixed, "s0.layer0 are in no module without those of others .*up.0.weight"),
    ],
)
def test_irregular(model: Any, text: str) -> None:
    program = peftfx.capture(model(), kwargs={"input_ids": batch()["input_ids"]})
    before = program.text()
    with pytest.raises(BlockError, match=text):
        peftfx.outline(program)
    assert program.text() == before


def test_no_blocks() -> None:
    program = peftfx.capture(nn.Linear(4, 4), args=(torch.randn(3, 4),))
    with pytest.raises(BlockError, match="no residual layers"):
        peftfx.outline(program)
