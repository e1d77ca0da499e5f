"""P-tuning v2 against its equations, Hugging Face PEFT, and prefix-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import OptionError

from ..models import batch, bert, first, moved, randomise
from .common import attention_with_rows, check, subject, tensors

DRAWS = True  # dropout of the rows
SETTLES = False  # the small recipe has no encoder
ENCODED = "p_tuning_v2{length=3,projection=5}"


def rows(program: peftfx.Program) -> list[tuple[Tensor, Tensor]]:
    return [(t["key"], t["value"]) for t in tensors(program).values()]


def encoded(program: peftfx.Program, widths: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    """W2 tanh(W1 E), cut into one part an attention: keys, then values; widths (heads, dim)."""
    (path,) = program.shared
    t = {n: p.detach() for n, p in program.module.get_submodule(path).named_parameters()}
    inner = torch.tanh(t["embedding"] @ t["inner.weight"].T + t["inner.bias"])
    flat = inner @ t["outer.weight"].T + t["outer.bias"]
    found: list[tuple[Tensor, Tensor]] = []
    for heads, dim in widths:
        own, flat = flat[:, : 2 * heads * dim], flat[:, 2 * heads * dim :]
        key, value = own.chunk(2, 1)
        found.append((key.view(-1, heads, dim), value.view(-1, heads, dim)))
    return found


def test_p_tuning_v2_equals_its_reference(hand: Any) -> None:
    _, model, base = hand
    program = randomise(peftfx.run(base, "p_tuning_v2{length=5}"), 0.5)
    inputs = batch(4, 11, pad=3)
    with attention_with_rows(rows(program)):
        want = model(**inputs)
    check(program, base, want, inputs)


@pytest.mark.parametrize(("name", "heads"), [("encoder", 4), ("decoder", 2)])
def test_the_shared_encoder_equals_its_reference(captured: Any, name: str, heads: int) -> None:
    model, base = captured[name]
    program = randomise(peftfx.run(base, ENCODED), 0.3)
    inputs = batch(4, 11, pad=3)
    with attention_with_rows(encoded(program, [(heads, 8)] * 2)):
        want = model(**inputs)
    check(program, base, want, inputs)


def test_trainable_count(captured: Any, zoo: Any) -> None:
    """2 L l d; with an encoder l d + (d m + m) + (m 2 L d + 2 L d), one for each kind of attention."""
    _, base = captured["bert"]
    d, layers, length, m = 32, 2, 3, 5
    program = peftfx.run(base, f"p_tuning_v2{{length={length}}}")
    assert sum(p.numel() for p in program.trainable_parameters()) == 2 * layers * length * d
    program = peftfx.run(base, ENCODED)
    each = length * d + d * m + m + m * 2 * layers * d + 2 * layers * d
    assert sum(p.numel() for p in program.trainable_parameters()) == each
    both = peftfx.run(zoo["t5"], f"{ENCODED[:-1]},where=attention}}")
    assert len(both.shared) == 3 and len(both.attachments) == 6


def test_rows_start_as_an_embedding(captured: Any) -> None:
    """N(0, std^2), which changes outputs: the contract says so."""
    _, base = captured["bert"]
    wide = peftfx.run(base, "p_tuning_v2{length=30}")
    every = torch.cat([t.flatten() for pair in rows(wide) for t in pair])
    assert abs(float(every.std()) - 1) < 0.05 and abs(float(every.mean())) < 0.05
    assert wide.history[-1].certificate.kind == "trainable"
    small = peftfx.run(base, "p_tuning_v2{length=30,std=0.01}")
    assert moved(first(base(**batch())), first(small(**batch()))) > 1e-3


def test_dropout_is_on_the_rows(captured: Any) -> None:
    _, base = captured["encoder"]
    for recipe in ("p_tuning_v2{length=40,dropout=0.5}", f"{ENCODED[:-1]},dropout=0.5}}"):
        program = peftfx.run(base, recipe)
        branch: Any = program.branch(program.attachments[0])
        given = {"encoded": torch.ones(3, 64)} if program.shared else {}
        assert not any((r == 0).any() for r in branch.rows(**given))
        key, value = branch.train().rows(**given)
        assert 0.3 < float((torch.cat([key, value]) == 0).float().mean()) < 0.7


def test_the_encoder_is_baked_exactly(captured: Any, tmp_path: Path) -> None:
    base = captured.double("decoder")
    program = randomise(peftfx.run(base, ENCODED), 0.3)
    controllers = peftfx.controllers(program)
    baked = peftfx.run(program, controllers.finish())
    gap = (first(baked(**batch())) - first(program(**batch()))).detach().abs().max()
    assert float(gap) <= 1e-12 and not baked.shared
    assert not peftfx.controllers(baked).finish().passes
    plain = peftfx.run(base, "p_tuning_v2{length=3}")
    names = set(plain.named_trainable_parameters())
    assert set(baked.named_trainable_parameters()) == names
    peftfx.save(baked, tmp_path / "a")
    assert torch.equal(first(peftfx.load(base, tmp_path / "a")(**batch())), first(baked(**batch())))


def test_peft_both_ways(tmp_path: Path) -> None:
    """PEFT feeds rows as a cache: positions are shifted. Its directory holds baked rows, too."""
    import peft

    torch.manual_seed(0)
    model = bert().eval()
    base = peftfx.capture(model, kwargs=batch())
    program = randomise(peftfx.run(base, f"{ENCODED[:-1]},shift_positions=true}}"), 0.5)
    program = peftfx.run(program, "bake")
    peftfx.save_peft(program, tmp_path / "a", task="FEATURE_EXTRACTION")
    other = peft.PeftModel.from_pretrained(bert().eval(), str(tmp_path / "a"))
    other.base_model.load_state_dict(model.state_dict())
    inputs = batch(4, 11)
    check(program, base, other.eval()(**inputs), inputs)
    again = peftfx.load_peft(base, tmp_path / "a")
    assert torch.equal(first(again(**inputs)), first(program(**inputs)))


def test_encoder_decoders_and_images(captured: Any, zoo: Any) -> None:
    _, base, inputs = subject(captured, zoo, "t5")
    program = randomise(peftfx.run(base, "p_tuning_v2{length=3,where=attention}"), 0.5)
    assert len(program.history[-1].edited) == 6
    assert moved(first(base(**inputs)), first(program(**inputs))) > 0.01
    assert len(peftfx.run(zoo["vit"], "p_tuning_v2").history[-1].edited) == 2


def test_bad_options() -> None:
    for options in ("length=0", "projection=0", "std=-1", "dropout=1"):
        with pytest.raises(OptionError, match="p_tuning_v2"):
            peftfx.parse(f"p_tuning_v2{{{options}}}")
