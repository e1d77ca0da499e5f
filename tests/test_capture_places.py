"""Captures under inference mode, in another dtype, and of copies; weights that no trace can see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import CaptureError, CorruptFileError

X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x).relu())


def learnt(program: peftfx.Program) -> peftfx.Program:
    for parameter in program.trainable_parameters():
        parameter.data.add_(0.1)
    return program


def test_autocast(tmp_path: Path) -> None:
    """What a program is, and whether passes keep their promises, does not depend on it; what it
    gives when it is called does."""
    model = Net().eval()
    with torch.autocast("cpu", torch.bfloat16):
        captured = peftfx.capture(model, (X,))
        program = learnt(peftfx.run(captured, "lora{rank=2,where=linear};oft{where=linear}"))
        assert all(c.holds for c in program.verify())
        folded = peftfx.run(program, "fold")
        peftfx.save(program, tmp_path / "adapter")
        loaded = peftfx.load(model, tmp_path / "adapter")
        low = program(X)
    assert torch.equal(captured(X), model(X)) and torch.equal(loaded(X), program(X))
    torch.testing.assert_close(folded(X), program(X))
    assert low.dtype == torch.bfloat16 and program(X).dtype == torch.float32


def test_inference_mode() -> None:
    model = Net().eval()
    with torch.inference_mode():
        captured = peftfx.capture(model, (X * 1,))
        program = peftfx.run(captured, "lora{rank=2,where=linear}")
        less, moved = program.without("lora"), program.to("cpu")
        assert torch.equal(captured(X), model(X))
    for one in (captured, program, less, moved, peftfx.run(program, "fold")):
        assert not any(t.is_inference() for t in one.module.parameters())
    assert not any(t.is_inference() for t in captured.sample.values())
    done = peftfx.fit(
        program, [{"x": X}], loss=lambda y, b: y.square().mean(), epochs=1, progress=False
    ).program
    assert not torch.equal(done(X), captured(X))
    with torch.inference_mode():
        hopeless = Net()
    with pytest.raises(CaptureError, match=r"'up.weight' and 3 more .*inference_mode"):
        peftfx.capture(hopeless, (X,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_is_saved_and_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Net().eval()
    captured = peftfx.capture(model, (X,), dtype=dtype)
    program = learnt(peftfx.run(captured, "lora{rank=2,where=linear}"))
    peftfx.save(program, tmp_path / "a")
    again = peftfx.load(model, tmp_path / "a")
    assert torch.equal(again(X.to(dtype)), program(X.to(dtype)))
    assert again.dtype == dtype and model.up.weight.dtype == torch.float32
    path = tmp_path / "a" / "manifest.json"
    path.write_text(path.read_text().replace(str(dtype)[6:] + '"', 'load"', 1))
    with pytest.raises(CorruptFileError):
        peftfx.load(model, tmp_path / "a")


@pytest.mark.parametrize("as_keyword", [True, False])
def test_a_cast_that_copies_is_kept(as_keyword: bool) -> None:
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            if as_keyword:
                y = h.to(torch.float32, copy=True)
            else:
                y = h.to(torch.float32, False, True)
            y.mul_(2)
            return h + y

    model = Copies().eval()
    program = peftfx.capture(model, (X,))
    assert torch.equal(program(X), model(X))
    other: Any = X[:1, :3]
    assert torch.equal(peftfx.run(program, "lora{where=linear}")(other), model(other))


class Packed(nn.Parameter):
    """As libraries that quantise keep a matrix: bytes, and what they mean beside them."""

    quant_state: Any = None


class PackedLinear(nn.Module):
    def __init__(self, dtype: torch.dtype, state: Any) -> None:
        super().__init__()
        self.weight = Packed(torch.zeros(128, 1, dtype=dtype), requires_grad=False)
        self.weight.quant_state = state

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy()) * 2  # a kernel that no trace sees


@pytest.mark.parametrize(
    ("dtype", "state"), [(torch.uint8, object()), (torch.int8, None), (torch.bfloat16, object())]
)
def test_weights_in_a_code_of_their_own_are_refused_by_name(dtype: Any, state: Any) -> None:
    model = nn.Sequential(nn.Linear(16, 16), PackedLinear(dtype, state))
    with pytest.raises(
        CaptureError, match=r"1 weights of .*first: '1.weight'.*Packed.*dequantize\(\).*peqa"
    ):
        peftfx.capture(model.eval(), (X,))


def test_plain_integers_that_a_forward_decodes_are_captured() -> None:
    class Decodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
            self.codes = nn.Parameter(codes, requires_grad=False)
            self.register_buffer("scale", torch.full((16, 1), 0.01))
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            scale: Any = self.scale
            return self.head(x @ ((self.codes.float() - 128) * scale).T)

    model = Decodes().eval()
    program = peftfx.run(peftfx.capture(model, (X,)), "lora{rank=2,where='name:head'}")
    torch.testing.assert_close(program(X), model(X))
    program.verify()
