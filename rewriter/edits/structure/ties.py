"""How each operator relates the axes of what it reads to the axes of what it computes.

An axis that an operator mixes (a sum, a norm) has no relation there.
Only axes of a fixed size are related: no channel lies along batch or tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ...branches.branch import Branch, RowScale
from ...graph.aten import (
    ATEN,
    CASTS,
    EMBEDDING,
    LINEAR,
    MATMULS,
    SOFTMAX,
    is_op,
    named_arguments,
    overloads,
    shape,
    submodule,
)  # fmt: skip
from ...graph.modes import AlphaDropout, Attention, BatchNorm
from ...graph.stored_call import StoredCall, Unpacked
from .axis_relations import Bundle, Grid, Ref, Relation, Tie

Rule = Callable[[Node], list[Relation]]

GETITEM = frozenset({operator.getitem})
DIVISIONS = overloads("split", "split_with_sizes", "chunk", "unbind", "tensor_split")
RESHAPES = overloads(
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
    "reshape_as",
)  # fmt: skip
EXPANSIONS = overloads("expand", "expand_as", "broadcast_to")
COPIES = CASTS | overloads(
    "clone", "contiguous", "alias", "detach", "dropout", "lift_fresh_copy", "where", "masked_fill"
)
"""Element-wise operators that torch does not tag so."""
_SWAPS = overloads("transpose", "swapaxes", "swapdims")
_TURNS = overloads("t", "mT", "numpy_T", "permute") | _SWAPS
_NORMS = overloads("layer_norm", "rms_norm")
_SUMS = overloads("mean", "sum", "amax", "amin")


def owner(node: Any) -> Node | str:
    """What the axes of a node's value belong to: the stored tensor that it loads, or itself."""
    return str(node.target) if node.op == "get_attr" else node


def relations(gm: GraphModule, node: Node) -> list[Relation]:
    """The relations between the axes around one node; none at an operator that is not known."""
    module = submodule(gm, node)
    if isinstance(module, Branch):
        return _branch(node, module)
    if isinstance(module, nn.Dropout | AlphaDropout):
        return _elementwise(node)
    if isinstance(module, BatchNorm):
        return [_tie(a, 0 if i else 1, node, 1) for i, a in enumerate(_tensors(node.args))]
    if isinstance(module, Attention):
        return _attention(node)
    if is_op(node, GETITEM):
        return _piece(node)
    if (call := StoredCall.of(node)) is not None:
        return _stored(node, call)
    if (dense := Unpacked.of(node)) is not None:
        return [Tie((dense.weight, axis), (node, axis)) for axis in (0, 1)]
    for operators, rule in _RULES:
        if is_op(node, operators):
            return rule(node)
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return _elementwise(node) if pointwise or is_op(node, COPIES | EXPANSIONS) else []


def _tensors(args: Sequence[Any]) -> list[Node]:
    return [a for a in args if isinstance(a, Node) and shape(a) is not None]


def _sizes(node: Node) -> tuple[Any, ...]:
    return shape(node) or ()


def _tie(a: Node, i: int, b: Node, j: int) -> Tie:
    return Tie((owner(a), i % len(_sizes(a))), (owner(b), j % len(_sizes(b))))


def _aligned(a: Node, i: int, b: Node, j: int) -> list[Relation]:
    """A tie if both axes have the same fixed size."""
    x, y = _sizes(a)[i], _sizes(b)[j]
    return [_tie(a, i, b, j)] if isinstance(x, int) and isinstance(y, int) and x == y else []


def _leading(a: Node, b: Node, last: int) -> list[Relation]:
    """Ties of the axes in front of the last ones, aligned from the right as in broadcasting."""
    count = min(len(_sizes(a)), len(_sizes(b)))
    return [t for k in range(last + 1, count + 1) for t in _aligned(a, -k, b, -k)]


def _elementwise(node: Node) -> list[Relation]:
    return [t for a in node.all_input_nodes if shape(a) is not None for t in _leading(a, node, 0)]


def _reshape(node: Node) -> list[Relation]:
    """Axes that a view keeps, merges or parts, aligned from the right."""
    source: Any = node.args[0]
    before, after = _sizes(source), _sizes(node)
    i, j = len(before) - 1, len(after) - 1
    found: list[Relation] = []
    while i >= 0 and j >= 0:
        a, b = before[i], after[j]
        if str(a) == str(b):
            found += _aligned(source, i, node, j)
            i, j = i - 1, j - 1
        elif a == 1 or b == 1:
            i, j = i - (a == 1), j - (b == 1)
        elif not (isinstance(a, int) and isinstance(b, int)):
            break
        elif a > b:
            parts, j = _parts(owner(node), after, j, a)
            found += [Grid((owner(source), i), parts)] if parts else []
            i = i - 1 if parts else -1
        else:
            parts, i = _parts(owner(source), before, i, b)
            found += [Grid((owner(node), j), parts)] if parts else []
            j = j - 1 if parts else -1
    return found


def _parts(
    of: Node | str, sizes: Sequence[Any], end: int, whole: int
) -> tuple[tuple[tuple[Ref, int], ...], int]:
    """The axes up to `end` whose sizes multiply to `whole`, none if they do not."""
    parts: list[tuple[Ref, int]] = []
    product = 1
    while product < whole and end >= 0 and isinstance(sizes[end], int):
        parts.insert(0, ((of, end), sizes[end]))
        product *= sizes[end]
        end -= 1
    return (tuple(parts), end) if product == whole else ((), end)


def _turn(node: Node) -> list[Relation]:
    source: Any = node.args[0]
    order = list(range(len(_sizes(source))))
    if is_op(node, _SWAPS):
        i, j = (int(a) % len(order) for a in node.args[1:3])  # pyright: ignore[reportArgumentType]
        order[i], order[j] = order[j], order[i]
    elif is_op(node, overloads("permute")):
        order = [int(d) % len(order) for d in node.args[1]]  # pyright: ignore
    else:
        order = [*order[:-2], *reversed(order[-2:])]
    return [t for j, i in enumerate(order) for t in _aligned(source, i, node, j)]


def span(node: Node, size: int) -> range | None:
    """The indices that a slice or narrow takes of an axis of that size, if they are known."""
    given = named_arguments(node)
    start, end, step = given.get("start"), given.get("end"), given.get("step", 1)
    if "length" in given:
        end = start + given["length"] if isinstance(start, int) else given["length"]
    if any(isinstance(x, Node) for x in (start, end, step)):
        return None
    return range(size)[slice(start, end, step)]


def _slice(node: Node) -> list[Relation]:
    source: Any = node.args[0]
    axis = int(named_arguments(node).get("dim", 0)) % len(_sizes(source))
    found = [t for k in range(len(_sizes(node))) if k != axis for t in _aligned(source, k, node, k)]
    size = _sizes(source)[axis]
    taken = span(node, size) if isinstance(size, int) else None
    if taken is not None:
        index = torch.tensor(list(taken), dtype=torch.long)
        found.append(Tie((owner(source), axis), (node, axis), index, size))
    return found


def _select(node: Node) -> list[Relation]:
    source: Any = node.args[0]
    return _without(source, node, {int(named_arguments(node).get("dim", 0))}, keep=False)


def _without(source: Node, node: Node, axes: set[int], keep: bool) -> list[Relation]:
    """Ties of the axes other than `axes`, which are gone from the result unless `keep`."""
    rank = len(_sizes(source))
    gone = {a % rank for a in axes}
    left = [i for i in range(rank) if keep or i not in gone]
    return [t for j, i in enumerate(left) if i not in gone for t in _aligned(source, i, node, j)]


def pieces(division: Node) -> tuple[int, list[int]] | None:
    """The axis that a split, chunk or the like divides, and the sizes of its pieces."""
    held: Any = division.meta.get("val")
    axis = int(named_arguments(division).get("dim", 0))
    shapes = [tuple(v.shape) for v in held or ()]
    if not shapes or is_op(division, overloads("unbind")):
        return None
    axis %= len(shapes[0])
    sizes = [s[axis] for s in shapes]
    return (axis, sizes) if all(isinstance(s, int) for s in sizes) else None


def _piece(node: Node) -> list[Relation]:
    division: Any = node.args[0]
    number: Any = node.args[1]
    if not is_op(division, DIVISIONS):
        return []
    source = division.args[0]
    if is_op(division, overloads("unbind")):
        return _without(source, node, {int(named_arguments(division).get("dim", 0))}, keep=False)
    found = pieces(division)
    if found is None:
        return []
    axis, sizes = found
    index = torch.arange(sizes[number]) + sum(sizes[:number])
    ties = [t for k in range(len(_sizes(node))) if k != axis for t in _aligned(source, k, node, k)]
    return [*ties, Tie((owner(source), axis), (node, axis), index, sum(sizes))]


def _cat(node: Node) -> list[Relation]:
    sources: Any = node.args[0]
    axis = int(named_arguments(node).get("dim", 0)) % len(_sizes(node))
    found: list[Relation] = []
    begin = 0
    for source in sources:
        size = _sizes(source)[axis]
        if not isinstance(size, int):
            begin = -1
        if begin >= 0:
            whole = _sizes(node)[axis]
            found.append(
                Tie((node, axis), (owner(source), axis), torch.arange(size) + begin, whole)
            )
            begin += size
        found += [
            t for k in range(len(_sizes(node))) if k != axis for t in _aligned(source, k, node, k)
        ]
    return found


def _linear(node: Node) -> list[Relation]:
    x, w, *bias = _tensors(node.args[:3])
    found = [_tie(x, -1, w, 1), _tie(w, 0, node, -1), *_leading(x, node, 1)]
    return [*found, *(_tie(b, 0, node, -1) for b in bias)]


def _stored(node: Node, call: StoredCall) -> list[Relation]:
    """The axes of a weight in a stored format are `[out, in]`, whatever its parts are."""
    x: Any = call.x
    last = len(_sizes(node)) - 1
    found = [Tie((owner(x), last), (call.weight, 1)), Tie((call.weight, 0), (node, last))]
    biases = [_tie(call.bias, 0, node, -1)] if isinstance(call.bias, Node) else []
    group = Bundle((call.weight, 1), call.numbers["group"])
    return [*found, *_leading(x, node, 1), *biases, group]


def _addmm(node: Node) -> list[Relation]:
    bias, x, w = _tensors(node.args[:3])
    found = [_tie(x, 1, w, 0), _tie(w, 1, node, 1), *_leading(bias, node, 0)]
    return [*found, *_aligned(x, 0, node, 0)]


def _matmul(node: Node) -> list[Relation]:
    x, w = _tensors(node.args[-2:])
    if min(len(_sizes(x)), len(_sizes(w))) < 2:
        return []
    found = [_tie(x, -1, w, -2), _tie(w, -1, node, -1), *_aligned(x, -2, node, -2)]
    return [*found, *_leading(x, node, 2), *_leading(w, node, 2)]


def _attention(node: Node) -> list[Relation]:
    """Heads; the width of queries and keys is none, because the scale depends on it."""
    q, k, v = _tensors(node.args[:3])
    found = [*_leading(q, node, 2), *_leading(k, v, 2), *_aligned(v, -1, node, -1)]
    for mask in _tensors(node.args[3:4]):
        found += _leading(mask, node, 2)
    heads, groups = _sizes(q)[1], _sizes(k)[1]
    if heads == groups:
        return [*found, *_aligned(k, 1, q, 1)]
    index = torch.arange(heads) // (heads // groups)
    return [*found, Tie((owner(k), 1), (owner(q), 1), index, groups)]


def _normal(node: Node) -> list[Relation]:
    source: Any = node.args[0]
    count = len(node.args[1])  # pyright: ignore[reportArgumentType]
    return _without(source, node, set(range(-count, 0)), keep=True)


def _sum(node: Node) -> list[Relation]:
    source: Any = node.args[0]
    given = named_arguments(node)
    dims = given.get("dim")
    axes = {dims} if isinstance(dims, int) else set[int](dims or range(len(_sizes(source))))
    return _without(source, node, axes, keep=bool(given.get("keepdim", False)))


def _softmax(node: Node) -> list[Relation]:
    source: Any = node.args[0]
    return _without(source, node, {int(named_arguments(node)["dim"])}, keep=True)


def _embedding(node: Node) -> list[Relation]:
    table: Any = node.args[0]
    return [_tie(table, 1, node, -1)]


def _repeat(node: Node) -> list[Relation]:
    source: Any = node.args[0]
    given = named_arguments(node)
    axis, times = given.get("dim"), given.get("repeats")
    if not isinstance(axis, int) or not isinstance(times, int):
        return []
    axis %= len(_sizes(source))
    found = _without(source, node, {axis}, keep=True)
    size = _sizes(source)[axis]
    if isinstance(size, int):
        index = torch.arange(size * times) // times
        found.append(Tie((owner(source), axis), (node, axis), index, size))
    return found


def _branch(node: Node, branch: Branch) -> list[Relation]:
    """Ties of what a branch reads and writes to its own tensors, by the axes that it declares."""
    if not branch.reads or shape(node) is None:
        return []
    x: Any = node.args[0]
    axis = branch.axis % len(_sizes(x))
    found = [t for k in range(len(_sizes(x))) if k != axis for t in _aligned(x, k, node, k)]
    held = {**dict(branch.named_parameters()), **dict(branch.named_buffers())}
    for name in ("features", "own"):
        held.pop(name, None)
    sizes = {n: shape(r) or () for n, r in node.kwargs.items()}
    read = {n: len(s) for n, s in sizes.items() if all(type(d) is int for d in s)}  # weights
    ranks = {n: t.dim() for n, t in held.items()} | read
    if any(len(branch.axes.get(n, ())) != rank for n, rank in ranks.items()):
        return found
    if any({branch.reads, branch.writes}.intersection(branch.axes[n]) for n in read):
        return found  # others may read that, too, so it cannot be cut with the channels
    declared = [(n, k, a) for n in held for k, a in enumerate(branch.axes[n])]
    own = None if branch.features is None else branch.features.cpu() - 1
    for name, k, label in declared:
        ref: Ref = f"{node.target}.{name}", k
        if label == branch.writes:
            found.append(Tie(ref, (node, axis), own, held[name].shape[k]))
        elif label == branch.reads:
            found.append(Tie((owner(x), axis), ref))
    if branch.reads == branch.writes and any(a == branch.reads for _, _, a in declared):
        found.append(Tie((owner(x), axis), (node, axis)))
    if isinstance(branch, RowScale):
        found += _rows(node, branch)
    elif len(node.args) > 1:  # lowered: the linear is inside
        found += _linear(node)
    return found


def _rows(node: Node, branch: RowScale) -> list[Relation]:
    """Rows of the weight that a row scale reads; its columns are none, because rows depend on
    all of them."""
    w, *bias = _tensors(node.args[2:4])
    found: list[Relation] = [_tie(w, branch.shape.out_axis, node, branch.axis)]
    return [*found, *(_tie(b, 0, node, branch.axis) for b in bias)]


_RULES: tuple[tuple[frozenset[Any], Rule], ...] = (
    (RESHAPES, _reshape),
    (_TURNS, _turn),
    (overloads("slice", "narrow"), _slice),
    (overloads("select"), _select),
    (overloads("cat"), _cat),
    (frozenset({LINEAR}), _linear),
    (frozenset({ATEN.addmm.default}), _addmm),
    (MATMULS - {ATEN.baddbmm.default}, _matmul),
    (frozenset({EMBEDDING}), _embedding),
    (_NORMS, _normal),
    (SOFTMAX, _softmax),
    (_SUMS, _sum),
    (overloads("repeat_interleave"), _repeat),
)
