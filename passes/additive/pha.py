"""PHA: a hypernetwork generates each task's adapters from the prototype of its samples' encodings.

Zhao et al., EMNLP 2023, arXiv:2310.11670. Each task has a prototype p_t `[dim]`, from which, with
the embedding of its layer e_l,

    [U, D, b_U, b_D] = G LN(W2 ReLU(W1 [p_t; e_l])) + g,    h <- h + U ReLU(D z + b_D) + b_U

beside feed-forward blocks, z being what the block reads: those of the decoder; an encoder has
ordinary ones, of all tasks. A retriever encodes samples, `q = MLP(mean over real tokens)` of the
stream behind the encoder. Other models have ordinary adapters in the first half of their layers,
and encode what is behind those: behind generated ones, an encoding would tell whose adapters made
it. Two losses join the task's, of unit vectors, with temperature 0.1: a contrast of a batch's
samples, in which those of one task attract one another, and one of each sample with the prototypes,
its own against all; in the authors' code against all others (`compat=true`). The task is an input,
one a sample; the encodings are an output, `query`. G starts uniform in +-1e-3 sqrt(3 / (projected
r)) for U, with d for D, 1 for the biases; embeddings N(0, 1).

`bake{names=[pha],inputs={task=2}}` leaves the adapters of one task. For a new one, the samples
that `bake` is given as data choose the task whose prototype is nearest, by the second loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...rewriter.edits.calls.call import Value
from ...rewriter.edits.edit import Editor
from ...rewriter.errors import PassError
from ...rewriter.measure.constants import constant_reads
from ...rewriter.pipeline.controller import Controller
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.sites import SublayerSite
from ...rewriter.program.state import State
from .generated_adapters import Generator
from .parallel_adapter import ParallelAdapter
from .prototypes import (
    PHABranch,
    PHAController,
    Prototypes,
    by_stream,
    encodings,
    later,
    nearest_task,
    require_generated,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PHA(Method):
    """Puts generated bottleneck adapters beside the selected sublayers, of each sample's task.

    Attributes:
        tasks: number of tasks.
        bottleneck: inner width r of the adapters.
        dim, hidden, projected: widths of prototypes, of the hidden layers, and of what G reads.
        contrast: weight of the two losses.
        temperature: of both.
        compat: a sample's own prototype is not among those that it is compared with.
        task: name of the new input, int64 `[batch]`; 0 where a call leaves it out.
        query: name of the new output `[batch, dim]`.
    """

    kinds: ClassVar[tuple[str, ...]] = ("sublayer",)
    contract: ClassVar[Contract] = Contract("near", 0.1)
    controller: ClassVar[type[Controller]] = PHAController
    folds: ClassVar[str] = "generator into constants of one task, exactly (`bake`)"

    tasks: int = 2
    bottleneck: int = 64
    dim: int = 64
    hidden: int = 128
    projected: int = 64
    contrast: float = 0.1
    temperature: float = 0.1
    compat: bool = False
    task: str = "task"
    query: str = "query"
    where: str = "ffn and sublayer"

    def check(self) -> None:
        for option in ("tasks", "bottleneck", "dim", "hidden", "projected"):
            self.require(getattr(self, option) >= 1, option, "at least 1")
        self.require(self.contrast >= 0, "contrast", "at least 0")
        self.require(self.temperature > 0, "temperature", "above 0")
        self.require(self.tasks > 1 or not self.compat, "tasks", "at least 2 with compat=true")
        for option in ("task", "query"):
            self.require(getattr(self, option).isidentifier(), option, "a name")

    @property
    def shown(self) -> tuple[str, ...]:
        return (self.query,)

    def insert_all(self, edit: Editor, sites: Sequence[SublayerSite], plan: Plan) -> None:
        like, count = edit.like(sites[0]), self.tasks
        table = torch.empty(count, self.dim).normal_(generator=edit.generator)
        task = edit.add_input(self.task, torch.tensor(0), per_sample=True, values=(0, count - 1))
        prototypes = edit.share("prototypes", Prototypes(table.to(like)))
        own = later(edit.program, sites)
        ordinary = ParallelAdapter(bottleneck=self.bottleneck, scale=1.0)
        before = [s for s in sites if s not in own]
        for site, seen in ((s, edit.operand(s)) for s in before):
            if seen is not None:
                edit.after(site, ordinary.made(edit, site, site.width), seen=seen)
        place = (before[-1], True) if before else (own[0], False)
        edit.add_output(self.query, encodings(edit, self, *place))
        done = [self._generated(edit, here, prototypes, task) for here in by_stream(own)]
        require_generated(self.text, done, own[0])

    def _generated(
        self, edit: Editor, sites: Sequence[SublayerSite], prototypes: Value, task: Value
    ) -> int:
        read = [(s, edit.operand(s), edit.samples(s, output=True)) for s in sites]
        able = [(s, seen, rows) for s, seen, rows in read if seen is not None and rows is not None]
        if not able:
            return 0
        branches = [PHABranch(s.width, self.bottleneck, rows) for s, _, rows in able]
        places, numbers = torch.arange(len(able))[:, None], sum(branches[0].sizes)
        dims = self.dim, self.hidden, self.projected
        generator = Generator(places, dims, numbers, ("layers",))
        branches[0].start(generator, edit.generator)
        name = f"{sites[0].stream}_width{sites[0].width}"
        weights = edit.share(name, generator.to(edit.like(sites[0])), task=prototypes)
        for row, ((site, seen, _), branch) in enumerate(zip(able, branches, strict=True)):
            edit.after(site, branch, seen=seen, weights=edit.item(weights, row), task=task)
        return len(able)

    def chosen(self, program: State, data: Any, inputs: Mapping[str, int]) -> Mapping[str, int]:
        if self.task in inputs or data is None or self.query not in program.outputs_added:
            return {}
        return {self.task: nearest_task(program, self, data)}

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        chosen = inputs.get(self.task)
        if chosen is None:
            return {}
        if not 0 <= chosen < self.tasks:
            raise PassError(
                f"{self.adapter}: task {chosen} is not one of 0 to {self.tasks - 1}. Choose one."
            )
        mine = [a for a in program.attached_by(self.adapter) if "task" in a.reads]
        return constant_reads(program, mine, {self.task: chosen})
