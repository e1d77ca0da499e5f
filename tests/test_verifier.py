"""Seeded wrong passes: each one must be caught, with an error that says what it did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.branches.branch import Delta
from peftfx.rewriter.edits.edit import Editor
from peftfx.rewriter.errors import PassError, RewriteError, VerifyError
from peftfx.rewriter.graph.aten import ATEN, output_node, set_attribute
from peftfx.rewriter.measure.witness import Witness
from peftfx.rewriter.pipeline.passes import REGISTRY
from peftfx.rewriter.program.history import Contract, Plan
from peftfx.rewriter.program.state import State
from peftfx.rewriter.program.tensors import Tensors
from peftfx.rewriter.verify.verify import certify

LENGTH = 5


class Net(nn.Module):
    """One block with dropout; outputs of very different size, integers, booleans, complex."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm, self.drop = nn.LayerNorm(16), nn.Dropout(0.2)
        self.head, self.gate, self.wave = nn.Linear(16, 4), nn.Linear(16, 1), nn.Linear(16, 2)
        self.tied = nn.Linear(16, 32)
        self.tied.weight = self.up.weight

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))
        scores = self.head(h)
        return {
            "hidden": h * 300, "score": scores.sigmoid() * 1e-3, "label": scores.argmax(-1),
            "positive": self.gate(h) > 0, "wave": torch.view_as_complex(self.wave(h).float()),
            "more": self.tied(h),
        }  # fmt: skip


def program(dtype: torch.dtype = torch.float32) -> peftfx.Program:
    torch.manual_seed(0)
    model = Net().eval().requires_grad_(False).to(dtype)
    x = torch.randn(2, LENGTH, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    return peftfx.capture(model, (x,))


@pytest.fixture(scope="module")
def base() -> peftfx.Program:
    return program()


class Plain(Delta):
    """`x A^T B^T`, with B zero at first."""

    def __init__(self, site: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(2, site.in_features, generator=generator))
        self.b = nn.Parameter(torch.zeros(site.out_features, 2))

    def branch(self, x: Tensor) -> Tensor:
        return x @ self.a.to(x.dtype).T @ self.b.to(x.dtype).T


def wrong(
    branch: Callable[[Any], Delta] = Plain,
    apply: Callable[[Editor], None] | None = None,
    plan: Callable[[Any], None] | None = None,
    kind: str = "identity",
    where: str = "ffn.down",
) -> peftfx.Pass:
    """A pass that inserts a branch and does something else beside."""
    do, read, placed = apply, plan, where

    @dataclass(frozen=True, kw_only=True)
    class Wrong(peftfx.LoRA, abstract=True):
        text: ClassVar[str] = "wrong"
        contract: ClassVar[Contract] = Contract(kind)
        where: str = placed

        def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
            if read is not None:
                read(program)
            return super().plan(program, data, sources)

        def insert(self, edit: Editor, site: Any) -> None:
            edit.add(site, branch(site))

        def apply(self, edit: Editor, plan: Plan) -> None:
            super().apply(edit, plan)
            if do is not None:
                do(edit)

    REGISTRY["wrong"] = Wrong
    return Wrong()


@pytest.fixture(autouse=True)
def unregistered() -> Any:
    yield
    REGISTRY.pop("wrong", None)


def negated(*names: str) -> Callable[[Editor], None]:
    def apply(edit: Editor) -> None:
        for name in names:
            value = -edit.graph_module.get_parameter(name).detach()
            set_attribute(edit.graph_module, name, nn.Parameter(value, requires_grad=False))

    return apply


def cast_output(edit: Editor) -> None:
    graph, out = edit.graph_module.graph, output_node(edit.graph_module)
    value: Any = out.args[0]
    with graph.inserting_before(out):
        new = graph.call_function(ATEN.to.dtype, (value[0], torch.float64))
    out.args = ((new, *value[1:]),)


def transposed_output(edit: Editor) -> None:
    graph, out = edit.graph_module.graph, output_node(edit.graph_module)
    value: Any = out.args[0]
    with graph.inserting_before(out):
        new = graph.call_function(ATEN.transpose.int, (value[0], 0, 1))
    out.args = ((new, *value[1:]),)


def no_dropout(edit: Editor) -> None:
    for module in edit.graph_module.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def more_dropout(edit: Editor) -> None:
    for module in edit.graph_module.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.7


class NaNAtOtherLengths(Plain):
    def branch(self, x: Tensor) -> Tensor:
        count = torch.ones_like(x[..., :1]).sum(1, keepdim=True)
        return super().branch(x) + torch.where(count == LENGTH, 0.0, float("nan"))


class RandomInEvaluation(Plain):
    def branch(self, x: Tensor) -> Tensor:
        return super().branch(F.dropout(x, 0.5, True)) + 1e-3 * torch.randn_like(x[..., :16])


class RandomOnceTrained(Plain):
    """At the last place alone, and nothing as long as b is zero."""

    def branch(self, x: Tensor) -> Tensor:
        y = super().branch(x)
        last = torch.zeros_like(y)
        last[(-1,) * (y.dim() - 1)] = 1.0
        return y * (1 + last * torch.randn_like(y))


class Drifting(Plain):
    def __init__(self, site: Any) -> None:
        super().__init__(site)
        self.register_buffer("count", torch.zeros(()))
        self.count: Tensor

    def branch(self, x: Tensor) -> Tensor:
        self.count.add_(1.0)
        return super().branch(x) + self.count


class Counting(Drifting):
    def branch(self, x: Tensor) -> Tensor:
        self.count.add_(1.0)
        return Plain.branch(self, x)


class CountingInTraining(Drifting):
    def branch(self, x: Tensor) -> Tensor:
        if self.training:
            self.count.add_(1.0)
        return Plain.branch(self, x)


class OffInTraining(Plain):
    def branch(self, x: Tensor) -> Tensor:
        y = super().branch(x)
        return y + 0.01 if self.training else y


class FailsInTraining(Plain):
    def branch(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("not here")
        return super().branch(x)


class Detached(Plain):
    def branch(self, x: Tensor) -> Tensor:
        return x @ self.a.T @ self.b.detach().T


class Unused(Plain):
    def __init__(self, site: Any) -> None:
        super().__init__(site)
        self.more = nn.Parameter(torch.zeros(3))


class AllDetached(Plain):
    def branch(self, x: Tensor) -> Tensor:
        return super().branch(x).detach()


class Lost(Plain):
    """Draws a mask from the global generator and does not save it."""

    def __init__(self, site: Any) -> None:
        super().__init__(site)
        self.register_buffer("mask", torch.rand(2), persistent=False)
        self.mask: Tensor

    def branch(self, x: Tensor) -> Tensor:
        return (x @ self.a.T * self.mask) @ self.b.T


def in_place(edit: Editor) -> None:
    with torch.no_grad():
        edit.graph_module.get_parameter("head.weight").mul_(1.5)


def hidden_in_place(program: peftfx.Program) -> None:
    program.module.get_parameter("head.weight").data.mul_(1.5)


def in_place_and_refuse(program: peftfx.Program) -> None:
    with torch.no_grad():
        program.module.get_parameter("head.weight").mul_(1.5)
    raise PassError("no")


def replaced(program: peftfx.Program) -> None:
    old = program.module.get_parameter("head.weight")
    old.data = old.data.clone()


def trains_the_base(edit: Editor) -> None:
    edit.program.base.module.get_parameter("up.weight").requires_grad_(True)


def forgets(**fields: Any) -> Callable[[Editor], None]:
    def apply(edit: Editor) -> None:
        for name, value in fields.items():
            setattr(edit.program, name, value)

    return apply


def renames_an_input(edit: Editor) -> None:
    from dataclasses import replace

    spec = edit.program.spec
    edit.program.spec = replace(spec, inputs=(replace(spec.inputs[0], name="y"),))


CASES: dict[str, tuple[dict[str, Any], str]] = {
    # outputs
    "a small output": ({"apply": negated("head.weight")}, "does not hold: .*score"),
    "a boolean output": ({"apply": negated("gate.weight", "gate.bias")}, "positive.*integers differ"),
    "a complex output": ({"apply": negated("wave.weight")}, "does not hold: .*wave"),
    "the dtype": ({"apply": cast_output, "kind": "trainable"}, "dtype changes from float32"),
    "the shape": ({"apply": transposed_output, "kind": "trainable"}, "shape changes|fixes|fit"),
    "NaN at other lengths": ({"branch": NaNAtOtherLengths, "kind": "trainable"}, "not finite any"),
    # evaluation
    "random in evaluation": ({"branch": RandomInEvaluation, "kind": "trainable"}, "draws random"),
    "random, bounded": ({"branch": RandomInEvaluation, "kind": "bounded"}, "draws random"),
    "random once trained": ({"branch": RandomOnceTrained}, "draws random"),
    "drifting state": ({"branch": Drifting, "kind": "trainable"}, "drifts in evaluation"),
    "a written buffer": ({"branch": Counting}, "writes .*count in evaluation"),
    # training
    "wrong in training": ({"branch": OffInTraining}, "does not hold in training mode"),
    "fails in training": ({"branch": FailsInTraining}, "does not run in training mode: not here"),
    "shared state": ({"branch": CountingInTraining}, "written in training mode.*updates_state"),
    "no dropout any more": ({"apply": no_dropout}, "noise changes in training"),
    "more dropout": ({"apply": more_dropout}, "noise changes in training"),
    "a detached parameter": ({"branch": Detached}, "no gradient reaches .*b .*detaches it"),
    "an unused parameter": ({"branch": Unused}, "no gradient reaches .*more "),
    "a detached branch": ({"branch": AllDetached}, "no gradient reaches "),
    # the program that it was given
    "in place in apply": ({"apply": in_place, "kind": "trainable"}, "head.weight was written"),
    "in place in plan": ({"plan": hidden_in_place, "kind": "trainable"}, "changed the program that"),
    "in place, then refused": ({"plan": in_place_and_refuse}, "head.weight was written in place"),
    "other memory": ({"plan": replaced}, "head.weight is another tensor"),
    "the base trains": ({"apply": trains_the_base}, "up.weight requires gradients"),
    # names
    "aliases": ({"apply": forgets(tensors=Tensors())}, "loses the alias 'tied.weight'"),
    "original names": ({"apply": forgets(state_names=())}, "loses the name of the original"),
    "an input's name": ({"apply": renames_an_input}, "loses the input 'x'"),
    "attachments": ({"apply": forgets(attachments=())}, "belongs to no adapter"),
    "examples": ({"apply": forgets(sample={})}, "loses the example of the input"),
    # tensors
    "a base tensor": (
        {"apply": negated("up.weight"), "kind": "trainable"}, "changed up.weight, a tensor of the b"
    ),
    "a value that is not saved": ({"branch": Lost}, "mask would be lost by saving"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_pass_is_caught(name: str) -> None:
    options, message = CASES[name]
    before = program()
    text = before.text()
    with pytest.raises(RewriteError, match=message):
        peftfx.run(before, [wrong(**options)])
    assert before.text() == text and before.history == ()


def test_the_same_pass_done_right_is_not(base: peftfx.Program) -> None:
    for kind in ("identity", "exact", "bounded", "trainable"):
        done = peftfx.run(base, [wrong(kind=kind)])
        assert done.history[-1].certificate.holds and done.history[-1].skipped == ()
        assert all(c.holds for c in done.verify())


def test_another_adapters_tensors_are_left_alone(base: peftfx.Program) -> None:
    first = peftfx.run(base, "lora{rank=2,where=ffn.up}")
    name = next(n for n in first.named_trainable_parameters() if n.endswith(".a"))
    pass_ = wrong(apply=negated(name), kind="trainable")
    with pytest.raises(VerifyError, match="a tensor of the adapter 'lora'"):
        peftfx.run(first, [pass_])


def test_a_place_that_the_model_detaches_is_reported() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x).detach()

    torch.manual_seed(0)
    cut = peftfx.capture(Cut().eval(), (torch.randn(2, 5, 8),))
    sites = [s.id for s in cut.sites.of("linear")]
    done = peftfx.run(cut, "lora{rank=2,where=linear}")
    skipped = dict(done.history[-1].skipped)
    assert len(sites) == 2 and len(skipped) == 2
    assert all(".b." in n and "detaches" in why for n, why in skipped.items())
    with pytest.raises(VerifyError, match="no gradient reaches any of its 2 parameters"):
        peftfx.run(cut, ["lora{rank=2,where='" + next(s for s in sites if s[0] == "b") + "'}"])


@pytest.mark.parametrize(("apart", "holds"), [(1e-7, True), (1e-2, False)])
def test_integers_may_differ_where_scores_are_tied(apart: float, holds: bool) -> None:
    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.head(x)
            return y.argmax(-1), y.topk(2, -1).indices[..., :1].squeeze(-1)

    torch.manual_seed(0)
    model = Choice().eval().requires_grad_(False)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([1.0 + apart, 1.0, 0.0]))
    before = peftfx.capture(model, (torch.randn(2, 5, 8),))
    after = before.fork()
    other = nn.Parameter(torch.tensor([1.0, 1.0 + apart, 0.0]), requires_grad=False)
    set_attribute(after.module, "head.bias", other)
    assert not torch.equal(before(torch.ones(1, 2, 8))[0], after(torch.ones(1, 2, 8))[0])
    contract = Contract("bounded")
    if holds:
        assert certify(contract, Witness(before), Witness(after)).holds
    else:
        with pytest.raises(VerifyError, match=r"10 of its .* integers differ|integers differ"):
            certify(contract, Witness(before), Witness(after))
    with pytest.raises(VerifyError, match="integers differ"):
        certify(Contract("exact"), Witness(before), Witness(after))
