"""Folds that tell what rounding leaves, and keep what it would lose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import FoldError, OptionError, VerifyError
from peftfx.rewriter.weights import blocks

from .models import randomise

X = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two linears, one of them stored `[in, out]`, and a small change of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40)
        self.second = nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(rank: int, dtype: torch.dtype = torch.bfloat16, scale: float = 0.03) -> Any:
    torch.manual_seed(0)
    base = peftfx.capture(Net().to(dtype).eval(), (X.to(dtype),))
    program = peftfx.run(base, f"lora{{rank={rank},alpha={rank},where=linear}}")
    return randomise(program, scale)


def error(program: Any, folded: Any, site: str) -> tuple[float, float]:
    """What a site lacks of the change, and the size of that: by the equation, in numpy."""
    branches = [program.branch(a) for a in program.attachments if a.site == site]
    old = program.base.module.get_parameter(site).detach().double().numpy()
    delta = sum((b.b.double() @ b.a.double() * b.scale).detach().numpy() for b in branches)
    now = folded.module.get_parameter(site).detach().double().numpy()
    for a in folded.attachments:
        if a.site == site:
            branch = folded.branch(a)
            now = now + (branch.b.double() @ branch.a.double() * branch.scale).detach().numpy()
    return float(np.linalg.norm(old + delta - now)), float(np.linalg.norm(delta))


@pytest.mark.parametrize(("rank", "least"), [(4, 1000.0), (8, 1000.0), (16, 1.0)])
def test_a_residual_branch_carries_what_rounding_would_lose(rank: int, least: float) -> None:
    """All of it up to the rank of the branch; what is of higher rank is rounded as before."""
    program = adapted(rank)
    plain = peftfx.run(program, "fold")
    better = peftfx.run(program, "fold{mode=residual,rank=8}")
    assert {a.adapter for a in better.attachments} == {"residual"}
    for site in ("first.weight", "second.weight"):
        (lost, size), (left, _) = error(program, plain, site), error(program, better, site)
        assert lost > 0.01 * size and left * least <= lost
        old = program.base.module.get_parameter(site)
        assert torch.equal(better.module.get_parameter(site), old) == (rank <= 8)
        shares = better.history[-1].plan.decisions["shares"]
        assert shares[site][1] == pytest.approx(left / size, rel=1e-2, abs=1e-6)


def test_a_change_whose_singular_values_fall_is_carried_nearly_whole() -> None:
    program = adapted(16)
    with torch.no_grad():
        for a in program.attachments:
            branch = program.branch(a)
            branch.a.copy_(torch.linalg.qr(branch.a.mT).Q.mT)
            branch.a.mul_(0.3 * 0.25 ** torch.arange(16)[:, None])
            branch.b.copy_(torch.linalg.qr(branch.b).Q)
    plain, better = (peftfx.run(program, text) for text in ("fold", "fold{mode=residual,rank=8}"))
    for site in ("first.weight", "second.weight"):
        assert 10 * error(program, better, site)[0] <= error(program, plain, site)[0]


def test_residuals_are_saved_trained_and_taken_out(tmp_path: Path) -> None:
    program = adapted(4)
    better = peftfx.run(program, "fold{mode=residual,rank=8,name=rest}")
    assert len(better.trainable_parameters()) == 4
    peftfx.save(better, tmp_path / "a")
    loaded = peftfx.load(program.base, tmp_path / "a")
    x = X.to(torch.bfloat16)
    assert torch.equal(loaded(x), better(x))
    assert {a.adapter for a in loaded.attachments} == {"rest"}
    assert all(c.holds for c in loaded.verify())
    whole = peftfx.run(better, "fold")
    assert not whole.attachments


def test_few_bits_with_a_residual_branch_lose_nothing() -> None:
    program = adapted(4, torch.float32)
    stored = peftfx.run(program.without("lora"), "quantise{format=codebook,where=linear}")
    stored = randomise(peftfx.run(stored, "lora{rank=4,where=linear}"), 0.03)
    plain = peftfx.run(stored, "fold{lossy=true}")
    better = peftfx.run(stored, "fold{lossy=true,mode=residual,rank=4}")
    want = stored(X)
    off, left = ((p(X) - want).norm() / want.norm() for p in (plain, better))
    assert left * 100 < off


def test_few_bits_with_a_residual_branch_hold_the_rest_of_a_change_of_higher_rank() -> None:
    base = peftfx.capture(Net().eval(), (X,))
    for recipe in ("lora{rank=8,where=linear}", "dora{where=linear}"):
        stored = peftfx.run(base, "quantise{format=codebook,where=linear}")
        stored = randomise(peftfx.run(stored, recipe), 0.1)
        plain, better = (
            peftfx.run(stored, f"fold{{lossy=true,{more}}}")
            for more in ("mode=fold", "mode=residual,rank=4")
        )
        want = stored(X)
        assert (better(X) - want).norm() < (plain(X) - want).norm()
        scale = "first.weight.scale"
        assert not torch.equal(*(p.module.get_parameter(scale) for p in (stored, better)))
        assert all(c.holds for c in better.verify())


@pytest.mark.parametrize("mode", ["residual", "keep"])
def test_weights_that_an_expression_computes_leave_nothing_beside_them(mode: str) -> None:
    base = peftfx.capture(Net().eval(), (X,))
    stored = peftfx.run(base, "quantise{format=codebook,where=linear}")
    for program in (base, stored):
        adapted = randomise(peftfx.run(program, "said{dimension=100}"), 0.03)
        with pytest.raises(FoldError, match=r"first\.weight: 'said' computes the weight itself"):
            peftfx.run(adapted, f"fold{{lossy=true,mode={mode}}}")


@pytest.mark.parametrize(("scale", "kept"), [(0.002, True), (0.1, False)])
def test_branches_stay_where_too_little_would_survive(scale: float, kept: bool) -> None:
    program = adapted(4, scale=scale)
    with torch.no_grad():
        for parameter in program.trainable_parameters():
            if parameter.shape[0] > 4:  # b is small
                parameter.mul_(0.05 if kept else 1.0)
    folded = peftfx.run(program, "fold{mode=keep,least=0.9,names=lora}")
    record = folded.history[-1]
    assert bool(folded.attachments) == kept == bool(record.skipped)
    if kept:
        assert "of the change, less than least=0.9" in record.skipped[0][1]
        assert torch.equal(folded(X.to(torch.bfloat16)), program(X.to(torch.bfloat16)))


def test_what_survives_is_said_by_site() -> None:
    program = adapted(4)
    folded = peftfx.run(program, "fold")
    shares = folded.history[-1].plan.decisions["shares"]
    for site, (_, lost) in shares.items():
        off, size = error(program, folded, site)
        assert lost == pytest.approx(off / size, rel=1e-3)
    assert set(shares) == {"first.weight", "second.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    program = adapted(16, dtype, 0.3)
    folded = peftfx.run(program, "fold")
    for a in program.attachments:
        branch: Any = program.branch(a)
        exact = program.base.module.get_parameter(a.site).double()
        exact = exact + branch.b.double() @ branch.a.double() * branch.scale
        got = folded.module.get_parameter(a.site)
        assert torch.equal(got, exact.to(dtype))


def test_blocks_of_rows_are_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = peftfx.run(adapted(4), "fold")
    monkeypatch.setattr(blocks, "BLOCK", 7 * 24)
    parts = peftfx.run(adapted(4), "fold")
    for name, tensor in whole.module.named_parameters():
        assert torch.equal(tensor, parts.module.get_parameter(name))


def test_a_worse_rest_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftfx.rewriter.edits.folding import rest

    parted = rest.parted

    def wrong(*args: Any) -> Any:
        done = parted(*args)
        return rest.Parted(done.rest + 0.1, done.parts)

    monkeypatch.setattr(rest, "parted", wrong)
    with pytest.raises(VerifyError, match=r"does not hold|further off"):
        peftfx.run(adapted(4), "fold{mode=residual}")


def test_wrong_options_are_said() -> None:
    for text, words in (("least=0", "above 0"), ("rank=0", "at least 1"), ("mode=half", "mode")):
        with pytest.raises((OptionError, FoldError), match=words):
            peftfx.run(adapted(4), f"fold{{{text}}}")


def test_where_nothing_folds_no_residual_is_left() -> None:
    base = peftfx.capture(Net().eval(), (X,))
    trained = peftfx.run(base, "bitfit{where=linear}")
    assert not peftfx.run(trained, "fold").attachments
    with pytest.raises(FoldError, match=r"no adapter has a branch to fold.*Leave mode=residual"):
        peftfx.run(trained, "fold{mode=residual}")
