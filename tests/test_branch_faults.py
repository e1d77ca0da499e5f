"""What a branch hides while what it adds is zero, and what it must not do to what it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import VerifyError
from peftfx.rewriter.pipeline.passes import REGISTRY
from peftfx.rewriter.program.history import Certificate
from peftfx.rewriter.verify.checks import Checks

from .test_verifier import Plain, wrong


@pytest.fixture(autouse=True)
def unregistered() -> Any:
    yield
    REGISTRY.pop("wrong", None)


class Small(nn.Module):
    def __init__(self, noise: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.noise = nn.Linear(16, 32), nn.Linear(32, 16), noise

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        return x + self.down(h + torch.randn_like(h) if self.noise else h)


def small(noise: bool = False) -> peftfx.Program:
    torch.manual_seed(0)
    model = Small(noise).eval().requires_grad_(False)
    return peftfx.capture(model, (torch.randn(2, 5, 16),))


def inserted(branch: Any, base: peftfx.Program | None = None) -> peftfx.Program:
    return peftfx.run(base or small(), [wrong(branch=branch, where="down")])


class AlwaysDrops(Plain):
    def branch(self, x: Tensor) -> Tensor:
        return F.dropout(super().branch(x), 0.5, True)


class Steps(Plain):
    """Its output depends on how often it was called, which no buffer tells."""

    def __init__(self, site: Any) -> None:
        super().__init__(site)
        self.calls = 0

    def branch(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().branch(x) * self.calls


@pytest.mark.parametrize(
    ("branch", "noise", "message"),
    [
        (AlwaysDrops, False, "draws random numbers in evaluation mode, which the captured"),
        (AlwaysDrops, True, "draws more random numbers in evaluation mode"),
        (Steps, False, "drifts in evaluation mode"),
    ],
)
def test_what_zeros_hide_is_seen(branch: Any, noise: bool, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        inserted(branch, small(noise))


def test_noise_of_the_model_is_its_own() -> None:
    done = peftfx.run(inserted(Plain, small(noise=True)), "ia3{where=up}")
    assert all(c.holds for c in done.verify())


def test_an_earlier_branch_excuses_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # as a version that did not look made it
        patch.setattr(Checks, "finish", lambda *_: (Certificate("unchecked"), ()))
        bad = inserted(AlwaysDrops)
    with pytest.raises(VerifyError, match="draws random numbers in evaluation mode"):
        bad.verify()
    with torch.no_grad():
        for parameter in bad.trainable_parameters():
            parameter.add_(0.1)
    with pytest.raises(VerifyError, match="draws random numbers in evaluation mode"):
        bad.verify()
    with pytest.raises(VerifyError, match="draws random numbers in evaluation mode"):
        peftfx.run(bad, "ia3{where=up}")


class InPlace(Plain):
    def branch(self, x: Tensor) -> Tensor:
        return super().branch(x.mul_(1.0))


class InPlaceInTraining(Plain):
    def branch(self, x: Tensor) -> Tensor:
        return super().branch(x.add_(0.0) if self.training else x)


class FailsAtOneRow(Plain):
    def branch(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and x.shape[0] == 1:
            raise KeyError("one row")
        return super().branch(x)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise ZeroDivisionError("not derived yet")


class FailsInBackward(Plain):
    def branch(self, x: Tensor) -> Tensor:
        kept: Any = NoBackward.apply(super().branch(x))  # type: ignore[no-untyped-call]
        return kept


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (InPlace, "wrong.*the branch peftfx.* at down.weight writes its input in place"),
        (InPlaceInTraining, "the branch peftfx.* at down.weight writes its input in place"),
        (FailsAtOneRow, "wrong.*the branch peftfx.* at down.weight fails: KeyError: 'one row'"),
        (FailsInBackward, "backward of the branch .* at down.weight fails: .*not derived yet"),
    ],
)
def test_a_failing_branch_is_named(branch: Any, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        inserted(branch)


class Transient(Plain):
    def __init__(self, site: Any) -> None:
        super().__init__(site)
        self.register_buffer("mask", torch.ones(2), persistent=False)
        self.mask: Tensor
        self.plain = torch.ones(2)

    def branch(self, x: Tensor) -> Tensor:
        return (x @ self.a.T * self.mask * self.plain) @ self.b.T


@pytest.mark.parametrize("name", ["mask", "plain"])
def test_a_changed_value_that_is_not_saved_is_refused(tmp_path: Path, name: str) -> None:
    done = inserted(Transient)
    peftfx.save(done, tmp_path / "unchanged")
    tensor = getattr(done.branch(done.attachments[0]), name)
    tensor[0] = 3.0
    for refusing in (done.verify, lambda: peftfx.save(done, tmp_path / "changed")):
        with pytest.raises(VerifyError, match=f"{name} was changed outside of training"):
            refusing()
    assert not (tmp_path / "changed").exists()
    tensor[0] = 1.0
    peftfx.save(done, tmp_path / "changed")


def test_a_drawn_plain_tensor_is_refused() -> None:
    class Drawn(Transient):
        def __init__(self, site: Any) -> None:
            super().__init__(site)
            self.plain = torch.rand(2)

    with pytest.raises(VerifyError, match="plain would be lost by saving"):
        inserted(Drawn)
