"""The fold rules: patterns around one linear, and what each does to the weight.

    linear(x, f(W))        ->  f(W)
    row_scale(linear)      ->  diag(c) (W + dW)
    linear(x) + delta(x)   ->  W + dW
    output_scale(linear)   ->  diag(s) W, s b
    linear(input_scale(x)) ->  W diag(s)

A rule matches only when nothing stands between, so order takes care of itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...branches.branch import Branch, Delta, InputScale, OutputScale, RowScale, Scale
from ...errors import FoldError
from ...graph.aten import VIEWS, expression_of, strip
from ...graph.weighted_call import WeightedCall
from ...weights.verdict import lost_share
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


Fold = Callable[[Weight, Branch], tuple[Weight, float]]


def _exact_delta(weight: Weight, branch: Delta | RowScale) -> Tensor:
    """What a branch adds, in at least float32: it is rounded once, with the sum."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if any(torch.promote_types(t.dtype, wide) != t.dtype for t in _numbers(branch)):
        branch = copy.deepcopy(branch).to(wide)
    return branch.full_delta().detach()


def _numbers(branch: Branch) -> list[Tensor]:
    return [t for t in (*branch.parameters(), *branch.buffers()) if t.is_floating_point()]


def _fold_delta(weight: Weight, branch: Branch) -> tuple[Weight, float]:
    if not isinstance(branch, Delta):
        raise FoldError(f"{type(branch).__name__} is not a delta.")
    return weight.with_delta(_exact_delta(weight, branch))


def _fold_rows(weight: Weight, branch: Branch) -> tuple[Weight, float]:
    if not isinstance(branch, RowScale):
        raise FoldError(f"{type(branch).__name__} is not a row scale.")
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        dense = weight.dense()
        c = branch.full_rows(weight.shape.stored(dense)).to(wide)
        moved = dense.to(wide) + _exact_delta(weight, branch).to(wide)
        return weight.replaced(c[:, None] * moved)


def _fold_output(weight: Weight, branch: Branch) -> tuple[Weight, float]:
    if not isinstance(branch, Scale):
        raise FoldError(f"{type(branch).__name__} is not a scale.")
    scale = branch.full_scale().detach()
    scaled = weight.with_rows(scale)
    return scaled, _scale_lost(weight, scaled, scale[:, None])


def _fold_input(weight: Weight, branch: Branch) -> tuple[Weight, float]:
    if not isinstance(branch, Scale):
        raise FoldError(f"{type(branch).__name__} is not a scale.")
    scale = branch.full_scale().detach()
    scaled = weight.with_columns(scale)
    return scaled, _scale_lost(weight, scaled, weight.shape.columns(scale, weight.dense()))


def _scale_lost(before: Weight, after: Weight, factor: Tensor) -> float:
    old = before.dense()
    wide = torch.promote_types(old.dtype, torch.float32)
    return lost_share(old, old.to(wide) * factor.to(wide), after.dense())


RULES: tuple[tuple[Pattern, Fold], ...] = (
    (rows_rule, _fold_rows),
    (delta_rule, _fold_delta),
    (output_rule, _fold_output),
    (input_rule, _fold_input),
)


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
