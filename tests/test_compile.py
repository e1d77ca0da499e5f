"""Programs under torch.compile: one graph, never compiled again, the same values and gradients.

Every recipe is compiled with `fullgraph=True, dynamic=True` and called at several batch and
sequence sizes. A graph break is an error there, and so is a second compilation. Training runs
through the default backend (inductor) for our own operator, with `pytest --inductor` for all
recipes. Without, methods are stacked, so that the model below them is compiled once for several. The
trace of their gradients (`aot_eager`) stops before code is generated; it takes four times as long
with sizes that vary, so one stack has them, which the seed of the run draws. What is no method, and
what methods settle to, is compiled by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

import peftfx
from peftfx.rewriter.pipeline.method import Method

from .models import Encoder, batch, first, moved, randomise
from .recipes import METHODS, RECIPES, method_class, stacked, stated

SIZES = ((3, 9), (5, 12), (2, 17))
DRAWING = tuple(m for m in METHODS if stated(m, "DRAWS", False))
"""Draw random numbers in training."""
_PLAIN = tuple(m for m in METHODS if m not in DRAWING)
GROUPS = (*(_PLAIN[i::4] for i in range(4)), DRAWING)
"""The methods that are in one stack, as far as they stack."""
OTHERS = tuple(r for r in RECIPES if r not in METHODS)
"""Passes that are no methods."""
SETTLED = tuple(
    m for m in METHODS if method_class(m).settle is not Method.settle and stated(m, "SETTLES", True)
)


@pytest.fixture
def base(captured: Any) -> peftfx.Program:
    """One small block, to which every recipe applies."""
    return captured["tiny"][1]


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """A second compilation is an error; random numbers are those of the uncompiled program."""
    torch._dynamo.reset()
    counters.clear()
    with dynamo.patch(error_on_recompile=True), inductor.patch(fallback_random=True):
        yield
    torch._dynamo.reset()


def compiled(program: peftfx.Program, backend: str, dynamic: bool = True) -> Callable[..., Any]:
    return torch.compile(program.module, fullgraph=True, dynamic=dynamic, backend=backend)


def made(captured: Any, name: str, model: str = "tiny") -> peftfx.Program:
    """A recipe's program, with everything that trains moved before its last pass, too."""
    before, last = captured.start(model, name)
    if before is captured[model][1]:
        return randomise(captured.placed(model, name))
    return randomise(peftfx.run(randomise(before.fork()), last))


Sizes = tuple[tuple[int, int], ...]


def inputs(program: peftfx.Program, step: int, sizes: Sizes = SIZES) -> dict[str, Tensor]:
    """The step's batch; each step has another size, and another task where there are tasks."""
    taken = {n: t for n, t in batch(*sizes[step], seed=step).items() if n in program.spec.names}
    extra = {i.name for i in program.spec.inputs if i.optional}
    bound, device = program.spec.bind((), taken), program.module.device
    return {n: (t + step if n in extra else t).to(device) for n, t in bound.items()}


def train(
    program: peftfx.Program, forward: Callable[..., Any], sizes: Sizes = SIZES
) -> tuple[list[Tensor], Any]:
    """Losses of three steps with the controllers, and the first step's gradients by name."""
    controllers = peftfx.controllers(program)
    named = program.train().named_trainable_parameters()
    optimizer = torch.optim.AdamW(controllers.param_groups(lr=0.01)) if named else None
    losses: list[Tensor] = []
    gradients: dict[str, Tensor] = {}
    if optimizer is not None:
        controllers.start(optimizer, len(sizes) + 2)
    for step in range(len(sizes)):
        torch.manual_seed(step)
        given = inputs(program, step, sizes)
        controllers.begin_forward(given)
        outputs = forward(**given)
        loss = first(outputs).pow(2).mean() + controllers.loss(outputs, given, forward)
        losses.append(loss.detach())
        if optimizer is None:
            continue
        loss.backward()
        gradients = gradients or {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        controllers.before_step(step)
        optimizer.step()
        controllers.after_step(step)
        optimizer.zero_grad()
    return losses, gradients


@pytest.mark.parametrize("name", [*METHODS, "lower"])
def test_training_compiles_once(captured: Any, name: str, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--inductor"):
        pytest.skip("compiled in a stack: run pytest --inductor for each alone")
    trains_alike(made(captured, name), "inductor")


def test_training_our_own_operator_through_inductor() -> None:
    """On two linears, since a compiler of C++ takes a second a kernel."""
    torch.manual_seed(0)
    ids = batch()["input_ids"]
    model = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    base = peftfx.capture(model.requires_grad_(False), (ids,))
    program = randomise(peftfx.run(base, "lora{rank=2,where=linear};lower"))
    assert len(program.history[-1].edited) == 2
    results: list[list[Tensor]] = []
    for forward in (program.module, compiled(program, "inductor")):
        outputs = [forward(batch(*size)["input_ids"]) for size in SIZES]
        loss = torch.stack([y.pow(2).mean() for y in outputs]).sum()
        results.append([*outputs, *torch.autograd.grad(loss, program.trainable_parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def stacks(captured: Any) -> Callable[[int], list[peftfx.Program]]:
    """Copies of the programs that hold a group's methods, with everything that trains moved."""
    made = functools.cache(lambda group: stacked(captured, "tiny", GROUPS[group]))
    return lambda group: [randomise(program.fork()) for program in made(group)]


@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_stacks_of_methods_compile_once(stacks: Any, group: int, seed: int) -> None:
    """Every method is in one of the programs; one that does not stack begins another."""
    for program in stacks(group):
        torch._dynamo.reset()
        trains_alike(program, "aot_eager", dynamic=group == seed % len(GROUPS))


def trains_alike(program: peftfx.Program, backend: str, dynamic: bool = True) -> None:
    """The same losses, and the same gradients by name, as without a compiler; at one size, unless
    `dynamic`."""
    plain = program.fork()
    sizes = SIZES if dynamic else SIZES[:1] * len(SIZES)
    want, gradients = train(plain, plain.module, sizes)
    got, same = train(program, compiled(program, backend, dynamic), sizes)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    unread = same.keys() - gradients.keys()  # compilers give zeros where a loss reads nothing of it
    assert gradients.keys() <= same.keys() and not any(bool(same[n].any()) for n in unread)
    same = {n: g for n, g in same.items() if n not in unread}
    scale = max((float(g.abs().max()) for g in gradients.values()), default=1.0)
    for n, gradient in gradients.items():
        torch.testing.assert_close(same[n], gradient, rtol=1e-3, atol=1e-5 * scale, msg=n)


@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_blocks_of_stacks_compile_once(stacks: Any, group: int, seed: int) -> None:
    for number, program in enumerate(stacks(group)):
        torch._dynamo.reset()
        counters.clear()
        blocks_compile_once(program, GROUPS[group] is DRAWING, (group + number + seed) % 2 > 0)


@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_of_what_is_lowered_compile_once(captured: Any, recompute: bool) -> None:
    blocks_compile_once(made(captured, "lower"), False, recompute)


def blocks_compile_once(program: peftfx.Program, draws: bool, recompute: bool) -> None:
    """A checkpointed block, or one whose cheap values are computed again."""
    plain = program.fork()
    # "eager" draws other numbers where a checkpointed block runs again, and "aot_eager" takes four
    # times as long with sizes that vary: that methods take them, their evaluation shows
    sizes = SIZES[:1] * len(SIZES) if draws else SIZES
    want = train(plain, plain.module, sizes)
    again: dict[str, Any] = {"recompute": True} if recompute else {"checkpoint": [0]}
    module = peftfx.outline(program, **again).train()
    backend = "aot_eager" if draws else "eager"
    forward = torch.compile(module, fullgraph=True, dynamic=not draws, backend=backend)
    got = train(peftfx.inline(module), forward, sizes)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1


def settled(captured: Any, name: str) -> peftfx.Program:
    """A method's program after a little training, with what training decided in its place."""
    program = made(captured, name)
    controllers = peftfx.controllers(program)
    train(program, program.module)
    fixed = ",".join(f"{i.name}=1" for i in program.spec.inputs if i.optional)
    passes = controllers.finish().passes or f"bake{{names=[{name}],inputs={{{fixed}}}}}"
    return peftfx.run(program.eval(), passes, data=[batch(seed=5)])


def test_dropout_and_the_switch_of_modes() -> None:
    """Training mode has the model's own dropout, compiled with the same random numbers; each mode
    is one graph."""
    torch.manual_seed(0)
    base = peftfx.capture(Encoder(layers=1), kwargs=batch())
    program = randomise(peftfx.run(base, "lora{rank=2,dropout=0.5}"))
    for mode in (True, False):
        torch._dynamo.reset()
        program.train(mode)
        forward = compiled(program, "eager")
        results: list[Tensor] = []
        for run in (program.module, forward, forward):
            torch.manual_seed(len(results) // 2)
            results.append(first(run(**batch())))
        torch.testing.assert_close(results[1], results[0])
        assert torch.equal(results[2], results[1]) is not mode


def test_compiling_in_place(base: Any) -> None:
    """A program whose module is compiled in place is called, trained and rewritten as before."""
    program = randomise(peftfx.run(base, "lora{rank=2}"))
    want = first(program(**batch()))
    program.module.compile(fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(first(program(**batch())), want)
    assert counters["stats"]["unique_graphs"] == 1
    folded = peftfx.run(program, "fold")
    torch.testing.assert_close(first(folded(**batch())), want, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_evaluation_of_stacks_compiles_once(stacks: Any, group: int) -> None:
    for program in stacks(group):
        torch._dynamo.reset()
        evaluates_alike(program)


@pytest.mark.parametrize("name", [*OTHERS, *(f"{m} settled" for m in SETTLED)])
def test_evaluation_compiles_once(captured: Any, name: str) -> None:
    method, _, after = name.partition(" ")
    evaluates_alike(settled(captured, method) if after else made(captured, name))


def evaluates_alike(program: peftfx.Program) -> None:
    """The same outputs and gradients in evaluation mode, at several sizes and for other choices."""
    forward = compiled(program.eval(), "eager")
    for choice in (i.name for i in program.spec.inputs if i.optional):
        # Adapters and tasks are data: another one runs the same code, and is another one.
        given = program.spec.bind((), batch())
        given[choice] = torch.full_like(given[choice], 0)
        other = {**given, choice: torch.full_like(given[choice], 1)}
        assert moved(first(forward(**given)), first(forward(**other))) > 0.01
    for step in range(len(SIZES)):
        given = inputs(program, step)
        want, got = first(program.module(**given)), first(forward(**given))
        torch.testing.assert_close(got, want)
        if want.requires_grad:
            held = program.trainable_parameters()
            pair = [torch.autograd.grad(y.pow(2).sum(), held, allow_unused=True)
                    for y in (got, want)]  # fmt: skip
            gradients: list[Any] = list(pair[1])  # None where nothing is read
            scale = max(float(g.abs().max()) for g in gradients if g is not None)
            # eager steps may compute a lowered product in another form than a compiler
            torch.testing.assert_close(pair[0], pair[1], rtol=1e-4, atol=1e-5 * max(1.0, scale))
