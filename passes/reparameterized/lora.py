"""LoRA: `y = x W^T + b + s (drop(x) A^T) B^T`, with `A [rank, in]`, `B [out, rank]`.

Hu et al., ICLR 2022, arXiv:2106.09685. `s = alpha / rank`, or `alpha / sqrt(rank)` for rank
stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732). A is Kaiming uniform (a = sqrt 5), B zero,
so step 0 is the base model. Folds exactly: `W + s B A`.

With `lr_ratio=16`, B learns faster than A (LoRA+: Hayou et al., ICML 2024, arXiv:2402.12354).

With `init=` factors begin otherwise (`initial_factors`). Where their product `B0 A0` is not zero,
it is what PiSSA and its kind subtract from W: the branch is `s (B A - B0 A0)`, W stays as it is,
and step 0 is the base model, bit for bit. Other libraries get a LoRA of twice the rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ...rewriter.branches.branch import Axes, Delta
from ...rewriter.edits.edit import Editor
from ...rewriter.parts.parts import LowRank, Part
from ...rewriter.pipeline.aliases import PLACES, Alias, by_pattern, instead, renamed, started_by
from ...rewriter.pipeline.controller import Controller
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.options import BySite
from ...rewriter.pipeline.passes import Saved
from ...rewriter.program.history import Plan
from ...rewriter.program.sites import EmbeddingSite, WeightSite
from ...rewriter.program.state import State
from . import initial_factors as starts
from .factors import FactorController, low_rank_parameters


class LoRABranch(Delta):
    """The low-rank branch; parameters `a [rank, in]` and `b [out, rank]`."""

    axes: ClassVar[Axes] = {"a": ("rank", "in"), "b": ("out", "rank")}

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = scale, dropout

    def acting(self) -> tuple[Tensor, Tensor]:
        """(A, B) of a call."""
        return self.a, self.b

    def lasting(self) -> tuple[Tensor, Tensor]:
        """(A, B) once training is over."""
        return self.acting()

    def branch(self, x: Tensor, **operands: Tensor) -> Tensor:
        return self.shape.low_rank(self.dropped(x), *self.acting(), self.scale, **operands)

    def delta(self) -> Tensor:
        a, b = self.lasting()
        return self.shape.product(b * self.scale, a)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return (*self.acting(), self.scale) if self.at_linear else None

    def part(self) -> Part:
        a, b = (t.detach() for t in self.lasting())
        return LowRank("", a, b, self.scale, dropout=self.dropout)

    def describe(self) -> str:
        return f"rank={self.a.shape[-2]}, scale={self.scale:g}"


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Adds a trainable low-rank branch beside every selected weight.

    Beside a convolution, A is one of `rank` channels and B one of kernel 1, in each group; beside
    experts, each has factors of its own; of an embedding, the rows of `A^T` are looked up.

    Attributes:
        rank: of the branch; sites with min(in, out) below it are skipped. By site, such as
            `{q=8,ffn=16,default=4}`: the first entry that matches counts.
        alpha: numerator of the scale; by site, too.
        dropout: probability on the branch's input, in training.
        rslora: scale by alpha / sqrt(rank).
        init: `kaiming`, `gaussian` (A of deviation 1 / rank), `pissa` (`pissa_niter_4`: by that
            many rounds), `olora`; and of batches (`data=`) `eva`, `corda`, `corda_kpm`, `lora_ga`.
        rho: `eva` moves ranks between sites, up to so many times rank.
        lr_ratio: LoRA+: the learning rate of B (and of magnitudes), in rates of A; the paper's is
            16. Beside embeddings, where A is the one that starts at zero, both keep theirs.
        where: the paper adapts queries and values.
    """

    controller: ClassVar[type[Controller]] = FactorController
    folds: ClassVar[str] = "exactly"
    named: ClassVar[tuple[str, ...]] = ("conv", "embedding", "experts")
    aliases: ClassVar[Mapping[str, Alias]] = PLACES | {
        **renamed(r="rank", lora_alpha="alpha", lora_dropout="dropout", use_rslora="rslora"),
        **renamed(loraplus_lr_ratio="lr_ratio"),
        "init_lora_weights": started_by("init", "kaiming"),
        "rank_pattern": by_pattern("rank"),
        "alpha_pattern": by_pattern("alpha"),
        "use_dora": instead("write dora{...} in place of lora{...}"),
    }

    rank: BySite[int] = 8
    alpha: BySite[float] = 16.0
    dropout: float = 0.0
    rslora: bool = False
    init: str = "kaiming"
    rho: float = 2.0
    lr_ratio: float = 1.0
    where: str = "q|v"

    def check(self) -> None:
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(math.isfinite(self.alpha), "alpha", "finite")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        words = "kaiming, gaussian, pissa, pissa_niter_4, olora, eva, corda, corda_kpm or lora_ga"
        self.require(starts.START.fullmatch(self.init) is not None, "init", words)
        self.require(1 <= self.rho < math.inf, "rho", "at least 1")
        self.require(0 < self.lr_ratio < math.inf, "lr_ratio", "positive")
        roots = self.init.startswith(("pissa", "corda"))
        self.require(self.alpha > 0 or not roots, "alpha", f"above 0 with init={self.init}")

    def obstacle(self, site: WeightSite) -> str:
        why = starts.start_obstacle(self.init, self.rank, site)
        return why or starts.rank_obstacle(self.rank, self.dropout, site)

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        plan = super().plan(program, data, sources)
        return plan if self.init in starts.RANDOM else starts.started(program, plan, self, data)

    def insert(self, edit: Editor, site: WeightSite) -> None:
        edit.add(site, starts.planned_branch(edit, site, self) or self.made(edit, site))

    def scale(self, rank: int) -> float:
        """Of a branch of this rank: where `eva` moved ranks, alpha moved along."""
        alpha = self.alpha * (rank / self.rank)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def saved_part(self, saved: Saved) -> Part | None:
        tensors = saved.tensors
        if not {"a", "b"} <= set(tensors) <= {"a", "b", "m"}:  # where it began is subtracted
            return None
        a, b = tensors["a"], tensors["b"]
        return LowRank(saved.target, a, b, self.scale(a.shape[-2]), tensors.get("m"))

    def made(self, edit: Editor, site: WeightSite) -> LoRABranch:
        """The branch for one site, freshly initialised."""
        like = edit.like(site)
        a, b = low_rank_parameters(site, self.rank, edit.generator)
        if (planned := edit.tensors.get(f"{site.id}.a")) is not None:  # of a rank of its own
            a, b = planned.clone(), b.new_zeros(len(b), len(planned))
        elif self.init == "gaussian" and not isinstance(site, EmbeddingSite):
            nn.init.normal_(a, std=1 / self.rank, generator=edit.generator)
        return LoRABranch(a.to(like), b.to(like), self.scale(a.shape[-2]), self.dropout)
