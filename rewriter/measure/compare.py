"""Outputs compared one by one: a small one is not measured against a large one beside it, and what
is no floating-point number has to be equal."""

from __future__ import annotations

import cmath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

TOLERANCE = {
    torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1,
}  # fmt: skip
"""Difference that a bounded contract allows in any case, relative to an output's largest value."""


@dataclass(frozen=True)
class Gap:
    """How one output of a program differs from that of another.

    Attributes:
        name: where it is among the outputs, such as `['logits']`.
        absolute: the largest difference of finite values.
        relative: that, relative to the largest finite value of this output; infinite where the
            values differ in a way that has no size (`values`).
        error, size: sums of squares, of the differences and of the values.
        form: how type, dtype or shape differ; empty if they do not.
        values: what differs beyond any size: integers, text, NaN or infinity at other places.
        spoilt: NaN where there was none, or infinity in an output that had none.
        discrete: the output is a tensor of integers or booleans.
        noise: the output is nothing but rounding, and `relative` is relative to the numbers that
            it is made of.
    """

    name: str
    absolute: float = 0.0
    relative: float = 0.0
    error: float = 0.0
    size: float = 0.0
    form: str = ""
    values: str = ""
    spoilt: str = ""
    discrete: bool = False
    noise: bool = False

    @property
    def reason(self) -> str:
        """Why no figure says how far it is off; empty if one does."""
        return self.form or self.values


def floats(output: Any) -> list[Tensor]:
    """The floating-point tensors of any output structure."""
    leaves = pytree.tree_leaves(output)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def tensors(output: Any) -> list[Tensor]:
    """All tensors of any output structure."""
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]


def gaps(want: list[Tensor], got: list[Tensor]) -> tuple[float, float]:
    """Largest absolute difference of tensors of equal shapes, and largest finite value of all."""
    each = [_numbers("", x, y) for x, y in zip(want, got, strict=True)]
    worst = max((float("inf") if g.values else g.absolute for g in each), default=0.0)
    return worst, max((_largest(x) for x in want), default=0.0)


def compare(want: Any, got: Any) -> list[Gap]:
    """One gap for each leaf of two output structures, in order.

    Where the structures differ, the one gap says so.
    """
    ours, theirs = keyed_leaves(want), keyed_leaves(got)
    if len(ours) != len(theirs):
        return [Gap("outputs", form=f"there are {len(theirs)} instead of {len(ours)}")]
    pairs = zip(ours, theirs, strict=True)
    return [_leaf(pytree.keystr(path), x, y) for (path, x), (_, y) in pairs]


def keyed_leaves(output: Any) -> list[tuple[Any, Any]]:
    """The leaves of an output structure behind their paths, keys of pytree."""
    try:
        return list(pytree.tree_leaves_with_path(output))
    except ValueError:  # a type that is registered without keys, such as diffusers' outputs
        leaves = pytree.tree_leaves(output)
        return [((pytree.SequenceKey(i),), leaf) for i, leaf in enumerate(leaves)]


def worst(rounds: Sequence[Sequence[Gap]]) -> list[Gap]:
    """The worst gap of every output over several inputs; with the sums of squares of all."""
    merged: list[Gap] = []
    for each in zip(*rounds, strict=True):
        reasons = {k: next((v for g in each if (v := getattr(g, k))), "") for k in _TEXTS}
        merged.append(
            Gap(
                each[0].name,
                max(g.absolute for g in each),
                max(g.relative for g in each),
                sum(g.error for g in each),
                sum(g.size for g in each),
                reasons["form"],
                reasons["values"],
                reasons["spoilt"],
                discrete=each[0].discrete,
            )
        )
    return merged


def figures(each: Sequence[Gap]) -> dict[str, float]:
    """The figures of a certificate: of the output that is furthest off."""
    return {
        "max_abs": max((g.absolute for g in each), default=0.0),
        "max_rel": max((g.relative for g in each), default=0.0),
    }


def relative(want: Any, got: Any) -> float:
    """The largest relative difference of an output; infinite where type, dtype, shape or integers
    differ, or NaN and infinity are at other places."""
    each = compare(want, got)
    return float("inf") if any(g.reason for g in each) else figures(each)["max_rel"]


_TEXTS = ("form", "values", "spoilt")


def _leaf(name: str, x: Any, y: Any) -> Gap:
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return Gap(name) if _same(x, y) else Gap(name, relative=float("inf"), form=_said(x, y))
    if x.dtype != y.dtype:
        return Gap(name, form=f"its dtype changes from {str(x.dtype)[6:]} to {str(y.dtype)[6:]}")
    if x.shape != y.shape:
        return Gap(name, form=f"its shape changes from {tuple(x.shape)} to {tuple(y.shape)}")
    if x.is_complex():
        return _numbers(
            name, torch.view_as_real(x.resolve_conj()), torch.view_as_real(y.resolve_conj())
        )
    if x.is_floating_point():
        return _numbers(name, x, y)
    count = int((x != y).sum())
    if not count:
        return Gap(name, discrete=True)
    text = f"{count} of its {x.numel()} integers differ"
    return Gap(name, relative=float("inf"), values=text, discrete=True)


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) or isinstance(y, Tensor) or type(x) is not type(y):
        return False
    return bool(x == y) or (x != x and y != y)  # NaN is NaN


def _said(x: Any, y: Any) -> str:
    short = [f"a {type(v).__name__}" if isinstance(v, Tensor) else repr(v)[:40] for v in (x, y)]
    return f"it changes from {short[0]} to {short[1]}"


def equal_bits(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same form; not where one is NaN."""
    return x.dtype == y.dtype and x.device == y.device and torch.equal(x, y)


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; one pass without a temporary where that is so."""
    return cmath.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _largest(x: Tensor) -> float:
    finite = x[torch.isfinite(x)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _numbers(name: str, x: Tensor, y: Tensor) -> Gap:
    """The gap of two floating-point tensors of one shape."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, y = x.detach().to(wide), y.detach().to(wide)
    if all_finite(x) and all_finite(y):
        return _finite(name, x, y)
    both = torch.isfinite(x) & torch.isfinite(y)
    apart = torch.where(both, x - y, 0.0).abs()
    largest, size = _largest(x), _square(torch.where(both, x, 0.0))
    absolute = float(apart.max()) if apart.numel() else 0.0
    relative = absolute / largest if largest else absolute
    error = _square(apart)
    values, spoilt = _not_finite(x, y)
    if values:
        relative = float("inf")
    return Gap(name, absolute, relative, error, size, values=values, spoilt=spoilt)


def _finite(name: str, x: Tensor, y: Tensor) -> Gap:
    if torch.equal(x, y):
        return Gap(name, size=_square(x))
    apart = (x - y).abs_()
    absolute, largest = float(apart.amax()), float(torch.maximum(x.amax(), -x.amin()))
    relative = absolute / largest if largest else absolute
    return Gap(name, absolute, relative, _square(apart), _square(x))


def _not_finite(x: Tensor, y: Tensor) -> tuple[str, str]:
    """How NaN and infinities differ: at all, and in a way that no change of weights excuses."""
    odd = ~(torch.isfinite(x) & torch.isfinite(y))
    if not bool(odd.any()):
        return "", ""
    a, b = x[odd], y[odd]
    wrong = int((~((a == b) | (a.isnan() & b.isnan()))).sum())
    before, after = (f"{int(t.isnan().sum())} NaN, {int(t.isinf().sum())} infinite" for t in (x, y))
    text = f"{wrong} values are finite in one only ({before} -> {after})" if wrong else ""
    fresh = bool((b.isnan() & ~a.isnan()).any()) or (bool(b.isinf().any()) and not a.isinf().any())
    return text, text if fresh else ""
