"""Finds the sites of a canonical graph by dataflow, with no table of model names.

Linears are calls whose weight is a parameter. Attention is where a softmax (fused or not) meets
two products; its q, k, v and o are the nearest linears up and down. A feed-forward block is a
linear reached from one or two others over an activation. Following an output to the add that
closes its residual gives sublayers; chains of residual adds are streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .aten import (
    ACTIVATIONS,
    ADDS,
    ARITHMETIC,
    ATEN,
    CASTS,
    DROPOUTS,
    EMBEDDING,
    LINEAR,
    MATMULS,
    MULS,
    NORM_PARTS,
    NORMS,
    SLICES,
    SOFTMAX,
    VIEWS,
    ancestors,
    attribute,
    inputs,
    is_op,
    overloads,
    parameter_of,
    placeholders,
    shape,
    strip,
    submodule,
    users,
    value,
)  # fmt: skip
from .modes import AlphaDropout, Attention
from .probe import feature_sets
from .sites import (
    AttentionSite,
    EmbeddingSite,
    FeedForwardSite,
    LinearSite,
    NormSite,
    Site,
    Sites,
    SublayerSite,
)  # fmt: skip

_MASKS = overloads("masked_fill", "where", "masked_fill_", "clamp", "clamp_min", "maximum")
_TRANSPOSES = overloads("t", "transpose", "permute", "swapaxes")
_UP = VIEWS | SLICES | ARITHMETIC | NORM_PARTS
_FFN_UP = _UP | ACTIVATIONS
_CORE_UP = CASTS | VIEWS | ARITHMETIC | _MASKS | overloads("tanh")
_O_DOWN = VIEWS | SLICES | MULS | NORM_PARTS | overloads("sigmoid")
_OUT = VIEWS | NORM_PARTS | MULS | SLICES


@dataclass
class _Linear:
    node: Node
    x: Node
    weight: str
    bias: str | None
    in_out: bool
    sizes: tuple[int, int]


@dataclass
class _Core:
    node: Node
    q: Node
    k: Node
    v: Node
    causal: bool
    fused: bool


@dataclass
class _Sublayer:
    kind: str
    last: _Linear
    output: Node
    residual: Node
    parallel: bool
    site: int
    stream: str = ""
    layer: int | None = None


@dataclass
class _Draft:
    """The linears that play each role of one attention or feed-forward block."""

    kind: str
    parts: dict[str, list[_Linear]]
    core: _Core | None = None
    activation: str = ""
    cross: bool = False
    sublayer: _Sublayer | None = None
    features: dict[str, tuple[int, ...]] = field(default_factory=dict[str, "tuple[int, ...]"])


class _Graph:
    """One graph under discovery: node classes and walks that need the module."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.linears = {n: found for n in gm.graph.nodes if (found := self._linear(n))}

    def _linear(self, node: Node) -> _Linear | None:
        if is_op(node, LINEAR):
            x, w = node.args[:2]
            b = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
            in_out = False
        elif is_op(node, ATEN.addmm.default):
            b, x, w = node.args[:3]
            in_out = True
        elif is_op(node, MATMULS) and not is_op(node, ATEN.baddbmm.default):
            x, w = node.args[:2]
            b, in_out = None, True
        else:
            return None
        found = parameter_of(w)
        if found is None or not isinstance(x, Node):
            return None
        path, steps = found
        held = attribute(self.gm, path)
        if not isinstance(held, nn.Parameter) or held.dim() != 2:
            return None
        if any(is_op(s, SLICES) for s in steps):
            return None
        if sum(is_op(s, _TRANSPOSES) for s in steps) % 2:
            in_out = not in_out
        rows, columns = int(held.shape[0]), int(held.shape[1])
        bias = parameter_of(b)
        sizes = (rows, columns) if in_out else (columns, rows)
        return _Linear(node, x, path, bias[0] if bias else None, in_out, sizes)

    def is_dropout(self, node: Node) -> bool:
        return is_op(node, DROPOUTS) or isinstance(
            submodule(self.gm, node), nn.Dropout | AlphaDropout
        )

    def producers(self, start: Node, through: frozenset[object]) -> dict[Node, bool]:
        """Nearest linears above `start`: node -> an activation lies between."""
        found: dict[Node, bool] = {}
        seen: set[tuple[Node, bool]] = set()
        stack = [(start, False)]
        while stack:
            node, active = stack.pop()
            if (node, active) in seen:
                continue
            seen.add((node, active))
            if node in self.linears:
                found[node] = found.get(node, False) or active
            elif is_op(node, through) or self.is_dropout(node):
                now = active or is_op(node, ACTIVATIONS)
                stack.extend((i, now) for i in inputs(node))
        return found

    def consumers(self, start: Node, through: frozenset[object]) -> list[_Linear]:
        """Nearest linears below `start` that read it as their input."""
        found: list[_Linear] = []
        seen: set[Node] = set()
        stack = [start]
        while stack:
            node = stack.pop()
            for user in users(node):
                if user in seen:
                    continue
                seen.add(user)
                if user in self.linears:
                    found.append(self.linears[user])
                elif is_op(user, through) or self.is_dropout(user):
                    stack.append(user)
        order = {n: i for i, n in enumerate(self.gm.graph.nodes)}
        return sorted(found, key=lambda linear: order[linear.node])

    def source(self, node: Node) -> Node:
        """`node` without views and dropout around it."""
        while isinstance(node.args[0] if node.args else None, Node) and (
            is_op(node, VIEWS) or self.is_dropout(node)
        ):
            node = node.args[0]  # pyright: ignore[reportAssignmentType]
        return node

    def cores(self) -> list[_Core]:
        found: list[_Core] = []
        for node in self.gm.graph.nodes:
            if isinstance(submodule(self.gm, node), Attention):
                q, k, v = node.args[:3]
                causal = bool(node.args[4]) if len(node.args) > 4 else False
                found.append(_Core(node, q, k, v, causal, True))
            elif is_op(node, SOFTMAX) and (core := self._eager_core(node)):
                found.append(core)
        return found

    def _eager_core(self, softmax: Node) -> _Core | None:
        below = softmax
        product: Node | None = None
        while True:
            following = [
                u for u in users(below)
                if is_op(u, VIEWS) or self.is_dropout(u) or is_op(u, MATMULS)
            ]  # fmt: skip
            product = next((u for u in following if is_op(u, MATMULS)), None)
            if product is not None or not following:
                break
            below = following[0]
        if product is None or not isinstance(product.args[1], Node):
            return None
        stack = inputs(softmax)
        seen: set[Node] = set()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if is_op(node, MATMULS) and node not in self.linears:
                q, k = node.args[-2:] if is_op(node, ATEN.baddbmm.default) else node.args[:2]
                if isinstance(q, Node) and isinstance(k, Node):
                    return _Core(product, q, k, product.args[1], False, False)
            elif is_op(node, _CORE_UP):
                stack.extend(inputs(node))
        return None

    def attention(self, core: _Core) -> _Draft | None:
        parts = {
            role: [self.linears[n] for n in self.producers(start, _UP)]
            for role, start in (("q", core.q), ("k", core.k), ("v", core.v))
        }
        if not all(parts.values()):
            return None
        taken = {id(p) for found in parts.values() for p in found}
        after = [p for p in self.consumers(core.node, _O_DOWN) if id(p) not in taken]
        parts["o"] = after[:1]
        cross = self.source(parts["q"][0].x) is not self.source(parts["k"][0].x)
        return _Draft("attn", parts, core=core, cross=cross)

    def feed_forward(self, down: _Linear, taken: set[Node]) -> _Draft | None:
        found = {n: a for n, a in self.producers(down.x, _FFN_UP).items() if n is not down.node}
        if not found or len(found) > 2 or set(found) & taken or not any(found.values()):
            return None
        linears = {self.linears[n].weight: self.linears[n] for n in found}
        sources = {self.source(p.x) for p in linears.values()}
        if len(sources) != 1 or any(p.sizes[0] != down.sizes[1] for p in linears.values()):
            return None
        gate = [self.linears[n] for n, active in found.items() if active]
        up = [self.linears[n] for n, active in found.items() if not active]
        between = ancestors(down.x, block=lambda n: n in self.linears)
        name = next((str(n.target).split(".")[1] for n in between if is_op(n, ACTIVATIONS)), "")
        parts = {"ffn.up": up or gate, "ffn.gate": gate if up else [], "ffn.down": [down]}
        return _Draft("ffn", parts, activation=name)

    def residual(self, last: _Linear, finals: set[Node]) -> tuple[Node, Node, bool] | None:
        """(branch output, residual add, parallel) of the sublayer that ends in `last`."""
        seen = {last.node}
        queue = [last.node]
        size = shape(last.node)
        while queue:
            node = queue.pop(0)
            for user in users(node):
                if user in seen:
                    continue
                operands = [a for a in user.args[:2] if isinstance(a, Node)]
                if is_op(user, ADDS) and len(operands) == 2:
                    other = operands[1] if operands[0] is node else operands[0]
                    mine = shape(node)
                    same = shape(other) == mine and mine is not None and size is not None
                    if same and mine[-1] == size[-1] and other.op != "get_attr" and (
                        other not in seen
                    ):  # fmt: skip
                        return self._close(node, user, other, finals)
                if is_op(user, _OUT) or self.is_dropout(user):
                    seen.add(user)
                    queue.append(user)
        return None

    def _close(
        self, branch: Node, add: Node, other: Node, finals: set[Node]
    ) -> tuple[Node, Node, bool]:
        parallel = False
        while self.source(other) in finals:
            parallel = True
            following = [u for u in users(add) if is_op(u, ADDS)]
            if not following:
                break
            outer = following[0]
            operands = [a for a in outer.args[:2] if isinstance(a, Node) and a is not add]
            if not operands:
                break
            add, other = outer, operands[0]
        # The residual may itself hold the other branch: x + a, then (x + a) + m.
        return branch, add, parallel


def _streams(graph: _Graph, subs: list[_Sublayer]) -> None:
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
    graph = _Graph(gm)
    drafts = [d for core in graph.cores() if (d := graph.attention(core))]
    taken = {p.node for d in drafts for found in d.parts.values() for p in found}
    for linear in graph.linears.values():
        if linear.node not in taken and (draft := graph.feed_forward(linear, taken)):
            drafts.append(draft)
    ends = [(d, d.parts["o" if d.kind == "attn" else "ffn.down"]) for d in drafts]
    finals = {last[0].node for _, last in ends if last}
    subs: list[_Sublayer] = []
    for index, (draft, last) in enumerate(ends):
        closed = graph.residual(last[0], finals) if last else None
        if closed is not None:
            kind = "cross" if draft.cross else draft.kind
            draft.sublayer = _Sublayer(kind, last[0], *closed, site=index)
            subs.append(draft.sublayer)
    drafts = [d for d in drafts if d.kind == "attn" or d.sublayer is not None]
    _streams(graph, subs)
    _probe_fused(gm, drafts, sample)
    return _build(graph, drafts, aliases)


def _probe_fused(gm: GraphModule, drafts: list[_Draft], sample: Mapping[str, Tensor]) -> None:
    wanted: list[tuple[_Draft, str, Node, Node]] = []
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


def _build(graph: _Graph, drafts: list[_Draft], aliases: Mapping[str, str]) -> Sites:
    order = {n.name: i for i, n in enumerate(graph.gm.graph.nodes)}
    lookups = [parameter_of(n.args[0]) for n in graph.gm.graph.nodes if is_op(n, EMBEDDING)]
    tables = {found[0] for found in lookups if found}
    by_weight: dict[str, list[_Linear]] = {}
    for linear in graph.linears.values():
        by_weight.setdefault(linear.weight, []).append(linear)

    def other_names(weight: str) -> tuple[str, ...]:
        names = [a for a, c in aliases.items() if c == weight]
        return tuple(names or (["an embedding"] if weight in tables else []))

    sites: list[Site] = []
    claimed: set[str] = set()

    def linear_site(linear: _Linear, role: str, draft: _Draft | None) -> LinearSite:
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
    sites.extend(_embeddings(graph.gm, aliases))
    sites.extend(_norms(graph, sites))
    sites.sort(key=lambda s: min(order[n] for n in s.nodes))
    return Sites(tuple(sites))


def _block_sites(graph: _Graph, draft: _Draft, ids: dict[str, str]) -> list[Site]:
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


def _is_head(graph: _Graph, linear: _Linear) -> bool:
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


def _embeddings(gm: GraphModule, aliases: Mapping[str, str]) -> list[Site]:
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


def _norms(graph: _Graph, sites: list[Site]) -> list[Site]:
    owner: dict[str, Site] = {n: s for s in sites if s.kind == "linear" for n in s.nodes}
    adds: dict[str, Site] = {s.nodes[1]: s for s in sites if s.kind == "sublayer"}
    found: dict[str, NormSite] = {}
    for node in graph.gm.graph.nodes:
        weights = _norm_weights(graph.gm, node)
        if weights is None or weights[0] in found:
            continue
        below = [owner[p.node.name] for p in graph.consumers(node, VIEWS) if p.node.name in owner]
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
    if is_op(node, NORMS) or (module is not None and type(module).__name__ == "BatchNorm"):
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
