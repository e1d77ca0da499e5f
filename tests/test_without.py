"""Programs without a pass that inserts no adapter: rebuilt from the base, nothing is subtracted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import peftfx
from peftfx.rewriter.errors import PassError

from .models import batch, first, moved, randomise

INPUTS = batch(3, 7)


def trained(program: peftfx.Program, of: peftfx.Program) -> peftfx.Program:
    """A program with the values that another one trained."""
    values = of.named_trainable_parameters()
    with torch.no_grad():
        for name, own in program.named_trainable_parameters().items():
            own.copy_(values[name])
    return program


def test_a_program_without_its_format_multiplies_by_the_captured_weights(captured: Any) -> None:
    _, base = captured["block"]
    program = randomise(peftfx.run(base, "quantise;lora{rank=2};dora{rank=2}"), 0.2)
    plain = program.without("quantise")
    assert [r.applied.text for r in plain.history] == ["lora", "dora"]
    want = trained(peftfx.run(base, "lora{rank=2};dora{rank=2}"), program)
    assert torch.equal(first(plain(**INPUTS)), first(want(**INPUTS)))
    assert moved(first(program(**INPUTS)), first(plain(**INPUTS))) > 0.001
    names = {n for n, _ in plain.module.named_parameters() if not n.startswith("peftfx.")}
    assert names == {n for n, _ in base.module.named_parameters()}
    again = peftfx.run(plain, "fold")  # exactly, as it could not into the codes
    torch.testing.assert_close(first(again(**INPUTS)), first(want(**INPUTS)), rtol=1e-4, atol=1e-5)


def test_a_lossy_fold_is_exact_without_the_format(captured: Any) -> None:
    program = randomise(peftfx.run(captured["block"][1], "quantise;lora{rank=2}"), 0.2)
    want = first(program.without("quantise")(**INPUTS))
    folded = peftfx.run(program, "fold{lossy=true}").without("quantise")
    assert not folded.attachments
    torch.testing.assert_close(first(folded(**INPUTS)), want, rtol=1e-4, atol=1e-5)


def test_a_fold_is_undone_and_what_cannot_be_is_said(captured: Any) -> None:
    program = randomise(peftfx.run(captured["block"][1], "lora{rank=2,where=ffn}"), 0.2)
    folded = peftfx.run(program, "fold")
    assert torch.equal(first(folded.without("fold")(**INPUTS)), first(program(**INPUTS)))
    cut = peftfx.run(program, "channel_pruning{ratio=0.5}")
    with pytest.raises(PassError, match=r"gave other shapes to what lora train.*Leave"):
        cut.without("channel_pruning")
    bare = cut.without("lora").without("channel_pruning")
    assert torch.equal(first(bare(**INPUTS)), first(captured["block"][1](**INPUTS)))
    with pytest.raises(PassError, match=r"no adapter 'folds'.*nearest: fold.*Other passes: fold"):
        folded.without("folds")
