"""ONNX and operators: grouped products are written, what has no translation is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import ExportError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


def test_grouped_products(tmp_path: Path) -> None:
    """Also where a group has no row, and rows are left behind the last one."""
    from peftfx.exporters.onnx.operators import grouped_product

    function: Any = grouped_product
    proto = function.to_model_proto(ir_version=10)
    for info, kind in zip((*proto.graph.input, *proto.graph.output), (1, 1, 6, 1), strict=True):
        info.type.tensor_type.elem_type = kind
    onnx.save(proto, str(tmp_path / "g.onnx"))
    session = ort.InferenceSession(str(tmp_path / "g.onnx"))
    torch.manual_seed(0)
    x, matrices = torch.randn(7, 8), torch.randn(3, 8, 4)
    for ends in ((2, 5, 7), (0, 7, 7), (0, 0, 0), (3, 3, 6)):
        wanted = torch.zeros(7, 4)
        for group, (start, stop) in enumerate(zip((0, *ends), ends, strict=False)):
            wanted[start:stop] = x[start:stop] @ matrices[group]
        given = (x, matrices, torch.tensor(ends, dtype=torch.int32))
        feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), given, strict=True)}
        assert torch.allclose(torch.tensor(session.run(None, feed)[0]), wanted, atol=1e-5)


def test_experts_of_transformers(zoo: Any, tmp_path: Path) -> None:
    """With their default implementation, adapted."""
    program = peftfx.run(zoo["mixtral"], "lora{rank=2}")
    report = peftfx.export_onnx(program, tmp_path / "m.onnx", opset=20)
    stored = {i.name: i.dims for i in onnx.load(str(report.path)).graph.initializer}
    experts = [n for n, dims in stored.items() if len(dims) == 3]
    assert report.error <= 1e-5 and experts and set(experts) <= set(report.transposed)


class Experts(nn.Module):
    """One of three experts for each token, as transformers computes it in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 3)
        self.stack = nn.Parameter(torch.randn(3, 16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 16)
        chosen = self.gate(rows).argmax(-1)
        order = chosen.argsort()
        ends = (chosen[:, None] == torch.arange(3)).sum(0).cumsum(0).int()
        y = torch.ops.aten._grouped_mm(rows[order], self.stack.transpose(1, 2), offs=ends)
        return y[order.argsort()].view(x.shape)


def test_bfloat16_experts_go_out_in_float32(tmp_path: Path) -> None:
    """torch traces their product in bfloat16 only."""
    pytest.importorskip("transformers.integrations.moe")
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16).bfloat16()
    program = peftfx.capture(Experts().bfloat16().eval(), (x,))
    report = peftfx.export_onnx(program, tmp_path / "m.onnx", opset=20, dtype=torch.float32)
    assert report.error <= 1e-5 and "stack" in report.transposed


class Odd(nn.Module):
    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.linear, self.operator = nn.Linear(8, 8), operator

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.linear(self.operator(y))


def determinants(y: Tensor) -> Tensor:
    return y * torch.linalg.matrix_exp(y[:, None] * y[..., None]).sum(-1)


def rotated(y: Tensor) -> Tensor:
    z = torch.view_as_complex(y.unflatten(-1, (4, 2)))
    return torch.view_as_real(z.unsqueeze(1) * 1j).flatten(1)


@pytest.mark.parametrize(
    ("operator", "name", "advice"),
    [
        (determinants, "aten.linalg_matrix_exp.default", "operators that"),
        (determinants, "test_onnx_operators.py:", "operators that"),
        (rotated, "aten.view_as_complex.default (test_onnx_operators.py:", "no complex numbers"),
    ],
)
def test_a_missing_operator_is_named(operator: Any, name: str, advice: str, tmp_path: Path) -> None:
    program = peftfx.capture(Odd(operator).eval(), (torch.randn(3, 8),))
    with pytest.raises(ExportError) as caught:
        peftfx.export_onnx(program, tmp_path / "m.onnx")
    text = str(caught.value)
    assert name in text and advice in text and text.count("has no ONNX translation") == 1
    assert "\x1b" not in text and "\n" not in text and caught.value.__cause__ is not None
    assert not list(tmp_path.iterdir())
