"""Modules that give a captured graph its train/eval switch back.

`torch.export` bakes the training flag into dropout, attention dropout and batch norm. Capture
runs in training mode (so that every probability is known) and `restore_modes` replaces those
nodes by modules that read `self.training`, bit-equal to eager in both modes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..aten import ATEN, DROPOUTS, SDPA, is_op, overloads

MODES = "peftfx_modes"
"""Name below which a captured module holds its mode modules."""


class Attention(nn.Module):
    """Scaled dot product attention whose dropout acts in training only."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        p = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(
            query, key, value, mask, p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    def abstract(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The result's shape and dtype; the operator itself would fix dynamic sizes."""
        del key
        return query.new_empty((*query.shape[:-1], value.shape[-1]))

    def extra_repr(self) -> str:
        return f"p={self.dropout}"


class BatchNorm(nn.Module):
    """Batch norm that updates its running statistics in training only."""

    updates_state = True

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
    ) -> Tensor:
        training = self.training or mean is None
        return F.batch_norm(x, mean, variance, weight, bias, training, self.momentum, self.eps)

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, eps={self.eps}"


class Counter(nn.Module):
    """Counts the batches seen in training (batch norm's `num_batches_tracked`)."""

    updates_state = True

    def forward(self, count: Tensor, step: int = 1) -> Tensor:
        if self.training:
            count.add_(step)
        return count


class AlphaDropout(nn.Module):
    """Alpha dropout (SELU networks), active in training only."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.alpha_dropout(x, self.p, self.training)


class TrainingOnly(nn.Module):
    """A region that acts in training only, such as stochastic depth: a dropout of its own kind.

    Its first input is the value in evaluation; the others are what the region reads, or, without
    a region of its own, the one value in training.
    """

    def __init__(self, region: GraphModule | None) -> None:
        super().__init__()
        self.region = region

    def forward(self, evaluated: Tensor, *operands: Tensor) -> Tensor:
        if not self.training:
            return evaluated
        return operands[0] if self.region is None else self.region(*operands)


class Update(nn.Module):
    """Writes a buffer in training only (moving averages)."""

    updates_state = True

    def forward(self, state: Tensor, fresh: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                state.copy_(fresh)
        return state


_COUNTS = overloads("add_")
_BATCH_NORM = frozenset({ATEN.batch_norm.default})


def _sdpa_arguments(node: Node) -> tuple[float, tuple[Any, ...], dict[str, Any]]:
    args: list[Any] = list(node.args)
    kwargs: dict[str, Any] = dict(node.kwargs)
    p = args.pop(4) if len(args) > 4 else kwargs.pop("dropout_p", 0.0)
    mask = args.pop(3) if len(args) > 3 else kwargs.pop("attn_mask", None)
    causal = args.pop(3) if len(args) > 3 else kwargs.pop("is_causal", False)
    return float(p or 0.0), (*args[:3], mask, causal), kwargs


def _replacement(node: Node) -> tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]] | None:
    if is_op(node, SDPA):
        p, args, kwargs = _sdpa_arguments(node)
        return "attention", Attention(p), args, kwargs
    if is_op(node, DROPOUTS):
        p = float(node.args[1])  # pyright: ignore[reportArgumentType]
        alpha = "alpha" in str(node.target)
        return "dropout", AlphaDropout(p) if alpha else nn.Dropout(p), (node.args[0],), {}
    if is_op(node, _BATCH_NORM):
        momentum, eps = float(node.args[6]), float(node.args[7])  # pyright: ignore[reportArgumentType]
        return "batch_norm", BatchNorm(momentum, eps), node.args[:5], {}
    if is_op(node, _COUNTS) and isinstance(node.args[0], Node):
        source = node.args[0]
        if source.op == "get_attr" and isinstance(node.args[1], int) and not node.users:
            return "counter", Counter(), node.args[:2], {}
    return None


def restore_modes(gm: GraphModule) -> None:
    """Replaces every node with a baked training flag by a module that follows `.training`."""
    counts: dict[str, int] = {}
    for node in list(gm.graph.nodes):
        found = _replacement(node)
        if found is None:
            continue
        kind, module, args, kwargs = found
        index = counts.get(kind, 0)
        counts[kind] = index + 1
        path = f"{MODES}.{kind}_{index}"
        gm.add_submodule(path, module)
        with gm.graph.inserting_before(node):
            new = gm.graph.create_node("call_module", path, args, kwargs, name=f"{kind}_{index}")
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
