"""A small training loop for scripts: AdamW, warm-up and linear decay, controllers, a progress bar.

    done = peftfx.fit(program, batches, lr=1e-3, epochs=3)
    peftfx.save(done.program, "adapter/")

For checkpoints, several devices or evaluation while training, use `Trainer` or Lightning.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ..rewriter.api import Program
from ..rewriter.errors import NonFiniteError, OptionError
from ..rewriter.graph.module import device_of, modes_kept
from ..rewriter.run.run import run
from ..rewriter.training.controllers import Controllers

Loss = Callable[[Any, Any], Tensor]
"""`(outputs, batch) -> loss`, a scalar."""

Report = Callable[[int, float], None]
"""Called with the number of steps done and the last one's loss."""


@dataclass(frozen=True)
class Fitted:
    """What `fit` leaves behind.

    Attributes:
        program: trained, with what its methods decided put in place.
        losses: the task's loss of every step, without the methods' own terms.
        seconds: wall time of the whole run.
        step_seconds: median CPU seconds of a step, all threads together.
        stopped: whether the run was interrupted before its last step.
    """

    program: Program
    losses: tuple[float, ...]
    seconds: float
    step_seconds: float
    stopped: bool = False


def rate(step: int, steps: int, highest: float, warmup: float) -> float:
    """The learning rate of a step: up linearly during warm-up, then down linearly to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return highest * (step + 1) / rising
    return highest * (steps - step) / max(1, steps - rising)


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

    Raises:
        PassError: nothing trains.
        OptionError: no batches, no loss, no number of steps, or an option out of range.
        InputError: a batch does not fit the program.
        NonFiniteError: the loss or a gradient is not finite; the program is as after the step
            before.
    """
    total = _steps(batches, steps, epochs, accumulate)
    if autocast not in (None, torch.bfloat16):
        raise OptionError(
            f"autocast={autocast} is not offered: float16 needs gradient scaling. Use "
            "torch.bfloat16, or a trainer that scales."
        )
    if seed is not None:
        torch.manual_seed(seed)
    schedule = _Schedule(lr, total, warmup)
    loop = _Loop(program, loss, forward, schedule, weight_decay, accumulate, clip, autocast)
    began, stopped = time.perf_counter(), False
    try:
        with modes_kept(program.module), _reporter(progress, total) as report:
            if program.training != dropout:  # else parts may be in a mode of their own
                program.train(dropout)
            for step, group in enumerate(_stream(batches, accumulate, total)):
                loop.take(step, group)
                report(step + 1, loop.losses[-1])
    except KeyboardInterrupt:
        stopped = True
    finally:
        loop.optimizer.zero_grad()
    return Fitted(
        run(program, loop.controllers.finish()) if loop.losses else program,
        tuple(loop.losses),
        time.perf_counter() - began,
        statistics.median(loop.seconds) if loop.seconds else 0.0,
        stopped,
    )


@dataclass(frozen=True)
class _Schedule:
    highest: float
    steps: int
    warmup: float

    def __call__(self, step: int) -> float:
        return rate(step, self.steps, self.highest, self.warmup)


class _Loop:
    """The optimizer of a program and what one of its steps does.

    Attributes:
        losses, seconds: of the steps taken.
    """

    def __init__(
        self,
        program: Program,
        loss: Loss | None,
        forward: Callable[[Any], Any] | None,
        schedule: _Schedule,
        weight_decay: float,
        accumulate: int,
        clip: float | None,
        autocast: torch.dtype | None,
    ) -> None:
        self.program = program
        self.loss = loss
        self.forward = forward
        self.schedule = schedule
        self.accumulate = accumulate
        self.clip = math.inf if clip is None else clip
        self.device = device_of(program.module)
        self.mixed = torch.autocast(self.device.type, torch.bfloat16, enabled=autocast is not None)
        self.controllers = Controllers(program)
        self.optimizer = torch.optim.AdamW(self.controllers.param_groups(1.0, weight_decay))
        self.scales = [group["lr"] for group in self.optimizer.param_groups]
        self.controllers.start(self.optimizer, schedule.steps)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def take(self, step: int, batches: Sequence[Any]) -> None:
        """One step on `batches`."""
        begun = time.process_time()
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = scale * self.schedule(step)
        loss = sum(self._backward(batch, step) for batch in batches) / self.accumulate
        norm = torch.nn.utils.clip_grad_norm_(self.program.trainable_parameters(), self.clip)
        self._require_finite("gradients' norm", norm.item(), step)
        self.controllers.before_step(step)
        self.optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        self.controllers.after_step(step)
        self.optimizer.zero_grad()
        self.losses.append(loss)
        self.seconds.append(time.process_time() - begun)

    def _backward(self, batch: Any, step: int) -> float:
        """The task's loss of a batch, whose gradients are added to the parameters'."""
        batch = _moved(batch, self.device)
        self.controllers.begin_forward(batch)
        with self.mixed:
            outputs = self._outputs(batch)
            loss = self.loss(outputs, batch) if self.loss else _own_loss(outputs)
        value = loss.item()
        self._require_finite("loss", value, step)
        extra = self.controllers.loss(outputs, batch, self.program)
        ((loss + extra) / self.accumulate).backward()
        return value

    def _outputs(self, batch: Any) -> Any:
        if self.forward is not None:
            return self.forward(batch)
        return self.program(**_inputs(self.program, batch, self.loss))

    def _require_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the {what} of step {step + 1} is {value}. The parameters are those after step "
                f"{step}; nothing that is not finite was applied. Try a smaller lr (it is "
                f"{self.schedule.highest:g}), a longer warmup, clip=1.0, or look at this step's "
                "batch."
            )


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


def _stream(batches: Iterable[Any], accumulate: int, steps: int) -> Iterator[list[Any]]:
    """The batches of each step, from the start again whenever they run out."""

    def endless() -> Iterator[Any]:
        any_batch = True
        while any_batch:
            any_batch = False
            for batch in batches:
                any_batch = True
                yield batch

    source = endless()
    for step in range(steps):
        group = list(itertools.islice(source, accumulate))
        if len(group) < accumulate:
            raise OptionError(
                f"batches ended in step {step + 1} of {steps} and cannot be gone through again. "
                "Give a list or DataLoader, or fewer steps. The steps done are kept."
            )
        yield group


def _moved(batch: Any, device: torch.device) -> Any:
    if not isinstance(batch, Mapping):
        return batch
    return {n: t.to(device) if isinstance(t, Tensor) else t for n, t in batch.items()}


def _inputs(program: Program, batch: Any, loss: Loss | None) -> Mapping[str, Any]:
    """What of a batch the program takes; all of it unless a loss function may want the rest."""
    if not isinstance(batch, Mapping):
        raise OptionError(
            f"a batch is a {type(batch).__name__}, but must be a dict of keyword tensors "
            f"({', '.join(program.spec.names)}). Or say how to run it: fit(..., forward=...)."
        )
    tensors: Mapping[str, Any] = batch  # pyright: ignore[reportUnknownVariableType]
    if loss is None:
        return tensors
    return {n: t for n, t in tensors.items() if n in program.spec.names}


def _own_loss(outputs: Any) -> Tensor:
    """The loss that the program itself returns."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    first = outputs[0] if isinstance(outputs, tuple) and outputs else outputs
    for value in (loss, first):
        if isinstance(value, Tensor) and not value.dim():
            return value
    raise OptionError(
        "the program returns no loss. Capture it with labels among its inputs, or give one: "
        "fit(program, batches, loss=lambda outputs, batch: ...)."
    )


@contextlib.contextmanager
def _reporter(progress: bool | Report, total: int) -> Iterator[Report]:
    """The caller's own report, none, or a bar on stderr: steps, loss, speed, time left."""
    if not isinstance(progress, bool):
        yield progress
        return
    began = time.perf_counter()
    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}  {task.fields[speed]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("", total=total, loss="", speed="")

        def report(done: int, loss: float) -> None:
            pace = done / (time.perf_counter() - began)
            speed = f"{pace:.1f} steps/s" if pace >= 1 else f"{1 / pace:.1f} s/step"
            bar.update(task, completed=done, loss=f"loss {loss:.4f}", speed=speed)

        yield report
