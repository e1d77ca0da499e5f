"""LoHa against its equation and Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import OptionError
from peftfx.rewriter.products.hadamard import hadamard, pairs

from ..models import batch, bert, first, llama, randomise
from ..test_weight_shapes import IDS, Mixed
from .common import check, copied, hooked, tensors


def change(t: Mapping[str, Tensor], scale: float) -> Tensor:
    """s (A1 B1) o (A2 B2)."""
    return (t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"]) * scale


@pytest.mark.parametrize("rank", [2, 12])
def test_loha_equals_its_reference(hand: Any, rank: int) -> None:
    """Through its factors, and where they are too many, as a matrix."""
    _, model, base = hand
    program = randomise(peftfx.run(base, f"loha{{rank={rank},alpha=6,where=linear}}"), 0.3)
    hooks: dict[str, Callable[..., Tensor]] = {
        n: lambda i, o, t=t: o + i[0] @ change(t, 6 / rank).T for n, t in tensors(program).items()
    }
    inputs = batch(4, 11, pad=3)
    with hooked(model, hooks):
        want = model(**inputs)
    check(program, base, want, inputs)


@pytest.mark.parametrize("make", [bert, llama])
def test_loha_equals_peft(make: Any) -> None:
    import peft

    torch.manual_seed(0)
    model = make().eval()
    base = peftfx.capture(model, kwargs=batch())
    program = randomise(peftfx.run(base, "loha{rank=3,alpha=5,where=q|v}"), 0.3)
    names = ["query", "value"] if make is bert else ["q_proj", "v_proj"]
    other = peft.get_peft_model(model, peft.LoHaConfig(r=3, alpha=5, target_modules=names)).eval()
    copied(program, other, {n: f"hada_{n}.default" for n in ("w1_a", "w1_b", "w2_a", "w2_b")})
    inputs = batch(4, 11, pad=2)
    check(program, base, other(**inputs), inputs)


def test_gradients_are_those_of_the_equation() -> None:
    """Of the matrix that is built again, and of the product's factors."""
    factors = [torch.randn(*s, dtype=torch.float64, requires_grad=True)
               for s in ((5, 2), (2, 4), (5, 2), (2, 4))]  # fmt: skip
    assert torch.autograd.gradcheck(hadamard, factors)
    a, b = pairs(*factors)
    want = (factors[0] @ factors[1]) * (factors[2] @ factors[3])
    torch.testing.assert_close(b @ a, want)


def test_trainable_count(captured: Any) -> None:
    """Twice LoRA's, for a rank of its square."""
    _, base = captured["bert"]
    program = peftfx.run(base, "loha{rank=3}")
    assert sum(p.numel() for p in program.trainable_parameters()) == 2 * 2 * 2 * 3 * (32 + 32)
    branch: Any = program.branch(program.attachments[0])
    randomise(program, 1.0)
    assert torch.linalg.matrix_rank(branch.double().delta()) == 9


@pytest.mark.parametrize("rank", [2, 12])
def test_it_folds_exactly_in_double_precision(captured: Any, rank: int) -> None:
    base = captured.double("decoder")
    program = randomise(peftfx.run(base, f"loha{{rank={rank},where=linear}}"), 0.3)
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    gap = first(folded(**batch())) - first(program(**batch()))
    assert float(gap.detach().abs().max()) <= 1e-12


@pytest.mark.parametrize("rank", [1, 6])
def test_convolutions_and_experts(rank: int) -> None:
    """One B for all groups; of experts each its own."""
    torch.manual_seed(0)
    model = Mixed().eval()
    base = peftfx.capture(model, (torch.randint(1, 20, (2, 5)),))
    program = randomise(peftfx.run(base, f"loha{{rank={rank},where=conv|experts}}"), 0.3)
    with torch.no_grad():
        for attachment in program.attachments:
            branch: Any = program.branch(attachment)
            t = {n: p.detach() for n, p in branch.named_parameters()}
            weight = model.get_parameter(attachment.site)
            weight += branch.shape.stored(change(t, 8 / rank).reshape(-1, t["w1_b"].shape[-1]))
    assert {a.site for a in program.attachments} >= {"wide.weight", "grouped.weight"}
    for got, want in zip(program(IDS), model(IDS), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    torch.testing.assert_close(folded(IDS)[1], program(IDS)[1], rtol=1e-4, atol=1e-5)


def test_starts(captured: Any) -> None:
    _, base = captured["encoder"]
    start = tensors(peftfx.run(base, "loha{init=lycoris}"))["layers.0.query"]
    assert not start["w2_b"].any() and 0.05 < float(start["w1_a"].std()) < 0.15
    with pytest.raises(OptionError, match=r"rank=40 exceeds its size 32 x 32"):
        peftfx.run(base, "loha{rank=40}")
    for options in ("rank=0", "alpha=0", "init=zero"):
        with pytest.raises(OptionError, match="loha"):
            peftfx.parse(f"loha{{{options}}}")
