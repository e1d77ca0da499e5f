"""Groups of consecutive layers, and how large the parts of a group are for so many parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from ...rewriter.program.sites import (
    AttentionSite,
    ConvSite,
    LinearSite,
    NormSite,
    Site,
    SublayerSite,
)
from ...rewriter.program.state import State

GROUPINGS: Mapping[str, tuple[int, int, int, int]] = {
    "spindle": (1, 2, 2, 1), "uniform": (1, 1, 1, 1), "increasing": (1, 2, 3, 4),
    "decreasing": (4, 3, 2, 1), "bottleneck": (2, 1, 1, 2),
}  # fmt: skip
"""How many layers four groups have, in proportion."""

ALLOCATIONS: Mapping[str, tuple[float, float, float, float]] = {
    "uniform": (1, 1, 1, 1), "increasing": (0.4, 0.8, 1.2, 1.6), "decreasing": (1.6, 1.2, 0.8, 0.4),
}  # fmt: skip
"""How large the parts of each group's layers are, as multiples of the mean."""


def group_sizes(depth: int, grouping: str) -> tuple[int, ...]:
    """How many of `depth` layers each group has; few layers leave groups empty."""
    shares = GROUPINGS[grouping]
    ends = [math.floor(depth * sum(shares[:k]) / sum(shares) + 0.5) for k in range(5)]
    return tuple(end - start for start, end in itertools.pairwise(ends))


def grouped(program: State, grouping: str) -> tuple[list[Site], ...]:
    """The sites of each group, in every stream of layers; what is in no layer is in none."""
    depths: dict[str, int] = {}
    for site in program.sites:
        if site.layer is not None:
            depths[site.stream] = max(depths.get(site.stream, 0), site.layer + 1)
    groups: tuple[list[Site], ...] = ([], [], [], [])
    for site in program.sites:
        if site.layer is not None:
            groups[_group(site.layer, group_sizes(depths[site.stream], grouping))].append(site)
    return groups


def _group(layer: int, sizes: Sequence[int]) -> int:
    return next(k for k in range(len(sizes)) if layer < sum(sizes[: k + 1]))


def layers(sites: Sequence[Site]) -> int:
    """How many layers sites are in."""
    return len({(s.stream, s.layer) for s in sites})


def cost(letter: str, program: State, sites: Sequence[Site]) -> tuple[int, int]:
    """(fixed, by size): parameters of an adapter behind each feed-forward block (`a`), LoRA at
    queries and values (`l`), prefixes (`p`) or biases (`b`) at sites, as `fixed + by * size`."""
    linear = [s for s in sites if isinstance(s, LinearSite)]
    if letter == "a":
        widths = [s.width for s in sites if isinstance(s, SublayerSite) and s.role == "ffn"]
        return sum(widths), sum(2 * w + 1 for w in widths)
    if letter == "l":
        return 0, sum(s.in_features + s.out_features for s in linear if s.role in ("q", "v"))
    if letter == "p":
        attentions = [s for s in sites if isinstance(s, AttentionSite) and not s.cross]
        ids = {name for s in attentions for name in (s.k, s.v)}
        return 0, sum(s.out_features for s in linear if s.id in ids)
    stored = program.base.base_tensors()
    norms = [s.bias for s in sites if isinstance(s, NormSite) and s.bias is not None]
    convolutions = sum(s.channels[1] for s in sites if isinstance(s, ConvSite))
    biases = sum(s.out_features for s in linear if s.role != "head")
    return biases + convolutions + sum(stored[n].numel() for n in norms), 0


def sizes_within(
    word: str, program: State, sites: Sequence[Site], parameters: float
) -> dict[str, int]:
    """The size of each part of a group, of equal costs that come to at most so many parameters;
    below 1 where that is too few."""
    costs = {letter: cost(letter, program, sites) for letter in word}
    sized = [letter for letter, (_, by) in costs.items() if by]
    fixed = sum(first for first, by in costs.values() if not by)
    share = (parameters - fixed) / max(1, len(sized))
    return {n: math.floor((share - costs[n][0]) / costs[n][1]) for n in sized}
