"""Folding: turns branches into constants by the rules of `rules`, from the inside out, to a
fixpoint.

New tensors are written; the old ones stay in earlier programs, and nothing is ever subtracted
back. What else reads a tensor that would change decides whether it may (`readers`), and what was
written is compared with what the branches compute (`certificate`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.fx import Node

from ...branches.branch import Branch, Expression, OutputScale
from ...errors import FoldError, NonFiniteError
from ...graph.aten import erase_dead, expression_of, parameter_of
from ...graph.sharded import whole_module
from ...measure.constants import constant_reads
from ...program.history import Attachment
from ...program.readers import Readers
from ...program.sites import WeightSite
from ...program.state import State
from ...weights.certificate import check_folded, exact_of, require_finite_base
from ...weights.shape import reads_as_stored
from ...weights.verdict import Matrix
from ..calls.attach import Attaching
from ..linear.compose import ORDER, fold_ready
from ..linear.expression import remember
from .expressions import fold_expression, require_branch_values
from .packing import while_unpacked
from .pattern import Match, Mismatch
from .rest import foreseen, put_rest
from .result import Folding
from .rules import Fold, linear_of, match_at, require_finite
from .untie import untie


def fold(
    edit: Attaching,
    paths: Sequence[str],
    tied: str,
    lossy: bool = False,
    *,
    least: float = 0.0,
    rank: int = 0,
) -> Folding:
    """Folds the named branches as far as possible.

    Args:
        edit: an editor over a fork.
        paths: module paths of the branches to fold.
        tied: what to do where something else reads a tensor that folding changes: `refuse`,
            `keep` (leave the branch), `untie` (give these calls a tensor of their own) or `both`
            (change the shared tensor).
        lossy: also into weights whose format has to round them again.
        least, rank: see `Folding`.

    Raises:
        FoldError: a tensor with other readers and `tied="refuse"`.
        VerifyError: a weight is not what its branches compute, see `certificate`.
        NonFiniteError: a base tensor or branch is not finite, or the result overflows its dtype.
    """
    named = [a for a in edit.program.attachments if a.path in paths]
    if least or rank:
        _require_matrices(edit, named)
    constants = constant_reads(edit.program, named)
    result = Folding(constants=constants, lossy=lossy, least=least, rank=rank)
    fold_ready(edit.program, frozenset(paths))
    joint = any("expressions" in node.meta for node in edit.graph_module.graph.nodes)
    count = -1
    while count < len(result.folded):
        count = len(result.folded)
        for group in by_weight(edit.program, paths).values():
            fold_weight(edit, group, tied, result)
        if not joint:  # what folds at one weight makes way at that alone
            break
    done = set(result.folded)
    edit.program.attachments = tuple(a for a in edit.program.attachments if a.path not in done)
    fold_ready(edit.program)
    erase_dead(edit.graph_module)
    called = {str(n.target) for n in edit.graph_module.graph.nodes if n.op == "call_module"}
    for path in edit.program.shared:
        if path not in called:  # what only folded branches read leaves with them
            remember(edit.program, path)
    return result


def _require_matrices(edit: Attaching, named: Sequence[Attachment]) -> None:
    """Raises FoldError where a weight is computed by an expression: nothing of that can stay beside
    the weight, nor can it be told beforehand what rounding leaves."""
    for attachment in named:
        site = edit.program.sites[attachment.site]
        if attachment.slot != Expression.slot or not isinstance(site, WeightSite):
            continue
        if _changes(edit, attachment, site.weight):
            raise FoldError(
                f"{site.id}: {attachment.adapter!r} computes the weight itself, of which neither "
                "mode=residual nor mode=keep leaves anything beside it. Use mode=fold, or leave "
                "this adapter out with names=[...]."
            )


def branch_of(program: State, attachment: Attachment, reads: Mapping[str, Tensor]) -> Branch:
    """The complete module of an attached branch, also where it is sharded, with the constants that
    it reads."""
    branch = whole_module(program.branch(attachment))
    if not isinstance(branch, Branch):
        raise FoldError(f"{attachment.site}: {attachment.path} is no branch, so it cannot fold.")
    return branch.bound(**reads) if reads else branch


def by_weight(program: State, paths: Sequence[str]) -> dict[str, list[Attachment]]:
    """The named branches, grouped by the weight that they fold into (or by their site)."""
    groups: dict[str, list[Attachment]] = {}
    for attachment in program.attachments:
        if attachment.path in paths:
            site = program.sites[attachment.site]
            key = site.weight if isinstance(site, WeightSite) else site.id
            groups.setdefault(key, []).append(attachment)
    return groups


def fold_weight(edit: Attaching, group: Sequence[Attachment], tied: str, result: Folding) -> None:
    """Folds the branches of one weight to a fixpoint, and checks what became of the weight; needs
    the values of no other weight."""
    count = -1
    while count < len(result.folded):
        count = len(result.folded)
        left = [a for a in group if a.path not in result.folded]
        for part in _by_calls(edit.program, left):
            _fold_calls(edit, part, tied, result)


def _by_calls(program: State, group: Sequence[Attachment]) -> list[list[Attachment]]:
    """The branches of one weight, parted where other calls read it: they may get their own."""
    parts: dict[tuple[str, ...], list[Attachment]] = {}
    for attachment in group:
        parts.setdefault(tuple(program.sites[attachment.site].nodes), []).append(attachment)
    return list(parts.values())


def _fold_calls(edit: Attaching, group: Sequence[Attachment], tied: str, result: Folding) -> None:
    """Folds the branches of one weight at the same calls, as far as enough of them would be left;
    of what is folded, the largest part may stay a branch."""
    constants = result.constants
    branches = {a.path: branch_of(edit.program, a, constants.get(a.path, {})) for a in group}
    site = _foreseeable(edit, group, branches, result)
    if site is None:
        _fold_unpacked(edit, group, branches, tied, result)
        return
    mine = [(a.path, branches[a.path]) for a in sorted(group, key=lambda a: ORDER[a.slot])]
    weight = edit.weight(site)
    verdict = foreseen(weight, mine) if result.least else None
    if verdict is not None and verdict.survives < result.least:
        result.spare(branches, verdict, weight.format.said)
        return
    old, exact = exact_of(weight.matrix(), ()), exact_of(weight.matrix(), mine)
    _fold_unpacked(edit, group, branches, tied, result)
    if result.rank and {*branches} <= {*result.folded}:
        put_rest(edit, [a.site for a in group], old, exact, result)


def _foreseeable(
    edit: Attaching,
    group: Sequence[Attachment],
    branches: Mapping[str, Branch],
    result: Folding,
) -> WeightSite | None:
    """The site of branches where what rounding leaves is asked for, and can be told beforehand."""
    site = edit.program.sites[group[0].site]
    if not (result.least or result.rank) or not isinstance(site, WeightSite):
        return None
    weight = edit.weight(site)
    blocked = any(
        a.slot not in ORDER or _obstacle(edit.program, a, branches[a.path]) for a in group
    )
    refused = not result.lossy and any(weight.refuses(b) for b in branches.values())
    return None if blocked or refused or weight.device.type == "meta" else site


def _fold_unpacked(
    edit: Attaching,
    group: Sequence[Attachment],
    branches: Mapping[str, Branch],
    tied: str,
    result: Folding,
) -> None:
    """Folds the branches of one weight at the same calls, unpacked meanwhile where its format holds
    no other matrix."""
    site = edit.program.sites[group[0].site]
    if not (
        result.lossy
        and isinstance(site, WeightSite)
        and any(
            edit.weight(site).refuses(branches[a.path])
            for a in group
            if _changes(edit, a, site.weight)
        )
    ):
        _fold_exactly(edit, group, branches, tied, result)
        return
    done = while_unpacked(
        edit, site, lambda: _fold_exactly(edit, group, branches, tied, result), frozenset(branches)
    )
    result.of(edit.program).refresh()
    if done is not None:
        result.packed_again(site.id, *done)


def _changes(edit: Attaching, attachment: Attachment, weight: str) -> bool:
    """Whether a branch of a site changes the weight: an expression may be of its bias."""
    calls = edit.graph_module.graph.find_nodes(op="call_module", target=attachment.path)
    return any(expression_of(call) in (None, weight) for call in calls)


def _fold_exactly(
    edit: Attaching,
    group: Sequence[Attachment],
    branches: Mapping[str, Branch],
    tied: str,
    result: Folding,
) -> None:
    """Folds branches into a weight as it is stored, and compares it with them."""
    before = _matrix(edit, group)
    progress = True
    while progress:
        progress = False
        for attachment in [a for a in group if a.path not in result.folded]:
            reason = _try(edit, attachment, branches[attachment.path], tied, result)
            if reason is None:
                progress = True
                result.folded.append(attachment.path)
                result.kept.pop(attachment.path, None)
                if attachment.slot == Expression.slot:  # what is below all other branches
                    before = _matrix(edit, group)
            else:
                result.kept[attachment.path] = reason
    done = [a for a in group if a.path in result.folded and a.slot in ORDER]
    if before is None or not done:
        return
    after = _matrix(edit, done)
    site = edit.program.sites[done[0].site]
    mine = [(a.path, branches[a.path]) for a in sorted(done, key=lambda a: ORDER[a.slot])]
    verdict = check_folded(site.id, before, after or before, mine)
    result.measured(site.id, verdict, str(before.dtype)[6:])


def _matrix(edit: Attaching, group: Sequence[Attachment]) -> Matrix | None:
    """The weight of a group now; None where no branch stands beside one, or it has no values."""
    beside = [a for a in group if a.slot in ORDER]
    site = edit.program.sites[beside[0].site] if beside else None
    if not isinstance(site, WeightSite):
        return None
    weight = edit.weight(site)
    return None if weight.device.type == "meta" else weight.matrix()


def _try(
    edit: Attaching, attachment: Attachment, branch: Branch, tied: str, result: Folding
) -> str | None:
    """Folds one branch; returns the reason if it cannot be folded (now)."""
    if reason := _obstacle(edit.program, attachment, branch):
        return reason
    if isinstance(branch, Expression):
        return fold_expression(edit, attachment, branch, result)
    site = edit.program.sites[attachment.site]
    if not isinstance(site, WeightSite):
        return f"not foldable: {site.kind} sites have no weight"
    matches = _matches(edit, attachment, site)
    if isinstance(matches, str):
        return matches
    if reason := edit.weight(site).refuses(branch):
        return f"not foldable: {reason}"
    linears = [linear_of(match) for match, _ in matches]
    shared = _settle_sharing(edit, site, branch, linears, tied, result.of(edit.program))
    if isinstance(shared, str):
        return shared
    weight = edit.weight(shared)
    weight.require_values()
    require_branch_values(attachment.path, branch)
    require_finite(weight, attachment.path, branch)
    try:
        matches[0][1](weight, branch).store()
    except NonFiniteError:
        require_finite_base(weight.name, weight.dense())
        raise
    remember(edit.program, attachment.path)
    for match, _ in matches:
        _erase(edit, match)
    edit.graph_module.delete_submodule(attachment.path)
    return None


def _obstacle(program: State, attachment: Attachment, branch: Branch) -> str:
    """Why a branch cannot be folded whatever is around it; empty if it can."""
    if branch.not_foldable:
        return f"not foldable: {branch.not_foldable}"
    combined = program.combined(attachment.path)
    if combined is not None:
        return f"not foldable: {combined.adapter} weighs what it adds against other branches"
    if varying := [name for name in attachment.reads if name not in branch.constants]:
        return f"not foldable: it reads {', '.join(varying)}, which depend on the input"
    return ""


def _matches(
    edit: Attaching, attachment: Attachment, site: WeightSite
) -> list[tuple[Match, Fold]] | str:
    """The rule at each call of a branch; the reason if one has none, or calls lack the branch."""
    nodes = edit.graph_module.graph.find_nodes(op="call_module", target=attachment.path)
    matches: list[tuple[Match, Fold]] = []
    for call in nodes:
        match = match_at(edit.graph_module, call)
        if isinstance(match, Mismatch):
            return match.reason
        matches.append(match)
    if not matches or len(matches) < len(site.nodes):
        return "not every call of the weight has the branch"
    for match, _ in matches:
        linear, known = linear_of(match), parameter_of(match["w"], depth=64)
        if known is not None and not reads_as_stored(site, linear):
            return f"not foldable: {linear.name} reads {known[0]} in another way than the site says"
    return matches


def _settle_sharing(
    edit: Attaching,
    site: WeightSite,
    branch: Branch,
    calls: Sequence[Node],
    tied: str,
    known: Readers,
) -> WeightSite | str:
    """The site whose tensors may be changed for these calls alone, or why there is none.

    Raises:
        FoldError: something else reads them, and `tied` says to refuse, or they cannot be parted.
    """
    names = edit.weight(site).names
    if isinstance(branch, OutputScale) and site.bias is not None:
        names.append(site.bias)
    if tied == "both":
        for name in names:
            if there := known.overlapping(name):
                raise FoldError(
                    f"{site.id}: {name} and {there[0]} are two parameters in one memory, and "
                    "fold{tied=both} would change only the first. Choose fold{tied=keep}, or make "
                    "them one parameter, or two of their own, before the model is captured."
                )
        return site
    for name in names:
        rest = known.others(name, calls)
        if not rest:
            continue
        if tied == "keep":
            return f"not foldable: {name} is also read by {rest[0]}"
        if tied == "refuse":
            raise FoldError(
                f"{site.id}: {name} is also read by {rest[0]}, so folding would change that, too. "
                "Choose fold{tied=untie} (an own tensor here), fold{tied=both} (change the "
                "shared tensor) or fold{tied=keep} (leave the branch in the graph)."
            )
        site = untie(edit, site, name, calls, rest)
        known.refresh()
    return site


def _erase(edit: Attaching, match: Match) -> None:
    """Leaves the bare linear of a match: the branch's call goes, and a delta's sum."""
    graph = edit.graph_module.graph
    call, root, linear = match["branch"], match.root, linear_of(match)
    if root is linear:  # input scale: linear(scale(x))
        linear.replace_input_with(call, match["x"])
    else:
        root.replace_all_uses_with(linear)
    for node in dict.fromkeys((root, call)):
        if node is not linear:
            graph.erase_node(node)
