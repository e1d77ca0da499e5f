"""How each operator relates the axes of what it reads to the axes of what it computes.

An axis that an operator mixes (a sum, a norm) has no relation there.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ..branches.branch import Branch, RowScale
from ..branches.convolutions import ConvolutionShape
from ..branches.prompts import KeyValue
from ..branches.shapes import EmbeddingShape
from ..graph.aten import (
    ATEN,
    CASTS,
    LINEAR,
    MATMULS,
    SOFTMAX,
    is_op,
    named_arguments,
    overloads,
    shape,
    submodule,
)  # fmt: skip
from ..graph.modes import AlphaDropout, Attention, BatchNorm
from ..graph.stored_call import Lookup, StoredCall, Unpacked
from ..graph.weighted_call import is_grouped
from .gathers import GATHER_RULES, grouped
from .relation import (
    Bundle,
    Grid,
    Ref,
    Relation,
    Tie,
    aligned,
    elementwise,
    leading,
    owner,
    sizes_of,
    tensors,
    tie,
    without,
)
from .views import DIVISIONS, VIEW_RULES, Rule, copies, piece

GETITEM = frozenset({operator.getitem})

EXPANSIONS = overloads("expand", "expand_as", "broadcast_to")

COPIES = CASTS | overloads(
    "clone", "contiguous", "alias", "detach", "dropout", "lift_fresh_copy", "where", "masked_fill"
)

"""Element-wise operators that torch does not tag so."""

KEY_VALUE = ("length", "kv_heads", "width")
"""Axes of stored rows in front of keys, or of values."""
_NORMS = overloads("layer_norm", "rms_norm")

_SUMS = overloads("mean", "sum", "amax", "amin")


def relations(gm: GraphModule, node: Node) -> list[Relation]:
    """The relations between the axes around one node; none at an operator that is not known."""
    module = submodule(gm, node)
    if isinstance(module, Branch):
        return _branch(node, module)
    if isinstance(module, nn.Dropout | AlphaDropout) or getattr(module, "pointwise", False):
        return elementwise(node)
    if isinstance(module, BatchNorm):
        return [tie(a, 0 if i else 1, node, 1) for i, a in enumerate(tensors(node.args))]
    if isinstance(module, Attention):
        return _attention(node)
    if is_op(node, GETITEM):
        call = submodule(gm, node.args[0])
        return _key_value(node, call) if isinstance(call, KeyValue) else piece(node)
    if is_grouped(node):
        return grouped(node)
    if (call := StoredCall.of(node)) is not None:
        return _stored(node, call)
    if (dense := Unpacked.of(node)) is not None:
        both = [Tie((dense.weight, axis), (node, axis)) for axis in (0, 1)]
        return [*both, Bundle((dense.weight, 1), dense.numbers["group"])]
    if (rows := Lookup.of(node)) is not None:
        return _lookup(node, rows)
    for operators, rule in _RULES:
        if is_op(node, operators):
            return rule(node)
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    every = elementwise(node) if pointwise or is_op(node, COPIES | EXPANSIONS) else []
    return [*every, *(Tie(ref, ref) for ref in copies(node))]  # so many as are read


def _linear(node: Node) -> list[Relation]:
    x, w, *bias = tensors(node.args[:3])
    relations = [tie(x, -1, w, 1), tie(w, 0, node, -1), *leading(x, node, 1)]
    return [*relations, *(tie(b, 0, node, -1) for b in bias)]


def _stored(node: Node, call: StoredCall) -> list[Relation]:
    """The axes of a weight in a stored format are `[out, in]`, whatever its parts are."""
    x: Any = call.x
    last = len(sizes_of(node)) - 1
    ends = [Tie((owner(x), last), (call.weight, 1)), Tie((call.weight, 0), (node, last))]
    biases = [tie(call.bias, 0, node, -1)] if isinstance(call.bias, Node) else []
    group = Bundle((call.weight, 1), call.numbers["group"])
    return [*ends, *leading(x, node, 1), *biases, group]


def _lookup(node: Node, rows: Lookup) -> list[Relation]:
    """A row of the table an id; columns go by groups."""
    last = len(sizes_of(node)) - 1
    ids = [tie(rows.ids, k, node, k) for k in range(last)]
    group = Bundle((rows.weight, 1), rows.numbers["group"])
    return [*ids, Tie((rows.weight, 1), (node, last)), group]


def _addmm(node: Node) -> list[Relation]:
    bias, x, w = tensors(node.args[:3])
    relations = [tie(x, 1, w, 0), tie(w, 1, node, 1), *leading(bias, node, 0)]
    return [*relations, *aligned(x, 0, node, 0)]


def _matmul(node: Node) -> list[Relation]:
    x, w = tensors(node.args[-2:])
    if min(len(sizes_of(x)), len(sizes_of(w))) < 2:
        return []
    relations = [tie(x, -1, w, -2), tie(w, -1, node, -1), *aligned(x, -2, node, -2)]
    return [*relations, *leading(x, node, 2), *leading(w, node, 2)]


def _attention(node: Node) -> list[Relation]:
    """Heads; the width of queries and keys is none, because the scale depends on it."""
    q, k, v = tensors(node.args[:3])
    relations = [*leading(q, node, 2), *leading(k, v, 2), *aligned(v, -1, node, -1)]
    for mask in tensors(node.args[3:4]):
        relations += leading(mask, node, 2)
    heads, groups = sizes_of(q)[1], sizes_of(k)[1]
    if heads == groups:
        return [*relations, *aligned(k, 1, q, 1)]
    index = torch.arange(heads) // (heads // groups)
    return [*relations, Tie((owner(k), 1), (owner(q), 1), index, groups)]


def _normal(node: Node) -> list[Relation]:
    source: Any = node.args[0]
    count = len(node.args[1])  # pyright: ignore[reportArgumentType]
    return without(source, node, set(range(-count, 0)), keep=True)


def _sum(node: Node) -> list[Relation]:
    source: Any = node.args[0]
    given = named_arguments(node)
    dims = given.get("dim")
    axes = {dims} if isinstance(dims, int) else set[int](dims or range(len(sizes_of(source))))
    return without(source, node, axes, keep=bool(given.get("keepdim", False)))


def _softmax(node: Node) -> list[Relation]:
    source: Any = node.args[0]
    return without(source, node, {int(named_arguments(node)["dim"])}, keep=True)


def _branch(node: Node, branch: Branch) -> list[Relation]:
    """Ties of what a branch reads and writes to its own tensors, by the axes that it declares;
    `("...", "width")` declares the last axis of states that it reads beside its operand."""
    if not branch.reads or shape(node) is None:
        return []
    x: Any = node.args[0]
    ends = _features(node, branch)
    inside = () if isinstance(branch.shape, EmbeddingShape) else (ends[branch.reads][1],)
    outside = [k for k in range(len(sizes_of(x))) if k not in inside]
    relations = [t for k in outside for t in aligned(x, k, node, k)]
    tensors = {**dict(branch.named_parameters()), **dict(branch.named_buffers())}
    for name in ("features", "own"):
        tensors.pop(name, None)
    values = {n: r for n, r in node.kwargs.items() if isinstance(r, Node)}
    states = [n for n in values if branch.axes.get(n, ("",))[0] == "..."]
    for name in states:  # beside the operand
        state, word = values.pop(name), str(branch.axes[name][-1])
        end = state, len(sizes_of(state)) - 1
        if word in ends and sizes_of(state)[-1] == sizes_of(ends[word][0])[ends[word][1]]:
            relations.append(Tie((owner(state), end[1]), (owner(ends[word][0]), ends[word][1])))
        ends.setdefault(word, end)
    sizes = {n: shape(r) or () for n, r in values.items()}
    read = {n: len(s) for n, s in sizes.items() if all(type(d) is int for d in s)}  # weights
    ranks = {n: t.dim() for n, t in tensors.items()} | read
    if any(len(branch.axes.get(n, ())) != rank for n, rank in ranks.items()):
        return relations
    if any({branch.reads, branch.writes}.intersection(branch.axes.get(n, ())) for n in read):
        return relations  # others may read that, too, so it cannot be cut with the channels
    declared = [(n, k, a) for n in tensors for k, a in enumerate(branch.axes.get(n, ()))]
    own = None if branch.features is None else branch.features.cpu() - 1
    kernel = isinstance(branch.shape, ConvolutionShape)
    for name, k, label in declared:
        ref: Ref = f"{node.target}.{name}", k
        words = (label,) if isinstance(label, str) else label
        word = next((w for w in words if w in ends), None)
        if word is None:
            continue
        (value, axis), size = ends[word], tensors[name].shape[k]
        same = len(words) == 1 and sizes_of(value)[axis] == size
        if word == branch.writes and (same or (own is not None and len(words) == 1)):
            relations.append(Tie(ref, (owner(value), axis), own, size))
        elif same:
            relations.append(Tie((owner(value), axis), ref))
        elif own is None and (len(words) == 2 or kernel):
            relations += _product(ref, size, words if len(words) == 2 else (word, ""), ends)
    if branch.reads == branch.writes and any(a == branch.reads for *_, a in declared):
        axis = ends[branch.reads][1]
        relations.append(Tie((owner(x), axis), (node, axis)))
    if isinstance(branch, RowScale):
        relations += _rows(node, branch)
    elif len(node.args) > 1:  # lowered: the linear is inside
        relations += _linear(node)
    return relations


def _features(node: Node, branch: Branch) -> dict[str, tuple[Node, int]]:
    """Where the features lie that a branch reads and writes; an embedding reads ids."""
    x: Any = node.args[0]
    place = 1 if isinstance(branch.shape, ConvolutionShape) else branch.axis
    ends = {branch.writes: (node, place % len(sizes_of(node)))}
    if isinstance(branch.shape, EmbeddingShape) or branch.reads == branch.writes:
        return ends
    return {branch.reads: (x, place % len(sizes_of(x))), **ends}


def _product(
    ref: Ref, size: int, label: tuple[str, ...], ends: Mapping[str, tuple[Node, int]]
) -> list[Relation]:
    """A declared product of the features and one other factor."""
    word = next((w for w in label if w in ends), None)
    if word is None or len(label) != 2:
        return []
    node, axis = ends[word]
    features = sizes_of(node)[axis]
    if not isinstance(features, int) or size % features:
        return []
    other: tuple[Ref, int] = ((f"{ref[0]}.{ref[1]}", 0), size // features)
    parts = [((owner(node), axis), features), other]
    return [Grid(ref, tuple(parts if label[0] == word else reversed(parts)))]


def divides(gm: GraphModule, node: object) -> bool:
    """Whether a node returns several values, whose relations are those of its entries."""
    return is_op(node, DIVISIONS) or isinstance(submodule(gm, node), KeyValue)


def _key_value(node: Node, branch: KeyValue) -> list[Relation]:
    """Heads and width of rows in front of keys or values `[batch, heads, ...]`."""
    call: Any = node.args[0]
    number: Any = node.args[1]
    x = call.args[number]
    turned = number == 0 and (call.kwargs.get("transposed", False) or call.args[2:3] == (True,))
    if len(sizes_of(x)) != 4:
        return []
    width = -2 if turned else -1
    relations = [t for k in (0, 1, width) for t in aligned(x, k, node, k)]
    stored = [n for n, _ in branch.named_parameters() if branch.axes.get(n) == KEY_VALUE]
    shapes = {n: branch.get_parameter(n).shape for n in stored}
    if len(stored) != 2 or list(branch.axes)[number] not in shapes:
        return []
    name = list(branch.axes)[number]
    ref, (_, groups, size) = f"{call.target}.{name}", shapes[name]
    heads = sizes_of(node)[1]
    index = None if heads == groups else torch.arange(heads) // (heads // groups)
    relations.append(Tie((ref, 1), (node, 1), index, groups))
    return [*relations, Tie((ref, 2), (node, width % 4), None, size)]


def _rows(node: Node, branch: RowScale) -> list[Relation]:
    """Rows of the weight that a row scale reads; its columns are none, because rows depend on
    all of them."""
    w, *bias = tensors(node.args[2:4])
    relations: list[Relation] = [tie(w, branch.shape.out_axis, node, branch.axis)]
    return [*relations, *(tie(b, 0, node, branch.axis) for b in bias)]


_RULES: tuple[tuple[frozenset[Any], Rule], ...] = (
    *VIEW_RULES,
    (frozenset({LINEAR}), _linear),
    (frozenset({ATEN.addmm.default}), _addmm),
    (MATMULS - {ATEN.baddbmm.default}, _matmul),
    *GATHER_RULES,
    (_NORMS, _normal),
    (SOFTMAX, _softmax),
    (_SUMS, _sum),
)
