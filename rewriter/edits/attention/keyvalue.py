"""Edits for rows before the keys and values of an attention.

Everything that follows from more keys (masks, causality, biases of scores) is settled here, once,
so that a method only says what its rows are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ...errors import PassError
from ...graph.aten import (
    ADDS,
    ATEN,
    MATMULS,
    SOFTMAX,
    ancestors,
    inputs,
    is_float,
    is_op,
    operands,
    outdate,
    overloads,
    shape,
    submodule,
    users,
)  # fmt: skip
from ...graph.modes import Attention
from ..calls.attach import Attaching
from ..calls.call import branch_call, move_before

_FILLS = overloads("masked_fill", "masked_fill_")
_WHERE = overloads("where")


class WidenMask(nn.Module):
    """Lets every query see `length` more keys on the left: `[..., T] -> [..., length + T]`."""

    keeps_axes = True

    def __init__(self, length: int, fill: float) -> None:
        super().__init__()
        self.length, self.fill = length, fill

    def forward(self, mask: Tensor) -> Tensor:
        left = torch.full_like(mask[..., :1], self.fill).expand(*mask.shape[:-1], self.length)
        return torch.cat([left, mask], dim=-1)

    def extra_repr(self) -> str:
        return f"length={self.length}"


class CausalMask(nn.Module):
    """The mask that `is_causal` stood for, `[S, length + T]`, with the first keys always seen."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        size = (query.shape[-2], key.shape[-2])
        mask = torch.ones(size, dtype=torch.bool, device=query.device).tril()
        left = torch.ones_like(mask[:, :1]).expand(-1, self.length)
        return torch.cat([left, mask], dim=-1)

    def extra_repr(self) -> str:
        return f"length={self.length}"


def gated_columns(x: Tensor, gate: Tensor, length: int, behind: int) -> Tensor:
    """Scores or weights `[..., S, T]` whose `length` columns in front of the last `behind` are
    scaled by a gate of their query, `[batch, S, 1]`; axis 0 is the batch, maybe with heads."""
    heads = gate[:, None] if x.dim() == 4 else gate.repeat_interleave(len(x) // len(gate), 0)
    start = x.shape[-1] - behind - length
    own = x[..., start : start + length] * heads.to(x.dtype)
    return torch.cat([x[..., :start], own, x[..., start + length :]], dim=-1)


class GateColumns(nn.Module):
    """See `gated_columns`; `keys` is what the columns behind are of, tokens on its last axis."""

    keeps_axes = pointwise = True

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, x: Tensor, *, gate: Tensor, keys: Tensor) -> Tensor:
        return gated_columns(x, gate, self.length, keys.shape[-1])


class GatedAttention(Attention):
    """Fused attention with rows in front of keys and values that each query gates."""

    def __init__(self, dropout: float, length: int) -> None:
        super().__init__(dropout)
        self.length = length

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        gate: Tensor,
        keys: Tensor,
    ) -> Tensor:
        """The mask stands for causality, too, as where rows are prepended."""
        del is_causal
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = (query @ key.mT).float() * factor
        scores = gated_columns(scores, gate, self.length, keys.shape[-2])
        if mask is not None:
            added = mask.is_floating_point()
            scores = scores + mask if added else scores.masked_fill(~mask, float("-inf"))
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        return gated_columns(weights, gate, self.length, keys.shape[-2]).to(value.dtype) @ value

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, length={self.length}"


def add_call(gm: GraphModule, kind: str, module: nn.Module, args: tuple[Any, ...]) -> Node:
    """A new call of `module`, registered as `soft.<kind>_<number>`, at the insertion point."""
    path = _registered(gm, kind, module)
    return gm.graph.create_node("call_module", path, args, {}, name=path.replace(".", "_"))


def _registered(gm: GraphModule, kind: str, module: nn.Module) -> str:
    index = 0
    soft = gm._modules.get("soft")
    while soft is not None and f"{kind}_{index}" in soft._modules:
        index += 1
    path = f"soft.{kind}_{index}"
    gm.add_submodule(path, module)
    return path


def _widened(gm: GraphModule, mask: Node, length: int, fill: float) -> Node:
    size = shape(mask)
    if size is None or (isinstance(size[-1], int) and size[-1] == 1):
        return mask
    for user in mask.users:
        module = submodule(gm, user)
        if isinstance(module, WidenMask) and (module.length, module.fill) == (length, fill):
            return user
    with gm.graph.inserting_after(mask):
        return add_call(gm, "widen_mask", WidenMask(length, fill), (mask,))


@dataclass(frozen=True)
class _Operands:
    """One attention's keys and values, and the call and argument that read the keys.

    Keys of unfused attentions are `[..., dim, tokens]`, all others `[..., tokens, dim]`.
    """

    product: Node
    index: int
    key: Node
    value: Node
    fused: bool


def core_operands(gm: GraphModule, core: Node) -> _Operands:
    fused = isinstance(submodule(gm, core), Attention)
    product = core if fused else _scores(core)
    if product is None:
        raise PassError(f"the scores of the attention at {core.name} cannot be found.")
    index = 2 if is_op(product, ATEN.baddbmm.default) else 1
    key: Any = operands(product)[index]
    value_node: Any = operands(core)[2 if fused else 1]
    if not isinstance(key, Node) or not isinstance(value_node, Node):
        raise PassError(f"the attention at {core.name} has no key or value tensor.")
    return _Operands(product, index, key, value_node, fused)


def key_value_widths(gm: GraphModule, core: Node) -> tuple[int, int]:
    """Width of one head's keys and of its values; they differ in latent attention."""
    attention = core_operands(gm, core)
    key, value_shape = shape(attention.key), shape(attention.value)
    if key is None or value_shape is None:
        raise PassError(f"the attention at {core.name} has no recorded shapes.")
    return int(key[-1 if attention.fused else -2]), int(value_shape[-1])


def prepend_key_value(
    gm: GraphModule, core: Node, path: str, length: int, reads: Mapping[str, Node]
) -> None:
    """Feeds keys and values of one attention through the branch at `path`."""
    attention = core_operands(gm, core)
    product, graph = attention.product, gm.graph
    if not attention.fused:
        _change_masks(product, core, lambda mask, fill: _widened(gm, mask, length, fill))
    with graph.inserting_before(product):
        if not attention.fused:
            move_before(attention.value, product)
        both = branch_call(gm, path, (attention.key, attention.value, not attention.fused), reads)
        new_key, new_value = (
            graph.create_node(
                "call_function", operator.getitem, (both, i), {}, name=f"{both.name}_{n}"
            )
            for i, n in enumerate(("key", "value"))
        )
        if attention.fused:
            below: Any = operands(core)
            mask = below[3] if len(below) > 3 else None
            if len(below) > 4 and below[4]:
                mask = add_call(gm, "causal_mask", CausalMask(length), (below[0], attention.key))
            elif isinstance(mask, Node):
                mask = _widened(gm, mask, length, 1.0 if not is_float(mask) else 0.0)
            core.args = (below[0], new_key, new_value, mask, False)
    if not attention.fused:
        product.update_arg(attention.index, new_key)
        core.update_arg(1, new_value)
    if "gates" in reads and getattr(gm.get_submodule(path), "by_query", False):
        _gate_columns(gm, core, attention, length, reads["gates"])


def gated_by_query(gm: GraphModule, core: Node) -> bool:
    """Whether an attention has rows already that each query gates."""
    attention = core_operands(gm, core)
    return isinstance(submodule(gm, core), GatedAttention) or any(
        isinstance(submodule(gm, user), GateColumns) for user in attention.product.users
    )


def _gate_columns(
    gm: GraphModule, core: Node, attention: _Operands, length: int, gate: Node
) -> None:
    """Has an attention scale the columns in front of its former keys for each query."""
    reads = {"gate": gate, "keys": attention.key}
    if attention.fused:
        old: Any = submodule(gm, core)
        new = GatedAttention(old.dropout, length)
        new.training, new.steady = old.training, old.steady
        core.target = _registered(gm, "gated_attention", new)
        for keyword, read in reads.items():
            core.update_kwarg(keyword, read)
        return
    weights = inputs(core)[0]
    for value, place in ((attention.product, users(attention.product)), (weights, [core])):
        with gm.graph.inserting_before(core if value is weights else place[0]):
            call = add_call(gm, "gate_columns", GateColumns(length), (value,))
        for keyword, read in reads.items():
            call.update_kwarg(keyword, read)
        for user in place:
            user.replace_input_with(value, call)


def _scores(core: Node) -> Node | None:
    """The query-key product above an unfused attention's weighted sum."""
    seen: set[Node] = set()
    stack = [core.args[0]]
    softmax = False
    while stack:
        node = stack.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        softmax = softmax or is_op(node, SOFTMAX)
        if softmax and is_op(node, MATMULS):
            return node
        stack.extend(inputs(node)[:1] if not is_op(node, _WHERE) else inputs(node)[1:])
    return None


def _change_masks(product: Node, core: Node, change: Callable[[Node, float], Node]) -> None:
    """Changes everything that meets the scores between the product and the softmax; what is given
    to `change` beside it is what leaves a score as it is."""
    above = set(ancestors(core, block=lambda n: n is product))
    current = product
    bias = product.args[0]
    if is_op(product, ATEN.baddbmm.default) and isinstance(bias, Node):
        product.update_arg(0, change(bias, 0.0))
    while not is_op(current, SOFTMAX):
        following = next((u for u in users(current) if u in above), None)
        if following is None:
            return
        for index, other in enumerate(following.args):
            if not isinstance(other, Node) or other is current:
                continue
            if is_op(following, ADDS) or is_op(following, _FILLS):
                fill = 0.0
            elif is_op(following, _WHERE) and index == 0:
                fill = 1.0 if following.args[1] is current else 0.0
            else:
                continue
            following.update_arg(index, change(other, fill))
        current = following


def remove_rows(edit: Attaching, path: str, length: int) -> None:
    """Takes the rows of a branch out, and the branch."""
    attachment = next(a for a in edit.program.attachments if a.path == path)
    core = edit.node(edit.program.sites[attachment.site].nodes[0])
    _remove_key_value(edit.graph_module, core, path, length)
    edit.program.attachments = tuple(a for a in edit.program.attachments if a is not attachment)
    edit.graph_module.delete_submodule(path)


def _remove_key_value(gm: GraphModule, core: Node, path: str, length: int) -> None:
    """Undoes `prepend_key_value`: takes the call of `path` out, and its keys out of the masks."""
    if gated_by_query(gm, core):
        raise PassError(
            f"the attention at {core.name} has rows that each query gates, and no others can be "
            "taken out. Leave the adapter out: program.without(name)."
        )
    attention = core_operands(gm, core)
    both = next(n for n in gm.graph.nodes if n.op == "call_module" and n.target == path)

    def narrowed(mask: Node, _: float) -> Node:
        module = submodule(gm, mask)
        widened = isinstance(module, WidenMask) and module.length == length
        return inputs(mask)[0] if widened else mask

    if attention.fused:
        query, key, value, mask, causal = operands(core)
        if isinstance(submodule(gm, mask), CausalMask):
            mask, causal = None, True
        elif isinstance(mask, Node):
            mask = narrowed(mask, 0.0)
        core.args = (query, key, value, mask, causal)
    else:
        _change_masks(attention.product, core, narrowed)
    for entry in users(both):
        entry.replace_all_uses_with(operands(both)[int(operands(entry)[1])])
        gm.graph.erase_node(entry)
    gm.graph.erase_node(both)
    outdate(attention.product)
    outdate(core)
