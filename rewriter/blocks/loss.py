"""The cross entropy of a linear's outputs with its gradient in one go.

Apart, the loss keeps the log-probabilities of all tokens for its backward pass, which makes two
more tensors of their size. The gradient of the mean is known as soon as the loss is: it is computed
here some rows at a time and multiplied by the weight at once, so that what is kept is as large as
the hidden states (as the fused loss of Liger Kernel, Hsu et al. 2024, arXiv:2410.10989).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.fx import Graph, Node

from ..graph.aten import ATEN, CASTS, LINEAR, is_op, overloads, value

_ROWS, _NUMBERS = 128, 1 << 23
"""A piece has so many rows, or as many as have so many logits."""

_FLAT = CASTS | overloads("view", "reshape", "_unsafe_view", "flatten", "contiguous")
_MEAN, _SUM = 1, 2


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, whole: bool,
    reduction: int = _MEAN, ignored: int = -100,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The cross entropy of `linear(x, weight, bias)`, in at least float32, and that.

    Args:
        x: `[..., in]`; weight: `[vocabulary, in]`; bias: `[vocabulary]` or None.
        target: int64, one for each row of x; rows that are `ignored` do not count.
        whole: whether the logits are wanted; if not, they are empty and never exist as one tensor.
        reduction: 1 for the mean, 2 for the sum.
    """
    if torch.compiler.is_compiling():  # which does so itself
        logits = F.linear(x, weight, bias)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
        word = "mean" if reduction == _MEAN else "sum"
        loss = F.cross_entropy(wide, target.flatten(), reduction=word, ignore_index=ignored)
        return loss, logits
    learning = torch.is_grad_enabled()
    needs = [learning and t is not None and t.requires_grad for t in (x, weight, bias)]
    results: Any = _Loss.apply(x, weight, bias, target, whole, reduction, ignored, needs)
    return results


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, whole: bool,
        reduction: int, ignored: int, needs: Sequence[bool],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows, target = x.reshape(-1, x.shape[-1]), target.reshape(-1)
        counted = target != ignored
        logits = F.linear(rows, weight, bias) if whole else None
        dtype = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), device=x.device, dtype=dtype)
        share = 1 / counted.sum().to(dtype) if reduction == _MEAN else torch.ones_like(total)
        made: list[Tensor] = []
        d_weight = torch.zeros_like(weight) if needs[1] else None
        d_bias = torch.zeros_like(weight[:, 0]) if needs[2] else None
        step = max(_ROWS, _NUMBERS // len(weight))
        for first in range(0, len(rows), step):
            piece = slice(first, first + step)
            part = F.linear(rows[piece], weight, bias) if logits is None else logits[piece]
            logs, on = torch.log_softmax(part.to(dtype), -1), counted[piece, None]
            place = target[piece, None].where(on, 0)
            total = total - logs.gather(-1, place).where(on, 0).sum()
            if not any(needs):
                continue
            d = logs.exp_().scatter_add_(-1, place, logs.new_full((), -1).expand(place.shape))
            d = d.mul_(torch.where(on, share, 0)).to(part.dtype)
            made += [d @ weight.to(d.dtype)] if needs[0] else []
            if d_weight is not None:
                d_weight.addmm_(d.t().to(weight.dtype), rows[piece].to(weight.dtype))
            if d_bias is not None:
                d_bias.add_(d.sum(0))
        d_x = torch.cat(made).view(x.shape).to(x.dtype) if made else None
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.save_for_backward(rows if needs[1] else None, weight, d_x, d_weight, d_bias)
        empty = x.new_empty(0) if logits is None else logits.view(*x.shape[:-1], -1)
        return total * share, empty

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore
        loss, logits = grads
        rows, weight, *made = ctx.saved_tensors
        found = [None if g is None or loss is None else g * loss.to(g.dtype) for g in made]
        if logits is None:
            return (*found, *[None] * 5)
        flat = logits.reshape(-1, logits.shape[-1])
        more = [
            lambda: (flat @ weight.to(flat.dtype)).view(ctx.shape).to(ctx.dtype),
            lambda: (flat.t() @ rows.to(flat.dtype)).to(weight.dtype),
            lambda: flat.sum(0),
        ]
        both = zip(found, more, ctx.needs_input_grad[:3], strict=True)
        added = [(0 if g is None else g) + make() if need else None for g, make, need in both]
        return (*added, *[None] * 5)


def fuse_losses(graph: Graph) -> int:
    """Puts `linear_cross_entropy` in the place of every linear with a loss of its outputs; returns
    how many there are."""
    fused = 0
    for loss in [n for n in graph.nodes if n.target is ATEN.cross_entropy_loss.default]:
        linear, options = _linear(loss), _options(loss)
        if linear is None or options is None:
            continue
        chain = _chain(loss)
        others = {u for n in chain for u in n.users} - {*chain, loss}
        order = {n: i for i, n in enumerate(graph.nodes)}
        if any(order[u] < order[loss] for u in others):
            continue
        x, weight, *bias = (*linear.args, linear.kwargs.get("bias"))[:3]
        target = loss.args[1]
        with graph.inserting_before(loss):
            both = graph.call_function(
                linear_cross_entropy, (x, weight, bias[0], target, bool(others), *options)
            )
            first, second = (graph.call_function(operator.getitem, (both, i)) for i in (0, 1))
        first.meta.update(loss.meta)
        second.meta.update(linear.meta)
        loss.replace_all_uses_with(first)
        graph.erase_node(loss)
        linear.replace_all_uses_with(second)
        _after(graph, second, chain)
        fused += 1
    return fused


def _after(graph: Graph, logits: Node, chain: Sequence[Node]) -> None:
    """Erases what was between the linear and the loss, or moves it behind the fused call where
    others read it."""
    *between, linear = chain  # from the loss to the linear
    for node in between:
        if not node.users:
            graph.erase_node(node)
    for node in reversed([n for n in between if n in graph.nodes]):
        logits.append(node)
        logits = node
    graph.erase_node(linear)


def _chain(loss: Node) -> list[Node]:
    """What the loss reads, up to the first node that is neither a view of all rows nor a cast."""
    found: list[Node] = []
    node: Any = loss.args[0]
    while is_op(node, _FLAT):
        found.append(node)
        node = node.args[0]
    return [*found, node]


def _linear(loss: Node) -> Node | None:
    """The linear whose outputs, one row a target, a loss is of."""
    logits, linear = value(loss.args[0]), _chain(loss)[-1]
    if not is_op(linear, LINEAR) or not isinstance(logits, Tensor) or logits.dim() != 2:
        return None
    wide = value(linear)
    same = isinstance(wide, Tensor) and wide.shape[-1] == logits.shape[-1]
    return linear if same and logits.dtype in (torch.float32, torch.float64) else None


def _options(loss: Node) -> tuple[int, int] | None:
    """(reduction, ignored index), if these are all that the loss has."""
    names = ("input", "target", "weight", "reduction", "ignore_index", "label_smoothing")
    given: dict[str, Any] = dict(zip(names, loss.args, strict=False)) | loss.kwargs
    reduction, ignored = given.get("reduction", _MEAN), given.get("ignore_index", -100)
    plain = given.get("weight") is None and not given.get("label_smoothing")
    known = reduction in (_MEAN, _SUM) and isinstance(ignored, int)
    return (int(reduction), ignored) if plain and known else None
