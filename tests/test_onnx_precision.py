"""ONNX in half precision: measured tolerances, bfloat16 in another dtype, padding by dataflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.cli import main
from peftfx.exporters.onnx import export as onnx_export
from peftfx.exporters.onnx import parity as onnx_parity
from peftfx.rewriter.api import Program
from peftfx.rewriter.errors import ExportError, NonFiniteError

from .models import randomise

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Small(nn.Module):
    """Attention with a mask, a norm, casts to float32 and back, and a fill of the dtype's own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(30, 16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, ids: Tensor, keep: Tensor, mask_ids: Tensor) -> Tensor:
        x = self.table(ids) + self.table(mask_ids)
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 4
        scores = scores.masked_fill(keep[:, None] == 0, torch.finfo(scores.dtype).min)
        x = x + self.o(scores.float().softmax(-1).to(x.dtype) @ self.v(x))
        return self.norm(x)


def example() -> tuple[Tensor, ...]:
    ids = torch.arange(18).view(2, 9)
    return ids, torch.ones_like(ids), ids % 7


def program(dtype: torch.dtype) -> Program:
    torch.manual_seed(0)
    return peftfx.capture(Small().to(dtype).eval(), example())


def half() -> Any:
    torch.manual_seed(0)
    names = ("ids", "keep", "mask_ids")
    return Small().to(torch.bfloat16).eval(), dict(zip(names, example(), strict=True))


def test_float16_has_its_own_tolerance(tmp_path: Path) -> None:
    adapted = randomise(peftfx.run(program(torch.float16), "lora{rank=2,where=linear}"), 0.1)
    report = peftfx.export_onnx(adapted, tmp_path / "m.onnx", opset=20)
    assert 0 < report.error <= report.tolerance < 0.02
    with pytest.raises(ExportError, match=r"allowed is 1e-05"):
        peftfx.export_onnx(adapted, tmp_path / "m.onnx", opset=20, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_wrong_matrix_shows(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = program(dtype)
    translate = onnx_export.translate

    def wrong(*args: Any) -> Any:
        model = translate(*args)
        stored = model.graph.initializers["v.weight"]
        stored.const_value = type(stored.const_value)(stored.const_value.raw.detach() * 0.9)
        return model

    monkeypatch.setattr(onnx_export, "translate", wrong)
    with pytest.raises(ExportError, match="differs by"):
        peftfx.export_onnx(whole, tmp_path / "m.onnx", opset=20)
    assert not list(tmp_path.iterdir())


def test_bfloat16_goes_out_in_another_dtype(tmp_path: Path) -> None:
    adapted = randomise(peftfx.run(program(torch.bfloat16), "lora{rank=2,where=linear}"), 0.1)
    path = tmp_path / "m.onnx"
    with pytest.raises(ExportError, match=r"dtype=torch\.float32"):
        peftfx.export_onnx(adapted, path)
    for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 0.02)):
        report = peftfx.export_onnx(adapted, path, opset=20, dtype=dtype)
        assert report.error <= report.tolerance <= limit
        assert report.rounding is not None and 0 < report.rounding < 0.1
        held = {i.data_type for i in onnx.load(str(path)).graph.initializer}
        assert onnx.TensorProto.BFLOAT16 not in held
    assert adapted.module.get_parameter("v.weight").dtype == torch.bfloat16
    for wrong in (torch.bfloat16, torch.int8):
        with pytest.raises(ExportError, match="must be"):
            peftfx.export_onnx(adapted, path, dtype=wrong)


def test_what_a_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    large = program(torch.bfloat16)
    with torch.no_grad():
        large.module.get_parameter("v.weight")[0, 0] = 1e6
    with pytest.raises(NonFiniteError, match=r"v\.weight"):
        peftfx.export_onnx(large, tmp_path / "m.onnx", dtype=torch.float16)
    with torch.no_grad():  # each value fits, their products do not
        large.module.get_parameter("v.weight").fill_(6e4)
        large.module.get_parameter("o.weight").fill_(6e4)
    with pytest.raises(ExportError, match="range of"):
        peftfx.export_onnx(large, tmp_path / "m.onnx", dtype=torch.float16)
    with pytest.raises(ExportError, match="Capture it again"):
        peftfx.export_onnx(program(torch.float32), tmp_path / "m.onnx", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_the_command_takes_dtype_and_tolerance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["export", f"{__name__}:half", "--out", str(tmp_path / "m.onnx"), "--opset", "20"]
    assert main(call) == 2 and "--dtype" in capsys.readouterr().err
    assert main([*call, "--dtype", "float32"]) == 0
    assert main([*call, "--dtype", "float32", "--tolerance", "1e-12"]) == 1
    assert "allowed is 1e-12" in capsys.readouterr().err


def test_padding_is_found_by_where_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`keep` is a mask, and `mask_ids` is none."""
    whole, masked = program(torch.float32), dict[str, int]()
    pad = onnx_parity.padded

    def spy(feed: Any, masks: Any) -> Any:
        changed = pad(feed, masks)
        for name in feed:
            masked[name] = masked.get(name, 0) + int((feed[name] != changed[name]).sum())
        return changed

    monkeypatch.setattr(onnx_export, "padded", spy)
    peftfx.export_onnx(whole, tmp_path / "m.onnx", opset=20)
    assert masked == {"ids": 0, "keep": 4, "mask_ids": 0}
