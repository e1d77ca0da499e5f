"""SAID and DID against `theta_0 + lambda P theta` with projections from numpy, and what they cost."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftfx
from peftfx.passes.reparameterized.said import ProjectedDelta
from peftfx.rewriter.errors import OptionError
from peftfx.rewriter.program.sites import LinearSite

from ..kernels import projected
from ..models import batch, first, moved, randomise
from .common import check

EVERY = "linear|conv|experts|norm|embedding"


def branches(program: peftfx.Program) -> dict[str, ProjectedDelta]:
    """By the name of the stored tensor."""
    found: dict[str, ProjectedDelta] = {}
    for attachment in program.attachments:
        branch = program.branch(attachment)
        assert isinstance(branch, ProjectedDelta)
        found[branch.piece.name] = branch
    return found


def theta_of(program: peftfx.Program) -> Tensor:
    (path,) = program.shared
    return program.module.get_parameter(f"{path}.theta")


def change(theta: Tensor, scale: Tensor | None, index: int, seed: int, sizes: Any) -> Tensor:
    """lambda P theta, of a tensor of these sizes."""
    p = projected.fastfood(theta.detach().double().numpy(), seed, index, math.prod(sizes))
    return torch.tensor(p).view(sizes) * (1.0 if scale is None else float(scale.detach()))


def reference(model: Any, program: peftfx.Program, seed: int = 0) -> Any:
    """A copy of the plain model with `theta_0 + lambda P theta` as its parameters."""
    other = copy.deepcopy(model)
    held = dict(other.named_parameters())
    with torch.no_grad():
        for index, (name, branch) in enumerate(branches(program).items()):
            part = branch.piece
            delta = change(theta_of(program), branch.scale, index, seed, part.own_shape)
            if part.rows is None:
                held[name] += delta
            else:
                held[name].index_add_(part.axis, torch.tensor(part.rows), delta.to(held[name]))
    return other


@pytest.mark.parametrize("options", ["", ",structure_aware=false", ",seed=5,bias=false"])
def test_it_is_its_formula(hand: Any, options: str) -> None:
    _, model, base = hand
    program = randomise(peftfx.run(base, f"said{{dimension=100{options}}}"), 0.5)
    inputs = batch(4, 11, pad=3)
    seed = 5 if "seed" in options else 0
    check(program, base, reference(model, program, seed)(**inputs), inputs)
    tensors = {n for n, _ in model.named_parameters() if "bias=" not in options or "bias" not in n}
    assert branches(program).keys() <= tensors
    scales = 0 if "aware" in options else len(branches(program))
    assert len(theta_of(program)) == 100 - scales
    assert sum(p.numel() for p in program.trainable_parameters()) == 100


def test_its_gradients_are_those_of_the_formula(hand: Any) -> None:
    """P^T of the gradient that a plain copy has, and its products with P theta for lambda."""
    _, model, base = hand
    program = randomise(peftfx.run(base, "said{dimension=100}"), 0.5)
    plain, inputs = reference(model, program), batch(2, 7)
    for module in (program.module, plain):
        first(module(**inputs)).square().sum().backward()
    theta = theta_of(program)
    want = torch.zeros(len(theta), dtype=torch.float64)
    largest = max(float(p.grad.norm()) for p in plain.parameters() if p.grad is not None)
    for index, (name, branch) in enumerate(branches(program).items()):
        own = plain.get_parameter(name).grad
        if own is None:  # the output is not computed from it
            assert branch.scale is not None and not branch.scale.grad
            continue
        gradient = own.double()
        one = change(theta, None, index, 0, gradient.shape)
        assert branch.scale is not None and branch.scale.grad is not None
        # A bias of keys moves no attention: its gradient is what the others' rounding leaves.
        size = max(float(gradient.norm()), 0.01 * largest) * float(one.norm())
        assert abs(float(branch.scale.grad) - float((gradient * one).sum())) < 1e-5 * size
        for place in (0, 50):  # two entries of P^T g
            unit = torch.zeros(len(theta))
            unit[place] = 1
            want[place] += (gradient * change(unit, branch.scale, index, 0, gradient.shape)).sum()
    assert theta.grad is not None
    for place in (0, 50):
        assert abs(float(theta.grad[place] - want[place])) < 1e-4 * float(theta.grad.abs().max())


def test_the_released_gradient_is_smaller_by_the_length(captured: Any) -> None:
    """The same value, and one number less; each tensor's part of theta's gradient over L."""
    base = captured["encoder"][1]
    inputs = batch(2, 7)
    # What lambda gets is right there, too.
    gradients: dict[bool, list[Tensor]] = {}
    for released, count in ((False, 51), (True, 52)):
        text = f"said{{where=q and layer==1,bias=false,dimension={count},compat={released}}}"
        program = randomise(peftfx.run(base, text.lower()), 0.5)
        assert len(theta_of(program)) == 50
        first(program(**inputs)).square().sum().backward()
        gradients[released] = [p.grad for p in program.trainable_parameters() if p.grad is not None]
    for mine, theirs in zip(gradients[False], gradients[True], strict=True):
        length = 1024 if mine.dim() else 1  # of 32 x 32 entries
        torch.testing.assert_close(theirs * length, mine)


def test_rows_of_a_fused_weight(zoo: Any) -> None:
    """Where queries, keys and values are one weight, those that are selected change alone."""
    base, model = zoo["gpt2"], zoo.model("gpt2")
    program = randomise(peftfx.run(base, "said{dimension=40,where=q}"), 3.0)
    parts = [b.piece for b in branches(program).values()]
    assert all(p.rows is not None and p.own_shape != p.shape for p in parts)
    inputs = {n: t for n, t in batch(2, 7).items() if n in base.spec.names}
    check(program, base, reference(model, program)(**inputs), inputs)


def test_it_folds_exactly(captured: Any, tmp_path: Path) -> None:
    model, base = captured["encoder"]
    program = randomise(peftfx.run(base, "said{dimension=100}"), 0.5)
    folded = peftfx.run(program, "fold")
    assert not folded.attachments and not folded.shared
    inputs = batch(4, 11, pad=3)
    assert torch.equal(first(folded(**inputs)), first(program(**inputs)))
    wide = reference(copy.deepcopy(model).double(), program)
    for name, tensor in folded.export_state_dict().items():
        want = wide.state_dict()[name]
        torch.testing.assert_close(tensor.double(), want.double(), rtol=1e-5, atol=1e-6)


def test_files_hold_theta_alone(captured: Any, tmp_path: Path) -> None:
    """And replays need no data: the numbers are those of the seed."""
    model, base = captured["encoder"]
    program = randomise(peftfx.run(base, "said{dimension=100}"), 0.5)
    peftfx.save(program, tmp_path / "a")
    held = load_file(tmp_path / "a" / "tensors.safetensors")
    assert sum(t.numel() for t in held.values()) == 100
    again = peftfx.load(model, tmp_path / "a")
    assert torch.equal(first(again(**batch())), first(program(**batch())))


def test_backward_keeps_nothing_of_a_projection(captured: Any) -> None:
    program = peftfx.run(captured["encoder"][1], "said{dimension=100}").train()
    theta = theta_of(program)
    for branch in branches(program).values():
        kept: list[Tensor] = []

        def pack(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        stored = torch.zeros(branch.piece.shape)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            branch(stored, theta=theta)
        assert kept and all(t.numel() <= len(theta) for t in kept)


@pytest.mark.parametrize("projection", ["fastfood", "dense"])
def test_the_curve_over_d_has_its_knee(projection: str) -> None:
    """Ten equations for 960 weights: Li et al.'s toy task, whose intrinsic dimension is ten."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(960, 1, bias=False))
    x, y = torch.randn(10, 960), torch.randn(10, 1)
    base = peftfx.capture(model, (x,))
    left: dict[int, float] = {}
    for d in (4, 8, 9, 10, 14, 20):
        said = f"dimension={d},structure_aware=false,projection={projection},where=linear"
        program = peftfx.run(base, f"said{{{said}}}")
        theta = theta_of(program)
        rows = [torch.autograd.grad(program(x)[i, 0], theta)[0] for i in range(10)]
        a, b = torch.stack(rows).double(), (y - model(x)).detach().double()
        best = torch.linalg.lstsq(a, b, driver="gelsd").solution
        left[d] = float((a @ best - b).norm() / b.norm())
    assert all(left[d] > 0.02 for d in (4, 8, 9)), left
    assert all(left[d] < 1e-6 for d in (10, 14, 20)), left


def test_it_learns_a_planted_change(captured: Any) -> None:
    """SAID with Adam, on outputs of a model that a theta of its own changed."""
    base = captured["encoder"][1]
    inputs = batch(8, 9)
    planted = randomise(peftfx.run(base, "said{dimension=60}"), 0.3)
    want = first(planted(**inputs)).detach()
    program = peftfx.run(base, "said{dimension=60}").train()
    optimizer = torch.optim.Adam(program.trainable_parameters(), lr=0.03)
    losses: list[float] = []
    for _ in range(60):
        loss = (first(program(**inputs)) - want).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


def test_a_tied_tensor_is_one(zoo: Any) -> None:
    program = peftfx.run(zoo["gpt2"], "said{dimension=100}")
    names = [b.piece.name for b in branches(program).values()]
    assert len(set(names)) == len(names)
    sites = [s for s in program.sites if isinstance(s, LinearSite) and s.role == "head"]
    assert all(s.weight in names for s in sites)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("dimension=0", "at least 1"),
        ("dimension=4,where=q", r"above 4, with a scale for each of 4 tensors. Choose a larger"),
        ("dimension=5,where=q,compat=true", "above 5"),
        ("dimension=2113,where=q", "at most 2112, the entries selected. Choose a smaller one"),
        ("projection=fourier", "fastfood"),
    ],
)
def test_bad_options_are_refused(captured: Any, options: str, says: str) -> None:
    base = captured["encoder"][1]
    with pytest.raises(OptionError, match=says):
        peftfx.run(base, f"said{{{options}}}")
    assert moved(first(base(**batch())), first(base(**batch()))) == 0
    enough = peftfx.run(base, "said{dimension=4,where=q,structure_aware=false}")
    assert len(theta_of(enough)) == 4
