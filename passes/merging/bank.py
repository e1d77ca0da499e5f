"""Bank: several adapters of one kind as stacked tensors, of which every row of a batch chooses one.

With `A [n + 1, rank, in]`, `B [n + 1, out, rank]` and `s [n + 1]` at each linear, row i of a batch
with the adapter id `k_i` gets `y_i = x_i W^T + b + s_k (x_i A_k^T) B_k^T`: the heterogeneous
batching of Punica (Chen et al., MLSys 2024, arXiv:2310.18547) and S-LoRA (Sheng et al., MLSys
2024, arXiv:2311.03285). Smaller ranks, and sites that an adapter does not have, are padded with
zeros, which changes nothing. Ids are an input of the program, so switching never compiles again:

    program = peftfx.run(program, "lora{name=a};lora{name=b,rank=4};bank")
    program(**batch, adapter=torch.tensor([0, 1, 2]))       # a, b, and the model without adapters

Adapters of other kinds are a bank, too: scales, branches behind sublayers, deltas of embeddings and
convolutions, each of which is computed for all rows, of which every one takes its own; and rows in
front of keys and values, of one length, which every row of a batch then has (ids 0 to n - 1).

An id counts from 0 in the order of the members; n or -1 gives the model without any adapter (what
was folded into its weights is no adapter), and a call with any other id is refused. So a program
with adapters that are no members is refused, unless `others=keep`: those then act on all rows, as
do adapters that are inserted later. A call without ids gets the first member. The bank holds copies
for inference: it does not train, has no dropout, and `program.without("bank")` gives the members
back, one beside the other, to train on. Not foldable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...rewriter.branches.branch import Axes, Delta
from ...rewriter.branches.rowwise import RowwiseKeyValue, rowwise, unlike
from ...rewriter.branches.samples import Samples
from ...rewriter.edits.calls.call import Value
from ...rewriter.edits.edit import Editor
from ...rewriter.errors import PassError, nearest
from ...rewriter.pipeline.passes import Pass
from ...rewriter.program.history import Attachment, Contract, Plan
from ...rewriter.program.state import State

Factors = tuple[Tensor, Tensor, float]


class BankBranch(Delta):
    """`a [n + 1, rank, in]`, `b [n + 1, out, rank]`, `scale [n + 1]`; the last entry is zero."""

    not_foldable = "which adapter acts is an input"
    axes: ClassVar[Axes] = {
        "a": ("adapter", "rank", "in"),
        "b": ("adapter", "out", "rank"),
        "scale": ("adapter",),
        "ids": ("batch",),
    }

    a: Tensor
    b: Tensor
    scale: Tensor

    def __init__(self, members: Sequence[Factors | None], samples: Samples) -> None:
        super().__init__()
        present = [m for m in members if m is not None]
        rank = max(a.shape[0] for a, _, _ in present)
        a, b, _ = present[0]
        self.samples = samples
        # They follow from the members' own tensors, which an artifact holds already.
        self.register_buffer("a", a.new_zeros(len(members) + 1, rank, a.shape[1]), False)
        self.register_buffer("b", b.new_zeros(len(members) + 1, b.shape[0], rank), False)
        self.register_buffer("scale", a.new_zeros(len(members) + 1), False)
        for index, member in enumerate(members):
            if member is not None:
                a, b, self.scale[index] = member
                self.a[index, : len(a)], self.b[index, :, : len(a)] = a, b

    def branch(self, x: Tensor, ids: Tensor) -> Tensor:
        """`ids [batch]`, int64; x has samples where `samples` says."""
        rows = self.samples.first(x, ids.shape[0])
        flat = rows.flatten(1, -2) if rows.dim() > 2 else rows[:, None]
        a, b, scale = (t[ids].to(x.dtype) for t in (self.a, self.b, self.scale))
        inner = flat @ a.mT * scale[:, None, None]
        return self.samples.back((inner @ b.mT).view(*rows.shape[:-1], -1))

    def describe(self) -> str:
        return f"{len(self.a) - 1} adapters, rank={self.a.shape[1]}"


@dataclass(frozen=True, kw_only=True)
class Bank(Pass):
    """Puts several adapters into one bank; each row of a batch chooses its own.

    Attributes:
        names: the members, in the order of their ids; by default all adapters that are low-rank
            at all of their sites, or where none is, all that can be members.
        input: name of the new input, int64 `[batch]`.
        others: adapters that are no members act on all rows, also on those without an adapter:
            `refuse` that, or `keep` them.
    """

    contract: ClassVar[Contract] = Contract("trainable")

    names: tuple[str, ...] | None = None
    input: str = "adapter"
    others: Literal["refuse", "keep"] = "refuse"

    @property
    def adapter(self) -> str:
        return self.text

    def check(self) -> None:
        names = self.names or ("",)
        self.require(len(set(names)) == len(names) > 0, "names", "different adapters")
        self.require(self.input.isidentifier(), "input", "a name")

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        if self.adapter in program.adapters:
            raise PassError(
                f"the program has a bank already. Take it apart first (program.without("
                f"{self.adapter!r})), then make one of all members."
            )
        there = dict.fromkeys(a.adapter for a in program.attachments)
        reasons = {name: _obstacle(program, name) for name in there}
        fitting = [name for name, reason in reasons.items() if not reason]
        for name in self.names or ():
            if name not in reasons:
                raise PassError(
                    f"bank: there is no adapter {name!r} with branches. Adapters: "
                    f"{', '.join(there) or 'none'}; nearest: {nearest(name, there)}."
                )
            if reasons[name]:
                raise PassError(
                    f"bank: the adapter {name!r} cannot be a member: {reasons[name]}. Adapters "
                    f"that can: {', '.join(fitting) or 'none'}. Choose among them with names=[...]."
                )
        if not fitting:
            refusals = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise PassError(
                f"bank: no adapter can be a member ({refusals or 'there is none'}). Insert some "
                "first: run(program, 'lora{name=a};lora{name=b}')."
            )
        low_rank = [name for name in fitting if _low_rank(program, name)]
        members = list(self.names or low_rank or fitting)
        others = _others(program, members)
        if others and self.others == "refuse":
            other = others[0]
            reason = _obstacle(program, other)
            folding = f"fold it into the base (fold{{names=[{other}]}}), " if other in there else ""
            raise PassError(
                f"bank: the adapter {other!r} is no member ({reason or 'it is not in names'}), so "
                "it would act on all rows, also on those without an adapter. Leave it out ("
                f"program.without({other!r})), {folding}or say bank{{others=keep}}."
            )
        for slot, attachments in _slots(program, members).items():
            _check_alike(program, slot, attachments, members)
        return Plan({"members": members})

    def apply(self, edit: Editor, plan: Plan) -> None:
        names: list[str] = plan.decisions["members"]
        slots = _slots(edit.program, names)
        if missing := set(names) - {name for of_site in slots.values() for name in of_site}:
            raise PassError(
                f"the bank is made of the adapter {min(missing)!r}, which is not here. Keep it, or "
                "take the bank apart first: program.without('bank')."
            )
        branches = {
            key: [edit.program.branch(of_site[n]) if n in of_site else None for n in names]
            for key, of_site in slots.items()
        }
        words = {k: _word(edit, k, members) for k, members in branches.items()}  # before any edit
        rows = any(slot == "key_value" for _, slot in slots)
        first = torch.zeros((), dtype=torch.long)
        ends = (0, len(names) - 1) if rows else (-1, len(names))
        ids = edit.add_input(self.input, first, per_sample=True, values=ends)
        for key, of_site in slots.items():
            for attachment in of_site.values():
                edit.remove(attachment.path)
            words[key](ids)
        for name in _others(edit.program, names):
            reason = f"the adapter {name!r} is no member: it acts on all rows, whatever their ids"
            edit.skipped.append((name, reason))


def _word(edit: Editor, at: tuple[str, str], members: Sequence[Any]) -> Callable[[Value], None]:
    """What puts the members' common branch in their place, given the ids.

    Raises:
        PassError: it cannot be told which rows are of which sample.
    """
    name, slot = at
    site: Any = edit.program.sites[name]
    factors = [None if m is None else _factors(m) for m in members]
    if slot == "delta" and sum(map(bool, factors)) == sum(m is not None for m in members):
        return lambda ids: _add_low_rank(edit, site, factors, ids)
    if slot == "key_value":
        return lambda ids: edit.prepend_kv(site, RowwiseKeyValue(members), ids=ids)
    place = edit.place(site, "batch", output=slot in ("output_scale", "serial"))
    if place is None:
        raise _unknown_rows(name, "it cannot be told which of its rows are of which sample")
    chosen: Any = rowwise(members, place)
    word: Any = {"delta": edit.add, "serial": edit.after}.get(slot, edit.scale)
    return lambda ids: word(site, chosen, ids=ids)


def _add_low_rank(edit: Editor, site: Any, factors: Sequence[Factors | None], ids: Value) -> None:
    samples = edit.samples(site)
    if samples is None:
        raise _unknown_rows(site.id, edit.skipped[-1][1])
    edit.add(site, BankBranch(factors, samples), ids=ids)


def _unknown_rows(name: str, reason: str) -> PassError:
    return PassError(
        f"bank: {name}: {reason}. Leave out the adapters that are there (names=[...]), or insert "
        "them elsewhere."
    )


def _slots(program: State, members: Sequence[str]) -> dict[tuple[str, str], dict[str, Attachment]]:
    """(site, slot) -> member -> its branch there."""
    slots: dict[tuple[str, str], dict[str, Attachment]] = {}
    for attachment in program.attachments:
        if attachment.adapter in members:
            key = attachment.site, attachment.slot
            slots.setdefault(key, {})[attachment.adapter] = attachment
    return slots


def _check_alike(
    program: State, at: tuple[str, str], beside: Mapping[str, Attachment], members: Sequence[str]
) -> None:
    site, slot = at
    branches = {n: program.branch(a) for n, a in beside.items()}
    if slot == "key_value" and (missing := [n for n in members if n not in beside]):
        raise PassError(
            f"bank: {missing[0]!r} has no rows in front of the keys at {site}, where "
            f"{next(iter(beside))!r} has some, and rows of a batch cannot have different numbers "
            "of them. Make two banks with names=[...]."
        )
    if slot == "delta" and all(_factors(b) is not None for b in branches.values()):
        return
    (first, one), *others = branches.items()
    for name, other in others:
        if reason := unlike(one, other):  # pyright: ignore[reportArgumentType]
            raise PassError(
                f"bank: the adapters {first!r} and {name!r} cannot be members of one bank: at "
                f"{site} {reason}. Insert them with equal options, or choose others with "
                "names=[...]."
            )


def _others(program: State, members: Sequence[str]) -> list[str]:
    """The adapters that act, and are no members."""
    acting = dict.fromkeys(a.adapter for a in program.attachments)
    acting |= dict.fromkeys(name for name, owned in program.owned.items() if owned)
    return [n for n in acting if n not in members and n != Bank.text]


def _factors(branch: Any) -> Factors | None:
    factors = branch.factors() if isinstance(branch, Delta) else None
    return factors and (factors[0].detach(), factors[1].detach(), factors[2])


def _low_rank(program: State, name: str) -> bool:
    """Whether all branches of an adapter are low-rank."""
    return all(_factors(program.branch(a)) for a in program.attached_by(name))


def _obstacle(program: State, name: str) -> str:
    """Why an adapter cannot be a member; empty if it can."""
    if owned := program.owned.get(name):
        return f"it trains {len(owned)} tensors of the base (first: {owned[0]})"
    for attachment in program.attached_by(name):
        branch: Any = program.branch(attachment)
        if reason := unlike(branch, branch):
            return f"at {attachment.site} {reason}"
        if attachment.reads:
            return f"at {attachment.site} it reads {', '.join(attachment.reads)}"
        if owner := next((a for a in program.attachments if attachment.path in a.members), None):
            return f"{owner.adapter} combines it with others"
    return ""
