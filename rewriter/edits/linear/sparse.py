"""Changes of stored tensors entry by entry: what chosen sites hold of them, and the expressions
that add to all of that, to a few entries or to some rows (`scores/entries.py` chooses them)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...branches.branch import Expression
from ...graph.aten import attribute
from ...program.sites import ConvSite, EmbeddingSite, ExpertsSite, LinearSite, NormSite, Site
from ...program.state import State
from ...weights.weight import stored_weights


@dataclass(frozen=True)
class Part:
    """What the chosen sites hold of one stored tensor: all of it, or slices along one axis.

    Attributes:
        sites: those that share the tensor.
        name: of the tensor.
        shape: of the whole tensor.
        axis, rows: the slices that belong to the sites (features of a fused weight); None: all.
    """

    sites: tuple[Site, ...]
    name: str
    shape: tuple[int, ...]
    axis: int = 0
    rows: tuple[int, ...] | None = None

    @property
    def site(self) -> Site:
        """The first of the sites, where an expression of the tensor is attached."""
        return self.sites[0]

    @property
    def own_shape(self) -> tuple[int, ...]:
        """The shape of the part."""
        sizes = list(self.shape)
        if self.rows is not None:
            sizes[self.axis] = len(self.rows)
        return tuple(sizes)

    @property
    def count(self) -> int:
        """How many entries the part has."""
        return math.prod(self.own_shape)

    def own(self, whole: Tensor) -> Tensor:
        """The part of a tensor of the whole shape."""
        if self.rows is None:
            return whole
        return whole.index_select(self.axis, torch.tensor(self.rows, device=whole.device))

    def whole(self, index: Tensor) -> Tensor:
        """Flat indices into the whole tensor for flat indices into the part (int64)."""
        if self.rows is None:
            return index
        places = list(torch.unravel_index(index, self.own_shape))
        places[self.axis] = torch.tensor(self.rows, device=index.device)[places[self.axis]]
        flat = torch.zeros_like(index)
        for size, place in zip(self.shape, places, strict=True):
            flat = flat * size + place
        return flat


def parts_of(
    program: State, sites: Iterable[Site], bias: bool = True
) -> tuple[list[Part], list[tuple[Site, str]]]:
    """What sites hold of stored tensors, each tensor once, whoever shares it.

    Args:
        program: whose tensors.
        sites: linears, experts, convolutions, norms or embeddings.
        bias: with the biases.

    Returns:
        The parts, and (site, reason) of tensors that are none: not of a floating-point type, or
        trained by another adapter already.
    """
    spans: dict[str, list[tuple[Site, int, tuple[int, ...] | None]]] = {}
    for site in sites:
        for name, axis in _names(site, bias):
            features = getattr(site, "features", None)
            spans.setdefault(name, []).append((site, axis, features))
    parts: list[Part] = []
    left: list[tuple[Site, str]] = []
    packed = stored_weights(program)
    for name, owners in spans.items():
        chosen, axis = tuple(site for site, _, _ in owners), owners[0][1]
        few = packed.get(name)
        tensor = nn.Parameter(few.tensor()) if few else attribute(program.module, name)
        if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            left.append((chosen[0], f"{name} is not a floating-point parameter"))
            continue
        owner = program.tensors.owner(name)
        if owner is not None:
            owner = f"the adapter {owner!r}" if owner else "the program itself"
            left.append((chosen[0], f"{owner} trains {name} already"))
            continue
        shape = tuple(tensor.shape)
        rows: set[int] = set()
        for _, _, features in owners:
            rows |= set(range(shape[axis]) if features is None else features)
        some = tuple(sorted(rows)) if len(rows) < shape[axis] else None
        parts.append(Part(chosen, name, shape, axis, some))
    return parts, left


def _names(site: Site, bias: bool) -> list[tuple[str, int]]:
    """The stored tensors of a site, with the axis that its features are on."""
    if isinstance(site, ExpertsSite):
        return [(site.weight, site.axes[0])]
    if isinstance(site, EmbeddingSite):
        return [(site.weight, 0)]
    if not isinstance(site, LinearSite | ConvSite | NormSite):
        return []
    names = [(site.weight, int(isinstance(site, LinearSite) and site.in_out))]
    return [*names, (site.bias, 0)] if bias and site.bias else names


class DenseDelta(Expression):
    """`w' = w + delta()` on a part of a stored tensor; settles to a `SparseDelta`.

    Args:
        part: see `parts_of`.
        stored: the whole tensor; the delta adds to its dtype on its device.
    """

    rows: Tensor | None

    def __init__(self, part: Part, stored: Tensor) -> None:
        super().__init__()
        self.piece = part
        rows = None if part.rows is None else torch.tensor(part.rows)
        if rows is not None and not stored.is_meta:  # there, it keeps its values here
            rows = rows.to(stored.device)
        self.register_buffer("rows", rows, persistent=False)

    def delta(self, random: bool, /, *_: Any, **reads: Any) -> Tensor:
        """What is added, of the part's shape, in w's dtype or a wider one.

        Args:
            random: as a forward in training has it, else as in evaluation.
            reads: other values of the graph.
        """
        raise NotImplementedError

    def forward(self, w: Tensor, **reads: Tensor) -> Tensor:
        return self._added(w, self.delta(self.training, **reads))

    def _added(self, w: Tensor, delta: Tensor) -> Tensor:
        if self.rows is None:
            return (w + delta).to(w.dtype)
        return w.index_add(self.piece.axis, self.rows, delta.to(w.dtype))

    def settled(self, **decided: Any) -> PartialDelta | None:
        """What the flat `indices` into the whole tensor keep of it, with the values of all that it
        reads; None if they are none."""
        indices: Tensor = decided.pop("indices")
        if not indices.numel():
            return None
        with torch.no_grad():
            like = self.delta(False, **decided)
            whole = self._added(like.new_zeros(self.piece.shape), like)
            values = whole.flatten()[indices.to(whole.device, torch.int64)]
        return SparseDelta(indices if whole.is_meta else indices.to(whole.device), values)


class PartialDelta(Expression):
    """`w' = w`, plus something at places that stay the same. Other entries stay as they are, bit
    for bit, whatever the optimiser does.

    A forward makes one copy of w, which lives until the backward pass; that makes one gradient of
    w's size for the moment in which the part that trains is taken. Lowered, it is called beside its
    linear and needs neither for longer than that call.
    """

    def added(self, w: Tensor) -> Tensor:
        """w', of w's shape and dtype."""
        raise NotImplementedError

    def places(self) -> tuple[Tensor, Tensor, int | None]:
        """(values, indices, axis) of what is added: at slices along an axis, or None for entries
        of the flat tensor."""
        raise NotImplementedError

    def forward(
        self, w: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """w'; lowered, `linear(x, weight', bias)` for x `[..., in]` in the place of w."""
        if weight is None:
            return self.added(w)
        if self.lowered is None:
            return F.linear(w, self.added(weight), bias)
        operator: Any = self.lowered
        return operator(w, weight, bias, *self.places())


class SparseDelta(PartialDelta):
    """`w' = w`, plus `values [n]` at the flat `indices [n]` of w.

    Args:
        indices: int32 or int64, distinct. They are not part of the state dict: the plan that
            decided them stores them.
        values: of the dtype of w, or wider.
    """

    def __init__(self, indices: Tensor, values: Tensor) -> None:
        super().__init__()
        self.indices: Tensor
        self.register_buffer("indices", indices, persistent=False)
        self.values = nn.Parameter(values)

    def added(self, w: Tensor) -> Tensor:
        flat, values = w.flatten(), self.values.to(w.dtype)
        return flat.scatter_add(0, self.indices.long(), values).view(w.shape)

    def places(self) -> tuple[Tensor, Tensor, int | None]:
        return self.values, self.indices, None

    def describe(self) -> str:
        return f"{self.values.numel():,} entries"


class SliceDelta(PartialDelta):
    """`w' = w`, plus `values` at the slices `indices [n]` along one axis of w.

    Args:
        indices: as of a `SparseDelta`.
        values: of w's shape but for `axis`, which has n slices; of the dtype of w, or wider.
    """

    def __init__(self, indices: Tensor, values: Tensor, axis: int) -> None:
        super().__init__()
        self.indices: Tensor
        self.register_buffer("indices", indices, persistent=False)
        self.values, self.slices = nn.Parameter(values), axis

    def added(self, w: Tensor) -> Tensor:
        return w.index_add(self.slices, self.indices, self.values.to(w.dtype))

    def places(self) -> tuple[Tensor, Tensor, int | None]:
        return self.values, self.indices, self.slices

    def describe(self) -> str:
        return f"{len(self.indices):,} {'rows' if self.slices == 0 else 'columns'}"
