"""`transformers.Trainer` on a program.

    controllers = peftfx.controllers(program)
    callback = peftfx.trainer_callback(controllers)
    trainer = transformers.Trainer(
        model=program.module, args=arguments, train_dataset=dataset, callbacks=[callback],
        optimizers=(torch.optim.AdamW(controllers.param_groups(lr=1e-3)), None),
    )
    trainer.train()
    program = peftfx.run(program, controllers.finish())

A program that was captured with labels returns the loss, and `Trainer` finds its labels as it does
for any model. For one that was not, name the labels' column and compute the loss:

    arguments = transformers.TrainingArguments(..., label_names=["labels"])
    trainer = transformers.Trainer(..., compute_loss_func=callback.compute_loss(task_loss))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..rewriter.errors import BaseMismatchError, PassError
from ..rewriter.files.files import write_file
from ..rewriter.files.identity import tensor_digest
from ..rewriter.storage.artifact import base_difference, read, save
from ..rewriter.training.controllers import Controllers
from .callback import ControllersCallback, release
from .partial import fill_in, frozen_base, leave_out
from .state import read_state, state_bytes

STATE = "peftfx_controllers.safetensors"
"""The file of the controllers' state in a checkpoint."""

ADAPTER = "adapter"
"""The artifact's folder in a checkpoint."""

TaskLoss = Callable[..., Tensor]


class ForTrainer(ControllersCallback):
    """The hooks of `transformers.TrainerCallback`; see `trainer_callback`."""

    groups = (
        "Trainer(..., optimizers=(torch.optim.AdamW(controllers.param_groups(lr=args.learning_rate,"
        " weight_decay=args.weight_decay)), None))."
    )
    how = "Give Trainer compute_loss_func=callback.compute_loss(task_loss)."

    def __init__(self, controllers: Controllers, resume: str | Path | None, base: bool) -> None:
        super().__init__(controllers)
        self.resume = resume
        self.accumulation = 1
        self.left_out = frozenset[str]() if base else frozen_base(controllers.program)
        self._saving: list[Any] = []
        self._loading: list[Any] = []

    def compute_loss(self, task_loss: TaskLoss) -> TaskLoss:
        """`compute_loss_func` for a program that returns no loss.

        Args:
            task_loss: `(outputs, labels, num_items_in_batch=None) -> loss`, scaled for gradient
                accumulation, as `Trainer` asks of it.
        """

        def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
            value = task_loss(outputs, labels, num_items_in_batch=num_items_in_batch)
            if not self._due:  # evaluation, or in the loss already
                return value
            return value + self.term(outputs) / self.accumulation

        return loss

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        release(self._loading)
        self._loading = [fill_in(self.module(model), self.left_out)]

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self.accumulation = args.gradient_accumulation_steps
        saved_state = self._held(args, state.global_step) if state.global_step else None
        self.begin(model, optimizer, state.max_steps, saved_state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        release(self._saving)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before_step(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.controllers.after_step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        release(self._saving)
        self._saving = [leave_out(self.module(model), self.left_out)]  # checkpoints come next

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_file(folder / STATE, state_bytes(self.controllers.state_dict()))
        if self.controllers.each:
            save(self.controllers.program, folder / ADAPTER)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end()

    def end(self) -> None:
        super().end()
        release(self._saving)

    def _held(self, args: Any, step: int) -> Mapping[str, Any]:
        """The state in the checkpoint that training goes on from."""
        folder = Path(self.resume or f"{args.output_dir}/checkpoint-{step}")
        if not (folder / STATE).exists():
            raise PassError(
                f"training goes on at step {step}, but {folder / STATE} does not exist. If the "
                "checkpoint is elsewhere, say so: trainer_callback(controllers, resume=FOLDER)."
            )
        if self.controllers.each:
            self._check(folder / ADAPTER)
        return read_state(folder / STATE)

    def _check(self, folder: Path) -> None:
        """Refuses a checkpoint of another recipe or base."""
        artifact = read(folder)
        program = self.controllers.program
        want = [str(item) for item, _, _ in artifact.steps]
        have = [r.text for r in program.history if r.applied.portable]
        if have != want:
            raise PassError(
                f"{folder.parent} was written by {'; '.join(want)}, but the program is "
                f"{'; '.join(have)}. Run the same recipe on the base, then resume."
            )
        base = {n: tensor_digest(t) for n, t in program.base.base_tensors().items()}
        if base != artifact.base:
            raise BaseMismatchError(base_difference(base, artifact.base, str(folder.parent)))


def trainer_callback(
    controllers: Controllers, resume: str | Path | None = None, base: bool = False
) -> Any:
    """A `TrainerCallback` that runs controllers; needs transformers. See the module.

    Every checkpoint gets the controllers' state and the adapters as an artifact (`adapter/`, for
    `peftfx.load`), and its weights file holds only what training changes: the frozen base is left
    out, and comes from the program on resuming. `trainer.save_model()` after training writes all
    tensors.

    Gradients are clipped before `before_step` sees them (in float16 with `max_grad_norm=0`,
    `Trainer` does not unscale them either). With `bf16=True` the module's forward stays under
    autocast after training, as with any model; `program.fork()` is free of that.

    Args:
        controllers: of the program whose module is trained.
        resume: the checkpoint that `train(resume_from_checkpoint=...)` is given, where it is not
            the output folder's own.
        base: write the frozen base into every checkpoint, too.

    Raises:
        PassError: when training begins with an optimizer whose weight decay pulls multipliers to
            zero (`Trainer`'s own does), goes on without the state of its controllers or with
            another recipe, or takes a step without the program or without the controllers' terms.
        BaseMismatchError: when it goes on with other base weights.
    """
    from transformers import TrainerCallback

    cls = type("ControllersCallback", (ForTrainer, TrainerCallback), {})
    return cls(controllers, resume, base)
