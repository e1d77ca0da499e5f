"""An adapter that another library wrote, as parts: low-rank and dense changes, scalings, prompts.

Read with `peftfx.load_peft` and its neighbours (`exporters/formats.py`). What a method here
computes becomes that method's branch: LoRA (Hu et al., ICLR 2022, arXiv:2106.09685), DoRA, (IA)3,
prompts and prefixes; any other linear change is its exact delta. It trains on, folds, is saved and
taken out again like an adapter that was inserted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...rewriter.branches.branch import Axes, Delta
from ...rewriter.branches.gated import GatedDelta
from ...rewriter.branches.input_map import MappedWeight
from ...rewriter.edits.calls.call import Value
from ...rewriter.edits.edit import Editor
from ...rewriter.errors import BaseMismatchError, PassError
from ...rewriter.parts.formula_parts import Formula, Hadamard, Kronecker, Rotation
from ...rewriter.parts.parts import (
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
from ...rewriter.parts.shared_parts import unshared
from ...rewriter.pipeline.passes import NAME, Pass, Saved
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.sites import (
    ConvSite,
    LinearSite,
    WeightSite,
)
from ...rewriter.program.state import State
from ...rewriter.storage.parts import Parts, as_plan, of_plan
from ..additive.ia3 import IA3Input, IA3Output
from ..additive.prompt_tuning import PromptBranch
from ..reparameterized.dora import DoRABranch
from ..reparameterized.lora import LoRABranch
from ..selective.train_tokens import RowsExpression
from .formula_parts import insert_formula
from .prompt_parts import entrance, insert_prefix
from .shared import insert_shared
from .sublayer_parts import (
    gate_of,
    insert_bottleneck,
    insert_compacter,
    insert_coupling,
    insert_fusion,
    require_size,
    sites_of,
)


class ChangeBranch(Delta):
    """`y = base(x) + f(x)` by a whole matrix; parameter `change [out, in]`."""

    axes: ClassVar[Axes] = {"change": ("out", "in")}

    def __init__(self, change: Tensor, method: str) -> None:
        super().__init__()
        self.change, self.method = nn.Parameter(change), method

    def branch(self, x: Tensor, **operands: Tensor) -> Tensor:
        stack = self.shape.count
        change = self.change if stack == 1 else self.change.unflatten(0, (stack, -1))
        return self.shape.narrow(x, change, **operands)

    def delta(self) -> Tensor:
        return self.change

    def part(self) -> Part:
        return Change("", self.change.detach(), self.method)

    def describe(self) -> str:
        return f"the change of {self.method}" if self.method else "a whole matrix"


class AcrossGroups(Delta):
    """A low-rank branch beside a grouped convolution whose `a [rank, in]` reads all channels.

    `b [groups, out / groups, rank / groups]` is in groups, so an output sees its group's ranks.
    """

    not_foldable = "it reads across the groups of the convolution"
    axes: ClassVar[Axes] = {"a": ("rank", "patch"), "b": ("group", "out", "rank")}

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = scale, dropout

    def branch(self, x: Tensor) -> Tensor:
        h = self.shape.in_groups(1).narrow(self.dropped(x), self.a)
        return self.shape.widen(h * self.scale, self.b)

    def part(self) -> Part:
        a, b = self.a.detach(), self.b.detach()
        return LowRank("", a, b, self.scale, dropout=self.dropout)

    def describe(self) -> str:
        return f"rank={len(self.a)}, scale={self.scale:g}"


class Invocation(nn.Module):
    """Which tokens stand behind the last invocation, bool `[batch, tokens]`, its own included.

    Greenewald et al. 2025, arXiv:2504.12397.
    """

    def __init__(self, wanted: Sequence[int]) -> None:
        super().__init__()
        self.wanted = tuple(wanted)

    def forward(self, ids: Tensor) -> Tensor:
        """`ids [batch, tokens]`."""
        places = torch.arange(ids.shape[1], device=ids.device)
        starts = (places <= ids.shape[1] - len(self.wanted)).expand(ids.shape)
        for offset, token in enumerate(self.wanted):
            starts = starts & (ids.roll(-offset, 1) == token)
        last = torch.where(starts, places, -1).amax(1, keepdim=True)
        return (last >= 0) & (places >= last)


class InvokedBranch(LoRABranch):
    """A LoRA that acts on some tokens: `active [batch, tokens]`."""

    not_foldable = "on which tokens it acts depends on the input"
    axes: ClassVar[Axes] = {**LoRABranch.axes, "active": ("batch", "token")}

    def __init__(self, part: Invoked, like: Tensor) -> None:
        a, b = part.a.to(like, copy=True), part.b.to(like, copy=True)
        super().__init__(a, b, part.scale, part.dropout)
        self.ids = part.ids

    def branch(self, x: Tensor, **reads: Tensor) -> Tensor:
        y, active = super().branch(x), reads["active"]
        return y * (active if y.dim() > 2 else active.flatten())[..., None].to(y.dtype)

    def factors(self) -> None:
        return None

    def part(self) -> Part:
        a, b = self.a.detach(), self.b.detach()
        return Invoked("", a, b, self.scale, self.ids, self.dropout)


@dataclass(frozen=True, kw_only=True)
class Imported(Pass):
    """Inserts an adapter from another library's file: peftfx.load_peft(program, directory).

    Attributes:
        name: of the adapter.
        invoked: it acts from an invocation on, so that a later one counts for earlier tokens.
        ahead: its gates are means over all tokens in a causal model, later ones included.
    """

    contract: ClassVar[Contract] = Contract("trainable")
    sourced: ClassVar[bool] = True

    name: str = "imported"
    invoked: bool = False
    ahead: bool = False

    @property
    def adapter(self) -> str:
        return self.name

    @property
    def departures(self) -> frozenset[str]:
        return frozenset({"tokens"} if self.invoked or self.ahead else ())

    def check(self) -> None:
        self.require(bool(NAME.fullmatch(self.name)), "name", "letters, digits, _ and -")

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        given = [s for s in sources if isinstance(s, Parts)]
        if len(given) != 1 or len(sources) != 1:
            raise PassError(
                f"{self.text}: it inserts one adapter that was read from a file. Use "
                "peftfx.load_peft(program, directory), which runs it."
            )
        return as_plan(given[0])

    def saved_part(self, saved: Saved) -> Part | None:
        tensors = saved.tensors
        parts = (p for p in of_plan(saved.plan).parts if p.target == saved.target)
        found = next(
            (p for p in parts if isinstance(p, LowRank | Scaling | Change | Formula)), None
        )
        match found:
            case LowRank() if {"a", "b"} <= set(tensors) <= {"a", "b", "m"}:
                a, b = tensors["a"], tensors["b"]
                own = replace(found, a=a, b=b, magnitude=tensors.get("m"))
                return own if a.dim() == b.dim() else None
            case Scaling() if "l" in tensors:
                return replace(found, vector=tensors["l"])
            case Change() if "change" in tensors:
                return replace(found, delta=tensors["change"])
            case Hadamard() | Kronecker() | Rotation() if saved.slot != MappedWeight.slot:
                return replace(found, **tensors)
            case _:
                return None

    def apply(self, edit: Editor, plan: Plan) -> None:
        parts = of_plan(plan)
        active = _active(edit, parts.parts)
        known: dict[int, Value] = {}
        for part in parts.parts:
            if not isinstance(part, Hypercomplex) and not insert_shared(edit, part, known):
                insert(edit, part, active)
        insert_compacter(edit, [p for p in parts.parts if isinstance(p, Hypercomplex)])
        prefixes = [p for p in parts.parts if isinstance(p, Prefix)]
        moved = [p for p in prefixes if p.keys_moved]
        shifted = moved or [p for p in prefixes if p.shifted]
        if shifted:
            edit.shift_positions(len(shifted[0].key), keys=bool(moved))
        if self.ahead:
            edit.note("gates are means over all tokens, later ones too, as where it was trained")
        for line in (f"read from {parts.source}", *parts.notes):
            edit.note(line)


def insert(edit: Editor, part: Part, active: Value | None = None) -> None:
    """Puts one part into a program.

    Args:
        active: the tokens on which invoked parts act, bool `[batch, tokens]`.

    Raises:
        BaseMismatchError: the program has no such weight, or its sizes are others.
        PassError: it holds no such part.
    """
    match part:
        case LowRank():
            for site in sites_of(edit.program, part.target, part.lookup):
                _low_rank(edit, site, part)
        case Invoked():
            for site in sites_of(edit.program, part.target, False):
                fits = part.a.shape[1:] == site.matrices[2:] and site.features is None
                require_size(fits and len(part.b) == site.matrices[1], site.weight, part.a)
                edit.add(site, InvokedBranch(part, edit.like(site)), active=active)
        case Change():
            for site in sites_of(edit.program, part.target, False):
                own = _own(site, part.delta, site.matrices[0])
                edit.add(site, ChangeBranch(own.to(edit.like(site)), part.method))
        case Formula():
            insert_formula(edit, part)
        case Scaling():
            _scaling(edit, part)
        case Trained():
            _trained(edit, part)
        case Rows():
            site = sites_of(edit.program, part.target, True)[0]
            require_size(part.values.shape[1:] == (site.matrices[1],), part.target, part.values)
            branch = RowsExpression(part.ids, part.values.to(edit.like(site), copy=True))
            edit.express(site, site.weight, branch)
        case Prompt():
            site = entrance(edit.program)
            require_size(part.values.shape[1:] == (site.width,), site.weight, part.values)
            branch = PromptBranch(part.values.to(edit.like(site), copy=True))
            edit.prepend_tokens(site, branch, part.place)
        case Prefix():
            insert_prefix(edit, part)
        case Bottleneck():
            insert_bottleneck(edit, part)
        case Coupling():
            insert_coupling(edit, part)
        case Fusion():
            insert_fusion(edit, part)
        case _:
            raise PassError(f"no program can hold a part of kind {part.kind!r}.")


def _own(site: WeightSite, rows: Tensor, count: int) -> Tensor:
    """What a site has of values `[count * out, ...]` of the whole weight."""
    if site.features is None:
        require_size(len(rows) == count * site.matrices[1], site.weight, rows)
        return rows.clone()
    stack = rows.unflatten(0, (count, -1))
    require_size(max(site.features) < stack.shape[1], site.weight, rows)
    return stack[:, list(site.features)].flatten(0, 1)


def _low_rank(edit: Editor, site: WeightSite, part: LowRank) -> None:
    count, _, size = site.matrices
    like = edit.like(site)
    if isinstance(site, ConvSite) and count > 1 and part.a.dim() == 2 and part.magnitude is None:
        require_size(part.a.shape[1] == size * count, site.weight, part.a)
        a, b = part.a.to(like, copy=True), part.b.to(like, copy=True)
        edit.add(site, AcrossGroups(a, b, part.scale, part.dropout))
        return
    require_size(part.a.shape[-1] == size and part.a.dim() == 2 + (count > 1), site.weight, part.a)
    b = part.b if count == 1 else part.b.flatten(0, 1)
    b = _own(site, b, count)
    b = b if count == 1 else b.unflatten(0, (count, -1))
    own = replace(unshared(part), b=b)
    if part.magnitude is not None:
        own = replace(own, magnitude=_own(site, part.magnitude, count))
    branch = branch_of(own, like)
    if isinstance(branch, DoRABranch):
        edit.rescale(site, branch)
        return
    gate = gate_of(edit, site, part)
    edit.add(site, branch if gate is None else GatedDelta(branch), gate=gate)


def branch_of(part: LowRank | Change, like: Tensor) -> Delta | DoRABranch:
    """What computes a change, in the dtype of `like`; all of it, but for a gate."""
    if isinstance(part, Change):
        return ChangeBranch(part.delta.to(like, copy=True), part.method)
    a, b = part.a.to(like, copy=True), part.b.to(like, copy=True)
    branch = LoRABranch(a, b, part.scale, part.dropout)
    if part.magnitude is None:
        return branch
    return DoRABranch(part.magnitude.to(like, copy=True), branch, False)


def _active(edit: Editor, parts: Sequence[Part]) -> Value | None:
    """Where the invocation of an adapter is looked for, once for all of its parts."""
    invoked = [p for p in parts if isinstance(p, Invoked)]
    if not invoked:
        return None
    ids = edit.input(entrance(edit.program))
    return edit.share("invocation", Invocation(invoked[0].ids.tolist()), ids=ids)


def _scaling(edit: Editor, part: Scaling) -> None:
    sites = sites_of(edit.program, part.target, False)
    if part.side == "in":
        require_size(len(part.vector) == sites[0].inputs, part.target, part.vector)
        edit.scale(sites[0], IA3Input(part.vector.to(edit.like(sites[0]), copy=True)))
        return
    for site in sites:
        own = _own(site, part.vector, site.matrices[0])
        edit.scale(site, IA3Output(own.to(edit.like(site))))


def _trained(edit: Editor, part: Trained) -> None:
    name = edit.program.tensors.stored(part.target)
    if not edit.is_parameter(name) and (site := _without_bias(edit.program, part.target)):
        name = edit.add_bias(site)
    elif not edit.is_parameter(name):
        raise BaseMismatchError(
            f"this model has no parameter {part.target!r} that could be trained. Use the base that "
            "the adapter was trained on."
        )
    elif name != part.target:
        raise PassError(
            f"{part.target} is {name} by another name here, and the adapter has values for one of "
            "both. Untie them in the model before it is captured."
        )
    require_size(edit.stored(name).shape == part.values.shape, name, part.values)
    edit.train(name)
    with torch.no_grad():
        edit.stored(name).copy_(part.values)
    edit.edited.append(name)


def _without_bias(program: State, name: str) -> LinearSite | None:
    """The linear whose bias would have this name, if it has none."""
    weight = program.tensors.stored(f"{name.removesuffix('bias')}weight")
    sites = (s for s in program.sites if isinstance(s, LinearSite) and s.weight == weight)
    return next((s for s in sites if name.endswith("bias") and s.bias is None), None)
