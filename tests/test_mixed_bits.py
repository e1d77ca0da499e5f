"""Bits by place under a budget of bytes: `quantise{format=mixed}` against all choices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import peftfx
from peftfx.rewriter.edits.read import Reading
from peftfx.rewriter.errors import MetaTensorError, OptionError
from peftfx.rewriter.program.sites import LinearSite
from peftfx.rewriter.scores.allocate import Form
from peftfx.rewriter.scores.observe import observe_rows

from .models import Tiny, batch, first
from .test_scores import brute

FORMATS = ("int2", "int4", "int8")


def linears(program: peftfx.Program) -> list[LinearSite]:
    return [s for s in program.sites.of("linear") if isinstance(s, LinearSite) and s.role != "head"]


def stored_bytes(program: peftfx.Program, sites: Sequence[LinearSite]) -> int:
    """Of all parts that weights are stored in."""
    names = tuple(f"{site.weight}." for site in sites)
    return sum(t.nbytes for n, t in program.base_tensors().items() if n.startswith(names))


@pytest.mark.parametrize("observed", [False, True])
def test_bits_go_where_rounding_errs_most(captured: Any, tmp_path: Path, observed: bool) -> None:
    """By trying all choices for all weights, with what each errs in each format alone."""
    _, base = captured["block"]
    data = [batch(2, 9, seed=i) for i in range(2)] if observed else None
    sites = linears(base)
    alone = {f: peftfx.run(base, f"quantise{{format={f},group=8}}") for f in FORMATS}
    squares = {s.id: torch.ones(s.in_features) for s in sites}
    if data is not None:
        squares = dict(observe_rows(base, data, sites, lambda rows: rows.square().mean(0)))
    forms: dict[str, list[Form]] = {s.id: [] for s in sites}
    for site in sites:
        own = base.module.get_parameter(site.weight).detach()
        for program in alone.values():
            dense = Reading(program).weight(site).dense()
            error = ((dense - own).square() * squares[site.id]).sum()
            forms[site.id].append(Form(-float(error), stored_bytes(program, [site])))
    least, most = (stored_bytes(alone[f], sites) for f in ("int2", "int8"))
    for budget in (least, (least + most) // 2, most):
        program = peftfx.run(base, f"quantise{{format=mixed,budget={budget},group=8}}", data=data)
        chosen = program.history[-1].plan.decisions["formats"]
        got = sum(forms[i][FORMATS.index(f)].worth for i, f in chosen.items())
        assert got == pytest.approx(brute(forms, budget)[0], rel=1e-4)
        assert stored_bytes(program, sites) <= budget
    assert set(chosen.values()) == {"int8"}
    adapted = peftfx.run(program, "lora{rank=2,where=q}")
    peftfx.save(adapted, tmp_path / "a")
    assert torch.equal(
        first(peftfx.load(base, tmp_path / "a")(**batch())), first(adapted(**batch()))
    )


def test_budgets_of_bits_that_cannot_be_kept(captured: Any) -> None:
    _, base = captured["block"]
    with pytest.raises(OptionError, match=r"a budget of 10 is below the .* Give at least"):
        peftfx.run(base, "quantise{format=mixed,budget=10}")
    for wrong in (
        "format=mixed",
        "budget=100",
        "format=mixed,budget=-1",
        "format=mixed,budget=9,group=3",
    ):
        with pytest.raises(OptionError, match=r"budget|group"):
            peftfx.parse(f"quantise{{{wrong}}}")
    with torch.device("meta"):
        model = Tiny().eval()
    with pytest.raises(MetaTensorError, match="Load the weights"):
        peftfx.run(peftfx.capture(model, kwargs=batch()), "quantise{format=mixed,budget=0.5}")
