"""The fold rules: patterns around one linear, and what each does to the weight.

    linear(x, f(W))        ->  f(W)
    row_scale(linear)      ->  diag(c) (W + dW)
    linear(x) + delta(x)   ->  W + dW
    output_scale(linear)   ->  diag(s) W, s b
    linear(input_map(x))   ->  W M
    linear(input_scale(x)) ->  W diag(s)

A rule matches only when nothing stands between, so order takes care of itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...branches.branch import Branch, Delta, InputScale, OutputScale, RowScale, Scale
from ...branches.input_map import InputMap
from ...errors import FoldError, NonFiniteError
from ...graph.aten import VIEWS, expression_of, strip
from ...graph.sharded import whole
from ...graph.weighted_call import WeightedCall
from ...measure.compare import all_finite
from ...weights.blocks import Added, widest
from ...weights.certificate import require_finite_base
from ...weights.verdict import alone_in
from ...weights.weight import Weight
from .pattern import Match, Mismatch, Ops, Pattern, Term, pattern


@pattern
def delta_rule(op: Ops, x: object, w: object, b: object, branch: object) -> Term:
    return op.add(op.linear(x, w, b), op.module(Delta, branch, x))  # pyright: ignore[reportArgumentType]


@pattern
def rows_rule(op: Ops, x: object, w: object, b: object, stored: object, branch: object) -> Term:
    return op.module(RowScale, branch, op.linear(x, w, b), x, stored, b)  # pyright: ignore[reportArgumentType]


@pattern
def output_rule(op: Ops, x: object, w: object, b: object, branch: object) -> Term:
    return op.module(OutputScale, branch, op.linear(x, w, b))  # pyright: ignore[reportArgumentType]


@pattern
def input_rule(op: Ops, x: object, w: object, b: object, branch: object) -> Term:
    return op.linear(op.module(InputScale, branch, x), w, b)  # pyright: ignore[reportArgumentType]


@pattern
def map_rule(op: Ops, x: object, w: object, b: object, branch: object) -> Term:
    return op.linear(op.module(InputMap, branch, x), w, b)  # pyright: ignore[reportArgumentType]


Fold = Callable[[Weight, Branch], Weight]


def _fold_delta(weight: Weight, branch: Branch) -> Weight:
    if not isinstance(branch, Delta):
        raise FoldError(f"{type(branch).__name__} is not a delta.")
    return weight.with_rows_changed(Added(branch, widest(weight.dense())).to)


@torch.no_grad()
def _fold_rows(weight: Weight, branch: Branch) -> Weight:
    if not isinstance(branch, RowScale):
        raise FoldError(f"{type(branch).__name__} is not a row scale.")
    dense = weight.dense()
    added, alone = Added(branch, widest(dense)), alone_in(branch, widest(dense))
    c = alone.full_rows(weight.shape.stored(dense).to(widest(dense)))[:, None]

    def change(block: Tensor, rows: slice) -> None:
        added.to(block, rows)
        block.mul_(c[rows])

    return weight.with_rows_changed(change)


def _fold_output(weight: Weight, branch: Branch) -> Weight:
    if not isinstance(branch, Scale):
        raise FoldError(f"{type(branch).__name__} is not a scale.")
    return weight.with_rows(branch.full_scale().detach())


def _fold_input(weight: Weight, branch: Branch) -> Weight:
    if not isinstance(branch, Scale):
        raise FoldError(f"{type(branch).__name__} is not a scale.")
    return weight.with_columns(branch.full_scale().detach())


@torch.no_grad()
def _fold_map(weight: Weight, branch: Branch) -> Weight:
    if not isinstance(branch, InputMap):
        raise FoldError(f"{type(branch).__name__} is not an input map.")
    alone = alone_in(branch, widest(weight.dense()))
    return weight.with_rows_changed(lambda block, _: block.copy_(alone.full_adjoint(block)))


RULES: tuple[tuple[Pattern, Fold], ...] = (
    (rows_rule, _fold_rows),
    (delta_rule, _fold_delta),
    (output_rule, _fold_output),
    (input_rule, _fold_input),
    (map_rule, _fold_map),
)


def folded(weight: Weight, branch: Branch) -> Weight:
    """A weight with a branch that stands right beside it in all calls of the weight."""
    matching = (
        (RowScale, _fold_rows), (Delta, _fold_delta), (OutputScale, _fold_output),
        (InputScale, _fold_input), (InputMap, _fold_map),
    )  # fmt: skip
    for kind, action in matching:
        if isinstance(branch, kind):
            return action(weight, branch)
    raise FoldError(f"{type(branch).__name__} is no branch of a weight.")


def match_at(gm: GraphModule, call: Node) -> tuple[Match, Fold] | Mismatch:
    """The rule that fits around a branch's call; the most telling reason if none does."""
    roots = [call, *call.users]
    reason: Mismatch | None = None
    for rule, action in RULES:
        for root in roots:
            match = rule.match(gm, root)
            if isinstance(match, Match) and match["branch"] is call:
                stored = [match["w"], *([match["b"]] if isinstance(match["b"], Node) else [])]
                if any(expression_of(strip(n, VIEWS)) is not None for n in stored):
                    blocker = "its weight or bias is computed by an expression that does not fold"
                    return Mismatch(f"not foldable now: {blocker}", call)
                return match, action
            if isinstance(match, Mismatch) and match.node is not None and (
                "also read" in match.reason or reason is None
            ):  # fmt: skip
                reason = match
    blocker = reason.reason if reason is not None else "no rule fits"
    if "also read" not in blocker:
        blocker = "another branch that does not fold stands between it and the weight"
    return Mismatch(f"not foldable now: {blocker}", call)


def linear_of(match: Match) -> Node:
    """The linear that a rule has matched."""
    return next(n for n in match.nodes if WeightedCall.of(n) is not None)


def require_finite(weight: Weight, path: str, branch: Branch) -> None:
    """Raises NonFiniteError, naming the tensor, where the branch or the bias is broken, or a weight
    whose format may hide that; a dense one is told of once its sum is not finite."""
    if not weight.is_dense:
        require_finite_base(weight.name, weight.dense())
    if weight.bias is not None:
        require_finite_base(weight.bias_name or weight.name, weight.bias)
    for name, tensor in branch.named_parameters():
        if not all_finite(tensor):
            index = (~torch.isfinite(whole(tensor))).nonzero()[0].tolist()
            raise NonFiniteError(
                f"{path}.{name} holds NaN or infinity (first at {index}), so it cannot be folded: "
                "leave it out (fold{names=[...]}), go back to an earlier checkpoint, or train it "
                "again with a smaller rate."
            )
