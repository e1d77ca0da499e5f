"""Bank: several adapters of one kind as stacked tensors, of which every row of a batch chooses one.

With `A [n + 1, rank, in]`, `B [n + 1, out, rank]` and `s [n + 1]` at each linear, row i of a batch
with the adapter id `k_i` gets `y_i = x_i W^T + b + s_k (x_i A_k^T) B_k^T`: the heterogeneous
batching of Punica (Chen et al., MLSys 2024, arXiv:2310.18547) and S-LoRA (Sheng et al., MLSys
2024, arXiv:2311.03285). Smaller ranks, and sites that an adapter does not have, are padded with
zeros, which changes nothing. Ids are an input of the program, so switching never compiles again:

    program = peftfx.run(program, "lora{name=a};lora{name=b,rank=4};bank")
    program(**batch, adapter=torch.tensor([0, 1, 2]))       # a, b, and the model without adapters

Adapters of other kinds are a bank, too: scales, of which every row takes its vector; row scales of
linears (DoRA), whose magnitudes all follow from the weight as it is; bottlenecks behind sublayers,
and low-rank deltas of embeddings, of which every row takes its tensors (others are
computed for all rows); and, of one length, rows in front of keys and values and
prompts, which every row of a batch then has (ids 0 to n - 1).

Members are the program's adapters, or saved ones, given as sources. Those need not fit beside one
another in one program, as prompts and DoRAs do not:

    program = peftfx.run(program, "bank{names=[a,b]}", sources=["dora_a", "dora_b"])

An id counts from 0 in the order of the members; n or -1 gives the model without any adapter (what
was folded into its weights is no adapter), and a call with any other id is refused. So a program
with adapters that are no members is refused, unless `others=keep`: those then act on all rows, as
do adapters that are inserted later. A call without ids gets the first member. The bank holds copies
for inference: it does not train, has no dropout, and `program.without("bank")` gives the members
back, one beside the other, to train on. Not foldable.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ...rewriter.branches.gathered import gathered
from ...rewriter.branches.rowwise import (
    RowwiseKeyValue,
    RowwiseLowRank,
    RowwiseTokens,
    constant_factors,
    rowwise,
    unlike,
)
from ...rewriter.edits.calls.call import Value
from ...rewriter.edits.edit import Editor
from ...rewriter.errors import PassError, nearest
from ...rewriter.pipeline.passes import Pass
from ...rewriter.pipeline.syntax import parse
from ...rewriter.program.history import Attachment, Contract, Plan
from ...rewriter.program.state import BRANCHES, State
from ...rewriter.run.replay import load_values
from ...rewriter.storage.composed import adapters_of

Branches = dict[tuple[str, str], dict[str, Any]]
"""(site, slot) -> member -> its branch there."""


@dataclass(frozen=True, kw_only=True)
class Bank(Pass):
    """Puts several adapters into one bank; each row of a batch chooses its own.

    Attributes:
        names: the members, in the order of their ids; by default all adapters that are low-rank
            at all of their sites, or where none is, all that can be members. With sources: what
            to call their adapters, in order; their own names by default.
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
        if sources:
            return self._adopting(program, sources)
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
        self._refuse_others(program, members, there)
        branches = _branches(program, members)
        for slot, own in branches.items():
            _check_alike(slot, own, members)
        return Plan({"members": members})

    def _adopting(self, program: State, sources: Sequence[Any]) -> Plan:
        """A bank of saved adapters, whose tensors are in the plan."""
        saved = adapters_of(program, sources)
        names = list(self.names or [s.name for s in saved])
        if len(names) != len(saved) or len(set(names)) < len(names):
            raise PassError(
                f"bank: the sources hold {', '.join(s.name for s in saved)}, and the members are "
                f"called {', '.join(names)}. Say names=[...], one of its own for each."
            )
        self._refuse_others(program, [], {})
        adopted = {
            name: {"pass": s.text, "decisions": dict(s.decisions), "digest": s.digest}
            for name, s in zip(names, saved, strict=True)
        }
        tensors = {f"{n}.{k}": t for n, s in zip(names, saved, strict=True)
                   for k, t in s.tensors.items()}  # fmt: skip
        plan = Plan({"members": names, "adopted": adopted}, tensors)
        for slot, own in _saved_branches(program, plan).items():
            _check_alike(slot, own, names)
        return plan

    def _refuse_others(self, program: State, members: Sequence[str], there: Container[str]) -> None:
        """Raises PassError where adapters act that are no members, unless those are kept."""
        others = _others(program, members)
        if not others or self.others == "keep":
            return
        other = others[0]
        reason = _obstacle(program, other)
        folding = f"fold it into the base (fold{{names=[{other}]}}), " if other in there else ""
        raise PassError(
            f"bank: the adapter {other!r} is no member ({reason or 'it is not in names'}), so "
            "it would act on all rows, also on those without an adapter. Leave it out ("
            f"program.without({other!r})), {folding}or say bank{{others=keep}}."
        )

    def apply(self, edit: Editor, plan: Plan) -> None:
        names: list[str] = plan.decisions["members"]
        adopted = plan.decisions.get("adopted", {})
        slots = {} if adopted else _slots(edit.program, names)
        held = _saved_branches(edit.program, plan) if adopted else _branches(edit.program, names)
        if missing := set(names) - {name for of_site in held.values() for name in of_site}:
            raise PassError(
                f"the bank is made of the adapter {min(missing)!r}, which is not here. Keep it, or "
                "take the bank apart first: program.without('bank')."
            )
        branches = {key: [of_site.get(n) for n in names] for key, of_site in held.items()}
        words = {k: _word(edit, k, members) for k, members in branches.items()}  # before any edit
        rows = any(slot in ("key_value", "tokens") for _, slot in branches)
        first = torch.zeros((), dtype=torch.long)
        ends = (0, len(names) - 1) if rows else (-1, len(names))
        ids = edit.add_input(self.input, first, per_sample=True, values=ends)
        for key, word in words.items():
            for attachment in slots.get(key, {}).values():
                edit.remove(attachment.path)
            word(ids)
        for name in _others(edit.program, [] if adopted else names):
            reason = f"the adapter {name!r} is no member: it acts on all rows, whatever their ids"
            edit.skipped.append((name, reason))


def _word(edit: Editor, at: tuple[str, str], members: Sequence[Any]) -> Callable[[Value], None]:
    """What puts the members' common branch in their place, given the ids.

    Raises:
        PassError: it cannot be told which rows are of which sample.
    """
    name, slot = at
    site: Any = edit.program.sites[name]
    if slot == "key_value":
        return lambda ids: edit.prepend_kv(site, RowwiseKeyValue(members), ids=ids)
    if slot == "tokens":
        return lambda ids: edit.prepend_tokens(site, RowwiseTokens(members), ids=ids)
    samples = edit.samples(site, output=slot in ("output_scale", "serial"))
    if samples is None:
        elsewhere = "Leave out the adapters that are there (names=[...]), or insert them elsewhere."
        remedy = edit.axes.samples.remedy or elsewhere
        raise PassError(f"bank: {name}: {edit.skipped[-1][1]}. {remedy}")
    factors = [None if m is None else constant_factors(m) for m in members]
    low_rank = slot == "delta" and all(f for f, m in zip(factors, members, strict=True) if m)
    branch: Any = RowwiseLowRank(factors, samples) if low_rank else gathered(members, samples)
    branch = branch or rowwise(members, samples)
    words = {"delta": edit.add, "serial": edit.after, "row_scale": edit.rescale}
    word: Any = words.get(slot, edit.scale)
    return lambda ids: word(site, branch, ids=ids)


def _slots(program: State, members: Sequence[str]) -> dict[tuple[str, str], dict[str, Attachment]]:
    """(site, slot) -> member -> its branch there."""
    slots: dict[tuple[str, str], dict[str, Attachment]] = {}
    for attachment in program.attachments:
        if attachment.adapter in members:
            key = attachment.site, attachment.slot
            slots.setdefault(key, {})[attachment.adapter] = attachment
    return slots


def _branches(program: State, members: Sequence[str]) -> Branches:
    """(site, slot) -> member of the program -> its branch there."""
    slots = _slots(program, members)
    return {at: {n: program.branch(a) for n, a in own.items()} for at, own in slots.items()}


def _saved_branches(program: State, plan: Plan) -> Branches:
    """The same of saved members: each is inserted into a copy of the base alone."""
    branches: Branches = {}
    for name, step in plan.decisions["adopted"].items():
        (item,) = parse(step["pass"])
        alone = Editor(program.base.fork(), item.adapter, item.random_seed, step["decisions"])
        item.apply(alone, Plan(step["decisions"]))
        own = {n.removeprefix(f"{name}."): t for n, t in plan.tensors.items()
               if n.startswith(f"{name}.")}  # fmt: skip
        load_values(alone.program, {f"{BRANCHES}.{item.adapter}.{n}": t for n, t in own.items()})
        if reason := _obstacle(alone.program, str(item.adapter), saved=True):
            raise PassError(f"bank: the adapter {name!r} cannot be a member: {reason}.")
        for attachment in alone.program.attachments:
            key = attachment.site, attachment.slot
            branches.setdefault(key, {})[name] = alone.program.branch(attachment)
    return branches


def _check_alike(at: tuple[str, str], branches: Mapping[str, Any], members: Sequence[str]) -> None:
    site, slot = at
    everywhere = {"key_value": "rows in front of the keys", "tokens": "a prompt"}
    if slot in everywhere and (missing := [n for n in members if n not in branches]):
        raise PassError(
            f"bank: {missing[0]!r} has no {everywhere[slot].removeprefix('a ')} at {site}, where "
            f"{next(iter(branches))!r} has some, and rows of a batch cannot have different numbers "
            "of them. Make two banks with names=[...]."
        )
    if slot == "delta" and all(constant_factors(b) is not None for b in branches.values()):
        return
    (first, one), *others = branches.items()
    for name, other in others:
        if reason := unlike(one, other):
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


def _low_rank(program: State, name: str) -> bool:
    """Whether all branches of an adapter are low-rank."""
    return all(constant_factors(program.branch(a)) for a in program.attached_by(name))


def _obstacle(program: State, name: str, saved: bool = False) -> str:
    """Why an adapter cannot be a member; empty if it can."""
    if owned := program.owned.get(name):
        return f"it trains {len(owned)} tensors of the base (first: {owned[0]})"
    for attachment in program.attached_by(name):
        branch: Any = program.branch(attachment)
        if reason := unlike(branch, branch):
            return f"at {attachment.site} {reason}"
        if attachment.slot == "tokens" and not saved:
            return (
                f"at {attachment.site} its prompt cannot be taken out of the graph. Save it, and "
                "give it and the others as sources"
            )
        if attachment.reads:
            return f"at {attachment.site} it reads {', '.join(attachment.reads)}"
        if owner := next((a for a in program.attachments if attachment.path in a.members), None):
            return f"{owner.adapter} combines it with others"
    return ""
