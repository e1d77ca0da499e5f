"""Changing device, dtype and precision after capture: it works, or it is refused with the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import peftfx
from peftfx.rewriter.errors import CaptureError

from .models import batch, build, first


@pytest.mark.parametrize("change", [torch.bfloat16, torch.float64, torch.float16])
def test_another_dtype_is_refused(captured: Any, change: torch.dtype) -> None:
    program = captured["llama"][1].fork()
    with pytest.raises(CaptureError, match=rf"dtype={change}"):
        program.module.to(change)
    with pytest.raises(CaptureError, match=rf"dtype={change}"):
        program.to(change)
    with pytest.raises(CaptureError, match="autocast"):
        torch.nn.Sequential(program.module).to(change)
    assert {p.dtype for p in program.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["encoder", "bert", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_capture_in_another_dtype(name: str, dtype: torch.dtype) -> None:
    model = build(name)
    program = peftfx.capture(model, kwargs=batch(), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    inputs = batch(4, 7)
    assert torch.equal(first(program(**inputs)), first(model.to(dtype)(**inputs)))


@pytest.mark.parametrize("name", ["encoder", "decoder", "bert", "llama"])
def test_moving_to_another_device(captured: Any, name: str) -> None:
    """The meta device stands for any other: every tensor and every device in the graph moves."""
    model, program = captured[name]
    program = peftfx.run(program, "lora{rank=2}")
    moved = program.to("meta")
    assert {p.device.type for p in moved.module.parameters()} == {"meta"}
    output = first(moved(**{n: t.to("meta") for n, t in batch(2, 6).items()}))
    assert output.device.type == "meta" and output.shape == first(model(**batch(2, 6))).shape
    assert {p.device.type for p in program.module.parameters()} == {"cpu"}
    again = program.to("cpu")
    assert torch.equal(first(again(**batch(2, 6))), first(program(**batch(2, 6))))
    again.module.to("meta")
    assert first(again(**{n: t.to("meta") for n, t in batch(2, 6).items()})).is_meta


def test_passes_run_on_a_moved_program(captured: Any) -> None:
    moved = captured["decoder"][1].to("meta")
    assert peftfx.run(moved, "lora{rank=2};ia3").adapters == ("lora", "ia3")


@pytest.mark.parametrize("name", ["encoder", "bert", "llama"])
def test_autocast_around_a_program_is_autocast_around_the_model(captured: Any, name: str) -> None:
    model, program = captured[name]
    inputs = batch(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = first(model(**inputs)), first(program(**inputs))
    assert want.dtype == got.dtype and torch.equal(want, got)
