"""How torch's operators hand on what lies along axes, beside their ties.

An axis that a norm or a softmax mixes stays what it is, and so does one of which some indices are
taken; a tensor made of the size of an axis has that axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from ..graph.aten import (
    CASTS,
    CONVS,
    NORMS,
    SIZES,
    SOFTMAX,
    TRANSPOSED_CONVS,
    is_op,
    named_arguments,
    overloads,
    shape,
)
from .relation import aligned, elementwise, extent, leading, owner, sizes_of, tensors, without
from .step import Made, Product, Row, Step, like, made, repeated, same
from .views import RESHAPES, runs, span

Rule = Callable[[Node], list[Step]]
_KEEPING = NORMS | SOFTMAX | overloads(
    "log_softmax", "cumsum", "tril", "triu", "flip", "roll", "zeros_like", "ones_like", "full_like",
    "empty_like", "rand_like", "randn_like", "scatter", "scatter_add", "index_put",
    "masked_scatter", "__and__", "__or__", "where", "normal_functional", "index_add", "clamp",
)  # fmt: skip
"""Of the shape of what they read, index for index."""
_RESIZING = overloads(
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d",
    "max_pool1d", "avg_pool1d", "pad", "constant_pad_nd",
)  # fmt: skip
_CREATIONS = overloads(
    "ones", "zeros", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full",
    "new_empty", "expand", "broadcast_to",
)  # fmt: skip
_BY_CHANNEL = overloads("group_norm", "batch_norm")


def operator_steps(node: Node) -> list[Step]:
    """What one call of an operator says."""
    steps = _regrouped(node) if is_op(node, RESHAPES) else []
    for operators, rule in _RULES:
        if is_op(node, operators):
            steps += rule(node)
    return steps


def _keep(node: Node) -> list[Step]:
    """Whatever is mixed stays on its axis; weights lie along the last axes, or along axis 1."""
    given = named_arguments(node)
    steps = same(elementwise(node)) if not is_op(node, _BY_CHANNEL) else []
    first = next(iter(tensors(node.args)), None)
    if first is not None:
        steps += like(first, node)
    if is_op(node, _BY_CHANNEL):
        weights = tensors([given.get(n) for n in ("weight", "bias")])
        steps += same([t for w in weights for t in aligned(w, 0, node, 1)])
    return steps


def _conv(node: Node) -> list[Step]:
    """Pixels stay pixels, and the filters of a group are channels still."""
    given = named_arguments(node)
    x, w = given["input"], given["weight"]
    turned = is_op(node, TRANSPOSED_CONVS) or bool(given.get("transposed", False))
    steps: list[Step] = [] if turned else same(aligned(w, 0, node, 1))
    for k in range(2, len(sizes_of(node))):
        steps += same(aligned(x, k, node, k)) or [made(x, k, node, k)]
    return steps


def _created(node: Node) -> list[Step]:
    """Axes that have the size of another value's axis by the graph."""
    given = named_arguments(node)
    sizes = given.get("size", ())
    count = len(sizes_of(node))
    steps: list[Step] = []
    for k, size in enumerate(sizes if isinstance(sizes, list | tuple) else ()):
        steps += _sized(size, node, k + count - len(sizes))
    return steps


def _range(node: Node) -> list[Step]:
    end = named_arguments(node).get("end")
    return _sized(end, node, 0)


def _sized(size: Any, node: Node, place: int) -> list[Step]:
    if not is_op(size, SIZES) or len(size.args) < 2:
        return []
    source, axis = size.args
    return [Made((owner(source), int(axis)), (node, place), extent(sizes_of(node)[place]))]


def _slice(node: Node) -> list[Step]:
    source: Any = node.args[0]
    given = named_arguments(node)
    axis = int(given.get("dim", 0)) % len(sizes_of(source))
    size, start = sizes_of(source)[axis], given.get("start")
    taken = span(node, size) if isinstance(size, int) else None
    first = taken.start if taken is not None and taken.step == 1 else None
    return [made(source, axis, node, axis, first if start is not None or taken else None)]


def _cat(node: Node) -> list[Step]:
    sources: Any = node.args[0]
    axis = int(named_arguments(node).get("dim", 0)) % len(sizes_of(node))
    refs = tuple((owner(s), axis) for s in sources if str(sizes_of(s)[axis]) not in ("0", "1"))
    begin: Any = 0
    steps: list[Step] = []
    for source in sources:
        size = extent(sizes_of(source)[axis])
        start = begin if isinstance(begin, int) else None
        steps.append(Made((node, axis), (owner(source), axis), size, start))
        begin = begin + size
    return [*steps, Row((node, axis), extent(sizes_of(node)[axis]), refs)] if refs else steps


def _expand(node: Node) -> list[Step]:
    source: Any = node.args[0]
    return [*same(leading(source, node, 0)), *_created(node)]


def _repeat(node: Node) -> list[Step]:
    source: Any = node.args[0]
    given = named_arguments(node)
    axis, times = given.get("dim"), given.get("repeats")
    if not isinstance(axis, int) or not isinstance(times, int):
        return []
    axis -= len(sizes_of(source)) if axis >= 0 else 0
    return [repeated(source, axis, node, axis, times)]


def _reduce(node: Node) -> list[Step]:
    source: Any = node.args[0]
    dims = named_arguments(node).get("dim")
    if not isinstance(dims, int | list | tuple) or shape(node) is None:
        return []
    axes = {dims} if isinstance(dims, int) else set[int](dims)
    keep = len(sizes_of(node)) == len(sizes_of(source))
    return same(without(source, node, axes, keep))


def _resize(node: Node) -> list[Step]:
    first = next(iter(tensors(node.args)), None)
    return [] if first is None else like(first, node)


def _regrouped(node: Node) -> list[Step]:
    """Several axes that a view makes several others of: both have one product."""
    source: Any = node.args[0]
    steps: list[Step] = []
    for k, (old, new) in enumerate(runs(sizes_of(source), sizes_of(node))):
        if min(len(old), len(new)) > 1:
            for value, places in (source, old), (node, new):
                parts = tuple(((owner(value), p), extent(sizes_of(value)[p])) for p in places)
                steps.append(Product((f"{node.name}.run", k), parts))
    return steps


_RULES: tuple[tuple[frozenset[Any], Rule], ...] = (
    (_KEEPING | CASTS, _keep),
    (_RESIZING, _resize),
    (CONVS, _conv),
    (_CREATIONS - overloads("expand", "broadcast_to"), _created),
    (overloads("arange"), _range),
    (overloads("expand", "broadcast_to"), _expand),
    (overloads("slice", "narrow"), _slice),
    (overloads("cat"), _cat),
    (overloads("repeat_interleave"), _repeat),
    (overloads("any", "all", "argmax", "argmin", "var", "std", "norm", "linalg_vector_norm",
               "logsumexp", "mean", "sum", "amax", "amin"), _reduce),
)  # fmt: skip
