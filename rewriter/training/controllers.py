"""Controllers: what methods need while they train, as one object for any training loop.

controllers = peftfx.controllers(program)
optimizer = torch.optim.AdamW(controllers.param_groups(lr=1e-3, weight_decay=0.01))
controllers.start(optimizer, total_steps)
for step, batch in enumerate(batches):
    controllers.begin_forward(batch)
    outputs = program(**batch)
    loss = task_loss(outputs, batch) + controllers.loss(outputs, batch, program)
    loss.backward()
    controllers.before_step(step)       # unscaled gradients are there
    optimizer.step()
    controllers.after_step(step)        # gradients are still there
    optimizer.zero_grad()
program = peftfx.run(program, controllers.finish())
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import PassError
from ..pipeline.controller import Controller, Forward, usual
from ..pipeline.method import Method
from ..pipeline.syntax import Pipeline
from ..program.state import State


class Controllers:
    """The controllers of all adapters that train; see the module for the loop."""

    def __init__(self, program: State) -> None:
        self.program = program
        self.each: dict[str, Controller] = {}
        for method in _methods(program):
            if not program.held(method.adapter):
                self.each[method.adapter] = method.controller(program, method)
        self.total_steps = 0

    def param_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Every trainable parameter, in groups of equal settings, for any torch optimizer.

        Args:
            lr: the learning rate; methods scale it for parameters that need another.
            weight_decay: for matrices. Vectors and scalars get none, and neither does what a
                method keeps from it: what multiplies would be pulled to zero.

        Raises:
            PassError: nothing trains.
        """
        groups: dict[tuple[tuple[str, Any], ...], dict[str, Any]] = {}
        for name, parameter in self.program.named_trainable_parameters().items():
            options = {"lr_scale": 1.0, "weight_decay": weight_decay}
            options |= self._group(name, parameter)
            options["lr"] = lr * options.pop("lr_scale")
            key = tuple(sorted(options.items()))
            group = groups.setdefault(key, {"params": [], "names": [], **options})
            group["params"].append(parameter)
            group["names"].append(name)
        if not groups:
            raise PassError("nothing trains. Insert an adapter first: run(program, 'lora').")
        return list(groups.values())

    def decayed(self, optimizer: Any) -> list[str]:
        """Names of parameters that an optimizer pulls to zero and `param_groups` would not: scales,
        magnitudes, norms, biases and whatever a method keeps from it."""
        groups: list[dict[str, Any]] = optimizer.param_groups
        pulled = {id(p) for g in groups if g.get("weight_decay") for p in g["params"]}
        return [
            name
            for name, parameter in self.program.named_trainable_parameters().items()
            if id(parameter) in pulled and self._group(name, parameter).get("weight_decay") == 0
        ]

    def _group(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        """The options of a parameter that differ from the usual ones."""
        owner = self._owner(name)
        return usual(parameter) if owner is None else owner.group(name, parameter)

    def _owner(self, name: str) -> Controller | None:
        parts = name.split(".")
        if parts[0] == "peftfx":
            return self.each.get(parts[1])
        return self.each.get(self.program.tensors.owner(name) or "")

    def start(self, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        """Tells all controllers what trains and for how many optimizer steps.

        Raises:
            PassError: no steps.
        """
        if total_steps < 1:
            raise PassError(f"total_steps is {total_steps}, but training takes at least one step.")
        self.total_steps = total_steps
        for controller in self.each.values():
            controller.optimizer, controller.total_steps = optimizer, total_steps
            controller.start()

    def begin_forward(self, batch: Any = None) -> None:
        """Before every forward (random routes are drawn here)."""
        for controller in self.each.values():
            controller.begin_forward(batch)

    def loss(self, outputs: Any, batch: Any = None, forward: Forward | None = None) -> Any:
        """The sum of all methods' own loss terms, 0.0 if there is none."""
        run = self.program if forward is None else forward  # a compiled module has no truth value
        terms = [c.loss(outputs, batch, run) for c in self.each.values()]
        return sum((t for t in terms if t is not None), 0.0)

    def before_step(self, step: int) -> None:
        """Before the optimizer's step, once gradients are complete and unscaled."""
        for controller in self._started():
            controller.before_step(step)

    def after_step(self, step: int) -> None:
        """After the optimizer's step, before gradients are cleared."""
        for controller in self._started():
            controller.after_step(step)

    def _started(self) -> list[Controller]:
        if not self.total_steps:
            raise PassError("call controllers.start(optimizer, total_steps) before the first step.")
        return list(self.each.values())

    def finish(self) -> Pipeline:
        """The passes that bake what training decided; run them on the program (maybe none)."""
        return Pipeline(tuple(p for c in self.each.values() for p in c.finish()))

    def state_dict(self) -> dict[str, Any]:
        """What continuing in the middle needs, beside the program's and optimizer's states."""
        return {name: c.state_dict() for name, c in self.each.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave, after `start`.

        Raises:
            PassError: it is of another program.
        """
        if set(state) != set(self.each):
            raise PassError(
                f"the state is of the adapters {sorted(state)}, but the program has "
                f"{sorted(self.each)}."
            )
        for name, controller in self.each.items():
            controller.load_state_dict(state[name])


def controllers(program: State) -> Controllers:
    """The controllers of all of a program's adapters, for its training loop."""
    return Controllers(program)


def _methods(program: State) -> list[Method]:
    return [r.applied for r in program.history if isinstance(r.applied, Method)]
