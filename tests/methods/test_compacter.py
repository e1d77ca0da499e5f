"""Compacter against dense sums of torch.kron; its counts; what `bake` and AdapterHub's files hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import peftfx
from peftfx.exporters.formats import load_adapter, save_adapter
from peftfx.rewriter.errors import ArtifactError, OptionError
from peftfx.rewriter.products.kronecker import hypercomplex, hypercomplex_matrix

from ..models import batch, first, moved, randomise
from .common import LAST, hooked, subject

FORMS = ["rank=1", "rank=3", "rank=none,shared=false"]


def dense(held: Mapping[str, Tensor], rule: Tensor, side: str) -> Tensor:
    """H = sum_i kron(A_i, B_i), [in, out]."""
    b = held[f"{side}_left"]
    b = b if f"{side}_right" not in held else torch.bmm(b, held[f"{side}_right"])
    return torch.stack([torch.kron(a, one) for a, one in zip(rule, b, strict=True)]).sum(0)


def reference(program: peftfx.Program, name: str) -> dict[str, Any]:
    """h <- h + (gelu(h H_D + b_D)) H_U + b_U behind each sublayer."""
    held = {n: p.detach() for n, p in program.named_trainable_parameters().items()}
    own = {n.removeprefix("peftfx.compacter."): p for n, p in held.items()}
    hooks: dict[str, Any] = {}
    for stream, patterns in LAST[name].items():
        for layer in range(2):
            for role in patterns:
                # a cross-attention's sublayer is told by its place
                site = f"{stream}.layer{layer}.{'cross' if role == 'cross' else role}"
                mine = {
                    n.removeprefix(f"{site}.serial."): p
                    for n, p in own.items()
                    if n.startswith(f"{site}.serial")
                }
                rules = {
                    s: own.get("rule.a", own.get(f"{site}.{s}_rule.a")) for s in ("down", "up")
                }
                down, up = (dense(mine, rules[s], s) for s in ("down", "up"))  # pyright: ignore

                def adapt(
                    _: Any, h: Tensor, t: Any = mine, d: Tensor = down, u: Tensor = up
                ) -> Tensor:
                    return h + F.gelu(h @ d + t["down_bias"]) @ u + t["up_bias"]

                hooks[patterns[role].format(layer)] = adapt
    return hooks


@pytest.mark.parametrize(("n", "k", "m", "rank"), [
    (2, 8, 4, 1), (4, 8, 24, 2), (3, 9, 6, None), (3, 6, 9, None), (1, 5, 7, 2),
])  # fmt: skip
def test_the_product_is_that_of_torch(n: int, k: int, m: int, rank: int | None) -> None:
    """In each order; of rows that lie in one axis, too."""
    rule = torch.randn(n, n, n).double()
    left = torch.randn(n, k // n, rank or m // n).double()
    right = None if rank is None else torch.randn(n, rank, m // n).double()
    held = {"x_left": left} | ({} if right is None else {"x_right": right})
    want = dense(held, rule, "x")
    torch.testing.assert_close(hypercomplex_matrix(rule, left, right), want)
    for shape in ((2, 5, k), (3, k), (k,)):
        x = torch.randn(shape).double()
        torch.testing.assert_close(hypercomplex(x, rule, left, right), x @ want)


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("name", list(LAST))
def test_compacter_equals_its_reference(captured: Any, zoo: Any, name: str, options: str) -> None:
    model, base, inputs = subject(captured, zoo, name)
    program = peftfx.run(base, f"compacter{{n=2,bottleneck=4,norms=false,{options}}}")
    program = randomise(program, 0.3)
    with hooked(model, reference(program, name)):
        want = first(model(**inputs))
    torch.testing.assert_close(first(program(**inputs)), want, rtol=1e-5, atol=1e-5)
    assert moved(first(base(**inputs)), want) > 0.01


@pytest.mark.parametrize("options", FORMS)
def test_bake_leaves_an_ordinary_adapter(captured: Any, options: str, tmp_path: Path) -> None:
    """H is two small matrices, exactly; it trains on, and is saved."""
    base = captured.double("decoder")
    program = randomise(peftfx.run(base, f"compacter{{n=2,bottleneck=4,{options}}}"), 0.3)
    want = first(program(**batch())).detach()
    baked = peftfx.run(program, "bake")
    assert float((first(baked(**batch())).detach() - want).abs().max()) <= 1e-12
    assert baked.shared == () and "Compacter" not in baked.text()
    names = {n.rpartition(".")[2] for n in baked.named_trainable_parameters() if "compacter" in n}
    assert names == {"down", "down_bias", "up", "up_bias"}
    peftfx.save(baked, tmp_path / "a")
    assert torch.equal(first(peftfx.load(base, tmp_path / "a")(**batch())), first(baked(**batch())))
    (kept, *_) = peftfx.run(program, "fold").history[-1].skipped
    assert "activation function" in kept[1]


def test_trainable_count(captured: Any) -> None:
    """rank (k + m) + m a projection, and n^3 once; T5-base of the paper: 114,112 at n=4, r=24."""

    def count(d: int, r: int, n: int, rank: int, adapters: int) -> int:
        return adapters * (2 * rank * (d + r) + d + r) + n**3

    assert count(768, 24, 4, 1, 48) == 114_112
    _, base = captured["bert"]
    d = 32
    for n, r, rank in ((4, 8, 1), (2, 6, 3)):
        text = f"compacter{{n={n},bottleneck={r},rank={rank},norms=false}}"
        program = peftfx.run(base, text)
        assert sum(p.numel() for p in program.trainable_parameters()) == count(d, r, n, rank, 4)
    program = peftfx.run(base, "compacter{n=4,bottleneck=8,rank=none,shared=false,norms=false}")
    whole = 4 * (2 * (4**3 + d * 8 // 4) + d + 8)
    assert sum(p.numel() for p in program.trainable_parameters()) == whole
    plus = peftfx.run(base, "compacter{n=4,bottleneck=8,where=ffn and sublayer,norms=false}")
    assert sum(p.numel() for p in plus.trainable_parameters()) == count(d, 8, 4, 1, 2)
    normed = peftfx.run(base, "compacter{n=4,bottleneck=8,where=ffn and sublayer}")
    more = set(normed.named_trainable_parameters()) - set(plus.named_trainable_parameters())
    norms = {n for s in base.sites.of("norm") for n in (s.weight, s.bias) if n}  # pyright: ignore
    assert more == norms


def test_it_starts_nearly_as_the_identity(captured: Any) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(base, "compacter{bottleneck=8}")
    own = program.named_trainable_parameters()
    assert 3e-5 < float(own["peftfx.compacter.rule.a"].detach().std()) < 3e-4
    assert 0 < moved(first(base(**batch())), first(program(**batch()))) < 1e-5
    apart = peftfx.run(base, "compacter{bottleneck=8,shared=false}").named_trainable_parameters()
    assert 0.005 < float(apart["peftfx.compacter.s0.layer0.ffn.up_rule.a"].detach().std()) < 0.02


def test_h_is_never_built_while_it_trains() -> None:
    """No value of a step has as many numbers as H."""
    n, k, m = 4, 96, 64
    rule, left, right = torch.randn(n, n, n), torch.randn(n, k // n, 1), torch.randn(n, 1, m // n)
    tensors = [t.requires_grad_() for t in (rule, left, right)]
    x = torch.randn(1, 3, k)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        hypercomplex(x, *tensors).sum().backward()
    sizes = [s for e in seen.key_averages(group_by_input_shape=True) for s in e.input_shapes]
    assert (
        sizes and max(torch.Size(s).numel() for s in sizes if s and isinstance(s[0], int)) < k * m
    )


def test_adapterhub_has_it_as_its_own(captured: Any, tmp_path: Path) -> None:
    """Its keys and configuration, there and back; the library itself: `formats/`."""
    _, base = captured["bert"]
    for number, options in enumerate(FORMS):
        text = f"compacter{{n=2,bottleneck=4,norms=false,{options}}}"
        program = randomise(peftfx.run(base, text), 0.3)
        folder = tmp_path / str(number)
        save_adapter(program, folder, "adapterhub")
        read = load_adapter(base, folder)
        want = first(program(**batch()))
        torch.testing.assert_close(first(read(**batch())), want, rtol=0, atol=1e-6)
        kinds = {type(read.branch(a)).__name__ for a in read.attachments}
        assert kinds == {"CompacterBranch"} and len(read.shared) == (8 if "none" in options else 1)
        count = [sum(p.numel() for p in p.trainable_parameters()) for p in (program, read)]
        assert count[0] == count[1]
    program = peftfx.run(base, "compacter{n=2,bottleneck=4,norms=false}")
    with pytest.raises(ArtifactError, match="no type of PEFT holds hypercomplex"):
        peftfx.save_peft(program, tmp_path / "peft")


def test_bad_options(captured: Any) -> None:
    _, base = captured["encoder"]
    with pytest.raises(OptionError, match=r"n=3 does not divide its width 32. Choose another n="):
        peftfx.run(base, "compacter{n=3,bottleneck=6}")
    for options in ("n=0", "bottleneck=6", "rank=0", "bottleneck=0"):
        with pytest.raises(OptionError, match=r"compacter.*Choose"):
            peftfx.parse(f"compacter{{{options}}}")
    same = peftfx.parse("compacter{phm_dim=2,phm_rank=2,bottleneck=4}")
    assert str(same) == str(peftfx.parse("compacter{n=2,rank=2,bottleneck=4}"))
