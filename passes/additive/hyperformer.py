"""HyperFormer, and HyperFormer++: a hypernetwork generates the adapters of all tasks and layers.

Mahabadi et al., ACL 2021, arXiv:2106.04489. For task t, layer l and block b (attention or
feed-forward), each stream's own generator gives

    I = LN(W2 ReLU(W1 [z_t; e_l; e_b])),    [D, b_D, U, b_U, gamma, beta] = G I + g
    h <- h + gamma * norm(U gelu(D h + b_D) + b_U) + beta

behind every self-attention and feed-forward sublayer, before the residual add. Task embeddings
are shared by all streams. `heads=own` is the plain HyperFormer: every layer's block has a G of its
own, which reads `I = W2 ReLU(W1 z_t)`, one for all places, without a norm as in the authors' code.
Embeddings start N(0, 1), linears N(0, 0.01^2) with zero biases, so gamma is centred on 0 and not
on 1. The base's norms train, too. The task is an input: one a batch.
`bake{names=[hyperformer],inputs={task=2}}` leaves the adapters of one task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ...rewriter.edits.calls.call import Value
from ...rewriter.edits.edit import Editor
from ...rewriter.errors import PassError
from ...rewriter.measure.constants import constant_reads
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.sites import SublayerSite
from ...rewriter.program.state import State
from .generated_adapters import Generator, HyperFormerBranch, Projector, initialise


@dataclass(frozen=True, kw_only=True)
class HyperFormer(Method):
    """Puts generated bottleneck adapters behind the selected sublayers.

    Attributes:
        tasks: number of tasks; the program's new input says which, an int64 scalar below it.
        bottleneck: inner width r of the adapters.
        dim, hidden, projected: widths of the embeddings, of the hidden layer and of I.
        heads: `shared` by all layers and blocks of a stream (HyperFormer++), or each place's `own`.
        task: name of the new input; 0 if a call leaves it out.
        norms: also train all normalisation parameters, as the paper does.
    """

    kinds: ClassVar[tuple[str, ...]] = ("sublayer",)
    contract: ClassVar[Contract] = Contract("trainable")
    folds: ClassVar[str] = "generator into constants of one task, exactly (`bake`)"

    tasks: int = 2
    bottleneck: int = 24
    dim: int = 64
    hidden: int = 128
    projected: int = 64
    heads: Literal["shared", "own"] = "shared"
    task: str = "task"
    norms: bool = True
    where: str = "attn and self|ffn"

    def check(self) -> None:
        for option in ("tasks", "bottleneck", "dim", "hidden", "projected"):
            self.require(getattr(self, option) >= 1, option, "at least 1")
        self.require(self.task.isidentifier(), "task", "a name")

    def insert_all(self, edit: Editor, sites: Sequence[SublayerSite], plan: Plan) -> None:
        table = nn.Embedding(self.tasks, self.dim)
        nn.init.normal_(table.weight, generator=edit.generator)
        task = edit.add_input(self.task, torch.tensor(0), values=(0, self.tasks - 1))
        table = edit.share("tasks", table.to(edit.like(sites[0])), input=task)
        insert = self._insert_shared if self.heads == "shared" else self._insert_own
        insert(edit, sites, table)
        if self.norms:
            edit.train_norms()

    def _insert_shared(self, edit: Editor, sites: Sequence[SublayerSite], table: Value) -> None:
        for stream, width in dict.fromkeys((s.stream, s.width) for s in sites):
            here = [s for s in sites if (s.stream, s.width) == (stream, width)]
            weights = edit.share(f"{stream}_width{width}", self._generator(edit, here), task=table)
            for row, site in enumerate(here):
                branch = HyperFormerBranch(width, self.bottleneck)
                edit.after(site, branch, weights=edit.item(weights, row))

    def _insert_own(self, edit: Editor, sites: Sequence[SublayerSite], table: Value) -> None:
        projector = Projector(self.dim, self.hidden, self.projected)
        initialise(projector, edit.generator)
        task = edit.share("projector", projector.to(edit.like(sites[0])), input=table)
        for site in sites:
            branch = HyperFormerBranch(site.width, self.bottleneck)
            head = nn.Linear(self.projected, sum(branch.sizes))
            initialise(head, edit.generator)
            name = edit.name(site).replace(".", "_")
            weights = edit.share(f"head_{name}", head.to(edit.like(site)), input=task)
            edit.after(site, branch, weights=weights)

    def _generator(self, edit: Editor, sites: Sequence[SublayerSite]) -> Generator:
        layers = list(dict.fromkeys(s.layer for s in sites))
        blocks = list(dict.fromkeys((s.role, s.cross) for s in sites))
        places = [[layers.index(s.layer), blocks.index((s.role, s.cross))] for s in sites]
        size = sum(HyperFormerBranch(sites[0].width, self.bottleneck).sizes)
        dims = (self.dim, self.hidden, self.projected)
        generator = Generator(torch.tensor(places), dims, size)
        for table in generator.tables:
            parameter = generator.get_parameter(table)
            nn.init.normal_(parameter, generator=edit.generator)
        initialise(generator, edit.generator)
        return generator.to(edit.like(sites[0]))

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        chosen = inputs.get(self.task)
        if chosen is None:
            return {}
        if not 0 <= chosen < self.tasks:
            raise PassError(f"{self.adapter}: task {chosen} is not one of 0 to {self.tasks - 1}.")
        return constant_reads(program, program.attached_by(self.adapter), {self.task: chosen})
