"""Unusual models and inputs: each is captured right, or refused with what to do."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import peftfx
from peftfx.rewriter.errors import CaptureError, InputError, MetaTensorError, RewriteError
from peftfx.rewriter.measure.compare import floats

from .models import batch, build, first


def x(rows: int = 3, width: int = 4) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))


class Forward(nn.Module):
    """A module of some parts with a forward given as a function."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def same(model: Any, program: Any, *inputs: Any) -> bool:
    want, got = floats(model(*inputs)), floats(program(*inputs))
    return bool(want) and all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


# Models that are captured.


def hooked() -> nn.Module:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].register_forward_hook(lambda m, args, out: out * 2)
    model[1].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    model.register_forward_hook(lambda m, args, out: out - 3)
    return model


def checkpointed(self: Any, x: Tensor) -> Tensor:
    return checkpoint(self.inner, x, use_reentrant=False)


def attribute_mutation(self: Any, x: Tensor) -> Tensor:
    self.count.add_(1)
    return x * self.count


def changes_its_input(self: Any, x: Tensor) -> Tensor:
    y = x.clone()
    y.add_(1)
    y[:, 0] = 0
    return self.inner(y)


class Modes(nn.Module):
    """Has the names that captured modules use for themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.modes = nn.ModuleDict({"dropout_0": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.modes["dropout_0"](x), 0.5, self.training)


SHARED = nn.Linear(4, 4)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "shared submodule": lambda: nn.Sequential(SHARED, nn.ReLU(), SHARED),
    "functional weight": lambda: Forward(
        lambda self, x: F.linear(x, self.w), w=nn.Parameter(torch.randn(4, 4))
    ),
    "computed weight": lambda: Forward(
        lambda self, x: F.linear(x, self.w @ self.w.T + 1), w=nn.Parameter(torch.randn(4, 4))
    ),
    "hooks": hooked,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "checkpointed": lambda: Forward(checkpointed, inner=nn.Linear(4, 4)),
    "inner mutation": lambda: Forward(changes_its_input, inner=nn.Linear(4, 4)),
    "no parameters": lambda: Forward(lambda self, x: x.softmax(-1) + 1),
    "integer parameter": lambda: Forward(
        lambda self, x: x * self.n,
        n=nn.Parameter(torch.arange(4), requires_grad=False),
    ),
    "complex parameter": lambda: Forward(
        lambda self, x: torch.view_as_real(x * self.c).sum(-1),
        c=nn.Parameter(torch.randn(4, dtype=torch.complex64)),
    ),
    "own names": Modes,
    "nan weights": lambda: Forward(
        lambda self, x: x.sum() + 0 * self.w.nan_to_num(),
        w=nn.Parameter(torch.full((4,), torch.nan)),
    ),
    "frozen": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3)).requires_grad_(False),
    "lists and dicts out": lambda: Forward(lambda self, x: {"a": [x + 1, (x * 2, None)], "b": 3}),
}


@pytest.mark.parametrize("name", MODELS)
def test_unusual_models_are_captured(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    program = peftfx.capture(model, (x(),))
    for rows in (3, 1, 5):
        assert same(model, program, x(rows))
        assert type(model(x(rows))) is type(program(x(rows)))
    after = model.state_dict()
    assert all(
        torch.equal(
            before[n],
            after[n],
        )
        or before[n].isnan().any()
        for n in before
    )
    names = {n for n, _ in model.named_parameters()}
    assert names >= {n for n, _ in program.module.named_parameters()}


def test_wrappers_are_looked_through() -> None:
    model = build("encoder")
    inputs = batch()
    wrappers: list[Any] = [torch.compile(model), nn.DataParallel(model)]
    for wrapped in wrappers:
        program = peftfx.capture(wrapped, kwargs=inputs)
        assert set(program.export_state_dict()) == set(model.state_dict())
        assert torch.equal(first(program(**inputs)), first(model(**inputs)))


def test_buffers_that_the_forward_changes_are_the_programs_own() -> None:
    model = Forward(attribute_mutation)
    model.register_buffer("count", torch.zeros(()))
    program = peftfx.capture(model, (x(),))
    assert float(model.get_buffer("count")) == 0
    outputs = [program(x()) for _ in range(2)]
    assert torch.equal(outputs[1], 2 * x()) and float(model.get_buffer("count")) == 0
    assert float(program.base.module.get_buffer("count")) == 2


def moving_average(self: Any, x: Tensor) -> Tensor:
    if self.training:
        self.mean.copy_(0.9 * self.mean + 0.1 * x.detach().mean())
    return x - self.mean


def test_buffers_that_only_training_changes() -> None:
    model = Forward(moving_average)
    model.register_buffer("mean", torch.ones(()))
    program = peftfx.capture(model.eval(), (x(),))
    assert same(model, program, x(5))
    model.train(), program.train()
    for _ in range(2):
        assert same(model, program, x(5))
    assert torch.equal(model.get_buffer("mean"), program.module.get_buffer("mean"))
    model.eval(), program.eval()
    assert same(model, program, x(4)) and float(model.get_buffer("mean")) != 1


def test_results_of_every_form_and_loss() -> None:
    model = build("llama")
    inputs = {**batch(), "labels": batch()["input_ids"]}
    program = peftfx.capture(model, kwargs=inputs)
    for size in ((3, 9), (1, 5)):
        made = {**batch(*size), "labels": batch(*size)["input_ids"]}
        want, got = model(**made), program(**made)
        assert type(want) is type(got) and torch.equal(want.loss, got.loss)
    plain = peftfx.capture(model, kwargs={**batch(), "return_dict": False})
    assert isinstance(plain(**batch()), tuple)
    assert torch.equal(plain(**batch())[0], model(**batch()).logits)


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(
        self, pair: Any, named: dict[str, Any], scale: float = 1.0, extra: Tensor | None = None
    ) -> Tensor:
        a, b = pair
        y = self.inner(a) + b * scale + named["bias"] * named["factor"]
        return y if extra is None else y + extra


def test_containers_of_tensors() -> None:
    model = Containers()
    named = {"bias": x(3), "factor": 2.0}
    program = peftfx.capture(model, ([x(3), x(3) + 1], named), {"scale": 0.5, "extra": None})
    assert program.spec.names == ("pair_0", "pair_1", "named_bias")
    for rows in (3, 1, 5):
        call = ([x(rows), x(rows) + 1], {"bias": x(rows), "factor": 2.0})
        assert torch.equal(model(*call, scale=0.5), program(*call))
    adapted = peftfx.run(program, "lora{rank=2,where=linear}")
    assert torch.equal(adapted(*call), program(*call))
    for wrong, message in [
        (([x(3)], named), "a list of 2 where a list of 1"),
        (((x(3), x(3)), named), "a list of 2 where a tuple of 2"),
        (([x(3), x(3)], {**named, "factor": 3.0}), "the constant 2.0 where 3.0"),
        (([x(3), x(3)], {"bias": x(3)}), "a dict with bias, factor where a dict with bias"),
        (([x(3), {1}], named), "'pair_1' is a set"),
    ]:
        with pytest.raises(InputError, match=message):
            program(*wrong)


def test_containers_survive_saving(tmp_path: Any) -> None:
    model = Containers()
    call = ([x(3), x(3) + 1], {"bias": x(3), "factor": 2.0})
    program = peftfx.run(peftfx.capture(model, call), "bitfit{where=linear}")
    peftfx.save(program, tmp_path / "a")
    assert torch.equal(peftfx.load(model, tmp_path / "a")(*call), program(*call))


class Variadic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, first: Tensor, *rest: Tensor, **named: Tensor) -> Tensor:
        return self.inner(first) + sum(rest) + named["last"]


def test_variadic_forwards() -> None:
    model = Variadic()
    program = peftfx.capture(model, (x(3), x(3), x(3)), {"last": x(3)})
    args = (x(5), x(5) + 1, x(5) + 2)
    assert torch.equal(model(*args, last=x(5)), program(*args, last=x(5)))
    with pytest.raises(InputError, match="a tuple of 2 where a tuple of 1"):
        program(x(5), x(5), last=x(5))


def test_models_on_meta_are_captured_and_values_asked_for() -> None:
    with torch.device("meta"):
        model = build("encoder")
        inputs = {n: torch.zeros(3, 9, dtype=torch.long) for n in batch()}
    program = peftfx.capture(model, kwargs=inputs)
    adapted = peftfx.run(program, "lora{rank=2}")
    assert first(adapted(**inputs)).is_meta
    with pytest.raises((MetaTensorError, RewriteError), match="meta"):
        peftfx.save(adapted, "unused")


# Models and inputs that are refused.


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Unsteady(nn.Module):
    """Counts its calls in a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Reserved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.peftfx = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.peftfx(x)


def more_in_training(self: Any, x: Tensor) -> Any:
    y = self.inner(x)
    return (y, y.sum(), torch.rand(())) if self.training else y


def changes_its_argument(self: Any, x: Tensor) -> Tensor:
    return x.add_(1) * 2


REFUSED: dict[str, tuple[Callable[[], Any], tuple[Any, ...], str]] = {
    "branching": (Branching, (x(),), r"torch\.where"),
    "state in Python": (Unsteady, (x(),), "state that is not a tensor"),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), (x(),), "in one mode only",
    ),
    "reserved name": (Reserved, (x(),), "Rename it"),
    "more outputs in training": (
        lambda: Forward(more_in_training, inner=nn.Linear(4, 4)), (x(),), "both return the same",
    ),
    "lazy": (lambda: nn.LazyLinear(4), (x(),), "Run it once"),
    "scripted": (lambda: torch.jit.trace(nn.Linear(4, 4), x()), (x(),), "was scripted"),
    "no tensor": (lambda: nn.Linear(4, 4), (3,), "at least one example"),
    "empty example": (lambda: nn.Linear(4, 4), (torch.zeros(0, 4),), "is empty"),
    "other device": (lambda: nn.Linear(4, 4), (x().to("meta"),), "Move one of them"),
    "an object": (lambda: nn.Linear(4, 4), (object(),), "is a object"),
    "too many": (lambda: nn.Linear(4, 4), (x(), x()), "2 positional inputs"),
    "not a module": (lambda: (lambda x: x), (x(),), r"takes an nn\.Module"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_to_do(name: str) -> None:
    make, args, message = REFUSED[name]
    torch.manual_seed(2)  # power iterations that have not converged
    with pytest.raises(CaptureError, match=message):
        peftfx.capture(make(), args)


def test_a_program_is_not_captured_again(captured: Any) -> None:
    program = captured["encoder"][1]
    for again in (program, program.module):
        with pytest.raises(CaptureError, match=r"peftfx\.run"):
            peftfx.capture(again, kwargs=batch())


def test_calls_with_nothing_in_them(captured: Any) -> None:
    program = captured["encoder"][1]
    with pytest.raises(InputError, match=r"size 0 is outside the model's range 1\.\."):
        program(**{n: t[:0] for n, t in batch().items()})
    with pytest.raises(InputError, match="is missing"):
        program()
    with pytest.raises(InputError, match="given twice"):
        program(batch()["input_ids"], **batch())


def test_a_model_that_changes_its_argument() -> None:
    program = peftfx.capture(Forward(changes_its_argument), (x(),))
    given = x()
    assert torch.equal(program(given), (x() + 1) * 2) and torch.equal(given, x() + 1)


def test_size_one_that_the_model_treats_in_another_way() -> None:
    model = Forward(lambda self, x: x * 2 if x.shape[0] == 1 else x)
    program = peftfx.capture(model, (x(),))
    assert program.spec.ranges["batch"] == (2, None)
    with pytest.raises(InputError, match="treats size 1 in another way"):
        program(x(1))


class Looped(nn.Module):
    """Experts in a loop over those that some token chose."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Namespace(_experts_implementation="eager")
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        found = x
        for index in F.one_hot(x.argmax(-1), 4).sum(0).nonzero():
            found = found + self.experts[int(index[0])](x)
        return found


def branching(self: Any, x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Looped(), ("'grouped_mm'", "capture again")),
        (Forward(branching), ("torch.where",)),
    ],
)
def test_loops_and_branches_by_value_say_what_and_where_before_torch(
    model: nn.Module, words: tuple[str, ...]
) -> None:
    with pytest.raises(CaptureError) as caught:
        peftfx.capture(model, (x(),))
    ours, _, said = str(caught.value).partition(" (torch: ")
    kind = type(model).__name__
    assert re.match(rf"{kind} cannot be captured at test_capture_errors\.py:\d+: its forward", ours)
    assert all(word in ours for word in ("values of tensors", *words))
    assert said and "Guard" not in ours and ("experts" in ours) == isinstance(model, Looped)
