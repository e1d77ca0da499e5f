"""Every word of the editor takes values of the graph: here a new input, against hooks on the model;
and what is known too late, or depends on the edit itself, is refused with the reason."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.branches.branch import Expression, InputScale, OutputScale, RowScale, Serial
from peftfx.rewriter.branches.prompts import Tokens
from peftfx.rewriter.branches.routing import Routed
from peftfx.rewriter.errors import FoldError, PassError
from peftfx.rewriter.pipeline.method import Method
from peftfx.rewriter.pipeline.passes import REGISTRY
from peftfx.rewriter.program.history import Contract

from .methods.common import hooked
from .models import batch, first

Toy = Callable[..., Method]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Generator[Toy]:
    """A method `toy` by its `insert` or `insert_all`, which reads the new input `strength`."""
    monkeypatch.setitem(sys.modules, "toy", ModuleType("toy"))

    def define(where: str, kinds: tuple[str, ...] = ("linear",), **members: Any) -> Method:
        body = {"__module__": "toy", "where": where, "kinds": kinds, **members}
        made = type("Toy", (Method,), {**body, "__annotations__": {"where": "str"}})
        return dataclass(frozen=True, kw_only=True)(made)()

    yield define
    REGISTRY.pop("toy", None)


class Parameter:
    """A trained vector of branches that multiply it by what they read."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        noise = torch.randn(size, generator=torch.Generator().manual_seed(0))
        self.t = nn.Parameter(noise * 0.3)


class Out(Parameter, OutputScale):
    def scale(self, strength: Tensor) -> Tensor:
        return 1 + strength * self.t


class In(Parameter, InputScale):
    def scale(self, strength: Tensor) -> Tensor:
        return 1 + strength * self.t


class Rows(Parameter, RowScale):
    def branch(self, x: Tensor, strength: Tensor) -> Tensor:
        del strength
        return x.new_zeros(*x.shape[:-1], len(self.t))

    def delta(self) -> Tensor:
        return torch.zeros(32, 32)

    def rows(self, weight: Tensor, strength: Tensor) -> Tensor:
        del weight
        return 1 + strength * self.t


class Weight(Parameter, Expression):
    def forward(self, w: Tensor, strength: Tensor) -> Tensor:
        return w * (1 + strength * self.t)


class All(Parameter, Routed):
    """Takes every token, and adds a multiple of what the region reads."""

    def __init__(self, *size: int) -> None:
        Routed.__init__(self, 1)
        self.t = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0)) * 0.3)

    def scores(self, x: Tensor, strength: Tensor) -> Tensor:
        return (x * self.t * strength).sum(-1)

    def weights(self, scores: Tensor, count: Tensor, valid: Tensor | None) -> Tensor:
        return torch.ones_like(scores)

    def aside(self, x: Tensor, strength: Tensor) -> Tensor:
        return x * self.t * strength


def strength(edit: Any) -> Any:
    return edit.add_input("strength", torch.tensor(0.0))


def inserted(word: str, branch: type, **options: Any) -> Callable[..., None]:
    def insert(self: Method, edit: Any, site: Any) -> None:
        getattr(edit, word)(site, branch(32, **options), strength=strength(edit))

    return insert


Q = "layers.0.query"
CASES: dict[str, tuple[str, dict[str, Any], str, Callable[..., Tensor]]] = {
    "output scale": (
        "q and layer==0", {"insert": inserted("scale", Out)}, Q, lambda m, x, y, c: y * c,
    ),
    "input scale": (
        "q and layer==0", {"insert": inserted("scale", In)}, Q,
        lambda m, x, y, c: nn.functional.linear(x * c, m.weight, m.bias),
    ),
    "row scale": (
        "q and layer==0", {"insert": inserted("rescale", Rows)}, Q,
        lambda m, x, y, c: (y - m.bias) * c + m.bias,
    ),
    "expression": (
        "q and layer==0",
        {"insert": lambda self, edit, site: edit.express(site, site.weight, Weight(32), strength=strength(edit))},
        Q, lambda m, x, y, c: nn.functional.linear(x, m.weight * c, m.bias),
    ),
    "routed": (
        "sublayer and layer==0",
        {
            "kinds": ("sublayer",),
            "insert_all": lambda self, edit, sites, plan: edit.wrap(sites, All(32), strength=strength(edit)),
        },
        "layers.0", lambda m, x, y, c: y + x * (c - 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_words_take_values(captured: Any, toy: Toy, case: str) -> None:
    where, members, module, formula = CASES[case]
    contract = Contract("trainable")
    model, base = captured["encoder"]
    program = peftfx.run(base, [toy(where, contract=contract, **members)])
    inputs = batch(4, 11, pad=3)
    real = inputs["attention_mask"].bool()  # no region runs on padding
    torch.testing.assert_close(first(program(**inputs))[real], first(base(**inputs))[real])
    (t,) = (p.detach() for p in program.trainable_parameters())
    read = model.get_submodule(module)
    with hooked(model, {module: lambda i, o: formula(read, i[0], o, 1 + 2 * t)}):
        want = first(model(**inputs))
    got = first(program(**inputs, strength=torch.tensor(2.0)))
    torch.testing.assert_close(got[real], want[real], rtol=1e-5, atol=1e-5)
    assert (want - first(base(**inputs)))[real].abs().max() > 0.05
    if case in ("output scale", "input scale", "row scale"):
        with pytest.raises(FoldError, match="reads strength"):
            peftfx.run(program, "fold{names=[toy]}")


class Behind(Parameter, Serial):
    def update(self, h: Tensor, strength: Tensor) -> Tensor:
        return h * self.t * strength.mean()


class Read(Tokens):
    def __init__(self) -> None:
        super().__init__(3)
        self.t = nn.Parameter(torch.randn(3, 32))

    def rows(self, seen: Tensor) -> Tensor:
        return self.t * seen.mean((1, 2))[:, None, None]


class Mean(nn.Module):
    def forward(self, seen: Tensor) -> Tensor:
        return seen.mean(1, keepdim=True)


def later(edit: Any) -> Any:
    return edit.output(edit.program.sites["layers.0.fc2.weight"])


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "prompt": (
        "embedding.token",
        {"insert": lambda self, edit, site: edit.prepend_tokens(site, Read(), seen=later(edit))},
        "the branch Read at words.weight reads seen = .*a cycle. Read edit.output",
    ),
    "prompt through share": (
        "embedding.token",
        {"insert": lambda self, edit, site: edit.prepend_tokens(
            site, Read(), seen=edit.share("mean", Mean(), seen=later(edit)))},
        "reads seen = .* through the shared module .*mean, which depends on .* a cycle",
    ),
    "scale": (
        "q and layer==0",
        {"insert": lambda self, edit, site: edit.scale(site, Out(32), strength=later(edit))},
        "reads strength = .* a cycle",
    ),
    "after": (
        "attn and sublayer and layer==0",
        {"kinds": ("sublayer",), "insert": lambda self, edit, site: edit.after(
            site, Behind(32), strength=later(edit))},
        "the branch Behind at s0.layer0.attn reads strength = .* a cycle",
    ),
    "rescale": (
        "q and layer==0",
        {"insert": lambda self, edit, site: edit.rescale(site, Rows(32), strength=later(edit))},
        "reads strength = .* a cycle",
    ),
    "express": (
        "q and layer==0",
        {"insert": lambda self, edit, site: edit.express(
            site, site.weight, Weight(32), strength=later(edit))},
        "reads strength = .* a cycle",
    ),
    "wrap": (
        "sublayer and layer==0",
        {"kinds": ("sublayer",), "insert_all": lambda self, edit, sites, plan: edit.wrap(
            sites, All(32), strength=later(edit))},
        "reads strength = .* a cycle",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_cycles_are_refused(captured: Any, toy: Toy, case: str) -> None:
    where, members, message = REFUSED[case]
    kinds = ("embedding",) if case.startswith("prompt") else members.pop("kinds", ("linear",))
    with pytest.raises(PassError, match=message):
        peftfx.run(captured["encoder"][1], [toy(where, kinds, **members)])
