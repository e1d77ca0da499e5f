"""Quantised linears in ONNX, by operators of com.microsoft: integers by MatMulNBits, NF4 by
MatMulBnb4.

The stored tensors are their inputs as they are (`Format.pack`), so the file holds the integers or
codes. Activations stay in floating point (accuracy_level 1; level 4 would round them to 8 bits).
What has no such operator (other tables and groups, signs, pairs) is computed in the file.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...kernels import codebook_linear, quantised_linear

LAYOUTS = ("matmulnbits", "matmulbnb4")
"""What `Format.pack` has to be asked for."""

FLOAT32 = 1
"""MatMulNBits' accuracy_level: activations and sums in float32."""

NF4 = 1
"""MatMulBnb4's quant_type."""


def left_dense(left: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """What a report says of weights that no operator multiplies by as they are stored."""
    return tuple(
        f"{len(names)} weights in {said} ({names[0]}, ...) are made dense while the file runs: "
        "ONNX Runtime has operators for integers, and for NF4 in groups of 16, 32, 64, 128 or 256 "
        "that divide a row"
        for said, names in left.items()
    )


def translations() -> Mapping[Any, Callable[..., Any]]:
    """The table for `torch.onnx.export(custom_translation_table=...)`."""
    values: Any = importlib.import_module("onnxscript.values")
    onnxscript: Any = importlib.import_module("onnxscript")
    contrib, op = values.Opset("com.microsoft", 1), onnxscript.opset18
    by_integers = values.Op(contrib, "MatMulNBits", _schema("MatMulNBits", _INTEGERS, _BITS))
    by_codes = values.Op(contrib, "MatMulBnb4", _schema("MatMulBnb4", _CODES, _TYPE))

    def integers(
        x: Any, codes: Any, scale: Any, zero: Any, bias: Any, bits: int, group: int
    ) -> Any:
        y = by_integers(
            x, codes, scale, zero, K=x.shape[-1], N=codes.shape[0], bits=bits, block_size=group,
            accuracy_level=FLOAT32,
        )  # fmt: skip
        return y if bias is None else op.Add(y, bias)

    def codes_of_nf4(
        x: Any, codes: Any, scale: Any, table: Any, bias: Any, bits: int, group: int
    ) -> Any:
        del table, bits
        y = by_codes(
            x, codes, scale, K=x.shape[-1], N=codes.shape[0], block_size=group, quant_type=NF4
        )
        return y if bias is None else op.Add(y, bias)

    return {quantised_linear.OPERATOR: integers, codebook_linear.OPERATOR: codes_of_nf4}


def flatten_codes(model: Any) -> None:
    """Stores what MatMulBnb4 reads as it does: codes and scales in one row, the first code of a
    byte in its high bits; under their names where nothing else reads them."""
    for node in [n for n in model.graph if n.op_type == "MatMulBnb4"]:
        codes, scales = node.inputs[1:3]
        packed = codes.const_value.numpy().reshape(-1)
        _store(model, codes, packed >> 4 | packed << 4)
        _store(model, scales, scales.const_value.numpy().reshape(-1))


def _store(model: Any, stored: Any, array: Any) -> None:
    """Gives all MatMulBnb4 that read a stored tensor another one."""
    ir: Any = importlib.import_module("onnx_ir")
    if len(stored.shape) == 1:
        return  # for another call of the weight
    readers = list(stored.uses())
    mine = [(node, place) for node, place in readers if node.op_type == "MatMulBnb4"]
    alone = len(mine) == len(readers)
    name = stored.name if alone else f"{stored.name}.{LAYOUTS[1]}"
    tensor = ir.Tensor(array, dtype=stored.const_value.dtype, name=name)
    if alone:
        stored.const_value, stored.shape = tensor, ir.Shape(tensor.shape)
        return
    own = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=stored.type, const_value=tensor)
    model.graph.initializers[name] = own
    for node, place in mine:
        node.replace_input_with(place, own)


_INTEGERS = (("A", "T1"), ("B", "T2"), ("scales", "T1"), ("zero_points", "T3"))
_CODES = (("A", "T1"), ("B", "T2"), ("absmax", "T1"))
_BITS, _TYPE = ("bits", "accuracy_level"), ("quant_type",)


def _schema(name: str, inputs: Sequence[tuple[str, str]], attributes: Sequence[str]) -> Any:
    """An operator as far as it is used here; the onnx package has no schemas of contrib ops."""
    onnx: Any = importlib.import_module("onnx")
    schema = onnx.defs.OpSchema
    item, kind = schema.FormalParameter, schema.AttrType.INT
    names = ("K", "N", "block_size", *attributes)
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    return schema(
        name,
        "com.microsoft",
        1,
        inputs=[item(*pair) for pair in inputs],
        outputs=[item("Y", "T1")],
        type_constraints=[
            ("T1", floats, ""),
            ("T2", ["tensor(uint8)"], ""),
            *([("T3", ["tensor(uint8)", *floats], "")] if len(inputs) > 3 else []),
        ],
        attributes=[schema.Attribute(n, kind, "", required=n != "accuracy_level") for n in names],
    )  # fmt: skip
