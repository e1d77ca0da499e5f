"""What a further adapter costs beside those that are there: counted, not timed."""

from __future__ import annotations

import copy
import io
import itertools
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import CodeType
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node

import peftfx
from peftfx.passes.reparameterized.lora import LoRABranch
from peftfx.rewriter.graph import walks
from peftfx.rewriter.graph.clone import clone
from peftfx.rewriter.graph.module import CapturedModule, fork_module
from peftfx.rewriter.graph.walks import settled
from peftfx.rewriter.measure.witness import Witness
from peftfx.rewriter.run.run import apply_plan
from peftfx.rewriter.verify.direct import Direct

from .test_memo import captured

COUNTED: dict[CodeType, str] = {
    Node.__init__.__code__: "nodes",
    clone.__code__: "clones",
    walks._walked.__code__: "walked",  # pyright: ignore[reportPrivateUsage]
    GraphModule.recompile.__code__: "codes",
    Witness.forward.__code__: "forwards",
    LoRABranch.branch.__code__: "branches",
}
"""Nodes made; modules and tensors copied; steps of walks over modules; and so on."""


def counted(program: peftfx.Program, recipe: str) -> tuple[peftfx.Program, Counter[str]]:
    """The program with a further adapter, and how often each of `COUNTED` ran for that."""
    counts: Counter[str] = Counter()

    def seen(frame: Any, event: str, _: Any) -> None:
        if event == "call" and (name := COUNTED.get(frame.f_code)):
            counts[name] += 1

    sys.setprofile(seen)
    try:
        program = peftfx.run(program, recipe)
    finally:
        sys.setprofile(None)
    return program, counts


def test_a_further_adapter_copies_each_twice_and_runs_each_once() -> None:
    program, sites, counts = captured(2), 4, list[Counter[str]]()
    for index in range(1, 9):
        recipe = f"lora{{rank={index},where=linear,name=a{index}}}"
        program, each = counted(program, recipe)
        counts.append(each)
    grown = [{n: b[n] - a[n] for n in b} for a, b in itertools.pairwise(counts[1:])]
    assert all(each == grown[0] for each in grown)  # no more for the eighth than for the third
    each, adapter = grown[0], program.module.get_submodule("peftfx.a1")
    modules = list(adapter.modules())
    entries = sum(len(m._parameters) + len(m._buffers) for m in modules)
    assert each["codes"] == each["forwards"] == 0
    assert each["branches"] == sites  # once with all others, and at rest they are not called
    assert each["nodes"] == 2 * sites  # of a call and a sum, in the fork alone
    assert each["clones"] == 2 * (len(modules) + entries)  # in the fork, and to be measured
    assert each["walked"] <= 12 * len(modules)


def test_walks_are_as_torchs_own_while_a_module_is_settled_and_behind_it() -> None:
    module: Any = peftfx.run(captured(2), "lora{rank=2,where=linear}").module
    module.train()
    want = [nn.Module.named_modules, nn.Module.named_parameters, nn.Module.named_buffers]
    with settled(module):
        for _ in range(2):
            for walk in want:
                assert list(getattr(module, walk.__name__)()) == list(walk(module))
        assert module.get_submodule("peftfx.lora.0.up") is module.peftfx.lora.get_submodule("0.up")
        module.eval()
        assert not any(m.training for m in nn.Module.modules(module))
        assert next(iter(module.named_parameters("x")))[0].startswith("x.")
        with pytest.raises(AttributeError, match="nothing"):
            module.get_submodule("peftfx.nothing")
    module.extra = nn.Linear(2, 2)
    assert "extra.weight" in dict(module.named_parameters())
    assert module.get_submodule("extra") is module.extra


def test_a_graph_runs_directly_as_its_code_does_without_what_is_left_out() -> None:
    program = peftfx.run(captured(2), "lora{rank=2,where=linear}")
    with torch.no_grad():
        for parameter in program.trainable_parameters():
            parameter.add_(0.1)
    gm, inputs = program.module, dict(program.sample)
    assert torch.equal(Direct(gm, {})(**inputs), gm(**inputs))
    deltas = [n for n in gm.graph.nodes if n.op == "call_module"]
    instead: dict[Node, Any] = {u: u.args[0] for n in deltas for u in n.users}
    bare = Direct(gm, instead | dict.fromkeys(deltas))(**inputs)
    assert torch.equal(bare, program.base.module(**inputs))
    assert not torch.equal(bare, gm(**inputs))


def unchecked() -> peftfx.Program:
    """A program that nobody has called yet."""
    base = captured(2)
    (item,) = peftfx.parse("lora{rank=2,where=linear}").passes
    return apply_plan(base, item, item.plan(base), check=False)


def pickled(module: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager", fullgraph=True)


@pytest.mark.parametrize("first", [
    lambda m: m, copy.deepcopy, pickled, fork_module, compiled,
    lambda m: GraphModule(m, torch.fx.Tracer().trace(m)),
])  # fmt: skip
def test_code_is_made_when_it_is_looked_for(
    first: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[GraphModule] = []
    recompile = CapturedModule.recompile
    monkeypatch.setattr(
        CapturedModule, "recompile", lambda gm: (codes.append(gm), recompile(gm))[1]
    )
    program = unchecked()
    assert [type(gm) for gm in codes].count(type(program.module)) == 0
    want = Direct(program.module, {})(**program.sample)
    assert torch.equal(first(program.module)(**program.sample), want)
    assert "peftfx_lora" in program.module.code
    assert torch.equal(program.module(**program.sample), want)
    assert codes.count(program.module) == 1


def test_threads_that_look_for_code_at_once_find_it() -> None:
    program = unchecked()
    want = Direct(program.module, {})(**program.sample)
    with ThreadPoolExecutor(4) as pool:
        outputs = [pool.submit(program.module, **program.sample) for _ in range(8)]
    assert all(torch.equal(y.result(), want) for y in outputs)
