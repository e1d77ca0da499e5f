"""Modules that give a captured graph its train/eval switch back.

`torch.export` bakes the training flag into dropout, attention dropout and batch norm. Capture
runs in training mode (so that every probability is known) and `restore_modes` replaces those
nodes by modules that read `self.training`, bit-equal to eager in both modes. `follow_modes` sets
each to the mode of the model's module that it came from; `train` and `eval` mean what they mean to
the model, a `train` of the model's own included.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..errors import CaptureError
from .aten import ATEN, DROPOUTS, SDPA, is_op, overloads, submodule

MODES = "peftfx_modes"
"""Name below which a captured module holds its mode modules."""


class Switch(nn.Module):
    """Computes one thing in training and another in evaluation.

    Attributes:
        steady: the mode in which the model's own `train` and `eval` leave it; None follows them.
    """

    steady: bool | None = None

    def train(self, mode: bool = True) -> Self:
        return super().train(mode if self.steady is None else self.steady)


class Dropout(Switch, nn.Dropout):
    """Dropout, active in training only."""


class Attention(Switch):
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
        if not query.dtype == key.dtype == value.dtype:
            dtypes = ", ".join(str(t.dtype)[6:] for t in (query, key, value))
            raise RuntimeError(f"query, key and value differ in dtype: {dtypes}")
        return query.new_empty((*query.shape[:-1], value.shape[-1]))

    def extra_repr(self) -> str:
        return f"p={self.dropout}"


class BatchNorm(Switch):
    """Batch norm that updates its running statistics in training only."""

    updates_state = (3, 4)

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


class Counter(Switch):
    """Counts the batches seen in training (batch norm's `num_batches_tracked`)."""

    updates_state = (0,)

    def forward(self, count: Tensor, step: int = 1) -> Tensor:
        if self.training:
            count.add_(step)
        return count


class AlphaDropout(Switch):
    """Alpha dropout (SELU networks), active in training only."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.alpha_dropout(x, self.p, self.training)


class TrainingOnly(Switch):
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


class Update(Switch):
    """Writes a buffer in training only (moving averages)."""

    updates_state = (0,)

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
        return "dropout", AlphaDropout(p) if alpha else Dropout(p), (node.args[0],), {}
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
        replacement = _replacement(node)
        if replacement is None:
            continue
        kind, module, args, kwargs = replacement
        index = counts.get(kind, 0)
        counts[kind] = index + 1
        path = f"{MODES}.{kind}_{index}"
        gm.add_submodule(path, module)
        with gm.graph.inserting_before(node):
            new = gm.graph.create_node("call_module", path, args, kwargs, name=f"{kind}_{index}")
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def follow_modes(gm: GraphModule, model: nn.Module) -> bool:
    """Sets every switch to the mode of the module of `model` that it came from.

    Returns:
        Whether some modules are in another mode than the model as a whole.

    Raises:
        CaptureError: the model has a `train` of its own, and it cannot be told what that does.
    """
    gm.train(model.training)
    modes = {path: module.training for path, module in model.named_modules(remove_duplicate=False)}
    steady = _steady(model)
    for switch, path in _switches(gm, ""):
        switch.training = modes.get(path, model.training)
        switch.steady = steady.get(path)
    return any(mode != model.training for mode in modes.values())


def _switches(gm: GraphModule, around: str) -> Iterator[tuple[Switch, str]]:
    """Every switch, those inside of training-only regions too, with the path of its module."""
    for node in gm.graph.nodes:
        switch = submodule(gm, node)
        if isinstance(switch, Switch):
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            path = str(stack[-1][0]) if stack else around
            yield switch, path
            if isinstance(switch, TrainingOnly) and switch.region is not None:
                yield from _switches(switch.region, path)


def _steady(model: nn.Module) -> Mapping[str, bool]:
    """Modules that stay in one mode whatever `model.train(mode)` is told, with that mode.

    Asked of a copy without storage; only of a model with a `train` of its own (the usual way to
    keep batch norm frozen).
    """
    modules = list(model.modules())
    if not any(type(m).train is not nn.Module.train or "train" in vars(m) for m in modules):
        return {}
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        hollow = tensor.detach().to("meta")
        own = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(hollow, tensor.requires_grad) if own else hollow
    try:
        shadow = copy.deepcopy(model, memo)
        after = [_modes_after(shadow, mode) for mode in (True, False)]
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} has a train() of its own, and a copy of the model could not "
            f"be asked what it does ({type(error).__name__}: {error}). Set modes with train() and "
            "eval() of single modules instead."
        ) from error
    return {path: mode for path, mode in after[0].items() if after[1][path] == mode}


def _modes_after(model: nn.Module, mode: bool) -> dict[str, bool]:
    model.train(mode)
    return {path: module.training for path, module in model.named_modules(remove_duplicate=False)}
