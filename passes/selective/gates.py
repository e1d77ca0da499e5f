"""The gated differences that diff pruning trains: `z w`, z in [0, 1] random while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.hard_concrete import gate_noise, hard_concrete, open_probability
from ...rewriter.edits.calls.call import Value
from ...rewriter.edits.edit import Editor
from ...rewriter.edits.linear.sparse import DenseDelta, Part
from ...rewriter.program.sites import FeedForwardSite
from .neurons import neurons_of

Stretch = tuple[float, float]


class SharedGates(nn.Module):
    """Gates that several tensors share: `forward() -> z`, of the shape of `alpha`."""

    def __init__(self, alpha: Tensor, stretch: Stretch) -> None:
        super().__init__()
        self.alpha, self.stretch = nn.Parameter(alpha), stretch

    def forward(self) -> Tensor:
        noise = gate_noise(self.alpha) if self.training else None
        return hard_concrete(self.alpha, noise, *self.stretch)

    def open(self) -> Tensor:
        """P(z > 0)."""
        return open_probability(self.alpha, *self.stretch)


class GatedDelta(DenseDelta):
    """`z w`; parameters w and alpha of the part's shape, and maybe gates of groups of entries.

    Args:
        alpha: where gates start.
        shape: of the tensor's own group gates, as they are multiplied with w; None: none.
        axis: along which shared gates `gate [n]` (see `SharedGates`) lie, if they are no scalar.
        shared: the path of their module; '': it has none.
    """

    def __init__(
        self, part: Part, stored: Tensor, stretch: Stretch, alpha: float,
        shape: tuple[int, ...] | None, axis: int = 0, shared: str = "",
    ) -> None:  # fmt: skip
        super().__init__(part, stored)
        self.stretch, self.along, self.shared = stretch, axis, shared
        wide = torch.promote_types(stored.dtype, torch.float32)
        zeros = torch.zeros(part.own_shape, dtype=wide, device=stored.device)
        self.w, self.alpha = nn.Parameter(zeros), nn.Parameter(zeros + alpha)
        start = None if shape is None else zeros.new_full(shape, alpha)
        self.group = None if start is None else nn.Parameter(start)

    def _gate(self, alpha: Tensor, random: bool) -> Tensor:
        return hard_concrete(alpha, gate_noise(alpha) if random else None, *self.stretch)

    def _spread(self, gates: Tensor) -> Tensor:
        """Shared gates as they are multiplied with w."""
        if not gates.dim():
            return gates
        sizes = [1] * self.w.dim()
        sizes[self.along] = len(gates)
        return gates.view(sizes)

    def delta(self, random: bool, gate: Tensor | None = None) -> Tensor:
        z = self._gate(self.alpha, random)
        if self.group is not None:
            z = z * self._gate(self.group, random)
        return (z if gate is None else z * self._spread(gate)) * self.w

    def expected(self, separate: bool, gates: Tensor | None = None) -> Tensor:
        """The expected number of open gates.

        Args:
            separate: those of groups of its own beside those of entries; else the entries that
                both leave open.
            gates: P(z > 0) of the shared ones, which count here with `separate=False` only.
        """
        entries = open_probability(self.alpha, *self.stretch)
        groups = [] if gates is None else [self._spread(gates)]
        if self.group is not None:
            groups.append(open_probability(self.group, *self.stretch))
        if separate:
            own = [] if self.group is None else [groups[-1].sum()]
            return torch.stack([entries.sum(), *own]).sum()
        for group in groups:
            entries = entries * group
        return entries.sum()

    def describe(self) -> str:
        return "structured" if self.group is not None or self.shared else ""


class Gates:
    """Makes the gated differences of some tensors, with the gates that these share.

    Args:
        parts: the tensors.
        groups: what has a gate of its own, see `DiffPruning`; '': entries alone.
        alpha: where gates start.
    """

    def __init__(
        self, edit: Editor, parts: Sequence[Part], groups: str, alpha: float, stretch: Stretch
    ) -> None:
        self.edit, self.groups, self.alpha, self.stretch = edit, groups, alpha, stretch
        self.shared = self._layers(parts) if groups == "layer" else {}
        if groups == "neuron":
            self.shared = self._neurons({p.name for p in parts if p.rows is None})
        self.values: dict[Any, Value] = {}

    def branch(self, part: Part) -> tuple[GatedDelta, dict[str, Value]]:
        """The branch of a tensor, and what it reads."""
        stored = self.edit.stored(part.name)
        if part.name not in self.shared:
            own = self._own(part) if self.groups else None
            return GatedDelta(part, stored, self.stretch, self.alpha, own), {}
        key, sizes, axis = self.shared[part.name]
        if key not in self.values:
            start = self.edit.like(part.site).new_full(sizes, self.alpha)
            gates = SharedGates(start, self.stretch)
            self.values[key] = self.edit.share(f"gates_{len(self.values)}", gates)
        value = self.values[key]
        shared = str(value.target)
        delta = GatedDelta(part, stored, self.stretch, self.alpha, None, axis, shared)
        return delta, {"gate": value}

    def _own(self, part: Part) -> tuple[int, ...]:
        """The shape of a tensor's own group gates."""
        sizes = part.own_shape
        if self.groups not in ("row", "column") or len(sizes) == 1:
            return ()
        conv, last = part.site.kind == "conv", len(sizes) - 1
        other = 1 - part.axis if conv else last - (part.axis == last)
        axis = part.axis if self.groups == "row" else other
        return tuple(size if k == axis else 1 for k, size in enumerate(sizes))

    def _layers(self, parts: Sequence[Part]) -> dict[str, tuple[Any, tuple[int, ...], int]]:
        """By tensor: its layer, the shape of the gates there, the axis that they lie along."""
        return {
            p.name: ((p.site.stream, p.site.layer), (), 0)
            for p in parts
            if p.site.layer is not None
        }

    def _neurons(self, names: set[str]) -> dict[str, tuple[Any, tuple[int, ...], int]]:
        """The same for the tensors of feed-forward blocks, as far as they hold nothing else."""
        found: dict[str, tuple[Any, tuple[int, ...], int]] = {}
        for block in self.edit.program.sites:
            if isinstance(block, FeedForwardSite):
                for name, own in neurons_of(self.edit.program, block, True).items():
                    if own.alone and name in names:
                        found[name] = block.down, (own.index.shape[1],), own.axis
        return found
