"""Combine: several adapters as one, by their true changes of the weights.

An adapter changes a weight by all that folding it would add: `s B A` of LoRA, of any rank, scale
and sign, `c (W + s B A) - W` of DoRA, `W (s - 1)` of (IA)3. Their weighted sum (`linear`, also
called `cat` and `arithmetic`) is exact: where all are low-rank, one branch with their ranks side by
side, else the dense change, summed in float64. (Summing the A's and the B's, which other tools call
`linear`, gives no sum of the adapters.) `svd` is that sum at the largest rank of a member. `ties`,
`dare`, `dare_ties`, `breadcrumbs`, `della`, `magnitude_prune` and `slerp` are in `merge_formulas`,
with their papers; they work on dense changes.

    program = peftfx.run(program, "combine{names=[a,b],weights=[0.7,-0.3]}")
    program = peftfx.run(program, "combine{method=ties,density=0.2,rank=16}", sources=["a", "b"])

Members are the program's adapters, which the combined one takes the place of, or sources: saved
adapters, or programs of the same base (two DoRAs do not fit into one program). It holds values of
its own, so that it needs no member any more: it trains on, folds, is saved and is written in other
libraries' formats. `rank=` or `energy=` gives the nearest low-rank branch at each weight, and the
record says what that lost. `program.without("combined")` gives the members back.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...rewriter.api import Program
from ...rewriter.edits.edit import Editor
from ...rewriter.errors import BaseMismatchError, MetaTensorError, OptionError, PassError, nearest
from ...rewriter.pipeline.passes import NAME, Pass
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.sites import WeightSite
from ...rewriter.program.state import State
from ...rewriter.program.unchanged import base_digests, require_unchanged
from ...rewriter.storage.artifact import base_difference
from ...rewriter.storage.loading import load
from ...rewriter.verify.verify import is_meta
from ..interchange.imported import ChangeBranch
from ..reparameterized.lora import LoRABranch
from . import low_rank, merge_formulas
from .member_changes import Member, Side, member, side_of

SUMS = ("linear", "cat", "arithmetic", "svd")
"""Methods that are the weighted sum of all changes."""


@dataclass(frozen=True, kw_only=True)
class Combine(Pass):
    """Puts one adapter in the place of several.

    Attributes:
        names: the members; all adapters by default. With sources: what to call theirs, in order.
        weights: one each, of any sign; 1 by default. For `slerp`, shares of the way.
        method: see above.
        rank: the largest rank at any weight, where it is re-compressed.
        energy: re-compressed to as few ranks as hold this share of the change's square, in (0, 1].
        density: the share of entries of each change that is kept.
        gamma: of `breadcrumbs`, the share of largest entries that go.
        epsilon: of `della`, by how much the probability to stay lies around the density.
        normalize: divide by the weights that take part; by default as the method's paper.
        rescale: what becomes of entries that were kept by chance: `expected` (divided by the
            probability), `l1` (to the old sum of magnitudes, mergekit's) or `none`.
        scale: of the whole (`lambda` in TIES).
        name: of the new adapter.
        seed: of `dare` and `della`, for each weight with its name.
    """

    contract: ClassVar[Contract] = Contract("trainable")

    names: tuple[str, ...] | None = None
    weights: tuple[float, ...] | None = None
    method: Literal[
        "linear", "cat", "svd", "arithmetic", "ties", "dare", "dare_ties", "breadcrumbs",
        "della", "slerp", "magnitude_prune",
    ] = "linear"  # fmt: skip
    rank: int | None = None
    energy: float | None = None
    density: float = 1.0
    gamma: float = 0.01
    epsilon: float = 0.15
    normalize: bool | None = None
    rescale: Literal["expected", "l1", "none"] | None = None
    scale: float = 1.0
    name: str = "combined"
    seed: int = 0

    @property
    def adapter(self) -> str:
        return self.name

    @property
    def random_seed(self) -> int:
        return self.seed

    def check(self) -> None:
        self.require(bool(NAME.fullmatch(self.name)), "name", "letters, digits, _ and -")
        names = self.names or ("",)
        self.require(len(set(names)) == len(names) > 0, "names", "different adapters")
        weights = self.weights
        if weights is not None:
            finite = all(map(math.isfinite, weights))
            self.require(len(weights) > 0 and finite, "weights", "finite numbers")
        if self.names is not None:
            self._weights(len(self.names))
        self.require(self.rank is None or self.rank >= 1, "rank", "at least 1")
        self.require(self.energy is None or 0 < self.energy <= 1, "energy", "in (0, 1]")
        self.require(math.isfinite(self.scale), "scale", "finite")
        self.require(0 <= self.seed < 2**63, "seed", "a number from 0 to 2^63 - 1")
        try:
            self._trim.check("" if self._recipe is None else self._recipe.trim)
        except OptionError as error:
            raise OptionError(f"{self.text}: {error}") from None

    def _require_one_each(self, count: int) -> None:
        given = len(self.weights or ())
        if given != count:
            raise OptionError(
                f"{self.text}: {given} weights for {count} adapters. Give one each, in the order "
                "of the names."
            )

    @property
    def _trim(self) -> merge_formulas.Trim:
        return merge_formulas.Trim(self.density, self.gamma, self.epsilon)

    @property
    def _recipe(self) -> merge_formulas.Recipe | None:
        """How dense changes are summed; None for `slerp`."""
        if self.method == "slerp":
            return None
        sums = self.method in SUMS
        recipe = merge_formulas.RECIPES["task_arithmetic" if sums else self.method]
        normalize = recipe.normalize if self.normalize is None else self.normalize
        return replace(recipe, normalize=normalize, rescale=self.rescale or recipe.rescale)

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        if is_meta(program):
            raise MetaTensorError(
                f"{self.text}: the program has no values. Give it some first: peftfx.load_weights."
            )
        members = self._adopted(program, sources) if sources else self._own(program)
        weights = self._weights(len(members))
        edit = Editor(program.fork())
        sides: dict[str, list[Side | None]] = {}
        for site in program.sites:
            if isinstance(site, WeightSite) and any(site.id in m.branches for m in members):
                sides[site.id] = [side_of(edit, site, m) for m in members]
        self._require_rank(program, sides)
        plan = _Decided(self, edit, weights)
        for name, each in sides.items():
            plan.add(program.sites[name], each)
        removed = [] if sources else [m.name for m in members]
        decisions = {
            "members": [m.name for m in members], "weights": weights, "removed": removed,
            "sites": list(plan.sites), "forms": plan.sites,
        }  # fmt: skip
        return Plan(decisions, plan.tensors)

    def _weights(self, count: int) -> list[float]:
        if self.weights is not None:
            self._require_one_each(count)
        weights = list(self.weights or [1.0] * count)
        if self.method == "slerp" and (count != 2 or min(weights) < 0 or sum(weights) <= 0):
            raise PassError(
                f"{self.text}: slerp goes from one adapter to another, by weights of at least 0, "
                f"and here are {count} adapters with weights {weights}. Choose two: "
                "names=[a,b]."
            )
        return weights

    def _own(self, program: State) -> list[Member]:
        there = list(dict.fromkeys(a.adapter for a in program.attachments))
        chosen = [n for n in there if n in program.adapters] if self.names is None else self.names
        for name in chosen:
            if name not in there:
                raise PassError(
                    f"{self.text}: there is no adapter {name!r} with branches. Adapters: "
                    f"{', '.join(there) or 'none'}; nearest: {nearest(name, there)}."
                )
        if not chosen:
            raise PassError(
                f"{self.text}: the program has no adapter. Insert some first, or give saved ones: "
                "run(program, 'combine', sources=[...])."
            )
        return [member(program, name, name) for name in chosen]

    def _adopted(self, program: State, sources: Sequence[Any]) -> list[Member]:
        """The adapters of saved artifacts, or of other programs of the same base."""
        require_unchanged(program)
        have = base_digests(program)
        found: list[tuple[State, str]] = []
        for source in sources:
            other = source
            if isinstance(source, str | Path) and isinstance(program.base, Program):
                other = load(program.base, source)
            if not isinstance(other, State):
                raise PassError(
                    f"{self.text}: a source is a directory that peftfx.save wrote, or a program, "
                    f"not {type(source).__name__}."
                )
            if (of := base_digests(other)) != have:
                said = base_difference(have, of, f"{self.text}: a source")
                raise BaseMismatchError(said.partition(" Load the base")[0])
            with_branches = dict.fromkeys(a.adapter for a in other.attachments)
            found += [(other, n) for n in with_branches]
        names = list(self.names or [n for _, n in found])
        if len(names) != len(found) or len(set(names)) < len(names):
            raise PassError(
                f"{self.text}: the sources hold {', '.join(n for _, n in found) or 'no adapter'}, "
                f"and the members are called {', '.join(names) or 'nothing'}. Say names=[...], one "
                "of its own for each."
            )
        return [member(p, n, called) for (p, n), called in zip(found, names, strict=True)]

    def _require_rank(self, program: State, sides: Mapping[str, Sequence[Side | None]]) -> None:
        """Raises PassError where no weight has as high a rank as is asked for."""
        limits: dict[str, int] = {}
        for name, each in sides.items():
            site: Any = program.sites[name]
            ranks = [s.rank for s in each if s is not None]
            summed = self.method in SUMS and None not in ranks
            limits[name] = min(*site.matrices[1:], sum(r or 0 for r in ranks) if summed else 2**31)
        most = max(limits, key=lambda n: limits[n], default="")
        if self.rank is not None and most and self.rank > limits[most]:
            raise PassError(
                f"{self.text}: rank={self.rank}, but no change has a rank above {limits[most]} "
                f"({most}). Choose that or less, or leave rank out: nothing is compressed then."
            )

    def apply(self, edit: Editor, plan: Plan) -> None:
        gone = set(plan.decisions["removed"])
        for attachment in [a for a in edit.program.attachments if a.adapter in gone]:
            edit.remove(attachment.path)
        worst = 0.0
        for name, about in plan.decisions["forms"].items():
            site: Any = edit.program.sites[name]
            like = edit.like(site)
            own = {k: plan.tensors[f"{name}.{k}"].to(like, copy=True) for k in about["tensors"]}
            if "change" in own:
                edit.add(site, ChangeBranch(own["change"], self.text))
            elif own:
                edit.add(site, LoRABranch(own["a"], own["b"], 1.0, 0.0))
            worst = max(worst, about["error"])
            if "bias" in about:
                _move_bias(edit, about["bias"], plan.tensors[f"{name}.bias"])
        edit.figures["error"] = worst
        for name, error in _worst(plan.decisions["forms"]):
            edit.note(f"{name}: {error:.2g} of the change's norm is lost at its rank")


def _worst(forms: Mapping[str, Any]) -> list[tuple[str, float]]:
    lost = [(n, about["error"]) for n, about in forms.items() if about["error"] > 1e-6]
    return sorted(lost, key=lambda i: -i[1])[:3]


def _move_bias(edit: Editor, name: str, change: Tensor) -> None:
    edit.train(name)
    with torch.no_grad():
        stored = edit.stored(name)
        stored.copy_(stored.double() + change.to(stored.device))
    edit.edited.append(name)


class _Decided:
    """What a plan says of each site, gathered."""

    def __init__(self, item: Combine, edit: Editor, weights: Sequence[float]) -> None:
        self.item, self.edit, self.weights = item, edit, weights
        self.sites: dict[str, dict[str, Any]] = {}
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, site: Any, sides: Sequence[Side | None]) -> None:
        item, rank = self.item, self.item.rank
        there = [(s, w) for s, w in zip(sides, self.weights, strict=True) if s is not None]
        pairs = [s.factors for s, _ in there if s.factors is not None]
        if item.method == "svd" and rank is None and item.energy is None:
            rank = max((s.rank or min(site.matrices[1:]) for s, _ in there))
        own: dict[str, Tensor]
        if item.method in SUMS and len(pairs) == len(there):
            factor = item.scale / (sum(self.weights) if item.normalize else 1.0)
            a = torch.cat([a.double() for a, _ in pairs], -2)
            b = torch.cat([b.double() * w * factor
                           for (_, b), (_, w) in zip(pairs, there, strict=True)], -1)  # fmt: skip
            own, error = self._product(site, a, b, rank)
        else:
            change = self._merged(site, sides, bias=False)
            own, error = self._dense(site, change, rank)
        about: dict[str, Any] = {"tensors": sorted(own), "error": error}
        if "a" in own:
            about["rank"] = own["a"].shape[-2]
        if any(s.bias is not None for s, _ in there):
            about["bias"] = site.bias
            own = {**own, "bias": self._merged(site, sides, bias=True)}
        self.sites[site.id] = about
        self.tensors |= {f"{site.id}.{k}": t.contiguous() for k, t in own.items()}

    def _product(
        self, site: Any, a: Tensor, b: Tensor, rank: int | None
    ) -> tuple[dict[str, Tensor], float]:
        like, cut = self.edit.like(site), rank is not None and rank < a.shape[-2]
        if cut or self.item.energy is not None:
            found = low_rank.nearest_to_product(b, a, rank, self.item.energy)
            return {"a": found.a.to(like), "b": found.b.to(like)}, found.error
        own = {"a": a.to(like), "b": b.to(like)}
        return own, low_rank.apart((b, a), (own["b"], own["a"]))

    def _dense(
        self, site: Any, change: Tensor, rank: int | None
    ) -> tuple[dict[str, Tensor], float]:
        like, count = self.edit.like(site), site.matrices[0]
        if (rank is None or rank >= min(site.matrices[1:])) and self.item.energy is None:
            own = change.to(like)
            return {"change": own}, low_rank.share(own - change, change)
        stack = change if count == 1 else change.unflatten(0, (count, -1))
        found = low_rank.nearest(stack, rank, self.item.energy)
        return {"a": found.a.to(like), "b": found.b.to(like)}, found.error

    def _merged(self, site: Any, sides: Sequence[Side | None], bias: bool) -> Tensor:
        """The members' changes of the weight, or of its bias, as one; zero where one has none."""
        given = [s and (s.bias if bias else s.change()) for s in sides]
        like = next(g for g in given if g is not None)
        changes = [torch.zeros_like(like) if g is None else g.to(like) for g in given]
        item, recipe = self.item, self.item._recipe
        if recipe is None:
            share = self.weights[1] / sum(self.weights)
            return merge_formulas.slerp(changes[0], changes[1], share) * item.scale
        seed = zlib.crc32(f"{item.seed} {site.id}{' bias' if bias else ''}".encode())
        drawn = torch.Generator(like.device).manual_seed(seed)
        trims = [item._trim] * len(changes)
        return merge_formulas.merged(changes, self.weights, recipe, trims, item.scale, drawn)
