"""Where a graph names tokens by their place, which a prompt in front of them moves.

A constant place (`x[:, 0]`) moves with the tokens. A place that comes from an input (`x[i, last]`,
a span loss), and tokens in another order, are refused: the edit cannot tell what they mean.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ...errors import PassError
from ...graph.aten import (
    ATEN,
    CASTS,
    EMBEDDING,
    SIZES,
    VIEWS,
    attribute,
    is_float,
    is_op,
    named_arguments,
    output_node,
    overloads,
    reaches,
    shape,
    source_line,
    strip,
    users,
    value,
)
from .carried import EMPTY, carried_by

_BY_LIST = overloads("index", "index_put", "_unsafe_index", "_unsafe_index_put")
_BY_AXIS = overloads(
    "index_select", "gather", "scatter", "scatter_add", "scatter_reduce", "index_add",
    "index_copy", "index_fill", "take_along_dim",
)  # fmt: skip
_LOSSES = overloads("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss_forward")
_COMPARISONS = overloads("eq", "ne", "lt", "le", "gt", "ge")
_ORDERS = overloads("sort", "argsort", "msort", "flip", "roll", "kthvalue", "rot90")
_PARTS = overloads(
    "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "narrow", "slice_scatter",
    "select_scatter",
)  # fmt: skip
_PLACES = overloads("argmax", "argmin", "topk", "max", "min")
_WINDOWS = overloads("unfold")
_STRIDED = overloads("as_strided")
_POOLS = overloads(
    "avg_pool1d", "max_pool1d", "max_pool1d_with_indices", "avg_pool2d", "max_pool2d",
    "max_pool2d_with_indices",
)  # fmt: skip
_ADAPTIVE = overloads("adaptive_avg_pool1d", "adaptive_max_pool1d")
_FILLS = CASTS | VIEWS | overloads("add", "sub", "clamp", "clamp_min", "clamp_max")


def moved_places(
    gm: GraphModule, embedding: Node, ids: Node, symbol: str, length: int
) -> dict[Node, tuple[Any, ...]]:
    """The calls that read constant places along the tokens, with their arguments for `length`
    more tokens in front.

    Args:
        embedding, ids: the token lookup and the input it reads, `[batch, sequence]`.
        symbol: the size `sequence`.

    Raises:
        PassError: a place comes from an input, or tokens are reordered or pooled in groups.
    """
    return _Places(gm, embedding, ids, symbol, length).moved()


class _Places:
    """A walk forward from the tokens, which knows what stands in front of them on each axis."""

    def __init__(
        self, gm: GraphModule, embedding: Node, ids: Node, symbol: str, length: int
    ) -> None:
        self.gm, self.symbol, self.length = gm, symbol, length
        self.token = re.compile(rf"\b{re.escape(symbol)}\b")
        self.carried = carried_by([embedding, ids], symbol)
        self.leads: dict[Node, dict[str, float]] = {}

    def moved(self) -> dict[Node, tuple[Any, ...]]:
        moves: dict[Node, tuple[Any, ...]] = {}
        for node in self.gm.graph.nodes:
            if node.op != "call_function":
                continue
            self._check_indices(node)
            if node in self.carried:
                self.leads[node] = self._leads(node)
                args = self._constant(node)
                if args is not None:
                    moves[node] = args
        return moves

    def _refuse(self, node: Node, what: str) -> PassError:
        line = source_line(node)
        at = f" ({line})" if line else ""
        return PassError(
            f"{node.name}{at} {what}, so no prompt can be put in front of the tokens. Capture the "
            "model without it, or choose prefix_tuning."
        )

    def _size(self, node: Any, axis: int) -> str:
        sizes = shape(node)
        return str(sizes[axis]) if sizes else ""

    def _leads(self, node: Node) -> dict[str, float]:
        """How many entries stand in front of the tokens, by the size of the axis."""
        leads: dict[str, float] = {}
        for source in node.all_input_nodes:
            for size, lead in self.leads.get(source, {}).items():
                leads[size] = max(lead, leads.get(size, 0))
        val = value(node)
        own = [str(s) for s in shape(node) or ()]
        if is_op(node, ATEN.cat.default) and isinstance(val, Tensor):
            axis = int(node.args[1]) if len(node.args) > 1 else 0  # pyright: ignore[reportArgumentType]
            front: float = 0
            for part in node.args[0]:  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
                sizes = shape(part)
                size = sizes[axis] if sizes and len(sizes) == len(own) else None
                if part in self.carried and self.token.search(str(size)):
                    leads[own[axis]] = front + self.leads.get(part, {}).get(str(size), 0)  # pyright: ignore[reportArgumentType]
                    break
                front = front + size if type(size) is int else math.inf
        elif is_op(node, ATEN.slice.Tensor):
            arguments = named_arguments(node)
            axis, start = arguments.get("dim", 0), arguments.get("start") or 0
            before = self._lead(node.args[0], axis)
            if before is not None and type(start) is int and start >= 0:
                leads[own[axis]] = max(0, before - start)
        leads[self.symbol] = leads.get(self.symbol, 0)
        return {s: lead for s, lead in leads.items() if s in own}

    def _lead(self, node: Any, axis: int) -> float | None:
        """The entries in front of the tokens; None if the axis holds them in another way."""
        size = self._size(node, axis)
        return self.leads.get(node, {}).get(size, 0 if size == self.symbol else None)

    def _constant(self, node: Node) -> tuple[Any, ...] | None:
        """The moved arguments of a call that reads carried tokens."""
        source: Any = node.args[0] if node.args else None
        sizes = shape(source)
        if source not in self.carried or not sizes:
            return None
        arguments = named_arguments(node)
        if is_op(node, ATEN.select.int) or is_op(node, ATEN.slice.Tensor):
            axis = int(arguments.get("dim", 0))
            if not self.token.search(str(sizes[axis])):
                return None
            read = self._select if is_op(node, ATEN.select.int) else self._slice
            return read(node, source, axis)
        if is_op(node, _STRIDED) and any(self.token.search(str(s)) for s in sizes):
            raise self._refuse(node, "takes tokens by their places in memory")
        if is_op(node, _WINDOWS) and arguments.get("step") != 1:
            if self._size(source, int(arguments.get("dimension", 0))) == self.symbol:
                raise self._refuse(node, "takes the tokens in groups by their places")
        if is_op(node, _ORDERS | _PARTS | _PLACES | _POOLS | _ADAPTIVE):
            self._check_order(node, source, arguments)
        return None

    def _check_order(self, node: Node, source: Node, arguments: dict[str, Any]) -> None:
        """Refuses tokens in another order or in groups by place."""
        dims = arguments.get("dims", arguments.get("dim", -1))
        axes: list[int] = list(dims) if isinstance(dims, list | tuple) else [dims]  # pyright: ignore[reportUnknownArgumentType]
        if is_op(node, _POOLS | _ADAPTIVE):
            axes = [-1, -2] if "2d" in str(node.target) else [-1]
        if "dim" not in arguments and is_op(node, _PARTS):
            axes = [0]
        pure = [a for a in axes if type(a) is int and self._size(source, a) == self.symbol]
        if not pure:
            return
        alone = sum(str(s) == self.symbol for s in shape(source) or ()) == 1
        if is_op(node, _ORDERS) and not (is_op(node, overloads("flip")) and self._back(node)):
            raise self._refuse(node, "puts the tokens into another order")
        if is_op(node, _PARTS):
            raise self._refuse(node, "divides the tokens by their places")
        if is_op(node, _PLACES) and alone and self._counted(node):
            raise self._refuse(node, "returns places of tokens, which count the prompt")
        if is_op(node, _ADAPTIVE) and set(_flat(arguments.get("output_size"))) != {1}:
            raise self._refuse(node, "pools the tokens in groups by their places")
        if is_op(node, _POOLS):
            steps = _flat(arguments.get("stride") or arguments["kernel_size"])
            if set(steps) != {1}:
                raise self._refuse(node, "pools the tokens in groups by their places")

    def _back(self, node: Node) -> bool:
        """Whether flipped tokens are flipped back, or a flip does that, on every way."""

        def flip(other: Node) -> bool:
            return is_op(other, overloads("flip")) and other in self.carried

        def stop(other: Node) -> bool:
            if other.op == "output":
                return True
            return not flip(other) and any(
                i in self.carried and i not in turned and self._tokens(i) for i in _sources(other)
            )

        turned: set[Node] = {node}
        stack = [node]
        while stack:
            for user in users(stack.pop()):
                if user not in turned and not flip(user):
                    turned.add(user)
                    stack.append(user)
        if not reaches(node, stop, flip):
            return True
        before: Any = node.args[0]
        while isinstance(before, Node) and before in self.carried:
            if flip(before):
                return self._back(before)
            before = before.args[0] if before.args else None
        return False

    def _tokens(self, node: Node) -> bool:
        return any(str(s) == self.symbol for s in shape(node) or ())

    def _counted(self, node: Node) -> bool:
        """Whether places reach the output as integers, not as an index."""
        end = output_node(self.gm)
        return bool(
            reaches(
                node, lambda n: n is end, lambda n: is_float(n) or is_op(n, _BY_LIST | _BY_AXIS)
            )
        )

    def _select(self, node: Node, source: Node, axis: int) -> tuple[Any, ...] | None:
        index, lead = node.args[2], self._lead(source, axis)
        if not isinstance(index, int):
            if self._from_right(source, axis, index):
                return None
            raise self._refuse(node, "takes a token at a place that depends on their number")
        if index < 0 or (lead is not None and index < lead):
            return None
        if lead is None:
            if not self._merged(source, axis):
                return None
            raise self._refuse(node, f"takes entry {index} of an axis that tokens share")
        return (*node.args[:2], index + self.length)

    def _slice(self, node: Node, source: Node, axis: int) -> tuple[Any, ...] | None:
        arguments = named_arguments(node)
        start, end = arguments.get("start") or 0, arguments.get("end")
        lead = self._lead(source, axis)
        pure = self._size(source, axis) == self.symbol
        if end is None or end == sys.maxsize or self._size(node, axis) == self._size(source, axis):
            end = None
        if arguments.get("step", 1) != 1 and pure:
            raise self._refuse(node, "takes tokens in steps")
        for bound in (start, end):
            if isinstance(bound, Node) and pure and not self._from_right(source, axis, bound):
                raise self._refuse(node, "takes tokens up to a place that depends on their number")
        if isinstance(start, int) and start > 0 and end is None:
            joined = all(is_op(u, overloads("cat", "constant_pad_nd", "pad")) for u in users(node))
            if pure and is_float(node) and lead is not None and start > lead and not joined:
                raise self._refuse(node, f"leaves out the first {start} tokens")
            return None
        if not isinstance(end, int) or end < 0 or (lead is not None and end <= lead):
            return None
        if lead is None and not self._merged(source, axis):
            return None
        if lead is None or not isinstance(start, int) or start < lead:
            raise self._refuse(node, f"takes entries up to {end} of an axis that tokens share")
        return (*node.args[:2], start + self.length, end + self.length, *node.args[4:])

    def _merged(self, source: Node, axis: int) -> bool:
        """Whether an axis is that of the tokens times others, not one of chunks of tokens."""
        return re.fullmatch(r"[\w*]+", self._size(source, axis)) is not None

    def _from_right(self, source: Node, axis: int, index: Any) -> bool:
        """Whether a symbolic place is at a fixed distance from the end."""
        sizes = shape(source)
        place = value(index)
        return bool(sizes) and place is not None and str(sizes[axis] - place).isdigit()

    def _check_indices(self, node: Node) -> None:
        if is_op(node, _LOSSES):
            scores, target = node.args[:2]
            axis = min(1, len(shape(scores) or (0,)) - 1)
            if scores in self.carried and self._size(scores, axis) == self.symbol:
                raise self._refuse(node, f"compares tokens with the place that {target} gives")
        elif is_op(node, _COMPARISONS):
            self._check_comparison(node)
        elif is_op(node, overloads("one_hot")):
            if self._tokens(node) and (name := self._foreign(node.args[0])):
                raise self._refuse(node, f"marks the token that the input {name!r} gives")
        for data, axis, index in _indexed(node):
            size = self._size(data, axis)
            if self.token.search(size):
                self._check_index(node, data, index, size == self.symbol)

    def _check_comparison(self, node: Node) -> None:
        pair = [a for a in node.args[:2] if isinstance(a, Node)]
        if len(pair) != 2:
            return
        for own, other in (pair, pair[::-1]):
            if self._tokens(other) and not self._roots(other) and (name := self._foreign(own)):
                raise self._refuse(node, f"compares tokens' places with the input {name!r}")

    def _check_index(self, node: Node, data: Node, index: Node, pure: bool) -> None:
        name = self._foreign(index)
        if data in self.carried and not name:
            raw = strip(index, _FILLS)
            name = str(raw.target) if raw.op == "placeholder" and not _boolean(raw) else ""
        if name:
            raise self._refuse(node, f"takes tokens at the places that the input {name!r} gives")
        if any(is_op(n, _ORDERS) and self._tokens(n) for n in self._computed(index)):
            raise self._refuse(node, f"takes tokens in another order ({index.name})")
        if data not in self.carried or self._roots(index) or self._behind(index):
            return
        if pure and _range(index):
            return
        if not pure and any(self.token.search(str(s)) for s in shape(index) or ()):
            return
        raise self._refuse(node, f"takes tokens at fixed places ({index.name})")

    def _roots(self, node: Any) -> set[Node]:
        """The inputs and carried values that a value is computed from, sizes aside."""
        return {n for n in self._computed(node) if n.op == "placeholder" or n in self.carried}

    def _computed(self, node: Any) -> set[Node]:
        """What a value is computed from, back to inputs and carried values, sizes aside."""
        seen: set[Node] = set()
        stack: list[Any] = [node]
        while stack:
            current = stack.pop()
            if current in seen or is_op(current, SIZES | EMPTY):
                continue
            seen.add(current)
            if current.op != "placeholder" and current not in self.carried:
                stack += current.all_input_nodes
        return seen

    def _foreign(self, node: Any) -> str:
        """The integer input without tokens that a value comes from, or an empty string."""
        for root in self._roots(node) if isinstance(node, Node) else ():
            if root not in self.carried and not is_float(root):
                if not any(self.token.search(str(s)) for s in shape(root) or ()):
                    return str(root.target)
        return ""

    def _behind(self, index: Node) -> bool:
        """Whether constant places count from the end."""
        source = strip(index, VIEWS)
        if source.op == "get_attr":
            tensor = attribute(self.gm, str(source.target))
            known = isinstance(tensor, Tensor) and not tensor.is_meta and tensor.numel() > 0
            return known and not tensor.is_floating_point() and int(tensor.max()) < 0
        fill = named_arguments(source).get("fill_value", 0) if source.op == "call_function" else 0
        return isinstance(fill, int) and fill < 0


def _indexed(node: Node) -> Iterator[tuple[Any, int, Node]]:
    """The tensors that a call indexes: which, along which axis and by what."""
    if is_op(node, _BY_LIST):
        for axis, index in enumerate(node.args[1]):  # pyright: ignore[reportArgumentType]
            if isinstance(index, Node):
                if _boolean(index):
                    return
                yield node.args[0], axis, index
    elif is_op(node, _BY_AXIS):
        axis, index = node.args[1:3]
        if isinstance(axis, int) and isinstance(index, Node):
            yield node.args[0], axis, index
    elif is_op(node, EMBEDDING) and isinstance(node.args[1], Node):
        yield node.args[0], 0, node.args[1]


def _sources(node: Node) -> list[Node]:
    return [] if is_op(node, SIZES) else list(node.all_input_nodes)


def _boolean(node: Node) -> bool:
    val = value(node)
    return isinstance(val, Tensor) and str(val.dtype) == "torch.bool"


def _range(index: Node) -> bool:
    """Whether an index is 0, 1, ... in order."""
    source = strip(index, VIEWS - overloads("flip", "roll", "rot90", "repeat_interleave"))
    arguments = named_arguments(source) if is_op(source, overloads("arange")) else {"start": 1}
    return not arguments.get("start") and arguments.get("step", 1) == 1


def _flat(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]  # pyright: ignore[reportUnknownArgumentType]
