"""What lies above what: which sites a site's value flows into, and how many layers."""

from __future__ import annotations

from collections.abc import Mapping

from ..graph.flow import site_nodes
from ..program.sites import Site
from ..program.state import State


def downstream(program: State) -> dict[str, frozenset[str]]:
    """By the id of each site, the ids of those that its values flow into, itself aside."""
    sites = list(program.sites)
    nodes = site_nodes(program.module)
    bits = {name: 0 for name in nodes}
    for place, site in enumerate(sites):
        for name in site.nodes:
            bits[name] |= 1 << place
    reached: dict[object, int] = {}
    for node in reversed(program.module.graph.nodes):
        below = 0
        for user in node.users:
            below |= reached[user] | bits[str(user.meta.get("call", user.name))]
        reached[node] = below
    found: dict[str, frozenset[str]] = {}
    for place, site in enumerate(sites):
        flows = 0
        for name in site.nodes:
            flows |= reached[nodes[name]]
        flows &= ~(1 << place)
        found[site.id] = frozenset(s.id for k, s in enumerate(sites) if flows >> k & 1)
    return found


def layers_above(program: State) -> dict[str, int]:
    """By the id of each site, how many layers stand between it and the outputs, on the longest way;
    its own does not count.

    Where streams follow one another (an encoder's and a decoder's, the stages of a vision model),
    the layers of all of them count; beside one another, each counts its own.
    """
    flows = downstream(program)
    layer = {s.id: _layer(s) for s in program.sites if s.layer is not None}
    above: dict[object, set[object]] = {own: set() for own in layer.values()}
    for site, own in layer.items():
        above[own] |= {layer[i] for i in flows[site] if i in layer} - {own}
    heights: dict[object, int] = {}
    for own in sorted(above, key=lambda one: len(above[one])):
        shared = {one for one in above[own] if own in above[one]}  # layers with the same weights
        heights[own] = _next(above[own] - shared, heights) + len(shared)
    return {
        s.id: heights[layer[s.id]] if s.id in layer
        else _next({layer[i] for i in flows[s.id] if i in layer}, heights)
        for s in program.sites
    }  # fmt: skip


def _layer(site: Site) -> tuple[str, int | None]:
    return site.stream, site.layer


def _next(above: set[object], heights: Mapping[object, int]) -> int:
    """One more than the largest number of the layers above."""
    return max((heights[one] + 1 for one in above), default=0)
