"""KronA against torch.kron, beside weights and beside blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import OptionError, SelectorError
from peftfx.rewriter.products.kronecker import kronecker

from ..models import batch, first, moved, randomise
from .common import LAST, check, hooked, tensors


def test_the_product_is_that_of_torch() -> None:
    """In both orders, and never built."""
    for shapes in ((4, 2, 3, 8), (2, 8, 6, 2), (1, 4, 5, 4), (6, 1, 2, 3)):
        a, b = torch.randn(shapes[:2]).double(), torch.randn(shapes[2:]).double()
        x = torch.randn(2, 5, shapes[1] * shapes[3]).double()
        gap = kronecker(x, a, b) - x @ torch.kron(a, b).T
        assert float(gap.abs().max()) < 1e-12


@pytest.mark.parametrize("options", ["scale=2", "scale=2,a=[2,8]"])
def test_krona_equals_its_reference(hand: Any, options: str) -> None:
    """(W + s A (x) B) x."""
    name, model, base = hand
    where = "where=q|v|ffn.down"
    program = randomise(peftfx.run(base, f"krona{{{options},{where}}}"), 0.3)
    hooks: dict[str, Callable[..., Tensor]] = {
        n: lambda i, o, t=t: o + 2 * i[0] @ torch.kron(t["a"], t["b"]).T
        for n, t in tensors(program).items()
    }
    assert len(hooks) == 6, name
    inputs = batch(4, 11, pad=3)
    with hooked(model, hooks):
        want = model(**inputs)
    check(program, base, want, inputs)


@pytest.mark.parametrize("form", ["block", "residual"])
def test_beside_blocks_it_equals_its_reference(hand: Any, form: str) -> None:
    """FFN(z) + s (A (x) B) z + s_res z, z what the block reads."""
    name, model, base = hand
    program = randomise(peftfx.run(base, f"krona{{form={form},scale=2}}"), 0.3)
    own, hooks = tensors(program), dict[str, Callable[..., Any]]()
    entry = {"encoder": "fc1", "decoder": "up"}[name]
    for layer in range(2):
        seen: list[Tensor] = []
        t = own[f"s0.layer{layer}.ffn"]
        assert ("residual" in t) == (form == "residual")

        def add(_: Any, o: Tensor, t: Any = t, seen: Any = seen) -> Tensor:
            z = seen[-1]
            return o + 2 * z @ torch.kron(t["a"], t["b"]).T + t.get("residual", 0) * z

        hooks[f"layers.{layer}.{entry}"] = lambda i, o, seen=seen: seen.append(i[0]) or o
        hooks[LAST[name]["s0"]["ffn"].format(layer)] = add
    inputs = batch(4, 11, pad=3)
    with hooked(model, hooks):
        want = model(**inputs)
    check(program, base, want, inputs)
    kept = peftfx.run(program, "fold").history[-1].skipped
    assert len(kept) == 2 and all("non-linearity" in reason for _, reason in kept)


def test_trainable_count(captured: Any) -> None:
    """a1 a2 + b1 b2, at least 2 sqrt(out in)."""
    _, base = captured["bert"]
    program = peftfx.run(base, "krona")
    assert sum(p.numel() for p in program.trainable_parameters()) == 2 * 2 * (2 * 32)
    program = peftfx.run(base, "krona{a=[2,8]}")
    assert sum(p.numel() for p in program.trainable_parameters()) == 2 * 2 * (2 * 8 + 16 * 4)
    program = peftfx.run(base, "krona{form=residual}")
    assert sum(p.numel() for p in program.trainable_parameters()) == 2 * (2 * 32 + 1)


def test_it_folds_exactly_in_double_precision(captured: Any) -> None:
    base = captured.double("decoder")
    program = randomise(peftfx.run(base, "krona{where=linear}"), 0.3)
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    gap = first(folded(**batch())) - first(program(**batch()))
    assert float(gap.detach().abs().max()) <= 1e-12


def test_a_residual_that_starts_is_no_identity(captured: Any) -> None:
    _, base = captured["encoder"]
    assert peftfx.run(base, "krona{form=residual}").history[-1].certificate.kind == "identity"
    program = peftfx.run(base, "krona{form=residual,residual=1}")
    assert program.history[-1].certificate.kind == "trainable"
    assert moved(first(base(**batch())), first(program(**batch()))) > 0.01


def test_images_and_encoder_decoders(zoo: Any) -> None:
    for name, count in (("vit", 2), ("t5", 4)):
        for form in ("block", "residual"):
            program = peftfx.run(zoo[name], f"krona{{form={form}}}")
            assert len(program.history[-1].edited) == count


def test_bad_options(captured: Any) -> None:
    _, base = captured["encoder"]
    with pytest.raises(OptionError, match=r"a=\[5, 4\] does not divide its 32 outputs"):
        peftfx.run(base, "krona{a=[5,4]}")
    for options in ("scale=0", "a=[0,4]", "form=whole"):
        with pytest.raises(OptionError, match="krona"):
            peftfx.parse(f"krona{{{options}}}")
    with pytest.raises(SelectorError, match=r"form=block. stands beside sublayer sites"):
        peftfx.run(base, "krona{form=block,where=q}")
