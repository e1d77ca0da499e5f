"""Edits for soft prompts: rows before keys and values, tokens before the input, moved positions.

Everything that follows from a longer sequence (masks, causality, sizes, pooling, labels, outputs)
is settled here, once, so that a method only says what its rows are.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .aten import (
    ADDS,
    ATEN,
    CASTS,
    EMBEDDING,
    MATMULS,
    SOFTMAX,
    VIEWS,
    ancestors,
    inputs,
    is_float,
    is_op,
    operands,
    output_node,
    overloads,
    placeholders,
    reaches,
    shape,
    strip,
    submodule,
    users,
)  # fmt: skip
from .branch import Tokens
from .errors import PassError
from .modes import Attention

if TYPE_CHECKING:
    from .program import Program
    from .sites import EmbeddingSite

_LOSSES = overloads("cross_entropy_loss", "nll_loss", "nll_loss_nd")
_WAVES = overloads("cos", "sin")
_FILLS = overloads("masked_fill", "masked_fill_")
_WHERE = overloads("where")


class WidenMask(nn.Module):
    """Lets every query see `length` more keys on the left: `[..., T] -> [..., length + T]`."""

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


class PadTokens(nn.Module):
    """Adds `length` entries with a fixed value on the left of axis 1."""

    def __init__(self, length: int, fill: float) -> None:
        super().__init__()
        self.length, self.fill = length, fill

    def forward(self, x: Tensor) -> Tensor:
        left = torch.full_like(x[:, :1], self.fill).expand(-1, self.length)
        return torch.cat([left, x], dim=1)

    def extra_repr(self) -> str:
        return f"length={self.length}, fill={self.fill:g}"


class PadPositions(nn.Module):
    """Positions 0..length-1 for the prompt; the given ones move behind it."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, positions: Tensor) -> Tensor:
        own = torch.arange(self.length, dtype=positions.dtype, device=positions.device)
        return torch.cat([own.expand(positions.shape[0], -1), positions + self.length], dim=1)

    def extra_repr(self) -> str:
        return f"length={self.length}"


class StripTokens(nn.Module):
    """Removes the prompt's positions from the given axes."""

    def __init__(self, length: int, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.length, self.axes = length, axes

    def forward(self, x: Tensor) -> Tensor:
        for axis in self.axes:
            x = x.narrow(axis, self.length, x.shape[axis] - self.length)
        return x

    def extra_repr(self) -> str:
        return f"length={self.length}, axes={self.axes}"


def _module(gm: GraphModule, kind: str, module: nn.Module, args: tuple[Any, ...]) -> Node:
    index = 0
    held = getattr(gm, "soft", None)
    while isinstance(held, nn.Module) and hasattr(held, f"{kind}_{index}"):
        index += 1
    path = f"soft.{kind}_{index}"
    gm.add_submodule(path, module)
    return gm.graph.create_node("call_module", path, args, {}, name=path.replace(".", "_"))


def _widened(gm: GraphModule, mask: Node, length: int, fill: float) -> Node:
    size = shape(mask)
    if size is None or (isinstance(size[-1], int) and size[-1] == 1):
        return mask
    for user in mask.users:
        module = submodule(gm, user)
        if isinstance(module, WidenMask) and (module.length, module.fill) == (length, fill):
            return user
    with gm.graph.inserting_after(mask):
        return _module(gm, "widen_mask", WidenMask(length, fill), (mask,))


def prepend_key_value(gm: GraphModule, core: Node, path: str, length: int) -> None:
    """Feeds keys and values of one attention through the branch at `path`."""
    fused = isinstance(submodule(gm, core), Attention)
    product = core if fused else _scores(core)
    if product is None:
        raise PassError(f"the scores of the attention at {core.name} cannot be found.")
    above: Any = operands(product)
    below: Any = operands(core)
    key, value = (below[1], below[2]) if fused else (above[1], below[1])
    if not isinstance(key, Node) or not isinstance(value, Node):
        raise PassError(f"the attention at {core.name} has no key or value tensor.")
    graph = gm.graph
    if not fused:
        _widen_scores(gm, product, core, length)
    place = product if fused else min((product, core), key=list(graph.nodes).index)
    with graph.inserting_before(place):
        if not fused:
            _move_before(gm, value, place)
        name = path.replace(".", "_")
        both = graph.create_node("call_module", path, (key, value, not fused), {}, name=name)
        new_key = graph.create_node(
            "call_function", operator.getitem, (both, 0), {}, name=f"{name}_key"
        )
        new_value = graph.create_node(
            "call_function", operator.getitem, (both, 1), {}, name=f"{name}_value"
        )
        if fused:
            mask = below[3] if len(below) > 3 else None
            causal = bool(below[4]) if len(below) > 4 else False
            if causal:
                mask = _module(gm, "causal_mask", CausalMask(length), (below[0], key))
            elif isinstance(mask, Node):
                mask = _widened(gm, mask, length, 1.0 if not is_float(mask) else 0.0)
            core.args = (below[0], new_key, new_value, mask, False)
    if not fused:
        product.update_arg(1, new_key)
        core.update_arg(1, new_value)


def _move_before(gm: GraphModule, node: Node, place: Node) -> None:
    """Moves a value's computation in front of `place` where it stands behind it."""
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    if order[node] < order[place]:
        return
    late = sorted((n for n in ancestors(node) if order[n] > order[place]), key=order.__getitem__)
    for current in late:
        place.prepend(current)


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


def _widen_scores(gm: GraphModule, product: Node, core: Node, length: int) -> None:
    """Widens everything that meets the scores between the product and the softmax."""
    above = set(ancestors(core, block=lambda n: n is product))
    current = product
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
            following.update_arg(index, _widened(gm, other, length, fill))
        current = following


def shift_positions(program: Program, length: int) -> None:
    """Adds `length` to every absolute position: learnt tables and rotary angles alike."""
    gm = program.module
    targets: list[tuple[Node, int]] = []
    learnt = False
    for site in program.sites:
        if site.kind == "embedding" and site.role == "position":
            node = next(n for n in gm.graph.nodes if n.name == site.nodes[0])
            targets.append((node, 1))
            learnt = True
    seen: set[Node] = set()
    for wave in gm.graph.nodes:
        if not is_op(wave, _WAVES):
            continue
        for node in ancestors(wave, block=lambda n: is_op(n, MATMULS | overloads("outer"))):
            two = [a for a in node.args[:2] if isinstance(a, Node)]
            products = MATMULS | overloads("outer", "mul")
            if node in seen or not is_op(node, products) or len(two) != 2:
                continue
            seen.add(node)
            targets += [(node, i) for i, a in enumerate(two) if _counts(a)]
    if not targets:
        raise PassError("the model has no absolute positions to shift; use shift_positions=false.")
    for node, index in targets:
        position: Any = node.args[index]
        rows = isinstance(position, list | tuple)  # `table[positions]` instead of a lookup
        with gm.graph.inserting_before(node):
            moved = gm.graph.call_function(
                ATEN.add.Tensor, (position[0] if rows else position, length)
            )
        node.update_arg(index, [moved] if rows else moved)
    if learnt:
        program.spec = _shorter(program, length)


def _counts(node: Node) -> bool:
    """Whether a value is a position: cast from a range, a running sum or an integer input."""
    source = strip(node, VIEWS | CASTS | ADDS)
    if source.op == "placeholder":
        return not is_float(source)
    return is_op(source, overloads("arange", "cumsum", "sub"))


def _shorter(program: Program, length: int) -> Any:
    spec = program.spec
    ranges = {
        name: (low, high - length if high is not None and name.startswith("sequence") else high)
        for name, (low, high) in spec.ranges.items()
    }
    if any(high is not None and high < low for low, high in ranges.values()):
        raise PassError(f"a prompt of {length} tokens leaves no position for the input.")
    return replace(spec, ranges=ranges)


def _meaning(program: Program, source: Node, site: EmbeddingSite) -> str:
    """What an input other than the token ids is, from where its values go."""
    gm = program.module

    def stop(node: Node) -> bool:
        return (
            is_op(node, _LOSSES | SOFTMAX | _WAVES | {EMBEDDING})
            or isinstance(submodule(gm, node), Attention)
        )  # fmt: skip

    roles = {s.nodes[0]: s.role for s in program.sites if s.kind == "embedding"}
    for node in reaches(source, stop, block=lambda n: False):
        if is_op(node, _LOSSES):
            return "labels"
        if is_op(node, EMBEDDING):
            return "positions" if roles.get(node.name) == "position" else "types"
        if is_op(node, _WAVES):
            return "positions"
        return "mask"
    raise PassError(
        f"input {source.name!r} has a token axis, but where its values go does not show how a "
        f"prompt continues it. Capture without it, or prepend at another embedding than {site.id}."
    )


def prepend_tokens(
    program: Program, site: EmbeddingSite, embedding: Node, path: str, branch: Tokens
) -> Program:
    """See `Editor.prepend_tokens`; returns the program with its narrower input range."""
    gm, length = program.module, branch.length
    ids = strip(embedding.args[1], VIEWS)  # pyright: ignore[reportArgumentType]
    size = shape(ids)
    if ids.op != "placeholder" or size is None or len(size) != 2:
        raise PassError(f"{site.id} is not looked up by token ids [batch, sequence].")
    symbol = str(size[1])
    outputs = _token_outputs(gm, symbol)
    pooled = [n for n in gm.graph.nodes if _first_token(n, symbol)]
    for source in placeholders(gm).values():
        dims = shape(source)
        if dims is None or symbol not in [str(d) for d in dims]:
            continue
        if len(dims) != 2 or str(dims[1]) != symbol:
            raise PassError(f"input {source.name!r} has its tokens on another axis than 1.")
        meaning = "ids" if source is ids else _meaning(program, source, site)
        fills = {"ids": 0, "types": 0, "mask": 1, "labels": -100}
        with gm.graph.inserting_after(source):
            pad: nn.Module = (
                PadPositions(length)
                if meaning == "positions"
                else PadTokens(length, fills[meaning])
            )
            padded = _module(gm, "pad_tokens", pad, (source,))
        source.replace_all_uses_with(padded, delete_user_cb=lambda u, p=padded: u is not p)
    with gm.graph.inserting_after(embedding):
        name = path.replace(".", "_")
        prompt = gm.graph.create_node("call_module", path, (embedding,), {}, name=name)
    embedding.replace_all_uses_with(prompt, delete_user_cb=lambda u: u is not prompt)
    for node in pooled:
        if is_op(node, ATEN.select.int):
            node.update_arg(2, length)
        else:
            node.update_arg(2, length)
            node.update_arg(3, length + 1)
    end = output_node(gm)
    for leaf, axes in outputs.items():
        with gm.graph.inserting_before(end):
            stripped = _module(gm, "strip_tokens", StripTokens(length, axes), (leaf,))
        end.replace_input_with(leaf, stripped)
    if any(s.kind == "embedding" and s.role == "position" for s in program.sites):
        program.spec = _shorter(program, length)
    return program


def _token_outputs(gm: GraphModule, symbol: str) -> dict[Node, tuple[int, ...]]:
    found: dict[Node, tuple[int, ...]] = {}
    for leaf in output_node(gm).all_input_nodes:
        axes = tuple(i for i, d in enumerate(shape(leaf) or ()) if str(d) == symbol)
        if axes:
            found[leaf] = axes
    return found


def _first_token(node: Node, symbol: str) -> bool:
    """Whether a node picks the first token of a hidden state."""
    if not (is_op(node, ATEN.select.int) or is_op(node, ATEN.slice.Tensor)) or not is_float(node):
        return False
    size = shape(node.args[0])
    if size is None or len(size) != 3 or str(size[1]) != symbol or node.args[1] != 1:
        return False
    first = bool(node.args[2] == 0)
    return first and (is_op(node, ATEN.select.int) or bool(node.args[3:4] == (1,)))
