"""How the factors of a low-rank branch begin: by the weight, by what its calls read, by gradients.

With W `[out, in]`, scale s, and the rank's first singular triples where others are not said:

    pissa    W = U S V^T         A = (S / s)^1/2 V^T,  B = U (S / s)^1/2
    olora    W = Q R             A = R,  B = Q
    corda    W C = U S V^T       A = (S / s)^1/2 V^T C^-1,  B = U (S / s)^1/2   (kpm: the last ones)
    lora_ga  dL/dW = U S V^T     A = c V^T,  B = c U of the next triples,  c = out^1/4 / gamma^1/2
    eva      Cov(x) = V S V^T    A = V^T,  B = 0, of ranks by the share of variance

Meng et al., NeurIPS 2024, arXiv:2404.02948; Bueyuekakyuez 2024, arXiv:2406.01775; Yang et al.,
NeurIPS 2024, arXiv:2406.05223; Wang et al., NeurIPS 2024, arXiv:2407.05000; Paischer et al. 2024,
arXiv:2410.07170. C is the mean of `x x^T` of the inputs, each batch divided by its largest number
and the diagonal raised by 1 % of its mean, as in PEFT, whose IncrementalPCA `eva` solves exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ...rewriter.branches.branch import Axes, Delta
from ...rewriter.edits.edit import Editor
from ...rewriter.edits.read import Reading
from ...rewriter.errors import MetaTensorError, OptionError, PassError
from ...rewriter.parts.parts import LowRank, Part
from ...rewriter.program.history import Plan
from ...rewriter.program.sites import EmbeddingSite, LinearSite, WeightSite
from ...rewriter.program.state import State
from ...rewriter.scores.allocate import most
from ...rewriter.scores.gradients import gradients
from ...rewriter.scores.observe import observe_rows

Pair = tuple[Tensor, Tensor]

RANDOM = ("kaiming", "gaussian")
"""Starts that need neither the weight nor data, with B zero."""

OF_DATA = ("eva", "corda", "corda_kpm", "lora_ga")
"""Starts that need batches, and know linears only."""


def require_random(method: Any) -> None:
    """Raises OptionError for starts whose product is not zero, or that the method does not plan."""
    remedy = "Choose lora for starts whose product is not zero."
    method.require(method.init in RANDOM, "init", " or ".join(RANDOM), remedy)


START = re.compile(r"kaiming|gaussian|pissa(_niter_[1-9]\d{0,2})?|olora|eva|corda(_kpm)?|lora_ga")

_ROOM = 1 << 30
"""Bytes of covariances that are held at a time; for more of them, the data runs again."""


def pissa(weight: Tensor, rank: int, scale: float, niter: int = 0, seed: int = 0) -> Pair:
    """Of `[..., out, in]`: by an exact decomposition, or a randomised one of so many rounds."""
    if niter:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(weight, rank, niter)
        return _split(u, s / scale, v.mT)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return _split(u[..., :rank], s[..., :rank] / scale, v[..., :rank, :])


def olora(weight: Tensor, rank: int) -> Pair:
    """Of `[..., out, in]`."""
    q, r = torch.linalg.qr(weight)
    return r[..., :rank, :].clone(), q[..., :rank].clone()


def corda(weight: Tensor, moment: Tensor, rank: int, scale: float, last: bool = False) -> Pair:
    """Of `[out, in]` and a moment `[in, in]` of its inputs; `last`: of the smallest triples."""
    c = moment.double() + 0.01 * moment.diagonal().mean().double() * torch.eye(len(moment)).to(
        moment.device, torch.float64
    )
    u, s, v = torch.linalg.svd(weight.double() @ c, full_matrices=False)
    chosen = slice(-rank, None) if last else slice(rank)
    inverse = torch.linalg.solve(c, v[chosen].mT).mT  # C is symmetric
    a, b = _split(u[:, chosen], s[chosen] / scale, inverse)
    return a.to(weight.dtype), b.to(weight.dtype)


def lora_ga(gradient: Tensor, rank: int, gamma: float = 16.0) -> Pair:
    """Of the gradient `[out, in]` of a weight."""
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    size = gradient.shape[0] ** 0.25 / gamma**0.5
    return size * v[:rank], size * u[:, rank : 2 * rank]


def principal(moment: Tensor, most: int) -> Pair:
    """(directions `[most, in]` of most variance, their shares of it `[most]`).

    The largest entry of a direction is positive.

    Args:
        moment: mean of `(x, 1) (x, 1)^T`, `[in + 1, in + 1]`.
    """
    count, mean = moment[-1, -1], moment[-1, :-1] / moment[-1, -1]
    covariance = moment[:-1, :-1] / count - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance)
    values, rows = values.flip(0).clamp(min=0), vectors.flip(1).mT
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    rows, total = rows * largest.sign(), values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return rows[:most].clone(), values[:most] / total


def _split(u: Tensor, s: Tensor, v: Tensor) -> Pair:
    roots = s.sqrt()
    return roots[..., :, None] * v, u * roots[..., None, :]


class StartedBranch(Delta):
    """`s (B A - B0 A0)` with constants `a0 [rank, in]` and `b0 [out, rank]`, where it started."""

    axes: ClassVar[Axes] = {
        "a": ("rank", "in"), "b": ("out", "rank"), "a0": ("rank", "in"), "b0": ("out", "rank"),
    }  # fmt: skip
    a0: Tensor
    b0: Tensor

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        self.register_buffer("a0", a, persistent=False)  # the plan has them
        self.register_buffer("b0", b, persistent=False)
        self.scale, self.dropout = scale, dropout

    def moved(self) -> Pair:
        """`B A - B0 A0 = (B - B0) A + B0 (A - A0)` as one product: zero at first, and of small
        numbers where both terms of the difference are large."""
        a = torch.cat([self.a, self.a - self.a0], -2)
        return a, torch.cat([self.b - self.b0, self.b0], -1)

    def branch(self, x: Tensor, **operands: Tensor) -> Tensor:
        return self.shape.low_rank(self.dropped(x), *self.moved(), self.scale, **operands)

    def delta(self) -> Tensor:
        a, b = self.moved()
        return self.shape.product(b, a) * self.scale

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return (*self.moved(), self.scale) if self.at_linear else None

    def part(self) -> Part:
        a = torch.cat([self.a.detach(), self.a0], -2)
        b = torch.cat([self.b.detach(), -self.b0], -1)
        return LowRank("", a, b, self.scale, dropout=self.dropout)

    def describe(self) -> str:
        return f"rank={self.a.shape[-2]}, scale={self.scale:g}, less its start"


class Options(Protocol):
    """Of a method whose branches begin by `init`."""

    @property
    def init(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def rho(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def random_seed(self) -> int: ...
    def at_site(self, plan: Plan, site: str) -> Options:
        """The options at a site."""
        ...

    def scale(self, rank: int) -> float:
        """Of a branch of this rank."""
        ...


def rank_obstacle(rank: int, dropout: float, site: WeightSite) -> str:
    """Why a low-rank branch does not fit a site; empty if it does."""
    count, out, size = site.matrices
    limit = min(size, out)
    if rank > limit:
        each = f" of each of {count} matrices" if count > 1 else ""
        return (
            f"rank={rank}, but it must be at most {limit} for {size} -> {out} features{each}. "
            "Give such sites a smaller rank, in a pass of their own"
        )
    if dropout and isinstance(site, EmbeddingSite):
        return f"dropout={dropout:g} is on what is read, and ids cannot be dropped. Set dropout=0"
    return ""


def start_obstacle(start: str, rank: int, site: WeightSite) -> str:
    """Why a branch cannot begin so at a site; empty if it can."""
    if start in OF_DATA and not isinstance(site, LinearSite):
        return f"{site.kind}: init={start} is for linears. Leave init= out there"
    if start not in RANDOM and isinstance(site, EmbeddingSite):
        return f"init={start} is for products, not for tables. Leave init= out there"
    most = min(site.matrices[1:]) // 2
    if start == "lora_ga" and rank > most:
        return f"init=lora_ga takes twice the rank of a gradient, so rank may be {most} at most"
    return ""


def started(program: State, plan: Plan, options: Options, data: Any) -> Plan:
    """A plan with the factors of its sites: `<id>.a [rank, in]` and, but for `eva`, `<id>.b`.

    Args:
        data: batches, where the start needs them; of `lora_ga` with a loss, see `gradients`.

    Raises:
        OptionError: there are no batches. MetaTensorError: weights have no values.
    """
    every: list[Any] = [program.sites[i] for i in plan.decisions["sites"]]
    sites: list[WeightSite] = [s for s in every if not s.obstacle]
    own = {s.id: options.at_site(plan, s.id) for s in sites}
    if options.init != "eva":
        factors = _factors(program, sites, own, _data_of(options, data))
        named = {f"{i}.{n}": t for i, ab in factors for n, t in zip("ab", ab, strict=True)}
        return replace(plan, tensors={n: t.contiguous() for n, t in named.items()})
    directions = _explaining(program, sites, own, _data_of(options, data))
    none = {i: "its inputs vary too little for a rank" for i, a in directions.items() if not len(a)}
    decisions = dict(plan.decisions) | {"sites": [s.id for s in every if s.id not in none]}
    if none:
        decisions["skipped"] = {**plan.decisions.get("skipped", {}), **none}
    return Plan(decisions, {f"{i}.a": a.contiguous() for i, a in directions.items() if len(a)})


def planned_branch(edit: Editor, site: WeightSite, options: Options) -> StartedBranch | None:
    """The branch that begins where the plan says; None where B is zero, or no branch can stand.

    Raises:
        PassError: the plan does not say it.
    """
    if options.init in RANDOM or edit.obstacle(site):
        return None
    a, b = (edit.tensors.get(f"{site.id}.{n}") for n in "ab")
    if a is None or (b is None) != (options.init == "eva"):
        raise PassError(
            f"lora: the plan has no factors for {site.id} to begin with. It was altered: save the "
            "adapter again."
        )
    if b is None:
        return None
    like = edit.like(site)
    return StartedBranch(a.to(like), b.to(like), options.scale(options.rank), options.dropout)


def _factors(
    program: State,
    sites: Sequence[WeightSite],
    own: Mapping[str, Options],
    batches: Sequence[Any],
) -> Iterator[tuple[str, Pair]]:
    """(site id, factors), in float32 at least; the options by site."""
    start = next((options.init for options in own.values()), "")
    if start == "lora_ga":
        slopes = _slopes(program, sites, batches)
        yield from ((i, lora_ga(slope, own[i].rank)) for i, slope in slopes.items())
        return
    weights = _matrices(program, sites)
    if start.startswith("corda"):
        last = start == "corda_kpm"
        for i, moment in _moments(program, sites, batches, centred=False):
            rank = own[i].rank
            yield i, corda(weights[i], moment, rank, own[i].scale(rank), last)
        return
    niter = int(start.rpartition("_")[2]) if "niter" in start else 0
    for i, weight in weights.items():
        rank = own[i].rank
        drawn = rank, own[i].scale(rank), niter, own[i].random_seed
        yield i, olora(weight, rank) if start == "olora" else pissa(weight, *drawn)


def _explaining(
    program: State,
    sites: Sequence[WeightSite],
    own: Mapping[str, Options],
    batches: Sequence[Any],
) -> dict[str, Tensor]:
    """`a` of each site: the directions that explain most, as many as all have ranks."""
    limits = {s.id: min(round(own[s.id].rank * own[s.id].rho), *s.matrices[1:]) for s in sites}
    budget = sum(options.rank for options in own.values())
    each = _moments(program, sites, batches, centred=True)
    known = {i: principal(moment, limits[i]) for i, moment in each}
    taken = most([known[s.id][1] for s in sites], budget)
    ranks = {s.id: int(t.sum()) for s, t in zip(sites, taken, strict=True)}
    return {s.id: known[s.id][0][: ranks[s.id]].float() for s in sites}


def _data_of(options: Options, data: Any) -> list[Any]:
    """The batches that a start decides from, if it does."""
    start = options.init
    if start not in OF_DATA:
        return []
    batches: list[Any] = list(data) if isinstance(data, Iterable) else []  # pyright: ignore
    if not batches:
        raise OptionError(
            f"lora: init={start} decides from data, and there are no batches. Give some: "
            f"run(program, 'lora{{init={start}}}', data=[batch, ...]), or --data FILE of "
            "peftfx run."
        )
    return batches


def _matrices(program: State, sites: Sequence[WeightSite]) -> dict[str, Tensor]:
    """What each site multiplies by, `[out, in]` or a stack of them, in float32 at least."""
    look, matrices = Reading(program), dict[str, Tensor]()
    for site in sites:
        matrix = look.matrix(site).detach()
        if matrix.device.type == "meta":
            raise MetaTensorError(
                f"lora: {site.id} has no values on the meta device, by which its factors begin. "
                "Load the weights first, or leave init= out."
            )
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        count = site.matrices[0]
        matrices[site.id] = matrix if count == 1 else matrix.unflatten(0, (count, -1))
    return matrices


def _slopes(
    program: State, sites: Sequence[WeightSite], batches: Sequence[Any]
) -> Mapping[str, Tensor]:
    """Gradients `[out, in]`, their mean over batches."""
    stored = dict(program.module.named_parameters())
    if missing := next((s for s in sites if s.weight not in stored), None):
        raise OptionError(
            f"lora: init=lora_ga asks for the gradient of {missing.id}, whose weight is stored in "
            "few bits. Choose another init=."
        )
    slopes = gradients(program, batches, {s.weight for s in sites})
    own: dict[str, Tensor] = {}
    for site in sites:
        slope = slopes[site.weight] / len(batches)
        slope = slope.mT if isinstance(site, LinearSite) and site.in_out else slope
        slope = slope if site.features is None else slope[list(site.features)]
        own[site.id] = slope.to(torch.promote_types(slope.dtype, torch.float32))
    return own


def _moments(
    program: State, sites: Sequence[WeightSite], batches: Sequence[Any], centred: bool
) -> Iterator[tuple[str, Tensor]]:
    """(site id, moment of what its calls read), see `corda` and `principal`."""
    group: list[WeightSite] = []
    room = _ROOM
    for site in sites:
        size = 8 * (site.matrices[2] + 1) ** 2
        if group and size > room:
            yield from observe_rows(program, batches, group, _augmented if centred else _scaled)
            group, room = [], _ROOM
        group.append(site)
        room -= size
    yield from observe_rows(program, batches, group, _augmented if centred else _scaled)


def _augmented(rows: Tensor) -> Tensor:
    """Sum of `(x, 1) (x, 1)^T`."""
    wide = torch.cat([rows, torch.ones_like(rows[:, :1])], 1).double()
    return wide.mT @ wide


def _scaled(rows: Tensor) -> Tensor:
    """Sum of `x x^T`, of rows divided by the batch's largest number."""
    wide = rows.double() / rows.max().abs()
    return wide.mT @ wide
