"""Folding: exact, order-free, reversible bit for bit, and honest about what cannot be folded."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.passes.reparameterized.lora import LoRABranch
from peftfx.rewriter.edits.edit import Editor
from peftfx.rewriter.edits.folding.fold import fold
from peftfx.rewriter.errors import FoldError, NonFiniteError, VerifyError
from peftfx.rewriter.program.site_table import Sites
from peftfx.rewriter.program.sites import LinearSite

from .models import Decoder, Encoder, batch, bert, build, first, llama, moved, randomise

EVERYWHERE = "lora{where=linear and not head}"
FRESH = {"encoder": Encoder, "decoder": Decoder, "bert": bert, "llama": llama}


@pytest.mark.parametrize("name", FRESH)
@pytest.mark.parametrize("text", [EVERYWHERE, "ia3", f"{EVERYWHERE};ia3"])
def test_folded_weights_load_into_the_original_class(captured: Any, name: str, text: str) -> None:
    model, base = captured[name]
    program = randomise(peftfx.run(base, text), 1.0 if text == "ia3" else 0.1)
    want = first(program(**batch(4, 11, pad=3)))
    assert moved(first(model(**batch(4, 11, pad=3))), want) > 0.01
    folded = peftfx.run(program, "fold")
    assert not folded.attachments and not folded.trainable_parameters()
    other = FRESH[name]().eval()
    other.load_state_dict(folded.export_state_dict(), strict=True)
    got = first(other(**batch(4, 11, pad=3)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    bare = [n for n in folded.module.graph.nodes if str(n.target).startswith("peftfx.")]
    assert not bare and folded.text().count("linear(") == base.text().count("linear(")


def test_order_does_not_matter(captured: Any) -> None:
    _, base = captured["decoder"]
    one = randomise(peftfx.run(base, f"{EVERYWHERE};ia3"))
    two = peftfx.run(base, f"ia3;{EVERYWHERE}")
    assert one.text() == two.text()
    values = one.named_trainable_parameters()
    with torch.no_grad():
        for name, parameter in two.named_trainable_parameters().items():
            parameter.copy_(values[name])
    assert torch.equal(first(one(**batch())), first(two(**batch())))
    a, b = peftfx.run(one, "fold"), peftfx.run(two, "fold")
    assert a.text() == b.text()
    assert torch.equal(first(a(**batch())), first(b(**batch())))


def test_unfolding_is_bit_exact_and_the_base_untouched(captured: Any) -> None:
    model, base = captured["encoder"]
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    program = randomise(peftfx.run(base, "lora;ia3"))
    want = first(program(**batch()))
    folded = peftfx.run(program, "fold")
    assert torch.equal(first(program(**batch())), want)
    bare = folded.without("lora").without("ia3")
    assert torch.equal(first(bare(**batch())), first(model(**batch())))
    state = bare.export_state_dict()
    assert all(torch.equal(state[n], tensors[n]) for n in tensors)
    assert all(torch.equal(t, tensors[n]) for n, t in model.state_dict().items())


METHODS = (
    "lora{where=linear and not head,rank=4}", "ia3", "serial_adapter{bottleneck=6}",
    "prefix_tuning{length=5}", "prompt_tuning{length=4}", "bitfit",
)  # fmt: skip


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_folding_next_to_every_other_method(name: str) -> None:
    """Both orders, in double precision, where only a wrong fold leaves a difference."""
    base = peftfx.capture(build(name), kwargs=batch(), dtype=torch.float64)
    for first_one, other in itertools.product(METHODS[:2], METHODS):
        pair = {f"{first_one};{other}", f"{other};{first_one}"} if first_one != other else ()
        for text in pair:
            program = randomise(peftfx.run(base, text), 0.3)
            certificate = peftfx.run(program, "fold").history[-1].certificate
            assert certificate.measured["max_rel"] < 1e-11, (text, certificate)


@pytest.mark.parametrize("name", FRESH)
def test_all_methods_together(captured: Any, name: str) -> None:
    """In float32 the limit is the network's own sensitivity to one rounding of its weights."""
    _, base = captured[name]
    program = randomise(peftfx.run(base, ";".join(METHODS)), 0.3)
    record = peftfx.run(program, "fold").history[-1]
    assert len(record.edited) >= 12 and record.certificate.holds
    assert record.certificate.measured["max_rel"] < 3e-4


def test_one_of_several_adapters(captured: Any) -> None:
    _, base = captured["encoder"]
    program = randomise(peftfx.run(base, "lora{name=en};lora{name=de,where=k|v}"))
    assert program.adapters == ("en", "de")
    folded = peftfx.run(program, "fold{names=en}")
    assert {a.adapter for a in folded.attachments} == {"de"}
    torch.testing.assert_close(first(folded(**batch())), first(program(**batch())))
    alone = program.without("de")
    torch.testing.assert_close(first(folded.without("de")(**batch())), first(alone(**batch())))
    with pytest.raises(FoldError, match="nearest: en"):
        peftfx.run(program, "fold{names=[em]}")


def test_what_cannot_fold_is_reported_with_the_reason(captured: Any) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(base, "lora;serial_adapter;prefix_tuning;prompt_tuning;fold")
    reasons = dict(program.history[-1].skipped)
    assert "not foldable: its activation function is not linear" in reasons["s0.layer0.attn"]
    assert "softmax" in reasons["s0.layer0.attn.core"]
    assert "prompt" in reasons["words.weight"]
    assert len(program.history[-1].edited) == 4
    with pytest.raises(FoldError, match="not linear"):
        peftfx.run(program, "fold{names=serial_adapter}")


def test_an_outer_scale_waits_for_the_inner_delta(captured: Any) -> None:
    _, base = captured["encoder"]
    program = randomise(peftfx.run(base, "lora{where=k};ia3{where=k}"))
    with pytest.raises(FoldError, match="stands between"):
        peftfx.run(program, "fold{names=ia3}")
    folded = peftfx.run(peftfx.run(program, "fold{names=lora}"), "fold{names=ia3}")
    torch.testing.assert_close(first(folded(**batch())), first(program(**batch())))


@pytest.mark.parametrize("tied", ["keep", "untie", "both"])
def test_tied_head_asks_and_obeys(tied: str) -> None:
    model = build("tied")
    program = randomise(peftfx.run(peftfx.capture(model, kwargs=batch()), "lora{where=head}"))
    with pytest.raises(FoldError, match=r"tied=untie"):
        peftfx.run(program, "fold")
    folded = peftfx.run(program, f"fold{{tied={tied}}}")
    if tied == "both":  # changes the embedding, too, and says by how much
        state = folded.export_state_dict()
        assert torch.equal(state["head.weight"], state["embed.weight"])
        assert not torch.equal(state["head.weight"], model.head.weight)
        assert folded.history[-1].certificate.measured["max_rel"] > 0.01
        return
    torch.testing.assert_close(first(folded(**batch())), first(program(**batch())))
    if tied == "untie":
        state = folded.export_state_dict()
        assert not torch.equal(state["head.weight"], state["embed.weight"])
        fresh = Decoder()
        fresh.load_state_dict(state)
        torch.testing.assert_close(fresh(**batch()), first(program(**batch())))
    else:
        assert folded.attachments


def scaled(branch: LoRABranch) -> Tensor:
    return branch.b @ branch.a


def transposed(branch: LoRABranch) -> Tensor:
    return ((branch.b @ branch.a) * branch.scale).T


def shifted(branch: LoRABranch) -> Tensor:
    return (branch.b @ branch.a).roll(1, 0) * branch.scale


def rescaled(branch: LoRABranch) -> Any:
    return branch.a, branch.b, 1.01 * branch.scale


def exchanged(branch: LoRABranch) -> Any:
    return branch.a.flip(0), branch.b, branch.scale


@pytest.mark.parametrize("wrong", [scaled, transposed, shifted, rescaled, exchanged])
def test_wrong_merges_are_caught(
    captured: Any, monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    _, base = captured["encoder"]
    program = randomise(peftfx.run(base, "lora{where=q|k|v|o}"))
    by_factors = wrong in (rescaled, exchanged)
    monkeypatch.setattr(LoRABranch, "factors", wrong if by_factors else lambda _: None)
    if not by_factors:
        monkeypatch.setattr(LoRABranch, "delta", wrong)
    said = "not the old tensor with what its branches add" if by_factors else "something else than"
    with pytest.raises(VerifyError, match=said):
        peftfx.run(program, "fold")


def test_a_changed_weight_is_caught_by_verify(captured: Any) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(randomise(peftfx.run(base, "lora")), "fold")
    assert all(c.holds for c in program.verify())
    with torch.no_grad():
        program.module.get_parameter("layers.0.query.weight").mul_(1.01)
    with pytest.raises(VerifyError, match="changed since the program was made"):
        program.verify()


def test_non_finite_branches_are_refused(captured: Any) -> None:
    _, base = captured["encoder"]
    program = randomise(peftfx.run(base, "lora"))
    with torch.no_grad():
        program.trainable_parameters()[0][0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="leave it out"):
        peftfx.run(program, "fold")


def test_low_precision_reports_what_rounding_loses() -> None:
    model = build("encoder").to(torch.bfloat16)
    base = peftfx.capture(model, kwargs=batch())
    program = randomise(peftfx.run(base, "lora"), 0.01)
    folded = peftfx.run(program, "fold")
    assert 0 < folded.history[-1].certificate.measured["delta_lost"] < 1.5


def test_a_weight_that_is_read_otherwise_than_the_site_says_is_left_alone() -> None:
    """As where another rewriting has turned the weight after the sites were found."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval().requires_grad_(False)
    x = torch.randn(2, 3, 8)
    program = randomise(peftfx.run(peftfx.capture(model, (x,)), "lora{rank=2,where=linear}"))
    one, *rest = program.sites.of("linear")
    assert isinstance(one, LinearSite) and rest
    others = tuple(replace(s, in_out=True) if s is one else s for s in program.sites)
    edit = Editor(replace(program.fork(), sites=Sites(others)), None, 0, {}, "fold")
    done = fold(edit, [a.path for a in program.attachments], "refuse")
    (reason,) = done.kept.values()
    assert one.weight in reason and "in another way than the site says" in reason
    assert len(done.folded) == len(rest)
    edit.graph_module.recompile()
    torch.testing.assert_close(edit.program(x), program(x))
