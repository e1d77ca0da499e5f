"""UniPELT's prefix gated for each query: exported, saved, compiled, stacked and cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import peftfx
from peftfx.exporters.formats import save_adapter
from peftfx.rewriter.edits.attention.keyvalue import gated_columns
from peftfx.rewriter.errors import ArtifactError

from ..models import batch, first, moved, randomise
from .test_unipelt import RECIPE

PAST = RECIPE.replace("}", ",prefix_gate=past}")
MODELS = ("decoder", "fused", "llama")


def test_columns_are_gated_by_their_query() -> None:
    x, gate = torch.rand(2, 3, 4, 9), torch.rand(2, 4, 1)
    want = x.clone()
    for b in range(2):
        for t in range(4):
            want[b, :, t, 2:5] *= gate[b, t]
    assert torch.equal(gated_columns(x, gate, 3, 4), want)
    merged = gated_columns(x.flatten(0, 1), gate, 3, 4)
    assert torch.equal(merged, want.flatten(0, 1))


@pytest.mark.parametrize("name", MODELS)
def test_a_later_query_sees_more_than_the_first_token(captured: Any, name: str) -> None:
    """Another token in the middle moves the prefix's gate of later queries, where the gate of the
    first token would not move: what it gates is seen through the prefix alone."""
    _, base = captured[name]
    program = peftfx.run(base, PAST)
    path = next(p for p in program.shared if "attn.core" in p)
    inputs = {n: t for n, t in batch(2, 9).items() if n in program.spec.names}
    other = {n: t.clone() for n, t in inputs.items()}
    other["input_ids"][:, 4] = (other["input_ids"][:, 4] + 7) % 60 + 2
    gates = [peftfx.tap(program, {"g": path})(**i)[1]["g"] for i in (inputs, other)]
    assert gates[0].shape == (2, 9, 1)
    assert torch.equal(gates[0][:, :4], gates[1][:, :4])
    assert not torch.equal(gates[0][:, 4:], gates[1][:, 4:])


@pytest.mark.parametrize("name", MODELS)
def test_saved_loaded_and_left_out(captured: Any, tmp_path: Path, name: str) -> None:
    _, base = captured[name]
    program = randomise(peftfx.run(base, PAST), 0.4)
    inputs = {n: t for n, t in batch(3, 8).items() if n in program.spec.names}
    want = first(program(**inputs))
    assert moved(first(base(**inputs)), want) > 0.01
    peftfx.save(program, tmp_path / "a")
    torch.testing.assert_close(first(peftfx.load(base, tmp_path / "a")(**inputs)), want)
    peftfx.save_program(program, tmp_path / "p")
    whole = peftfx.load_program(tmp_path / "p")
    torch.testing.assert_close(first(whole(**inputs)), want)
    assert torch.equal(first(program.without("unipelt")(**inputs)), first(base(**inputs)))
    with pytest.raises(ArtifactError, match="cannot be written"):
        save_adapter(program, tmp_path / "hub", "adapterhub")


@pytest.mark.parametrize("name", ["decoder", "llama"])
def test_onnx(captured: Any, tmp_path: Path, name: str) -> None:
    _, base = captured[name]
    program = randomise(peftfx.run(base, PAST), 0.2)
    peftfx.export_onnx(program, tmp_path / "model.onnx")  # returns once ONNX Runtime agrees


@pytest.mark.parametrize("name", ["decoder", "fused"])
def test_baking_leaves_the_prefix_to_its_queries(captured: Any, name: str) -> None:
    _, base = captured[name]
    program = randomise(peftfx.run(base, PAST), 0.3)
    inputs = {n: t for n, t in batch(3, 8).items() if n in program.spec.names}
    settled = peftfx.run(program, "bake{names=[unipelt]}", data=[inputs])
    gated = {a.slot for a in settled.attachments if a.reads.keys() & {"gate", "gates"}}
    assert gated == {"key_value"}
    folded = peftfx.run(settled, "fold")
    assert {a.slot for a in folded.attachments} == {"key_value", "serial"}
    torch.testing.assert_close(
        first(folded(**inputs)), first(settled(**inputs)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", MODELS)
def test_other_rows_in_front_and_below(captured: Any, name: str) -> None:
    """A prefix below or above is not gated; a second one by query is told."""
    _, base = captured[name]
    plain = "prefix_tuning{length=2,name=plain}"
    inputs = {n: t for n, t in batch(3, 8).items() if n in base.spec.names}
    below = randomise(peftfx.run(base, f"{plain};{PAST}"), 0.4)
    above = peftfx.run(base, f"{PAST};{plain}")
    with torch.no_grad():
        values = below.named_trainable_parameters()
        for n, p in above.named_trainable_parameters().items():
            p.copy_(values[n])
    torch.testing.assert_close(first(above(**inputs)), first(below(**inputs)), rtol=1e-4, atol=1e-4)
    twice = peftfx.run(below, PAST.replace("}", ",name=second}"))
    reasons = {why for _, why in twice.history[-1].skipped}
    assert "it has rows already that each query gates" in reasons


def test_blocks_and_gradients(captured: Any) -> None:
    _, base = captured["fused"]
    program = randomise(peftfx.run(base, PAST), 0.3)
    inputs = {n: t for n, t in batch(3, 8).items() if n in program.spec.names}
    want = first(program(**inputs))
    blocks = peftfx.outline(program, checkpoint=True)
    got = first(blocks(**inputs))
    assert torch.equal(got, want)
    got.square().mean().backward()
    grown = {n for n, p in program.named_trainable_parameters().items() if p.grad is not None}
    assert grown == set(program.named_trainable_parameters())
