"""Cross-attention tuning: what trains, by the names that encoder-decoders have for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import peftfx
from peftfx.rewriter.errors import OptionError, SelectorError

from ..models import batch, first, moved, randomise
from ..zoo import ZOO
from .common import check


def names(program: peftfx.Program) -> set[str]:
    return set(program.named_trainable_parameters())


def test_the_projections_and_norms_between_decoder_and_encoder_train(zoo: Any) -> None:
    for name, word in (("bart", "encoder_attn"), ("whisper", "encoder_attn"), ("t5", "layer.1.")):
        every = {n for n, _ in zoo.model(name).named_parameters()}
        inner = "decoder.block" if name == "t5" else ""
        want = {n for n in every if word in n and inner in n}
        assert want and names(peftfx.run(zoo[name], "cross_attention")) == want
        less = {n for n in want if "norm" not in n}
        assert names(peftfx.run(zoo[name], "cross_attention{norms=false}")) == less
    one = peftfx.run(zoo["bart"], "cross_attention{where=cross and layer==1 and linear}")
    assert {n.split(".")[3] for n in names(one)} == {"1"}


def test_it_equals_its_reference(zoo: Any) -> None:
    model, base = zoo.model("bart"), zoo["bart"]
    inputs = ZOO["bart"].inputs(3, 7)
    before = first(base(**inputs))
    program = randomise(peftfx.run(base, "cross_attention"))
    other = copy.deepcopy(model)
    values = {n: p.detach() for n, p in program.named_trainable_parameters().items()}
    assert not other.load_state_dict(values, strict=False).unexpected_keys
    got = first(program(**inputs)).detach()
    torch.testing.assert_close(got, first(other(**inputs)).detach(), rtol=1e-5, atol=1e-5)
    assert moved(before, got) > 0.01


def test_where_it_stands_in_for_self_attention(hand: Any) -> None:
    _, model, base = hand
    program = randomise(peftfx.run(base, "cross_attention{where=attn and linear}"))
    values = {n: p.detach() for n, p in program.named_trainable_parameters().items()}
    other = copy.deepcopy(model)
    other.load_state_dict(values, strict=False)
    inputs = batch(4, 11, pad=3)
    check(program, base, other(**inputs), inputs)
    assert any("norm1" in n for n in values) and not any("norm2" in n for n in values)


def test_the_embeddings_of_a_side(zoo: Any) -> None:
    bart = zoo["bart"]
    less = names(peftfx.run(bart, "cross_attention"))

    def more(side: str, name: str = "bart") -> set[str]:
        program = peftfx.run(zoo[name], f"cross_attention{{embeddings={side}}}")
        return names(program) - names(peftfx.run(zoo[name], "cross_attention"))

    def side(half: str) -> set[str]:
        norm = f"model.{half}.layernorm_embedding."
        return {"model.shared.weight", f"model.{half}.embed_positions.weight",
                f"{norm}weight", f"{norm}bias"}  # fmt: skip

    assert more("source") == side("encoder") and more("target") == side("decoder")
    assert more("both") == side("encoder") | side("decoder")
    assert less == names(peftfx.run(bart, "cross_attention{embeddings=frozen}"))
    assert more("source", "t5") == more("target", "t5") == {"shared.weight"}  # one table
    head = peftfx.run(bart, "cross_attention{embeddings=target}")
    assert "lm_head" in str(head.history[-1])


def test_models_without_are_refused(captured: Any, zoo: Any) -> None:
    _, base = captured["decoder"]
    with pytest.raises(SelectorError, match=r"no attention .* keys from another stream.*Choose"):
        peftfx.run(base, "cross_attention")
    with pytest.raises(OptionError, match=r"no tables on the side of the source.*Choose emb"):
        peftfx.run(base, "cross_attention{where=attn and linear,embeddings=source}")
    with pytest.raises(OptionError, match=r"must be one of frozen, source"):
        peftfx.run(zoo["t5"], "cross_attention{embeddings=new}")
