"""`fit`: the documented loop with a schedule, a bar, and errors that lose nothing."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import InputError, NonFiniteError, OptionError, PassError
from peftfx.training import fit as fitting

from .loops import Recorder, expected, record, recorder, same, task_loss
from .models import batch, first

LORA = "lora{rank=2,where=q|v}"


def loss_of(outputs: Any, inputs: Any) -> Tensor:
    return task_loss(outputs)


def batches(count: int) -> list[dict[str, Tensor]]:
    return [batch(seed=i) for i in range(count)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_equals_a_plain_loop(captured: Any, dtype: Any) -> None:
    """Two batches a step, warm-up and decay, clipped gradients, three epochs of four."""
    _, base = captured["decoder"]
    program = peftfx.run(base, f"{LORA};bitfit")
    done = peftfx.fit(
        program, batches(4), loss_of, lr=0.02, epochs=3, accumulate=2, clip=0.05, warmup=0.34,
        autocast=dtype, progress=False,
    )  # fmt: skip
    straight = peftfx.run(base, f"{LORA};bitfit").train()
    parameters = straight.trainable_parameters()
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    want: list[float] = []
    for step, rate in enumerate((0.01, 0.02, 0.02, 0.015, 0.01, 0.005)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses: list[float] = []
        for index in (2 * step % 4, 2 * step % 4 + 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
                loss = task_loss(straight(**batch(seed=index)))
            losses.append(loss.item())
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.step()
        optimizer.zero_grad()
        want.append(sum(losses) / 2)
    assert done.losses == tuple(want) and done.losses[-1] < done.losses[0]
    same(program, straight)
    assert done.program is program and not done.stopped and not program.training
    assert 0 < done.step_seconds < 60 and done.seconds > 0


def test_controllers_take_part(captured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, base = captured["decoder"]
    made: list[Any] = []
    monkeypatch.setattr(
        fitting, "Controllers", lambda p: made.append(peftfx.controllers(p)) or made[0]
    )
    program = peftfx.run(base, record(monkeypatch))
    peftfx.fit(program, batches(3), loss_of, accumulate=2, steps=2, progress=False)
    assert recorder(made[0]).seen == [("start", 2), *expected(range(2), parts=2)]


def test_what_was_decided_is_put_in_place(captured: Any) -> None:
    _, base = captured["decoder"]
    text = "adalora{rank=4,target=2,warmup=1,final=3,where=q|v}"
    program = peftfx.run(base, text)
    done = peftfx.fit(program, batches(4), loss_of, epochs=2, progress=False)
    assert len(done.losses) == 8 and done.program is not program
    assert done.program.history[-1].text != program.history[-1].text
    torch.testing.assert_close(first(done.program(**batch())), first(program(**batch())))


def test_a_labelled_program_needs_no_loss() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            y = self.layer(x)
            return {"loss": (y - labels).pow(2).mean(), "y": y}

    torch.manual_seed(0)
    data: Any = [{"x": torch.randn(3, 4), "labels": torch.ones(3, 4)} for _ in range(4)]
    base = peftfx.capture(Model().eval(), kwargs=data[0])
    seen: list[tuple[int, float]] = []
    program = peftfx.run(base, "lora{rank=2,where=linear};bitfit{where=linear}")
    done = peftfx.fit(
        program, torch.utils.data.DataLoader(data, batch_size=None), lr=0.1, epochs=5,
        progress=lambda step, loss: seen.append((step, loss)),
    )  # fmt: skip
    assert done.losses[-1] < 0.5 * done.losses[0]
    assert seen == list(enumerate(done.losses, 1)) and len(seen) == 20


def test_interrupting_keeps_what_was_learnt(captured: Any) -> None:
    _, base = captured["decoder"]
    program = peftfx.run(base, LORA)

    def interrupted() -> Iterator[Any]:
        yield from batches(2)
        raise KeyboardInterrupt

    done = peftfx.fit(program, interrupted(), loss_of, steps=4, progress=False)
    same(done.program, _two_of_four(peftfx.run(base, LORA)))
    assert done.stopped and len(done.losses) == 2 and done.program is program
    assert all(p.grad is None for p in program.trainable_parameters()) and not program.training
    nothing = peftfx.fit(program, interrupted(), loss_of, steps=4, accumulate=3, progress=False)
    assert nothing.stopped and nothing.losses == () and nothing.program is program


def _two_of_four(program: peftfx.Program) -> peftfx.Program:
    """Stopped from outside, after the second of four steps."""

    def stop(step: int, loss: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    return peftfx.fit(program, batches(2), loss_of, steps=4, progress=stop).program


def test_what_is_not_finite_is_not_applied(captured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a loss nor a gradient; the message says which step, and what to try."""
    _, base = captured["decoder"]
    program = peftfx.run(base, LORA)

    def breaks(outputs: Any, inputs: Any) -> Tensor:
        bad = torch.equal(inputs["input_ids"], batch(seed=2)["input_ids"])
        return task_loss(outputs) * (float("nan") if bad else 1.0)

    with pytest.raises(
        NonFiniteError, match=r"the loss of step 3 is nan.*after step 2.*smaller lr"
    ):
        peftfx.fit(program, batches(4), breaks, progress=False)
    same(program, _two_of_four(peftfx.run(base, LORA)))

    class Infinite(Recorder):
        def loss(self, outputs: Any, batch: Any, forward: Any) -> Tensor:
            return float("inf") * self.squares()

    monkeypatch.setattr(peftfx.LoRA, "controller", Infinite)
    before = {n: p.detach().clone() for n, p in program.named_trainable_parameters().items()}
    with pytest.raises(NonFiniteError, match="gradients' norm of step 1"):
        peftfx.fit(program, batches(4), loss_of, progress=False)
    assert all(torch.equal(p, before[n]) for n, p in program.named_trainable_parameters().items())
    assert all(p.grad is None for p in program.trainable_parameters())


def test_bad_input_is_named(captured: Any) -> None:
    _, base = captured["decoder"]
    program = peftfx.run(base, LORA)
    unknown = [{**batch(), "token_type_ids": batch()["input_ids"]}]

    def train(data: Any, loss: Any = loss_of, **options: Any) -> None:
        peftfx.fit(program, data, loss, progress=False, **options)

    with pytest.raises(PassError, match="nothing trains"):
        peftfx.fit(peftfx.run(base, "lora;fold"), batches(1), loss_of)
    with pytest.raises(OptionError, match="batches is empty"):
        train([])
    with pytest.raises(OptionError, match=r"no length.*steps=100"):
        train(iter(batches(2)))
    with pytest.raises(OptionError, match=r"ended in step 3 of 4.*steps done are kept"):
        train(iter(batches(2)), steps=4)
    with pytest.raises(OptionError, match="returns no loss"):
        train(batches(1), None)
    with pytest.raises(InputError, match="'token_type_ids' was not captured"):
        train(unknown, None)
    train(unknown)  # the loss may want it
    with pytest.raises(InputError, match="'attention_mask' is missing"):
        train([{"input_ids": batch()["input_ids"]}])
    with pytest.raises(OptionError, match="must be a dict of keyword tensors"):
        train([batch()["input_ids"]])
    with pytest.raises(OptionError, match="float16 needs gradient scaling"):
        train(batches(1), autocast=torch.float16)
    for name in ("steps", "epochs", "accumulate"):
        with pytest.raises(OptionError, match=f"{name} is 0"):
            train(batches(1), **{name: 0})


def test_the_bar_says_where_it_is(captured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=90, record=True)
    monkeypatch.setattr(fitting, "Console", lambda stderr: screen)
    _, base = captured["decoder"]
    done = peftfx.fit(peftfx.run(base, LORA), batches(3), loss_of)
    text = screen.export_text()
    assert f"loss {done.losses[-1]:.4f}" in text and "3/3" in text and "step" in text
