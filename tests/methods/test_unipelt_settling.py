"""UniPELT after training: settled gates, exports, and other methods beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import PassError

from ..models import batch, bert, first, moved, randomise
from .test_unipelt import RECIPE

# Settling.


@pytest.fixture
def trained(captured: Any) -> tuple[peftfx.Program, peftfx.Program, list[dict[str, Tensor]]]:
    """A base, UniPELT on it with parameters that matter, and calibration batches."""
    _, base = captured["encoder"]
    data = [batch(4, 9, seed=1, pad=4), batch(2, 6, seed=2)]
    return base, randomise(peftfx.run(base, RECIPE), 0.4), data


def test_settling_puts_mean_gates_in_their_place(trained: Any) -> None:
    base, program, data = trained
    paths = {p: p for p in program.shared}
    assert len(paths) == 8
    seen = [peftfx.tap(program, paths)(**b)[1] for b in data]
    means = {p: float(torch.cat([s[p].detach().flatten() for s in seen]).mean()) for p in paths}
    settled = peftfx.run(program, "bake{names=[unipelt]}", data=iter(data))
    assert not settled.shared and not any(a.reads.get("gate") for a in settled.attachments)
    for attachment in settled.attachments:
        gate = attachment.path.rpartition(".")[0] + ".gate"
        got: Any = settled.branch(attachment)
        assert got.constant == pytest.approx(means[gate], abs=1e-6)
    gap = max(
        float((a - b).detach().abs().max())
        for inputs in data
        for a, b in zip(program(**inputs), settled(**inputs), strict=True)
    )
    assert settled.history[-1].certificate.measured["data_abs"] == pytest.approx(gap)
    assert gap > 0
    assert moved(first(base(**data[0])), first(settled(**data[0]))) > 0.01
    count = sum(p.numel() for p in settled.trainable_parameters())
    assert count == sum(p.numel() for p in program.trainable_parameters()) - 8 * 33
    with pytest.raises(PassError, match="nothing to settle"):
        peftfx.run(settled, "bake{names=[unipelt]}", data=data)


def test_settling_a_causal_gate_takes_its_last_value(captured: Any) -> None:
    _, base = captured["decoder"]
    program = randomise(peftfx.run(base, RECIPE), 0.4)
    data = [batch(4, 9, seed=1, pad=4)]
    path = "peftfx.unipelt.s0.layer0.ffn.gate"
    gate = peftfx.tap(program, {"g": path})(**data[0])[1]["g"].detach()
    settled = peftfx.run(program, "bake", data=data)
    branch: Any = settled.module.get_submodule("peftfx.unipelt.s0.layer0.ffn.serial")
    assert branch.constant == pytest.approx(float(gate[:, -1].mean()), abs=1e-6)


def test_settling_needs_data(trained: Any) -> None:
    _, program, _ = trained
    for text in ("bake", "bake{names=[unipelt]}"):
        with pytest.raises(PassError, match=r"data=\[batch, \.\.\.\]"):
            peftfx.run(program, text)
    with pytest.raises(PassError, match="no batches"):
        peftfx.run(program, "bake", data=[])


def test_settled_lora_folds_exactly() -> None:
    torch.manual_seed(0)
    base = peftfx.capture(bert().double().eval(), kwargs=batch())
    program = randomise(peftfx.run(base, RECIPE), 0.4)
    kept = peftfx.run(program, "fold")
    assert not kept.history[-1].edited and len(kept.history[-1].skipped) == 8
    assert "it reads gate" in str(kept.history[-1])
    settled = peftfx.run(program, "bake", data=[batch(4, 9, pad=3)])
    folded = peftfx.run(settled, "fold")
    assert len(folded.history[-1].edited) == 4
    inputs = batch(3, 8, seed=5, pad=2)
    gap = first(folded(**inputs)) - first(settled(**inputs))
    assert float(gap.detach().abs().max()) < 1e-13
    assert {a.slot for a in folded.attachments} == {"key_value", "serial"}
    alone = peftfx.run(base, RECIPE.replace("}", ",where=q|v}"))
    alone = peftfx.run(randomise(alone, 0.4), "bake", data=[batch()])
    merged = peftfx.run(alone, "fold{names=[unipelt]}")
    assert set(merged.export_state_dict()) == set(base.export_state_dict())
    assert torch.equal(first(program(**inputs)), first(peftfx.run(program, "fold")(**inputs)))


def test_settled_programs_save_load_and_go(trained: Any, captured: Any, tmp_path: Path) -> None:
    base, program, data = trained
    model, _ = captured["encoder"]
    settled = randomise(peftfx.run(program, "bake", data=data), 0.1, seed=3)
    want = first(settled(**data[0]))
    peftfx.save(settled, tmp_path / "a")
    for target in (model, base):
        loaded = peftfx.load(target, tmp_path / "a")
        assert torch.equal(first(loaded(**data[0])), want)
        assert loaded.text() == settled.text()
        assert "data_rel" in str(loaded.history[-1].certificate)
    assert torch.equal(first(settled.without("unipelt")(**data[0])), first(base(**data[0])))
    assert all(c.holds for c in settled.verify())
    folded = peftfx.run(settled, "fold")
    peftfx.save(folded, tmp_path / "b")
    again = peftfx.load(base, tmp_path / "b")
    torch.testing.assert_close(first(again(**data[0])), first(folded(**data[0])))


@pytest.mark.parametrize(("name", "form"), [("encoder", "gated"), ("block", "settled")])
def test_both_forms_export(captured: Any, name: str, form: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    _, base = captured[name]
    program = randomise(peftfx.run(base, RECIPE), 0.4)
    if form == "settled":
        program = peftfx.run(program, "bake", data=[batch(pad=3)])
    report = peftfx.export_onnx(program, tmp_path / "m.onnx")
    assert report.error <= 1e-5


@pytest.mark.parametrize("form", ["gated", "settled"])
def test_both_forms_compile_and_train(captured: Any, form: str) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(base, RECIPE)
    if form == "settled":
        program = peftfx.run(program, "bake", data=[batch()])
    program.train()
    frozen = {n: p.clone() for n, p in program.module.named_parameters() if not p.requires_grad}
    inputs, target = batch(4, 9, pad=3), torch.randn(4, 32, generator=torch.manual_seed(0))
    optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    compiled: Any = torch.compile(program.module, fullgraph=True, backend="aot_eager")
    losses: list[float] = []
    for _ in range(15):
        loss = (compiled(**inputs)[1] - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(
        torch.equal(dict(program.module.named_parameters())[n], p) for n, p in frozen.items()
    )
    if form == "gated":
        gates = [p for n, p in program.named_trainable_parameters().items() if ".gate." in n]
        assert len(gates) == 16 and all(p.grad is not None and p.grad.any() for p in gates)


# Beside other methods at the same sites.


def by_name(program: peftfx.Program) -> peftfx.Program:
    """Moves every trainable parameter by an amount that depends on its name alone."""
    with torch.no_grad():
        for name, p in program.named_trainable_parameters().items():
            g = torch.Generator().manual_seed(sum(map(ord, name)))
            p.add_(torch.randn(p.shape, generator=g) * 0.2)
    return program


@pytest.mark.parametrize(
    ("other", "commutes"),
    [("lora{rank=2}", True), ("lora{rank=2,where=ffn.down}", True), ("ia3", True),
     ("bitfit", True), ("prefix_tuning{length=2}", True), ("prompt_tuning{length=2}", True),
     ("serial_adapter{bottleneck=4}", False)],
)  # fmt: skip
def test_stacks(hand: Any, other: str, commutes: bool) -> None:
    _, _, base = hand
    one, two = (by_name(peftfx.run(base, p)) for p in ([RECIPE, other], [other, RECIPE]))
    inputs = batch(3, 9, pad=3)
    real = inputs["attention_mask"].bool()
    a, b = first(one(**inputs))[real], first(two(**inputs))[real]
    assert (moved(a, b) < 1e-5) == commutes
    alone = {n: t[:1, :6] for n, t in inputs.items()}
    for program in (one, two):
        got = first(program(**alone))
        torch.testing.assert_close(first(program(**inputs))[:1, :6], got, rtol=1e-4, atol=1e-5)
        settled = peftfx.run(program, "bake{names=[unipelt]}", data=[inputs])
        folded = peftfx.run(settled, "fold")
        assert len([s for s in folded.history[-1].edited if "q" in s or "v" in s]) >= 4
        rest = program.without("unipelt")
        assert rest.adapters == tuple(n for n in program.adapters if n != "unipelt")
        assert "unipelt" not in rest.text()
