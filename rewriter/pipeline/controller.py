"""What one method needs while it trains; `training/controllers.py` drives all of a program's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..program.state import BRANCHES, State
from .passes import Pass

Forward = Callable[..., Any]


def usual(parameter: nn.Parameter) -> Mapping[str, Any]:
    """Optimiser options of a parameter that no method knows better: matrices alone decay."""
    return {"weight_decay": 0.0} if parameter.dim() < 2 else {}


class Controller:
    """The controller of one adapter. The base class is that of a method that needs nothing.

    Class attributes:
        whole: the adapter's parameters stay whole on every rank, since their values matter here:
            of each subclass that does not say `whole=False` (one that chooses rates alone).

    Attributes:
        program: the program in training.
        method: the pass that inserted the adapter, with its options.
        adapter: the name of the adapter.
        folder, sites: as a member of a preset, what the paths of its branches begin with below the
            adapter's name, and the sites that it was put at; '' and None: all.
        optimizer, total_steps: known from `start` on.
    """

    whole: ClassVar[bool] = False

    def __init_subclass__(cls, whole: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.whole = whole

    folder: str = ""
    sites: frozenset[str] | None = None

    def __init__(self, program: State, method: Pass) -> None:
        self.program, self.method = program, method
        self.adapter = method.adapter or ""
        self.optimizer: torch.optim.Optimizer | None = None
        self.total_steps = 0

    def branches(self) -> Iterator[tuple[str, Any]]:
        """(path, module) of each of the adapter's branches, in the order of insertion."""
        mine = f"{BRANCHES}.{self.adapter}.{self.folder}"
        for attachment in self.program.attachments:
            if attachment.path.startswith(mine):
                yield attachment.path, self.program.branch(attachment)

    def edited(self) -> list[str]:
        """The sites that were edited, also those whose branches are gone by now."""
        edited = next(r.edited for r in self.program.history if r.adapter == self.adapter)
        return [site for site in edited if self.sites is None or site in self.sites]

    def group(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        """Optimiser options of one of the adapter's parameters that differ from the usual ones.

        `lr_scale` multiplies the rate. Vectors and scalars get no weight decay by default.
        """
        del name
        return usual(parameter)

    def start(self) -> None:
        """Called once before the first step; `optimizer` and `total_steps` are known."""

    def begin_forward(self, batch: Any) -> None:
        """Called before every forward."""

    def loss(self, outputs: Any, batch: Any, forward: Forward) -> Tensor | None:
        """A term to add to the loss; `forward(**batch)` runs the program once more."""
        del outputs, batch, forward

    def before_step(self, step: int) -> None:
        """Called with unscaled gradients, before the optimizer's step."""

    def after_step(self, step: int) -> None:
        """Called after the optimizer's step, before gradients are cleared."""

    def finish(self) -> tuple[Pass, ...]:
        """The passes that bake what training decided."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """What continuing needs, as tensors and numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        del state
