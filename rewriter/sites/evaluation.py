"""What the path does not show, found by evaluating a little of the graph.

Slices, rotary halves and head-interleaved layouts make it unreadable which features of a fused
projection reach the query; the gradient is not: a feature belongs to the query exactly if the
query changes with it. Likewise a mask is causal exactly if no query attends to a later key.

Nothing is run but what lies between the value in question and the nearest linears, which are
replaced by random values of their shape. So a probe needs no weights (a model on the meta device
works too) and costs little.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only

from ..graph.aten import SDPA, attribute, value
from ..graph.modes import Attention

Size = int | torch.SymInt


class Probe:
    """Evaluates values of one graph on small stand-ins for its inputs.

    Args:
        gm: the graph.
        sample: example inputs.
        leaves: the nodes that random values stand for (linears, convolutions).
        writers: the in-place operations on each node that is written to.
    """

    def __init__(
        self,
        gm: GraphModule,
        sample: Mapping[str, Tensor],
        leaves: Iterable[Node],
        writers: Mapping[Node, Sequence[Node]],
    ) -> None:
        self.gm, self.sample, self.writers = gm, sample, writers
        self.leaves = set(leaves)
        self.generator = torch.Generator().manual_seed(0)
        self.sources: dict[Node, Tensor] = {}
        self.known: dict[Node, Any] = {}
        self.read: set[str] = set()
        """Names of the inputs and stored tensors whose values were looked at."""

    def features(self, linear: Node, operand: Node, axis: int = -1) -> tuple[int, ...]:
        """The features of a linear's output (its `axis`) that `operand` depends on, ascending."""
        with torch.enable_grad():
            target = self.value(operand)
            if not target.requires_grad or linear not in self.sources:
                return ()
            weights = torch.linspace(0.5, 1.5, target.numel()).view(target.shape).to(target)
            grads = torch.autograd.grad(
                (target * weights).sum(), [self.sources[linear]],
                retain_graph=True, materialize_grads=True,
            )  # fmt: skip
        touched = grads[0].movedim(axis, 0).flatten(1).abs().sum(1) > 0
        return tuple(int(i) for i in touched.nonzero().flatten())

    def causal(self, attention: Node, scores: Node | None) -> bool:
        """Whether no query sees a later key, all scores being equal.

        Args:
            attention: a fused attention, or the weights of the values.
            scores: the product of queries and keys, None if fused.
        """
        if scores is None:
            weights = self._fused_weights(attention)
        else:
            with torch.no_grad():
                like = value(scores)
                zeros = torch.zeros(_sizes(like), dtype=like.dtype, device=_device(like.device))
                self.known[scores] = zeros
                weights = self.value(attention)
        if weights is None or weights.dim() < 2:
            return False
        tokens, keys = weights.shape[-2:]
        if tokens != keys or tokens < 2:
            return False
        seen = weights.detach().reshape(-1, tokens, keys) > 0
        own = seen.diagonal(dim1=-2, dim2=-1)  # padding sees nothing, not even itself
        pairs = (own[:, :, None] & own[:, None, :]).triu(1)
        return bool(pairs.any()) and not bool((seen & pairs).any())

    def _fused_weights(self, attention: Node) -> Tensor | None:
        mask = attention.args[3] if len(attention.args) > 3 else None
        if len(attention.args) > 4 and attention.args[4]:
            return torch.ones(2, 2).tril()
        if not isinstance(mask, Node):
            return None
        with torch.no_grad():
            seen = self.value(mask)
        if seen.dtype == torch.bool:
            return seen.float()
        return seen.float().softmax(-1)

    def value(self, node: Node) -> Any:
        """The value of a node; whatever it needs is evaluated and kept."""
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self.known:
                stack.pop()
                continue
            missing = [n for n in self._needs(current) if n not in self.known]
            if missing:
                stack.extend(missing)
                continue
            self.known[current] = self._compute(current)
            stack.pop()
            for writer in self.writers.get(current, ()):
                self.value(writer)
        return self.known[node]

    def _needs(self, node: Node) -> list[Node]:
        return [] if node in self.leaves else node.all_input_nodes

    def _compute(self, node: Node) -> Any:
        if node in self.leaves:
            return self._leaf(node)
        if node.op in ("placeholder", "get_attr"):
            self.read.add(str(node.target))
        if node.op == "placeholder":
            return _resized(self.sample[str(node.target)], _sizes(value(node)))
        if node.op == "get_attr":
            tensor = attribute(self.gm, str(node.target))
            if isinstance(tensor, Tensor):
                return (
                    torch.ones(tensor.shape, dtype=tensor.dtype)
                    if tensor.is_meta
                    else tensor.detach()
                )
            return tensor
        loaded: Any = map_arg((node.args, node.kwargs), lambda n: self.known[n])
        args, kwargs = tree_map_only(torch.device, _device, loaded)
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            if isinstance(module, Attention):
                return SDPA(*args[:3], *args[3:4], 0.0, *args[4:], **kwargs)
            training = module.training
            try:
                return module.eval()(*args, **kwargs)
            finally:
                module.train(training)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    def _leaf(self, node: Node) -> Tensor:
        like = value(node)
        source = torch.rand(_sizes(like), generator=self.generator) + 0.1
        source = source.to(device=_device(like.device), dtype=like.dtype)
        self.sources[node] = source.requires_grad_()
        return source * 1.0  # may be written to in place


def _device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device


def _sizes(val: Tensor) -> list[int]:
    return [_hint(s) for s in val.shape]


def _hint(size: Size) -> int:
    """The example size behind a symbolic one; 2 where it depends on data."""
    if isinstance(size, int):
        return size
    hint = getattr(size.node, "hint", None)
    return int(hint) if hint is not None else 2


def _resized(tensor: Tensor, sizes: list[int]) -> Tensor:
    """`tensor` repeated or cut to `sizes`; ones where it has no values."""
    if tensor.is_meta:
        return torch.ones(sizes, dtype=tensor.dtype)
    for axis, size in enumerate(sizes):
        if tensor.shape[axis] != size:
            index = torch.arange(size, device=tensor.device) % tensor.shape[axis]
            tensor = tensor.index_select(axis, index)
    return tensor
