"""Folding into a matrix that belongs to no graph: the same rules and checks as `fold`, for whoever
knows that nothing but products with its branches beside them read it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ...branches.branch import Branch
from ...branches.input_map import InputMap
from ...branches.shapes import Shape
from ...errors import NonFiniteError
from ...graph.aten import set_attribute
from ...weights.certificate import check_folded, require_finite_base
from ...weights.format import Dense
from ...weights.weight import Weight
from ..linear.compose import ORDER
from .result import Folding
from .rules import folded, require_finite


def fold_apart(
    name: str, stored: Tensor, shape: Shape, branches: Sequence[Branch], result: Folding
) -> Tensor:
    """A matrix with its branches folded in, laid out as it was.

    Args:
        name: of the matrix.
        stored: the matrix; it is not changed.
        shape: how calls multiply by it.
        branches: of one adapter, complete in themselves.
        result: notes what rounding has left.

    Raises:
        VerifyError: what was written is not what the branches compute.
        NonFiniteError: the matrix or a branch is not finite, or the result overflows its dtype.
    """
    shelf = nn.Module()
    ordered = sorted(branches, key=lambda branch: ORDER[branch.slot])
    ordered.sort(key=lambda branch: isinstance(branch, InputMap))  # maps what deltas read, too
    mine = [(f"{name}, {b.slot} {count}", b) for count, b in enumerate(ordered, 1)]

    def weight_of(tensor: Tensor) -> Weight:
        return Weight(
            module=shelf, name=name, bias_name=None, bias=None, shape=shape,
            format=Dense(shape.matrix(tensor)), dtype=tensor.dtype,
        )  # fmt: skip

    set_attribute(shelf, name, nn.Parameter(stored, requires_grad=False))
    now = stored
    for path, branch in mine:
        weight = weight_of(now)
        require_finite(weight, path, branch)
        try:
            folded(weight, branch).store()
        except NonFiniteError:
            require_finite_base(name, stored)
            raise
        now = shelf.get_parameter(name).detach()
    verdict = check_folded(name, weight_of(stored).matrix(), weight_of(now).matrix(), mine)
    result.measured(name, verdict, str(stored.dtype)[6:])
    return now
