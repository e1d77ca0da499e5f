"""OFT against its equation and Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.passes.reparameterized.oft import nearest_divisor
from peftfx.rewriter.errors import OptionError
from peftfx.rewriter.products.rotations import places, skew

from ..models import batch, bert, first, llama, randomise
from ..test_weight_shapes import IDS, Mixed
from .common import check, copied, hooked, tensors


def rotation(q: Tensor, size: int, inputs: int, terms: int = 0) -> Tensor:
    """The block-diagonal R `[inputs, inputs]`: (1 - Q)(1 + Q)^-1, or a sum of powers of Q."""
    blocks: list[Tensor] = []
    for vector in q:
        upper = torch.zeros(size, size, dtype=q.dtype)
        upper[*torch.triu_indices(size, size, 1)] = vector
        own, one = upper - upper.T, torch.eye(size, dtype=q.dtype)
        power = torch.linalg.matrix_power
        blocks.append(
            (one - own) @ torch.linalg.inv(one + own)
            if not terms
            else one + 2 * sum(power(own, i) for i in range(1, terms - 1)) + power(own, terms - 1)
        )
    return torch.block_diag(*(blocks * (inputs // size // len(blocks))))


@pytest.mark.parametrize(
    "options", ["block=8", "blocks=2", "block=8,share=true", "block=8,series=true"]
)
def test_oft_equals_its_reference(hand: Any, options: str) -> None:
    """y = W R^T x + b."""
    _, model, base = hand
    program = randomise(peftfx.run(base, f"oft{{{options},where=linear}}"), 0.3)
    hooks: dict[str, Callable[..., Tensor]] = {}
    for name, t in tensors(program).items():
        layer: Any = model.get_submodule(name)
        inputs = layer.in_features
        size = inputs // 2 if "blocks" in options else 8
        r = rotation(t["q"], size, inputs, 5 if "series" in options else 0)
        hooks[name] = lambda i, o, w=layer.weight, r=r: o + i[0] @ (w @ r.T - w).T
    inputs = batch(4, 11, pad=3)
    with hooked(model, hooks):
        want = model(**inputs)
    check(program, base, want, inputs)


CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "block=8": {"oft_block_size": 8, "use_cayley_neumann": False},
    "blocks=2,share=true": {"r": 2, "oft_block_size": 0, "block_share": True,
                            "use_cayley_neumann": False},
    **{f"block=8,series=true,terms={n}": {"oft_block_size": 8, "num_cayley_neumann_terms": n}
       for n in (2, 3, 4, 5, 6)},
}  # fmt: skip


@pytest.mark.parametrize("options", CONFIGS)
def test_oft_equals_peft(options: str) -> None:
    import peft

    torch.manual_seed(0)
    make = llama if "terms" in options else bert
    model = make().eval()
    base = peftfx.capture(model, kwargs=batch())
    where, names = ("linear", r".*(query|key|value|dense)") if make is bert else (
        "q|v", ["q_proj", "v_proj"]
    )  # fmt: skip
    program = randomise(peftfx.run(base, f"oft{{{options},where={where}}}"), 0.3)
    other = peft.get_peft_model(model, peft.OFTConfig(target_modules=names, **CONFIGS[options]))
    copied(program, other.eval(), {"q": "oft_R.default.weight"})
    inputs = batch(4, 11, pad=2)
    check(program, base, other(**inputs), inputs)


def test_a_rotation_is_one_to_rounding() -> None:
    """Far from the identity, too, and it turns back."""
    from peftfx.rewriter.products.rotations import cayley

    for dtype, most in ((torch.float32, 2e-6), (torch.float64, 1e-14)):
        q = skew(torch.randn(6, 28, dtype=dtype) * 3, places(8))
        assert torch.equal(q, -q.mT)
        r = cayley(q)
        assert float((r @ r.mT - torch.eye(8, dtype=dtype)).abs().max()) < most * 10


def test_angles_and_lengths_of_neurons_stay(captured: Any) -> None:
    """What the paper calls hyperspherical energy: the inner products of the rows of W."""
    base = captured.double("encoder")
    folded = peftfx.run(randomise(peftfx.run(base, "oft{block=8,where=linear}"), 0.3), "fold")
    for site in peftfx.run(base, "oft{block=8,where=linear}").history[-1].edited:
        old, new = (p.module.get_parameter(site).detach() for p in (base, folded))
        assert float((old - new).abs().max()) > 0.01
        torch.testing.assert_close(old @ old.T, new @ new.T, rtol=0, atol=1e-12)


def test_trainable_count(captured: Any) -> None:
    _, base = captured["bert"]
    for options, count in (("block=8", 4 * 28), ("blocks=2", 2 * 120), ("share=true,block=8", 28)):
        program = peftfx.run(base, f"oft{{{options},where=q|v}}")
        assert sum(p.numel() for p in program.trainable_parameters()) == 2 * 2 * count


@pytest.mark.parametrize("options", ["", ",series=true"])
def test_it_folds_exactly_in_double_precision(captured: Any, options: str) -> None:
    base = captured.double("decoder")
    program = randomise(peftfx.run(base, f"oft{{block=8,where=linear{options}}}"), 0.3)
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    gap = first(folded(**batch())) - first(program(**batch()))
    assert float(gap.detach().abs().max()) <= 1e-12


def test_it_folds_below_and_above_others(captured: Any) -> None:
    """Deltas read what has turned, and scales come first, whatever the order of the passes."""
    base = captured.double("encoder")
    recipe = (
        "oft{block=8,where=q|ffn};lora{rank=2,where=q};ia3{where=ffn.down};oft{block=4,name=two}"
    )
    program = randomise(peftfx.run(base, recipe), 0.3)
    again = peftfx.run(base, "; ".join(reversed(recipe.split(";"))))
    assert again.text() == program.text()
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    gap = first(folded(**batch())) - first(program(**batch()))
    assert float(gap.detach().abs().max()) <= 1e-12


def test_parts_of_a_fused_weight(captured: Any) -> None:
    """Only their rows turn."""
    model, base = captured["fused"]
    program = randomise(peftfx.run(base, "oft{block=8,where=q|v}"), 0.3)
    folded = peftfx.run(program, "fold")
    ids = {"input_ids": batch(4, 11)["input_ids"]}
    torch.testing.assert_close(first(folded(**ids)), first(program(**ids)), rtol=1e-4, atol=1e-5)
    site = next(s for s in base.sites if s.role == "q")
    name, width = site.weight, len(site.features)  # pyright: ignore
    old, new = model.get_parameter(name), folded.module.get_parameter(name)
    changed = (old - new).abs().amax(1) > 1e-6
    assert changed[:width].all() and not changed[width : 2 * width].any()


def test_convolutions_and_experts() -> None:
    """W R^T of the patches; one R for all groups, and for all experts."""
    torch.manual_seed(0)
    model = Mixed().eval()
    base = peftfx.capture(model, (torch.randint(1, 20, (2, 5)),))
    program = randomise(peftfx.run(base, "oft{block=4,where=conv|experts}"), 0.3)
    with torch.no_grad():
        for attachment in program.attachments:
            branch: Any = program.branch(attachment)
            weight = model.get_parameter(attachment.site)
            matrix = branch.shape.matrix(weight)
            r = rotation(branch.map.q.detach(), branch.map.size, matrix.shape[1])
            weight.copy_(branch.shape.stored(matrix @ r.T))
    assert len(program.attachments) >= 5
    for got, want in zip(program(IDS), model(IDS), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    torch.testing.assert_close(folded(IDS)[1], program(IDS)[1], rtol=1e-4, atol=1e-5)


def test_constrained_it_stays_near(captured: Any) -> None:
    """After each step no block is further from zero than eps / sqrt(blocks), as in PEFT."""
    from peft.tuners.oft.layer import OFTRotationModule

    _, base = captured["encoder"]
    program = peftfx.run(base, "oft{block=8,coft=true,eps=0.01,where=q}").train()
    controllers = peftfx.controllers(program)
    optimizer = torch.optim.AdamW(controllers.param_groups(lr=0.1))
    controllers.start(optimizer, total_steps=2)
    theirs = OFTRotationModule(4, 28, 8, 32, coft=True)
    for step in range(2):
        first(program(**batch())).pow(2).mean().backward()
        optimizer.step()
        before = [p.detach().clone() for p in program.trainable_parameters()]
        controllers.after_step(step), optimizer.zero_grad()
        for old, new in zip(before, program.trainable_parameters(), strict=True):
            want = theirs._project_batch(old, eps=0.01)  # pyright: ignore
            torch.testing.assert_close(new.detach(), want)
            assert float((old - new.detach()).abs().max()) > 0.01


def test_bad_options(captured: Any) -> None:
    _, base = captured["encoder"]
    assert [nearest_divisor(32, n) for n in (1, 3, 5, 6, 30, 90)] == [1, 2, 4, 4, 32, 32]
    with pytest.raises(OptionError, match=r"blocks of one of its 32 inputs cannot turn"):
        peftfx.run(base, "oft{blocks=32,where=q}")
    for options in ("block=1", "blocks=-1", "eps=0", "terms=1", "terms=200"):
        with pytest.raises(OptionError, match="oft"):
            peftfx.parse(f"oft{{{options}}}")
