"""Parts whose factors are made of what all of them share, as the methods' own branches."""

from __future__ import annotations

from torch import Tensor

from ...rewriter.branches.branch import Branch
from ...rewriter.edits.calls.call import Value
from ...rewriter.edits.edit import Editor
from ...rewriter.parts.parts import Part
from ...rewriter.parts.shared_parts import Mixture, Vera
from ...rewriter.program.sites import LinearSite
from ..reparameterized.vector_bank import Bank, VBLoRABranch
from ..reparameterized.vera import Projection, VeRABranch
from .sublayer_parts import sites_of


def insert_shared(edit: Editor, part: Part, known: dict[int, Value]) -> bool:
    """Puts a part in as a branch that reads what is shared; whether it is one that can be.

    It stands beside a whole linear, and its factors are what the shared tensors make; the rest
    comes in by its factors.

    Args:
        known: what is shared already, by the identity of a part's tensor.
    """
    if isinstance(part, Vera) and part.whole() and (site := _linear(edit, part)):
        _vera(edit, site, part, known)
        return True
    if isinstance(part, Mixture) and part.whole() and (site := _linear(edit, part)):
        _mixture(edit, site, part, known)
        return True
    return False


def bound_branch(part: Vera | Mixture, like: Tensor) -> Branch:
    """The branch of a part that is `whole`, with what it reads of what is shared."""

    def own(*tensors: Tensor | None) -> list[Tensor]:
        return [t.to(like) for t in tensors if t is not None]

    if isinstance(part, Vera):
        d, vector, down, up = own(part.d, part.vector, part.down, part.up)
        return VeRABranch(d, vector, part.a.shape[1], part.dropout).bound(down=down, up=up)
    first, second, bank = own(part.logits_a, part.logits_b, part.bank)
    branch = VBLoRABranch((first, second), part.topk, part.dropout, _places(part, like))
    return branch.bound(bank=bank)


def _places(part: Mixture, like: Tensor) -> tuple[Tensor, Tensor] | None:
    if part.places_a is None or part.places_b is None:
        return None
    return part.places_a.to(like.device), part.places_b.to(like.device)


def _linear(edit: Editor, part: Vera | Mixture) -> LinearSite | None:
    """The linear beside which it stands, if it is all of a weight."""
    sites = sites_of(edit.program, part.target, part.lookup)
    site = sites[0]
    if len(sites) > 1 or not isinstance(site, LinearSite) or site.features is not None:
        return None
    return site if site.matrices == (1, len(part.b), part.a.shape[1]) else None


def _vera(edit: Editor, site: LinearSite, part: Vera, known: dict[int, Value]) -> None:
    like = edit.like(site)
    own: list[Tensor] = [t.to(like, copy=True) for t in (part.d, part.vector) if t is not None]
    both = known.get(id(part.down))
    if both is None and part.down is not None and part.up is not None:
        number = f"_{len(known)}" if known else ""
        shared = Projection(part.down, part.up, persistent=False).to(like)
        both = known[id(part.down)] = edit.share(f"projection{number}", shared)
    if both is not None:
        branch = VeRABranch(own[0], own[1], site.in_features, part.dropout)
        edit.add(site, branch, down=edit.item(both, 0), up=edit.item(both, 1))


def _mixture(edit: Editor, site: LinearSite, part: Mixture, known: dict[int, Value]) -> None:
    if part.bank is None or part.logits_a is None or part.logits_b is None:
        return
    like = edit.like(site)
    bank = known.get(id(part.bank))
    if bank is None:
        number = f"_{len(known)}" if known else ""
        shared = Bank(part.bank.to(like, copy=True))
        bank = known[id(part.bank)] = edit.share(f"bank{number}", shared)
    logits = part.logits_a.to(like, copy=True), part.logits_b.to(like, copy=True)
    places = _places(part, like)
    edit.add(site, VBLoRABranch(logits, part.topk, part.dropout, places), bank=bank)
