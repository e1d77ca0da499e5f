"""Methods written as their authors would: one projection shared by all sites, and an adapter on
convolutions; each against its equations in plain torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import OptionError, PassError
from peftfx.rewriter.pipeline.method import Method
from peftfx.rewriter.pipeline.passes import REGISTRY

from .methods.common import check, hooked, tensors
from .models import batch, first, randomise


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


def test_one_projection_shared_by_all_sites(hand: Any, authored: Any, tmp_path: Path) -> None:
    authored("vera", "VeRA")
    _, model, base = hand
    program = randomise(peftfx.run(base, "vera{where=q|v|ffn.down}"), 0.3)
    (path,) = program.shared
    shared: Any = program.module.get_submodule(path)
    hooks: dict[str, Callable[..., Tensor]] = {}
    for attachment in program.attachments:
        held: Any = program.branch(attachment)

        def put(i: Any, o: Tensor, held: Any = held) -> Tensor:
            (x,) = i
            inner = (x @ shared.a[:, : x.shape[-1]].T) * held.d
            return o + (inner @ shared.b[: o.shape[-1]].T) * held.b

        hooks[attachment.site.removesuffix(".weight")] = put
    assert len(hooks) == 6
    inputs = batch(4, 11, pad=3)
    with hooked(model, hooks):
        want = model(**inputs)
    check(program, base, want, inputs)

    folded = peftfx.run(program, "fold")
    assert not folded.attachments and not folded.shared and not folded.history[-1].skipped
    torch.testing.assert_close(first(folded(**inputs)), first(want), rtol=1e-5, atol=1e-5)
    peftfx.save(folded, tmp_path / "folded")
    again = peftfx.load(base, tmp_path / "folded")
    assert torch.equal(first(again(**inputs)), first(folded(**inputs)))
    assert all(c.holds for c in folded.verify())
    assert torch.equal(first(folded.without("vera")(**inputs)), first(base(**inputs)))

    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    peftfx.fold_checkpoint(program, tmp_path / "base", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for key, tensor in folded.export_state_dict().items():
        torch.testing.assert_close(merged[key], tensor)


def test_half_of_a_shared_projection_folds(captured: Any, authored: Any) -> None:
    """What is left keeps training with the shared matrices."""
    authored("vera", "VeRA")
    base = captured["encoder"][1]
    program = randomise(peftfx.run(base, "vera{where=q,name=one};vera{where=v,name=two}"), 0.3)
    folded = peftfx.run(program, "fold{names=two}")
    assert [a.adapter for a in folded.attachments] == ["one", "one"]
    assert folded.shared == ("peftfx.one.projection",)
    inputs = batch(4, 11, pad=3)
    torch.testing.assert_close(
        first(folded(**inputs)), first(program(**inputs)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("where", ["ffn.up", "ffn.down"])
def test_channels_are_not_cut_through_what_others_read(
    captured: Any, authored: Any, where: str
) -> None:
    authored("vera", "VeRA")
    program = peftfx.run(captured["encoder"][1], f"vera{{where={where}}}")
    with pytest.raises(PassError, match=r"VeRABranch\) does not say which axes"):
        peftfx.run(program, "channel_pruning{ratio=0.5}")


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
