"""What lies along the axes of values: expected words, equal sizes that say nothing, permuted samples."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Interpreter, Node

import peftfx
from peftfx.rewriter.axes.kinds import Axis, Factor, axis, joined, merged, piece, split, whole
from peftfx.rewriter.axes.named import NamedAxes, named_axes
from peftfx.rewriter.program.sites import AttentionSite, WeightSite


def words(program: Any) -> dict[str, tuple[str, ...]]:
    """Words of everything that has axes, by node name or name of the stored tensor."""
    found = named_axes(program)
    nodes = program.module.graph.nodes
    values = {n.name: n for n in nodes if isinstance(n.meta.get("val"), Tensor)}
    names = {str(n.target): str(n.target) for n in nodes if n.op == "get_attr"}
    return {k: found.words(v) for k, v in (values | names).items()}


def weights(program: Any) -> dict[str, tuple[str, ...]]:
    found = named_axes(program)
    return {s.role: found.words(s.weight) for s in program.sites if isinstance(s, WeightSite)}


GROUPED = {
    "token": ("?", "width"), "q": ("group*head*width", "width"), "k": ("group*width", "width"),
    "v": ("group*width", "width"), "o": ("width", "group*head*width"),
    "ffn.gate": ("channel", "width"), "ffn.up": ("channel", "width"),
    "ffn.down": ("width", "channel"), "head": ("?", "width"),
}  # fmt: skip
PLAIN = {
    "token": ("?", "width"), "position": ("?", "width"), "q": ("head*width", "width"),
    "k": ("head*width", "width"), "v": ("head*width", "width"), "o": ("width", "head*width"),
    "ffn.up": ("channel", "width"), "ffn.down": ("width", "channel"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [("decoder", GROUPED), ("fused", {**PLAIN, "head": ("?", "width")}), ("encoder", PLAIN)],
)
def test_weights_have_axes(captured: Any, name: str, expected: dict[str, Any]) -> None:
    got = weights(captured[name][1])
    assert expected.items() <= got.items(), got


def test_experts_are_an_axis(zoo: Any) -> None:
    got = weights(zoo["mixtral"])
    assert got["router"] == ("expert", "width")
    assert got["ffn.up"] == got["ffn.gate"] == ("expert", "channel", "width")
    assert got["ffn.down"] == ("expert", "width", "channel")


def test_convolutions_have_channels_and_pixels(zoo: Any) -> None:
    program = zoo["resnet"]
    found = named_axes(program)
    calls = [n for n in program.module.graph.nodes if "conv2d" in str(n.target)]
    assert len(calls) == 6
    assert {found.words(n) for n in calls} == {("batch", "channel", "token", "token")}
    (head,) = (n for n in program.module.graph.nodes if "linear" in str(n.target))
    assert found.words(head.all_input_nodes[0]) == ("batch", "channel")


class TokensFirst(nn.Module):
    """An attention over axis 0, with samples and heads on one axis."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(x)))


@pytest.fixture(scope="module")
def tokens_first() -> Any:
    torch.manual_seed(0)
    return peftfx.capture(TokensFirst().eval(), (torch.randn(7, 3, 16),))


def test_tokens_first(tokens_first: Any) -> None:
    found = named_axes(tokens_first)
    core = next(s for s in tokens_first.sites if isinstance(s, AttentionSite))
    nodes = {n.name: n for n in tokens_first.module.graph.nodes}
    assert found.words(nodes[core.nodes[0]]) == ("batch", "head", "token", "width")
    joint = [n for n in nodes.values() if found.words(n) == ("token", "batch*head", "width")]
    assert len(joint) >= 3, "queries, keys and values have samples and heads on one axis"
    (result,) = (n.all_input_nodes for n in nodes.values() if n.op == "output")
    assert found.words(result[0]) == ("token", "batch", "width")
    assert (found.place(result[0], "batch"), found.place(result[0], "token")) == (1, 0)


class Grouped(nn.Module):
    """Attention with grouped queries, whose groups are expanded, and a gated block."""

    def __init__(self, groups: int, times: int, dim: int, inner: int) -> None:
        super().__init__()
        self.groups, self.times, self.dim = groups, times, dim
        width = groups * times * dim
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, groups * dim), nn.Linear(width, groups * dim)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, -1, self.dim).transpose(1, 2)
        k, v = (self._spread(m(x), b, t) for m in (self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))

    def _spread(self, x: Tensor, b: int, t: int) -> Tensor:
        x = x.view(b, t, self.groups, self.dim).transpose(1, 2)[:, :, None]
        return x.expand(b, self.groups, self.times, t, self.dim).reshape(b, -1, t, self.dim)


def grouped(groups: int, times: int, dim: int, inner: int, batch: int, tokens: int) -> Any:
    torch.manual_seed(0)
    model = Grouped(groups, times, dim, inner).eval()
    return peftfx.capture(model, (torch.randn(batch, tokens, groups * times * dim),))


def test_sizes_that_coincide_say_nothing() -> None:
    """Every value has the same words, whether all sizes are equal, at random, or none are."""
    wanted = words(grouped(2, 3, 5, 37, 7, 11))
    assert wanted["q.weight"] == ("group*head*width", "width")
    assert wanted["k.weight"] == ("group*width", "width")
    assert wanted["down.weight"] == ("width", "channel")
    draw = random.Random(3)
    sizes = [(4, 4, 4, 64, 4, 4), (2, 2, 4, 16, 16, 16)]
    sizes += [(*(draw.choice((2, 4)) for _ in range(3)), draw.choice((8, 16)), 4, 4)]
    for drawn in sizes:
        assert words(grouped(*drawn)) == wanted, drawn


class Permuted(Interpreter):
    """Values by node, for inputs whose samples come in another order."""

    def __init__(self, program: Any) -> None:
        super().__init__(program.module)
        self.values: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.values[n] = result.detach()
        return result


def places(found: NamedAxes, node: Node) -> list[tuple[int, tuple[str | None, ...]]]:
    """Axes along which samples lie, and the words of each in order."""
    return [(k, tuple(f.kind for f in a)) for k, a in enumerate(found.of(node))
            if a is not None and "batch" in {f.kind for f in a}]  # fmt: skip


def reordered(value: Tensor, place: int, kinds: tuple[str | None, ...], order: Tensor) -> Tensor:
    shape, at = value.shape[place], kinds.index("batch")
    if len(kinds) == 1:
        return value.index_select(place, order)
    rows = len(order)
    sizes = (rows, shape // rows) if at == 0 else (shape // rows, rows)
    return value.unflatten(place, sizes).index_select(place + (at > 0), order).flatten(
        place, place + 1
    )  # fmt: skip


@pytest.mark.parametrize("name", ["decoder", "fused", "tokens_first", "resnet"])
def test_samples_lie_along_the_axes_called_batch(
    captured: Any, zoo: Any, tokens_first: Any, name: str
) -> None:
    """Samples in another order are the same values in that order, along just these axes."""
    programs = {"tokens_first": lambda: tokens_first, "resnet": lambda: zoo["resnet"]}
    program = programs[name]() if name in programs else captured[name][1]
    found = named_axes(program)
    order = torch.tensor([2, 0, 1])
    inputs = {n: t.detach() for n, t in program.sample.items()}
    batch = program.spec.of_kind("batch")[0]
    axes = {i.name: i.shape.index(batch) for i in program.spec.inputs}
    one, other = Permuted(program), Permuted(program)
    with torch.no_grad():
        one.run(*inputs.values(), enable_io_processing=False)
        turned = [t.index_select(axes[n], order) for n, t in inputs.items()]
        other.run(*turned, enable_io_processing=False)
    checked = 0
    for node, value in one.values.items():
        at = places(found, node)
        if not at:
            torch.testing.assert_close(other.values[node], value, rtol=1e-4, atol=1e-5)
            continue
        assert len(at) == 1, node
        wanted = reordered(value, *at[0], order)
        torch.testing.assert_close(other.values[node], wanted, rtol=1e-4, atol=1e-5)
        checked += 1
    assert checked > 20


def test_a_prompt_has_tokens(captured: Any) -> None:
    program = peftfx.run(captured["decoder"][1], "prompt_tuning{length=3}")
    found = named_axes(program)
    core = next(s for s in program.sites if isinstance(s, AttentionSite))
    nodes = {n.name: n for n in program.module.graph.nodes}
    assert found.words(nodes[core.nodes[0]]) == ("batch", "group*head", "token", "width")
    (prompt,) = (n for n, _ in program.module.named_parameters() if n.endswith(".prompt"))
    assert found.words(prompt)[1] == "width"


def test_low_rank_branches_have_a_rank(captured: Any) -> None:
    program = peftfx.run(captured["decoder"][1], "lora{where=q}")
    found = named_axes(program)
    path = next(a.path for a in program.attachments)
    assert found.words(f"{path}.a") == ("rank", "width")
    assert found.words(f"{path}.b") == ("group*head*width", "rank")


def test_branches_of_other_weights_have_their_axes(zoo: Any, captured: Any) -> None:
    """An embedding reads ids, a convolution pixels, experts have one part each."""
    cases = {
        "lora{rank=2,where=embedding.token}": ("decoder", ("rank", "?"), ("width", "rank")),
        "lora{rank=2,where=conv}": ("resnet", ("rank", "channel*?"), ("channel", "rank")),
        "lora{rank=2,where=experts}": ("mixtral", ("expert", "rank", "?"), ("expert", "?", "rank")),
    }
    for recipe, (name, a, b) in cases.items():
        base = zoo[name] if name in ("resnet", "mixtral") else captured[name][1]
        program = peftfx.run(base, recipe)
        found = named_axes(program)
        path = program.attachments[1 if name == "resnet" else 0].path  # the first reads colours
        assert (found.words(f"{path}.a"), found.words(f"{path}.b")) == (a, b), recipe


def test_text_shows_them(captured: Any) -> None:
    program = captured["fused"][1]
    text = program.text(axes=True)
    assert "%view = view(%getitem, " in text
    shown = {line.split(" = ")[0].strip(): line for line in text.splitlines() if " = " in line}
    assert shown["%view"].endswith("  # batch, token, head, width")
    assert "# @layers.0.out.weight: width, head*width" in text
    assert program.text() == "\n".join(
        line.split("  # ")[0] for line in text.splitlines() if not line.startswith("# @")
    ) + "\n"  # fmt: skip


HEADS: Axis = (Factor("head", 4), Factor("width", 8))


def test_what_two_findings_say_together() -> None:
    assert joined(axis("width", 32), HEADS) == HEADS
    assert joined(HEADS, (Factor("group", 2), Factor(None, 2), Factor(None, 8))) == (
        Factor("group", 2), Factor("head", 2), Factor("width", 8),
    )  # fmt: skip
    assert joined(axis("token", 32), HEADS) is None
    assert joined(axis("width", 32), axis("channel", 32)) is None
    assert joined(axis("width", 32), (Factor(None, 4), Factor(None, 8))) == axis("width", 32)


def test_products_part_and_merge() -> None:
    assert split(HEADS, (4, 8)) == [axis("head", 4), axis("width", 8)]
    assert split(HEADS, (8, 4)) == [None, None]
    assert split(axis("width", 32), (4, 8)) == [None, None]
    assert merged([axis("batch", 3), None], (3, 7)) == (Factor("batch", 3), Factor(None, 7))


def test_pieces_of_a_product_are_some_of_its_slowest_factor() -> None:
    assert piece(HEADS, 8, 16) == (Factor("head", 2), Factor("width", 8))
    assert piece(HEADS, 4, 16) is None
    assert piece(axis("token", 9), None, 5) == axis("token", 5)
    assert whole([HEADS, HEADS], 64) == (Factor("head", 8), Factor("width", 8))
    assert whole([HEADS, None], 64) is None
