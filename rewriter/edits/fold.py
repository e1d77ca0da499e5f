"""Folding: peephole rules that turn branches into constants, from the inside out, to a fixpoint.

Each rule is a pattern around one linear and what it does to the weight:

    linear(x, f(W))        ->  f(W)
    row_scale(linear)      ->  diag(c) (W + dW)
    linear(x) + delta(x)   ->  W + dW
    output_scale(linear)   ->  diag(s) W, s b
    linear(input_scale(x)) ->  W diag(s)

A rule matches only when nothing stands between, so order takes care of itself. New tensors are
written; the old ones stay in earlier programs, and nothing is ever subtracted back.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..aten import EMBEDDING, VIEWS, expression_of, is_op, parameter_of, set_attribute, strip
from ..errors import FoldError, MetaTensorError, NonFiniteError
from ..program import Attachment, Program
from ..sharded import placed_like, whole, whole_module
from ..sites.sites import LinearSite
from .branch import Branch, Delta, Expression, InputScale, OutputScale, RowScale, Scale
from .compose import fold_ready
from .edit import Editor
from .pattern import Match, Mismatch, Ops, Pattern, Term, pattern
from .replacing import remember
from .weight import Weight, all_finite


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
    if weight.dtype != wide:
        branch = copy.deepcopy(branch).to(wide)
    return branch.full_delta().detach()


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
        c = branch.full_rows(dense.mT if branch.in_out else dense).to(wide)
        moved = dense.to(wide) + _exact_delta(weight, branch).to(wide)
        return weight.replaced(c[:, None] * moved)


def _fold_output(weight: Weight, branch: Branch) -> tuple[Weight, float]:
    if not isinstance(branch, Scale):
        raise FoldError(f"{type(branch).__name__} is not a scale.")
    scale = branch.full_scale().detach()
    made = weight.with_rows(scale)
    return made, _scale_lost(weight, made, scale[:, None])


def _fold_input(weight: Weight, branch: Branch) -> tuple[Weight, float]:
    if not isinstance(branch, Scale):
        raise FoldError(f"{type(branch).__name__} is not a scale.")
    scale = branch.full_scale().detach()
    made = weight.with_columns(scale)
    return made, _scale_lost(weight, made, scale)


def _scale_lost(before: Weight, after: Weight, factor: Tensor) -> float:
    old = before.dense()
    wide = torch.promote_types(old.dtype, torch.float32)
    return _lost(old, old.to(wide) * factor.to(wide), after.dense())


def _lost(old: Tensor, exact: Tensor, made: Tensor) -> float:
    """The share of a tensor's change that rounding it lost; `exact` is in float32 at least."""
    if made.dtype == exact.dtype:
        return 0.0
    change = float((exact - old).norm())
    return float((made - exact).norm()) / change if change else 0.0


RULES: tuple[tuple[Pattern, Fold], ...] = (
    (rows_rule, _fold_rows),
    (delta_rule, _fold_delta),
    (output_rule, _fold_output),
    (input_rule, _fold_input),
)


@dataclass
class Folding:
    """The result: what folded, what did not and why, and the largest share of a delta lost."""

    folded: list[str] = field(default_factory=list[str])
    kept: dict[str, str] = field(default_factory=dict[str, str])
    lost: float = 0.0


def fold(edit: Editor, paths: Sequence[str], tied: str) -> Folding:
    """Folds the named branches as far as possible.

    Args:
        edit: an editor over a fork.
        paths: module paths of the branches to fold.
        tied: what to do at tied weights: `refuse`, `keep` (leave the branch), `untie` (give this
            linear a tensor of its own) or `both` (change the shared tensor).

    Raises:
        FoldError: a tied weight and `tied="refuse"`.
    """
    result = Folding()
    fold_ready(edit.program, frozenset(paths))
    for group in by_weight(edit.program, paths).values():
        fold_weight(edit, group, tied, result)
    done = set(result.folded)
    edit.program.attachments = tuple(a for a in edit.program.attachments if a.path not in done)
    fold_ready(edit.program)
    return result


def by_weight(program: Program, paths: Sequence[str]) -> dict[str, list[Attachment]]:
    """The named branches, grouped by the weight that they fold into (or by their site)."""
    groups: dict[str, list[Attachment]] = {}
    for attachment in program.attachments:
        if attachment.path in paths:
            site = program.sites[attachment.site]
            key = site.weight if isinstance(site, LinearSite) else site.id
            groups.setdefault(key, []).append(attachment)
    return groups


def fold_weight(edit: Editor, group: Sequence[Attachment], tied: str, result: Folding) -> None:
    """Folds the branches of one weight to a fixpoint; needs the values of no other weight."""
    progress = True
    while progress:
        progress = False
        for attachment in [a for a in group if a.path not in result.folded]:
            reason = _try(edit, attachment, tied, result)
            if reason is None:
                progress = True
                result.folded.append(attachment.path)
                result.kept.pop(attachment.path, None)
            else:
                result.kept[attachment.path] = reason


def _try(edit: Editor, attachment: Attachment, tied: str, result: Folding) -> str | None:
    """Folds one branch; returns the reason if it cannot be folded (now)."""
    gm = edit.graph_module
    branch = whole_module(gm.get_submodule(attachment.path))
    if not isinstance(branch, Branch):
        return "its module is not a branch"
    if branch.not_foldable:
        return f"not foldable: {branch.not_foldable}"
    combined = next((a for a in edit.program.attachments if attachment.path in a.members), None)
    if combined is not None:
        return f"not foldable: {combined.adapter} weighs what it adds against other branches"
    if attachment.reads:
        return f"not foldable: it reads {', '.join(attachment.reads)}, which depend on the input"
    if isinstance(branch, Expression):
        return _fold_expression(edit, attachment, branch, result)
    site = edit.program.sites[attachment.site]
    if not isinstance(site, LinearSite):
        return f"not foldable: {site.kind} sites have no weight"
    calls = [n for n in gm.graph.nodes if n.op == "call_module" and n.target == attachment.path]
    found: list[tuple[Match, Fold]] = []
    for call in calls:
        match = _match_at(edit, call)
        if isinstance(match, Mismatch):
            return match.reason
        found.append(match)
    if {str(m["w"].name) for m, _ in found} == set() or len(found) < len(site.nodes):
        return "not every call of the weight has the branch"
    if reason := edit.weight(site).refuses(branch):
        return f"not foldable: {reason}"
    if site.tied:
        if tied == "keep":
            return f"not foldable: {site.weight} is tied to {', '.join(site.tied)} (tied=keep)"
        if tied == "refuse":
            raise FoldError(
                f"{site.id}: the weight is tied to {', '.join(site.tied)}, so folding would change "
                "both. Choose fold{tied=untie} (an own tensor here), fold{tied=both} (change the "
                "shared tensor) or fold{tied=keep} (leave the branch in the graph)."
            )
        if tied == "untie":
            site = _untie(edit, site)
    weight = edit.weight(site)
    weight.require_values()
    weight, lost = found[0][1](weight, branch)
    result.lost = max(result.lost, lost)
    weight.store()
    remember(edit.program, attachment.path)
    for match, _ in found:
        _erase(edit, match)
    gm.delete_submodule(attachment.path)
    return None


def _fold_expression(
    edit: Editor, attachment: Attachment, branch: Expression, result: Folding
) -> str | None:
    """Stores the value of an expression under the parameter's name."""
    gm = edit.graph_module
    call = next(n for n in gm.graph.nodes if n.target == attachment.path)
    name = str(call.meta["expression"])
    source = call.args[0]
    if not isinstance(source, Node) or source.op != "get_attr":
        return "another expression that does not fold stands between it and the stored tensor"
    held = gm.get_parameter(name)
    if held.is_meta:
        raise MetaTensorError(
            f"{name} is on the meta device. Load weights before folding (peftfx.load_weights)."
        )
    with torch.no_grad():
        before = whole(held.detach())
        made = branch.eval()(before).clone()  # in training it may be random
        if (wide := torch.promote_types(made.dtype, torch.float32)) != made.dtype:
            exact = branch(before.to(wide))
            result.lost = max(result.lost, _lost(before, exact, made))
    if not all_finite(made):
        raise NonFiniteError(
            f"folding into {name} gives NaN or infinity in {str(made.dtype)[6:]}. Look for "
            "non-finite branch parameters, or keep the branch."
        )
    set_attribute(gm, name, nn.Parameter(placed_like(made, held), held.requires_grad))
    remember(edit.program, attachment.path)
    call.replace_all_uses_with(source)
    gm.graph.erase_node(call)
    gm.delete_submodule(attachment.path)
    return None


def _match_at(edit: Editor, call: Node) -> tuple[Match, Fold] | Mismatch:
    """The rule that fits around a branch's call; the most telling reason if none does."""
    gm = edit.graph_module
    roots = [call, *call.users]
    reason: Mismatch | None = None
    for rule, action in RULES:
        for root in roots:
            found = rule.match(gm, root)
            if isinstance(found, Match) and found["branch"] is call:
                if expression_of(strip(found["w"], VIEWS)) is not None:
                    blocker = "its weight is computed by an expression that does not fold"
                    return Mismatch(f"not foldable now: {blocker}", call)
                return found, action
            if isinstance(found, Mismatch) and found.node is not None and (
                "also read" in found.reason or reason is None
            ):  # fmt: skip
                reason = found
    blocker = reason.reason if reason is not None else "no rule fits"
    if "also read" not in blocker:
        blocker = "another branch that does not fold stands between it and the weight"
    return Mismatch(f"not foldable now: {blocker}", call)


def _erase(edit: Editor, match: Match) -> None:
    """Removes the branch's nodes of one match, leaving the bare linear."""
    graph = edit.graph_module.graph
    call: Node = match["branch"]
    root = match.root
    linear = next(n for n in match.nodes if n is not call and n not in (root,)) if (
        root is not call and len(match.nodes) == 3
    ) else next(n for n in match.nodes if n is not call)  # fmt: skip
    if linear is root:  # input scale: linear(scale(x))
        linear.replace_input_with(call, match["x"])
        graph.erase_node(call)
        return
    root.replace_all_uses_with(linear)
    if root is not call:
        graph.erase_node(root)
    graph.erase_node(call)


def _untie(edit: Editor, site: LinearSite) -> LinearSite:
    """Gives the linear calls of a tied weight a Parameter of their own, under the alias's name."""
    gm = edit.graph_module
    names = [a for a, c in edit.program.aliases.items() if c == site.weight]
    own = site.id.partition(":")[0]
    alias = own if own in names else (names[0] if names else _unused(gm, f"{site.weight}_untied"))
    tensor = gm.get_parameter(site.weight).detach().clone()
    set_attribute(gm, alias, nn.Parameter(tensor, requires_grad=False))
    for node in list(gm.graph.nodes):
        if node.name not in site.nodes:
            continue
        for operand in node.all_input_nodes:
            found = parameter_of(operand)
            if found is not None and found[0] == site.weight and not is_op(node, EMBEDDING):
                with gm.graph.inserting_before(node):
                    own = gm.graph.get_attr(alias)
                if operand.op != "get_attr":
                    raise FoldError(f"{site.id}: a tied weight behind a view cannot be untied.")
                node.replace_input_with(operand, own)
    edit.program.untied = (*edit.program.untied, alias)
    items = tuple(
        replace(s, weight=alias, tied=())
        if isinstance(s, LinearSite) and (s.weight, s.nodes) == (site.weight, site.nodes) else s
        for s in edit.program.sites
    )  # fmt: skip
    edit.program.sites = replace(edit.program.sites, items=items)
    return replace(site, weight=alias, tied=())


def _unused(gm: nn.Module, name: str) -> str:
    """`name`, numbered if a parameter is called so."""
    taken = {n for n, _ in gm.named_parameters()}
    numbered = (f"{name}_{count}" for count in itertools.count(2))
    return next(n for n in itertools.chain([name], numbered) if n not in taken)
