"""Cheap values computed again for the backward pass: nothing but memory changes.

That values and gradients stay the same for all methods and models is checked in `test_blocks`.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.utils._python_dispatch import TorchDispatchMode

import peftfx
from peftfx.rewriter.errors import BlockError

from . import models
from .models import batch, first
from .test_blocks import same, step

ATEN: Any = torch.ops.aten


def tuned(captured: Any, name: str, recipe: str = "lora{where=linear}") -> peftfx.Program:
    return models.randomise(peftfx.run(captured[name][1], recipe)).train()


def held(module: Any, inputs: dict[str, Tensor]) -> int:
    """Bytes that the allocator holds more after a forward pass, by its own record."""
    with torch.profiler.profile(profile_memory=True) as profile:
        output = module(**inputs)
    events: Any = profile.profiler.kineto_results.events()  # pyright: ignore
    del output
    return sum(e.nbytes() for e in events if e.name() == "[memory]")


class Counted(TorchDispatchMode):
    """How often an operator ran."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.operator, self.count = operator, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is self.operator
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["encoder", "decoder", "bert", "llama"])
@pytest.mark.parametrize("recipe", ["lora{where=linear}", "lora{where=linear};lower", "ia3"])
def test_what_is_held(captured: Any, name: str, recipe: str) -> None:
    """The report says what the allocator says."""
    program, inputs = tuned(captured, name, recipe), batch(16, 32)
    plain = peftfx.outline(program)
    module = peftfx.outline(program, recompute=True)
    for one in (plain, module):
        step(one, inputs)
    saved = plain.report(inputs).total - module.report(inputs).total
    assert saved == held(plain, inputs) - held(module, inputs)
    assert saved > (0 if recipe == "ia3" else 0.1 * plain.report(inputs).total)


def test_once_for_all_readers(captured: Any) -> None:
    """The gate's product and what follows from the product read one activation."""
    program, inputs = tuned(captured, "llama", "lora{where=ffn.down|ffn.gate}"), batch(4, 11)
    counts: list[int] = []
    for again in (False, True):
        loss = first(peftfx.outline(program, recompute=again)(**inputs)).square().sum()
        with Counted(ATEN.silu.default) as runs:
            loss.backward(retain_graph=True)
        first_time = runs.count
        with runs:
            loss.backward()
        assert runs.count == 2 * first_time
        counts.append(first_time)
    assert counts == [0, 2]


def test_nothing_is_left_behind(captured: Any) -> None:
    program, inputs = tuned(captured, "bert"), batch(4, 11)
    module = peftfx.outline(program, recompute=True)
    with torch.no_grad():
        module(**inputs)
    first(module(**inputs)).sum().backward()
    assert not any(b.kept and b.kept._recipes for b in module.blocks)
    same(step(module, inputs), step(copy.deepcopy(module), inputs))
    same(step(program.module, inputs), step(peftfx.inline(module).module, inputs))


@pytest.mark.parametrize("options", [{"checkpoint": [0]}, {"offload": True}])
def test_with_other_options(captured: Any, options: dict[str, Any]) -> None:
    program, inputs = tuned(captured, "bert"), batch(4, 11, pad=3)
    module = peftfx.outline(program, recompute=True, **options)
    same(step(program.module, inputs), step(module, inputs))
    alone = peftfx.outline(program, recompute=True).report(inputs)
    report = module.report(inputs)
    assert report.without == alone.total
    assert report.total < alone.total if "checkpoint" in options else report.total == alone.total


def test_a_budget_counts_it(captured: Any) -> None:
    program, inputs = tuned(captured, "bert"), batch(4, 11)
    budget = peftfx.outline(program, recompute=True).report(inputs).total
    module = peftfx.outline(program, recompute=True, checkpoint=budget, inputs=inputs)
    assert not any(b.checkpointed for b in module.blocks)
    without = peftfx.outline(program, checkpoint=budget, inputs=inputs)
    assert any(b.checkpointed for b in without.blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(captured: Any, dtype: torch.dtype) -> None:
    """What runs again runs in the dtypes of the first time."""
    program, inputs = tuned(captured, "llama"), batch(4, 11)
    results: list[Any] = []
    for again in (False, True):
        module = peftfx.outline(program, recompute=again)
        module.zero_grad()
        with torch.autocast("cpu", dtype):
            output = first(module(**inputs))
        output.float().square().sum().backward()
        grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        results.append((output, [output], grads))
    same(*results)


@pytest.mark.parametrize(
    ("name", "recipe"), [("bert", "lora{where=linear}"), ("tiny", "lora{where=linear};lower")]
)
def test_compiled(captured: Any, name: str, recipe: str) -> None:
    """A compiler keeps as little, and computes as eager steps but for the forms of products."""
    program = tuned(captured, name, recipe)
    module = peftfx.outline(program, recompute=True)
    module.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, tokens in ((4, 11), (16, 32)):
        inputs = batch(rows, tokens)
        ours, plain = step(module, inputs), step(program.module, inputs)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=5e-5)
    assert held(module, inputs) < 0.95 * held(program.module, inputs)
    torch._dynamo.reset()


def test_random_numbers_in_compiled_blocks() -> None:
    """Dropout has the same numbers in the backward pass: what it keeps is kept."""
    torch.manual_seed(0)
    base = peftfx.capture(models.Encoder(layers=1), kwargs=batch())
    program = models.randomise(peftfx.run(base, "lora{rank=2,dropout=0.5}")).train()
    with inductor.patch(fallback_random=True):
        module = peftfx.outline(program, recompute=True)
        module.compile(fullgraph=True)
        want, got = (step(one, batch(), seed=3) for one in (program.module, module))
    torch._dynamo.reset()
    torch.testing.assert_close(got, want)


def test_changed_in_place(captured: Any) -> None:
    """Like autograd, it notices that what it needs is no longer what it was."""
    program, inputs = tuned(captured, "bert"), batch(4, 11)
    for name, parameter in program.module.named_parameters():
        parameter.requires_grad_("LayerNorm" in name or parameter.requires_grad)
    module = peftfx.outline(program, recompute=True)
    loss = first(module(**inputs)).sum()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "LayerNorm.bias" in name:
                parameter.add_(1)
    with pytest.raises((BlockError, RuntimeError), match=r"in ?place"):
        loss.backward()


class Shifted(nn.Module):
    """Changes in place what an activation returned and what a product has read."""

    def __init__(self, below: nn.Module) -> None:
        super().__init__()
        self.below = below

    def forward(self, x: Tensor) -> Tensor:
        half = x * 0.5
        x.add_(1.0)
        return self.below(half) + self.below(x)


def test_values_that_are_changed_in_place() -> None:
    """What was read before a change cannot be computed again after it."""
    torch.manual_seed(0)
    model: Any = models.Encoder()
    for layer in model.layers:
        layer.fc2 = Shifted(layer.fc2)
    base = peftfx.capture(model.eval().requires_grad_(False), kwargs=batch())
    program, inputs = models.randomise(peftfx.run(base, "lora{where=linear}")), batch(4, 11)
    assert any("add_" in str(node.target) for node in program.module.graph.nodes)
    same(step(program.module, inputs), step(peftfx.outline(program, recompute=True), inputs))


def test_inference_mode(captured: Any) -> None:
    program, inputs = tuned(captured, "bert").eval(), batch(4, 11)
    module = peftfx.outline(program, recompute=True, offload=True)
    with torch.inference_mode():
        assert torch.equal(first(module(**inputs)), first(program(**inputs)))


def test_without_storage(captured: Any) -> None:
    program = tuned(captured, "bert", "lora{where=q|v|ffn.up|ffn.down}")
    module: Any = peftfx.outline(program, recompute=True).to("meta")
    output = first(module(**{n: t.to("meta") for n, t in batch(4, 11).items()}))
    output.sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
