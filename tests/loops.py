"""The plain training loop that every trainer must equal, and a controller that writes down what it
is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.pipeline.controller import Controller

from .models import batch, first

TEXT = "adalora{rank=4,target=2,warmup=1,final=3,where=q|v};bitfit"
STEPS = 8


def task_loss(outputs: Any) -> Tensor:
    return first(outputs).pow(2).mean()


def loop(program: peftfx.Program, controllers: Any, optimizer: Any, steps: range) -> None:
    """The loop of the module's documentation."""
    for step in steps:
        inputs = batch(seed=step)
        controllers.begin_forward(inputs)
        outputs = program(**inputs)
        loss = task_loss(outputs) + controllers.loss(outputs, inputs, program)
        loss.backward()
        controllers.before_step(step)
        optimizer.step()
        controllers.after_step(step)
        optimizer.zero_grad()


def fresh(program: peftfx.Program) -> tuple[peftfx.Program, Any, Any]:
    controllers = peftfx.controllers(program)
    optimizer = torch.optim.AdamW(controllers.param_groups(lr=0.02, weight_decay=0.01))
    controllers.start(optimizer, STEPS)
    return program, controllers, optimizer


def same(program: peftfx.Program, other: peftfx.Program) -> None:
    want = other.named_trainable_parameters()
    for name, parameter in program.named_trainable_parameters().items():
        assert torch.equal(parameter, want[name]), name


class Recorder(Controller):
    """Writes down what it is told, adds a term, and wants the branches' B at another rate."""

    seen: list[Any]

    def group(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        return {"lr_scale": 16.0} if name.endswith(".b") else super().group(name, parameter)

    def start(self) -> None:
        self.seen = [("start", self.total_steps)]

    def begin_forward(self, batch: Any) -> None:
        self.seen.append("forward")
        assert set(batch) >= {"input_ids", "attention_mask"}

    def loss(self, outputs: Any, batch: Any, forward: Any) -> Tensor:
        self.seen.append("loss")
        again = first(forward(**batch))  # no forward of the loop's: not announced
        return 0.1 * (again - first(outputs).detach()).pow(2).mean() + self.squares()

    def squares(self) -> Tensor:
        return torch.stack([b.a.pow(2).sum() for _, b in self.branches()]).sum()

    def before_step(self, step: int) -> None:
        assert all(b.a.grad is not None for _, b in self.branches())
        self.seen.append(("before", step))

    def after_step(self, step: int) -> None:
        assert all(b.a.grad is not None for _, b in self.branches())
        self.seen.append(("after", step))

    def state_dict(self) -> dict[str, Any]:
        return {"count": len(self.seen), "last": torch.ones(2)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = ["loaded"] * int(state["count"])


def record(monkeypatch: pytest.MonkeyPatch) -> str:
    """A method's text, with the recording controller."""
    monkeypatch.setattr(peftfx.LoRA, "controller", Recorder)
    return "lora{rank=2,where=q}"


def recorder(controllers: Any) -> Any:
    """The recording controller."""
    return controllers.each["lora"]


def expected(steps: range, parts: int = 1) -> list[Any]:
    found: list[Any] = []
    for step in steps:
        found += ["forward", "loss"] * parts + [("before", step), ("after", step)]
    return found
