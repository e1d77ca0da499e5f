"""Finds the sites of a canonical graph by dataflow, with no table of model names.

Linears are calls whose weight is a parameter. Attention is where a softmax (fused or not) meets
two products; its q, k, v and o are the nearest linears up and down. A feed-forward block is a
linear reached from one or two others over an activation. Following an output to the add that
closes its residual gives sublayers; chains of residual adds are streams.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.fx import GraphModule, Node

from .aten import (
    ADDS,
    EMBEDDING,
    MULS,
    NORM_PARTS,
    SLICES,
    VIEWS,
    inputs,
    is_op,
    parameter_of,
    shape,
    users,
)  # fmt: skip
from .landmarks import embeddings, norms
from .probe import feature_sets
from .sites import AttentionSite, FeedForwardSite, LinearSite, Site, Sites, SublayerSite
from .walk import Draft, Linear, Sublayer, Walk


def _streams(graph: Walk, subs: list[Sublayer]) -> None:
    """Names streams and numbers layers: a block starts at a self-attention or a second FFN."""
    order = {n: i for i, n in enumerate(graph.gm.graph.nodes)}
    adds = {s.residual for s in subs}
    outputs = {s.output for s in subs}
    stream_of: dict[Node, str] = {}
    for add in sorted(adds, key=lambda n: order[n]):
        found = None
        seen: set[Node] = set()
        stack = [a for a in inputs(add) if a not in outputs]
        while stack and found is None:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in stream_of:
                found = stream_of[node]
            elif is_op(node, VIEWS | NORM_PARTS | MULS | ADDS) or graph.is_dropout(node):
                stack.extend(i for i in inputs(node) if i.op != "get_attr")
        stream_of[add] = found or f"s{len(set(stream_of.values()))}"
    layers: dict[str, tuple[int, set[str]]] = {}
    for sub in sorted(subs, key=lambda s: (order[s.residual], order[s.last.node])):
        stream = stream_of[sub.residual]
        layer, kinds = layers.get(stream, (-1, {"attn", "ffn"}))
        if (sub.kind == "attn" and kinds) or sub.kind in kinds:
            fresh = not (sub.parallel and sub.kind not in kinds)
            if fresh:
                layer, kinds = layer + 1, set()
        layers[stream] = (layer, kinds | {sub.kind})
        sub.stream, sub.layer = stream, layer


def discover(gm: GraphModule, aliases: Mapping[str, str], sample: Mapping[str, Tensor]) -> Sites:
    """Finds all sites of a canonical captured graph.

    Args:
        gm: the graph, in canonical form with modes restored.
        aliases: tied names -> the canonical name.
        sample: example inputs, used only to probe which features of a fused weight play a role.
    """
    graph = Walk(gm)
    drafts = [d for core in graph.cores() if (d := graph.attention(core))]
    taken = {p.node for d in drafts for found in d.parts.values() for p in found}
    for linear in graph.linears.values():
        if linear.node not in taken and (draft := graph.feed_forward(linear, taken)):
            drafts.append(draft)
    ends = [(d, d.parts["o" if d.kind == "attn" else "ffn.down"]) for d in drafts]
    finals = {last[0].node for _, last in ends if last}
    subs: list[Sublayer] = []
    for index, (draft, last) in enumerate(ends):
        closed = graph.residual(last[0], finals) if last else None
        if closed is not None:
            kind = "cross" if draft.cross else draft.kind
            draft.sublayer = Sublayer(kind, last[0], *closed, site=index)
            subs.append(draft.sublayer)
    drafts = [d for d in drafts if d.kind == "attn" or d.sublayer is not None]
    _streams(graph, subs)
    _probe_fused(gm, drafts, sample)
    return _build(graph, drafts, aliases)


def _probe_fused(gm: GraphModule, drafts: list[Draft], sample: Mapping[str, Tensor]) -> None:
    wanted: list[tuple[Draft, str, Node, Node]] = []
    for draft in drafts:
        core = draft.core
        if core is None:
            continue
        owners = [p.node for role in "qkv" for p in draft.parts[role]]
        for role, operand in (("q", core.q), ("k", core.k), ("v", core.v)):
            linear = draft.parts[role][0].node
            if owners.count(linear) > 1:
                wanted.append((draft, role, linear, operand))
    found = feature_sets(gm, sample, [(linear, operand) for _, _, linear, operand in wanted])
    for (draft, role, _, _), features in zip(wanted, found, strict=True):
        draft.features[role] = features


def _build(graph: Walk, drafts: list[Draft], aliases: Mapping[str, str]) -> Sites:
    order = {n.name: i for i, n in enumerate(graph.gm.graph.nodes)}
    lookups = [parameter_of(n.args[0]) for n in graph.gm.graph.nodes if is_op(n, EMBEDDING)]
    tables = {found[0] for found in lookups if found}
    by_weight: dict[str, list[Linear]] = {}
    for linear in graph.linears.values():
        by_weight.setdefault(linear.weight, []).append(linear)

    def other_names(weight: str) -> tuple[str, ...]:
        names = [a for a, c in aliases.items() if c == weight]
        return tuple(names or (["an embedding"] if weight in tables else []))

    sites: list[Site] = []
    claimed: set[str] = set()

    def linear_site(linear: Linear, role: str, draft: Draft | None) -> LinearSite:
        features = draft.features.get(role) if draft else None
        sub = draft.sublayer if draft else None
        tied = other_names(linear.weight)
        # A head tied to an embedding goes by its own name, the table by the first one.
        name = tied[0] if linear.weight in tables and tied[0] in aliases else linear.weight
        return LinearSite(
            id=name + (f":{role}" if features is not None else ""),
            kind="linear", role=role, layer=sub.layer if sub else None,
            stream=sub.stream if sub else "",
            nodes=tuple(p.node.name for p in by_weight[linear.weight]),
            weight=linear.weight, bias=linear.bias, features=features,
            in_features=linear.sizes[0],
            out_features=linear.sizes[1] if features is None else len(features),
            in_out=linear.in_out,
            tied=tied,
            cross=bool(draft and draft.cross),
        )  # fmt: skip

    for draft in drafts:
        ids: dict[str, str] = {}
        for role, linears in draft.parts.items():
            for linear in linears:
                site = linear_site(linear, role, draft)
                ids.setdefault(role, site.id)
                if site.id not in claimed:
                    claimed.add(site.id)
                    claimed.add(linear.weight)
                    sites.append(site)
        sites.extend(_block_sites(graph, draft, ids))
    for linear in graph.linears.values():
        if linear.weight not in claimed:
            claimed.add(linear.weight)
            role = "head" if _is_head(graph, linear) else "other"
            sites.append(linear_site(linear, role, None))
    sites.extend(embeddings(graph.gm, aliases))
    sites.extend(norms(graph.gm, sites, lambda n: [p.node.name for p in graph.consumers(n, VIEWS)]))
    sites.sort(key=lambda s: min(order[n] for n in s.nodes))
    return Sites(tuple(sites))


def _block_sites(graph: Walk, draft: Draft, ids: dict[str, str]) -> list[Site]:
    sub = draft.sublayer
    stream, layer = (sub.stream, sub.layer) if sub else ("", None)
    core = draft.core
    kind = "cross" if draft.cross else draft.kind
    name = (
        f"{stream}.layer{layer}.{kind}" if sub else f"{ids.get('q', ids.get('ffn.up', ''))}.{kind}"
    )
    made: list[Site] = []
    if core is not None:
        q, k = shape(core.q), shape(core.k)
        heads, dim = int(q[-3]) if q and len(q) > 2 else 1, int(q[-1]) if q else 0
        seen = int(k[-3]) if k and len(k) > 2 else 1
        keys = draft.features.get("k")
        width = len(keys) if keys is not None else draft.parts["k"][0].sizes[1]
        kv = max(1, width // dim) if dim else seen
        kv = kv if seen % kv == 0 else seen
        made.append(AttentionSite(
            id=f"{name}.core", kind="attention", role="attn", layer=layer, stream=stream,
            nodes=(core.node.name,), q=ids["q"], k=ids["k"], v=ids["v"], o=ids.get("o", ""),
            heads=heads, kv_heads=kv, head_dim=dim, cross=draft.cross, causal=core.causal,
            fused=core.fused, repeated=kv != seen,
        ))  # fmt: skip
    else:
        made.append(FeedForwardSite(
            id=f"{name}.block", kind="feedforward", role="ffn", layer=layer, stream=stream,
            nodes=(draft.parts["ffn.down"][0].node.name,), up=ids["ffn.up"],
            gate=ids.get("ffn.gate"), down=ids["ffn.down"], activation=draft.activation,
        ))  # fmt: skip
    if sub is not None:
        size = shape(sub.output)
        made.append(SublayerSite(
            id=name, kind="sublayer", role="attn" if core else "ffn", layer=layer, stream=stream,
            nodes=(sub.output.name, sub.residual.name), width=int(size[-1]) if size else 0,
            parallel=sub.parallel,
        ))  # fmt: skip
    return made


def _is_head(graph: Walk, linear: Linear) -> bool:
    seen: set[Node] = set()
    stack = [linear.node]
    while stack:
        for user in users(stack.pop()):
            if user.op == "output":
                return True
            if user not in seen and is_op(user, VIEWS | SLICES):
                seen.add(user)
                stack.append(user)
    return False
