"""Lightning on a program: it does what the plain loop does, and checkpoints hold what trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import PassError

from .loops import STEPS, TEXT, expected, fresh, loop, record, recorder, same, task_loss
from .models import batch

pytestmark = [
    # lightning asks a deprecated question about its own trees
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    # both runs of a test write to one folder
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Batches:
    """The loop's batches, which can go on in the middle, as Lightning asks of a loader."""

    def __init__(self) -> None:
        self.following = 0

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while self.following < STEPS:
            self.following += 1
            yield batch(seed=self.following - 1)
        self.following = 0

    def state_dict(self) -> dict[str, int]:
        return {"following": self.following}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.following = state["following"]


class Tuning(pl.LightningModule):
    """A program whose loss is computed here, as a user writes it."""

    def __init__(self, program: peftfx.Program, callback: Any, terms: bool = True) -> None:
        super().__init__()
        self.model, self.callback, self.terms = program.module, callback, terms
        self.losses: list[float] = []

    def training_step(self, inputs: Any, index: int) -> Tensor:
        outputs = self.model(**inputs)
        loss = outputs["loss"] if isinstance(outputs, dict) else task_loss(outputs)
        self.losses.append(loss.item())
        return loss + self.callback.term(outputs) if self.terms else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.callback.controllers.param_groups(lr=0.02, weight_decay=0.01))


def tuning(program: peftfx.Program, base: bool = False, terms: bool = True) -> Tuning:
    callback = peftfx.lightning_callback(peftfx.controllers(program), base)
    return Tuning(program, callback, terms)


def fit(made: Tuning, folder: Path | None, resume: Path | None = None, **options: Any) -> Any:
    """Trains on the loop's batches; with a folder, every fourth step writes a checkpoint."""
    usual: dict[str, Any] = {
        "max_steps": STEPS, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": folder is not None,
    }  # fmt: skip
    callbacks = [made.callback]
    if folder:
        every = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
        callbacks.append(every)
    trainer = pl.Trainer(callbacks=callbacks, **usual | options)
    trainer.fit(made, Batches(), ckpt_path=resume)
    return trainer


def test_equals_the_loop_and_goes_on(captured: Any, tmp_path: Path) -> None:
    _, base = captured["decoder"]
    straight, controllers, optimizer = fresh(peftfx.run(base, TEXT).train())
    loop(straight, controllers, optimizer, range(STEPS))
    program = peftfx.run(base, TEXT).train()
    fit(tuning(program), tmp_path)
    same(program, straight)
    again = peftfx.run(base, TEXT).train()
    made = tuning(again)
    fit(made, tmp_path, tmp_path / "step=4.ckpt")
    assert len(made.losses) == 4
    same(again, straight)
    smaller = peftfx.run(again.eval(), made.callback.controllers.finish())
    torch.testing.assert_close(smaller(**batch()), again(**batch()))
    assert not program.module._forward_hooks and not program.module._load_state_dict_pre_hooks


@pytest.mark.parametrize("base", [False, True])
def test_what_a_checkpoint_holds(captured: Any, base: bool, tmp_path: Path) -> None:
    """What trains, and the controllers' state; the frozen base only on request."""
    program = peftfx.run(captured["tied"][1], "lora{rank=2,where=q|v}").train()
    fit(tuning(program, base), tmp_path, max_steps=4)
    held = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    everything, trained = program.module.state_dict(), program.named_trainable_parameters()
    want = everything if base else trained
    assert set(held["state_dict"]) == {f"model.{n}" for n in want}
    assert all(torch.equal(t, held["state_dict"][f"model.{n}"]) for n, t in want.items())
    assert set(trained) < set(everything)


def test_bfloat16_accumulated_equals_autocast(captured: Any) -> None:
    _, base = captured["decoder"]
    program = peftfx.run(base, "lora{rank=2,where=q|v}").train()
    made = tuning(program)
    fit(made, None, precision="bf16-mixed", accumulate_grad_batches=2, max_steps=4)
    straight, _, optimizer = fresh(peftfx.run(base, "lora{rank=2,where=q|v}").train())
    losses: list[float] = []
    for index in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = task_loss(straight(**batch(seed=index)))
        losses.append(loss.item())
        (loss / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert made.losses == losses
    same(program, straight)


def test_calls_in_order(captured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program = peftfx.run(captured["decoder"][1], record(monkeypatch)).train()
    made = tuning(program)
    fit(made, None, accumulate_grad_batches=2, max_steps=3)
    assert recorder(made.callback.controllers).seen == [("start", 3), *expected(range(3), parts=2)]


def test_misuse_is_named(captured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning keeps the mode that it finds; terms and an end are needed."""
    _, base = captured["decoder"]
    program = peftfx.run(base, record(monkeypatch))
    with (
        pytest.warns(UserWarning, match="in eval mode at the start of training"),
        pytest.raises(PassError, match=r"did not run the program.*call program\.train\(\)"),
    ):
        fit(tuning(program), None)
    with pytest.raises(PassError, match=r"lacks the terms of lora.*callback\.term"):
        fit(tuning(program.train(), terms=False), None)
    with pytest.raises(PassError, match="no end"):
        fit(tuning(program), None, max_steps=-1, max_epochs=-1)
    assert not program.module._forward_hooks and not program.module._load_state_dict_pre_hooks


def test_decay_of_multipliers_is_refused(captured: Any) -> None:
    class Plain(Tuning):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.model.parameters(), lr=0.02)

    program = peftfx.run(captured["decoder"][1], "ia3").train()
    made = Plain(program, peftfx.lightning_callback(peftfx.controllers(program)))
    with pytest.raises(PassError, match=r"to zero: .*configure_optimizers: .*param_groups"):
        fit(made, None, max_steps=1)
