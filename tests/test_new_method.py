"""What the author of a method meets: each error names the method, the site and the rule."""

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
from peftfx.rewriter.branches.branch import Delta, Expression, Serial
from peftfx.rewriter.errors import PassError, RewriteError
from peftfx.rewriter.pipeline.method import Method
from peftfx.rewriter.pipeline.passes import REGISTRY

from .models import batch, first

Q = "layers.0.query.weight"


class Plain(Delta):
    """`f(x, **reads)` given as a function of x, a trained matrix and what it reads."""

    def __init__(self, site: Any, formula: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(site.out_features, site.in_features))
        self.formula = formula or (lambda x, w, **_: x @ w.T)

    def branch(self, x: Tensor, **reads: Tensor) -> Tensor:
        return self.formula(x, self.w, **reads)

    def delta(self) -> Tensor:
        return self.w


class Behind(Serial):
    def update(self, h: Tensor) -> Tensor:
        return h * 0


class Mean(nn.Module):
    def forward(self, seen: Tensor) -> Tensor:
        return seen.mean(-1, keepdim=True)


Toy = Callable[..., type[Method]]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Generator[Toy]:
    """Defines a method `toy` by its `insert`."""
    monkeypatch.setitem(sys.modules, "toy", ModuleType("toy"))

    def define(insert: Callable[..., None], **members: Any) -> type[Method]:
        body = {"insert": insert, "__module__": "toy", "where": "q", **members}
        made = type("Toy", (Method,), {**body, "__annotations__": {"where": "str"}})
        return dataclass(frozen=True, kw_only=True)(made)

    yield define
    REGISTRY.pop("toy", None)


def refused(captured: Any, item: Any, *words: str, base: str = "encoder") -> str:
    """The message, which names the method; the program is what it was."""
    _, program = captured[base]
    before, want = program.text(), first(program(**batch()))
    with pytest.raises(PassError) as caught:
        peftfx.run(program, item)
    message = str(caught.value)
    for word in ("toy", *words):
        assert word in message, message
    assert "\n" not in message
    assert program.text() == before and torch.equal(first(program(**batch())), want)
    return message


def test_insert_that_does_nothing(captured: Any, toy: Toy) -> None:
    method = toy(lambda self, edit, site: None)
    refused(captured, method(), Q, "insert did nothing", "edit.add", "edit.skip")


def test_insert_that_does_nothing_at_one_site(captured: Any, toy: Toy) -> None:
    def insert(self: Method, edit: Any, site: Any) -> None:
        if site.layer == 0:
            edit.add(site, Plain(site))

    refused(captured, toy(insert)(), "layers.1.query.weight", "insert did nothing")


def test_insert_all_that_does_nothing(captured: Any, toy: Toy) -> None:
    method = toy(lambda *_: None, insert_all=lambda self, edit, sites, plan: None)
    refused(captured, method(), "its 2 sites", Q, "edited nothing", "edit.skip")


def test_a_branch_for_another_word(captured: Any, toy: Toy) -> None:
    method = toy(lambda self, edit, site: edit.add(site, Behind()))
    refused(captured, method(), Q, "edit.add", "takes a Delta", "Behind is none", "Use edit.after")
    method = toy(lambda self, edit, site: edit.add(site, nn.Linear(2, 2)))
    refused(captured, method(), Q, "Linear is none", "Let it subclass Delta")
    method = toy(lambda self, edit, site: edit.after(site, Plain(site)))
    refused(captured, method(), Q, "edit.after", "takes a Serial", "Use edit.add")


def test_a_site_of_another_kind(captured: Any, toy: Toy) -> None:
    method = toy(lambda self, edit, site: edit.after(site, Behind()))
    refused(
        captured,
        method(),
        Q,
        "edit.after takes sublayer or embedding sites",
        "of kind linear",
        "kinds = (",
    )


def test_a_value_read_too_late(captured: Any, toy: Toy) -> None:
    def insert(self: Method, edit: Any, site: Any) -> None:
        late = edit.program.sites["layers.0.value.weight"]
        edit.add(site, Plain(site, lambda x, w, seen: x @ w.T * seen), seen=edit.output(late))

    item = toy(insert)(where="q and layer==0")
    said = refused(captured, item, Q, "Plain", "reads seen = ", "computed only later", "edit.input")
    assert "cycle" not in said


def test_a_cycle_through_a_shared_module(captured: Any, toy: Toy) -> None:
    def insert(self: Method, edit: Any, site: Any) -> None:
        gate = edit.share("gate", Mean(), seen=edit.output(site))
        edit.add(site, Plain(site, lambda x, w, gate: x @ w.T * gate), gate=gate)

    item = toy(insert)(where="q and layer==0")
    refused(captured, item, Q, "Plain", "reads gate = ", "a cycle", "edit.input(site)")


def test_a_shared_module_of_earlier_values_is_fine(captured: Any, toy: Toy) -> None:
    def insert(self: Method, edit: Any, site: Any) -> None:
        gate = edit.share("gate", Mean(), seen=edit.input(site))
        edit.add(site, Plain(site, lambda x, w, gate: x @ w.T * gate), gate=gate)

    program = peftfx.run(captured["encoder"][1], toy(insert)(where="q and layer==0"))
    assert program.history[-1].edited == (Q,)


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        (lambda x, w: x @ w[:, :5].T, ("fails on what it reads ([batch, sequence, 32])", "5x32")),
        (lambda x, w: (x @ w.T)[..., :7], ("returns [batch, sequence, 7]", "cannot be added")),
    ],
    ids=["inside", "result"],
)
def test_shapes_that_do_not_fit(captured: Any, toy: Toy, formula: Any, words: Any) -> None:
    method = toy(lambda self, edit, site: edit.add(site, Plain(site, formula)))
    refused(captured, method(), Q, "the branch Plain", "last axis")


@pytest.mark.parametrize(
    "formula",
    [
        lambda x, w: x @ w.T if x.sum() > 0 else x @ w.T * 2,
        lambda x, w: x @ w.T if bool((x > 0).any()) else x @ w.T * 2,
    ],
    ids=["if", "bool"],
)
def test_a_decision_by_values(captured: Any, toy: Toy, formula: Any) -> None:
    method = toy(lambda self, edit, site: edit.add(site, Plain(site, formula)))
    refused(captured, method(), Q, "the branch Plain", "value of a tensor", "torch.where")


def test_a_size_fixed(captured: Any, toy: Toy) -> None:
    method = toy(lambda self, edit, site: edit.add(site, Plain(site, lambda x, w: x.view(3, 9, 32) @ w.T)))  # fmt: skip
    refused(captured, method(), Q, "the branch Plain", "fixes a dynamic size")


def test_require_says_what_to_do(toy: Toy) -> None:
    def check(self: Any) -> None:
        self.require(len(self.where) < 9, "where", "short", "Use a role, such as where=q.")
        self.require(self.where != "v", "where", "another role")

    method = toy(lambda *_: None, check=check)
    with pytest.raises(RewriteError, match=r"toy: where='.*', but it must be short. Use a role, "):
        method(where="q|v|k|o|ffn")
    with pytest.raises(RewriteError, match=r"another role\. Choose another: toy\{where=\.\.\.\}\."):
        method(where="v")


def test_an_expression_takes_every_site(captured: Any, toy: Toy) -> None:
    class Same(Expression):
        def forward(self, w: Tensor) -> Tensor:
            return w * self.s

        def __init__(self) -> None:
            super().__init__()
            self.s = nn.Parameter(torch.ones(()))

    method = toy(
        lambda self, edit, site: edit.express(site, site.weight, Same()), kinds=("linear", "norm")
    )
    program = peftfx.run(captured["encoder"][1], method(where="q|norm"))
    assert {a.slot for a in program.attachments} == {"expression"}
