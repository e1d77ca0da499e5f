"""In-batch contrastive training of an encoder's adapters (van den Oord et al. 2018, 1807.03748).

For a batch of n pairs with embeddings q and c the loss is the mean over i of

    -log( exp(q_i c_i / t) / sum_j exp(q_i c_j / t) )

averaged with the same loss from code to query; every other function of the batch is a negative.
AdamW, linear warm-up and linear decay. Batches are a function of the seed. The encoder runs in
evaluation mode: MiniLM's dropout costs time and, in one short epoch, buys nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..rewriter.api import Program
from ..rewriter.training.autograd_saved import SavedBytes
from ..training.fit import fit
from .corpus import Pair
from .encoder import CODE_TOKENS, QUERY_TOKENS, Forward, Tokenizer, pool


@dataclass(frozen=True)
class Settings:
    """How one adapter is trained.

    Attributes:
        learning_rate: highest rate, after warm-up.
        steps: number of batches.
        batch: pairs in a batch.
        warmup: share of the steps in which the rate rises.
        weight_decay: AdamW's.
        temperature: t of the loss.
        seed: seeds the order of the pairs.
    """

    learning_rate: float
    steps: int = 30
    batch: int = 32
    warmup: float = 0.1
    weight_decay: float = 0.01
    temperature: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Training:
    """What a training run left behind.

    Attributes:
        losses: loss of every step.
        step_seconds: median CPU seconds of a step, all threads together.
        seconds: time of the whole run.
        saved_bytes: what one step keeps for its backward pass (parameters not counted).
        state_bytes: gradients and AdamW's two moments.
    """

    losses: tuple[float, ...]
    step_seconds: float
    seconds: float
    saved_bytes: int
    state_bytes: int

    @property
    def memory(self) -> int:
        """Bytes that training holds beside the model itself."""
        return self.saved_bytes + self.state_bytes


def contrastive_loss(queries: Tensor, answers: Tensor, temperature: float) -> Tensor:
    """The loss above, both ways.

    Args:
        queries: `[n, hidden]`, normalised.
        answers: `[n, hidden]`, normalised; row i answers query i.
        temperature: t.
    """
    scores = queries @ answers.T / temperature
    target = torch.arange(len(scores), device=scores.device)
    both = nn.functional.cross_entropy(scores, target) + nn.functional.cross_entropy(
        scores.T, target
    )
    return both / 2


def batches(pairs: Sequence[Pair], settings: Settings) -> Iterator[list[Pair]]:
    """`settings.steps` batches; pairs are shuffled again whenever they run out.

    Within stretches of eight batches, pairs of similar length go together, which keeps padding
    small; the batches' own order stays random.
    """
    generator = random.Random(settings.seed)
    size = min(settings.batch, len(pairs))
    queue: list[list[Pair]] = []
    pool_: list[Pair] = []
    for _ in range(settings.steps):
        if not queue:
            stretch: list[Pair] = []
            while len(stretch) < size * min(8, len(pairs) // size):
                if not pool_:
                    pool_ = list(pairs)
                    generator.shuffle(pool_)
                stretch.append(pool_.pop())
            stretch.sort(key=lambda p: len(p.code))
            queue = [stretch[i : i + size] for i in range(0, len(stretch), size)]
            generator.shuffle(queue)
        yield queue.pop()


def train(
    program: Program,
    query_encoder: Forward,
    code_encoder: Forward,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    settings: Settings,
    advance: Callable[[float], None] = lambda loss: None,
) -> tuple[Program, Training]:
    """Trains a program's adapters in place, then puts in place what its methods decided.

    Args:
        program: with adapters.
        query_encoder, code_encoder: the program as an encoder of queries and of functions.
        tokenizer: makes the encoders' inputs.
        pairs: training pairs.
        settings: how.
        advance: called with the loss after every step.
    """
    saved = SavedBytes(program.module.parameters())
    counted = itertools.chain([saved], itertools.repeat(contextlib.nullcontext()))

    def loss_of(chosen: Sequence[Pair]) -> Tensor:
        queries, query_mask = tokenizer([p.query for p in chosen], QUERY_TOKENS).tensors()
        codes, code_mask = tokenizer([p.code for p in chosen], CODE_TOKENS).tensors()
        with next(counted):
            return contrastive_loss(
                pool(query_encoder(queries, query_mask), query_mask),
                pool(code_encoder(codes, code_mask), code_mask),
                settings.temperature,
            )

    done = fit(
        program,
        batches(pairs, settings),
        lr=settings.learning_rate,
        steps=settings.steps,
        weight_decay=settings.weight_decay,
        warmup=settings.warmup,
        dropout=False,
        forward=loss_of,
        progress=lambda step, loss: advance(loss),
    )
    count = sum(p.numel() * p.element_size() for p in program.trainable_parameters())
    training = Training(done.losses, done.step_seconds, done.seconds, saved.total, 3 * count)
    return done.program, training
