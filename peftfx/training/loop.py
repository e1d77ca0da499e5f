"""What one step of `fit` does: forwards, backwards, clipping, the optimizer, the controllers."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..rewriter.api import Program
from ..rewriter.errors import NonFiniteError, OptionError
from ..rewriter.graph.module import device_of, modes_kept
from ..rewriter.training.controllers import Controllers
from .partial import fill_in, frozen_base

Loss = Callable[[Any, Any], Tensor]
"""`(outputs, batch) -> loss`, a scalar."""


def rate(step: int, steps: int, highest: float, warmup: float) -> float:
    """The learning rate of a step: up linearly during warm-up, then down linearly to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return highest * (step + 1) / rising
    return highest * (steps - step) / max(1, steps - rising)


@dataclass(frozen=True)
class Settings:
    """What decides the parameters after every step, beside program, batches and random numbers.

    Attributes:
        steps: of the whole run.
        lr, warmup, weight_decay, accumulate, clip, autocast, dropout: see `fit`.
    """

    steps: int
    lr: float
    warmup: float
    weight_decay: float
    accumulate: int
    clip: float | None
    autocast: torch.dtype | None
    dropout: bool

    def __post_init__(self) -> None:
        if self.autocast not in (None, torch.bfloat16):
            raise OptionError(
                f"autocast={self.autocast} is not offered: float16 needs gradient scaling. Use "
                "torch.bfloat16, or a trainer that scales."
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return rate(step, self.steps, self.lr, self.warmup)


class Loop:
    """The optimizer of a program and what one of its steps does.

    Attributes:
        losses, seconds: of the steps taken.
        norm: of all gradients of the last step together, before clipping.
    """

    def __init__(
        self,
        program: Program,
        loss: Loss | None,
        forward: Callable[[Any], Any] | None,
        settings: Settings,
    ) -> None:
        self.program, self.loss, self.forward, self.settings = program, loss, forward, settings
        self.device = device_of(program.module)
        self.mixed = torch.autocast(
            self.device.type, torch.bfloat16, enabled=settings.autocast is not None
        )
        self.controllers = Controllers(program)
        groups = self.controllers.param_groups(1.0, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups)
        self.scales = [group["lr"] for group in self.optimizer.param_groups]
        self.controllers.start(self.optimizer, settings.steps)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.norm = 0.0

    def take(self, step: int, batches: Sequence[Any]) -> None:
        """One step on `batches`."""
        begun = time.process_time()
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = scale * self.settings.rate(step)
        loss = sum(self._backward(batch, step) for batch in batches) / len(batches)
        limit = math.inf if self.settings.clip is None else self.settings.clip
        norm = torch.nn.utils.clip_grad_norm_(self.program.trainable_parameters(), limit)
        self.norm = norm.item()
        self._require_finite("gradients' norm", self.norm, step)
        self.controllers.before_step(step)
        self.optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        self.controllers.after_step(step)
        self.optimizer.zero_grad()
        self.losses.append(loss)
        self.seconds.append(time.process_time() - begun)

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Evaluation mode, without gradients; training's modes and random numbers are kept."""
        devices = [self.device] if self.device.type == "cuda" else []
        with modes_kept(self.program.module), torch.random.fork_rng(devices), torch.no_grad():
            self.program.eval()
            yield

    def evaluated(self, batches: Iterable[Any]) -> float:
        """The mean of the task's loss over some batches."""
        with self.at_rest(), self.mixed:
            losses = [self._task(_moved(batch, self.device))[1].item() for batch in batches]
        if not losses:
            raise OptionError("held_out is empty. Give a list of batches, or a DataLoader.")
        return sum(losses) / len(losses)

    def values(self) -> dict[str, Any]:
        """What training changes: tensors of the program by name, and the controllers' state."""
        frozen = frozen_base(self.program)
        state = self.program.module.state_dict()
        tensors = {n: t.detach().clone() for n, t in state.items() if n not in frozen}
        return {"tensors": tensors, "controllers": self.controllers.state_dict()}

    def take_back(self, values: Mapping[str, Any]) -> None:
        """Puts in place what `values` gave.

        Raises:
            ValueError: it is of other tensors; nothing is put in place.
        """
        module, mine = self.program.module, self.values()["tensors"]
        given = {n: (t.shape, t.dtype) for n, t in values["tensors"].items()}
        if given != {n: (t.shape, t.dtype) for n, t in mine.items()}:
            raise ValueError("its tensors are others, or have other shapes")
        handle = fill_in(module, frozen_base(self.program))
        try:
            module.load_state_dict(dict(values["tensors"]))
        finally:
            handle.remove()
        self.controllers.load_state_dict(values.get("controllers", {}))

    def _backward(self, batch: Any, step: int) -> float:
        """The task's loss of a batch, whose gradients are added to the parameters'."""
        batch = _moved(batch, self.device)
        self.controllers.begin_forward(batch)
        with self.mixed:
            outputs, loss = self._task(batch)
        value = loss.item()
        self._require_finite("loss", value, step)
        extra = self.controllers.loss(outputs, batch, self.program)
        ((loss + extra) / self.settings.accumulate).backward()
        return value

    def _task(self, batch: Any) -> tuple[Any, Tensor]:
        """The outputs for a batch, and the task's loss."""
        if self.forward is not None:
            outputs = self.forward(batch)
        else:
            outputs = self.program(**_inputs(self.program, batch, self.loss))
        return outputs, self.loss(outputs, batch) if self.loss else _own_loss(outputs)

    def _require_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the {what} of step {step + 1} is {value}. The parameters are those after step "
                f"{step}; nothing that is not finite was applied. Try a smaller lr (it is "
                f"{self.settings.lr:g}), a longer warmup, clip=1.0, or look at this step's "
                "batch."
            )


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
