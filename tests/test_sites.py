"""Sites: roles, layers and features by dataflow, with and without meaningful names; selectors."""

from __future__ import annotations

from typing import Any

import pytest

import peftfx
from peftfx.rewriter.errors import SelectorError
from peftfx.rewriter.program.site_table import Sites
from peftfx.rewriter.program.sites import AttentionSite, LinearSite
from peftfx.rewriter.sites.discover import discover

from .models import batch, build, scramble

BLOCKS = {
    "encoder": ["q", "k", "v", "o", "ffn.up", "ffn.down"],
    "bert": ["q", "k", "v", "o", "ffn.up", "ffn.down"],
    "decoder": ["q", "k", "v", "o", "ffn.gate", "ffn.up", "ffn.down"],
    "llama": ["q", "k", "v", "o", "ffn.gate", "ffn.up", "ffn.down"],
    "fused": ["q", "k", "v", "o", "ffn.up", "ffn.down"],
}
LAST = {"encoder": "other", "bert": "other", "decoder": "head", "llama": "head", "fused": "head"}


def roles(sites: Sites) -> list[tuple[str, str, int | None]]:
    return sorted((s.kind, s.role, -1 if s.layer is None else s.layer) for s in sites)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_linear_has_its_role(captured: Any, name: str) -> None:
    _, program = captured[name]
    found = [(s.role, s.layer) for s in program.sites if s.kind == "linear"]
    want = [(r, layer) for layer in (0, 1) for r in BLOCKS[name]] + [(LAST[name], None)]
    assert sorted(found, key=str) == sorted(want, key=str)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_have_attention_and_two_sublayers(captured: Any, name: str) -> None:
    _, program = captured[name]
    found = [
        (s.kind, s.role, s.layer) for s in program.sites if s.kind in ("attention", "sublayer")
    ]
    for layer in (0, 1):
        for want in (("attention", "attn"), ("sublayer", "attn"), ("sublayer", "ffn")):
            assert found.count((*want, layer)) == 1
    attention = next(s for s in program.sites if isinstance(s, AttentionSite))
    grouped = name in ("decoder", "llama")
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 2 if grouped else 4, 8)
    assert not attention.cross


@pytest.mark.parametrize("name", BLOCKS)
def test_roles_do_not_depend_on_names(captured: Any, name: str) -> None:
    _, program = captured[name]
    inputs = {n: t for n, t in batch().items() if n in program.spec.names}
    if name in ("bert", "llama"):
        other = peftfx.capture(build(name), kwargs=inputs)
    else:
        other = peftfx.capture(scramble(build(name)), kwargs=inputs)
        weights = {s.weight for s in other.sites if isinstance(s, LinearSite)}
        assert not weights & {s.weight for s in program.sites if isinstance(s, LinearSite)}
    for node in other.module.graph.nodes:
        node.meta.pop("nn_module_stack", None)
        node.meta.pop("stack_trace", None)
    again = discover(other.module, other.aliases, other.sample)
    assert roles(again) == roles(program.sites)


def test_scrambled_parameter_names_of_library_models(captured: Any) -> None:
    """Renames every stored tensor of a captured graph: roles stay."""
    from peftfx.rewriter.graph.aten import attribute, set_attribute

    for name in ("bert", "llama"):
        program = captured[name][1].fork()
        for index, node in enumerate(program.module.graph.nodes):
            if node.op == "get_attr":
                held = attribute(program.module, str(node.target))
                set_attribute(program.module, f"w{index}", held)
                node.target = f"w{index}"
            node.meta.pop("nn_module_stack", None)
        again = discover(program.module, {}, program.sample)
        assert roles(again) == roles(program.sites)


def test_fused_projection_is_split_by_features(captured: Any) -> None:
    _, program = captured["fused"]
    parts = [s for s in program.sites if isinstance(s, LinearSite) and s.features is not None]
    assert [(s.role, s.features) for s in parts[:3]] == [
        ("q", tuple(range(32))), ("k", tuple(range(32, 64))), ("v", tuple(range(64, 96))),
    ]  # fmt: skip
    assert len({s.weight for s in parts}) == 2


def test_tied_head_is_known(captured: Any) -> None:
    _, program = captured["tied"]
    (head,) = program.sites.select("head")
    assert isinstance(head, LinearSite) and head.tied


@pytest.mark.parametrize(
    ("selector", "count"),
    [
        ("q|v", 4), ("q or v", 4), ("q and layer>=1", 1), ("layer in [0] and attn", 4),
        ("linear and not (ffn | attn)", 1), ("query|value", 4), ("name:query", 2),
        ("re:'fc[12]'", 4), ("layers.0.query", 1), ("ffn.up & layer<1", 1), ("ffn", 4),
        ("not head and q", 2), ("layer!=0 and k", 1),
    ],
)  # fmt: skip
def test_selectors(captured: Any, selector: str, count: int) -> None:
    assert len(captured["encoder"][1].sites.select(selector)) == count


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("qeury", "Nearest: .*query"), ("q|valeu", "'valeu' .*in where"), ("layer>=9", "layers 0 to 1"),
        ("q and", "missing"), ("(q", r"'\)'"), ("", "empty"), ("q ?", "malformed"),
        ("q and k", "none of"), ("re:'['", "bad pattern"),
    ],
)  # fmt: skip
def test_selectors_that_match_nothing_help(captured: Any, selector: str, message: str) -> None:
    with pytest.raises(SelectorError, match=message):
        captured["encoder"][1].sites.select(selector)


def test_the_table_shows_every_site(captured: Any) -> None:
    _, program = captured["llama"]
    table = str(program.sites)
    assert all(s.id in table for s in program.sites)
    assert program.sites["s0.layer0.attn"].kind == "sublayer"
