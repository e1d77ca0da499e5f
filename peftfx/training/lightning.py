"""Lightning on a program.

    class Tuning(lightning.pytorch.LightningModule):
        def __init__(self, program, controllers):
            super().__init__()
            self.model, self.controllers = program.module, controllers

        def training_step(self, batch, index):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.AdamW(self.controllers.param_groups(lr=1e-3))

    controllers = peftfx.controllers(program.train())
    trainer = lightning.pytorch.Trainer(callbacks=[peftfx.lightning_callback(controllers)], ...)
    trainer.fit(Tuning(program, controllers), batches)
    program = peftfx.run(program, controllers.finish())

Where the program returns no loss, `training_step` adds `callback.term(outputs)` to its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..rewriter.errors import PassError
from ..rewriter.training.controllers import Controllers
from .callback import ControllersCallback, release
from .partial import fill_in, frozen_base


class ForLightning(ControllersCallback):
    """The hooks of `lightning.pytorch.Callback`; see `lightning_callback`."""

    groups = (
        "configure_optimizers: torch.optim.AdamW(controllers.param_groups(lr=..., "
        "weight_decay=...))."
    )
    how = "Add callback.term(outputs) to the loss in training_step."

    def __init__(self, controllers: Controllers, base: bool) -> None:
        super().__init__(controllers)
        self.step = 0
        self.left_out = frozenset[str]() if base else frozen_base(controllers.program)
        self._held: Mapping[str, Any] | None = None
        self._loading: list[Any] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._loading.append(fill_in(self.module(pl_module), self.left_out))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        total = trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise PassError("training has no end. Give Trainer(max_steps=...) or max_epochs.")
        self.step = trainer.global_step
        self.begin(pl_module, trainer.optimizers[0], int(total), self._held)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.before_step(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self.step:  # not in the middle of an accumulated step
            self.controllers.after_step(self.step)
            self.step = trainer.global_step

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.end()

    def end(self) -> None:
        super().end()
        release(self._loading)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        module = self.module(pl_module)
        (path,) = (n for n, inner in pl_module.named_modules() if inner is module)
        for name in self.left_out:
            checkpoint["state_dict"].pop(f"{path}.{name}", None)

    def state_dict(self) -> dict[str, Any]:
        return self.controllers.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._held = state_dict  # it comes before on_train_start


def lightning_callback(controllers: Controllers, base: bool = False) -> Any:
    """A Lightning `Callback` that runs controllers with automatic optimization; needs lightning.

    Every checkpoint gets the controllers' state. The frozen base is left out of it and comes from
    the program on resuming; `peftfx.save(program, folder)` writes the adapters as an artifact.
    Build the optimizer in `configure_optimizers` from `controllers.param_groups`.

    Args:
        controllers: of the program whose module the LightningModule holds.
        base: write the frozen base into every checkpoint, too.

    Raises:
        PassError: when training starts without a number of steps, or with an optimizer whose weight
            decay pulls multipliers to zero, or takes a step without the program or without the
            controllers' terms.
    """
    from lightning.pytorch import Callback  # pyright: ignore

    cls = type("ControllersCallback", (ForLightning, Callback), {})  # pyright: ignore
    return cls(controllers, base)
