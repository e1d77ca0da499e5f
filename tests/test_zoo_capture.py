"""Every architecture of the zoo: captured bit-equal in both modes, at other sizes, with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import InputError
from peftfx.rewriter.measure.compare import floats

from .zoo import ZOO

SIZES = [(3, 9), (1, 7), (5, 14), (2, 1)]
FIXED = {
    "mamba": ("input_ids", 1, "modeling_mamba.py"),  # a Python loop over time
    "whisper": ("input_features", 1, "modeling_whisper.py"),  # the number of mel bins
}
"""Sizes that would be dynamic by default, but that the model fixes: input, axis, who needs it."""

ROUNDED = {"minilm", "qwen3_next"}
"""Where batch one takes another kernel by the alignment of memory, also from eager to eager; and
where a rule of deltas sums chunks in another order."""


@contextmanager
def modes(training: bool, *modules: nn.Module) -> Iterator[None]:
    """One mode for the modules; statistics and modes are put back."""
    kept = [(m, m.training, {n: b.clone() for n, b in m.named_buffers()}) for m in modules]
    for module in modules:
        module.train(training)
    try:
        yield
    finally:
        for module, mode, buffers in kept:
            module.train(mode)
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])


def seeded(module: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(3)
    return floats(module(**inputs))


def objective(outputs: list[Tensor]) -> Tensor:
    return sum((t.float().pow(2).mean() + t.float().mean() for t in outputs), torch.zeros(()))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_bit_equal_in_both_modes_at_any_size(zoo: Any, name: str) -> None:
    model, program = zoo.model(name), zoo[name]
    for size in SIZES[:1] if name == "mamba" else SIZES:
        inputs = ZOO[name].inputs(*size)
        for training in (False, True):
            with modes(training, model, program.module):
                want, got = seeded(model, inputs), seeded(program, inputs)
            assert want and len(want) == len(got)
            for a, b in zip(want, got, strict=True):
                assert torch.equal(a, b) or (
                    name in ROUNDED and torch.allclose(a, b, rtol=0, atol=1e-6)
                ), (size, training)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_gradients_are_those_of_the_model(zoo: Any, name: str) -> None:
    model, program = zoo.model(name), zoo[name].fork()
    inputs = ZOO[name].inputs(3, 9)
    with modes(True, model, program.module):
        objective(seeded(model, inputs)).backward()
        objective(seeded(program, inputs)).backward()
    ours = dict(program.module.named_parameters())
    checked = 0
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[parameter_name].grad, parameter.grad)
            checked += 1
            parameter.grad = None
    assert checked >= 4


@pytest.mark.parametrize("name", sorted(ZOO))
def test_batch_and_tokens_are_dynamic_or_the_spec_says_why_not(zoo: Any, name: str) -> None:
    spec = zoo[name].spec
    fixed = {key for key in spec.reasons if "." in key}
    if name not in FIXED:
        assert not fixed
        assert all(isinstance(i.shape[0], str) for i in spec.inputs)
        assert all(isinstance(i.shape[1], str) for i in spec.inputs if "ids" in i.name)
        return
    entry, axis, reason = FIXED[name]
    assert fixed == {f"{entry}.{axis}"}
    assert reason in str(spec)
    inputs = ZOO[name].inputs(3, 9)
    inputs[entry] = inputs[entry].narrow(axis, 0, 5)
    with pytest.raises(InputError, match=reason):
        spec.bind((), inputs)


def test_ranges_are_those_of_the_model(zoo: Any) -> None:
    """Position tables bound the sequence, up to their last row, and a branch on it the batch."""
    program = zoo["bert"]
    assert program.spec.ranges["sequence"] == (1, 64)
    program(**ZOO["bert"].inputs(1, 64))
    with pytest.raises(InputError, match="64"):
        program(**ZOO["bert"].inputs(1, 65))
    unet = zoo["unet"]
    assert unet.spec.ranges["batch"] == (1, 63)
    with pytest.raises(InputError, match=r"upsampling\.py"):
        unet(**ZOO["unet"].inputs(64, 3))


def test_regions_that_only_training_runs(zoo: Any) -> None:
    """Stochastic depth and label dropout act in training, and only there."""
    swin = ZOO["swin"].build()
    swin.config.drop_path_rate = 0.5
    deep = peftfx.capture(type(swin)(swin.config).eval(), kwargs=ZOO["swin"].inputs(3, 9))
    for name, program in (("swin", deep), ("dit", zoo["dit"])):
        inputs = ZOO[name].inputs(3, 9)
        with torch.no_grad():
            with modes(True, program.module):
                assert not torch.equal(floats(program(**inputs))[-1], floats(program(**inputs))[-1])
            assert torch.equal(floats(program(**inputs))[-1], floats(program(**inputs))[-1])
        assert any("TrainingOnly" in line for line in program.text().splitlines())
