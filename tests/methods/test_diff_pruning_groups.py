"""Diff pruning's structured forms: gates that rows, columns, layers or neurons share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx

from ..models import batch, first, randomise
from .test_diff_pruning import baked, gate, values

GROUPS = {
    "tensor": lambda name, shape: (),
    "row": lambda name, shape: (shape[0], 1) if len(shape) == 2 else (),
    "column": lambda name, shape: (1, shape[1]) if len(shape) == 2 else (),
}


def shared_gates(program: peftfx.Program, groups: str) -> dict[str, Tensor]:
    """By tensor, alpha of the gates that it shares, as they are multiplied with w."""
    found: dict[str, Tensor] = {}
    held = dict(program.module.named_parameters())
    for attachment in program.attachments:
        branch: Any = program.branch(attachment)
        if not branch.shared:
            continue
        name, alpha = branch.piece.name, held[f"{branch.shared}.alpha"].detach()
        assert alpha.shape == (() if groups == "layer" else (64,))
        columns = groups == "neuron" and name.endswith("fc2.weight")
        rows = groups == "neuron" and name.endswith("fc1.weight")
        found[name] = alpha[:, None] if rows else alpha[None] if columns else alpha
    return found


@pytest.mark.parametrize("groups", ["tensor", "row", "column", "layer", "neuron"])
def test_groups_of_entries_share_gates(captured: Any, groups: str, tmp_path: Path) -> None:
    model, base = captured["encoder"]
    text = f"diff_pruning{{alpha=1,density=0.05,l0=0.01,groups={groups}}}"
    program = randomise(peftfx.run(base, text), 0.3)
    held, shared = values(program), shared_gates(program, groups)
    want_shared = {
        "layer": {n for n in held if n.startswith("layers.")},
        "neuron": {n for n in held if "fc1" in n or "fc2.weight" in n},
    }
    assert set(shared) == want_shared.get(groups, set())
    modules = {program.branch(a).shared for a in program.attachments} - {""}
    assert len(modules) == (2 if shared else 0)
    other = copy.deepcopy(model)
    parameters, penalty = dict(other.named_parameters()), 0.0
    for name, t in held.items():
        alpha = shared.get(name, t.get("group"))
        assert alpha is not None and ("group" in t) == (name not in shared)
        if name not in shared:
            shape = GROUPS.get(groups, GROUPS["tensor"])(name, t["w"].shape)
            assert alpha.shape == shape
        with torch.no_grad():
            parameters[name].add_(gate(t["alpha"]) * gate(alpha) * t["w"])
        penalty += float((t["alpha"].double().sigmoid() * alpha.double().sigmoid()).sum())
    inputs = batch(4, 11, pad=3)
    want = first(other(**inputs)).detach()
    torch.testing.assert_close(first(program(**inputs)).detach(), want, rtol=1e-5, atol=1e-5)
    controllers = peftfx.controllers(program)
    assert float(controllers.loss(None).detach()) == pytest.approx(0.01 * penalty, rel=1e-5)
    rates = {n: g["lr"] for g in controllers.param_groups(lr=1e-3) for n in g["names"]}
    assert all((r == 10.0) == n.endswith((".alpha", ".group")) for n, r in rates.items())
    loose = randomise(peftfx.run(base, text.replace("l0", "compat=true,l0")), 0.3)
    gates = [p for n, p in loose.named_trainable_parameters().items()
             if n.endswith((".alpha", ".group"))]  # fmt: skip
    apart = sum(float(p.detach().double().sigmoid().sum()) for p in gates)
    got = float(peftfx.controllers(loose).loss(None).detach())
    assert got == pytest.approx(0.01 * apart, rel=1e-5)
    folded = peftfx.run(program, "fold")
    torch.testing.assert_close(first(folded(**inputs)).detach(), want, rtol=1e-4, atol=1e-5)
    sparse = baked(program)
    assert "gates" not in sparse.text() and "Gated" not in sparse.text()
    every = torch.cat([(parameters[n] - dict(model.named_parameters())[n]).abs().flatten()
                       for n in held]).detach()  # fmt: skip
    count = round(0.05 * every.numel())
    kept = torch.cat([t["values"].abs() for t in values(sparse).values()])
    assert kept.numel() == count
    torch.testing.assert_close(
        kept.sort().values, every.sort().values[-count:], atol=1e-6, rtol=1e-4
    )
    for stage, saved in enumerate((program, sparse)):
        got = first(saved(**inputs)).detach()
        peftfx.save(saved, tmp_path / str(stage))
        assert torch.equal(first(peftfx.load(base, tmp_path / str(stage))(**inputs)), got)
