"""Which entries of stored tensors train: scored, chosen, kept in plans, inserted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..edits.edit import Editor
from ..edits.linear.sparse import DenseDelta, Part, SparseDelta, parts_of
from ..edits.read import Reading
from ..errors import MetaTensorError, OptionError, PassError
from ..program.history import Plan
from ..program.sites import Site
from ..program.state import State
from ..weights.weight import stored_weights
from .allocate import largest, most
from .gradients import gradient_sums


def _same(gradient: Tensor) -> Tensor:
    return gradient


def _both(gradient: Tensor) -> Tensor:
    return torch.stack((gradient, gradient.square()))


def _newton(sums: Tensor) -> Tensor:
    tiny = torch.finfo(sums.dtype).tiny
    return sums[0].square() / sums[1].clamp(min=tiny)


Step = Callable[[Tensor], Tensor]

OF_GRADIENTS: Mapping[str, tuple[Step, Step]] = {
    "gradient": (_same, Tensor.square),
    "squared": (Tensor.square, _same),
    "newton": (_both, _newton),
}
"""Score -> (of a batch's gradient, to be summed; of the sum): with g the gradient of batch b,
`gradient` is (sum g)^2, `squared` sum g^2, and `newton` (sum g)^2 / sum g^2."""


def scored_parts(
    program: State, sites: Sequence[Site], bias: bool, score: str
) -> tuple[list[Part], list[tuple[Site, str]]]:
    """What sites hold of stored tensors whose entries can be scored so, and (site, reason) of the
    others; see `parts_of`.

    Raises:
        OptionError: there are none.
    """
    every, left = parts_of(program, sites, bias)
    stored = dict(program.module.named_parameters())
    parts = [p for p in every if p.name in stored or score not in OF_GRADIENTS]
    few = "is stored in few bits, whose entries have no gradients"
    left += [(p.site, f"{p.name} {few}") for p in every if p not in parts]
    if not parts:
        site, reason = left[0]
        raise OptionError(
            f"no entry of the selected sites can be scored by score={score}, first {site.id}: "
            f"{reason}. Choose others with where=, or another score=."
        )
    return parts, left


def entry_scores(
    program: State, names: Sequence[str], score: str, data: Any = None, tuned: Any = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, a score of each entry of the stored tensor), in order, not negative.

    Args:
        program: not changed.
        names: of stored tensors.
        score: one of `OF_GRADIENTS`, of batches with a loss; `magnitude`, of the values alone; or
            `change`, of how far they are from those of a tuned program.
        data: see `gradient_sums`, which also says the errors.
        tuned: a program of the same base, some of whose stored tensors were trained.

    Raises:
        OptionError: what a score needs is not given.
        MetaTensorError: there are no values.
    """
    if score in OF_GRADIENTS:
        batchwise, finish = OF_GRADIENTS[score]
        yield from ((n, finish(s)) for n, s in gradient_sums(program, data, names, batchwise))
        return
    values = _values(program, names)
    if score == "magnitude":
        yield from ((name, value.abs()) for name, value in values)
        return
    if not isinstance(tuned, State):
        raise OptionError(
            "score=change compares with a program whose stored tensors were trained (train{...}). "
            "Give it: run(program, ..., sources=[tuned])."
        )
    for (name, value), (_, other) in zip(values, _values(tuned, names), strict=True):
        yield name, (other.to(value.device) - value).abs()


def _values(program: State, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Stored tensors in float32 at least."""
    look, stored = Reading(program), dict(program.module.named_parameters())
    packed = stored_weights(program)
    for name in names:
        if name not in stored and name not in packed:
            raise OptionError(f"the tuned program has no {name}. Give one of the same base.")
        value = look.stored(name).detach()
        if value.is_meta:
            raise MetaTensorError(
                f"{name} has no values to score. Load the weights first: peftfx.load_weights."
            )
        yield name, value.to(torch.promote_types(value.dtype, torch.float32))


def stored_index(part: Part, index: Tensor) -> Tensor:
    """Flat indices into the stored tensor of flat indices into a part: int32 where that holds
    them."""
    whole = part.whole(index)
    small = math.prod(part.shape) <= torch.iinfo(torch.int32).max
    return whole.to(torch.int32) if small else whole


@dataclass(frozen=True)
class Place:
    """Entries that may train, and what may take their place.

    Attributes:
        part: of a stored tensor.
        entry: what one of them costs, above 0.
        form: what takes their place, in the method's own words; empty: nothing does.
        cost: of the form.
        turn: with so many entries taken, it is the form instead, which costs no less than they.
    """

    part: Part
    entry: float
    form: str = ""
    cost: float = 0.0
    turn: int = 0


@dataclass(frozen=True)
class Spent:
    """What `spend` took.

    Attributes:
        entries: (place, flat int64 indices into its part), where entries were taken.
        forms: the places whose form was taken.
        cost: of all.
    """

    entries: tuple[tuple[Place, Tensor], ...]
    forms: tuple[Place, ...]
    cost: float


def spend(places: Sequence[Place], scores: Iterable[tuple[str, Tensor]], budget: float) -> Spent:
    """Takes entries in the order of their scores, until the next would exceed the budget.

    Of each place no more scores are held than there are entries before its form is taken, or than
    the budget pays for; so the sum of all places is never held.

    Args:
        places: their parts hold no entry twice.
        scores: (name of a stored tensor, a score of each of its entries); those that are zero are
            not taken.
        budget: in the unit of the costs.

    Raises:
        OptionError: the budget pays for nothing, or all scores are zero.
        NonFiniteError: a score is NaN or infinite.
    """
    if budget < (least := min((p.entry for p in places), default=0.0)):
        raise OptionError(
            f"a budget of {budget:,.6g} is below the {least:,.6g} that a single entry costs. Give "
            "at least that much."
        )
    held: list[tuple[Place, Tensor, Tensor, Tensor]] = []  # indices, scores, costs
    for name, score in scores:
        for place in (p for p in places if p.part.name == name):
            own = place.part.own(score).flatten()
            limit = min(int(budget / place.entry), int((own > 0).sum()))
            limit = min(limit, place.turn) if place.form else limit
            index = largest([(name, own)], limit)[name]
            values, order = own[index].sort(descending=True, stable=True)
            costs = torch.full((len(index),), place.entry, dtype=torch.float64)
            if place.form and len(index) == place.turn:
                costs[-1] = place.cost - place.entry * (place.turn - 1)
            held.append((place, index[order].cpu(), values.cpu(), costs))
    if not any(len(index) for _, index, _, _ in held):
        raise OptionError(
            "no entry has a score above zero, so nothing says where to spend. Give batches whose "
            "loss depends on the selected places, or choose others with where=."
        )
    masks = most([v for _, _, v, _ in held], budget, [c for _, _, _, c in held])
    entries: list[tuple[Place, Tensor]] = []
    forms: list[Place] = []
    total = 0.0
    for (place, index, _, costs), mask in zip(held, masks, strict=True):
        total += float(costs[mask].sum())
        if place.form and int(mask.sum()) == place.turn:
            forms.append(place)
        elif bool(mask.any()):
            entries.append((place, index[mask].sort().values))
    return Spent(tuple(entries), tuple(forms), total)


def planned(
    decisions: Mapping[str, Any],
    parts: Sequence[Part],
    chosen: Mapping[str, Tensor],
    left: Sequence[tuple[Site, str]],
) -> Plan:
    """A plan that also says which entries train, for `train_planned`.

    Args:
        decisions: what else was decided.
        parts: those that were scored.
        chosen: name of a stored tensor -> indices `[n]` of `stored_index`.
        left: (site, reason) of tensors that were not scored.
    """
    indices = {name: index for name, index in chosen.items() if len(index)}
    why = [[site.id, reason] for site, reason in left]
    why += [[p.site.id, f"no entry of {p.name} has a large enough score"]
            for p in parts if p.name not in indices]  # fmt: skip
    counts = {name: len(index) for name, index in indices.items()}
    return Plan({**decisions, "entries": counts, "left": why}, indices)


def train_planned(edit: Editor, sites: Sequence[Site], bias: bool, plan: Plan) -> None:
    """Trains the entries that a plan says: of each stored tensor a vector of their changes, which
    starts at zero.

    Raises:
        PassError: the indices are no different places in a tensor.
    """
    for part in parts_of(edit.program, sites, bias)[0]:
        if part.name in plan.decisions["entries"]:
            _train(edit, part.site, part.name, plan.tensors[part.name])
            edit.edited.extend(site.id for site in part.sites)
    edit.skipped.extend((site, reason) for site, reason in plan.decisions["left"])


def _train(edit: Editor, site: Site, name: str, indices: Tensor) -> None:
    stored = edit.stored(name)
    known = indices.detach().flatten().long().unique()
    if known.numel() != indices.numel() or not known.numel() or indices.is_floating_point() \
            or int(known[0]) < 0 or int(known[-1]) >= stored.numel():  # fmt: skip
        raise PassError(
            f"{edit.method}: the plan's indices are no different places in {name}. It was altered: "
            "save the adapter again."
        )
    like = torch.promote_types(stored.dtype, torch.float32)
    values = torch.zeros(indices.numel(), dtype=like, device=stored.device)
    own = indices if stored.is_meta else indices.to(stored.device)
    edit.express(site, name, SparseDelta(own.clone(), values))


def keep_largest(
    branches: Mapping[str, DenseDelta],
    density: float,
    reads: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """What `Method.settle` returns to keep the largest entries of dense deltas.

    Args:
        branches: by path.
        density: the share of all their entries together, by magnitude, at least one entry.
        reads: what they read, by path (`measure.constants`); it is decided with them.

    Raises:
        MetaTensorError: the deltas have no values.
        NonFiniteError: a delta holds NaN or infinity.
    """
    if any(p.is_meta for b in branches.values() for p in b.parameters()):
        raise MetaTensorError(
            "deltas on the meta device have no largest entries. Load weights and train first "
            "(peftfx.load_weights)."
        )
    every = sum(b.piece.count for b in branches.values())
    given = {path: dict((reads or {}).get(path, {})) for path in branches}
    with torch.no_grad():
        sizes = (
            (path, branch.delta(False, **given[path]).abs()) for path, branch in branches.items()
        )
        kept = largest(sizes, max(1, round(density * every)))
    return {
        path: {"indices": stored_index(b.piece, kept[path]), **given[path]}
        for path, b in branches.items()
    }
