"""What takes the place of many entries: a module beside their matrix, or a vector whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...rewriter.branches.bottleneck import BottleneckBranch
from ...rewriter.branches.branch import Axes
from ...rewriter.branches.input_shift import OutputShift
from ...rewriter.branches.shapes import linear
from ...rewriter.edits.linear.sparse import Part, SparseDelta
from ...rewriter.edits.read import Reading
from ...rewriter.program.sites import LinearSite
from ...rewriter.scores.cost import Unit, cost
from ...rewriter.scores.entries import Place
from ..reparameterized.initial_factors import rank_obstacle
from ..reparameterized.lora import LoRABranch, low_rank_parameters

_TOKENS = 128
"""For which FLOPs and seconds are counted."""


class OutputAdapter(OutputShift):
    """`z + U gelu(D z + b_D) + b_U` behind a linear; `down [rank, out]`, `up [out, rank]`."""

    not_foldable = BottleneckBranch.not_foldable
    axes: ClassVar[Axes] = {
        "down": ("rank", "out"), "down_bias": ("rank",), "up": ("out", "rank"), "up_bias": ("out",),
    }  # fmt: skip

    def __init__(self, down: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(torch.zeros_like(down.T))
        self.down_bias = nn.Parameter(down.new_zeros(down.shape[0]))
        self.up_bias = nn.Parameter(down.new_zeros(down.shape[1]))

    def shift(self, e: Tensor, /, *_: Any, **reads: Any) -> Tensor:
        return linear(F.gelu(linear(e, self.down, self.down_bias)), self.up, self.up_bias)

    def describe(self) -> str:
        return f"bottleneck={len(self.down)}"


class Options(Protocol):
    """Of a method that puts modules in the place of entries."""

    @property
    def unit(self) -> Unit: ...
    @property
    def form(self) -> str | None: ...
    @property
    def rank(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def alpha(self) -> float: ...
    @property
    def beta(self) -> float: ...


def module_at(
    options: Options, site: LinearSite, generator: torch.Generator
) -> LoRABranch | OutputAdapter:
    """The module of a linear, freshly initialised: it adds nothing yet."""
    if options.form == "lora":
        return LoRABranch(*low_rank_parameters(site, options.rank, generator), 1.0, options.dropout)
    down = torch.empty(options.rank, site.out_features)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    return OutputAdapter(down)


def modules_of(options: Options, look: Reading, part: Part) -> Iterator[Place]:
    """The entries of each site of a part, where it is told which are whose, with what may take
    their place."""
    stored = look.stored(part.name).detach()
    entry = _entry(stored, options.unit)
    rows: list[Any] = [getattr(s, "features", None) for s in part.sites]
    pieces = [part]
    if (
        len(rows) > 1
        and None not in rows
        and len({f for r in rows for f in r}) == sum(map(len, rows))
    ):
        pieces = [replace(part, sites=(s,), rows=r) for s, r in zip(part.sites, rows, strict=True)]
    for piece in pieces:
        yield _place(options, look, piece, entry, stored)


def _entry(stored: Tensor, unit: Unit) -> float:
    """What training one entry of a tensor costs: a share of what one of a hundred costs."""
    count = max(1, stored.numel() // 100)
    index = torch.arange(count, dtype=torch.int32, device=stored.device)
    sparse = SparseDelta(index, torch.zeros(count, dtype=_wide(stored), device=stored.device))
    return cost(sparse, [stored], unit) / count or 1.0  # it is added, and no product


def _place(options: Options, look: Reading, piece: Part, entry: float, stored: Tensor) -> Place:
    if len(piece.shape) == 1:
        turn = math.ceil(piece.count / options.beta)
        return Place(piece, entry, "whole", entry * piece.count, turn)
    site: Any = piece.site
    if options.form is None or len(piece.sites) > 1 or not _fits(options, look, site):
        return Place(piece, entry)
    module = module_at(options, site, torch.Generator()).to(stored.device, _wide(stored))
    width = site.in_features if options.form == "lora" else site.out_features
    x = torch.zeros(_TOKENS, width, dtype=_wide(stored), device=stored.device)
    price = cost(module, [x], options.unit)
    if price >= entry * piece.count:
        return Place(piece, entry)
    return Place(
        piece, entry, options.form, price, max(1, math.ceil(price / options.alpha / entry))
    )


def _wide(stored: Tensor) -> torch.dtype:
    """What trains at a tensor."""
    return torch.promote_types(stored.dtype, torch.float32)


def _fits(options: Options, look: Reading, site: Any) -> bool:
    """Whether the module can stand at a site."""
    if not isinstance(site, LinearSite) or site.tied or look.obstacle(site):
        return False
    part_of_call = site.features is not None or site.left
    if options.form == "adapter":
        return not part_of_call and options.rank <= site.out_features
    return not rank_obstacle(options.rank, options.dropout, site)
