"""Where the neurons of a feed-forward block lie in its stored tensors, and what trains these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...rewriter.edits.linear.sparse import DenseDelta, Part, PartialDelta, SliceDelta
from ...rewriter.program.sites import FeedForwardSite, LinearSite
from ...rewriter.program.state import State


@dataclass(frozen=True)
class Neurons:
    """The slices of one stored tensor that belong to the neurons of a block.

    Attributes:
        site: the linear.
        axis: of the tensor that the slices are taken along.
        index: `[k, neurons]`, int64; k is 2 where one tensor holds the rows of two matrices.
        first: it stands before the activation.
        matrix: it is no bias.
    """

    site: LinearSite
    axis: int
    index: Tensor
    first: bool
    matrix: bool

    @property
    def alone(self) -> bool:
        """Whether the tensor holds these slices and nothing else, in order."""
        return len(self.index) == 1 and self.site.features is None


def neurons_of(program: State, block: FeedForwardSite, bias: bool) -> dict[str, Neurons]:
    """By stored tensor, the rows of the first matrix (and of a gate's) and, with `bias`, the
    entries of their biases, and the columns of the last matrix; nothing for stacks of experts."""
    found: dict[str, Neurons] = {}
    for own in (block.up, block.gate, block.down):
        matrix = program.sites[own] if own else None
        if not isinstance(matrix, LinearSite):
            continue
        first = own != block.down
        features = range(matrix.out_features if first else matrix.in_features)
        index = torch.tensor(matrix.features if first and matrix.features else features)[None]
        names = {matrix.weight: int(matrix.in_out == first)}
        if bias and matrix.bias and first:
            names[matrix.bias] = 0
        for name, axis in names.items():
            rows = torch.cat([found[name].index, index]) if name in found else index
            found[name] = Neurons(matrix, axis, rows, first, name == matrix.weight)
    return found


class PrimedDelta(DenseDelta):
    """All of a block's tensor trains; settles to the slices of the learners along `slices`."""

    def __init__(self, part: Part, stored: Tensor, slices: int) -> None:
        super().__init__(part, stored)
        wide = torch.promote_types(stored.dtype, torch.float32)
        self.w = nn.Parameter(torch.zeros(part.shape, dtype=wide, device=stored.device))
        self.slices = slices

    def delta(self, random: bool, /, *_: Any, **reads: Any) -> Tensor:
        del random, reads
        return self.w

    def settled(self, **decided: Any) -> PartialDelta | None:
        indices: Tensor = decided["indices"].to(self.w.device)
        if not len(indices):
            return None
        values = self.w.detach().index_select(self.slices, indices)
        return SliceDelta(indices, values * decided["kept"], self.slices)
