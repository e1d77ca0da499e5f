"""SoRA against its equations, and the released update; a planted rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.passes.reparameterized.lora import LoRABranch
from peftfx.passes.reparameterized.sora import SoRABranch
from peftfx.rewriter.errors import OptionError

from ..models import batch, first, moved, randomise
from .common import Tensors, check, hooked, tensors

TEXT = "sora{rank=4,alpha=6,strength=0.9,where=q|v}"


def reference(
    model: nn.Module, tensors: Tensors, inputs: Mapping[str, Tensor], scale: float
) -> Any:
    """y = W x + b + s B (g * A x)."""

    def hook(t: Mapping[str, Tensor]) -> Callable[..., Tensor]:
        return lambda i, o: o + scale * (i[0] @ t["a"].T * t["g"]) @ t["b"].T

    with hooked(model, {n: hook(t) for n, t in tensors.items()}):
        return model(**inputs)


def test_sora_equals_its_reference(hand: Any) -> None:
    _, model, base = hand
    program = randomise(peftfx.run(base, "sora{rank=4,alpha=6,where=linear}"))
    inputs = batch(4, 11, pad=3)
    check(program, base, reference(model, tensors(program), inputs, 1.5), inputs)


def test_it_starts_as_lora_with_normal_gates(captured: Any) -> None:
    _, base = captured["llama"]
    d, kv, f, layers = 32, 16, 64, 2
    program = peftfx.run(base, "sora{rank=4}")
    sizes = ((d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d))  # q, k, v, o, ffn
    count = sum(p.numel() for p in program.trainable_parameters())
    assert count == layers * sum(4 * (k + o + 1) for k, o in sizes)
    gates = torch.cat([t["g"] for t in tensors(program).values()])
    assert abs(float(gates.mean())) < 0.4 and 0.7 < float(gates.std()) < 1.3
    assert not any(t["b"].any() for t in tensors(program).values())


def test_the_fold_is_exact(captured: Any) -> None:
    for name in ("encoder", "fused"):
        inputs = batch() if name == "encoder" else {"input_ids": batch()["input_ids"]}
        base = captured.double(name)
        program = randomise(peftfx.run(base, TEXT), 0.3)
        folded = peftfx.run(program, "fold")
        want = first(program(**inputs))
        torch.testing.assert_close(first(folded(**inputs)), want, rtol=1e-12, atol=1e-12)
        assert moved(first(base(**inputs)), want) > 0.01


def started(
    base: peftfx.Program, text: str, steps: int, lr: float = 0.1, kind: Any = torch.optim.SGD
) -> tuple[peftfx.Program, Any, Any]:
    program = peftfx.run(base, text)
    controllers = peftfx.controllers(program)
    optimizer = kind(controllers.param_groups(lr, weight_decay=0.01))
    controllers.start(optimizer, steps)
    return program, controllers, optimizer


GATE = torch.tensor([0.05, 0.12, 0.19, 0.25, -0.15, -0.30])


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ("strength=0.1,threshold=absolute", [0, 0.02, 0.09, 0.15, -0.05, -0.20]),
        ("strength=0.1,threshold=absolute,prox=reference", [0, 0, 0, 0.15, 0, -0.20]),
        ("strength=1.0", [0, 0.02, 0.09, 0.15, -0.05, -0.20]),  # at a rate of 0.1
        ("strength=0.0", GATE.tolist()),
    ],
)
def test_the_proximal_step(captured: Any, options: str, want: list[float]) -> None:
    """`sign(g) max(|g| - cut, 0)`; as released, all below twice the cut is zero."""
    _, base = captured["decoder"]
    program, controllers, optimizer = started(base, f"sora{{rank=6,{options},where=q}}", 10)
    for attachment in program.attachments:
        branch: Any = program.branch(attachment)
        branch.g.data.copy_(GATE)
    controllers.after_step(0)
    branches: list[Any] = [program.branch(a) for a in program.attachments]
    for branch in branches:
        torch.testing.assert_close(branch.g.detach(), torch.tensor(want), atol=1e-7, rtol=0)
    if "threshold" not in options and "0.0" not in options:  # a schedule of the rate moves the cut
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[-1]["lr"] = 0.05
        controllers.after_step(1)
        again = torch.tensor(want)
        torch.testing.assert_close(
            branches[0].g.detach(),
            again.sign() * (again.abs() - 0.05).clamp(min=0),
            atol=1e-7,
            rtol=0,
        )


def test_the_l1_term_is_the_mean_of_all_gates(captured: Any) -> None:
    _, base = captured["decoder"]
    program = randomise(peftfx.run(base, "sora{rank=4,l1=10,where=q|v}"))
    gates = torch.cat([t["g"] for t in tensors(program).values()])
    assert len(gates) == 4 * 4
    got = peftfx.controllers(program).loss(None)
    torch.testing.assert_close(got, 10 * gates.abs().sum() / 16)
    assert got.requires_grad
    assert peftfx.controllers(peftfx.run(base, TEXT)).loss(None) == 0.0


def test_strength_grows_in_stages() -> None:
    linear = peftfx.SoRA(strength=0.1, strongest=0.7, stages=7)
    got = [linear.strength_at(step, 70) for step in range(70)]
    assert got == pytest.approx([0.1 * (1 + step // 10) for step in range(70)])
    log = peftfx.SoRA(strength=0.1, strongest=10.0, stages=3, spacing="log")
    assert [log.strength_at(s, 9) for s in (0, 3, 6, 8)] == pytest.approx([0.1, 1, 10, 10])
    assert peftfx.SoRA(strength=0.2).strength_at(99, 100) == 0.2


@pytest.mark.parametrize("lower", ["", ";lower{target=cpu}"])
def test_training_prunes_and_finish_removes(captured: Any, lower: str, tmp_path: Path) -> None:
    model, base = captured["encoder"]
    program, controllers, optimizer = started(base, TEXT + lower, 30, 0.05, torch.optim.AdamW)
    program.train()
    for step in range(30):
        inputs = batch(4, 9, step)
        controllers.begin_forward(inputs)
        first(program(**inputs)).square().mean().backward()
        controllers.before_step(step)
        optimizer.step()
        controllers.after_step(step)
        optimizer.zero_grad()
    program.eval()
    branches: list[Any] = [program.branch(a) for a in program.attachments]
    with torch.no_grad():  # one site without any rank, and one with all
        branches[0].g.zero_()
        branches[1].g.fill_(1.0)
    left = [int(b.g.count_nonzero()) for b in branches]
    assert left[0] == 0 and left[1] == 4 and sum(left) < 12
    want = first(program(**batch()))
    smaller = peftfx.run(program, controllers.finish())
    torch.testing.assert_close(first(smaller(**batch())), want, rtol=1e-5, atol=1e-6)
    held = [smaller.branch(a) for a in smaller.attachments]
    assert all(type(b) is LoRABranch and b.scale == 1.5 for b in held)
    assert sum(p.numel() for p in smaller.trainable_parameters()) == sum(left) * (32 + 32)
    assert not peftfx.controllers(smaller).finish().passes
    peftfx.save(smaller, tmp_path / "a")
    loaded = peftfx.load(model, tmp_path / "a")
    near = 1e-6 if lower else 0.0  # a lowering is not saved
    torch.testing.assert_close(
        first(loaded(**batch())), first(smaller(**batch())), rtol=near, atol=near
    )
    folded = peftfx.run(smaller, "fold")
    torch.testing.assert_close(first(folded(**batch())), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(first(smaller.without("sora")(**batch())), first(base(**batch())))
    peftfx.save_peft(program, tmp_path / "theirs")
    again = peftfx.load_peft(base, tmp_path / "theirs")
    torch.testing.assert_close(first(again(**batch())), want, rtol=1e-5, atol=1e-6)


def test_files_tell_it_before_and_after(captured: Any, tmp_path: Path) -> None:
    """By passes alone: scales stay those of the first rank, rank stabilised ones, too."""
    from peftfx.exporters.adapter_changes import describe

    _, base = captured["decoder"]
    program = randomise(peftfx.run(base, "sora{rank=4,alpha=6,rslora=true,where=q}"))
    branch: Any = program.branch(program.attachments[0])
    branch.g.data[1:3] = 0
    for each, rank in ((program, 4), (peftfx.run(program, "bake"), 2)):
        peftfx.save(each, tmp_path / str(rank))
        place = describe(tmp_path / str(rank)).places[0]
        assert (place.rank, place.scale) == (rank, 3.0)
        assert place.norm == pytest.approx(float(branch.delta().detach().norm()), rel=1e-4)


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.two(x)


def test_a_planted_rank_is_found() -> None:
    """The targets are those of weights that differ by a rank of 1 and of 4: of 8 ranks each, so
    many are left, and they explain the difference."""
    torch.manual_seed(3)
    model = Linears().eval().requires_grad_(False)
    planted = {"one": 1, "two": 4}
    deltas = {n: torch.randn(24, r) @ torch.randn(r, 24) / 8 for n, r in planted.items()}
    base = peftfx.capture(model, (torch.randn(4, 24),))
    text = "sora{rank=8,strength=0.05,strongest=0.6,stages=5,where=linear}"
    program, controllers, optimizer = started(base, text, 600, 0.02, torch.optim.Adam)
    program.train()
    for step in range(600):
        x = torch.randn(64, 24)
        controllers.begin_forward(x)
        loss = torch.stack([
            (y - (model.get_submodule(n)(x) + x @ deltas[n].T)).square().mean()
            for n, y in zip(planted, program(x), strict=True)
        ]).sum()  # fmt: skip
        loss.backward()
        controllers.before_step(step)
        optimizer.step()
        controllers.after_step(step)
        optimizer.zero_grad()
    found: dict[str, int] = {}
    for attachment in program.attachments:
        branch = program.branch(attachment)
        assert isinstance(branch, SoRABranch)
        name = attachment.site.removesuffix(".weight")
        found[name] = int(branch.g.count_nonzero())
        left = (branch.delta().detach() - deltas[name]).norm() / deltas[name].norm()
        assert left < 0.1, (name, left)
    assert found == planted


def test_misuse_is_named() -> None:
    for text, said in (
        ("strength=-1", "strength=-1.0, but it must be at least 0"),
        (
            "strength=0.5,strongest=0.1",
            "strongest=0.1, but it must be none, or at least strength=0.5",
        ),
        ("stages=0", "stages=0, but it must be at least 1"),
        ("strength=0,strongest=1,spacing=log", "above 0 with spacing=log"),
        ("l1=-1", "l1=-1.0, but it must be at least 0"),
        ("init=pissa", "Choose lora"),
        ("prox=hard", "one of soft, reference"),
    ):
        with pytest.raises(OptionError, match=said):
            peftfx.parse(f"sora{{{text}}}")
