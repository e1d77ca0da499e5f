"""Fusing a linear and the branch beside it, or a change of some of its weight, into one call, by
pattern, reversibly.

The branch module stays where it is, with its parameters; only its call changes: from `branch(x)`
to `branch(x, weight, bias)`, which runs the fused operator on the branch's factors; a row scale's
`branch(linear, x, weight, bias)` loses the linear. A `PartialDelta` of the weight goes from
`linear(x, branch(weight), bias)` to `branch(x, weight, bias)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import Module

from ...branches.branch import Delta, Fused, RowScale
from ...graph.aten import LINEAR, SLICES, VIEWS, is_op, strip, value, written
from ...graph.weighted_call import linear_parts
from ...program.sites import LinearSite, Site
from ..calls.attach import Attaching
from ..linear.compose import fold_ready
from ..linear.sparse import PartialDelta
from .pattern import Match
from .rules import delta_rule, rows_rule

Chooses = Callable[[Tensor, tuple[Tensor, Tensor, float]], Fused]
"""The operator for a weight `[out, in]` and the factors of the branch beside it."""


def fuse_deltas(edit: Attaching, operator: Chooses) -> None:
    """Lowers every innermost delta that has factors; reports the others with the reason."""
    gm = edit.graph_module
    sites = {a.path: edit.program.sites[a.site] for a in edit.program.attachments}
    fused: set[str] = set()
    changed = {strip(n, VIEWS | SLICES) for n in map(written, gm.graph.nodes) if n is not None}
    for root in list(gm.graph.nodes):
        matches = (rule.match(gm, root) for rule in (delta_rule, rows_rule))
        match = next((m for m in matches if isinstance(m, Match)), None)
        if match is None:
            continue
        call = match["branch"]
        path = str(call.target)
        branch, site = gm.get_submodule(path), sites[path]
        obstacle = _obstacle(edit, site, branch, call)
        if obstacle is not None:
            edit.skip(site, obstacle)
            continue
        factors: Any = branch.factors()  # pyright: ignore
        weight: Any = edit.weight(site).dense()  # pyright: ignore
        by = _itself if factors is None else operator(weight, factors)
        _fuse(gm, match, by)
        if isinstance(branch, RowScale):
            branch.in_place = root not in changed
        fused.add(path)
        edit.edited.append(site.id)
    skipped = {site_id for site_id, _ in edit.skipped}
    for path, site in sites.items():
        branch = gm.get_submodule(path)
        if isinstance(branch, Delta | RowScale) and path not in fused and site.id not in skipped:
            edit.skip(site, "another branch stands between it and the linear")


def _itself(*_: Any) -> Tensor:
    """Marks a branch that computes its linear itself."""
    raise NotImplementedError


def _obstacle(edit: Attaching, site: Site, branch: Module, call: Node) -> str | None:
    """Why no fused operator computes a branch together with what it stands beside, if so."""
    if not isinstance(site, LinearSite):
        return f"it is no linear ({site.kind}): there is no fused operator for that"
    fuses = isinstance(branch, Delta) and branch.fuses_reads
    if call.kwargs and not fuses:
        return f"its branch reads {', '.join(call.kwargs)}"
    if not fuses and (not isinstance(branch, Delta | RowScale) or branch.factors() is None):
        return "its branch has no low-rank factors"
    if branch.dropout or branch.features is not None:
        return "its branch has dropout, or is for a part of a fused weight"
    if site.in_out or site.left:
        return "its weight is stored [in, out] or multiplies from the left"
    weight = edit.weight(site)
    if not weight.is_dense:
        said = f"its weight is quantised ({weight.format.said})"
        return f"{said}: there is no fused operator for that"
    return None


def _fuse(gm: GraphModule, match: Match, operator: Fused) -> None:
    """Makes the branch's call compute the linear and the sum, too, in place of both."""
    root, call, x = match.root, match["branch"], match["x"]
    branch = gm.get_submodule(str(call.target))
    linear = next(n for n in match.nodes if n not in (root, call))
    first = (x, x) if isinstance(branch, RowScale) else (x,)
    branch.lowered = operator  # pyright: ignore[reportArgumentType]
    call.args = (*first, match["w"], match["b"])
    call.meta["call"] = linear.meta.get("call", linear.name)
    call.meta.pop("composed", None)
    if root is not call:
        root.replace_all_uses_with(call)
        gm.graph.erase_node(root)
    gm.graph.erase_node(linear)


def fuse_partial(edit: Attaching, operator: Callable[..., Tensor]) -> None:
    """Lowers every partial delta of a weight that one linear reads; reports the others."""
    gm = edit.graph_module
    branches = {a.path: edit.program.branch(a) for a in edit.program.attachments}
    sites = {a.path: edit.program.sites[a.site] for a in edit.program.attachments}
    for call in list(gm.graph.nodes):
        branch = branches.get(str(call.target)) if call.op == "call_module" else None
        if not isinstance(branch, PartialDelta):
            continue
        linear = next(iter(call.users))
        parts = linear_parts(linear) if is_op(linear, LINEAR) and len(call.users) == 1 else None
        if parts is None or parts[1] is not call:
            if value(call).dim() > 1:  # a bias has nothing to save
                name = call.meta["expression"]
                edit.skip(sites[str(call.target)], f"{name} is not what one linear multiplies by")
            continue
        x, _, bias = parts
        with gm.graph.inserting_before(linear):
            fused = gm.graph.call_module(str(call.target), (x, call.args[0], bias))
        fused.meta = {
            **linear.meta, "call": linear.meta.get("call", linear.name),
            "expressed": (call.name, dict(call.meta)),
        }  # fmt: skip
        linear.replace_all_uses_with(fused)
        gm.graph.erase_node(linear)
        gm.graph.erase_node(call)
        branch.lowered = operator  # pyright: ignore[reportAttributeAccessIssue]
        edit.edited.append(sites[str(call.target)].id)


def restore_deltas(edit: Attaching) -> None:
    """Undoes `fuse_deltas` and `fuse_partial`."""
    fold_ready(edit.program)
    for attachment in edit.program.attachments:
        branch = edit.program.branch(attachment)
        if isinstance(branch, Delta | RowScale | PartialDelta):
            branch.lowered = None
        if isinstance(branch, RowScale):
            branch.in_place = False
