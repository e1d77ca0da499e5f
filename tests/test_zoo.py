"""Every architecture of the zoo has exactly the sites that its source says, whatever its names."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from peftfx.rewriter.graph.aten import attribute, set_attribute
from peftfx.rewriter.program.site_table import Sites
from peftfx.rewriter.program.sites import Site
from peftfx.rewriter.sites.discover import discover

from .conftest import Zoo
from .expect import check, check_rows
from .expected_other import OTHER
from .expected_recent import RECENT
from .expected_text import TEXT
from .zoo import ZOO

EXPECTED = {**TEXT, **RECENT, **OTHER}


def test_every_architecture_has_an_expectation() -> None:
    assert set(EXPECTED) == set(ZOO)


@pytest.mark.parametrize("name", ZOO)
def test_sites_are_what_the_source_says(zoo: Zoo, name: str) -> None:
    check(zoo[name], EXPECTED[name])
    check_rows(zoo[name])


@pytest.mark.parametrize("name", ZOO)
def test_sites_do_not_depend_on_names(zoo: Zoo, name: str) -> None:
    """With all tensors renamed and all traces of modules gone, the same sites are found."""
    program = zoo[name].fork()
    names: dict[str, str] = {}
    for index, node in enumerate(program.module.graph.nodes):
        node.meta.pop("nn_module_stack", None)
        node.meta.pop("stack_trace", None)
        if node.op == "get_attr":
            old = str(node.target)
            fresh = names.setdefault(old, f"z{(index * 7919) % 10007}")
            set_attribute(program.module, fresh, attribute(program.module, old))
            node.target = fresh
    aliases = {f"a{i}": names[c] for i, c in enumerate(program.aliases.values()) if c in names}
    again = discover(program.module, aliases, program.sample)
    assert _nameless(again) == _nameless(program.sites)


def _nameless(sites: Sites) -> list[Any]:
    """Everything that a site says, without the names of tensors."""

    def facts(site: Site) -> dict[str, Any]:
        held = {f.name: getattr(site, f.name) for f in dataclasses.fields(site)}
        return {
            key: item
            for key, item in held.items()
            if isinstance(item, bool | int | None) or key in ("role", "features", "nodes", "kind")
        }

    return [facts(s) for s in sites]


def test_selectors_reach_the_new_kinds(zoo: Zoo) -> None:
    moe, mamba, unet = (zoo[n].sites for n in ("qwen2_moe", "mamba", "unet"))
    assert {s.kind for s in moe.select("experts")} == {"experts"}
    assert len(moe.select("experts and ffn.gate")) == 2
    assert len(moe.select("router")) == 4 and len(moe.select("router and not router.shared")) == 2
    assert len(mamba.select("mixer.in|mixer.out")) == 4
    assert len(mamba.select("mixer", ("linear",))) == 8
    assert len(mamba.select("conv.depthwise")) == 2
    assert len(unet.select("k and cross")) == 4 and len(unet.select("cross", ("sublayer",))) == 4
