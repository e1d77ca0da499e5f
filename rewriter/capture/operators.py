"""Which operators a graph in a file may call: those that compute tensors and do nothing else.

A file is data that anybody may have written. torch has operators that write files (`aten::save`),
map them (`from_file`), print, set global state, or hand out memory that is not theirs; the schema
shows most of them, and a short list names the rest.
"""

from __future__ import annotations

import re
from typing import Any

import torch

_VALUES = re.compile(
    r"(?:Optional\[|List\[)*(?:Tensor|int|float|bool|complex|number|Device|Generator)\]*"
)
"""What operators may take: `Device` is an address of values, no file and no stream."""

_RESULTS = re.compile(r"(?:Optional\[|List\[)*(?:Tensor|int|float|bool|number)\]*")

_WORDS = frozenset({
    "UPLO", "approximate", "driver", "equation", "indexing", "interpolation", "mode", "norm", "ord",
    "p", "pad_mode", "padding", "padding_side", "reduce", "rounding_mode", "side",
})  # fmt: skip
"""Arguments whose text chooses among formulas, such as `gelu(approximate="tanh")`."""

_DENIED = frozenset({
    # Other memory than the operand's, or unchecked addresses.
    "set", "set_data", "resize", "resize_as", "resize_as_sparse", "sparse_resize",
    "sparse_resize_and_clear", "from_file", "empty_quantized", "_reshape_alias", "_reshape_copy",
    "_index_put_impl", "_unsafe_index", "_unsafe_index_put", "_unsafe_masked_index",
    "_unsafe_masked_index_put_accumulate", "pin_memory", "record_stream", "data", "share_memory",
    # State of tensors, of autograd, of the process.
    "requires_grad", "retain_grad", "backward", "dist_backward", "rename", "refine_names",
    "align_to", "manual_seed", "seed", "initial_seed", "set_grad_enabled", "is_grad_enabled",
    "warn", "save", "get_gradients", "grad", "to_here", "wait",
})  # fmt: skip

_DENIED_PREFIXES = (
    "_assert", "_backward", "_copy_from", "_cuda", "_cudnn_init", "_cufft", "_debug", "_dist",
    "_make_", "_nested", "_pin_memory", "_print", "_propagate", "_record", "_resize", "_set_",
    "_sparse", "_test", "_validate",
)  # fmt: skip


def find_operator(text: str, packages: frozenset[str]) -> Any:
    """The operator `namespace.name.overload`.

    Args:
        text: as written.
        packages: libraries whose operators are trusted beside ATen's.

    Raises:
        ValueError: it is no operator, or none that a file may call.
    """
    parts = text.split(".")
    if len(parts) != 3 or not all(re.fullmatch(r"\w+", part) for part in parts):
        raise ValueError(f"{text!r} is not an operator")
    namespace, name, overload = parts
    if namespace not in {"aten", *packages}:
        raise ValueError(f"the operator {text} is of another library")
    if namespace == "aten" and _is_denied(name):
        raise ValueError(f"the operator {text} does more than compute tensors")
    packet = getattr(getattr(torch.ops, namespace), name)
    if not isinstance(packet, torch._ops.OpOverloadPacket) or overload not in packet.overloads():
        raise ValueError(f"{text} is not an operator")
    operator = getattr(packet, overload)
    require_pure(operator, packages)
    return operator


def require_pure(operator: torch._ops.OpOverload, packages: frozenset[str]) -> None:
    """ValueError unless an operator computes tensors and numbers, and does nothing else.

    It may write into its operands (batch statistics, caches): those are tensors of the graph.
    """
    if operator.namespace in packages:
        return
    if operator.namespace != "aten":
        raise ValueError(f"the operator {operator} is of another library")
    schema = operator._schema
    name = schema.name.partition("::")[2]
    taken = all(_is_value(a) for a in schema.arguments)
    given = [str(r.type) for r in schema.returns]
    if _is_denied(name) or not taken or not given or not all(map(_RESULTS.fullmatch, given)):
        raise ValueError(f"the operator {operator} does more than compute tensors")


def _is_denied(name: str) -> bool:
    return name.rstrip("_") in _DENIED or name.startswith(_DENIED_PREFIXES)


def _is_value(argument: Any) -> bool:
    kind = str(argument.type)
    if kind in ("str", "Optional[str]"):
        return argument.name in _WORDS
    return _VALUES.fullmatch(kind) is not None
