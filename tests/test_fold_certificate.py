"""A folded weight is measured apart from the network, and partial folds leave others' tensors."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.passes.reparameterized.lora import LoRABranch
from peftfx.rewriter.api import Program
from peftfx.rewriter.branches.branch import Branch, Delta, OutputScale
from peftfx.rewriter.edits.folding import rules
from peftfx.rewriter.errors import NonFiniteError, PassError, VerifyError
from peftfx.rewriter.weights.certificate import Matrix, Verdict, check_folded
from peftfx.rewriter.weights.weight import Weight

from .test_verifier import program as verified

X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(16, 32) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(32, 16) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for up, down, norm in zip(self.up, self.down, self.norm, strict=True):
            x = x + down(torch.relu(up(norm(x))))
        return x


def net(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return Net().to(dtype).eval().requires_grad_(False)


def noisy(program: Program, by: float = 0.3, seed: int = 0) -> Program:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in program.trainable_parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * by)
    return program


def adapted(text: str, dtype: torch.dtype = torch.float32, by: float = 0.3) -> Program:
    return noisy(peftfx.run(captured(dtype), text), by)


@functools.cache
def captured(dtype: torch.dtype) -> Program:
    return peftfx.capture(net(dtype), (X.to(dtype),))


def smaller(branch: LoRABranch) -> Tensor:
    return 0.8 * (branch.b @ branch.a) * branch.scale


def negative(branch: LoRABranch) -> Tensor:
    return -(branch.b @ branch.a) * branch.scale


def swapped(branch: LoRABranch) -> Tensor:
    return (branch.b.flip(1) @ branch.a) * branch.scale


@pytest.mark.parametrize(("dtype", "by"), [
    (torch.bfloat16, 0.05), (torch.bfloat16, 0.5), (torch.float16, 0.05), (torch.float32, 0.5),
])  # fmt: skip
@pytest.mark.parametrize("wrong", [smaller, negative, swapped])
def test_a_wrong_matrix_is_refused_in_every_dtype(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, by: float, wrong: Any
) -> None:
    program = adapted("lora{rank=4,where=ffn.up}", dtype, by)
    good = peftfx.run(program, "fold").history[-1].certificate
    assert 0 < good.measured["branch"] < 1e-6
    monkeypatch.setattr(LoRABranch, "delta", wrong)
    monkeypatch.setattr(LoRABranch, "factors", lambda _: None)
    with pytest.raises(VerifyError, match=r"^up\.0\.weight: the branch peftfx\.lora\.up\.0\.delta"):
        peftfx.run(program, "fold")


def wide(tensor: Tensor) -> Any:
    return tensor.detach().float().numpy().astype(np.longdouble)


def is_nearest(rounded: Tensor, exact: Any) -> Any:
    """Whether neither neighbour of a number is nearer to the exact one."""
    gap, ends = abs(wide(rounded) - exact), (-float("inf"), float("inf"))
    beside = [rounded.nextafter(torch.full_like(rounded, end)) for end in ends]
    return np.minimum(*(abs(wide(n) - exact) for n in beside)) * (1 + 1e-9) >= gap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by", [0.01, 0.3])
def test_a_fold_is_the_nearest_number_to_the_exact_sum(dtype: torch.dtype, by: float) -> None:
    program = adapted("lora{rank=8,alpha=5,where=ffn.up}", dtype, by)
    folded = peftfx.run(program, "fold")
    for index in range(2):
        branch: Any = program.module.get_submodule(f"peftfx.lora.up.{index}.delta")
        old, new = (p.module.get_parameter(f"up.{index}.weight") for p in (program, folded))
        exact = wide(old) + np.longdouble(5 / 8) * (wide(branch.b) @ wide(branch.a))
        assert is_nearest(new, exact).all()
        if dtype == torch.float32:  # sums in float32 would be another matrix
            assert not is_nearest(old + 5 / 8 * (branch.b @ branch.a), exact).all()


def dropping(weight: Weight, branch: Branch) -> Weight:
    return weight


def halving(weight: Weight, branch: Branch) -> Weight:
    assert isinstance(branch, Delta)
    delta = branch.full_delta().detach()
    return weight.with_rows_changed(lambda block, rows: block.add_(delta[rows], alpha=0.5))


def without_bias(weight: Weight, branch: Branch) -> Weight:
    assert isinstance(branch, OutputScale)
    made = weight.with_rows(branch.full_scale().detach())
    return dataclasses.replace(made, bias=weight.bias)


@pytest.mark.parametrize(("method", "rule", "action"), [
    ("lora", "delta_rule", dropping), ("lora", "delta_rule", halving),
    ("ia3", "output_rule", dropping), ("ia3", "output_rule", without_bias),
    ("ia3", "input_rule", dropping), ("dora", "rows_rule", dropping),
])  # fmt: skip
@pytest.mark.parametrize(("dtype", "by"), [(torch.bfloat16, 0.3), (torch.float32, 1e-3)])
def test_a_fold_that_writes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch, method: str, rule: str, action: Callable[..., Any],
    dtype: torch.dtype, by: float,
) -> None:  # fmt: skip
    program = adapted(f"{method}{{where=ffn}}", dtype, by)
    table = tuple((p, action if p.name == rule else a) for p, a in rules.RULES)
    monkeypatch.setattr(rules, "RULES", table)
    with pytest.raises(VerifyError, match=r"\.\d\.weight.*what was written"):
        peftfx.run(program, "fold")


def test_small_adapters_are_not_lost_in_the_tolerance_of_the_outputs() -> None:
    """A change of outputs below the network's tolerance is still a change of weights."""
    program = adapted("lora{rank=4,where=ffn.up}", by=1e-4)
    assert peftfx.run(program, "fold").history[-1].certificate.holds
    table = tuple((p, dropping) for p, _ in rules.RULES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "RULES", table)
        with pytest.raises(VerifyError, match="what was written"):
            peftfx.run(program, "fold")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_method_is_exact_up_to_rounding(dtype: torch.dtype) -> None:
    program = adapted("lora{where=ffn};ia3{where=ffn};dora{name=d,where=ffn.up}", dtype)
    measured = peftfx.run(program, "fold").history[-1].certificate.measured
    assert 0 < measured["branch"] < 1e-6


def test_check_folded_by_hand() -> None:
    branch = LoRABranch(torch.ones(2, 3), torch.ones(4, 2), 0.5, 0.0)
    old = torch.randn(4, 3)
    good = Matrix(old + branch.delta().detach(), None, torch.float32)
    verdict = check_folded("w", Matrix(old, None, torch.float32), good, [("b", branch)])
    assert verdict.gap < 1e-6 and not verdict.vanished
    bad = Matrix(good.weight.clone(), None, torch.float32)
    bad.weight[2, 1] += 1e-5
    with pytest.raises(VerifyError, match=r"1 of 12 elements.*first in row 2"):
        check_folded("w", Matrix(old, None, torch.float32), bad, [("b", branch)])


def test_a_change_that_rounding_loses_wholly_is_a_warning_and_a_note() -> None:
    program = adapted("lora{rank=4,where=ffn.up}", torch.bfloat16, 0.0)
    with torch.no_grad():
        for name, tensor in program.named_trainable_parameters().items():
            if name.endswith(".b"):
                tensor.add_(1e-8)
    with pytest.warns(UserWarning, match=r"up\.0\.weight: rounding to bfloat16 left nothing"):
        folded = peftfx.run(program, "fold")
    assert folded.history[-1].certificate.measured["delta_lost"] == pytest.approx(1)
    assert "\n  up.0.weight: rounding to bfloat16" in str(folded.history[-1])


def test_the_tensor_that_is_not_finite_is_named() -> None:
    program = adapted("lora{rank=4,where=ffn}")
    with torch.no_grad():
        program.module.get_parameter("peftfx.lora.up.1.delta.b")[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"peftfx\.lora\.up\.1\.delta\.b holds NaN"):
        peftfx.run(program, "fold")

    broken = net()
    broken.up[1].weight[0, 0] = float("nan")
    program = noisy(peftfx.run(peftfx.capture(broken, (X,)), "lora{rank=4,where=ffn.up}"))
    with pytest.raises(NonFiniteError, match=r"base's own tensor up\.1\.weight holds NaN"):
        peftfx.run(program, "fold")

    program = adapted("lora{rank=4,where=ffn.up}", torch.float16)
    with torch.no_grad():
        program.module.get_parameter("peftfx.lora.up.1.delta.b").mul_(1e6)
    with pytest.raises(NonFiniteError, match=r"up\.1\.weight.*float16, whose largest.*6\.55e\+04"):
        peftfx.run(program, "fold")


PARTIAL = [("bitfit{where=linear}", "ia3{where=ffn}"),
           ("peqa{group=16,where=ffn}", "ia3{where=ffn.up}")]  # fmt: skip


@pytest.mark.parametrize(("kept", "gone"), PARTIAL)
def test_partial_folds_leave_what_other_adapters_train(
    kept: str, gone: str, tmp_path: Path
) -> None:
    program = adapted(f"{kept};{gone}")
    first, second = program.adapters
    folded = peftfx.run(program, f"fold{{names={second}}}")
    names = program.owned[first]
    assert names and all(folded.module.get_parameter(n).requires_grad for n in names)
    for name in names:
        assert folded.module.get_parameter(name).dtype == program.module.get_parameter(name).dtype
    torch.testing.assert_close(folded(X), program(X), rtol=1e-4, atol=1e-5)
    peftfx.save(folded, tmp_path / "a")
    loaded = peftfx.load(program.base, tmp_path / "a")
    assert torch.equal(loaded(X), folded(X))
    for other in (folded, loaded):
        assert torch.equal(other.without(second)(X), program.without(second)(X))
        torch.testing.assert_close(other.without(first)(X), program.without(first)(X))
    assert folded.verify()[-1].measured["max_rel"] == 0

    noisy(folded, 0.1, seed=1)  # training goes on
    peftfx.save(folded, tmp_path / "b")
    assert torch.equal(peftfx.load(program.base, tmp_path / "b")(X), folded(X))
    more = peftfx.run(folded, "serial_adapter")
    assert torch.equal(more.without("serial_adapter")(X), folded(X))
    with pytest.raises(PassError, match=r"was trained on after fold"):
        folded.without(second)
    torch.testing.assert_close(folded.without(first)(X), program.without(first)(X))


def test_folding_keeps_the_program_before() -> None:
    program = adapted("bitfit{where=linear};ia3{where=ffn}")
    before = copy.deepcopy({n: p.detach() for n, p in program.module.named_parameters()})
    peftfx.run(program, "fold{names=ia3}")
    assert all(torch.equal(p, before[n]) for n, p in program.module.named_parameters())


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.5])
@pytest.mark.parametrize("scale", [0.01, 0.1])
def test_a_fold_in_bfloat16_keeps_what_the_branch_does(
    monkeypatch: pytest.MonkeyPatch, scale: float, factor: float
) -> None:
    adapted = peftfx.run(verified(torch.bfloat16), "lora{rank=1,where=linear}")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    fold = "fold{tied=untie}"
    assert peftfx.run(adapted, fold).history[-1].certificate.holds
    delta = LoRABranch.delta
    monkeypatch.setattr(LoRABranch, "delta", lambda s: delta(s) * factor)
    monkeypatch.setattr(LoRABranch, "factors", lambda _: None)
    with pytest.raises(VerifyError, match="computes something else than what it folds"):
        peftfx.run(adapted, fold)
    # What only compares outputs has to see it, too.
    monkeypatch.setattr("peftfx.rewriter.edits.folding.fold.check_folded", lambda *_: Verdict(0.0))
    with pytest.raises(VerifyError, match=r"does not hold|integers"):
        peftfx.run(adapted, fold)
