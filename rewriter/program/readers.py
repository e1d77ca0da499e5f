"""Who reads a stored tensor. Another name is not another use: only the graph tells.

A tensor may be changed for the calls that read it in the same way, whatever its names are, and
for nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import Node

from ..graph.aten import (
    CASTS,
    SLICES,
    VIEWS,
    expressed,
    expression_of,
    is_op,
    overloads,
    shape,
    source_line,
    users,
)
from ..graph.sharded import is_sharded
from ..graph.stored_call import Unpacked

if TYPE_CHECKING:
    from .state import State

_AS_IT_IS = CASTS | overloads(
    "contiguous", "clone", "alias", "detach", "lift_fresh_copy", "unsqueeze", "expand",
    "expand_as", "broadcast_to",
)  # fmt: skip
_TURNS = overloads("t", "mT", "numpy_T")
_SWAPS = overloads("transpose", "swapaxes")
_SAME_ROWS = overloads("view", "reshape", "_unsafe_view", "squeeze", "flatten", "unflatten")


@dataclass(frozen=True)
class Reader:
    """A node that computes with a stored tensor.

    Attributes:
        node: neither a view nor an expression of it, nor the dense value of a part.
        through: the views, slices, values and expressions between the stored tensor and the node.
    """

    node: Node
    through: tuple[Node, ...]

    def __str__(self) -> str:
        module = module_of(self.node)
        place = f"in {module}" if module else source_line(self.node)
        return f"{self.node.name} ({place})" if place else self.node.name


def module_of(node: Node) -> str:
    """The path of the module that a node was traced in, by the name that the model called it by."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


class Readers:
    """The readers of stored tensors in the graph of a program, which may be edited meanwhile.

    Names of overlapping memory are one tensor, as far as the program can see that.
    """

    def __init__(self, program: State) -> None:
        self.program = program
        self._first = _first_names(program)
        self.refresh()

    def refresh(self) -> None:
        """Looks for stored tensors again, once the graph reads others."""
        self._stored: dict[str, list[Node]] = {}
        for node in self.program.module.graph.nodes:
            if node.op == "get_attr":
                self._stored.setdefault(self._named(str(node.target)), []).append(node)

    def of(self, name: str) -> list[Reader]:
        """Who reads a stored tensor, by any of its names, in graph order."""
        return [r for node in self._stored.get(self._named(name), ()) for r in _below(node)]

    def others(self, name: str, calls: Collection[Node]) -> list[Reader]:
        """Who reads a stored tensor beside the given calls and what is composed around them."""
        keys = {call.meta.get("call") or call.name for call in calls}
        return [
            reader
            for reader in self.of(name)
            if reader.node not in calls and reader.node.meta.get("composed") not in keys
        ]

    def overlapping(self, name: str) -> list[str]:
        """Other captured tensors, no other names of this one, that share memory with it."""
        aliases = self.program.aliases
        if name in self.program.untied:
            return []
        own = aliases.get(name, name)
        return [
            other
            for other in self.program.base.base_tensors()
            if aliases.get(other, other) != own and self._named(other) == self._named(own)
        ]

    def _named(self, name: str) -> str:
        """The name that stands for a stored tensor."""
        own = self.program.tensors.stored(name)
        return self._first.get(own, own)


def _below(stored: Node) -> list[Reader]:
    below: list[Reader] = []
    stack: list[tuple[Node, tuple[Node, ...]]] = [(stored, ())]
    while stack:
        node, through = stack.pop()
        values = expressed(node)
        stack += [(value, (*through, value)) for value in values]
        for user in users(node):
            if is_op(user, VIEWS) or is_op(user, SLICES) or Unpacked.of(user) is not None:
                stack.append((user, (*through, user)))
            elif user not in values and "expressions" not in user.meta:
                below.append(Reader(user, through))
    return below


def _first_names(program: State) -> dict[str, str]:
    """Name -> the name that stands for it, for captured tensors that overlap in memory."""
    spans: list[tuple[int, int, str]] = []
    for name, tensor in program.base.base_tensors().items():
        if not tensor.is_meta and tensor.numel() and not is_sharded(tensor):
            start = tensor.data_ptr()
            spans.append((start, start + _reach(tensor), name))
    first: dict[str, str] = {}
    end, head = 0, ""
    for start, stop, name in sorted(spans):
        if start < end:
            first[name] = head
        else:
            head = name
        end = max(end, stop)
    return first


def _reach(tensor: Tensor) -> int:
    """Bytes from the first to behind the last element."""
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


def turned(through: Sequence[Node], place: int = 0) -> bool | None:
    """Whether a matrix arrives transposed behind views; None if its elements are rearranged.

    Args:
        place: of a stack of matrices the axis along which they lie; they arrive along the first.
    """
    if place:
        return _turned_stack(through, place)
    turn = False
    for node in through:
        before, after = shape(node.args[0]) or (), shape(node) or ()
        if is_op(node, _AS_IT_IS) or expression_of(node) is not None:
            continue
        if is_op(node, _SAME_ROWS) and tuple(before[-2:]) == tuple(after[-2:]):
            continue
        if is_op(node, _TURNS):
            turn = not turn
            continue
        order = _order(node, len(before))
        if order is None or set(order[-2:]) != {len(order) - 2, len(order) - 1}:
            return None
        turn ^= order[-1] == len(order) - 2
    return turn


def _turned_stack(through: Sequence[Node], place: int) -> bool | None:
    axes: tuple[int, ...] = (0, 1, 2)
    for node in through:
        if is_op(node, CASTS) or expression_of(node) is not None:
            continue
        order = (0, 2, 1) if is_op(node, _TURNS) else _order(node, 3)
        if order is None:
            return None
        axes = tuple(axes[k] for k in order)
    first, second = (k for k in range(3) if k != place)
    if axes == (place, second, first):
        return True
    return False if axes == (place, first, second) else None


def _order(node: Node, count: int) -> tuple[int, ...] | None:
    """The order in which a view puts axes; None if it does something else."""
    if is_op(node, _SWAPS):
        order = list(range(count))
        one, two = (int(str(a)) % count for a in node.args[1:3])
        order[one], order[two] = order[two], order[one]
        return tuple(order)
    if is_op(node, overloads("permute")) and isinstance(node.args[1], list | tuple):
        return tuple(int(str(a)) % count for a in node.args[1])
    return None
