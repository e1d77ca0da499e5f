"""Quantised linears in ONNX: `peftfx::quantised_linear` becomes com.microsoft's MatMulNBits.

The stored tensors are its inputs as they are (`Format.pack`), so the file holds the
integers, and the scales keep their names. Activations stay in floating point (accuracy_level 1;
level 4 would round them to 8 bits).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from ..kernels.quantised_linear import OPERATOR

LAYOUT = "matmulnbits"
"""What `Format.pack` has to be asked for."""

FLOAT32 = 1
"""MatMulNBits' accuracy_level: activations and sums in float32."""


def translations() -> Mapping[Any, Callable[..., Any]]:
    """The table for `torch.onnx.export(custom_translation_table=...)`."""
    values: Any = importlib.import_module("onnxscript.values")
    onnxscript: Any = importlib.import_module("onnxscript")
    product = values.Op(values.Opset("com.microsoft", 1), "MatMulNBits", _schema())
    add = onnxscript.opset18.Add

    def quantised_linear(
        x: Any, codes: Any, scale: Any, zero: Any, bias: Any, bits: int, group: int
    ) -> Any:
        y = product(
            x, codes, scale, zero, K=x.shape[-1], N=codes.shape[0], bits=bits, block_size=group,
            accuracy_level=FLOAT32,
        )  # fmt: skip
        return y if bias is None else add(y, bias)

    return {OPERATOR: quantised_linear}


def _schema() -> Any:
    """MatMulNBits as far as it is used here; the onnx package has no schemas of contrib ops."""
    onnx: Any = importlib.import_module("onnx")
    schema = onnx.defs.OpSchema
    item, kind = schema.FormalParameter, schema.AttrType.INT
    names = ("K", "N", "bits", "block_size", "accuracy_level")
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    return schema(
        "MatMulNBits",
        "com.microsoft",
        1,
        inputs=[item("A", "T1"), item("B", "T2"), item("scales", "T1"), item("zero_points", "T3")],
        outputs=[item("Y", "T1")],
        type_constraints=[
            ("T1", floats, ""),
            ("T2", ["tensor(uint8)"], ""),
            ("T3", ["tensor(uint8)", *floats], ""),
        ],
        attributes=[schema.Attribute(n, kind, "", required=n != "accuracy_level") for n in names],
    )  # fmt: skip
