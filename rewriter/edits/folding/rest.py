"""What rounding would leave of a change before anything is folded, and what to do about it.

A weight in few bits holds no small change: rounding error is noise of the size of the weight's last
bit, as large at every singular value, so no branch of low rank catches it afterwards. What is of
low rank is the change itself. So `parted` takes its largest singular values out before anything is
rounded, for a branch in full precision beside the weight, and folds the rest alone:

    W + D  =  round(W + (D - b a))  +  b a  +  error,    |error| <= |D - b a| element by element

since W itself is a number of that format. Where the change has no more than `rank` of them, the
weight stays as it is bit for bit, and nothing is lost but in the branch's own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...branches.branch import Branch
from ...errors import VerifyError
from ...program.sites import WeightSite
from ...weights.blocks import widest
from ...weights.certificate import exact_of
from ...weights.verdict import Verdict, product, square
from ...weights.weight import Weight
from ..calls.attach import Attaching
from ..linear.forms import store_as
from .result import Folding

_SPARE, _ROUNDS = 8, 4
"""Of the subspace iteration (Halko et al. 2011, algorithm 4.4): further columns, and rounds."""
_ALIKE = 1.5
"""Where the rest is larger than what rounding loses, both errors are a last bit's noise."""
_SMALL = 512
"""Up to so many rows or columns, all singular values are computed."""


@dataclass(frozen=True)
class Parted:
    """A changed weight without the largest part of its change.

    Attributes:
        rest: `[count * out, in]`, in float64.
        parts: by site, that part as factors `(b [out, rank], a [rank, in])`, or of a stack
            `[count, ...]`.
    """

    rest: Tensor
    parts: Mapping[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def foreseen(weight: Weight, branches: Sequence[tuple[str, Branch]]) -> Verdict:
    """What storing a weight with its branches again would leave of their change."""
    old, exact = exact_of(weight.matrix(), ()), exact_of(weight.matrix(), branches)
    return left_of(old, exact, weight.packed_again(exact.to(_wide(weight))).dense())


@torch.no_grad()
def left_of(old: Tensor, exact: Tensor, now: Tensor) -> Verdict:
    """What is left of the change from `old` to `exact` where a weight is `now`."""
    change = exact - old
    error, size = exact - now.to(exact), square(change)
    if not size:
        return Verdict(0.0)
    lost = square(error)
    return Verdict(0.0, math.sqrt(lost / size), 1 - product(error, change) / size)


@torch.no_grad()
def parted(
    exact: Tensor, old: Tensor, sites: Sequence[WeightSite], rank: int, dtype: torch.dtype
) -> Parted:
    """The largest part of a change at each site, and the weight without it.

    Args:
        exact, old: the weight with its branches, and as it was, `[count * out, in]` in float64.
        sites: whose branches changed it; those of a fused weight have rows of their own.
        rank: of each part, of each matrix of a stack.
        dtype: of the factors.
    """
    rest, parts = exact.clone(), dict[str, tuple[Tensor, Tensor]]()
    for site in {s.id: s for s in sites}.values():
        count, out, size = site.matrices
        shape = (count, -1, exact.shape[1])
        rows = slice(None) if site.features is None else list(site.features)
        change = (exact - old).view(shape)[:, rows]
        if not bool(change.any()):
            continue
        pairs = [largest(matrix, min(rank, out, size)) for matrix in change]
        b, a = (torch.stack(each).to(dtype) for each in zip(*pairs, strict=True))
        rest.view(shape)[:, rows] -= b.to(exact) @ a.to(exact)
        parts[site.id] = (b, a) if count > 1 else (b[0], a[0])
    return Parted(rest, parts)


def _wide(weight: Weight) -> torch.dtype:
    """What packs again: a dense weight is rounded once, from float64."""
    dense = weight.dense()
    return widest(dense) if weight.is_dense else torch.promote_types(dense.dtype, torch.float32)


def largest(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The part of a matrix with its largest singular values, `b [out, rank]` times `a [rank, in]`.

    Args:
        change: `[out, in]`, in float64.
        rank: at most the smaller side.
    """
    if min(change.shape) <= _SMALL:
        u, s, v = torch.linalg.svd(change, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        count = min(rank + _SPARE, *change.shape)
        start = torch.randn(change.shape[1], count, generator=generator, dtype=torch.float64)
        q = torch.linalg.qr(change @ start.to(change)).Q
        for _ in range(_ROUNDS):
            q = torch.linalg.qr(change @ torch.linalg.qr(change.mT @ q).Q).Q
        u, s, v = torch.linalg.svd(q.mT @ change, full_matrices=False)
        u = q @ u
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


@torch.no_grad()
def rest_of(
    name: str, folded: Weight, old: Tensor, exact: Tensor, rest: Tensor
) -> tuple[Weight, Verdict]:
    """A weight that stores the rest of a change, and what is left with the part beside it.

    Args:
        name: of the weight, for errors.
        folded: the weight with the whole change.
        old, exact, rest: see `parted`.

    Raises:
        VerifyError: that is further off than the folded weight.
    """
    stored = folded.packed_again(rest.to(_wide(folded)))
    verdict = left_of(old, exact, stored.dense() + (exact - rest))
    before = left_of(old, exact, folded.dense())
    if verdict.lost > before.lost * _ALIKE + 1e-12:
        raise VerifyError(
            f"{name}: with a branch of low rank beside it, the weight is further off than folded "
            f"({verdict.lost:.3g}, {before.lost:.3g} of the change). Use mode=fold."
        )
    return stored, verdict


@torch.no_grad()
def put_rest(
    edit: Attaching, names: Sequence[str], old: Tensor, exact: Tensor, result: Folding
) -> None:
    """Stores a weight without the largest part of its change, which `result` has from then on.

    Args:
        names: the sites of the branches, which are folded already.
        old, exact: see `parted`.

    Raises:
        VerifyError: that is further off than the folded weight.
    """
    sites = [s for s in map(edit.program.sites.__getitem__, names) if isinstance(s, WeightSite)]
    weight, site = edit.weight(sites[0]), sites[0]
    done = parted(exact, old, sites, result.rank, edit.like(site).dtype)
    rest, verdict = rest_of(site.id, weight, old, exact, done.rest)
    if weight.is_dense:
        rest.store()
    else:
        store_as(edit, site, rest)
    edit.refresh()
    result.parts |= done.parts
    result.measured(site.id, verdict, weight.format.said)
    if site.id in result.packed:
        result.packed[site.id] = verdict.said(weight.format.said)
