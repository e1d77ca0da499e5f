"""PEQA against its equation; what its integers cost, keep and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import ArtifactError, ExportError, FoldError, OptionError, PassError
from peftfx.rewriter.measure.compare import compare as compare_outputs
from peftfx.rewriter.measure.trials import sizes
from peftfx.rewriter.program.history import Plan

from ..models import Encoder, batch, build, first, moved, randomise
from .common import hooked

LEAST_CHANGE = {"dit": 0.0}
"""Its last linear starts at zero, and so do its integers."""
STRENGTH = 0.003
"""Scales are small numbers."""
EVERYWHERE = "lora{where=linear and not head}"


def unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """Codes of one row after the other, low bits first, by plain counting."""
    rows = [
        [(byte >> shift) % 2**bits for byte in row for shift in range(0, 8, bits)]
        for row in packed.reshape(-1, packed.shape[-1]).tolist()
    ]
    return torch.tensor(rows)[:, :count].reshape(*packed.shape[:-1], count)


def weights(program: peftfx.Program, bits: int, group: int, sizes: Mapping[str, int]) -> Any:
    """W[i, j] = s[i, G] (W_int[i, j] - z[i, G]) of every quantised weight, by module name."""
    state = program.module.state_dict()
    found: dict[str, Tensor] = {}
    for name, size in sizes.items():
        codes, scale, zero = (state[f"{name}.weight.{p}"] for p in ("codes", "scale", "zero"))
        width = min(group, size)
        integers = unpacked(codes, bits, width).flatten(1)[:, :size]
        if not zero.is_floating_point():
            zero = unpacked(zero, bits, scale.shape[1])
        columns = [j // width for j in range(size)]
        found[name] = scale[:, columns] * (integers - zero[:, columns])
    return found


def reference(model: nn.Module, dense: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Any:
    """The model with W in the place of each weight."""

    def hook(name: str) -> Callable[..., Tensor]:
        bias: Any = getattr(model.get_submodule(name), "bias", None)
        return lambda i, o: F.linear(i[0], dense[name].to(i[0].dtype), bias)

    with hooked(model, {name: hook(name) for name in dense}):
        return model(**inputs)


def linears(model: nn.Module) -> dict[str, int]:
    """Input sizes of all linears but the head."""
    return {
        n: m.in_features
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and not n.endswith("head")
    }


def compare(program: peftfx.Program, model: nn.Module, inputs: Any, bits: int, group: int) -> None:
    before = first(program(**inputs)).detach()
    randomise(program, 0.002)
    dense = weights(program, bits, group, linears(model))
    got, want = first(program(**inputs)), first(reference(model, dense, inputs))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert moved(before, got) > 0.01


@pytest.mark.parametrize(
    ("options", "bits", "group"),
    [("", 4, 32), ("{group=16}", 4, 16), ("{group=24,bits=2}", 2, 24), ("{bits=8}", 8, 32),
     ("{group=none,zero=true}", 4, 999)],
)  # fmt: skip
def test_peqa_equals_its_reference(hand: Any, options: str, bits: int, group: int) -> None:
    """Encoder, and decoder with grouped queries and rotation; the width of 32 has a tail of 8."""
    _, model, base = hand
    program = peftfx.run(base, f"peqa{options}")
    compare(program, model, batch(4, 11, pad=3), bits, group)


def test_an_encoder_decoder_equals_its_reference(zoo: Any) -> None:
    program = peftfx.run(zoo["t5"], "peqa{group=16}")
    inputs = program.spec.resize(program.sample, batch=2, sequence=7)
    compare(program, zoo.model("t5"), inputs, 4, 16)


def test_the_effect_is_that_of_rounding_and_is_measured(captured: Any) -> None:
    """In the quadratic mean: a step is 5 times larger in 2 bits than in 4, 17 times in 4 than in 8.

    The certificate has the largest change of any single value, which no such law holds for.
    """
    _, base = captured["decoder"]
    changes: list[float] = []
    for bits in (2, 4, 8):
        program = peftfx.run(base, f"peqa{{bits={bits}}}")
        gaps = [compare_outputs(base(**i), program(**i))[0] for i in sizes(program)]
        measured = program.history[-1].certificate.measured["max_rel"]
        assert measured == pytest.approx(max(g.relative for g in gaps), rel=1e-4)
        changes.append((sum(g.error for g in gaps) / sum(g.size for g in gaps)) ** 0.5)
    assert 0.3 > changes[0] > 4 * changes[1] > 16 * changes[2] > 0


def test_trainable_counts(captured: Any) -> None:
    """d * k / g a linear, d where a row has one scale; twice that with zero points."""
    model, base = captured["decoder"]
    shapes = [tuple(model.get_submodule(n).weight.shape) for n in linears(model)]
    for options, want in (
        ("group=16", sum(d * k // 16 for d, k in shapes)),
        ("group=none", sum(d for d, _ in shapes)),
        ("group=16,zero=true", 2 * sum(d * k // 16 for d, k in shapes)),
        ("group=48", sum(d * -(-k // 48) for d, k in shapes)),
    ):
        program = peftfx.run(base, f"peqa{{{options}}}")
        assert sum(p.numel() for p in program.trainable_parameters()) == want


def test_training_moves_the_scales_alone(captured: Any) -> None:
    program = captured.adapted("encoder", "peqa").train()
    before = {n: t.clone() for n, t in program.module.state_dict().items()}
    trained = set(program.named_trainable_parameters())
    assert trained and all(n.endswith(".weight.scale") for n in trained)
    groups = peftfx.controllers(program).param_groups(lr=1e-3, weight_decay=0.1)
    assert [g["weight_decay"] for g in groups] == [0.0]
    optimizer = torch.optim.AdamW(groups)
    losses: list[float] = []
    for _ in range(8):
        torch.manual_seed(0)
        hidden, pooled = program(**batch())
        loss = hidden.pow(2).mean() + pooled.pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    after = program.module.state_dict()
    assert losses[-1] < losses[0]
    assert {n for n, t in after.items() if not torch.equal(t, before[n])} == trained


def test_integers_take_the_place_of_the_dense_weights(captured: Any) -> None:
    model, base = captured["decoder"]
    program = peftfx.run(base, "peqa{group=16}")
    state = program.module.state_dict()
    for name in linears(model):
        out, size = model.get_submodule(name).weight.shape
        assert f"{name}.weight" not in state
        mine = [t for n, t in state.items() if n.startswith(f"{name}.weight.")]
        held = sum(t.numel() * t.element_size() for t in mine)
        assert held == out * size // 2 + out * (size // 16) * 4 + out * -(-size // 32)
    quantised = sum(model.get_submodule(n).weight.numel() for n in linears(model))
    held = sum(t.numel() * t.element_size() for n, t in state.items() if ".weight." in n)
    assert held < 0.21 * 4 * quantised  # 6.25 bits a weight with float32 scales for 16
    assert "layers.0.q_proj.weight" in base.module.state_dict()


@pytest.mark.parametrize("text", ["peqa", "peqa;lora;ia3"])
def test_no_dense_weight_is_kept_for_backward(captured: Any, text: str) -> None:
    model, program = captured["decoder"][0], captured.adapted("decoder", text)
    stored = {p.data_ptr() for p in program.module.state_dict().values()}
    shapes = {tuple(model.get_submodule(n).weight.shape) for n in linears(model)}
    shapes |= {s[::-1] for s in shapes}
    seen: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        first(program(**batch())).sum().backward()
    dense = [t for t in seen if tuple(t.shape) in shapes and t.data_ptr() not in stored]
    assert seen and not dense
    assert any(t.dtype == torch.uint8 for t in seen)


# Artifacts.


def test_an_artifact_holds_scales_and_hashes(captured: Any, tmp_path: Path) -> None:
    program = randomise(captured.adapted("decoder", "peqa"), 0.002)
    peftfx.save(program, tmp_path / "a")
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert set(manifest["tensors"]) == set(program.named_trainable_parameters())
    assert len(manifest["recipe"][0]["decisions"]["codes"]) == 14
    scales = sum(p.numel() * 4 for p in program.trainable_parameters())
    assert scales < (tmp_path / "a/tensors.safetensors").stat().st_size < scales + 2500
    with torch.no_grad():
        other = build("decoder")
        other.layers[0].up.weight.add_(0.3)
    with pytest.raises(ArtifactError, match="other base weights"):
        peftfx.load(other, tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"layers.0.up.weight.*other integers"):
        peftfx.load(other, tmp_path / "a", allow_base_mismatch=True)


def test_tasks_are_sets_of_scales(captured: Any, tmp_path: Path) -> None:
    _, base = captured["encoder"]
    outputs: list[Tensor] = []
    for task in ("one", "two"):
        program = randomise(captured.adapted("encoder", "peqa"), 0.002, seed=len(outputs))
        peftfx.save(program, tmp_path / task)
        outputs.append(first(program(**batch())))
    assert moved(outputs[0], outputs[1]) > 0.01
    for task, want in zip(("one", "two"), outputs, strict=True):
        assert torch.equal(first(peftfx.load(base, tmp_path / task)(**batch())), want)


@pytest.mark.parametrize("name", ["decoder", "fused"])
def test_state_dicts_hold_the_dense_weights_that_integers_stand_for(
    captured: Any, name: str
) -> None:
    program = randomise(captured.adapted(name, "peqa"), 0.002)
    fresh = build(name)
    fresh.load_state_dict(program.export_state_dict(), strict=True)
    inputs = {n: t for n, t in batch().items() if n in program.spec.names}
    torch.testing.assert_close(first(fresh(**inputs)), first(program(**inputs)))


def test_a_whole_program_is_saved_with_its_integers(captured: Any, tmp_path: Path) -> None:
    program = randomise(captured.adapted("block", "peqa;lora"), 0.002)
    peftfx.save_program(program, tmp_path / "p")
    loaded = peftfx.load_program(tmp_path / "p")
    assert loaded.text().count("quantised_linear(") == 7
    assert torch.equal(first(loaded(**batch())), first(program(**batch())))


# Beside other methods.


@pytest.mark.parametrize(
    ("name", "other"),
    [("encoder", EVERYWHERE), ("encoder", "ia3"), ("block", EVERYWHERE), ("block", "ia3"),
     ("block", "serial_adapter{bottleneck=4}"), ("block", "prefix_tuning{length=3}"),
     ("block", "prompt_tuning{length=3}"), ("block", "bitfit")],
)  # fmt: skip
def test_order_does_not_matter(captured: Any, name: str, other: str) -> None:
    _, base = captured[name]
    one = randomise(peftfx.run(base, f"peqa;{other}"), 0.002)
    two = peftfx.run(base, f"{other};peqa")
    values = one.named_trainable_parameters()
    assert set(values) == set(two.named_trainable_parameters())
    with torch.no_grad():
        for parameter, value in ((two.module.get_parameter(n), p) for n, p in values.items()):
            parameter.copy_(value)
    assert torch.equal(first(one(**batch())), first(two(**batch())))
    assert sorted(one.text().splitlines()) == sorted(two.text().splitlines())
    alone = two.without(other.partition("{")[0])
    assert torch.equal(first(alone(**batch())), first(one.only(("peqa",))(**batch())))
    for program in (one, two):
        assert all(c.holds for c in program.verify())


def test_output_scales_fold_exactly_into_the_scales(captured: Any) -> None:
    base = peftfx.capture(build("encoder"), kwargs=batch(), dtype=torch.float64)
    program = randomise(peftfx.run(base, "peqa;ia3{where=k|v|ffn.up}"), 0.002)
    with torch.no_grad():
        for name, parameter in program.named_trainable_parameters().items():
            if name.startswith("peftfx."):
                parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(0)) * 0.3)
    want = first(program(**batch(4, 11, pad=3)))
    folded = peftfx.run(program, "fold")
    torch.testing.assert_close(first(folded(**batch(4, 11, pad=3))), want, rtol=0, atol=1e-12)
    before, after = program.module.state_dict(), folded.module.state_dict()
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    sites = [f"layers.{i}.{n}" for i in (0, 1) for n in ("key", "value", "fc1")]
    assert changed == {f"{s}.{p}" for s in sites for p in ("weight.scale", "bias")}
    assert not [n for n in after if n.startswith("peftfx.")]
    assert folded.text().count("quantised_linear(") == 13
    assert after["layers.0.key.weight.codes"].data_ptr() == (
        before["layers.0.key.weight.codes"].data_ptr()
    )
    back = folded.only(("peqa", "ia3"))
    torch.testing.assert_close(first(back(**batch(4, 11, pad=3))), want, rtol=0, atol=1e-12)
    assert torch.equal(first(folded.only(())(**batch())), first(base(**batch())))


def test_what_does_not_fold_into_integers_says_so(captured: Any) -> None:
    _, base = captured["decoder"]
    program = randomise(peftfx.run(base, "peqa;lora;ia3{where=ffn.down}"), 0.01)
    folded = peftfx.run(program, "fold")
    reasons = dict(folded.history[-1].skipped)
    for site in ("layers.0.q_proj.weight", "layers.1.down.weight"):
        assert "stored in 4 bits" in reasons[site] and "Keep the branch" in reasons[site]
    assert torch.equal(first(folded(**batch())), first(program(**batch())))
    with pytest.raises(FoldError, match="4 bits"):
        peftfx.run(program, "fold{names=[lora]}")
    first_folded = peftfx.run(randomise(peftfx.run(base, "lora"), 0.1), "fold;peqa")
    assert first_folded.attachments == () and "LoRABranch" not in first_folded.text()


def test_lowering_reports_and_keeps_quantised_linears(captured: Any) -> None:
    _, base = captured["decoder"]
    program = peftfx.run(base, "peqa{where=q};lora{where=q|v};lower")
    skipped = dict(program.history[-1].skipped)
    assert "quantised" in skipped["layers.0.q_proj.weight"]
    assert "layers.0.v_proj.weight" in program.history[-1].edited
    lowered = peftfx.run(base, f"{EVERYWHERE};lower;peqa;causal")
    assert lowered.text().count("quantised_linear(") == 14
    assert all(c.holds for c in lowered.verify())


# Limits.


def test_bad_options_and_places_are_refused(captured: Any, tmp_path: Path) -> None:
    for text, what in (("bits=3", "2, 4 or 8"), ("group=0", "positive"), ("group=3", "bytes")):
        with pytest.raises(OptionError, match=what):
            peftfx.parse(f"peqa{{{text}}}")
    _, base = captured["fused"]
    program = peftfx.run(base, "peqa{where=q|ffn}")
    assert "select all or none" in dict(program.history[-1].skipped)["layers.0.qkv.weight:q"]
    assert len(program.history[-1].edited) == 4
    with pytest.raises(PassError, match="quantised already"):
        peftfx.run(program, "peqa{where=ffn,name=again}")
    tied = peftfx.capture(build("tied"), kwargs=batch())
    found = peftfx.run(tied, "peqa{where=linear}").history[-1]
    assert "tied" in dict(found.skipped)["head.weight"]
    with pytest.raises(FoldError, match="no place for integers"):
        source = tmp_path / "source"
        model = build("decoder")
        source.mkdir()
        from safetensors.torch import save_file

        save_file(model.state_dict(), source / "model.safetensors")
        decoder = peftfx.run(captured["decoder"][1], "peqa;ia3")
        peftfx.fold_checkpoint(decoder, source, tmp_path / "target")


def test_other_integers_than_those_of_the_plan_are_refused(captured: Any) -> None:
    from peftfx.rewriter.run.run import apply_plan

    base = captured["decoder"][1]
    record = captured.adapted("decoder", "peqa").history[-1]
    codes = {**record.plan.decisions["codes"], "layers.0.up.weight": "0" * 64}
    wrong = Plan({**record.plan.decisions, "codes": codes})
    with pytest.raises(PassError, match="other integers"):
        apply_plan(base, record.applied, wrong)


def test_without_values_the_shapes_are_known(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Encoder().eval()
    meta = peftfx.run(peftfx.capture(model, kwargs=batch()), "peqa")
    assert meta.history[-1].certificate.kind == "unmeasured"
    real = peftfx.run(peftfx.capture(build("encoder"), kwargs=batch()), "peqa")
    shapes = {n: t.shape for n, t in real.module.state_dict().items()}
    assert {n: t.shape for n, t in meta.module.state_dict().items()} == shapes
    from safetensors.torch import save_file

    save_file(build("encoder").state_dict(), tmp_path / "model.safetensors")
    known = dict(build("encoder").named_buffers())
    loaded = peftfx.load_weights(meta, tmp_path, buffers=known)
    assert torch.equal(first(loaded(**batch())), first(real(**batch())))


def test_bfloat16_keeps_its_scales_in_float32() -> None:
    base = peftfx.capture(build("encoder").to(torch.bfloat16), kwargs=batch())
    program = peftfx.run(base, "peqa;lora")
    scales = [p for n, p in program.named_trainable_parameters().items() if n.endswith("scale")]
    assert {s.dtype for s in scales} == {torch.float32}
    got = first(program(**batch()))
    assert got.dtype == torch.bfloat16 and 0 < moved(first(base(**batch())), got) < 0.2
    got.float().pow(2).sum().backward()
    names = program.named_trainable_parameters()
    assert {n for n, p in names.items() if p.grad is None} == {"pooler.weight.scale"}


# ONNX.


@pytest.mark.parametrize("text", ["peqa{group=64}", "peqa{group=128};lora;ia3"])
def test_the_onnx_file_holds_integers(text: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    model = Encoder(width=128, layers=1).eval()
    program = randomise(peftfx.run(peftfx.capture(model, kwargs=batch()), text), 0.001)
    report = peftfx.export_onnx(program, tmp_path / "m.onnx")
    assert report.error < 1e-5
    graph = onnx.load(str(report.path)).graph
    assert sum(n.op_type == "MatMulNBits" for n in graph.node) == 7
    held = {i.name: len(i.raw_data) for i in graph.initializer}
    assert set(program.named_trainable_parameters()) <= set(held)
    bytes_ = sum(size for name, size in held.items() if ".weight." in name)
    count = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert 8 * bytes_ / count < (4.6 if "64" in text else 4.32)


def test_every_stored_form_exports(captured: Any, tmp_path: Path) -> None:
    """A scale a row, real zero points in groups that are cut, and 2 bits, in one file."""
    pytest.importorskip("onnx")
    _, base = captured["encoder"]
    forms = ("group=none,where=q", "group=48,zero=true,where=k|v", "bits=2,group=16,where=ffn")
    text = ";".join(f"peqa{{{form},name=n{i}}}" for i, form in enumerate(forms))
    program = randomise(peftfx.run(base, text), 0.002)
    assert program.text().count("quantised_linear(") == 10
    assert peftfx.export_onnx(program, tmp_path / "m.onnx").error < 1e-5


def test_groups_that_onnx_runtime_has_not_are_refused(captured: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    _, base = captured["encoder"]
    with pytest.raises(ExportError, match="groups of 16, 32, 64"):
        peftfx.export_onnx(peftfx.run(base, "peqa{group=8}"), tmp_path / "m.onnx")
