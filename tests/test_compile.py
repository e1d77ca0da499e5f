"""Programs under torch.compile: one graph, never compiled again, the same values and gradients.

Every recipe is compiled with `fullgraph=True, dynamic=True` and called at several batch and
sequence sizes. A graph break is an error there, and so is a second compilation. Two recipes run
through the default backend (inductor), with `pytest --inductor` all; the others stop before code
is generated (`aot_eager`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._inductor import config as inductor

import peftfx
from peftfx.rewriter.running.passes import Method

from .models import Decoder, Encoder, batch, first, moved, randomise
from .recipes import METHODS, RECIPES, method_class

SIZES = ((3, 9), (5, 12), (2, 17))
GENERATED = ("dora", "lower")
"""Recipes that always run through inductor: much arithmetic on small tensors, and an operator of
our own."""
SETTLED = tuple(m for m in METHODS if method_class(m).settle is not Method.settle)


@pytest.fixture(scope="module")
def base() -> peftfx.Program:
    """One block of a decoder, to which every recipe applies."""
    torch.manual_seed(0)
    return peftfx.capture(Decoder(layers=1).eval(), kwargs=batch())


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """A second compilation is an error; random numbers are those of the uncompiled program."""
    torch._dynamo.reset()
    with dynamo.patch(error_on_recompile=True), inductor.patch(fallback_random=True):
        yield
    torch._dynamo.reset()


def compiled(program: peftfx.Program, backend: str) -> Callable[..., Any]:
    return torch.compile(program.module, fullgraph=True, dynamic=True, backend=backend)


def inputs(program: peftfx.Program, step: int) -> dict[str, Tensor]:
    """The step's batch; each step has another size, and another task where there are tasks."""
    taken = {n: t for n, t in batch(*SIZES[step], seed=step).items() if n in program.spec.names}
    extra = {i.name for i in program.spec.inputs if i.optional}
    return {n: t + step if n in extra else t for n, t in program.spec.bind((), taken).items()}


def train(program: peftfx.Program, forward: Callable[..., Any]) -> tuple[list[Tensor], Any]:
    """Losses of three steps with the controllers, and the first step's gradients by name."""
    controllers = peftfx.controllers(program)
    named = program.train().named_trainable_parameters()
    optimizer = torch.optim.AdamW(controllers.param_groups(lr=0.01)) if named else None
    losses: list[Tensor] = []
    gradients: dict[str, Tensor] = {}
    if optimizer is not None:
        controllers.start(optimizer, len(SIZES) + 2)
    for step in range(len(SIZES)):
        torch.manual_seed(step)
        given = inputs(program, step)
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
def test_training_compiles_once(base: Any, name: str, request: pytest.FixtureRequest) -> None:
    everything = request.config.getoption("--inductor")
    program = randomise(peftfx.run(base, RECIPES[name]))
    plain = program.fork()
    want, gradients = train(plain, plain.module)
    backend = "inductor" if everything or name in GENERATED else "aot_eager"
    got, same = train(program, compiled(program, backend))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert same.keys() == gradients.keys()
    scale = max((float(g.abs().max()) for g in gradients.values()), default=1.0)
    for n, gradient in gradients.items():
        torch.testing.assert_close(same[n], gradient, rtol=1e-3, atol=1e-5 * scale, msg=n)


def settled(base: peftfx.Program, name: str) -> peftfx.Program:
    """A method's program after a little training, with what training decided in its place."""
    program = randomise(peftfx.run(base, RECIPES[name]))
    controllers = peftfx.controllers(program)
    train(program, program.module)
    fixed = ",".join(f"{i.name}=1" for i in program.spec.inputs if i.optional)
    passes = controllers.finish().passes or f"bake{{names=[{name}],inputs={{{fixed}}}}}"
    return peftfx.run(program.eval(), passes, data=[batch(seed=5)])


@pytest.mark.parametrize("name", [*RECIPES, *(f"{m} settled" for m in SETTLED)])
def test_evaluation_compiles_once(base: Any, name: str) -> None:
    method, _, after = name.partition(" ")
    program = settled(base, method) if after else randomise(peftfx.run(base, RECIPES[name]))
    forward = compiled(program.eval(), "eager")
    for step in range(len(SIZES)):
        given = inputs(program, step)
        want, got = first(program.module(**given)), first(forward(**given))
        torch.testing.assert_close(got, want)
        if want.requires_grad:
            named = program.named_trainable_parameters()
            pair = (torch.autograd.grad(y.pow(2).sum(), named.values(), allow_unused=True)
                    for y in (got, want))  # fmt: skip
            torch.testing.assert_close(*pair)
