"""BOFT against its equation and Hugging Face PEFT; of several factors, see
`tests/formats/test_boft.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import OptionError

from ..models import batch, bert, first, llama, randomise
from ..test_weight_shapes import IDS, Mixed
from .common import check, copied, hooked


def permutation(inputs: int, size: int, index: int) -> Tensor:
    """Of each `2^index size` features, every other `size / 2` first."""
    if index == 0:
        return torch.eye(inputs, dtype=torch.float64)
    width, half = size * 2**index, size // 2
    order: list[int] = []
    for start in range(0, inputs, width):
        runs = [list(range(start + i, start + i + half)) for i in range(0, width, half)]
        order += [n for run in (*runs[0::2], *runs[1::2]) for n in run]
    return torch.eye(inputs, dtype=torch.float64)[order]


def butterfly(blocks: Tensor) -> Tensor:
    """M = F_m ... F_1 with `F = P R P^T` and `R = (1 - Q)(1 + Q)^-1` in blocks."""
    _, count, size, _ = blocks.shape
    product = torch.eye(count * size, dtype=torch.float64)
    for index, own in enumerate(blocks.double()):
        q, one = (own - own.mT) / 2, torch.eye(size, dtype=torch.float64)
        r = torch.block_diag(*((one - q) @ torch.linalg.inv(one + q)))
        p = permutation(count * size, size, index)
        product = p @ r @ p.T @ product
    return product


def held(program: peftfx.Program) -> dict[str, dict[str, Tensor]]:
    """Both branches' tensors by site."""
    found: dict[str, dict[str, Tensor]] = {}
    for attachment in program.attachments:
        branch: Any = program.branch(attachment)
        own = {n.removeprefix("map."): p.detach() for n, p in branch.named_parameters()}
        found.setdefault(attachment.site, {}).update(own)
    return found


@pytest.mark.parametrize("options", ["block=8", "blocks=2", "factors=3", "block=2,factors=5"])
def test_boft_equals_its_reference(hand: Any, options: str) -> None:
    """y = diag(s) W M^T x + b."""
    _, model, base = hand
    program = randomise(peftfx.run(base, f"boft{{{options},where=linear}}"), 0.3)
    hooks: dict[str, Callable[..., Tensor]] = {}
    for site, t in held(program).items():
        name = site.removesuffix(".weight")
        w: Any = model.get_submodule(name).weight.double()
        new = (t["s"].double()[:, None] * (w @ butterfly(t["blocks"]).T) - w).float()
        hooks[name] = lambda i, o, new=new: o + i[0] @ new.T
    inputs = batch(4, 11, pad=3)
    with hooked(model, hooks):
        want = model(**inputs)
    check(program, base, want, inputs)


@pytest.mark.parametrize("make", [bert, llama])
def test_boft_equals_peft(make: Any) -> None:
    import peft

    torch.manual_seed(0)
    model = make().eval()
    base = peftfx.capture(model, kwargs=batch())
    where, names = ("linear", r".*(query|key|value|dense)") if make is bert else (
        "q|v", ["q_proj", "v_proj"]
    )  # fmt: skip
    program = randomise(peftfx.run(base, f"boft{{block=8,where={where}}}"), 0.3)
    config = peft.BOFTConfig(boft_block_size=8, target_modules=names)
    other = peft.get_peft_model(model, config).eval()
    copied(program, other, {"blocks": "boft_R.default", "s": "boft_s.default"})
    inputs = batch(4, 11, pad=2)
    check(program, base, other(**inputs), inputs)


def test_a_butterfly_reaches_all_features_with_few_numbers() -> None:
    """log2 of the number of blocks, and one: as the paper has it."""
    from peftfx.rewriter.products.rotations import butterfly as mapped
    from peftfx.rewriter.products.rotations import cayley

    blocks = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    r = cayley((blocks - blocks.mT) / 2)
    x = torch.eye(32, dtype=torch.float64)
    for factors, reached in ((1, 8), (2, 16), (3, 32)):
        m = mapped(x, r[:factors])
        assert int((m[0].abs() > 1e-12).sum()) == reached
        torch.testing.assert_close(mapped(m, r[:factors], back=True), x)
        torch.testing.assert_close(m @ m.T, x)


def test_trainable_count(captured: Any) -> None:
    _, base = captured["bert"]
    program = peftfx.run(base, "boft{block=4,factors=2,where=q|v}")
    assert sum(p.numel() for p in program.trainable_parameters()) == 2 * 2 * (2 * 8 * 16 + 32)


def test_it_folds_exactly_in_double_precision(captured: Any) -> None:
    base = captured.double("decoder")
    program = randomise(peftfx.run(base, "boft{factors=2,where=linear};lora{where=ffn}"), 0.3)
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    gap = first(folded(**batch())) - first(program(**batch()))
    assert float(gap.detach().abs().max()) <= 1e-12


def test_convolutions_and_experts() -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    base = peftfx.capture(model, (torch.randint(1, 20, (2, 5)),))
    program = randomise(peftfx.run(base, "boft{block=2,factors=2,where=conv|experts}"), 0.3)
    sites = {a.site: program.branch(a) for a in program.attachments}
    with torch.no_grad():
        for site, t in held(program).items():
            shape, weight = sites[site].shape, model.get_parameter(site)  # pyright: ignore
            matrix = shape.matrix(weight).double()  # pyright: ignore
            new = t["s"].double()[:, None] * (matrix @ butterfly(t["blocks"]).T)
            weight.copy_(shape.stored(new.float()))  # pyright: ignore
    assert len(sites) >= 3
    for got, want in zip(program(IDS), model(IDS), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    torch.testing.assert_close(folded(IDS)[1], program(IDS)[1], rtol=1e-4, atol=1e-5)


def test_bad_options(captured: Any) -> None:
    _, base = captured["encoder"]
    for options in ("block=5", "blocks=3", "factors=9", "block=32,factors=2"):
        with pytest.raises(OptionError, match=r"no selected site fits.*do not fit 32 inputs"):
            peftfx.run(base, f"boft{{{options},where=q}}")
    for options in ("block=1", "blocks=-1", "factors=0", "block=3,factors=2"):
        with pytest.raises(OptionError, match="boft"):
            peftfx.parse(f"boft{{{options}}}")
