"""VB-LoRA: low-rank branches whose sub-vectors are mixtures of a bank that all sites share.

Li, Han and Ji, NeurIPS 2024, arXiv:2405.15179. With h vectors of length l in the bank, each piece
of l entries of a column of A^T or B is a sum over the k largest of its h logits s:

    u = sum_{i in top-k(s)} softmax(s_top)_i bank_i

Logits start normal and the bank uniform and small, so that B A is not zero, but near. `bake` keeps
the k logits of each piece and which vectors they are for, 1 + 1 numbers a vector in place of h.
Folds exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from ...rewriter.edits.edit import Editor
from ...rewriter.pipeline.aliases import PLACES, Alias, instead, renamed
from ...rewriter.pipeline.controller import Controller
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.options import BySite
from ...rewriter.pipeline.passes import Pass
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.sites import WeightSite
from ...rewriter.program.state import State
from ..merging.bake import Bake
from .vector_bank import Bank, VBLoRABranch


class VBLoRAController(Controller):
    """The logits' own learning rate; at the end, the largest alone."""

    def group(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        if "logits_" in name:
            scale = cast(VBLoRA, self.method).logits_lr
            return {**super().group(name, parameter), "lr_scale": scale}
        return super().group(name, parameter)

    def finish(self) -> tuple[Pass, ...]:
        free = any(branch.largest() for _, branch in self.branches())
        return (Bake(names=(self.adapter,)),) if free else ()


@dataclass(frozen=True, kw_only=True)
class VBLoRA(Method):
    """Adds the branches, and the bank of which they are mixed.

    Attributes:
        rank: of the branches, maybe by site.
        vectors, length: h and l; l divides the inputs and outputs of a site, others are skipped.
        topk: k.
        bound: the bank starts uniform in +-bound.
        std: deviation of the logits at the start.
        dropout: probability on the branch's input, in training.
        logits_lr: learning rate of the logits, relative to that of the bank; the paper's is 10.
    """

    folds: ClassVar[str] = "exactly"
    named: ClassVar[tuple[str, ...]] = ("conv", "embedding")
    contract: ClassVar[Contract] = Contract("near", 0.1)
    controller: ClassVar[type[Controller]] = VBLoRAController
    aliases: ClassVar[Mapping[str, Alias]] = PLACES | {
        **renamed(r="rank", num_vectors="vectors", vector_length="length", init_logits_std="std"),
        **renamed(vblora_dropout="dropout", init_vector_bank_bound="bound"),
        "save_only_topk_weights": instead("bake the adapter before it is saved"),
    }

    rank: BySite[int] = 4
    vectors: int = 256
    length: int = 256
    topk: int = 2
    bound: float = 0.02
    std: float = 0.1
    dropout: float = 0.0
    logits_lr: float = 10.0
    where: str = "q|v"

    def check(self) -> None:
        for option in ("rank", "vectors", "length", "topk"):
            self.require(getattr(self, option) >= 1, option, "at least 1")
        self.require(self.topk <= self.vectors, "topk", f"at most vectors={self.vectors}")
        self.require(0 < self.bound < math.inf, "bound", "above 0, or nothing would train")
        self.require(0 <= self.std < math.inf, "std", "at least 0")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        self.require(0 < self.logits_lr < math.inf, "logits_lr", "above 0")

    def obstacle(self, site: WeightSite) -> str:
        count, out, size = site.matrices
        if out % self.length or size % self.length:
            return f"length={self.length} does not divide its {out} outputs and {size} inputs"
        if count > 1:
            return "it is of several matrices"
        if self.rank > min(out, size):
            return f"rank={self.rank} exceeds its size {out} x {size}. Choose a smaller one"
        lookup = site.kind == "embedding" and self.dropout
        return "ids have no dropout; leave it out" if lookup else ""

    def insert_all(self, edit: Editor, sites: Sequence[WeightSite], plan: Plan) -> None:
        sites = self.free(edit, sites)
        if not sites:
            return
        vectors = torch.empty(self.vectors, self.length)
        vectors.uniform_(-self.bound, self.bound, generator=edit.generator)
        bank = edit.share("bank", Bank(vectors.to(edit.like(sites[0]))))
        for site in sites:
            _, out, size = site.matrices
            rank = self.at_site(plan, site.id).rank
            of_a = rank, size // self.length, self.vectors
            of_b = out // self.length, rank, self.vectors
            a, b = (torch.randn(s, generator=edit.generator) * self.std for s in (of_a, of_b))
            like = edit.like(site)
            edit.add(
                site, VBLoRABranch((a.to(like), b.to(like)), self.topk, self.dropout), bank=bank
            )

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        branches = VBLoRAController(program, self).branches()
        return {path: places for path, branch in branches if (places := branch.largest())}
