"""The comparison: every method on the same splits, settings chosen on validation, test read once.

Settings (the learning rate) are chosen on the validation part of the first split alone and then
fixed for all splits; the seeds are the splits' own. Test sets are scored once a split after
training; what a method scores before it decides nothing.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..rewriter.api import Program
from ..rewriter.run.run import run
from ..rewriter.storage.artifact import save
from .corpus import Pair, Split
from .encoder import CODE_TOKENS, QUERY_TOKENS, Tokenizer, embed
from .evaluation import Interval, Ranks, mrr, paired_bootstrap, ranks, recall, reciprocal
from .training import Settings, Training, train


@dataclass(frozen=True)
class Method:
    """One row of the table: a recipe and the learning rates to choose from.

    The first rate is the one that validation chose on the standard library; the short demo
    takes it without choosing again.

    Attributes:
        members: recipes that are trained first, each alone on its share of the pairs; the recipe
            is then run with their artifacts.
        tail: share of the steps that come after what training decided was put in place.
    """

    name: str
    recipe: str
    rates: tuple[float, ...]
    members: tuple[str, ...] = ()
    tail: float = 0.0


_LORA = "lora{rank=8,where=linear}"
_MEMBERS = tuple(
    f"serial_adapter{{name={name},bottleneck=64,norms=false,where=ffn}}" for name in ("a", "b")
)

METHODS = (
    Method("LoRA", _LORA, (2e-3, 1e-3)),
    Method("BitFit", "bitfit", (3e-3, 1e-2)),
    Method("(IA)3", "ia3", (1e-2, 3e-2)),
    Method("serial adapter", "serial_adapter{bottleneck=64}", (1e-3, 3e-3)),
    Method("prefix-tuning", "prefix_tuning{length=20}", (1e-2, 3e-2)),
    Method("prompt tuning", "prompt_tuning{length=20}", (3e-3, 1e-2)),
    Method("DoRA", "dora{rank=8,where=linear}", (2e-3, 1e-3)),
    Method("AdaLoRA", "adalora{rank=12,target=8,where=linear}", (6e-3, 2e-3)),
    Method("UniPELT", "unipelt", (2e-3, 6e-4)),
    Method("HyperFormer++", "hyperformer{tasks=2}", (1e-3,)),
    Method("CoDA", "coda", (1e-3,)),
    Method("diff pruning", "diff_pruning{density=0.005}", (1e-4,), tail=0.5),
    Method("PEQA, int4", "peqa{group=64}", (1e-4,)),
    Method("FFN pruned by 1/4, LoRA", f"{_LORA};channel_pruning{{ratio=0.25}}", (2e-3,)),
    Method("AdapterFusion", "adapter_fusion", (1e-3,), _MEMBERS),
)


@dataclass
class Outcome:
    """What one method reached.

    Attributes:
        name, recipe: of the method.
        parameters: trained parameters.
        rate: the learning rate chosen on validation (None without training).
        untrained: MRR over all test queries before training, of a method that moves the outputs by
            itself (None: it starts as the model).
        validation: rate -> MRR on the first split's validation part.
        found: ranks of the right function, per split.
        runs: the training runs, per split.
        program: the trained program of the first split.
    """

    name: str
    recipe: str
    parameters: int
    rate: float | None = None
    untrained: float | None = None
    validation: dict[float, float] = field(default_factory=dict[float, float])
    found: list[Ranks] = field(default_factory=list[Ranks])
    runs: list[Training] = field(default_factory=list[Training])
    program: Program | None = None

    @property
    def ranks(self) -> Ranks:
        """All splits' ranks together."""
        return np.concatenate(self.found)

    @property
    def mrr(self) -> float:
        """Mean reciprocal rank over all test queries."""
        return mrr(self.ranks)

    @property
    def recall(self) -> float:
        """Share of test queries whose function comes first."""
        return recall(self.ranks)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest MRR of a split."""
        each = [mrr(f) for f in self.found]
        return min(each), max(each)

    @property
    def step_seconds(self) -> float:
        """Median CPU seconds of a training step."""
        return statistics.median(r.step_seconds for r in self.runs) if self.runs else 0.0

    @property
    def memory(self) -> int:
        """Bytes that training holds beside the model."""
        return max((r.memory for r in self.runs), default=0)

    def gain(self, over: Outcome) -> Interval:
        """Difference of reciprocal ranks, with its paired bootstrap interval over queries."""
        return paired_bootstrap(reciprocal(self.ranks), reciprocal(over.ranks))


def encoder_of(program: Program, task: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    """The program as (ids, mask) -> hidden states, for one task where it knows several."""
    extra = {"task": torch.tensor([task])} if "task" in program.spec.names else {}

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        return program.module(input_ids=ids, attention_mask=mask, **extra).last_hidden_state

    return forward


def score(program: Program, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> Ranks:
    """Rank of each query's function among the functions of `pairs`."""
    program.eval()
    queries = embed(encoder_of(program, 0), tokenizer, [p.query for p in pairs], QUERY_TOKENS)
    codes = embed(encoder_of(program, 1), tokenizer, [p.code for p in pairs], CODE_TOKENS)
    return ranks(queries, codes)


def side_by_side(
    before: Program, after: Program, tokenizer: Tokenizer, pairs: Sequence[Pair], count: int = 3
) -> list[tuple[str, str, str]]:
    """Rows of (query, what one program finds, what the other finds) among the functions of `pairs`,
    the best ones for the first `count` queries; the right one is ticked."""
    asked = asked_of(pairs, count)
    found = [_best(program, tokenizer, pairs, asked, count) for program in (before, after)]
    return [
        (pairs[index].query if place == 0 else "", found[0][row][place], found[1][row][place])
        for row, index in enumerate(asked)
        for place in range(count)
    ]


def asked_of(pairs: Sequence[Pair], count: int = 3) -> list[int]:
    """Which queries are shown: the first that fill a line, or just the first."""
    fitting = [i for i, p in enumerate(pairs) if 40 < len(p.query) < 110]
    return (fitting or list(range(len(pairs))))[:count]


def _best(
    program: Program, tokenizer: Tokenizer, pairs: Sequence[Pair], asked: Sequence[int], count: int
) -> list[list[str]]:
    """For each of some queries the titles of the best functions, with their scores."""
    program.eval()
    texts = [pairs[i].query for i in asked]
    queries = embed(encoder_of(program, 0), tokenizer, texts, QUERY_TOKENS)
    codes = embed(encoder_of(program, 1), tokenizer, [p.code for p in pairs], CODE_TOKENS)
    scores = np.asarray(queries) @ np.asarray(codes).T
    return [
        [f"{'✓ ' if i == right else ''}{pairs[i].title} {row[i]:.2f}"
         for i in np.argsort(-row)[:count]]
        for row, right in zip(scores, asked, strict=True)
    ]  # fmt: skip


def zero_shot(base: Program, tokenizer: Tokenizer, splits: Sequence[Split]) -> Outcome:
    """The model as it came."""
    outcome = Outcome("zero-shot", "", 0)
    outcome.found = [score(base, tokenizer, s.test) for s in splits]
    return outcome


def prepare(method: Method, base: Program, sources: Sequence[Path] = ()) -> Program:
    """The program with a method's fresh branches, lowered where it has low-rank ones; with
    members, the first one's until they are trained."""
    recipe = method.recipe if sources or not method.members else method.members[0]
    started = run(base, recipe, sources=sources)
    if any(a.slot == "delta" for a in started.attachments):
        started = run(started, "lower{target=cpu}")
    return started


def compare(
    method: Method,
    started: Program,
    tokenizer: Tokenizer,
    splits: Sequence[Split],
    steps: int,
    advance: Callable[[str], None],
) -> Outcome:
    """Chooses a method's learning rate on validation, then trains and tests it on every split."""
    outcome = Outcome(method.name, method.recipe, 0)
    kinds = {r.certificate.kind for r in started.history}
    if not method.members and not kinds.isdisjoint(("near", "trainable")):
        begun = [score(started, tokenizer, s.test) for s in splits]
        outcome.untrained = mrr(np.concatenate(begun))
    training = _Method(method, outcome, started, tokenizer, steps, advance)
    first: dict[float, tuple[Program, Training]] = {}
    for rate in method.rates:
        first[rate] = training.fit(rate, splits[0])
        if len(method.rates) > 1:
            scores = score(first[rate][0], tokenizer, splits[0].validation)
            outcome.validation[rate] = mrr(scores)
    outcome.rate = max(method.rates, key=lambda r: outcome.validation.get(r, 0.0))
    outcome.program = first[outcome.rate][0]
    for index, split in enumerate(splits):
        program, steps_taken = (
            first[outcome.rate] if index == 0 else training.fit(outcome.rate, split)
        )
        outcome.runs.append(steps_taken)
        outcome.found.append(score(program, tokenizer, split.test))
    return outcome


@dataclass(frozen=True)
class _Method:
    """A method at work: what it starts from, and how it is trained."""

    method: Method
    outcome: Outcome
    started: Program
    tokenizer: Tokenizer
    steps: int
    advance: Callable[[str], None]

    def fit(self, rate: float, split: Split) -> tuple[Program, Training]:
        """Trains a program of its own on a split; its members first, if it has any."""
        settings = Settings(rate, steps=self.steps, seed=split.seed)
        program = self._with_members(split, settings)
        self.outcome.parameters = sum(p.numel() for p in program.trainable_parameters())
        last = round(self.method.tail * self.steps)
        settings = replace(settings, steps=self.steps - last)
        program, training = self._learn(program, split.train, settings)
        if not last:
            return program, training
        program, more = self._learn(program, split.train, replace(settings, steps=last))
        return program, replace(training, losses=training.losses + more.losses)

    def _with_members(self, split: Split, settings: Settings) -> Program:
        members = self.method.members
        if not members:
            return self.started.fork()
        with tempfile.TemporaryDirectory() as folder:
            sources = [Path(folder) / str(i) for i in range(len(members))]
            for index, (recipe, source) in enumerate(zip(members, sources, strict=True)):
                share = split.train[index :: len(sources)]
                save(self._learn(run(self.started.base, recipe), share, settings)[0], source)
            return prepare(self.method, self.started.base, sources)

    def _learn(
        self, program: Program, pairs: Sequence[Pair], settings: Settings
    ) -> tuple[Program, Training]:
        name = f"{self.method.name}, lr {settings.learning_rate:g}"
        return train(
            program,
            encoder_of(program, 0),
            encoder_of(program, 1),
            self.tokenizer,
            pairs,
            settings,
            lambda loss: self.advance(f"{name}: loss {loss:.3f}"),
        )
