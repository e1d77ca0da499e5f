"""Folding into a matrix that belongs to no graph: the same rules and checks as `fold`, for whoever
knows that nothing but products with its branches beside them read it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...branches.branch import Branch
from ...branches.input_map import InputMap
from ...branches.shapes import Shape
from ...errors import NonFiniteError
from ...graph.aten import set_attribute
from ...weights.certificate import check_folded, exact_of, require_finite_base
from ...weights.format import Dense
from ...weights.weight import Weight
from ..linear.compose import ORDER
from .rest import foreseen, largest, rest_of
from .result import Folding
from .rules import folded, require_finite


@torch.no_grad()
def fold_apart(
    name: str, stored: Tensor, shape: Shape, branches: Sequence[Branch], result: Folding
) -> Tensor:
    """A matrix with its branches folded in, laid out as it was: all of them, or none where
    `result.least` asks for more than rounding would leave, or without the largest part of their
    change, of `result.rank`.

    Args:
        name: of the matrix.
        stored: the matrix; it is not changed.
        shape: how calls multiply by it.
        branches: of one adapter, complete in themselves.
        result: notes what rounding has left, what was not folded (`kept`), and the part that is
            to stand beside the matrix (`parts`).

    Raises:
        VerifyError: what was written is not what the branches compute, or not nearer to it with
            its part beside it.
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
    said = str(stored.dtype)[6:]
    if result.least:
        verdict = foreseen(weight_of(stored), mine)
        if verdict.survives < result.least:
            result.spare([name], verdict, said)
            return stored
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
    result.measured(name, verdict, said)
    if not result.rank:
        return now
    old, exact = (exact_of(weight_of(stored).matrix(), each) for each in ((), mine))
    b, a = (t.float() for t in largest(exact - old, min(result.rank, *exact.shape)))
    rest, verdict = rest_of(name, weight_of(now), old, exact, exact - b.double() @ a.double())
    rest.store()
    result.parts[name] = b, a
    result.measured(name, verdict, said)
    return shelf.get_parameter(name).detach()
