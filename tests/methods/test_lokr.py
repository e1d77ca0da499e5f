"""LoKr against torch.kron and Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.passes.reparameterized.lokr import divided
from peftfx.rewriter.errors import OptionError

from ..models import batch, bert, first, llama, randomise
from ..test_weight_shapes import IDS, Mixed
from .common import check, copied, hooked, tensors

NAMES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")


def change(t: Mapping[str, Tensor], scale: float) -> Tensor:
    """s C1 (x) C2, each whole or a product."""
    one, two = (t[n] if n in t else t[f"{n}_a"] @ t[f"{n}_b"] for n in ("w1", "w2"))
    return torch.kron(one, two) * scale


OPTIONS = ("rank=2", "rank=8", "rank=1,decompose_both=true", "rank=2,factor=4")


@pytest.mark.parametrize("options", OPTIONS)
def test_lokr_equals_its_reference(hand: Any, options: str) -> None:
    _, model, base = hand
    program = randomise(peftfx.run(base, f"lokr{{{options},alpha=6,where=linear}}"), 0.3)
    rank = int(options.partition("=")[2].partition(",")[0])
    hooks: dict[str, Callable[..., Tensor]] = {
        n: lambda i, o, t=t: o + i[0] @ change(t, 6 / rank).T for n, t in tensors(program).items()
    }
    inputs = batch(4, 11, pad=3)
    with hooked(model, hooks):
        want = model(**inputs)
    check(program, base, want, inputs)


@pytest.mark.parametrize("options", OPTIONS)
def test_lokr_equals_peft(options: str) -> None:
    """Its shapes, too, for the same rank, factor and parts."""
    import peft

    torch.manual_seed(0)
    make = bert if "both" in options else llama
    model = make().eval()
    base = peftfx.capture(model, kwargs=batch())
    names = ["query", "value"] if make is bert else ["q_proj", "v_proj", "down_proj"]
    where = "q|v" if make is bert else "q|v|ffn.down"
    program = randomise(peftfx.run(base, f"lokr{{{options},alpha=5,where={where}}}"), 0.3)
    said = {k: v for k, _, v in (o.partition("=") for o in options.split(","))}
    config = peft.LoKrConfig(
        r=int(said["rank"]), alpha=5, target_modules=names, decompose_both="decompose_both" in said,
        decompose_factor=int(said.get("factor", -1)),
    )  # fmt: skip
    other = peft.get_peft_model(model, config).eval()
    copied(program, other, {n: f"lokr_{n}.default" for n in NAMES})
    ours = {n: tuple(p.shape) for n, p in program.named_trainable_parameters().items()}
    theirs = [tuple(p.shape) for p in other.parameters() if p.requires_grad]
    assert sorted(ours.values()) == sorted(theirs)
    inputs = batch(4, 11, pad=2)
    check(program, base, other(**inputs), inputs)


def test_sizes_are_divided_as_peft_does() -> None:
    from peft.tuners.lokr.layer import factorization

    for size in (1, 2, 7, 12, 127, 128, 250, 360, 384, 512, 768, 1024, 1536):
        for factor in (-1, 1, 2, 3, 4, 5, 8, 16, 100):
            assert divided(size, factor) == factorization(size, factor), (size, factor)


def test_trainable_count(captured: Any) -> None:
    _, base = captured["bert"]  # 32 is 4 x 8
    program = peftfx.run(base, "lokr{rank=3}")
    assert sum(p.numel() for p in program.trainable_parameters()) == 2 * 2 * (4 * 4 + 2 * 3 * 8)
    program = peftfx.run(base, "lokr{rank=4}")
    assert sum(p.numel() for p in program.trainable_parameters()) == 2 * 2 * (4 * 4 + 8 * 8)


def test_it_folds_exactly_in_double_precision(captured: Any) -> None:
    base = captured.double("decoder")
    program = randomise(peftfx.run(base, "lokr{rank=2,where=linear}"), 0.3)
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    gap = first(folded(**batch())) - first(program(**batch()))
    assert float(gap.detach().abs().max()) <= 1e-12


@pytest.mark.parametrize("rank", [1, 8])
def test_convolutions(rank: int) -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    base = peftfx.capture(model, (torch.randint(1, 20, (2, 5)),))
    program = randomise(peftfx.run(base, f"lokr{{rank={rank},where=conv}}"), 0.3)
    with torch.no_grad():
        for attachment in program.attachments:
            branch: Any = program.branch(attachment)
            t = {n: p.detach() for n, p in branch.named_parameters()}
            model.get_parameter(attachment.site).add_(branch.shape.stored(change(t, 8 / rank)))
    assert len(program.attachments) == 4
    for got, want in zip(program(IDS), model(IDS), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not peftfx.run(program, "fold").attachments


def test_starts(captured: Any) -> None:
    _, base = captured["encoder"]
    start = tensors(peftfx.run(base, "lokr{rank=2,init=lycoris}"))["layers.0.query"]
    assert not start["w2_b"].any() and start["w2_a"].all() and start["w1"].all()
    for options in ("rank=0", "alpha=0", "factor=0", "init=zero"):
        with pytest.raises(OptionError, match="lokr"):
            peftfx.parse(f"lokr{{{options}}}")
