"""What `print(program)` says."""

from __future__ import annotations

from typing import Any

import torch

import peftfx

from .models import batch, first


def test_it_says_what_trains_where(captured: Any) -> None:
    _, base = captured["decoder"]
    program = peftfx.run(base, "lora{rank=2,where=q};bitfit{where=ffn.down}")
    trained = sum(p.numel() for p in program.trainable_parameters())
    lines = str(program).splitlines()
    every = sum(p.numel() for p in program.module.parameters())
    assert lines[0].startswith(f"Decoder: {every:,} parameters, {trained:,} of them train (")
    assert "evaluation mode, cpu" in lines[0]
    assert lines[1] == "inputs    input_ids: i64[batch, sequence]; attention_mask: i64[batch, " \
        "sequence]".replace(";", ",")  # fmt: skip
    assert "q 2, k 2, v 2" in str(program) and "adapters  lora: 256 parameters at 2 sites" in lines
    assert any("1 bitfit{where=ffn.down}: 2 sites edited; identity: max_abs 0" in s for s in lines)
    assert len(lines) < 12 and "text() for the graph" in lines[-1]
    folded = peftfx.run(program, "fold{names=lora}")
    assert "lora: 256 parameters, not in the graph any more" in str(folded)
    assert "<pre>Decoder" in folded._repr_html_() and "\n" not in repr(program)
    assert torch.equal(first(program(**batch())), first(base(**batch())))


def test_it_names_what_the_model_trains() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    program = peftfx.capture(model.eval(), (torch.randn(3, 4),))
    assert "trained   by the model itself: 1.weight, 1.bias, 2.weight and 1 more" in str(program)
