"""What an adapter of a program is in parts (`rewriter/parts/parts.py`), for all writers.

Pieces of a fused weight become one part: with one `a` where all share it, else with their
ranks side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import Node

from ..passes.interchange.imported import Imported
from ..passes.interchange.prompt_parts import prefix_sites
from ..rewriter.api import Program
from ..rewriter.branches.branch import Branch, Delta, Scale
from ..rewriter.branches.prompts import KeyValue, Tokens
from ..rewriter.errors import ArtifactError, nearest
from ..rewriter.measure.constants import constant_reads
from ..rewriter.parts.formula_parts import Formula
from ..rewriter.parts.parts import (
    Bottleneck,
    Change,
    Coupling,
    Fusion,
    Hypercomplex,
    Invoked,
    LowRank,
    Part,
    Prefix,
    Prompt,
    Rows,
    Scaling,
    Trained,
)
from ..rewriter.parts.shared_parts import unshared
from ..rewriter.program.history import Attachment
from ..rewriter.program.sites import (
    EmbeddingSite,
    LinearSite,
    Site,
    WeightSite,
)
from ..rewriter.storage.parts import Parts, of_plan, same

AnyPart = TypeVar("AnyPart", bound=Part)
Piece = tuple[WeightSite, AnyPart]
PLACES = ("stack", "decoder", "own", "cross")
"""Where a format may put prefixes, see `Prefix.place`; the last two with `beside`."""


def adapter_parts(
    program: Program, adapter: str | Sequence[str] = "", beside: bool = False
) -> Parts:
    """An adapter in parts, or several as one.

    Args:
        program: which holds it unfolded.
        adapter: its name, or several; by default the only one, with those that train whole
            parameters or rows of tables (a head, new tokens), as other libraries have them.
        beside: whether the format has gates, and branches that read the stream, or combine others.

    Raises:
        ArtifactError: there is no such adapter, or a branch of it has no form in files: it reads
            other values, or is not linear.
    """
    given = [adapter] if isinstance(adapter, str) else list(adapter)
    names = [_chosen(program, n) for n in given] if any(given) else _together(program)
    each = [_parts_of(program, name, beside) for name in names]
    return Parts(tuple(p for parts in each for p in parts), names[0] if len(names) == 1 else "")


def _parts_of(program: Program, name: str, beside: bool) -> list[Part]:
    pieces: dict[tuple[str, str], list[Piece[Any]]] = {}
    formulas: dict[tuple[str, str], list[Formula]] = {}
    parts: list[Part] = []
    attached = program.attached_by(name)
    fixed = constant_reads(program, attached)
    for attachment in attached:
        site = program.sites[attachment.site]
        part = _part(program, attachment, fixed.get(attachment.path, {}), beside)
        if isinstance(part, Prefix):
            parts.append(_placed(program, attachment, part, PLACES[2:] if beside else PLACES[:2]))
        elif isinstance(part, LowRank | Change | Scaling) and isinstance(site, WeightSite):
            pieces.setdefault((site.weight, attachment.slot), []).append((site, part))
        elif isinstance(part, Formula) and isinstance(site, WeightSite):
            of_one = formulas.setdefault((site.weight, part.kind), [])
            of_one.append(replace(part, target=weight_name(program, site)))
        elif isinstance(part, Prompt) and part.place == "input":
            parts.append(part)  # files that have it so name no table
        elif isinstance(part, Rows | Invoked | Coupling | Prompt) and isinstance(site, WeightSite):
            parts.append(replace(part, target=weight_name(program, site)))
        elif isinstance(part, Bottleneck | Hypercomplex | Fusion):
            parts.append(replace(part, target=_last_product(program, site)))
        else:
            parts.append(part)
    parts += [_joined(program, each) for each in pieces.values()]
    parts += [_one_formula(each) for each in formulas.values()]
    own = program.tensors.owned.get(name, ())
    parts += [Trained(n, program.module.get_parameter(n).detach()) for n in own]
    return parts


def _together(program: Program) -> list[str]:
    """The adapters that are one in other libraries: at most one of them has more than rows."""
    names = program.adapters
    with_branches = [
        n for n in names
        if any(not isinstance(_own_part(program, a), Rows) for a in program.attached_by(n))
    ]  # fmt: skip
    return list(names) if names and len(with_branches) < 2 else [_chosen(program, "")]


def _own_part(program: Program, attachment: Attachment) -> Part | None:
    branch = program.branch(attachment)
    return branch.part() if isinstance(branch, Branch) else None


def _chosen(program: Program, adapter: str) -> str:
    names = program.adapters
    if not adapter and len(names) == 1:
        return names[0]
    if adapter in names:
        return adapter
    have = ", ".join(names) or "none"
    if not adapter:
        raise ArtifactError(f"the program has the adapters {have}; say which: adapter=...")
    raise ArtifactError(
        f"there is no adapter {adapter!r}. Adapters: {have}; nearest: {nearest(adapter, names)}."
    )


def _part(
    program: Program, attachment: Attachment, fixed: Mapping[str, Tensor], beside: bool
) -> Part:
    """What a branch is; `fixed`: what it reads that depends on stored tensors alone."""
    branch = program.branch(attachment)
    reason = "no other library has a form for it"
    if fixed and isinstance(branch, Branch):
        reads = {k: n for k, n in attachment.reads.items() if k not in fixed}
        branch, attachment = branch.bound(**fixed), replace(attachment, reads=reads)
    part = branch.part() if isinstance(branch, Branch) else None
    if (attachment.reads or attachment.members) and not beside:
        part = part if isinstance(part, Invoked) else None
        reason = "it reads other values of the graph, which this format has no form for"
    elif isinstance(branch, Branch) and not attachment.reads.keys() - {"gate", "seen"}:
        part = _beside(program, attachment, part or _by_slot(branch))
    if part is None:
        raise ArtifactError(
            f"{attachment.adapter}: the {type(branch).__name__} at {attachment.site} cannot be "
            f"written: {reason}. Save it with peftfx.save, or fold it and write the weights."
        )
    return part


def _beside(program: Program, attachment: Attachment, part: Part | None) -> Part | None:
    """A part with what its branch reads: a gate's tensors, and which value it sees."""
    nodes = {n.name: n for n in program.module.graph.nodes}
    if isinstance(part, Bottleneck | Fusion) and "seen" in attachment.reads:
        seen = _seen(program, attachment, nodes)
        normed = part.reads == "input" and seen == "stream"
        part = replace(part, reads="input" if normed else seen)
    if isinstance(part, Fusion):
        owners = {a.path: a.adapter for a in program.attachments}
        part = replace(part, members=",".join(owners[m] for m in attachment.members))
    if "gate" not in attachment.reads:
        return part
    call = nodes[attachment.reads["gate"]]
    gate = dict(program.module.get_submodule(str(call.target)).named_parameters())
    plain = gate.keys() == {"weight", "bias"} and call.kwargs.keys() == {"hidden"}
    owner = program.module.get_submodule(str(call.target))
    if not plain or not isinstance(part, Bottleneck | LowRank | Prefix):
        return None  # padding does not count in it, or it is no linear of hidden states
    if getattr(owner, "reach", "all") != "all":
        return None  # each token has its own, of those before it
    return replace(part, gate=gate["weight"].detach(), gate_bias=gate["bias"].detach())


def _seen(program: Program, attachment: Attachment, nodes: Mapping[str, Node]) -> str:
    """What a branch on a sublayer's output reads beside it, as `Bottleneck` calls it."""
    seen, site = nodes[attachment.reads["seen"]], program.sites[attachment.site]
    calls = [n for n in nodes.values() if n.op == "call_module" and n.target == attachment.path]
    if seen in (calls[0].args[0], nodes[site.nodes[0]]):
        return "output"
    return "residual" if seen in nodes[site.nodes[1]].all_input_nodes else "stream"


def _last_product(program: Program, site: Site) -> str:
    """The weight whose product is the last one of a sublayer."""
    role = "o" if site.role == "attn" else "ffn.down"
    place = site.stream, site.layer, getattr(site, "cross", False)
    for each in program.sites:
        if isinstance(each, LinearSite) and each.role == role and place == (
            each.stream, each.layer, each.cross
        ):  # fmt: skip
            return each.weight
    raise ArtifactError(
        f"{site.id} ends with no linear of its own, by which files would name it. Save the adapter "
        "with peftfx.save."
    )


def _by_slot(branch: Branch) -> Part | None:
    """What a branch is by its slot alone."""
    match branch:
        case Delta() if not branch.not_foldable:
            return Change("", branch.delta(**branch.constants).detach(), type(branch).__name__)
        case Scale():
            return Scaling("", branch.scale(**branch.constants).detach(), branch.writes)
        case Tokens():
            return Prompt("", branch.rows().detach(), branch.place)
        case KeyValue():
            key, value = branch.rows()
            return Prefix("", key.detach(), value.detach(), 0)
        case _:
            return None


def weight_name(program: Program, site: WeightSite) -> str:
    """What the original model calls the weight, by the name that the site's module reads it."""
    names = program.tensors.names(site.weight)
    if len(names) == 1 or isinstance(site, EmbeddingSite):
        return names[0]
    tables = {s.weight for s in program.sites if isinstance(s, EmbeddingSite)}
    return next((n for n in names if n not in tables), names[0])


def _joined(program: Program, pieces: Sequence[Piece[Any]]) -> Part:
    """One part for all that an adapter has at a weight."""
    (site, first), name = pieces[0], weight_name(program, pieces[0][0])
    lookup = isinstance(site, EmbeddingSite)
    if len(pieces) == 1 and site.features is None:
        more = {"lookup": lookup} if isinstance(first, LowRank) else {}
        return replace(first, target=name, **more)
    if getattr(first, "gate", None) is not None:
        raise ArtifactError(
            f"{name}: parts of a fused weight have gates, each of its own. Fold it."
        )
    out = _outputs(program, site)
    if isinstance(first, LowRank):
        own = [(site, unshared(part)) for site, part in pieces]
        return replace(_low_rank(own, out), target=name, lookup=lookup)
    if isinstance(first, Scaling):
        return replace(first, target=name, vector=_spread(pieces, lambda p: p.vector, out, 1.0))
    return replace(first, target=name, delta=_spread(pieces, lambda p: p.delta, out, 0.0))


def _one_formula(pieces: Sequence[Formula]) -> Formula:
    """One part of those of a weight, which several branches may be together."""
    held = [{n: v for n, v in vars(p).items() if isinstance(v, Tensor)} for p in pieces]
    own = {name: tensor for tensors in held for name, tensor in tensors.items()}
    if len(own) < sum(map(len, held)):
        raise ArtifactError(
            f"{pieces[0].target}: {len(pieces)} parts of a fused weight have a {pieces[0].method} "
            "each, which no other library has. Fold it, or save it with peftfx.save."
        )
    return replace(pieces[0], **own)


def _outputs(program: Program, site: WeightSite) -> int:
    """How many rows all matrices of a weight have."""
    stored = program.base.base_tensors()[site.weight]
    count, _, size = site.matrices
    return stored.numel() // size if count else 0


def _rows(site: WeightSite, out: int) -> Tensor:
    """The rows of `[count * out, ...]` that a site has."""
    count = site.matrices[0]
    if site.features is None:
        return torch.arange(out)
    first = torch.arange(count)[:, None] * (out // count)
    return (first + torch.tensor(site.features)).flatten()


def _spread(
    pieces: Sequence[Piece[AnyPart]], of: Callable[[AnyPart], Tensor], out: int, fill: float
) -> Tensor:
    """Rows of pieces at their places in the whole weight."""
    first = of(pieces[0][1])
    wide = first.new_full((out, *first.shape[1:]), fill)
    for site, part in pieces:
        wide[_rows(site, out)] = of(part)
    return wide


def _low_rank(pieces: Sequence[Piece[LowRank]], out: int) -> LowRank:
    (site, first), count = pieces[0], pieces[0][0].matrices[0]
    shared = all(torch.equal(p.a, first.a) and p.scale == first.scale for _, p in pieces)
    a = first.a if shared else torch.cat([p.a for _, p in pieces], -2)
    wide = first.b.new_zeros(out, a.shape[-2])
    column = 0
    for piece, part in pieces:
        columns = slice(column, column + part.a.shape[-2])
        b = part.b.reshape(-1, part.b.shape[-1]) * (part.scale / first.scale)
        wide[_rows(piece, out), columns] = b
        column += 0 if shared else part.a.shape[-2]
    b = wide if count == 1 else wide.unflatten(0, (count, -1))
    magnitude = None
    if first.magnitude is not None:
        if sum(len(_rows(s, out)) for s, _ in pieces) != out:
            raise ArtifactError(
                f"{site.weight}: magnitudes are on some features of a fused weight, which no other "
                "library has. Fold it, or adapt all of the weight."
            )
        magnitude = _spread(pieces, _magnitude, out, 1.0)
    return replace(first, a=a, b=b, magnitude=magnitude)


def _magnitude(part: LowRank) -> Tensor:
    if part.magnitude is None:
        raise ArtifactError(f"{part.target}: some features have magnitudes and some have none.")
    return part.magnitude


def _placed(
    program: Program, attachment: Attachment, part: Prefix, places: Sequence[str]
) -> Prefix:
    """A prefix with its place among the attentions that a format tells apart."""
    own: Any = program.sites[attachment.site]
    sites = prefix_sites(program.sites)
    place = next((n for n in places if own in sites[n]), None)
    if place is None:
        raise ArtifactError(
            f"{attachment.site}: other libraries put no prefix there, but at attentions of tokens "
            "with one another, of the decoder where there is one. Say where=... of prefix_tuning."
        )
    record = next(r for r in program.history if r.adapter == attachment.adapter)
    listed: Any = record.plan.decisions.get("parts", ())
    shifted = bool(listed) and all(p.get("shifted", True) for p in listed)
    shifted = getattr(record.applied, "shift_positions", shifted)
    layer = sites[place].index(own)
    moved = bool(listed) and all(p.get("keys_moved", False) for p in listed)
    return replace(part, layer=layer, shifted=shifted, place=place, keys_moved=moved)


def unchanged(program: Program, parts: Parts) -> Parts | None:
    """What an adapter was read from, if it still is that."""
    steps = [r for r in program.history if r.adapter == parts.source]
    steps = [r for r in steps if isinstance(r.applied, Imported)]
    if not steps:
        return None
    read = of_plan(steps[0].plan)
    wanted = {_key(p): p for p in read.parts}
    equal = len(parts.parts) == len(read.parts) and all(
        (w := wanted.get(_key(p))) is not None and same(w, p) for p in parts.parts
    )
    return read if equal else None


def _key(part: Part) -> tuple[Any, ...]:
    names = ("layer", "lookup", "place")
    return part.kind, part.target, *(getattr(part, n, None) for n in names)
