"""What initial values hide: samples and tokens that mix, gradients that are cut, and what acts in
training only. Measured as if the branches had trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.branches.branch import Delta, Serial
from peftfx.rewriter.edits.edit import Editor
from peftfx.rewriter.errors import VerifyError
from peftfx.rewriter.pipeline.passes import REGISTRY
from peftfx.rewriter.program.history import Certificate
from peftfx.rewriter.verify.checks import Checks

from .models import Decoder, EncoderLayer, batch, randomise
from .test_verifier import Plain, wrong


@pytest.fixture(autouse=True)
def unregistered() -> Any:
    yield
    REGISTRY.pop("wrong", None)


class Open(nn.Module):
    """A block in which all tokens see all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = EncoderLayer(16, 2, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, None)


@pytest.fixture(scope="module")
def causal() -> peftfx.Program:
    torch.manual_seed(0)
    return peftfx.capture(Decoder(layers=1).eval().requires_grad_(False), kwargs=batch())


@pytest.fixture(scope="module")
def bidirectional() -> peftfx.Program:
    torch.manual_seed(0)
    return peftfx.capture(Open().eval().requires_grad_(False), (torch.randn(2, 5, 16),))


def inserted(base: peftfx.Program, branch: Any, where: str = "ffn.up") -> peftfx.Program:
    return peftfx.run(base, [wrong(branch=branch, where=where)])


class OverSamples(Plain):
    def branch(self, x: Tensor) -> Tensor:
        return super().branch(x - x.mean(0, keepdim=True))


class OverTokens(Plain):
    def branch(self, x: Tensor) -> Tensor:
        return super().branch(x - x.mean(1, keepdim=True))


class NextToken(Plain):
    def branch(self, x: Tensor) -> Tensor:
        return super().branch(x.roll(-1, 1))


class Cut(Plain):
    def branch(self, x: Tensor) -> Tensor:
        return super().branch(x.detach())


class PartlyCut(Plain):
    def branch(self, x: Tensor) -> Tensor:
        return super().branch(0.7 * x + 0.3 * x.detach())


class InTrainingOnly(Plain):
    def branch(self, x: Tensor) -> Tensor:
        y = super().branch(x)
        return 1.5 * y if self.training else y


class Dropping(Plain):
    def branch(self, x: Tensor) -> Tensor:
        return super().branch(torch.dropout(x, 0.3, self.training))


WRONG = {
    "samples": (OverSamples, "samples of a batch influence one another.*'batch'"),
    "mean of tokens": (OverTokens, "earlier tokens see later ones.*'sequence'"),
    "next token": (NextToken, "earlier tokens see later ones.*'sequence'"),
    "detached": (Cut, "ffn|up.*does not give back the gradient.*100% are missing.*detach"),
    "partly detached": (PartlyCut, "does not give back the gradient.*30% are missing"),
    "in training": (InTrainingOnly, "computes something else in training.*by 0.5 "),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_training_would_show_is_seen(causal: peftfx.Program, name: str) -> None:
    branch, message = WRONG[name]
    with pytest.raises(VerifyError, match=message):
        inserted(causal, branch)


@pytest.mark.parametrize("name", ["samples", "mean of tokens", "partly detached", "in training"])
def test_verify_sees_it_too(
    causal: peftfx.Program, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch, message = WRONG[name]
    with monkeypatch.context() as patch:  # as a version that did not look made it
        patch.setattr(Checks, "finish", lambda *_: (Certificate("unchecked"), ()))
        bad = inserted(causal, branch)
    with pytest.raises(VerifyError, match=message):
        bad.verify()


@pytest.mark.parametrize("branch", [Plain, Dropping])
def test_right_branches_pass(causal: peftfx.Program, branch: Any) -> None:
    assert inserted(causal, branch).history[-1].certificate.holds


@pytest.mark.parametrize("branch", [OverTokens, NextToken])
def test_where_all_tokens_see_all_a_branch_may(bidirectional: peftfx.Program, branch: Any) -> None:
    assert inserted(bidirectional, branch, "fc1").history[-1].certificate.holds
    with pytest.raises(VerifyError, match="samples of a batch influence"):
        inserted(bidirectional, OverSamples, "fc1")


class CutAdapter(Serial):
    """`h + f(h)`, whose skip still carries gradients."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width, width))

    def update(self, h: Tensor) -> Tensor:
        return h.detach() @ self.w


def test_a_skip_hides_no_cut(causal: peftfx.Program) -> None:
    class Adapter(peftfx.SerialAdapter, abstract=True):
        text: ClassVar[str] = "wrong"

        def insert(self, edit: Editor, site: Any) -> None:
            edit.after(site, CutAdapter(site.width))

    REGISTRY["wrong"] = Adapter
    with pytest.raises(VerifyError, match="does not give back the gradient"):
        peftfx.run(causal, [Adapter()])


@pytest.mark.parametrize(
    ("branch", "said"),
    [
        (OverSamples, "samples"),
        (OverTokens, "tokens"),
        (Cut, "gradients"),
        (InTrainingOnly, "modes"),
    ],
)
def test_a_pass_may_say_so(causal: peftfx.Program, branch: Any, said: str) -> None:
    pass_ = wrong(branch=branch, where="ffn.up")
    type(pass_).departures = property(lambda _: frozenset([said]))  # pyright: ignore[reportAttributeAccessIssue]
    done = peftfx.run(causal, [pass_])
    assert all(c.holds for c in done.verify())
    type(pass_).departures = property(lambda _: frozenset())  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(VerifyError, match=f"hold '{said}'"):
        done.verify()


class Scaled(Plain):
    def __init__(self, site: Any) -> None:
        super().__init__(site)
        self.factor, self.kind = 1.0, "plain"

    def branch(self, x: Tensor) -> Tensor:
        return self.factor * super().branch(x)


def test_a_changed_number_is_refused(causal: peftfx.Program, tmp_path: Path) -> None:
    program = randomise(inserted(causal, Scaled))
    branch: Any = program.branch(program.attachments[0])
    branch.factor = 3.0
    message = r"\.factor was changed outside of training, from 1\.0 to 3\.0.*lost by saving"
    for fork in (program, program.fork()):
        with pytest.raises(VerifyError, match=message):
            peftfx.save(fork, tmp_path / "a")
        with pytest.raises(VerifyError, match=message):
            fork.verify()
        with pytest.raises(VerifyError, match=message):
            peftfx.run(fork, "ia3")
    assert not (tmp_path / "a").exists()
    branch.factor = 1.0
    peftfx.save(program, tmp_path / "a")


class Noisy(nn.Module):
    def __init__(self, drifts: bool) -> None:
        super().__init__()
        self.up, self.down, self.drifts = nn.Linear(16, 32), nn.Linear(32, 16), drifts
        self.register_buffer("count", torch.zeros(()))
        self.count: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.drifts:
            self.count.add_(0.1)
            return self.down(self.up(x)) + self.count
        return self.down(self.up(x) + torch.randn_like(x[..., :1]))


@pytest.mark.parametrize(
    ("drifts", "said"),
    [(False, "draws random numbers in evaluation"), (True, "state drifts in evaluation mode")],
)
def test_the_record_says_that_the_model_does_not_repeat_itself(drifts: bool, said: str) -> None:
    torch.manual_seed(0)
    base = peftfx.capture(Noisy(drifts).eval().requires_grad_(False), (torch.randn(2, 5, 16),))
    done = peftfx.run(base, "lora{rank=2,where=up};ia3{where=down}")
    for record in done.history:
        assert said in record.certificate.given and said in str(record)
    assert all(said in c.given for c in done.verify()[:2])
    steady = peftfx.capture(Open().eval().requires_grad_(False), (torch.randn(2, 5, 16),))
    assert peftfx.run(steady, "lora").history[-1].certificate.given == ""


class Cancelling(nn.Module):
    """A second output in which equal numbers cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(16, 32), nn.LayerNorm(32, elementwise_affine=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(self.up(x))
        return h, h.mean(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_output_of_rounding_alone_folds(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = Cancelling().to(dtype).eval().requires_grad_(False), torch.randn(2, 5, 16).to(dtype)
    program = randomise(peftfx.run(peftfx.capture(model, (x,)), "lora{rank=2,where=up}"))
    folded = peftfx.run(program, "fold")
    with torch.no_grad():
        want, got = program(x), folded(x)
    tiny = 100 * torch.finfo(dtype).eps
    assert 0 < float((want[1] - got[1]).abs().max()) < tiny
    assert float(want[1].abs().max()) < tiny and float(want[0].abs().max()) > 1
    # A wrong fold is still seen in the other output.
    monkeypatch.setattr("peftfx.rewriter.edits.folding.fold.check_folded", _unchecked)
    monkeypatch.setattr("peftfx.passes.reparameterized.lora.LoRABranch.delta", _double)
    monkeypatch.setattr("peftfx.passes.reparameterized.lora.LoRABranch.factors", lambda _: None)
    with pytest.raises(VerifyError, match="does not hold"):
        peftfx.run(program, "fold")


def _unchecked(*_: Any) -> Any:
    from peftfx.rewriter.weights.certificate import Verdict

    return Verdict(0.0)


def _double(branch: Any) -> Tensor:
    return 2 * branch.scale * branch.b @ branch.a


class Small(nn.Module):
    """A second output that is small, and no rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = 1e3 * self.up(x)
        return h, 1e-9 * self.head(h)


def test_a_small_output_is_not_taken_for_rounding() -> None:
    torch.manual_seed(0)
    base = peftfx.capture(Small().eval().requires_grad_(False), (torch.randn(2, 5, 16),))
    wrong_one: Any = base.fork()
    with torch.no_grad():
        weight = wrong_one.module.get_parameter("head.weight")
        weight.data = 1.01 * weight.detach()
    from peftfx.rewriter.verify.verify import measure

    assert measure(base, wrong_one)["max_rel"] > 5e-3


def test_linear_only_so_far(causal: peftfx.Program) -> None:
    """A branch that saturates outside of what inputs usually are does not fold."""

    class Clipped(Delta):
        low: ClassVar[float] = 0.0

        def __init__(self, site: Any) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(site.out_features, site.in_features))

        def branch(self, x: Tensor) -> Tensor:
            x = torch.where(x.abs() < self.low, 0.0, nn.functional.hardtanh(x, -6.0, 6.0))
            return x @ self.w.to(x.dtype).T

        def delta(self) -> Tensor:
            return self.w

    program = randomise(inserted(causal, Clipped))
    with pytest.raises(VerifyError, match="computes something else than what it folds"):
        peftfx.run(program, "fold")
    with torch.no_grad():
        for branch in map(program.branch, program.attachments):
            assert isinstance(branch, Clipped)
            branch.__class__ = type("Dead", (Clipped,), {"low": 5e-2})
            branch.branch = lambda x, w=branch.w: (x * (x.abs() > 5e-2)) @ w.to(x.dtype).T
    with pytest.raises(VerifyError, match="computes something else than what it folds"):
        peftfx.run(program, "fold")


def test_what_an_earlier_pass_said_goes_for_later_ones(captured: Any) -> None:
    """CoDA chooses tokens by later ones, whatever is inserted behind it."""
    base = captured["decoder"][1]
    program = peftfx.run(base, "coda{bottleneck=4,causal=prefill};prompt_tuning{length=3}")
    assert len(program.history) == 2
    assert all(c.holds for c in program.verify())
