"""What an ONNX file stores, and where: matrices as products read them, no traces of the machine
that wrote it, and large weights in a file of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from ...rewriter.files.leftovers import sync
from .translate import line_of

TRANSPOSED = "peftfx.transposed"
"""Key of the model's metadata: a JSON list of the stored tensors whose axes are not torch's."""

_ALIGNMENT = 4096
"""External tensors start at multiples of this, so that a runtime can map them."""

_SMALL = 1024
"""Tensors of fewer bytes stay in the model file."""


def store_as_read(model: Any) -> tuple[str, ...]:
    """Stores matrices the way products read them, under their names, and every product with a
    stored matrix as a MatMul.

    So they are constant operands, which is what ONNX Runtime's quantisers look for. A matrix that
    is also read as it is (a tied embedding) stays as it is, behind its Transpose or Gemm.

    Returns:
        Names of the tensors whose axes are permuted now; also in the model's metadata.
    """
    changed: list[str] = []
    for name, stored in list(model.graph.initializers.items()):
        order = _order(stored)
        if order is None:
            continue
        if order != tuple(range(len(order))):
            tensor = stored.const_value
            stored.const_value = _permuted(tensor, order)
            stored.shape = ir.Shape(stored.const_value.shape)
            changed.append(name)
        for node, _ in list(stored.uses()):
            if node.op_type == "Transpose":
                ir.convenience.replace_all_uses_with(node.outputs[0], stored)
                node.graph.remove(node, safe=True)
            else:
                _split(node, stored)
    if changed:
        model.metadata_props[TRANSPOSED] = json.dumps(sorted(changed))
    return tuple(sorted(changed))


def _order(stored: Any) -> tuple[int, ...] | None:
    """How all nodes that read a stored tensor permute its axes, if they agree and can be
    rewritten."""
    if stored.const_value is None or stored.is_graph_output() or stored.is_graph_input():
        return None
    orders = {_reading(node, index) for node, index in stored.uses()}
    return orders.pop() if len(orders) == 1 else None


def _reading(node: Any, index: int) -> tuple[int, ...] | None:
    given = {name: item.value for name, item in node.attributes.items()}
    if node.op_type == "Transpose" and not node.outputs[0].is_graph_output():
        return tuple(given["perm"]) if "perm" in given else None
    if node.op_type == "Gemm" and index == 1 and not given.get("transA", 0):
        if given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0:
            return (1, 0) if given.get("transB", 0) else (0, 1)
    return None


def _permuted(tensor: Any, order: tuple[int, ...]) -> Any:
    """Computed when it is written, so that a large model is not in memory twice."""

    def permuted() -> Any:
        array = np.ascontiguousarray(tensor.numpy().transpose(order))
        return ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)

    shape = ir.Shape([tensor.shape[i] for i in order])
    return ir.LazyTensor(permuted, dtype=tensor.dtype, shape=shape, name=tensor.name)


def _split(gemm: Any, matrix: Any) -> None:
    """Gemm -> MatMul and Add; ONNX Runtime fuses them again."""
    x, bias = gemm.inputs[0], gemm.inputs[2] if len(gemm.inputs) > 2 else None
    output = gemm.outputs[0]
    product = ir.node("MatMul", [x, matrix], name=f"{gemm.name}_product")
    nodes = [product]
    if bias is not None:
        product.outputs[0].name = f"{output.name}_product"
        product.outputs[0].type, product.outputs[0].shape = output.type, output.shape
        nodes.append(ir.node("Add", [product.outputs[0], bias], name=f"{gemm.name}_sum"))
    for node in nodes:
        node.metadata_props.update(gemm.metadata_props)
    ir.convenience.replace_nodes_and_values(
        gemm.graph, gemm, [gemm], nodes, [output], [nodes[-1].outputs[0]]
    )


def strip(model: Any) -> None:
    """Removes stack traces, file names and torch's notes; keeps the module that a node is of
    (`scope`) and the model's line without its folder (`source`)."""
    graphs = (model.graph, *model.functions.values())
    for graph in graphs:
        graph.metadata_props.clear()
        graph.doc_string = None
        values = [*graph.inputs, *graph.outputs]
        for node in ir.traversal.RecursiveGraphIterator(graph):
            _strip_node(node)
            values += node.outputs
        for item in values:
            _forget(item)
    for item in model.graph.initializers.values():
        _forget(item)


def _forget(item: Any) -> None:
    item.metadata_props.clear()
    item.doc_string = None


def _strip_node(node: Any) -> None:
    trace = node.metadata_props.get("pkg.torch.onnx.stack_trace", "")
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    _forget(node)
    kept = {"source": line_of(trace), "scope": scopes[-2] if len(scopes) > 1 else ""}
    node.metadata_props.update({k: v for k, v in kept.items() if v})


def size_of(model: Any) -> int:
    """Bytes of all stored tensors."""
    return sum(t.nbytes for t in _tensors(model))


def _tensors(model: Any) -> Iterator[Any]:
    for stored in model.graph.initializers.values():
        if stored.const_value is not None:
            yield stored.const_value


def to_proto(model: Any) -> Any:
    """The model as a `ModelProto`."""
    return ir.serde.serialize_model(model)


def externalise(model: Any, folder: Path, name: str) -> Path:
    """Writes large tensors to a data file in `folder` and makes the model refer to it.

    Its name, `<name>.<16 digits of its sha256>.data`, holds its content's hash, so a model file
    never meets another version's data.
    """
    temporary = folder / "data"
    digest, places = hashlib.sha256(), dict[str, tuple[int, int]]()
    stored = {n: s for n, s in model.graph.initializers.items() if s.const_value is not None}
    with open(temporary, "wb") as file:
        for key, item in stored.items():
            if item.const_value.nbytes < _SMALL:
                continue
            for chunk in (b"\0" * (-file.tell() % _ALIGNMENT), item.const_value.tobytes()):
                digest.update(chunk)
                file.write(chunk)
            length = item.const_value.nbytes
            places[key] = file.tell() - length, length
    data = folder / f"{name}.{digest.hexdigest()[:16]}.data"
    temporary.rename(data)
    for key, (offset, length) in places.items():
        tensor = stored[key].const_value
        stored[key].const_value = ir.ExternalTensor(
            data.name, offset, length, tensor.dtype,
            shape=ir.Shape(tensor.shape), name=key, base_dir=folder,
        )  # fmt: skip
    return data


def place(folder: Path, path: Path) -> None:
    """Moves a finished model from `folder` to `path`: its data first, the model file last, then
    removes the data of the model that it replaces.

    Raises:
        OSError: it cannot be moved; what was at `path` is unchanged.
    """
    old = _data_of(path)
    data = {f.name for f in folder.iterdir()} - {path.name}
    try:
        for name in (*data, path.name):
            sync(folder / name)
            os.replace(folder / name, path.parent / name)
    except OSError:
        _remove(path.parent, data - old)
        raise
    sync(path.parent)
    _remove(path.parent, old - data)


def _remove(folder: Path, names: set[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _data_of(path: Path) -> set[str]:
    """The data files of ours that a model file refers to."""
    if not path.is_file():
        return set()
    try:
        proto: Any = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError):  # whatever it is, it is no model of ours
        return set()
    entries = (e for t in proto.graph.initializer for e in t.external_data if e.key == "location")
    ours = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.data")
    return {e.value for e in entries if ours.fullmatch(e.value)}
