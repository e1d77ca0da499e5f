"""What a hand-written expectation of an architecture says, and the check of a program against it.

Weights are written as in the model's source, without `.weight`: `{i}` stands for the layer,
`name[0:8,24:32]` for features of a fused weight, and a leading `/` for a path from the root.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Node

from peftfx.rewriter.graph.aten import submodule
from peftfx.rewriter.program.sites import (
    AttentionSite,
    ConvSite,
    EmbeddingSite,
    ExpertsSite,
    FeedForwardSite,
    LinearSite,
    MixerSite,
    NormSite,
    SublayerSite,
)
from peftfx.rewriter.sites.readings import readings
from peftfx.rewriter.sites.walk import Walk


@dataclass(frozen=True)
class Attn:
    """An attention sublayer.

    Attributes:
        before: the operator whose value is added to the stream.
        rotated: a second projection of keys (latent attention).
        gate: features that gate the output.
        inner: linears without a role in it.
    """

    q: str
    k: str
    v: str
    o: str
    heads: int = 4
    kv: int = 4
    dim: int = 8
    cross: bool = False
    causal: bool = False
    before: str = "linear"
    inner: tuple[str, ...] = ()
    rotated: str = ""
    gate: str = ""

    kind = property(lambda self: "cross" if self.cross else "attn")

    def roles(self) -> list[tuple[str, str]]:
        parts = [("q", self.q), ("k", self.k), ("v", self.v), ("o", self.o)]
        parts += [("k", self.rotated), ("attn.gate", self.gate)]
        parts += [("other", name) for name in self.inner]
        return parts[:4] + [p for p in parts[4:] if p[1]]


@dataclass(frozen=True)
class FF:
    """A feed-forward sublayer; with `experts`, of stacked weights, and maybe a dense one beside."""

    up: str
    down: str
    gate: str = ""
    act: str = "gelu"
    before: str = "linear"
    experts: int = 0
    router: str = ""
    shared: FF | None = None
    shared_gate: str = ""

    kind = "ffn"

    def roles(self) -> list[tuple[str, str]]:
        parts = [("ffn.up", self.up), ("ffn.down", self.down), ("ffn.gate", self.gate)]
        parts += [("router", self.router), ("router.shared", self.shared_gate)]
        return [p for p in parts if p[1]] + (self.shared.roles() if self.shared else [])


@dataclass(frozen=True)
class Mix:
    """A token mixer that is no attention; `also` are further projections of the stream."""

    into: str
    out: str
    inner: tuple[str, ...] = ()
    before: str = "linear"
    also: tuple[str, ...] = ()

    kind = "mixer"

    def roles(self) -> list[tuple[str, str]]:
        inner = [("mixer.inner", name) for name in self.inner]
        into = [("mixer.in", name) for name in (self.into, *self.also)]
        return [*into, ("mixer.out", self.out), *inner]


@dataclass(frozen=True)
class Convs:
    """A sublayer of convolutions alone."""

    before: str

    kind = "conv"

    def roles(self) -> list[tuple[str, str]]:
        return []


Part = Attn | FF | Mix | Convs


@dataclass(frozen=True)
class Stream:
    """`layers` repetitions of `parts` from layer `first` on.

    Attributes:
        norms: how many learnt norms one layer has.
        shared: all layers use the weights (and norms) of the first one.
    """

    path: str
    parts: tuple[Part, ...]
    norms: int = 2
    layers: int = 2
    parallel: bool = False
    width: int = 32
    first: int = 0
    shared: bool = False


@dataclass(frozen=True)
class Expect:
    """All sites of an architecture.

    Attributes:
        embeddings: `role:name`; two lookups of one table are listed twice.
        convs: weights of convolutions, as `role:name` where the role is not plain `conv`.
        ties: linear sites whose tensor is also another's.
        fixed: weights that are read in a way that takes no branch.
        norms: learnt norms outside of layers.
        one_stream: the `streams` are parts of one (layers of different kinds).
        calls: weights that are called several times.
    """

    streams: tuple[Stream, ...] = ()
    head: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    convs: tuple[str, ...] = ()
    ties: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    norms: int = 0
    one_stream: bool = False
    calls: dict[str, int] = field(default_factory=dict[str, int])


Key = tuple[str, str, tuple[int, ...] | None]


def _weight(text: str, path: str, layer: int) -> tuple[str, tuple[int, ...] | None]:
    """(weight, features) of a name as expectations write it."""
    name, _, ranges = text.partition("[")
    name = name[1:] if name.startswith("/") else path + name
    name = name.replace("{i}", str(layer))
    if not re.search(r"(weight|bias_table|\.experts\.\w+)$", name):
        name += ".weight"
    if not ranges:
        return name, None
    pairs = [r.split(":") for r in ranges.rstrip("]").split(",")]
    return name, tuple(i for a, b in pairs for i in range(int(a), int(b)))


def _layers(expect: Expect) -> Iterator[tuple[str, int, Stream, Part]]:
    for index, stream in enumerate(expect.streams):
        name = "s0" if expect.one_stream else f"s{index}"
        for layer in range(stream.first, stream.first + stream.layers):
            for part in stream.parts:
                yield name, layer, stream, part


def _named(names: tuple[str, ...], default: str) -> list[tuple[str, str]]:
    pairs = [n.split(":") if ":" in n else [default, n] for n in names]
    return sorted((role, _weight("/" + name, "", 0)[0]) for role, name in pairs)


def check(program: Any, expect: Expect) -> None:
    """Asserts that a program's sites are exactly the expected ones."""
    _check_linears(program, expect)
    _check_blocks(program, expect)
    _check_sublayers(program, expect)
    sites = list(program.sites)
    tables = sorted((s.role, s.weight) for s in sites if isinstance(s, EmbeddingSite))
    assert tables == _named(expect.embeddings, "")
    convs = sorted((s.role, s.weight) for s in sites if isinstance(s, ConvSite))
    assert convs == _named(expect.convs, "conv")
    assert sum(isinstance(s, NormSite) and s.layer is None for s in sites) == expect.norms


def _check_linears(program: Any, expect: Expect) -> None:
    want: dict[Key, tuple[str, int | None, bool]] = {}
    for stream, layer, shape, part in _layers(expect):
        for role, text in filter(lambda p: p[1], part.roles()):
            weight, features = _weight(text, shape.path, layer)
            cross = isinstance(part, Attn) and part.cross and role in ("q", "k", "v", "o")
            want.setdefault((weight, role, features), (stream, layer, cross))
    for role, names in (("head", expect.head), ("other", expect.other)):
        for text in names:
            want[(*_weight("/" + text, "", 0)[:1], role, None)] = ("", None, False)
    have: dict[Key, tuple[str, int | None, bool]] = {}
    fixed = {_weight("/" + name, "", 0)[0] for name in expect.fixed}
    for site in program.sites:
        if isinstance(site, LinearSite | ExpertsSite):
            name = site.module + "." + site.weight.rpartition(".")[2]
            own = name if site.role == "head" else site.weight
            cross = isinstance(site, LinearSite) and site.cross
            have[own, site.role, site.features] = (site.stream, site.layer, cross)
            stored = program.module.get_parameter(site.weight).shape
            stored = tuple(reversed(stored[-2:])) if not site.in_out else tuple(stored[-2:])
            assert site.in_features == stored[0]
            assert site.out_features == (len(site.features) if site.features else stored[1])
            assert bool(getattr(site, "fixed", "")) == (site.weight in fixed)
            assert len(site.nodes) == expect.calls.get(site.weight.removesuffix(".weight"), 1)
    assert have == want
    tied = {s.id.partition(":")[0] for s in program.sites if isinstance(s, LinearSite) and s.tied}
    assert tied == {_weight("/" + t, "", 0)[0] for t in expect.ties}


def _check_blocks(program: Any, expect: Expect) -> None:
    sites = program.sites
    wanted: list[Any] = []
    for stream, layer, shape, part in _layers(expect):
        at = (stream, layer)

        def name(text: str, role: str, shape: Stream = shape, layer: int = layer) -> str:
            weight, features = _weight(text, shape.path, layer)
            return weight + (f":{role}" if features else "")

        if isinstance(part, Attn):
            ids = [name(text, role) if text else "" for role, text in part.roles()[:4]]
            wanted.append((at, *ids, part.heads, part.kv, part.dim, part.cross, part.causal))
        elif isinstance(part, FF):
            for block in (part, part.shared) if part.shared else (part,):
                gate = name(block.gate, "ffn.gate") if block.gate else None
                router = name(block.router, "router") if block.router else None
                ids = [name(block.up, "ffn.up"), gate, name(block.down, "ffn.down"), router]
                wanted.append((at, *ids, block.act, block.experts))
        elif isinstance(part, Mix):
            into = tuple(name(text, "") for text in (part.into, *part.also))
            wanted.append((at, into, (name(part.out, ""),)))
    have: list[Any] = []
    for s in sites:
        at = (s.stream, s.layer)
        if isinstance(s, AttentionSite):
            have.append(
                (at, s.q, s.k, s.v, s.o, s.heads, s.kv_heads, s.head_dim, s.cross, s.causal)
            )
        elif isinstance(s, FeedForwardSite):
            have.append((at, s.up, s.gate, s.down, s.router, s.activation, s.experts))
        elif isinstance(s, MixerSite):
            have.append((at, s.inputs, s.outputs))
    assert sorted(have, key=str) == sorted(wanted, key=str)


def _check_sublayers(program: Any, expect: Expect) -> None:
    nodes = {n.name: n for n in program.module.graph.nodes}
    wanted: list[Any] = []
    named: dict[str, int] = {}
    for stream, layer, shape, part in _layers(expect):
        name = f"{stream}.layer{layer}.{part.kind}"
        count = named[name] = named.get(name, 0) + 1
        site_id = name if count == 1 else f"{name}_{count}"
        wanted.append((site_id, shape.parallel, shape.width, part.before))
    have: list[Any] = []
    for site in program.sites:
        if isinstance(site, SublayerSite):
            output, add = (nodes[n] for n in site.nodes)
            have.append((site.id, site.parallel, site.width, _operator(program, output)))
            assert "add" in str(add.target)
            _check_insertion(output, add)
    assert sorted(have) == sorted(wanted)
    norms = [s for s in program.sites if isinstance(s, NormSite)]
    for name, layer, stream, _ in _layers(expect):
        count = 0 if stream.shared and layer else stream.norms
        assert sum((s.stream, s.layer) == (name, layer) for s in norms) == count, (name, layer)


def _operator(program: Any, node: Node) -> str:
    module = submodule(program.module, node)
    if module is not None:
        return "dropout" if isinstance(module, nn.Dropout) else type(module).__name__
    return str(node.target).split(".")[1]


def _check_insertion(output: Node, add: Node) -> None:
    """The output reaches the sum only, by views, dropout of a sum, and sums of branches."""
    current = output
    while current is not add:
        (current,) = (u for u in current.users if "sym_size" not in str(u.target))
        assert any(t in str(current.target) for t in ("add", "dropout", "permute", "view")), current


def check_rows(program: Any) -> None:
    """Asserts that each output feature of each stored matrix that a call multiplies by is in one
    site of that call, and that every other product with a stored matrix is in the site of it."""
    walk = Walk(program.module)
    sites = [s for s in program.sites if isinstance(s, LinearSite | ExpertsSite)]
    for node, linear in walk.linears.items():
        rows: list[int] = []
        for site in sites:
            if site.weight == linear.weight and node.name in site.nodes:
                rows += site.features or range(site.out_features)
        assert sorted(rows) == sorted(linear.rows or range(linear.sizes[1])), (node, rows)
    for reading in readings(walk):
        assert any(
            s.weight == reading.weight and reading.node.name in s.nodes and s.fixed
            for s in sites if isinstance(s, LinearSite)
        ), reading  # fmt: skip
    named = {s.weight for s in sites}
    for weight in multiplied(program):
        assert weight in named, weight


def multiplied(program: Any) -> set[str]:
    """The parameters of two axes or more that some product of the graph reads, found by nothing but
    the names of operators: what discovery may not forget."""
    graph = program.module.graph
    inside = dict(program.module.named_parameters(remove_duplicate=False))
    reached: dict[Node, set[str]] = {}  # what is computed from parameters alone
    found: set[str] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            known = inside.get(str(node.target))
            reached[node] = {str(node.target)} if known is not None and known.dim() > 1 else set()
            continue
        sources = node.all_input_nodes
        product = re.search(r"linear|matmul|\bb?mm\b|addmm|einsum|grouped_mm", str(node.target))
        if product and not all(n in reached for n in sources):
            found |= {w for n in sources for w in reached.get(n, ())}
        if node.op == "call_function" and sources and all(n in reached for n in sources):
            reached[node] = {w for n in sources for w in reached[n]}
    return found
