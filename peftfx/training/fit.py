"""A training loop for scripts: AdamW, warm-up and linear decay, controllers, a progress bar.

    done = peftfx.fit(program, batches, lr=1e-3, epochs=3, held_out=others, every=50, patience=3)
    peftfx.save(done.program, "adapter/")

With `held_out`, the best values are kept. With `checkpoint="run.safetensors"` the same call goes on
where an interrupted one was, bit for bit. For several devices, use `Trainer` or Lightning.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..rewriter.api import Program
from ..rewriter.errors import OptionError
from ..rewriter.graph.module import modes_kept
from ..rewriter.run.run import run
from .held_out import Evaluation, HeldOut
from .loop import Loop, Loss, Settings
from .reports import Report, logging, reporting
from .resuming import Checkpoint
from .stream import Stream


@dataclass(frozen=True)
class Fitted:
    """What `fit` leaves behind.

    Attributes:
        program: trained, with what its methods decided put in place.
        losses: the task's loss of every step, without the methods' own terms.
        seconds: wall time of the whole run.
        step_seconds: median CPU seconds of a step, all threads together.
        stopped: whether the run ended before its last step: interrupted, or out of patience.
        held_out: (steps done, figure) of every evaluation.
        best_step: after how many steps the figure was best; those values are in the program.
    """

    program: Program
    losses: tuple[float, ...]
    seconds: float
    step_seconds: float
    stopped: bool = False
    held_out: tuple[tuple[int, float], ...] = ()
    best_step: int | None = None


def fit(
    program: Program,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    lr: float = 1e-3,
    steps: int | None = None,
    epochs: int = 1,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    accumulate: int = 1,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    seed: int | None = None,
    dropout: bool = True,
    forward: Callable[[Any], Any] | None = None,
    progress: bool | Report = True,
    held_out: HeldOut | None = None,
    every: int = 100,
    patience: int | None = None,
    loggers: Sequence[Any] = (),
    checkpoint: str | Path | None = None,
    save_every: int = 100,
) -> Fitted:
    """Trains a program's adapters in place. Ctrl-C ends the run and keeps what was learnt.

    Args:
        program: with something to train.
        batches: dicts of keyword tensors, or what `forward` takes; a list or DataLoader is gone
            through again for every epoch.
        loss: of a batch; by default the program's own (captured with labels). With a `loss`, a
            batch may hold more than the program takes.
        lr: highest learning rate, after warm-up; methods scale it for their parameters.
        steps: optimizer steps; by default `epochs` times the batches.
        epochs: how often to go through the batches.
        weight_decay: AdamW's, for matrices.
        warmup: share of the steps in which the rate rises; then it falls linearly to 0.
        accumulate: batches a step.
        clip: largest norm of all gradients together.
        autocast: bfloat16 for mixed precision.
        seed: seeds dropout and the methods' own draws.
        dropout: train in training mode; False keeps evaluation mode.
        forward: how a batch runs the program; by default `program(**batch)`. It may return the
            loss itself.
        progress: show a bar on stderr, or call `progress(steps done, loss)` after every step.
        held_out: batches for the mean of the loss in evaluation mode, or a function of the program
            to a figure of which less is better. The values of the best evaluation are kept.
        every: steps between two evaluations; the last step is evaluated in any case.
        patience: stop after so many evaluations in a row that were no better.
        loggers: what gets every step's loss, rate and gradient norm, and every evaluation:
            `"tensorboard"`, `"wandb"`, their writers and runs, or any object with
            `log(data, step)`.
        checkpoint: a file that holds the run; where it exists, the run goes on from it, as if it
            had never stopped. Batches that were taken are gone through again, but not computed;
            their order must depend on torch's random numbers alone.
        save_every: steps between two checkpoints; the last step is kept in any case.

    Raises:
        PassError: nothing trains.
        OptionError: no batches, no loss, no number of steps, or an option out of range.
        InputError: a batch does not fit the program.
        NonFiniteError: the loss, a gradient or an evaluation is not finite; the program is as after
            the step before.
        ArtifactError: the checkpoint is damaged, or of another program, base or other settings.
    """
    total = _steps(batches, steps, epochs, accumulate)
    settings = Settings(total, lr, warmup, weight_decay, accumulate, clip, autocast, dropout)
    evaluation = Evaluation(held_out, every, patience)
    if seed is not None:
        torch.manual_seed(seed)
    loop, stream = Loop(program, loss, forward, settings), Stream(batches, accumulate, total)
    saved = Checkpoint(checkpoint, save_every, loop)
    done = saved.take_up(stream, evaluation)
    began, stopped = time.perf_counter(), evaluation.is_enough()
    try:
        with (
            modes_kept(program.module),
            logging(loggers) as log,
            reporting(progress, total, done) as report,
        ):
            if program.training != dropout:  # else parts may be in a mode of their own
                program.train(dropout)
            for group in () if stopped else stream.groups(done):
                done += 1
                figures = _taken(done, group, loop, evaluation)
                saved.after(done, stream, evaluation)
                log(figures, done)
                report(done, loop.losses[-1])
                if evaluation.is_enough():
                    stopped = done < total
                    break
    except KeyboardInterrupt:
        stopped = True
    finally:
        loop.optimizer.zero_grad()
    if evaluation.best is not None:
        loop.take_back(evaluation.best)
    return Fitted(
        run(program, loop.controllers.finish()) if loop.losses else program,
        tuple(loop.losses),
        time.perf_counter() - began,
        statistics.median(loop.seconds) if loop.seconds else 0.0,
        stopped,
        tuple(evaluation.figures),
        evaluation.best_step,
    )


def _taken(
    step: int, batches: Sequence[Any], loop: Loop, evaluation: Evaluation
) -> dict[str, float]:
    """The figures of a step, counted from 1, once it is taken."""
    loop.take(step - 1, batches)
    figures = {"train/loss": loop.losses[-1], "train/gradient_norm": loop.norm}
    figures["train/learning_rate"] = loop.settings.rate(step - 1)
    if (figure := evaluation.after(step, loop)) is not None:
        figures["held_out/loss"] = figure
    return figures


def _steps(batches: Iterable[Any], steps: int | None, epochs: int, accumulate: int) -> int:
    """The number of optimizer steps, once everything that it depends on is checked."""
    for name, count in (("steps", steps), ("epochs", epochs), ("accumulate", accumulate)):
        if count is not None and count < 1:
            raise OptionError(f"{name} is {count}, but must be at least 1.")
    size = len(batches) if isinstance(batches, Sized) else None
    if size == 0:
        raise OptionError("batches is empty. Give a list of dicts of tensors, or a DataLoader.")
    if steps is not None:
        return steps
    if size is None:
        raise OptionError("batches has no length, so say how long to train: fit(..., steps=100).")
    return max(1, epochs * size // accumulate)
