"""Whether a folded weight is what its branches compute: by weight, and apart from the network.

Outputs of a whole network say little where it is ill-conditioned or computes in 16 bits. Here each
branch runs alone, in float64, against the matrix that it says it adds; and what was written is
compared with the old weight and those matrices, with rounding to the storage dtype as the only
allowance.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..branches.branch import Branch, Delta, InputScale, OutputScale, RowScale, Scale
from ..errors import NonFiniteError, VerifyError

TOLERANCE = 1e-5
"""Largest relative difference between a branch's forward and its matrix, both in float64."""
LOST = 0.9
"""Rounding errors of more than this share of a change are worth a warning."""
_MAGNITUDES = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
"""Of the random inputs: what is linear is so at all of them."""
_SAMPLES = 2
"""Inputs of each magnitude."""


@dataclass(frozen=True)
class Matrix:
    """A weight `[out, in]` with its bias, of a stack `[count * out, in]`.

    Attributes:
        dtype: what the weight is rounded to.
        roundings: how often reading it rounds to that, beside the roundings of folding.
    """

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    roundings: int = 0


@dataclass(frozen=True)
class Verdict:
    """What was measured at one weight.

    Attributes:
        gap: largest relative difference between a branch and its matrix.
        lost: what rounding did to the change of the weight, relative to its size; may exceed 1.
        left: how much of the change is left along its own direction, where elements that jump by
            a whole step make up for those that stay.
    """

    gap: float
    lost: float = 0.0
    left: float = 1.0

    @property
    def vanished(self) -> bool:
        """Whether nearly everything is lost: the change is gone, or drowns in rounding."""
        return self.left < 0.01 or self.lost > LOST

    def said(self, dtype: torch.dtype) -> str:
        """What a report says of it where it has vanished."""
        left = "nothing" if self.left < 0.01 else f"{self.left:.0%}"
        off = "" if self.left < 0.01 else (
            f" along its direction, and errors of {self.lost:.0%} of its size"
        )  # fmt: skip
        return f"rounding to {str(dtype)[6:]} left {left} of what was learnt{off}"


@dataclass
class _Exact:
    """The folded weight in wide precision.

    Attributes:
        weight, bias: what they should be.
        size: what elements of the weight were at most on the way, whose rounding shows.
        slack: magnitude of what was computed in float32 at least, `[out, in]` or a number.
    """

    weight: Tensor
    bias: Tensor | None
    size: Tensor
    slack: Tensor

    def add(self, delta: Tensor) -> None:
        self.weight, self.size = self.weight + delta, self.size + delta.abs()
        self.slack = self.slack + delta.abs().amax()

    def scale(self, factor: Tensor) -> None:
        self.weight, self.size = self.weight * factor, self.size * factor.abs()
        self.slack = self.slack * factor.abs()


def check_folded(
    name: str, before: Matrix, after: Matrix, branches: Sequence[tuple[str, Branch]]
) -> Verdict:
    """Compares a weight before and after its branches were folded.

    Args:
        name: of the weight, for errors.
        branches: (path, branch) in the order of composition, see `compose`.

    Raises:
        VerifyError: a branch computes something else than its matrix, or something else was
            written.
        NonFiniteError: the weight held NaN or infinity before.
    """
    require_finite_base(name, before.weight)
    wide = torch.float32 if before.weight.device.type == "mps" else torch.float64
    old = before.weight.detach().to(wide)
    bias = None if before.bias is None else before.bias.detach().to(wide)
    alone = {path: alone_in(branch, wide) for path, branch in branches}
    gap = max(_gap(name, path, branch, old, bias) for path, branch in alone.items())
    exact = _exact(list(alone.values()), old, bias)
    steps = len(branches) + before.roundings
    _require_written(name, after.weight, exact.weight, exact.size, exact.slack, after.dtype, steps)
    if exact.bias is not None and after.bias is not None:
        size, none = exact.bias.abs(), torch.zeros_like(exact.bias)
        where = f"{name} (its bias)"
        _require_written(where, after.bias, exact.bias, size, none, after.bias.dtype, steps)
    eps = torch.finfo(torch.promote_types(before.dtype, torch.float32)).eps
    change = exact.weight - old
    learnt = bool((change.abs() > 32 * eps * exact.size).any())
    if not learnt:
        return Verdict(gap)
    made, size = after.weight.detach().to(old) - old, float(change.square().sum())
    lost = float((made - change).norm()) / size**0.5
    return Verdict(gap, lost, float((made * change).sum()) / size)


def _exact(branches: Sequence[Branch], old: Tensor, bias: Tensor | None) -> _Exact:
    """The old weight with all branches, in the order in which they are composed."""
    exact = _Exact(old, bias, old.abs(), torch.zeros_like(old[:1, :1]))
    columns: list[Tensor] = []
    with torch.no_grad():
        for branch in branches:
            if isinstance(branch, RowScale):
                exact.add(branch.full_delta().to(old))
                exact.slack = exact.slack + exact.size  # its rows are computed from the weight
                exact.scale(branch.full_rows(_as_stored(branch, old)).to(old)[:, None])
            elif isinstance(branch, Delta):
                exact.add(branch.full_delta().to(old))
            elif isinstance(branch, InputScale):  # also scales what deltas read
                columns.append(branch.shape.columns(branch.full_scale().to(old), old))
            elif isinstance(branch, OutputScale):
                factor = branch.full_scale().to(old)
                exact.scale(factor[:, None])
                exact.bias = None if exact.bias is None else exact.bias * factor
        for factor in columns:
            exact.scale(factor)
    return exact


def alone_in(branch: Branch, dtype: torch.dtype) -> Branch:
    """A copy of a branch in evaluation mode and in a dtype, with features on the last axis."""
    alone = copy.deepcopy(branch).to(dtype).eval()
    alone.axis, alone.lowered, alone.shape = -1, None, branch.shape.widened(dtype)
    return alone


def _as_stored(branch: RowScale, matrix: Tensor) -> Tensor:
    return branch.shape.stored(matrix)


def _gap(name: str, path: str, branch: Branch, old: Tensor, bias: Tensor | None) -> float:
    """The relative difference between a branch on random inputs and its own matrix.

    Raises:
        VerifyError: it is more than `TOLERANCE`.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor(_MAGNITUDES, dtype=torch.float64).repeat(_SAMPLES)
    shape = branch.shape

    def call(matrix: Tensor, bias: Tensor | None) -> Tensor:
        y = shape.applied(x, matrix, **operands)
        return y if bias is None else y + shape.along(bias, y, **operands)

    with torch.no_grad():
        x, operands = shape.drawn(old, sizes, generator)
        if isinstance(branch, Delta):
            got, want = branch(x, **operands), call(branch.full_delta().to(old), None)
        elif isinstance(branch, RowScale):
            stored = _as_stored(branch, old)
            got = branch(call(old, bias), x, stored, bias, **operands)
            rows = branch.full_rows(stored).to(old)[:, None]
            want = call(rows * (old + branch.full_delta().to(old)), bias)
        elif isinstance(branch, InputScale):
            scale = branch.full_scale().to(old)
            got = shape.applied(branch(x, **operands), old, **operands)
            want = call(old * shape.columns(scale, old), None)
        elif isinstance(branch, Scale):
            rows = branch.full_scale().to(old)
            got = branch(call(old, bias), **operands)
            want = call(old * rows[:, None], None if bias is None else bias * rows)
        else:
            raise VerifyError(f"{name}: {path} is no branch of a weight.")
    gap = _largest_gap(shape.samples(want), shape.samples(got))
    if not gap <= TOLERANCE:
        raise VerifyError(
            f"{name}: the branch {path} computes something else than what it folds into the "
            f"weight: in {str(old.dtype)[6:]} they differ by {gap:.3g} of the larger (allowed is "
            f"{TOLERANCE:.0e}). Look at {type(branch).__name__}: its forward and what it folds "
            "(delta, rows or scale) must agree."
        )
    return gap


def _largest_gap(want: Tensor, got: Tensor) -> float:
    """The largest relative difference of rows; a bias is as large as small rows, or larger."""
    size = torch.maximum(want.norm(dim=1), got.norm(dim=1))
    gaps = (got - want).norm(dim=1) / torch.where(size > 0, size, 1.0)
    return float(gaps.nan_to_num(float("inf")).max())


def _require_written(
    name: str,
    written: Tensor,
    exact: Tensor,
    size: Tensor,
    slack: Tensor,
    dtype: torch.dtype,
    steps: int,
) -> None:
    """Raises VerifyError unless `written` is `exact`, rounded to `dtype` once for each step."""
    storage, wide = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    allowed = 0.51 * steps * storage.eps * size + 32 * wide.eps * slack
    allowed = allowed + storage.tiny * storage.eps  # the step of numbers that are nearly zero
    gap = (written.detach().to(exact) - exact).abs()
    beyond = ~(gap <= allowed)
    if bool(beyond.any()):
        row = int(beyond.reshape(beyond.shape[0], -1).any(1).nonzero()[0])
        raise VerifyError(
            f"{name}: what was written is not the old tensor with what its branches add: "
            f"{int(beyond.sum())} of {beyond.numel()} elements are off by more than rounding to "
            f"{str(dtype)[6:]} explains, up to {float(gap.nan_to_num(float('inf')).max()):.3g}, "
            f"first in row {row}. This is an error in a fold rule; nothing was changed."
        )


def require_finite_base(name: str, weight: Tensor) -> None:
    """Raises NonFiniteError, which names the tensor, if a weight is broken before any fold."""
    if not bool(torch.isfinite(weight).all()):
        index = (~torch.isfinite(weight)).nonzero()[0].tolist()
        raise NonFiniteError(
            f"the base's own tensor {name} holds NaN or infinity (first at {index}), so nothing "
            "can be folded into it. The branches are not to blame: look at the model or its "
            "checkpoint."
        )
