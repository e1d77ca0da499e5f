"""A method written as its author would: an adapter on convolutions, against its equations in plain
torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import OptionError
from peftfx.rewriter.pipeline.method import Method
from peftfx.rewriter.pipeline.passes import REGISTRY

from .methods.common import check, hooked, tensors
from .models import randomise


@pytest.fixture
def authored() -> Generator[Callable[[str, str], type[Method]]]:
    """Registers the method of a file of `tests/authored` during a test."""
    names: list[str] = []

    def define(name: str, cls: str) -> type[Method]:
        made: type[Method] = getattr(importlib.import_module(f"tests.authored.{name}"), cls)
        REGISTRY[name] = made
        names.append(name)
        return made

    yield define
    for name in names:
        REGISTRY.pop(name, None)


class Images(nn.Module):
    """Convolutions with stride, padding, dilation, groups and no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 8, (3, 1), padding=(2, 0), dilation=(2, 1), groups=4, bias=False)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


def conv_adapter_reference(model: nn.Module, x: Tensor, adapters: dict[str, Any]) -> Tensor:
    def parallel(name: str) -> Callable[[Any, Tensor], Tensor]:
        conv: Any = model.get_submodule(name)
        p = adapters[name]
        width = len(p["down"])
        depthwise = nn.Conv2d(
            conv.in_channels, width, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            groups=width, bias=False,
        )  # fmt: skip
        depthwise.weight.data = p["down"].view_as(depthwise.weight)

        def put(inputs: Any, y: Tensor) -> Tensor:
            h = F.conv2d(F.relu(depthwise(*inputs)), p["up"][..., None, None])
            return y + p["s"][:, None, None] * h

        return put

    with hooked(model, {n: parallel(n) for n in ("first", "second")}):
        return model(x)


def test_an_adapter_of_convolutions(authored: Any, tmp_path: Path) -> None:
    authored("conv_adapter", "ConvAdapter")
    torch.manual_seed(0)
    model, x = Images().eval(), torch.randn(3, 4, 9, 8)
    base = peftfx.capture(model, (x,))
    program = randomise(peftfx.run(base, "conv_adapter{reduction=4}"), 0.3)
    want = conv_adapter_reference(model, x, tensors(program))
    check(program, base, want, {"x": x})
    peftfx.save(program, tmp_path / "a")
    torch.testing.assert_close(peftfx.load(base, tmp_path / "a")(x), want)
    kept = peftfx.run(program, "fold")
    assert len(kept.attachments) == 2 and "not linear" in str(kept.history[-1].skipped)
    with pytest.raises(OptionError, match=r"reduction=3 does not divide its 4 input channels"):
        peftfx.run(base, "conv_adapter{reduction=3}")
