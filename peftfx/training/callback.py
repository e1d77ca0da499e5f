"""What the callbacks of all trainers share: the controllers, told of what the trainer does.

Every training forward of the program is announced to them. Where the program returns a loss (it
was captured with labels), their terms are added to it; where it does not, whoever computes the
loss adds `term(outputs)`, and forgetting that is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..rewriter.blocks.module import Outlined
from ..rewriter.errors import PassError
from ..rewriter.pipeline.controller import Controller
from ..rewriter.training.controllers import Controllers

_LISTENING: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""Each module's hooks; those of a run that was interrupted end when the next one begins."""


def release(handles: list[Any]) -> None:
    """Removes hooks from their modules."""
    while handles:
        handles.pop().remove()


class ControllersCallback:
    """Tells controllers what a trainer does.

    Attributes:
        controllers: as made by `peftfx.controllers`.
        batch: the inputs of the last training forward; None before the first.
        added: whether the last forward's loss has the controllers' terms already.
    """

    groups = ""
    """How the optimizer gets the controllers' groups."""

    how = ""
    """How whoever computes the loss adds the controllers' terms."""

    def __init__(self, controllers: Controllers) -> None:
        self.controllers = controllers
        self.batch: dict[str, Any] | None = None
        self.added = False
        self._inside = self._due = False
        self._hooks: list[Any] = []

    def module(self, model: nn.Module) -> nn.Module:
        """What runs the program when a trainer runs `model`: its module, or an outlined one."""
        modules = (m for inner in model.modules() for m in (inner, inner.__dict__.get("runs")))
        outlined = (m for m in modules if isinstance(m, Outlined))
        return next(outlined, self.controllers.program.module)

    def begin(
        self, model: nn.Module, optimizer: Any, total_steps: int, state: Mapping[str, Any] | None
    ) -> None:
        """Starts the controllers, with the state of a checkpoint if there is one.

        Raises:
            PassError: the optimizer's weight decay would pull multipliers to zero.
        """
        self._require_undecayed(optimizer)
        self.batch = None
        self.controllers.start(optimizer, total_steps)
        if state is not None:
            self.controllers.load_state_dict(state)
        module = self.module(model)
        release(_LISTENING.get(module, []))
        _LISTENING[module] = self._hooks = [
            module.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            module.register_forward_hook(self._after_forward),
        ]

    def _require_undecayed(self, optimizer: Any) -> None:
        names = self.controllers.decayed(optimizer) if optimizer is not None else []
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise PassError(
                f"the optimizer's weight decay pulls {', '.join(names[:3])}{more} to zero: scales, "
                "magnitudes, norms and biases must not decay. Give it the controllers' groups: "
                f"{self.groups}"
            )

    def end(self) -> None:
        """Stops listening to the program."""
        release(self._hooks)

    def term(self, outputs: Any) -> Any:
        """What the controllers add to the loss of the last forward, 0.0 if nothing.

        Raises:
            PassError: there was no training forward.
        """
        self._require_forward()
        self._inside = True  # a second forward of theirs is none of ours
        try:
            return self.controllers.loss(outputs, self.batch, self.controllers.program)
        finally:
            self._inside = self._due = False

    def before_step(self, step: int) -> None:
        """Before the optimizer's step.

        Raises:
            PassError: there was no training forward, or the loss lacks the controllers' terms.
        """
        self._require_forward()
        owing = [n for n, c in self.controllers.each.items() if type(c).loss is not Controller.loss]
        if self._due and owing:
            raise PassError(
                f"the loss lacks the terms of {', '.join(owing)}: the program returns no loss that "
                f"they could be added to. {self.how}"
            )
        self.controllers.before_step(step)

    def _require_forward(self) -> None:
        if self.batch is None:
            raise PassError(
                "the trainer did not run the program in training mode. Give it the module of "
                "the program that peftfx.controllers(program) was made for, and call "
                "program.train() (Lightning keeps the mode that it finds)."
            )

    def _before_forward(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and not self._inside:
            self.batch, self.added, self._due = dict(kwargs), False, True
            self.controllers.begin_forward(self.batch)

    def _after_forward(self, module: Any, args: Any, outputs: Any) -> Any:
        if not module.training or self._inside or not isinstance(outputs, dict):
            return None
        loss: Any = outputs.get("loss")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        if isinstance(loss, Tensor):
            outputs["loss"] = loss + self.term(outputs)
            self.added = True
        return outputs  # pyright: ignore[reportUnknownVariableType]
