"""Whether a folded weight is what its branches compute: by weight, and apart from the network.

Outputs of a whole network say little where it is ill-conditioned or computes in 16 bits. Here each
branch runs alone, in float64, against the matrix that it says it adds; and what was written is
compared with the old weight and those matrices, with rounding to the storage dtype as the only
allowance. Where only deltas were added, and clearly so, `added` tells it in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..branches.branch import Branch, Delta, InputScale, OutputScale, RowScale, Scale
from ..branches.input_map import InputMap
from ..errors import NonFiniteError, VerifyError
from ..measure.compare import all_finite
from .added import clearly_added
from .blocks import blocks, widest
from .verdict import TOLERANCE, Matrix, Verdict, alone_in, drawn, largest_gap, rows_of

_BLOCK = 1 << 16
"""Elements of a weight that are compared at a time: their temporaries stay in the cache."""


@dataclass
class _Exact:
    """Some rows of the folded weight in wide precision; written in place.

    Attributes:
        weight: what they should be.
        size: what elements of the weight were at most on the way, whose rounding shows.
        slack: magnitude of what was computed in float32 at least, `[rows or 1, in or 1]`.
    """

    weight: Tensor
    size: Tensor
    slack: Tensor

    @staticmethod
    def of(old: Tensor) -> _Exact:
        return _Exact(old.clone(), old.abs(), torch.zeros_like(old[:1, :1]))

    def add(self, delta: Tensor, largest: Tensor) -> None:
        self.weight += delta
        self.size += delta.abs()
        self.slack = self.slack + largest

    def scale(self, factor: Tensor) -> None:
        magnitude = factor.abs()
        self.weight *= factor
        self.size *= magnitude
        self.slack = self.slack * magnitude

    def map(self, adjoint: Callable[[Tensor], Tensor], rounded: bool) -> None:
        """Its columns are mixed: each is as uncertain as the row is large, even to the storage
        dtype where rows were `rounded` before."""
        self.weight, norms = adjoint(self.weight), self.size.norm(dim=1, keepdim=True)
        self.size = torch.maximum(self.weight.abs(), norms if rounded else self.weight.abs())
        self.slack = self.slack + norms

    def loosen(self) -> None:
        """Its rows are scaled by what was computed from the weight."""
        self.slack = self.slack + self.size


_Step = Callable[[_Exact, slice], None]


@torch.no_grad()
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
    with _disable_current_modes():  # what was admitted to be written may be compared
        verdict = clearly_added(before, after, branches)
        return verdict or _compared(name, before, after, branches)


def _compared(
    name: str, before: Matrix, after: Matrix, branches: Sequence[tuple[str, Branch]]
) -> Verdict:
    """See `check_folded`: all in float64."""
    require_finite_base(name, before.weight)
    wide = widest(before.weight)
    old = before.weight.detach().to(wide)
    bias = None if before.bias is None else before.bias.detach().to(wide)
    alone = {path: alone_in(branch, wide) for path, branch in branches}
    deltas = {
        path: branch.full_delta().to(old)
        for path, branch in alone.items()
        if isinstance(branch, Delta | RowScale)
    }
    gap = max(_gap(name, p, branch, old, bias, deltas.get(p)) for p, branch in alone.items())
    steps, exact_bias = _steps(alone, old, bias, deltas)
    rounds = len(branches) + before.roundings
    verdict = _written(name, old, before.dtype, after, steps, rounds, gap)
    if exact_bias is not None and after.bias is not None:
        kept_bias = _Written(after.bias.dtype, rounds)
        none = torch.zeros_like(exact_bias)
        kept_bias.compare(after.bias.detach().to(exact_bias), exact_bias, exact_bias.abs(), none)
        kept_bias.require(f"{name} (its bias)")
    return verdict


@torch.no_grad()
def exact_of(before: Matrix, branches: Sequence[tuple[str, Branch]]) -> Tensor:
    """What a weight is with its branches, `[out, in]` in float64; nothing is rounded."""
    old = before.weight.detach().to(widest(before.weight))
    alone = {path: alone_in(branch, old.dtype) for path, branch in branches}
    changing = {p: b for p, b in alone.items() if isinstance(b, Delta | RowScale)}
    steps, _ = _steps(alone, old, None, {p: b.full_delta() for p, b in changing.items()})
    exact = torch.empty_like(old)
    for rows in blocks(old, _BLOCK):
        block = _Exact.of(old[rows])
        for action in steps:
            action(block, rows)
        exact[rows] = block.weight
    return exact


def _written(
    name: str,
    old: Tensor,
    dtype: torch.dtype,
    after: Matrix,
    steps: Sequence[_Step],
    rounds: int,
    gap: float,
) -> Verdict:
    """What rounding to `after.dtype` left of what the steps do to a weight that was of `dtype`.

    Raises:
        VerifyError: something else was written.
    """
    written = _Written(after.dtype, rounds)
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    learnt, along, off, square = False, 0.0, 0.0, 0.0
    for start in range(0, old.shape[0], step := rows_of(old, _BLOCK)):
        rows = slice(start, start + step)
        exact = _Exact.of(old[rows])
        for action in steps:
            action(exact, rows)
        rounded = after.weight[rows].detach().to(old, copy=True)
        written.compare(rounded, exact.weight, exact.size, exact.slack)
        change = exact.weight - old[rows]
        learnt = learnt or bool((change.abs() > 32 * eps * exact.size).any())
        rounded -= old[rows]
        along += float((rounded * change).sum())
        off += float((rounded - change).square().sum())
        square += float(change.square().sum())
    written.require(name)
    return Verdict(gap, (off / square) ** 0.5, along / square) if learnt else Verdict(gap)


def check_packed(name: str, before: Tensor, exact: Tensor, written: Tensor) -> Verdict:
    """What is left of the change of a weight `[out, in]` that was packed again.

    Raises:
        VerifyError: it is further from the exact one than the weight was before.
    """
    wide = torch.float32 if before.device.type == "mps" else torch.float64
    along = off = square = 0.0
    for rows in zip(
        *(t.split(rows_of(before, _BLOCK)) for t in (before, exact, written)), strict=True
    ):
        old, want, rounded = (t.to(wide) for t in rows)
        along += float(((rounded - old) * (want - old)).sum())
        off += float((rounded - want).square().sum())
        square += float((want - old).square().sum())
    if off > square * (1 + 1e-5):
        raise VerifyError(
            f"{name}: packed again, it is further from what its branches compute than it was "
            "without them. This is an error in the format; nothing was changed."
        )
    return Verdict(0.0, (off / square) ** 0.5, along / square) if square else Verdict(0.0)


def _steps(
    branches: Mapping[str, Branch], old: Tensor, bias: Tensor | None, deltas: Mapping[str, Tensor]
) -> tuple[list[_Step], Tensor | None]:
    """What the branches do to rows of the old weight, in the order in which they are composed; and
    the bias with them."""
    steps: list[_Step] = []
    columns: list[_Step] = []

    def adds(delta: Tensor) -> _Step:
        largest = torch.maximum(delta.amax(), -delta.amin()) if delta.numel() else delta.sum()
        return lambda exact, rows: exact.add(delta[rows], largest)

    def scales(factor: Tensor) -> _Step:
        return lambda exact, rows: exact.scale(factor[rows, None])

    def scales_columns(factor: Tensor) -> _Step:
        return lambda exact, rows: exact.scale(factor[rows])

    def maps(branch: InputMap) -> _Step:
        return lambda exact, rows: exact.map(branch.full_adjoint, len(branches) > 1)

    for path, branch in branches.items():
        if isinstance(branch, RowScale):
            factor = branch.full_rows(_as_stored(branch, old)).to(old)
            steps += [adds(deltas[path]), lambda exact, rows: exact.loosen(), scales(factor)]
        elif isinstance(branch, Delta):
            steps.append(adds(deltas[path]))
        elif isinstance(branch, InputScale):  # also scales what deltas read
            factor = branch.shape.columns(branch.full_scale().detach().to(old), old)
            columns.append(scales_columns(factor))
        elif isinstance(branch, InputMap):
            columns.append(maps(branch))
        elif isinstance(branch, OutputScale):
            factor = branch.full_scale().detach().to(old)
            steps.append(scales(factor))
            bias = None if bias is None else bias * factor
    return [*steps, *reversed(columns)], bias  # the last one is next to the weight


def _as_stored(branch: RowScale, matrix: Tensor) -> Tensor:
    return branch.shape.stored(matrix)


def _gap(
    name: str,
    path: str,
    branch: Branch,
    old: Tensor,
    bias: Tensor | None,
    delta: Tensor | None,
) -> float:
    """The relative difference between a branch on random inputs and its own matrix.

    Raises:
        VerifyError: it is more than `TOLERANCE`.
    """
    shape = branch.shape

    def call(matrix: Tensor, bias: Tensor | None) -> Tensor:
        y = shape.applied(x, matrix, **operands)
        return y if bias is None else y + shape.along(bias, y, **operands)

    with torch.no_grad():
        x, operands = drawn(shape, old)
        if isinstance(branch, Delta) and delta is not None:
            got, want = branch(x, **operands), call(delta, None)
        elif isinstance(branch, RowScale) and delta is not None:
            stored = _as_stored(branch, old)
            got = branch(call(old, bias), x, stored, bias, **operands)
            rows = branch.full_rows(stored).to(old)[:, None]
            want = call(rows * (old + delta), bias)
        elif isinstance(branch, InputScale):
            scale = branch.full_scale().to(old)
            got = shape.applied(branch(x, **operands), old, **operands)
            want = call(old * shape.columns(scale, old), None)
        elif isinstance(branch, InputMap):
            got = shape.applied(branch(x, **operands), old, **operands)
            want = call(branch.full_adjoint(old), None)
        elif isinstance(branch, Scale):
            rows = branch.full_scale().to(old)
            got = branch(call(old, bias), **operands)
            want = call(old * rows[:, None], None if bias is None else bias * rows)
        else:
            raise VerifyError(f"{name}: {path} is no branch of a weight.")
    gap = largest_gap(shape.samples(want), shape.samples(got))
    if not gap <= TOLERANCE:
        raise VerifyError(
            f"{name}: the branch {path} computes something else than what it folds into the "
            f"weight: in {str(old.dtype)[6:]} they differ by {gap:.3g} of the larger (allowed is "
            f"{TOLERANCE:.0e}). Look at {type(branch).__name__}: its forward and what it folds "
            "(delta, rows or scale) must agree."
        )
    return gap


class _Written:
    """Whether what was written is exact, rounded to `dtype` once for each of `steps`; gathered
    over blocks of rows."""

    def __init__(self, dtype: torch.dtype, steps: int) -> None:
        self.dtype, self.steps = dtype, steps
        self.rows = self.count = self.elements = 0
        self.first, self.largest = 0, 0.0

    def compare(self, written: Tensor, exact: Tensor, size: Tensor, slack: Tensor) -> None:
        """Compares the next rows."""
        storage = torch.finfo(self.dtype)
        wide = torch.finfo(torch.promote_types(self.dtype, torch.float32))
        allowed = 0.51 * self.steps * storage.eps * size + 32 * wide.eps * slack
        allowed += storage.tiny * storage.eps  # the step of numbers that are nearly zero
        gap = (written - exact).abs_()
        within = gap <= allowed
        if not bool(within.all()):
            beyond = ~within
            row = int(beyond.reshape(beyond.shape[0], -1).any(1).nonzero()[0])
            self.first = self.first if self.count else self.rows + row
            self.count += int(beyond.sum())
        if self.count:
            self.largest = max(self.largest, float(gap.nan_to_num(float("inf")).max()))
        self.rows += exact.shape[0]
        self.elements += exact.numel()

    def require(self, name: str) -> None:
        """Raises VerifyError if it is not."""
        if self.count:
            raise VerifyError(
                f"{name}: what was written is not the old tensor with what its branches add: "
                f"{self.count} of {self.elements} elements are off by more than rounding to "
                f"{str(self.dtype)[6:]} explains, up to {self.largest:.3g}, first in row "
                f"{self.first}. This is an error in a fold rule; nothing was changed."
            )


def require_finite_base(name: str, weight: Tensor) -> None:
    """Raises NonFiniteError, which names the tensor, if a weight is broken before any fold."""
    if not all_finite(weight):
        index = (~torch.isfinite(weight)).nonzero()[0].tolist()
        raise NonFiniteError(
            f"the base's own tensor {name} holds NaN or infinity (first at {index}), so nothing "
            "can be folded into it. The branches are not to blame: look at the model or its "
            "checkpoint."
        )
