"""Turns what discovery found into sites, in graph order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch.fx import Node

from ..graph.aten import (
    ADDS,
    EMBEDDING,
    GATHERS,
    MULS,
    SLICES,
    VIEWS,
    inputs,
    is_op,
    overloads,
    parameter_of,
    reaches,
    shape,
    users,
)
from ..program.site_table import Sites
from ..program.sites import (
    AttentionSite,
    ExpertsSite,
    FeedForwardSite,
    LinearSite,
    MixerSite,
    Site,
    SublayerSite,
)
from .attention import Core
from .evaluation import Probe
from .landmarks import convolutions, embeddings, norms
from .products import Reading
from .readings import readings
from .residual import Sublayer
from .sublayers import Draft, Part
from .walk import Linear, Walk

Call = tuple[str, tuple[int, ...] | None, bool, bool]
"""How a linear reads its weight: the name, the rows, whether it is stored `[in, out]` to it, and
whether it is the left operand."""


def _call(linear: Linear) -> Call:
    return linear.weight, linear.rows, linear.in_out, linear.left


def _features(linear: Linear) -> tuple[int, ...]:
    """The output features of the stored weight that a call uses."""
    return tuple(range(linear.sizes[1])) if linear.rows is None else linear.rows


class Found(Protocol):
    """What discovery hands over."""

    drafts: list[Draft]
    sublayers: list[Sublayer]
    roles: dict[Node, str]
    others: list[Part]
    owner: dict[Node, Sublayer]


def build(graph: Walk, probe: Probe, aliases: Mapping[str, str], found: Found) -> Sites:
    """All sites of a graph."""
    sites = embeddings(graph, aliases, [s.branch.root for s in found.sublayers])
    sites.extend(convolutions(graph, found.owner))
    sites.extend(norms(graph, found.owner, found.sublayers))
    builder = _Builder(graph, probe, aliases, found, claimed={s.id for s in sites})
    builder.blocks()
    builder.rest()
    sites = builder.sites + sites
    order = {n.name: i for i, n in enumerate(graph.nodes)}
    sites.sort(key=lambda s: min(order[n] for n in s.nodes))
    return Sites(tuple(sites))


@dataclass
class _Builder:
    graph: Walk
    probe: Probe
    aliases: Mapping[str, str]
    found: Found
    sites: list[Site] = field(default_factory=list[Site])
    claimed: set[str] = field(default_factory=set[str])

    def __post_init__(self) -> None:
        lookups = [n.args[0] for n in self.graph.nodes if is_op(n, EMBEDDING)]
        self.tables = {parameter[0] for t in lookups if (parameter := parameter_of(t))}
        self.calls: dict[Call, list[Linear]] = {}
        self.rows: dict[Call, dict[int, str]] = {}  # output feature -> id of its site
        for linear in self.graph.linears.values():
            self.calls.setdefault(_call(linear), []).append(linear)
        self.readings = list(readings(self.graph))

    def blocks(self) -> None:
        """Sites of attentions, feed-forward blocks and mixers, and of their linears."""
        routers = [n for n, role in self.found.roles.items() if role == "router"]
        routed = {id(self.found.owner[n]): self.graph.linears[n].weight for n in routers}
        for draft in self.found.drafts:
            ids: dict[str, list[str]] = {}
            for role, linears in draft.parts.items():
                ids[role] = [self._linear(linear, role, draft) for linear in linears]
            self.sites.append(self._block(draft, ids, routed.get(id(draft.sublayer))))
        for sub in self.found.sublayers:
            self.sites.append(_sublayer(sub))

    def rest(self) -> None:
        """Sites of what no block has claimed: whole linears, the other features of fused ones, and
        weights that are read in a way that takes no branch."""
        for role, linear, features in self.found.others:
            self._linear(linear, role, None, features)
        for key, (first, *_) in self.calls.items():
            missing = [r for r in _features(first) if r not in self.rows.get(key, {})]
            if missing:
                self._linear(first, self._role(first), None)
        for weight in dict.fromkeys(r.weight for r in self.readings):
            self.sites.append(self._fixed(weight, [r for r in self.readings if r.weight == weight]))

    def _role(self, linear: Linear) -> str:
        last = _is_head(linear.node) and not reaches(
            linear.node, self.graph.weighted, lambda _: False
        )
        return self.found.roles.get(linear.node) or ("head" if last else "other")

    def _linear(
        self,
        linear: Linear,
        role: str,
        draft: Draft | None,
        features: tuple[int, ...] | None = None,
    ) -> str:
        """Adds the site of a linear in a role, with the features that no other site has; returns
        the id of the site that has them, or most of them."""
        key = _call(linear)
        taken = self.rows.setdefault(key, {})
        if draft is not None:
            features = draft.features.get((role, linear.weight), linear.rows)
        wanted = _features(linear) if features is None else features
        own = tuple(r for r in wanted if r not in taken)
        if not own:
            return Counter(taken[r] for r in wanted).most_common(1)[0][0]
        whole = features is None and linear.rows is None and not taken
        sub = draft.sublayer if draft else self.found.owner.get(linear.node)
        name, tied = self._names(linear.weight)
        site_id = self._free(name if whole else f"{name}:{role}", role, linear.node)
        taken.update(dict.fromkeys(own, site_id))
        layer, stream = (sub.layer, sub.stream) if sub else (None, "")
        nodes = tuple(p.node.name for p in self.calls[key])
        listed = None if whole else own
        if linear.stack:
            self.sites.append(ExpertsSite(
                id=site_id, kind="experts", role=role, layer=layer, stream=stream, nodes=nodes,
                weight=linear.weight, experts=linear.stack, in_features=linear.sizes[0],
                out_features=len(own), features=listed, in_out=linear.in_out, left=linear.left,
                place=linear.place,
            ))  # fmt: skip
        else:
            self.sites.append(LinearSite(
                id=site_id, kind="linear", role=role, layer=layer, stream=stream, nodes=nodes,
                weight=linear.weight, bias=linear.bias, features=listed,
                in_features=linear.sizes[0], out_features=len(own), in_out=linear.in_out,
                tied=(*tied, *self._elsewhere(key)), cross=bool(draft and draft.cross),
                left=linear.left, sliced=linear.rows is not None,
            ))  # fmt: skip
        return site_id

    def _free(self, name: str, role: str, node: Node) -> str:
        """`name` if no other site is called so, else the name with its role, or with its call."""
        names = [name, *([] if ":" in name else [f"{name}:{role}"]), f"{name}@{node.name}"]
        site_id = next(n for n in names if n not in self.claimed)
        self.claimed.add(site_id)
        return site_id

    def _elsewhere(self, key: Call) -> list[str]:
        """The products that read the weight of a call, or some of its rows, in another way."""
        weight, rows = key[0], set(key[1] or ())
        names = [
            p.node.name for other, calls in self.calls.items() for p in calls
            if other != key and other[0] == weight
            and (not rows or not other[1] or rows & set(other[1]))
        ]  # fmt: skip
        return [*names, *(r.node.name for r in self.readings if r.weight == weight)]

    def _fixed(self, weight: str, uses: Sequence[Reading]) -> Site:
        """The site of a weight at products that no branch can stand beside."""
        first = uses[0].node
        sub = self.found.owner.get(first)
        name, tied = self._names(weight)
        calls = [
            p.node.name for key, calls in self.calls.items() for p in calls if key[0] == weight
        ]
        data = self.graph.gm.get_parameter(weight)
        return LinearSite(
            id=self._free(name, "other", first), kind="linear", role="other",
            layer=sub.layer if sub else None, stream=sub.stream if sub else "",
            nodes=tuple(dict.fromkeys(r.node.name for r in uses)), weight=weight,
            in_features=int(data.shape[-1]), out_features=data.numel() // int(data.shape[-1]),
            tied=(*tied, *calls), fixed=uses[0].reason,
        )  # fmt: skip

    def _names(self, weight: str) -> tuple[str, tuple[str, ...]]:
        """A linear's own name and the other names of its tensor.

        A head tied to an embedding goes by the last name, the table by the first one.
        """
        names = [weight, *(a for a, c in self.aliases.items() if c == weight)]
        own = names[-1] if weight in self.tables else weight
        others = tuple(n for n in names if n != own)
        return own, others or (("an embedding",) if weight in self.tables else ())

    def _block(self, draft: Draft, ids: dict[str, list[str]], routed: str | None) -> Site:
        sub = draft.sublayer
        stream, layer = (sub.stream, sub.layer) if sub else ("", None)
        kind = "cross" if draft.cross else draft.kind
        name = sub.name if sub else f"{next(iter(ids.values()))[0]}.{kind}"
        first = {role: members[0] for role, members in ids.items() if members}
        if draft.core is not None:
            return self._attention(draft, draft.core, self._unique(f"{name}.core"), first)
        if draft.kind == "mixer":
            return MixerSite(
                id=f"{name}.block", kind="mixer", role="mixer", layer=layer, stream=stream,
                nodes=(draft.parts["mixer.out"][0].node.name,), inputs=tuple(ids["mixer.in"]),
                outputs=tuple(ids["mixer.out"]),
            )  # fmt: skip
        down = draft.parts["ffn.down"][0]
        return FeedForwardSite(
            id=self._unique(f"{name}.{'experts' if down.stack else 'block'}"),
            kind="feedforward", role="ffn", layer=layer, stream=stream,
            nodes=(down.node.name,), up=first["ffn.up"],
            gate=first.get("ffn.gate"), down=first["ffn.down"], activation=draft.activation,
            router=routed if down.stack else None, experts=down.stack,
        )  # fmt: skip

    def _unique(self, name: str) -> str:
        """`name`, numbered where a sublayer holds several blocks."""
        count = 1
        while (unique := name if count == 1 else f"{name}_{count}") in self.claimed:
            count += 1
        self.claimed.add(unique)
        return unique

    def _attention(self, draft: Draft, core: Core, name: str, ids: dict[str, str]) -> Site:
        sub = draft.sublayer
        sizes: list[tuple[Any, ...]] = [shape(n) or (1,) for n in (core.q, core.k, core.v)]
        q, k, v = sizes
        seen = k[-3] if len(k) > 2 and isinstance(k[-3], int) else 0
        dim = int(q[-1])

        def count(role: str, width: int, fallback: int) -> int:
            linear = draft.parts[role][0]
            features = draft.features.get((role, linear.weight))
            total = (len(features) if features else linear.sizes[1]) * max(1, linear.stack)
            return fallback if total % width else total // width

        heads = count("q", dim, int(q[-3]) if len(q) > 3 else 1)
        kv = count("v", int(v[-1]), seen or heads)
        if heads % kv:
            kv = heads
        return AttentionSite(
            id=name, kind="attention", role="attn", layer=sub.layer if sub else None,
            stream=sub.stream if sub else "", nodes=(core.node.name,), q=ids["q"], k=ids["k"],
            v=ids["v"], o=ids.get("o", ""), heads=heads, kv_heads=kv, head_dim=dim,
            cross=draft.cross, causal=not draft.cross and core.causal(self.probe),
            fused=core.fused, repeated=bool(seen) and kv < seen,
        )  # fmt: skip


def _sublayer(sub: Sublayer) -> Site:
    size: list[Any] = list(shape(sub.output) or [0])
    images = sub.kind == "conv" and len(size) > 3
    width = size[1] if images or not isinstance(size[-1], int) else size[-1]
    return SublayerSite(
        id=sub.name, kind="sublayer",
        role="attn" if sub.kind == "cross" else sub.kind, layer=sub.layer, stream=sub.stream,
        nodes=(sub.output.name, sub.branch.add.name),
        width=int(width) if isinstance(width, int) else 0, parallel=sub.parallel,
        cross=sub.kind == "cross",
    )  # fmt: skip


def _is_head(start: Node) -> bool:
    """Whether a linear's value is an output, through views, constant scales or a soft cap."""
    seen: set[Node] = set()
    stack = [start]
    while stack:
        node = stack.pop()
        for user in users(node):
            if user.op == "output":
                return True
            capped = is_op(user, overloads("tanh")) and is_op(node, MULS)
            moved = is_op(user, overloads("einsum")) and len(inputs(user)) == 1
            biased = is_op(user, ADDS) and any(i.op == "get_attr" for i in inputs(user))
            chosen = is_op(user, GATHERS) and user.args[0] is node  # the last token's
            known = is_op(user, VIEWS | SLICES | MULS) or capped or moved or biased or chosen
            if user not in seen and known:
                seen.add(user)
                stack.append(user)
    return False
