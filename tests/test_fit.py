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
from peftfx.rewriter.errors import (
    ArtifactError,
    BaseMismatchError,
    InputError,
    NonFiniteError,
    OptionError,
    PassError,
)
from peftfx.training import loop as looping
from peftfx.training import reports

from .loops import Recorder, expected, record, recorder, same, task_loss
from .models import Decoder, batch, first

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
        looping, "Controllers", lambda p: made.append(peftfx.controllers(p)) or made[0]
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
    monkeypatch.setattr(reports, "Console", lambda stderr: screen)
    _, base = captured["decoder"]
    done = peftfx.fit(peftfx.run(base, LORA), batches(3), loss_of)
    text = screen.export_text()
    assert f"loss {done.losses[-1]:.4f}" in text and "3/3" in text and "step" in text


# Evaluation, loggers, checkpoints.


def shuffled(count: int) -> Any:
    return torch.utils.data.DataLoader(batches(count), batch_size=None, shuffle=True)  # pyright: ignore


def stop_at(step: int) -> Any:
    def stop(done: int, loss: float) -> None:
        if done == step:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("steps", [5, 6])
def test_a_run_goes_on_bit_for_bit(captured: Any, tmp_path: Any, steps: int) -> None:
    """With dropout, shuffled batches, several a step, pruned ranks and evaluations; interrupted
    behind the last checkpoint, and at one that ends a round."""
    _, base = captured["encoder"]
    text = "adalora{rank=4,target=2,warmup=1,final=3,dropout=0.5,where=q|v};bitfit"
    options: dict[str, Any] = {
        "epochs": 6, "accumulate": 2, "lr": 0.02, "seed": 3, "held_out": batches(2), "every": 3,
        "save_every": 2,
    }  # fmt: skip
    straight = peftfx.fit(
        peftfx.run(base, text), shuffled(3), loss_of, progress=False, **options
    )  # fmt: skip
    options["checkpoint"] = tmp_path / "run.safetensors"
    program = peftfx.run(base, text)
    part = peftfx.fit(program, shuffled(3), loss_of, progress=stop_at(steps), **options)
    assert part.stopped and part.losses == straight.losses[:steps]
    torch.manual_seed(99)
    again = peftfx.fit(peftfx.run(base, text), shuffled(3), loss_of, progress=False, **options)
    assert again.losses == straight.losses and again.held_out == straight.held_out
    same(again.program, straight.program)
    assert str(again.program.history[-1]) == str(straight.program.history[-1])
    assert len(again.losses) == 9 and not again.stopped
    third = peftfx.fit(peftfx.run(base, text), shuffled(3), loss_of, progress=False, **options)
    assert third.losses == straight.losses  # nothing is left to do
    same(third.program, straight.program)


def test_the_best_values_are_kept(captured: Any) -> None:
    """Those of the first smallest figure, whatever came later; patience ends the run."""
    _, base = captured["decoder"]
    figures = iter([3.0, 2.0, 2.5, 2.0, 1.0])
    seen: list[dict[str, Tensor]] = []

    def figure(program: peftfx.Program) -> float:
        assert not program.training and not torch.is_grad_enabled()
        named = program.named_trainable_parameters().items()
        seen.append({n: p.detach().clone() for n, p in named})
        return next(figures)

    program = peftfx.run(base, LORA)
    done = peftfx.fit(
        program, batches(4), loss_of, epochs=3, held_out=figure, every=2, patience=2,
        progress=False,
    )  # fmt: skip
    assert done.held_out == ((2, 3.0), (4, 2.0), (6, 2.5), (8, 2.0))
    assert done.best_step == 4 and done.stopped and len(done.losses) == 8
    assert all(torch.equal(p, seen[1][n]) for n, p in program.named_trainable_parameters().items())
    assert not all(torch.equal(seen[1][n], p) for n, p in seen[3].items())


def test_evaluation_is_the_mean_loss_and_changes_nothing(captured: Any) -> None:
    _, base = captured["encoder"]
    program, plain = (peftfx.run(base, LORA) for _ in range(2))
    done = peftfx.fit(
        program, batches(3), loss_of, held_out=batches(2), every=1, seed=0, progress=False
    )
    other = peftfx.fit(plain, batches(3), loss_of, seed=0, progress=False)
    assert done.losses == other.losses and len(done.held_out) == 3
    if done.best_step == 3:
        want = [loss_of(program(**inputs), inputs).item() for inputs in batches(2)]
        assert done.held_out[-1][1] == pytest.approx(sum(want) / 2, abs=1e-6)


def test_loggers_get_every_step(captured: Any) -> None:
    class Written:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def log(self, data: dict[str, float], step: int) -> None:
            self.seen.append((step, data))

    class Scalars:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def add_scalar(self, name: str, figure: float, step: int) -> None:
            self.seen.append((name, step))

    run, writer = Written(), Scalars()
    _, base = captured["decoder"]
    done = peftfx.fit(
        peftfx.run(base, LORA), batches(3), loss_of, held_out=batches(1), every=2, progress=False,
        loggers=[run, writer],
    )  # fmt: skip
    assert [step for step, _ in run.seen] == [1, 2, 3]
    assert [data["train/loss"] for _, data in run.seen] == list(done.losses)
    assert [s for s, data in run.seen if "held_out/loss" in data] == [2, 3]
    assert run.seen[0][1]["train/gradient_norm"] > 0 and run.seen[0][1]["train/learning_rate"] > 0
    assert ("held_out/loss", 3) in writer.seen and len(writer.seen) == 3 * 3 + 2


def test_wrong_checkpoints_and_loggers_are_named(captured: Any, tmp_path: Any) -> None:
    _, base = captured["decoder"]
    path = tmp_path / "run.safetensors"

    def train(text: str = LORA, **options: Any) -> peftfx.Program:
        program = peftfx.run(base, text)
        peftfx.fit(program, batches(2), loss_of, progress=False, **options)
        return program

    train(checkpoint=path)
    with pytest.raises(ArtifactError, match=r"is of lora\{rank=2.*Run the same recipe"):
        train("ia3", checkpoint=path)
    with pytest.raises(ArtifactError, match=r"begun with lr=0.001, not 0.5"):
        train(checkpoint=path, lr=0.5)
    other = peftfx.capture(Decoder().eval(), kwargs=batch())
    with pytest.raises(BaseMismatchError, match="other base weights"):
        peftfx.fit(peftfx.run(other, LORA), batches(2), loss_of, checkpoint=path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="damaged"):
        train(checkpoint=path)
    with pytest.raises(OptionError, match=r"folder .* does not exist"):
        train(checkpoint=tmp_path / "none" / "run")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"loggers": [3]}, "3 is no logger"),
        ({"patience": 2}, "Give held_out="),
        ({"held_out": [], "every": 1}, "held_out is empty"),
        ({"held_out": batches(1), "every": 0}, "every is 0"),
        ({"checkpoint": path, "save_every": 0}, "save_every is 0"),
    ]
    for options, said in wrong:
        with pytest.raises(OptionError, match=said):
            train(**options)
    with pytest.raises(NonFiniteError, match="held-out figure after step 2 is nan"):
        train(held_out=lambda program: float("nan"))
