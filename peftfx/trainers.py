"""Controllers in other people's training loops: `transformers.Trainer` and Lightning.

    controllers = peftfx.controllers(program)
    callback = peftfx.trainer_callback(controllers)
    trainer = transformers.Trainer(
        model=program.module, args=arguments, train_dataset=dataset, callbacks=[callback],
        optimizers=(torch.optim.AdamW(controllers.param_groups(lr=1e-3)), None),
    )
    trainer.train()
    program = peftfx.run(program, controllers.finish())

Both callbacks announce every training forward of the program to the controllers. Where the program
returns a loss (it was captured with labels), the controllers' terms are added to it; where it does
not, `callback.compute_loss(task_loss)` makes the function that `Trainer` takes as
`compute_loss_func`, and a Lightning `training_step` adds `callback.term(outputs)` itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from .rewriter.errors import ArtifactError, PassError
from .rewriter.running.controller import Controllers
from .rewriter.storage.files import write_file

STATE = "peftfx_controllers.safetensors"
"""The file of the controllers' state in a checkpoint of `Trainer`."""

TaskLoss = Callable[..., Tensor]


class ControllersCallback:
    """What the callbacks of all trainers share.

    Attributes:
        controllers: as made by `peftfx.controllers`.
        batch: the inputs of the last training forward.
    """

    def __init__(self, controllers: Controllers) -> None:
        self.controllers = controllers
        self.batch: dict[str, Any] | None = None
        self.added = False
        self._inside = False
        self._hooks: list[Any] = []

    def begin(self, optimizer: Any, total_steps: int, state: Mapping[str, Any] | None) -> None:
        """Starts the controllers, with the state of a checkpoint if there is one."""
        self.end()
        self.controllers.start(optimizer, total_steps)
        if state is not None:
            self.controllers.load_state_dict(state)
        module = self.controllers.program.module
        self._hooks = [
            module.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            module.register_forward_hook(self._after_forward),
        ]

    def end(self) -> None:
        """Stops listening to the program."""
        while self._hooks:
            self._hooks.pop().remove()

    def term(self, outputs: Any) -> Any:
        """What the controllers add to the loss of the last forward, 0.0 if nothing."""
        self._inside = True  # a second forward of theirs is none of ours
        try:
            return self.controllers.loss(outputs, self.batch, self.controllers.program)
        finally:
            self._inside = False

    def _before_forward(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and not self._inside:
            self.batch, self.added = dict(kwargs), False
            self.controllers.begin_forward(self.batch)

    def _after_forward(self, module: Any, args: Any, outputs: Any) -> Any:
        if not module.training or self._inside or not isinstance(outputs, dict):
            return None
        loss: Any = outputs.get("loss")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        if isinstance(loss, Tensor):
            outputs["loss"] = loss + self.term(outputs)
            self.added = True
        return outputs  # pyright: ignore[reportUnknownVariableType]


class ForTrainer(ControllersCallback):
    """The hooks of `transformers.TrainerCallback`; see `trainer_callback`."""

    def __init__(self, controllers: Controllers, resume: str | Path | None) -> None:
        super().__init__(controllers)
        self.resume = resume
        self.accumulation = 1

    def compute_loss(self, task_loss: TaskLoss) -> TaskLoss:
        """`compute_loss_func` for a program that returns no loss.

        Args:
            task_loss: `(outputs, labels, num_items_in_batch=None) -> loss`, scaled for gradient
                accumulation, as `Trainer` asks of it.
        """

        def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
            value = task_loss(outputs, labels, num_items_in_batch=num_items_in_batch)
            if not self.controllers.program.training or self.added:
                return value
            return value + self.term(outputs) / self.accumulation

        return loss

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self.accumulation = args.gradient_accumulation_steps
        held = self._held(args, state.global_step) if state.global_step else None
        self.begin(optimizer, state.max_steps, held)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.controllers.before_step(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.controllers.after_step(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
            write_file(path, state_bytes(self.controllers.state_dict()))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end()

    def _held(self, args: Any, step: int) -> Mapping[str, Any]:
        """The state in the checkpoint that training goes on from."""
        folder = Path(self.resume or f"{args.output_dir}/checkpoint-{step}")
        if not (folder / STATE).exists():
            raise PassError(
                f"training goes on at step {step}, but {folder / STATE} does not exist. If the "
                "checkpoint is elsewhere, say so: trainer_callback(controllers, resume=FOLDER)."
            )
        return read_state(folder / STATE)


class ForLightning(ControllersCallback):
    """The hooks of `lightning.pytorch.Callback`; see `lightning_callback`."""

    def __init__(self, controllers: Controllers) -> None:
        super().__init__(controllers)
        self.step = 0
        self._held: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        total = trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise PassError("training has no end. Give Trainer(max_steps=...) or max_epochs.")
        self.step = trainer.global_step
        self.begin(trainer.optimizers[0], int(total), self._held)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.controllers.before_step(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self.step:  # not in the middle of an accumulated step
            self.controllers.after_step(self.step)
            self.step = trainer.global_step

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.end()

    def state_dict(self) -> dict[str, Any]:
        return self.controllers.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._held = state_dict  # it comes before on_train_start


def trainer_callback(controllers: Controllers, resume: str | Path | None = None) -> Any:
    """A `TrainerCallback` that runs controllers; needs transformers. See the module.

    Their state is saved with every checkpoint. Gradients are clipped before `before_step` sees
    them (in float16 with `max_grad_norm=0`, `Trainer` does not unscale them either).

    Args:
        controllers: of the program whose module is trained.
        resume: the checkpoint that `train(resume_from_checkpoint=...)` is given, where it is not
            the output folder's own.

    Raises:
        PassError: when training goes on without the state of its controllers.
    """
    from transformers import TrainerCallback

    made = type("ControllersCallback", (ForTrainer, TrainerCallback), {})
    return made(controllers, resume)


def lightning_callback(controllers: Controllers) -> Any:
    """A Lightning `Callback` that runs controllers with automatic optimization; needs lightning.

    Their state is saved with every checkpoint. Build the optimizer in `configure_optimizers` from
    `controllers.param_groups`.

    Raises:
        PassError: when training starts without a number of steps.
    """
    from lightning.pytorch import Callback  # pyright: ignore

    made = type("ControllersCallback", (ForLightning, Callback), {})  # pyright: ignore
    return made(controllers)


def _leaves(state: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    for key, item in state.items():
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, (*path, key))  # pyright: ignore[reportUnknownArgumentType]
        else:
            yield (*path, key), item


def state_bytes(state: Mapping[str, Any]) -> bytes:
    """Nested tensors and numbers as one safetensors file."""
    tensors: dict[str, Tensor] = {}
    others: list[Any] = []
    for path, item in _leaves(state):
        if isinstance(item, Tensor):
            tensors[json.dumps(path)] = item.detach().cpu().contiguous().clone()
        else:
            others.append([path, item])
    return safetensors.torch.save(tensors, {"others": json.dumps(others)})


def read_state(path: Path) -> dict[str, Any]:
    """Reads back what `state_bytes` made.

    Raises:
        ArtifactError: the file is damaged.
    """
    state: dict[str, Any] = {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = [(json.loads(n), file.get_tensor(n)) for n in file.keys()]  # noqa: SIM118
            found += json.loads((file.metadata() or {})["others"])
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}.") from error
    for keys, item in found:
        inner = state
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = item
    return state
