"""What propagation evaluates: once for what repeats, again for whatever else could differ."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import peftfx
from peftfx.passes.reparameterized.lora import LoRABranch
from peftfx.rewriter.capture import capture as capturing
from peftfx.rewriter.graph.clone import clone
from peftfx.rewriter.measure.likeness import runs_alike
from peftfx.rewriter.measure.reach import unreached
from peftfx.rewriter.measure.still import is_modeless
from peftfx.rewriter.measure.witness import Witness
from peftfx.rewriter.tracing.memo import Memo
from peftfx.rewriter.tracing.propagate import _Fakes
from peftfx.rewriter.verify import checks

from . import models


class Layer(nn.Module):
    """A residual feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def captured(layers: int) -> peftfx.Program:
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(layers))).eval().requires_grad_(False)
    return peftfx.capture(model, (torch.randn(2, 5, 8),))


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules and operators that are evaluated, not recalled."""
    seen: list[str] = []

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, target: Any, *operands: Any) -> Any:
            seen.append(str(getattr(target, "__name__", type(target).__name__)))
            return original(self, target, *operands)

        return call

    for name in ("called", "applied"):
        monkeypatch.setattr(_Fakes, name, counted(getattr(_Fakes, name)))
    return seen


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What runs with values: `program` for each forward to compare, and adapters' names for calls
    of their branches."""
    seen: list[str] = []
    forward, branch = Witness.forward, LoRABranch.branch

    def of_program(self: Witness, given: Any) -> Any:
        seen.append("program")
        return forward(self, given)

    def of_branch(self: LoRABranch, x: Tensor) -> Tensor:
        if not isinstance(x, FakeTensor):
            seen.append(names.get(self.a.shape[0], ""))
        return branch(self, x)

    monkeypatch.setattr(Witness, "forward", of_program)
    monkeypatch.setattr(LoRABranch, "branch", of_branch)
    return seen


names = {rank: f"a{rank}" for rank in range(1, 9)}


@pytest.mark.parametrize("layers", [12, 24, 48])
def test_layers_cost_no_evaluations(
    layers: int, evaluations: list[str], forwards: list[str]
) -> None:
    program = captured(layers)
    evaluations.clear()
    forwards.clear()
    peftfx.run(program, "lora{rank=2,where=linear}")
    assert evaluations == ["LoRABranch", "add.Tensor", "LoRABranch", "add.Tensor"]  # up, down
    # Of both: at three sizes; of the base again, with its last sample, or token, changed, and
    # before; of the adapter also in training, and with noise: once, and with each of both changed.
    assert forwards.count("program") == 3 + 1 + 3 + 4 + 3
    branches = 2 * layers * (4 + 1 + 3)  # once more with gradients
    assert forwards.count("a2") == branches + 2 * 6  # alone: only one of each kind, up and down
    forwards.clear()
    peftfx.run(program, "lora{rank=2,where=linear}")
    assert forwards.count("program") == 1 + 4 + 3


def test_gradients_are_looked_for_at_small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def looked(after: Witness, names: Any, inputs: dict[str, Tensor], what: str) -> Any:
        (x,) = inputs.values()
        seen.append(tuple(x.shape))
        return unreached(after, names, inputs, what)

    monkeypatch.setattr(checks, "unreached", looked)
    peftfx.run(captured(2), "lora{rank=2,where=linear}")
    assert seen == [(2, 2, 8)]


def test_what_both_modes_leave_idle_runs_in_one() -> None:
    for dropout, idle in ((0.0, True), (0.1, False)):
        model = nn.Sequential(Layer(), nn.Dropout(dropout), Layer()).eval().requires_grad_(False)
        program = peftfx.capture(model, (torch.randn(2, 5, 8),))
        assert is_modeless(program.module) == idle
        assert not is_modeless(peftfx.run(program, "lora{rank=2,where=linear}").module)


def test_the_eighth_adapter_costs_what_the_second_does(
    evaluations: list[str], forwards: list[str]
) -> None:
    program, counts, ran = captured(2), list[int](), list[Counter[str]]()
    for index in range(1, 9):
        evaluations.clear()
        forwards.clear()
        program = peftfx.run(program, f"lora{{rank={index},where=linear,name=a{index}}}")
        counts.append(len(evaluations))
        ran.append(Counter(forwards))
    assert len(program.attachments) == 8 * 4
    assert max(counts[1:]) <= counts[0]  # the ranks differ
    for index, count in enumerate(ran[1:], 2):
        assert count["program"] == ran[1]["program"]
        assert count[f"a{index}"] == ran[1]["a2"]
        # Those before it run once: with all of them, the outputs stay what they were.
        assert all(count[f"a{older}"] == 4 for older in range(1, index))


def test_a_fold_runs_nothing_that_is_known(forwards: list[str]) -> None:
    program = peftfx.run(captured(2), "lora{rank=2,where=linear}")
    with torch.no_grad():
        for parameter in program.trainable_parameters():
            parameter.add_(0.1)
    forwards.clear()
    folded = peftfx.run(program, "fold")
    # Of both: at three sizes, again; with branches also in training. What is left without them is
    # known of the captured program, and what the exported tensors give, of the folded one.
    assert forwards.count("program") == 5 + 4
    assert folded.history[-1].certificate.measured["exported"] > 0


def test_programs_are_alike_by_code_and_tensors() -> None:
    base = captured(2)
    one = peftfx.run(base, "lora{rank=2,where=linear}")
    assert runs_alike(one.module, one.fork().module)
    assert runs_alike(base.module, base.fork().module)
    assert not runs_alike(one.module, base.module)
    for name in ("0.up.weight", "peftfx.lora.1.down.delta.b"):
        other = one.fork()
        with torch.no_grad():
            changed = other.module.get_parameter(name).detach().clone()
            changed[0, 0] += 1e-3
        owner, _, leaf = name.rpartition(".")
        other.module.get_submodule(owner)._parameters[leaf] = nn.Parameter(changed)
        assert not runs_alike(one.module, other.module)
    other = one.fork()
    other.module.get_submodule("peftfx.lora.1.down.delta").scale = 3.0  # pyright: ignore
    assert not runs_alike(one.module, other.module)


OURS = tuple(str(Path(str(package.__file__)).parent) for package in (peftfx, torch.fx))


def outlining(program: peftfx.Program) -> int:
    """Calls of our own functions and of torch.fx's that it takes to outline a program.

    Others' depend on what ran before in the process: once anything was compiled, torch tags every
    module that is made or dies, and abstract classes ask their subclasses again.
    """
    count = 0

    def seen(frame: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(OURS)

    sys.setprofile(seen)
    try:
        module = peftfx.outline(program)
    finally:
        sys.setprofile(None)
    assert len(module.blocks) > 1
    return count


def test_outline_is_linear_in_layers() -> None:
    small, middle, large = (outlining(captured(layers)) for layers in (12, 24, 48))
    assert large - middle == pytest.approx(2 * (middle - small), rel=0.03)


def test_outline_is_linear_in_adapters() -> None:
    program, counts = captured(4), list[int]()
    for index in range(1, 9):
        program = peftfx.run(program, f"lora{{rank={index},where=linear,name=a{index}}}")
        counts.append(outlining(program))
    assert counts[7] - counts[3] == pytest.approx(2 * (counts[3] - counts[1]), rel=0.03)


class Branch(nn.Module):
    """Calls a function with itself, its operand and a generator that lives outside."""

    def __init__(self, formula: Callable[..., Any]) -> None:
        super().__init__()
        self.formula, self.calls = formula, 0
        self.register_buffer("rows", torch.zeros(3))

    def forward(self, x: Tensor) -> Any:
        return self.formula(self, x)


class Faked:
    """Evaluates modules on fake tensors of symbolic sizes, and counts."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.count = 0
        self.x, self.y = self.fake(5, 7), self.fake(5, 11)

    def fake(self, *sizes: int) -> Tensor:
        tensor = torch.zeros(sizes)
        torch._dynamo.mark_dynamic(tensor, 0)
        return self.mode.from_tensor(tensor)

    def __call__(self, module: nn.Module, *operands: Any) -> Any:
        state: dict[str, Tensor] = {
            n: self.mode.from_tensor(t, static_shapes=True) for n, t in module.named_buffers()
        }

        def run() -> Any:
            self.count += 1
            with self.mode:
                return torch.func.functional_call(module, state, operands)

        return Memo(self.mode).evaluate(module, (operands, {}), lambda: state, run)


def double(module: Any, x: Tensor) -> Tensor:
    del module
    return x * 2


class Masked(nn.Module):
    """Layers, beside a second input that nothing relates to the first."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer() for _ in range(layers)))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(x), mask * 2


def test_layers_cost_no_tensors_where_names_tie_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    named, made = {0: "batch", 1: "token"}, list[Any]()
    strided, refreshed = torch.empty_strided, capturing.refresh_sizes

    def counted(gm: Any) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(
                torch, "empty_strided", lambda *a, **k: (made.append(a), strided(*a, **k))[1]
            )
            refreshed(gm)

    monkeypatch.setattr(capturing, "refresh_sizes", counted)
    counts: list[int] = []
    for layers in (2, 5):
        model = Masked(layers).eval().requires_grad_(False)
        inputs = torch.randn(2, 5, 8), torch.ones(2, 5)
        made.clear()
        program = peftfx.capture(model, inputs, dynamic={"x": named, "mask": named})
        values = [n.meta["val"] for n in program.module.graph.nodes if n.op == "call_function"]
        assert len({v.shape[0].node.expr for v in values}) == 1
        assert len({id(v) for v in values}) == len(values)  # what was apart stays apart
        counts.append(len(made))
    assert counts[0] == counts[1] > 0


def test_sizes_that_passes_choose_are_those_of_the_program_before(evaluations: list[str]) -> None:
    """So that what the layers give for the tokens chosen is known the second time."""
    recipe = "coda{bottleneck=4,where=layer in [0]}"
    base = peftfx.capture(models.build("encoder"), kwargs=models.batch())
    evaluations.clear()
    one = peftfx.run(base, recipe)
    first = len(evaluations)
    evaluations.clear()
    two = peftfx.run(base, recipe)
    assert "linear.default" not in evaluations and len(evaluations) < 0.7 * first
    assert one.symbols == two.symbols != base.symbols


def test_two_passes_that_choose_sizes_have_two() -> None:
    base = peftfx.capture(models.build("encoder"), kwargs=models.batch())
    text = "coda{{bottleneck=4,name=a{0},where=layer in [{0}]}}"
    one = peftfx.run(base, text.format(0))
    both = peftfx.run(one, text.format(1))
    assert len(both.symbols) == len(one.symbols) + 1 == len(base.symbols) + 2


def test_an_equal_evaluation_is_recalled_with_its_symbols() -> None:
    faked = Faked()
    first, again = faked(Branch(double), faked.x), faked(Branch(double), faked.x)
    assert faked.count == 1 and first is not again
    assert isinstance(again, FakeTensor) and again.fake_mode is faked.mode
    assert [str(s) for s in again.shape] == [str(s) for s in faked.x.shape]
    assert again.shape[0].node.expr == faked.x.shape[0].node.expr  # pyright: ignore
    assert again.dtype == torch.float32 and again.stride() == first.stride()


def test_other_symbols_operands_and_modules_are_evaluated() -> None:
    faked = Faked()
    other = Branch(double)
    other.calls = 1
    training = Branch(double).eval()
    wide = Branch(double)
    wide.rows = torch.zeros(4)
    shared = faked.fake(6, 7)  # of another symbol
    for module, operand in [
        (Branch(double), faked.x), (Branch(double), faked.y), (Branch(double), shared),
        (Branch(double), faked.x.to(torch.float64)), (Branch(double), faked.x.mT),
        (other, faked.x), (training, faked.x), (wide, faked.x),
        (Branch(lambda module, x: x * 2), faked.x),
    ]:  # fmt: skip
        made = faked(module, operand)
        assert [str(s) for s in made.shape] == [str(s) for s in operand.shape]
        assert made.dtype == operand.dtype
    assert faked.count == 9


def counts(module: Any, x: Tensor) -> Tensor:
    module.calls += 1
    return x * 2


def counts_on_the_class(module: Any, x: Tensor) -> Tensor:
    type(module).seen = getattr(type(module), "seen", 0) + 1
    return x * 2


def writes_its_operand(module: Any, x: Tensor) -> Tensor:
    del module
    return x.add_(1) * 2


def writes_a_buffer(module: Any, x: Tensor) -> Tensor:
    module.rows.add_(1)
    return x * 2


def draws(module: Any, x: Tensor) -> Tensor:
    del module
    return x * torch.rand_like(x)


def views(module: Any, x: Tensor) -> Tensor:
    del module
    return x.mT


def gives_it_back(module: Any, x: Tensor) -> Tensor:
    del module
    return x


def creates_a_size(module: Any, x: Tensor) -> Tensor:
    del module
    return x.nonzero()


def holds_a_constant(module: Any, x: Tensor) -> Any:
    del module
    return x * 2, torch.tensor(3)


IMPURE = [
    counts, counts_on_the_class, writes_its_operand, writes_a_buffer, draws, views, gives_it_back,
    creates_a_size, holds_a_constant,
]  # fmt: skip


@pytest.mark.parametrize("formula", IMPURE, ids=lambda f: f.__name__)
def test_what_does_more_is_not_remembered(formula: Callable[..., Any]) -> None:
    faked, module = Faked(), Branch(formula)
    for _ in range(3):
        faked(module, faked.x)
    assert faked.count == 3
    if formula is counts:
        assert module.calls == 3
    if formula is counts_on_the_class:
        assert Branch.seen == 3  # pyright: ignore
        del Branch.seen  # pyright: ignore


def test_a_size_that_depends_on_values_is_new_every_time() -> None:
    faked = Faked()
    one, other = (faked(Branch(creates_a_size), faked.fake(5, 7)) for _ in range(2))
    assert faked.count == 2 and str(one.shape[0]) != str(other.shape[0])


def test_an_error_is_raised_every_time() -> None:
    faked = Faked()

    def fails(module: Any, x: Tensor) -> Tensor:
        raise RuntimeError("no")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            faked(Branch(fails), faked.x)
    assert faked.count == 2


def test_what_cannot_be_compared_is_evaluated() -> None:
    faked = Faked()
    module = Branch(double)
    module.source = random.Random(0)  # pyright: ignore
    for _ in range(2):
        faked(module, faked.x)
    assert faked.count == 2


def test_a_cloned_module_shares_what_a_deep_copy_shares() -> None:
    class Inner(nn.Linear):
        pass

    class Own(nn.Module):
        def __deepcopy__(self, memo: dict[int, Any]) -> Own:
            made = Own()
            made.copied = True  # pyright: ignore
            return made

    module = nn.Module()
    module.one = Inner(2, 3)
    module.same, module.own, module.none = module.one, Own(), None  # pyright: ignore
    module.register_buffer("kept", torch.arange(3), persistent=False)
    module.notes, module.plain = ["a", {"b": 1}], torch.ones(2)  # pyright: ignore
    weight = nn.Parameter(torch.zeros(3, 2), requires_grad=False)
    kept = torch.arange(3) + 1
    made = clone(module, {id(module.one.weight): weight, id(module.kept): kept})
    assert type(made.one) is Inner and made.one is made.same and made.one is not module.one
    assert made.one.weight is weight and made.kept is kept and "kept" not in made.state_dict()
    assert torch.equal(made.one.bias, module.one.bias) and made.one.bias is not module.one.bias
    assert made.own.copied and made.notes == module.notes and made.notes is not module.notes
    assert torch.equal(made.plain, module.plain) and made.plain is not module.plain
    made.one.register_forward_hook(lambda *_: None)
    made.register_buffer("more", torch.ones(1), persistent=False)
    assert not module.one._forward_hooks and not hasattr(module, "more")
    assert module._non_persistent_buffers_set == {"kept"}
