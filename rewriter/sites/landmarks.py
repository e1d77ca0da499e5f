"""Sites beside the projections: embedding tables, convolutions and normalisations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..graph.aten import (
    ADDS,
    EMBEDDING,
    GATHERS,
    MULS,
    NORM_PARTS,
    NORMS,
    SLICES,
    SOFTMAX,
    VIEWS,
    attribute,
    inputs,
    is_op,
    overloads,
    parameter_of,
    placeholders,
    reaches,
    strip,
    submodule,
    users,
    value,
)  # fmt: skip
from ..graph.modes import Attention
from ..program.sites import ConvSite, EmbeddingSite, NormSite, Site
from .residual import CARRIES, Sublayer
from .walk import Walk

_INTO_STREAM = CARRIES | SLICES | overloads("stack", "cat")
_MASKED = overloads("where", "masked_fill", "clamp", "clamp_min", "clamp_max", "minimum", "maximum")
_SQUARES = NORMS | overloads("pow", "square", "norm", "linalg_vector_norm")


def embeddings(graph: Walk, aliases: Mapping[str, str], roots: Sequence[Node]) -> list[Site]:
    """All table lookups, with what they look up; `roots` are the values that sublayers start from.

    Of the tables that an input of ids looks up the largest holds the tokens. Where it looks up
    several of that size, those whose rows enter no stream stand beside it (per-layer embeddings).
    """
    gm = graph.gm
    sites: dict[str, EmbeddingSite] = {}
    fed: dict[str, tuple[Node, Node]] = {}  # the input of ids and the lookup
    sources = set(placeholders(gm).values())
    for node in gm.graph.nodes:
        path, index = _lookup(gm, node)
        if index is None or any(graph.depends(index, n) for n in graph.linears):
            continue  # rows chosen by activations are biases of experts
        table: Tensor = attribute(gm, path)
        site_id = path if path not in sites else f"{path}@{node.name}"
        if _biases_attention(graph, node):
            role = "relative"
        elif (ids := ids_of(index)) in sources:
            fed[site_id] = ids, node
            role = "type" if table.shape[0] <= 16 else "position"
        else:
            role = "type" if _is_type(gm, index, int(table.shape[0])) else "position"
        tied = tuple(a for a, c in aliases.items() if c == path)
        sites[site_id] = EmbeddingSite(
            id=site_id, kind="embedding", role=role, layer=None, stream="", nodes=(node.name,),
            weight=path, size=int(table.shape[0]), width=int(table.shape[-1]), tied=tied,
        )  # fmt: skip
    if fed:
        largest = max(sites[i].size for i in fed)
        tables = {i: fed[i] for i in fed if sites[i].size == largest}
        entering = {i for i, (_, lookup) in tables.items() if _enters(graph, lookup, roots)}
        led = {tables[i][0] for i in entering}
        for site_id, (ids, _) in tables.items():
            role = "side" if ids in led and site_id not in entering else "token"
            sites[site_id] = replace(sites[site_id], role=role)
    return list(sites.values())


def ids_of(index: Node) -> Node:
    """What an index is taken from, through views, bounds and the masking of single ids."""
    while True:
        index = strip(index, VIEWS)
        if not is_op(index, _MASKED):
            return index
        whole = [i for i in inputs(index) if not _is_mask(i)]
        if not whole:
            return index
        index = whole[0]


def _is_mask(node: Node) -> bool:
    val = value(node)
    return not isinstance(val, Tensor) or val.dtype == torch.bool or not val.dim()


def _enters(graph: Walk, lookup: Node, roots: Sequence[Node]) -> bool:
    """Whether what is looked up becomes a part of a stream without passing a linear."""
    wanted = set(roots)
    return lookup in wanted or bool(
        reaches(lookup, wanted.__contains__, lambda n: not graph.passes(n, _INTO_STREAM))
    )


def _biases_attention(graph: Walk, lookup: Node) -> bool:
    """Whether rows are only added to attention scores (relative positions)."""
    seen: set[Node] = set()
    stack = [lookup]
    reached = False
    while stack:
        for user in users(stack.pop()):
            if is_op(user, SOFTMAX) or isinstance(submodule(graph.gm, user), Attention):
                reached = True
            elif user in graph.linears or is_op(user, NORMS) or user.op == "output":
                return False
            elif user not in seen:
                seen.add(user)
                stack.append(user)
    return reached


def _lookup(gm: GraphModule, node: Node) -> tuple[str, Node | None]:
    """(table, index) of an embedding, or of an index into the rows of a parameter."""
    index: Any = None
    if is_op(node, EMBEDDING):
        index = node.args[1]
    elif is_op(node, overloads("index")) and isinstance(node.args[1], list | tuple):
        index = node.args[1][0] if len(node.args[1]) == 1 else None
    table = parameter_of(node.args[0]) if isinstance(index, Node) else None
    tensor = attribute(gm, table[0]) if table and not table[1] else None
    matrix = isinstance(tensor, nn.Parameter) and tensor.dim() == 2
    return (table[0], index) if table and matrix else ("", None)


def _is_type(gm: GraphModule, index: Node, size: int) -> bool:
    """Whether lookups read the same row everywhere (token types left at their default)."""
    source = strip(index, VIEWS | SLICES | GATHERS)
    if is_op(source, overloads("arange", "cumsum", "add", "sub")):
        return False
    if source.op == "get_attr":
        tensor = attribute(gm, str(source.target))
        if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.numel():
            return bool((tensor == tensor.flatten()[0]).all())
    full = overloads("zeros", "zeros_like", "new_zeros", "full", "full_like")
    return size <= 16 or is_op(source, full)


def convolutions(graph: Walk, owner: Mapping[Node, Sublayer]) -> list[Site]:
    """All convolutions with a stored weight."""
    sites: dict[str, ConvSite] = {}
    for node, conv in graph.convs.items():
        if not conv.weight:
            continue
        if conv.weight in sites:
            old = sites[conv.weight]
            sites[conv.weight] = replace(old, nodes=(*old.nodes, node.name))
            continue
        patch = conv.kernel == conv.stride and max(conv.kernel) > 1 and not conv.transposed
        role = "conv.depthwise" if conv.depthwise else "conv.patch" if patch else "conv"
        sub = owner.get(node)
        sites[conv.weight] = ConvSite(
            id=conv.weight, kind="conv", role=role, layer=sub.layer if sub else None,
            stream=sub.stream if sub else "", nodes=(node.name,), weight=conv.weight,
            bias=conv.bias, channels=conv.channels, groups=conv.groups, kernel=conv.kernel,
            stride=conv.stride, transposed=conv.transposed,
        )  # fmt: skip
    return list(sites.values())


def norms(graph: Walk, owner: Mapping[Node, Sublayer], sublayers: Sequence[Sublayer]) -> list[Site]:
    """All normalisations with learnt parameters, fused or written out.

    A norm inside a branch belongs to its layer. A norm of the stream itself, after a sum, belongs
    to the sum's layer if the stream goes on from the norm's output (post-norm); otherwise it is
    the stream's final norm and belongs to none.
    """
    closes = {s.branch.add: s for s in sublayers}
    roots = {s.branch.root for s in sublayers}
    sites: dict[str, NormSite] = {}
    after: dict[str, tuple[Node, Sublayer]] = {}
    for node in graph.nodes:
        weights = _norm_weights(graph, node)
        if weights is None or weights[0] in sites:
            continue
        sub = owner.get(node)
        source = _normed(graph, node)
        if sub is None and source in closes:
            after[weights[0]] = node, closes[source]
        sites[weights[0]] = NormSite(
            id=weights[0], kind="norm", role="norm", layer=sub.layer if sub else None,
            stream=sub.stream if sub else "", nodes=(node.name,), weight=weights[0],
            bias=weights[1], sublayer=sub.kind if sub else "",
        )  # fmt: skip
    post = {sub.stream for node, sub in after.values() if node in roots}
    for name, (_, sub) in after.items():
        if sub.stream in post:
            own = {"layer": sub.layer, "stream": sub.stream, "sublayer": sub.kind}
            sites[name] = replace(sites[name], **own)
    return list(sites.values())


def _normed(graph: Walk, node: Node) -> Node:
    """The value that a normalisation ending at `node` normalises."""
    if is_op(node, NORMS) or graph.is_batch_norm(node):
        return graph.source(inputs(node)[0])
    seen: set[Node] = set()
    stack = [i for i in inputs(node) if i.op != "get_attr"]
    while stack:
        current = stack.pop()
        if is_op(current, _SQUARES) and not _is_root(current):
            return graph.source(inputs(current)[0])
        if current not in seen and is_op(current, VIEWS | MULS | ADDS | NORM_PARTS):
            seen.add(current)
            stack.extend(inputs(current))
    return node


def _is_root(node: Node) -> bool:
    """Whether a value is a root or a reciprocal, maybe written as a power."""
    if is_op(node, overloads("rsqrt", "reciprocal", "sqrt")):
        return True
    power = node.args[1] if is_op(node, overloads("pow")) and len(node.args) > 1 else None
    return isinstance(power, float) and power in (-0.5, 0.5)


def _norm_weights(graph: Walk, node: Node) -> tuple[str, str | None] | None:
    """(weight, bias) names of a normalisation that ends at `node`."""
    gm = graph.gm

    def vector(arg: object) -> str | None:
        if is_op(arg, ADDS) and isinstance(arg, Node) and len(inputs(arg)) == 1:
            arg = inputs(arg)[0]  # Gemma's `1 + weight`
        parameter = parameter_of(arg)
        tensor = attribute(gm, parameter[0]) if parameter else None
        return (
            parameter[0]
            if parameter and isinstance(tensor, nn.Parameter) and tensor.dim() == 1
            else None
        )

    operands = node.args
    if is_op(node, NORMS) or graph.is_batch_norm(node):
        names = [v for a in operands[1:] if isinstance(a, Node) and (v := vector(a))]
        return (names[0], names[1] if len(names) > 1 else None) if names else None
    if is_op(node, MULS) and len(operands) == 2 and isinstance(value(node), Tensor):
        for weight, other in (operands, operands[::-1]):
            name = vector(weight)
            if name and isinstance(other, Node):
                scaled = strip(other, VIEWS)
                if is_op(scaled, MULS) and any(_is_root(i) for i in inputs(scaled)):
                    return name, None
    return None
