"""Sites that stand outside of the blocks: embedding tables and normalisations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .aten import (
    ADDS,
    CASTS,
    EMBEDDING,
    MULS,
    NORMS,
    SLICES,
    VIEWS,
    attribute,
    inputs,
    is_op,
    overloads,
    parameter_of,
    placeholders,
    strip,
    submodule,
    users,
    value,
)  # fmt: skip
from .modes import BatchNorm
from .sites import EmbeddingSite, NormSite, Site

Consumers = Callable[[Node], list[str]]
"""Names of the linear calls that read a value through views."""


def embeddings(gm: GraphModule, aliases: Mapping[str, str]) -> list[Site]:
    """All table lookups, with what they look up."""
    found: dict[str, EmbeddingSite] = {}
    fed: list[str] = []
    sources = set(placeholders(gm).values())
    for node in gm.graph.nodes:
        table = parameter_of(node.args[0]) if is_op(node, EMBEDDING) else None
        if table is None:
            continue
        path = table[0]
        held: Tensor = attribute(gm, path)
        index = node.args[1]
        site_id = path if path not in found else f"{path}@{node.name}"
        if strip(index, VIEWS) in sources:
            fed.append(site_id)
            role = "type" if held.shape[0] <= 16 else "position"
        else:
            role = "type" if _is_constant_index(gm, index, int(held.shape[0])) else "position"
        tied = tuple(a for a, c in aliases.items() if c == path)
        found[site_id] = EmbeddingSite(
            id=site_id, kind="embedding", role=role, layer=None, stream="", nodes=(node.name,),
            weight=path, size=int(held.shape[0]), width=int(held.shape[-1]), tied=tied,
        )  # fmt: skip
    if fed:
        largest = max(found[i].size for i in fed)
        for site_id in fed:
            if found[site_id].size == largest:
                found[site_id] = replace(found[site_id], role="token")
    return list(found.values())


def _is_constant_index(gm: GraphModule, index: Node, size: int) -> bool:
    """Whether lookups always read the same row (token types left at their default)."""
    source = strip(index, VIEWS | SLICES | overloads("gather", "index", "index_select"))
    if source.op == "get_attr":
        held = attribute(gm, str(source.target))
        if isinstance(held, Tensor) and not held.is_meta and held.numel():
            return bool((held == held.flatten()[0]).all())
    full = overloads("zeros", "zeros_like", "new_zeros", "full", "full_like")
    return size <= 16 or is_op(source, full)


def norms(gm: GraphModule, sites: list[Site], consumers: Consumers) -> list[Site]:
    """All normalisations with learnt parameters, fused or written out."""
    owner: dict[str, Site] = {n: s for s in sites if s.kind == "linear" for n in s.nodes}
    adds: dict[str, Site] = {s.nodes[1]: s for s in sites if s.kind == "sublayer"}
    found: dict[str, NormSite] = {}
    for node in gm.graph.nodes:
        weights = _norm_weights(gm, node)
        if weights is None or weights[0] in found:
            continue
        below = [owner[name] for name in consumers(node) if name in owner]
        near = next((s for s in below if s.layer is not None), None)
        above = next((adds[i.name] for i in inputs(node) if i.name in adds), None)
        block = above if above is not None and is_op(node, NORMS) and near is None else near
        if above is not None and near is not None and above.layer is not None:
            # Post-norm feeds the next block; pre-norm follows the previous block's add.
            readers = [u for u in users(node) if is_op(u, ADDS)]
            block = above if readers else near
        found[weights[0]] = NormSite(
            id=weights[0], kind="norm", role="norm", layer=block.layer if block else None,
            stream=block.stream if block else "", nodes=(node.name,), weight=weights[0],
            bias=weights[1],
        )  # fmt: skip
    return list(found.values())


def _norm_weights(gm: GraphModule, node: Node) -> tuple[str, str | None] | None:
    """(weight, bias) names of a normalisation that ends at `node`."""

    def vector(arg: object) -> str | None:
        found = parameter_of(arg)
        held = attribute(gm, found[0]) if found else None
        return found[0] if found and isinstance(held, nn.Parameter) and held.dim() == 1 else None

    operands = node.args
    module = submodule(gm, node)
    if is_op(node, NORMS) or isinstance(module, BatchNorm):
        names = [v for a in operands[1:] if isinstance(a, Node) and (v := vector(a))]
        return (names[0], names[1] if len(names) > 1 else None) if names else None
    if is_op(node, MULS) and len(operands) == 2 and isinstance(value(node), Tensor):
        for weight, other in (operands, operands[::-1]):
            name = vector(weight)
            if name and isinstance(other, Node):
                scaled = strip(other, CASTS)
                roots = overloads("rsqrt", "reciprocal", "sqrt")
                if is_op(scaled, MULS) and any(is_op(i, roots) for i in inputs(scaled)):
                    return name, None
    return None
