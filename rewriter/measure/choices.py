"""Integer outputs that two ways of rounding may decide differently: choices among tied scores.

An argmax, a top-k or a comparison of floating-point numbers may go either way where the numbers
differ by no more than rounding. Any other difference of integers is one.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from ..graph.aten import SLICES, TOP, VIEWS, is_op, named_arguments, output_node, overloads
from ..graph.module import CapturedModule

CHOICES = TOP | overloads("argmin", "min")
COMPARISONS = overloads("gt", "lt", "ge", "le")


def tied(
    before: CapturedModule,
    after: CapturedModule,
    index: int,
    given: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    limit: float,
) -> bool:
    """Whether an integer output differs only where the scores that it chose from are tied.

    Args:
        before, after: still modules, see `still`.
        index: which leaf of the outputs.
        given: the inputs of each.
        limit: how far apart tied scores may be, relative to the largest.
    """
    ours, theirs = _choice(before, index), _choice(after, index)
    if ours is None or theirs is None or not _same_choice(ours[0], theirs[0]):
        return False
    with torch.no_grad():
        want, got = _Values(before, given[0]), _Values(after, given[1])
        chosen = got.env[theirs[0]]
        if not _close(want, ours[0], chosen, limit):
            return False
        # What was done to the choice afterwards must be the same, too.
        replayed = want.replay(ours, chosen)
        return torch.equal(replayed, got.leaf(index))


class _Values(Interpreter):
    """All values of a still module for some inputs."""

    def __init__(self, gm: CapturedModule, inputs: Mapping[str, Tensor]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
        self.run(*(inputs[n].clone() for n in names), enable_io_processing=False)

    def leaf(self, index: int) -> Any:
        return self.env[_leaves(self.module)[index]]  # pyright: ignore[reportArgumentType]

    def replay(self, chain: list[Node], value: Any) -> Any:
        """The last value of a chain of nodes if its first had the given one."""
        self.env[chain[0]] = value
        for node in chain[1:]:
            self.env[node] = self.run_node(node)
        return self.env[chain[-1]]

    def argument(self, item: Any) -> Any:
        return self.env[item] if isinstance(item, Node) else item


def _leaves(gm: Any) -> list[Any]:
    return pytree.tree_leaves(output_node(gm).args[0])


def _choice(gm: GraphModule, index: int) -> list[Node] | None:
    """The nodes from a choice to an output; None if the output is no view of one."""
    leaves = _leaves(gm)
    node = leaves[index] if index < len(leaves) else None
    chain: list[Node] = []
    while isinstance(node, Node):
        chain.insert(0, node)
        if is_op(node, CHOICES) or is_op(node, COMPARISONS):
            return chain
        if not (is_op(node, VIEWS) or is_op(node, SLICES)):
            return None
        node = node.args[0]
    return None


def _same_choice(ours: Node, theirs: Node) -> bool:
    def options(node: Node) -> dict[str, Any]:
        given = named_arguments(node)
        return {k: v for k, v in given.items() if not isinstance(v, Node)}

    return ours.target is theirs.target and options(ours) == options(theirs)


def _close(values: _Values, node: Node, chosen: Any, limit: float) -> bool:
    """Whether what was chosen differs from the node's own choice among tied scores only."""
    given = {k: values.argument(v) for k, v in named_arguments(node).items()}
    scores, own = given["self"], values.env[node]
    if not scores.is_floating_point():
        return False
    if is_op(node, COMPARISONS):
        apart = (scores - given["other"]).abs().expand_as(own)[own != chosen]
        largest = max(_top(scores), _top(torch.as_tensor(given["other"])))
        return not apart.numel() or float(apart.max()) <= limit * largest
    mine, other = _indices(own), _indices(chosen)
    if mine.shape != other.shape:
        return False
    dim = given.get("dim", None if is_op(node, overloads("argmax", "argmin")) else -1)
    if dim is None:
        scores, mine, other, dim = scores.flatten(), mine.flatten(), other.flatten(), 0
    elif mine.dim() < scores.dim():
        mine, other = mine.unsqueeze(dim), other.unsqueeze(dim)
    apart = (scores.gather(dim, mine) - scores.gather(dim, other)).abs()[mine != other]
    return not apart.numel() or float(apart.max()) <= limit * _top(scores)


def _indices(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else operator.getitem(result, 1)


def _top(scores: Tensor) -> float:
    finite = scores[torch.isfinite(scores)].abs()
    return float(finite.max()) if finite.numel() else 0.0
