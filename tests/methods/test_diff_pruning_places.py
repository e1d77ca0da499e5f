"""Diff pruning: which tensors it goes to, beside what, exports, and a small real task."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.branches.branch import RowScale
from peftfx.rewriter.edits.edit import Editor
from peftfx.rewriter.edits.folding.fold import fold
from peftfx.rewriter.edits.linear.sparse import SparseDelta
from peftfx.rewriter.errors import NonFiniteError, OptionError
from peftfx.rewriter.program.sites import LinearSite
from peftfx.rewriter.tracing.propagate import propagate

from ..models import batch, build, first, moved, randomise
from ..zoo import ZOO
from .test_diff_pruning import SMALL, baked, gate, reference, values

# Where it goes, and beside what.


@pytest.mark.parametrize(
    ("name", "where", "tensors"),
    [
        ("fused", "v", 4), ("fused", "q|v", 4), ("fused", "linear", 17), ("gpt2", "k", 4),
        ("encoder", "norm|embedding", 12), ("resnet", "conv|norm", 16),
    ],
)  # fmt: skip
def test_every_kind_of_stored_tensor(
    captured: Any, zoo: Any, name: str, where: str, tensors: int
) -> None:
    if name in ZOO:
        model, base, inputs = zoo.model(name), zoo[name], ZOO[name].inputs(4, 7)
    else:
        (model, base), inputs = captured[name], batch(4, 11)
        inputs = {n: t for n, t in inputs.items() if n in base.spec.names}
    text = f"diff_pruning{{alpha=1,density=0.1,where={where}}}"
    program = randomise(peftfx.run(base, text), 0.5)
    assert len(program.attachments) == tensors
    before = first(base(**inputs)).detach()
    for stage in (program, randomise(baked(program), 0.3)):
        got = first(stage(**inputs)).detach()
        assert moved(before, got) > 0.01
        folded = peftfx.run(stage, "fold")
        other = copy.deepcopy(model)
        other.load_state_dict(folded.export_state_dict(), strict=True)
        torch.testing.assert_close(first(other(**inputs)).detach(), got, rtol=1e-4, atol=1e-5)
        if name == "fused" and where != "linear":
            same = (other.layers[0].qkv.weight == model.layers[0].qkv.weight).all(1)
            assert bool(same[32:64].all()) and not bool(same[64:].all())
            assert bool(same[:32].all()) == (where == "v")


def test_a_tied_tensor_is_one_tensor(captured: Any) -> None:
    """Embedding and head see the same difference, so folding asks nothing."""
    model, base = captured["tied"]
    text = "diff_pruning{alpha=1,density=0.1,where=head or embedding}"
    program = randomise(peftfx.run(base, text), 0.3)
    assert len(program.attachments) == 1
    assert len(program.history[-1].edited) == 2
    for stage in (program, baked(program)):
        want = first(reference(model, values(stage))(**batch())).detach()
        torch.testing.assert_close(first(stage(**batch())).detach(), want, rtol=1e-4, atol=1e-5)
        folded = peftfx.run(stage, "fold")
        other = build("tied")
        other.load_state_dict(folded.export_state_dict(), strict=True)
        assert other.head.weight is other.embed.weight
        torch.testing.assert_close(first(other(**batch())).detach(), want, rtol=1e-4, atol=1e-5)
    both = randomise(peftfx.run(program, "lora{rank=2,where=head}"), 0.3)
    certificate = peftfx.run(both, "fold{tied=untie}").history[-1].certificate
    assert certificate.holds and certificate.measured["max_rel"] < 1e-5
    with pytest.raises(peftfx.RewriteError, match="tied=untie"):
        peftfx.run(both, "fold")


OTHERS = (
    "lora{rank=2,where=linear and not head}", "ia3", "serial_adapter{bottleneck=6}",
    "prefix_tuning{length=5}", "prompt_tuning{length=4}", "bitfit",
)  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_beside_every_other_method(other: str) -> None:
    """Both orders fold, in double precision, where only a wrong fold leaves a difference."""
    base = peftfx.capture(build("encoder"), kwargs=batch(), dtype=torch.float64)
    for text in (f"{SMALL};{other}", f"{other};{SMALL}"):
        program = randomise(peftfx.run(base, text), 0.3)
        for stage in (program, randomise(peftfx.run(program, "bake{names=diff_pruning}"), 0.3)):
            folded = peftfx.run(stage, "fold")
            assert folded.history[-1].certificate.measured["max_rel"] < 1e-11
            assert not [a for a in folded.attachments if a.adapter == "diff_pruning"]
            alone = peftfx.run(stage, "fold{names=diff_pruning}")
            assert alone.history[-1].certificate.measured["max_rel"] < 1e-11


def test_what_another_adapter_trains_is_left_to_it(captured: Any) -> None:
    for name in ("encoder", "decoder"):
        model, base = captured[name]
        program = randomise(peftfx.run(base, f"bitfit;{SMALL}"), 0.3)
        assert all(a.path.endswith(".weight.expression") for a in program.attachments)
        assert any("'bitfit' trains" in why for _, why in program.history[-1].skipped)
        sparse = randomise(baked(program), 0.3)
        folded = peftfx.run(sparse, "fold")
        for stage, source in ((program, program), (sparse, sparse), (folded, sparse)):
            alone = stage.without("bitfit")
            assert {a.path for a in alone.attachments} == {a.path for a in stage.attachments}
            want = first(reference(model, values(source))(**batch()))
            torch.testing.assert_close(first(alone(**batch())), want, rtol=1e-4, atol=1e-5)
            bare = stage.without("diff_pruning").without("bitfit")
            assert torch.equal(first(bare(**batch())), first(model(**batch())))


class Magnitudes(RowScale):
    """`y = m / ||w|| (w x)`: the row norms are those of the weight with its difference."""

    def __init__(self, m: Tensor) -> None:
        super().__init__()
        self.m = nn.Parameter(m)

    def branch(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], len(self.m))

    def delta(self) -> Tensor:
        return self.m.new_zeros(len(self.m), 1)

    def rows(self, weight: Tensor) -> Tensor:
        return self.m / weight.norm(dim=1)


def test_row_scales_see_the_weight_with_its_difference(captured: Any) -> None:
    model, base = captured["encoder"]
    program = randomise(peftfx.run(base, SMALL), 0.3)
    for stage in (program, baked(program)):
        edit = Editor(stage.fork(), "rows")
        sites = [s for s in stage.sites.select("q") if isinstance(s, LinearSite)]
        generator = torch.Generator().manual_seed(0)
        sizes = [1 + torch.rand(s.out_features, generator=generator) for s in sites]
        for site, size in zip(sites, sizes, strict=True):
            edit.rescale(site, Magnitudes(size))
        edit.finish()
        propagate(edit.program)
        other = reference(model, values(stage))
        held = dict(other.named_parameters())
        with torch.no_grad():
            for site, size in zip(sites, sizes, strict=True):
                w = held[site.weight]
                w.mul_((size / w.norm(dim=1))[:, None])
        want = first(other(**batch())).detach()
        got = first(edit.program(**batch())).detach()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert moved(first(stage(**batch())), want) > 0.01
        result = fold(edit, [a.path for a in edit.program.attachments], "refuse")
        assert not result.kept
        edit.finish()
        got = first(edit.program(**batch())).detach()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# Ways out.


def test_each_stage_exports_from_a_fused_weight(captured: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    _, base = captured["fused"]
    program = randomise(peftfx.run(base, f"{SMALL[:-1]},where=v}}"), 0.5)
    sparse = randomise(baked(program), 0.3)
    for stage in (program, sparse, peftfx.run(sparse, "fold")):
        assert peftfx.export_onnx(stage, tmp_path / "m.onnx").error <= 1e-5


@pytest.mark.parametrize("structured", ["true", "false"])
def test_each_stage_compiles_and_draws_the_same_noise(captured: Any, structured: str) -> None:
    _, base = captured["decoder"]
    text = f"diff_pruning{{alpha=1,density=0.05,structured={structured}}}"
    program = randomise(peftfx.run(base, text), 0.3)
    for stage in (program, baked(program)):
        compiled = torch.compile(stage.train().module, fullgraph=True, backend="aot_eager")
        results: list[list[Any]] = []
        for run in (compiled, stage):
            stage.module.zero_grad()
            torch.manual_seed(0)
            out = first(run(**batch()))
            out.square().mean().backward()
            results.append([out.detach(), *(p.grad for p in stage.trainable_parameters())])
        torch.testing.assert_close(results[0], results[1])


def test_what_does_not_work_says_why(captured: Any) -> None:
    _, base = captured["encoder"]
    for option in ("density=0", "density=1.5", "l0=-1", "alpha_lr=0", "low=0", "high=1"):
        with pytest.raises(OptionError, match=option.partition("=")[0]):
            peftfx.parse(f"diff_pruning{{{option}}}")
    program = randomise(peftfx.run(base, SMALL))
    with torch.no_grad():
        next(iter(program.trainable_parameters())).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="largest"):
        peftfx.run(program, "bake")
    sparse = baked(randomise(peftfx.run(base, SMALL)))
    assert not list(peftfx.controllers(sparse).finish())
    with pytest.raises(peftfx.RewriteError, match="anything to settle"):
        peftfx.run(sparse, "bake")
    assert any(isinstance(sparse.branch(a), SparseDelta) for a in sparse.attachments)


# A small real task.


def test_all_stages_on_handwritten_digits() -> None:
    """A network that knows digits learns shifted ones with 5 % of its weights."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    other = x.view(-1, 8, 8).roll(1, -1).flatten(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    base = peftfx.capture(model.eval(), args=(x[:4],))
    stored = {n: p.detach().clone() for n, p in model.named_parameters()}

    def loss_of(program: peftfx.Program) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(program.eval()(other), y))

    def train(program: peftfx.Program, steps: int) -> None:
        controllers = peftfx.controllers(program)
        optimizer = torch.optim.AdamW(controllers.param_groups(lr=3e-3, weight_decay=0.01))
        controllers.start(optimizer, steps)
        program.train()
        for step in range(steps):
            controllers.begin_forward()
            outputs = program(other)
            loss = F.cross_entropy(outputs, y) + controllers.loss(outputs)
            loss.backward()
            controllers.before_step(step)
            optimizer.step()
            controllers.after_step(step)
            optimizer.zero_grad()

    def density(program: peftfx.Program) -> float:
        gates = [gate(t["alpha"]) * gate(t["group"]) for t in values(program).values()]
        return float(torch.cat([g.flatten() for g in gates]).gt(0).float().mean())

    text = "diff_pruning{where=linear,l0=3e-4,alpha_lr=20,density=0.05}"
    program = peftfx.run(base, text)
    start = loss_of(program)
    assert density(program) == 1.0 and start > 2
    train(program, 200)
    gated = loss_of(program)
    open_gates = density(program)
    sparse = baked(program)
    projected = loss_of(sparse)
    train(sparse, 200)
    tuned = loss_of(sparse)
    folded = peftfx.run(sparse, "fold")
    total = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in sparse.trainable_parameters()) == round(0.05 * total)
    assert open_gates < 0.5
    assert gated < start and tuned < projected and tuned < 0.5 * start
    assert loss_of(folded) == pytest.approx(tuned, rel=1e-5)
    merged = folded.export_state_dict()
    changed = sum(int((merged[n] != t).sum()) for n, t in stored.items())
    assert changed <= round(0.05 * total)
    assert all(torch.equal(p, stored[n]) for n, p in model.named_parameters())
