"""Merge arithmetic: what becomes of one tensor of several models, or of several changes of it.

Weighted sums (model soups: Wortsman et al., ICML 2022, arXiv:2203.05482; task arithmetic: Ilharco
et al., ICLR 2023, arXiv:2212.04089), and sums of sparsified changes d_i with weights w_i:

    t_i   = w_i trim(d_i)
    s     = sign(sum_i t_i)                 elected, where the recipe elects
    merge = scale sum_i [sign t_i = s] t_i  / sum_i [sign t_i = s] w_i, where it normalises

    ties          magnitude trim, elected, normalised     Yadav et al., NeurIPS 2023, 2306.01708
    dare, _ties   random trim                             Yu et al., ICML 2024, 2311.03099
    breadcrumbs   without largest and smallest            Davari & Belilovsky, 2023, 2312.06795
    della         random trim by rank of magnitude        Deep et al., 2024, 2406.11617
    slerp         along the sphere                        Shoemake, SIGGRAPH 1985

What is kept of a random trim is divided by the probability of keeping it (`expected`, as in the
papers), or scaled to the old sum of magnitudes (`l1`, as in mergekit). Other defaults, the order of
operations and random numbers are those of mergekit 0.1.5, so that its options give its numbers.
Where magnitudes are equal, the first ones are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...rewriter.errors import OptionError
from ...rewriter.scores.allocate import largest

TRIMS = ("none", "magnitude", "random", "outliers", "ranked")
RESCALES = ("none", "expected", "l1")
_SAME = 0.9995
"""Cosine from which on two tensors have no angle that could be divided by."""


@dataclass(frozen=True)
class Recipe:
    """How changes are trimmed and summed.

    Attributes:
        trim: one of `TRIMS`: keep all, the largest, random ones, all but the largest and smallest,
            or random ones with a probability by the rank of the magnitude in its row.
        elect: keep the entries that have the sign of their sum.
        normalize: divide by the sum of the weights that take part.
        rescale: one of `RESCALES`: what happens to what is kept of a trim.
    """

    trim: str
    elect: bool = False
    normalize: bool = False
    rescale: str = "none"


RECIPES = {
    "task_arithmetic": Recipe("none"),
    "magnitude_prune": Recipe("magnitude"),
    "ties": Recipe("magnitude", elect=True, normalize=True),
    "dare": Recipe("random", rescale="expected"),
    "dare_ties": Recipe("random", elect=True, rescale="expected"),
    "breadcrumbs": Recipe("outliers"),
    "breadcrumbs_ties": Recipe("outliers", elect=True),
    "della": Recipe("ranked", elect=True, normalize=True, rescale="expected"),
    "della_linear": Recipe("ranked", rescale="expected"),
}
"""Method -> its defaults."""


@dataclass(frozen=True)
class Trim:
    """How much of a change is kept.

    Attributes:
        density: the share of entries, in [0, 1].
        gamma: of `outliers`, the share of largest entries that go, in [0, 1].
        epsilon: of `ranked`, by how much probabilities lie around the density.
    """

    density: float = 1.0
    gamma: float = 0.01
    epsilon: float = 0.15

    def check(self, how: str) -> None:
        """Raises OptionError for what no trim can do."""
        for name, share in (("density", self.density), ("gamma", self.gamma)):
            if not 0 <= share <= 1:
                raise OptionError(
                    f"{name}={share:g} is a share of the entries. Choose one from 0 to 1."
                )
        low, high = self.density - self.epsilon, self.density + self.epsilon
        if how == "ranked" and 0 < self.density < 1 and not (low > 0 and high < 1):
            raise OptionError(
                f"density={self.density:g} and epsilon={self.epsilon:g} give probabilities from "
                f"{low:g} to {high:g}. Choose an epsilon with which they stay within 0 and 1."
            )


def weighted(tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """`sum_i w_i x_i`, or divided by `sum_i w_i`; in float32 at least."""
    total = torch.zeros_like(tensors[0], dtype=_wide(tensors[0].dtype))
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.to(total.dtype), alpha=weight)
    return total.div_(sum(weights)) if normalize else total


def merged(
    changes: Sequence[Tensor],
    weights: Sequence[float],
    recipe: Recipe,
    trims: Sequence[Trim] = (),
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The sum of trimmed changes.

    Args:
        changes: of one shape and dtype.
        weights: one each.
        recipe: see `RECIPES`.
        trims: one each; by default everything is kept.
        scale: of the sum (mergekit's `lambda`).
        generator: of random trims, drawn from for one change after the other.
    """
    trims = trims or [Trim()] * len(changes)
    kept = [
        trimmed(change, recipe, trim, generator) * weight
        for change, weight, trim in zip(changes, weights, trims, strict=True)
    ]
    total = kept[0].new_zeros(kept[0].shape)
    divisor = torch.zeros_like(total) if recipe.elect else sum(weights)
    up = sum(kept[1:], kept[0]) >= 0 if recipe.elect else None
    for change, weight in zip(kept, weights, strict=True):
        if up is None:
            total += change
            continue
        agrees = torch.where(up, change > 0, change < 0)
        total += torch.where(agrees, change, 0.0)
        divisor += agrees * weight
    if recipe.normalize:
        total /= _nonzero(divisor)
    return total if scale == 1 else total * scale


def _nonzero(divisor: Tensor | float) -> Tensor | float:
    if isinstance(divisor, Tensor):
        return torch.where(divisor == 0, 1.0, divisor)
    return divisor if abs(divisor) >= 1e-8 else 1.0


def trimmed(
    change: Tensor, recipe: Recipe, trim: Trim, generator: torch.Generator | None = None
) -> Tensor:
    """What a recipe keeps of a change, the rest being zero."""
    trim.check(recipe.trim)
    if recipe.trim == "none" or trim.density >= 1 or not change.numel():
        return change
    if trim.density <= 0 and recipe.trim != "outliers":
        return torch.zeros_like(change)
    if recipe.trim in ("magnitude", "outliers"):
        return _rescaled(change, change * _mask(change, recipe.trim, trim), recipe.rescale)
    wide = change.to(_wide(change.dtype))
    share = torch.full_like(wide, trim.density, dtype=torch.float32)
    if recipe.trim == "ranked":
        share = _by_rank(wide, trim)
    kept = wide * torch.bernoulli(share, generator=generator)
    if recipe.rescale == "expected":
        return (kept / share).to(change.dtype)
    return _rescaled(wide, kept, recipe.rescale).to(change.dtype)


def _mask(change: Tensor, how: str, trim: Trim) -> Tensor:
    """1 where an entry is kept."""
    sizes, count = change.abs().flatten(), change.numel()
    wanted = int(trim.density * count)
    if how == "magnitude":
        return _largest(sizes, max(1, wanted)).view(change.shape)
    small = max(0, count - wanted - int(trim.gamma * count))  # less outliers go than density asks
    return (_largest(sizes, count - small) - _largest(sizes, count - small - wanted)).view(
        change.shape
    )


def _largest(sizes: Tensor, count: int) -> Tensor:
    mask = torch.zeros_like(sizes)
    if count:
        mask[largest([("", sizes)], count)[""]] = 1
    return mask


def _by_rank(change: Tensor, trim: Trim) -> Tensor:
    """The probability of keeping each entry: within its row, larger ones stay more often."""
    rows = change if change.dim() > 1 else change.unsqueeze(0)
    order = rows.abs().argsort(dim=1, stable=True)
    ranks = order.argsort(dim=1, stable=True).to(torch.float32)
    last = max(1, rows.shape[1] - 1)
    share = (trim.density - trim.epsilon) + (ranks / last) * 2 * trim.epsilon
    return share.view(change.shape)


def _rescaled(change: Tensor, kept: Tensor, how: str) -> Tensor:
    if how == "none":
        return kept
    before, after = change.abs().sum(), kept.abs().sum()
    return kept if min(before, after) < 1e-7 else kept * (before / after)


def slerp(one: Tensor, other: Tensor, t: float) -> Tensor:
    """From `one` (t = 0) to `other` (t = 1) with constant angular speed; a straight line where they
    are nearly parallel. In float32 at least."""
    dtype = _wide(one.dtype)
    a, b = one.to(dtype), other.to(dtype)
    sizes = [torch.linalg.vector_norm(x) for x in (a, b)]
    a_unit, b_unit = (x / (s if s > 1e-8 else 1.0) for x, s in zip((a, b), sizes, strict=True))
    cosine = (a_unit * b_unit).sum().clamp(-1, 1)
    if abs(cosine) > _SAME:
        return (1 - t) * a + t * b
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
