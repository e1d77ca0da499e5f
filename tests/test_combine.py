"""Combining branches at a linear: what mixtures of low-rank adapters are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.branches.branch import Combine, Serial
from peftfx.rewriter.edits.edit import Editor
from peftfx.rewriter.errors import FoldError, PassError
from peftfx.rewriter.pipeline.method import Method
from peftfx.rewriter.pipeline.passes import REGISTRY
from peftfx.rewriter.program.history import Contract, Plan
from peftfx.rewriter.program.state import State
from peftfx.rewriter.storage.composed import plan_members, take_members

from .models import batch, first, moved, randomise


class Router(Combine):
    """`sum_n g_n(x) f_n(x)`, g = softmax(R x); parameter `route [members, in]`."""

    def __init__(self, route: Tensor) -> None:
        super().__init__()
        self.route = nn.Parameter(route)

    def combine(self, x: Tensor, *updates: Tensor) -> Tensor:
        gates = (x @ self.route.T).softmax(-1)
        return sum((gates[..., n, None] * u for n, u in enumerate(updates)), torch.zeros(()))


@pytest.fixture
def mixture() -> Any:
    """A mixture of low-rank adapters, registered for one test."""

    @dataclass(frozen=True, kw_only=True)
    class Mixture(Method, abstract=True):
        text: ClassVar[str] = "mixture"
        contract: ClassVar[Contract] = Contract("trainable")
        names: tuple[str, ...] = ("a", "b")

        def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
            return plan_members(program, self.names, sources, "delta")

        def apply(self, edit: Editor, plan: Plan) -> None:
            members = take_members(edit, plan)
            for site_id in plan.decisions["sites"]:
                site: Any = edit.program.sites[site_id]
                edit.combine(site, Router(torch.zeros(2, site.in_features)), members)

    REGISTRY["mixture"] = Mixture
    yield Mixture()
    del REGISTRY["mixture"]


def reference(model: Any, program: peftfx.Program, inputs: dict[str, Tensor]) -> Any:
    """y = l_out (W (l_in x) + b + sum_n g_n(x) B_n A_n x + c), by forward hooks."""
    held = {n: p.detach() for n, p in program.module.named_parameters() if "peftfx" in n}
    handles: list[Any] = []
    for path in [n for n in held if n.endswith("route")]:
        place = path.removeprefix("peftfx.mixture.").removesuffix(".combine.route")

        def hook(_: Any, i: Any, o: Tensor, place: str = place) -> Tensor:
            gates = (i[0] @ held[f"peftfx.mixture.{place}.combine.route"].T).softmax(-1)
            for n, member in enumerate("ab"):
                a, b = (held[f"peftfx.{member}.{place}.delta.{x}"] for x in "ab")
                update = 4.0 * (i[0] @ a.T) @ b.T
                if place.endswith("qkv.weight.v"):
                    update = torch.cat([torch.zeros_like(o[..., :64]), update], -1)
                o = o + gates[..., n, None] * update
            scale = held.get(f"peftfx.ia3.{place}.output_scale.l")
            return o if scale is None else o * scale

        handles.append(
            model.get_submodule(place.removesuffix(".weight.v")).register_forward_hook(hook)
        )
    try:
        return model(**inputs)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["encoder", "decoder", "fused"])
def test_a_mixture_equals_its_reference(captured: Any, mixture: Method, name: str) -> None:
    model, base = captured[name]
    inputs = batch(4, 11)
    if name == "fused":
        del inputs["attention_mask"]
    lora = ";".join(f"lora{{rank=4,name={n},where=v}}" for n in "ab")
    program = randomise(
        peftfx.run(base, [lora, mixture, *([] if name == "fused" else ["ia3{where=v}"])])
    )
    want = first(reference(model, program, inputs))
    got = first(program(**inputs))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert moved(first(base(**inputs)), got) > 0.01
    assert all(c.holds for c in program.verify())
    # Whatever comes later at the linear, the mixture is emitted afresh and stays what it was.
    later = peftfx.run(program, "lora{name=c,where=v};bitfit")
    assert torch.equal(first(later(**inputs)), got)
    with pytest.raises(FoldError, match="mixture weighs what it adds"):
        peftfx.run(later, "fold{names=[a]}")
    folded = peftfx.run(later, "fold")
    torch.testing.assert_close(first(folded(**inputs)), got)
    assert [a.adapter for a in folded.attachments if a.adapter in ("c", "lora")] == []
    reasons = [r for _, r in folded.history[-1].skipped]
    assert sum("mixture weighs what it adds" in r for r in reasons) == 4
    assert sum("how it weighs its members depends on the input" in r for r in reasons) == 2
    assert {a.adapter for a in folded.attachments} >= {"a", "b", "mixture"}
    # Nothing fuses a member into the linear.
    lowered = peftfx.run(program, "lower")
    torch.testing.assert_close(first(lowered(**inputs)), got)
    torch.testing.assert_close(first(peftfx.run(lowered, "ia3{name=late,where=q}")(**inputs)), got)


def test_equal_gates_are_the_mean(captured: Any, mixture: Method) -> None:
    _, base = captured["decoder"]
    program = randomise(peftfx.run(base, "lora{name=a};lora{name=b}"), 0.3)
    mixed = peftfx.run(program, mixture)
    held = dict(mixed.module.named_parameters())
    double = program.fork()
    with torch.no_grad():
        for name, parameter in double.module.named_parameters():
            if name.endswith("delta.b"):
                parameter.copy_(held[name] / 2)
    torch.testing.assert_close(first(mixed(**batch())), first(double(**batch())))


class Gain(Serial):
    """`h <- g h`: adds nothing to h that could be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(()))

    def transform(self, h: Tensor) -> Tensor:
        return h * self.g


def test_what_has_no_update_cannot_be_combined(captured: Any) -> None:
    _, base = captured["encoder"]
    edit = Editor(base.fork(), "gain")
    site: Any = base.sites["s0.layer0.ffn"]
    edit.after(site, Gain())
    with pytest.raises(PassError, match=r"Gain of 'gain' at s0\.layer0\.ffn cannot be combined"):
        edit.combine(site, Router(torch.zeros(1, 32)), ["gain"])
    with pytest.raises(PassError, match=r"'other' has no branch .* Adapters with one: gain"):
        edit.combine(site, Router(torch.zeros(1, 32)), ["other"])
