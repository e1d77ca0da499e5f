"""Controllers: one loop for every method, and the same training by a plain loop, by transformers'
Trainer and by Lightning's hooks."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.training import trainer as trainers
from peftfx.rewriter.errors import ArtifactError, PassError
from peftfx.rewriter.running.controller import Controller
from peftfx.training.state import read_state

from .models import batch, first, llama
from .recipes import METHODS, start

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


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_in_the_loop(captured: Any, method: str) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(*start(base, method)).train()
    controllers = peftfx.controllers(program)
    groups = controllers.param_groups(lr=0.01, weight_decay=0.1)
    grouped = [p for g in groups for p in g["params"]]
    trained = program.named_trainable_parameters()
    assert len(grouped) == len({id(p) for p in grouped}) == len(trained)
    assert {id(p) for p in grouped} == {id(p) for p in trained.values()}
    assert {n: id(p) for g in groups for n, p in zip(g["names"], g["params"], strict=True)} == {
        n: id(p) for n, p in trained.items()
    }
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(groups)
    controllers.start(optimizer, 4)
    loop(program, controllers, optimizer, range(4))
    assert any(not torch.equal(p, before[n]) for n, p in trained.items())
    assert all(p.isfinite().all() for p in trained.values())
    controllers.load_state_dict(controllers.state_dict())
    passes = controllers.finish()
    if passes.passes:
        smaller = peftfx.run(program.eval(), passes)
        torch.testing.assert_close(first(smaller(**batch())), first(program(**batch())))


def test_decay_is_for_matrices_and_groups_have_equal_settings(captured: Any) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(base, "lora;ia3;bitfit")
    for group in peftfx.controllers(program).param_groups(lr=0.5, weight_decay=0.1):
        assert group["lr"] == 0.5
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] > 0}


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


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> str:
    """A method with the recording controller."""
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


def test_the_loop_calls_in_order(captured: Any, recorded: str) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(base, f"{recorded};bitfit")
    controllers = peftfx.controllers(program)
    groups = controllers.param_groups(lr=0.01, weight_decay=0.1)
    rates = {n.rpartition(".")[2]: g["lr"] for g in groups for n in g["names"]}
    assert rates["b"] == 0.16 and rates["a"] == 0.01
    controllers.start(torch.optim.SGD(groups), 3)
    loop(program, controllers, torch.optim.SGD(groups), range(3))
    assert recorder(controllers).seen == [("start", 3), *expected(range(3))]


def test_misuse_is_named(captured: Any) -> None:
    _, base = captured["encoder"]
    with pytest.raises(PassError, match="nothing trains"):
        peftfx.controllers(peftfx.run(base, "lora;fold")).param_groups(lr=1e-3)
    controllers = peftfx.controllers(peftfx.run(base, "lora;ia3"))
    for call in (controllers.before_step, controllers.after_step):
        with pytest.raises(PassError, match=r"call controllers.start\(optimizer, total_steps\)"):
            call(0)
    optimizer = torch.optim.SGD(controllers.param_groups(lr=1e-3))
    with pytest.raises(PassError, match="total_steps is 0"):
        controllers.start(optimizer, 0)
    with pytest.raises(PassError, match=r"of the adapters \['lora'\], but the program has"):
        controllers.load_state_dict({"lora": {}})
    assert not controllers.finish().passes and controllers.loss(None) == 0.0
    assert peftfx.run(controllers.program, "fold").history[-1].certificate.holds


def test_resuming_the_loop_is_exact(captured: Any, tmp_path: Path) -> None:
    model, base = captured["encoder"]
    straight, controllers, optimizer = fresh(peftfx.run(base, TEXT).eval())
    loop(straight, controllers, optimizer, range(STEPS))
    program, controllers, optimizer = fresh(peftfx.run(base, TEXT).eval())
    loop(program, controllers, optimizer, range(4))
    peftfx.save(program, tmp_path / "a")
    state, held = controllers.state_dict(), optimizer.state_dict()
    program, controllers, optimizer = fresh(peftfx.load(model, tmp_path / "a"))
    optimizer.load_state_dict(held)
    controllers.load_state_dict(state)
    loop(program, controllers, optimizer, range(4, STEPS))
    same(program, straight)


def fresh(program: peftfx.Program) -> tuple[peftfx.Program, Any, Any]:
    controllers = peftfx.controllers(program)
    optimizer = torch.optim.AdamW(controllers.param_groups(lr=0.02, weight_decay=0.01))
    controllers.start(optimizer, STEPS)
    return program, controllers, optimizer


def same(program: peftfx.Program, other: peftfx.Program) -> None:
    want = other.named_trainable_parameters()
    for name, parameter in program.named_trainable_parameters().items():
        assert torch.equal(parameter, want[name]), name


# transformers.Trainer


class Batches(torch.utils.data.Dataset[Any]):
    """The rows of the loop's batches, in order."""

    def __init__(self, labels: bool) -> None:
        self.rows: list[dict[str, Tensor]] = []
        for step in range(STEPS):
            inputs = batch(seed=step)
            inputs |= {"labels": inputs["input_ids"]} if labels else {}
            self.rows += [{n: t[i] for n, t in inputs.items()} for i in range(3)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def trainer(
    program: peftfx.Program, folder: Path, labels: bool, resume: Any = None, **options: Any
) -> tuple[Any, Any]:
    """A Trainer over the batches in order, with the controllers' callback."""
    import transformers

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(train_dataset or Batches(labels))

    controllers = peftfx.controllers(program)
    callback = peftfx.trainer_callback(controllers, resume)
    usual: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 3,
        "save_steps": 4, "report_to": [], "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no",
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**(usual | options))
    made = InOrder(
        model=program.module, args=arguments, callbacks=[callback], train_dataset=Batches(labels),
        eval_dataset=torch.utils.data.Subset(Batches(labels), range(3)),
        optimizers=(torch.optim.AdamW(controllers.param_groups(0.02, 0.01)), None),
        compute_loss_func=None if labels else callback.compute_loss(
            lambda outputs, _, num_items_in_batch: task_loss(outputs)
        ),
    )  # fmt: skip
    return made, controllers


@pytest.fixture(scope="module")
def labelled() -> tuple[Any, peftfx.Program]:
    """A language model that computes its own loss."""
    torch.manual_seed(0)
    model = llama().eval()
    inputs = batch()
    return model, peftfx.capture(model, kwargs={**inputs, "labels": inputs["input_ids"]})


def test_trainer_equals_the_loop(captured: Any, tmp_path: Path) -> None:
    """A program without a loss: bit for bit what the plain loop gives, and the state is kept."""
    _, base = captured["decoder"]
    straight, controllers, optimizer = fresh(peftfx.run(base, TEXT).train())
    loop(straight, controllers, optimizer, range(STEPS))
    program = peftfx.run(base, TEXT)
    made, mine = trainer(program, tmp_path, labels=False)
    made.train()
    same(program, straight)
    state, want = mine.state_dict()["adalora"], controllers.state_dict()["adalora"]
    assert all(torch.equal(t, want["sensitivity"][n]) for n, t in state["sensitivity"].items())
    smaller = peftfx.run(program.eval(), mine.finish())
    torch.testing.assert_close(first(smaller(**batch())), first(program(**batch())))
    assert len(smaller.trainable_parameters()) > 0
    assert not program.module._forward_hooks and not program.module._forward_pre_hooks


def test_trainer_goes_on_where_it_stopped(labelled: Any, tmp_path: Path) -> None:
    """From a checkpoint in its own folder and in another one; without the state it refuses."""
    _, base = labelled
    straight = peftfx.run(base, TEXT)
    trainer(straight, tmp_path / "one", labels=True)[0].train()
    checkpoint = tmp_path / "one" / "checkpoint-4"
    assert (checkpoint / trainers.STATE).exists()
    program = peftfx.run(base, TEXT)
    trainer(program, tmp_path / "one", labels=True)[0].train(resume_from_checkpoint=str(checkpoint))
    same(program, straight)
    program = peftfx.run(base, TEXT)
    made, _ = trainer(program, tmp_path / "two", labels=True, resume=checkpoint)
    made.train(resume_from_checkpoint=str(checkpoint))
    same(program, straight)
    made, _ = trainer(peftfx.run(base, TEXT), tmp_path / "three", labels=True)
    with pytest.raises(PassError, match="resume=FOLDER"):
        made.train(resume_from_checkpoint=str(checkpoint))
    data = (checkpoint / trainers.STATE).read_bytes()
    (checkpoint / trainers.STATE).write_bytes(data[:-7])
    with pytest.raises(ArtifactError, match="damaged"):
        read_state(checkpoint / trainers.STATE)


@pytest.mark.parametrize("labels", [True, False])
def test_trainer_calls_in_order(
    captured: Any, labelled: Any, recorded: str, labels: bool, tmp_path: Path
) -> None:
    """Gradients accumulate over two forwards a step; evaluation is not announced."""
    _, base = labelled if labels else captured["decoder"]
    program = peftfx.run(base, recorded)
    made, controllers = trainer(
        program, tmp_path, labels, gradient_accumulation_steps=2, max_steps=3,
        eval_strategy="steps" if labels else "no", eval_steps=1,
    )  # fmt: skip
    made.train()
    assert recorder(controllers).seen == [("start", 3), *expected(range(3), parts=2)]


@pytest.mark.parametrize("labels", [True, False])
def test_accumulated_terms_count_once(
    captured: Any, labelled: Any, monkeypatch: pytest.MonkeyPatch, labels: bool, tmp_path: Path
) -> None:
    """The term alone, accumulated over two forwards, has the gradient of one."""

    class Squares(Recorder):
        def loss(self, outputs: Any, batch: Any, forward: Any) -> Tensor:
            return self.squares() - 0.0 * first(outputs).sum()

        def before_step(self, step: int) -> None:
            self.seen = [(b.a.grad, 2 * b.a.detach()) for _, b in self.branches()]

    monkeypatch.setattr(peftfx.LoRA, "controller", Squares)
    _, base = labelled if labels else captured["decoder"]
    program = peftfx.run(base, "lora{rank=2,where=q}")  # B is zero: no other gradient to A
    made, controllers = trainer(
        program, tmp_path, labels, gradient_accumulation_steps=2, max_steps=1
    )
    seen: list[Any] = []
    recorder(controllers).after_step = lambda step: seen.extend(
        (g.clone(), w.clone()) for g, w in recorder(controllers).seen
    )
    made.train()
    assert len(seen) == 2
    for grad, want in seen:
        torch.testing.assert_close(grad, want)


# Lightning


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the signatures of `lightning.pytorch.Callback` where it is not installed."""
    try:
        import lightning.pytorch  # noqa: F401 # pyright: ignore
    except ImportError:
        package, inner = types.ModuleType("lightning"), types.ModuleType("lightning.pytorch")
        inner.Callback = type("Callback", (), {})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "lightning", package)
        monkeypatch.setitem(sys.modules, "lightning.pytorch", inner)


class Fit:
    """The order of Lightning's automatic optimization: the closure of `optimizer.step` runs the
    training step, clears gradients at the first of the accumulated batches, and goes backward;
    the hook before the step comes from inside, and that of the batch's end after it."""

    def __init__(self, optimizer: Any, callback: Any, total: float = STEPS) -> None:
        self.optimizers, self.callback = [optimizer], callback
        self.estimated_stepping_batches, self.global_step = total, 0

    def run(self, program: peftfx.Program, batches: range, parts: int) -> None:
        self.callback.on_train_start(self, None)
        for index in batches:
            inputs = batch(seed=index)

            def closure(inputs: Any = inputs, index: int = index) -> Tensor:
                outputs = program(**inputs)
                loss = (task_loss(outputs) + self.callback.term(outputs)) / parts
                if index % parts == 0:
                    self.optimizers[0].zero_grad()
                loss.backward()
                return loss

            if (index + 1) % parts:
                closure()
            else:
                self.step(closure)
            self.callback.on_train_batch_end(self, None, None, inputs, index)
        self.callback.on_train_end(self, None)

    def step(self, closure: Any) -> None:
        def prepared() -> Any:
            loss = closure()
            self.callback.on_before_optimizer_step(self, None, self.optimizers[0])
            return loss

        self.optimizers[0].step(prepared)
        self.global_step += 1


@pytest.mark.usefixtures("lightning")
def test_lightning_hooks_equal_the_loop(captured: Any) -> None:
    _, base = captured["decoder"]
    straight, controllers, optimizer = fresh(peftfx.run(base, TEXT).train())
    loop(straight, controllers, optimizer, range(STEPS))
    program = peftfx.run(base, TEXT).train()
    controllers = peftfx.controllers(program)
    optimizer = torch.optim.AdamW(controllers.param_groups(lr=0.02, weight_decay=0.01))
    callback = peftfx.lightning_callback(controllers)
    fit = Fit(optimizer, callback)
    fit.run(program, range(4), 1)
    held = callback.state_dict()
    other = peftfx.controllers(program)  # as a new process would have it
    callback = peftfx.lightning_callback(other)
    callback.load_state_dict(held)
    again = Fit(optimizer, callback)
    again.global_step = 4
    again.run(program, range(4, STEPS), 1)
    same(program, straight)
    with pytest.raises(PassError, match="no end"):
        Fit(optimizer, callback, float("inf")).run(program, range(1), 1)


@pytest.mark.usefixtures("lightning")
def test_lightning_calls_in_order(captured: Any, recorded: str) -> None:
    _, base = captured["decoder"]
    program = peftfx.run(base, recorded).train()
    controllers = peftfx.controllers(program)
    optimizer = torch.optim.SGD(controllers.param_groups(lr=0.01))
    Fit(optimizer, peftfx.lightning_callback(controllers)).run(program, range(6), 2)
    assert recorder(controllers).seen == [("start", STEPS), *expected(range(3), parts=2)]


def test_importing_needs_neither_trainer() -> None:
    code = "import sys, peftfx; print([m for m in ('transformers', 'lightning', 'accelerate') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
