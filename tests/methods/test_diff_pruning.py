"""Diff pruning against its equations: all three stages, training, and storage."""

from __future__ import annotations

import copy
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.passes.selective.gates import GatedDelta
from peftfx.rewriter.errors import MetaTensorError
from peftfx.rewriter.program.sites import LinearSite
from peftfx.rewriter.storage.artifact import read
from peftfx.rewriter.storage.loading import attach

from ..models import batch, first, moved, randomise
from ..zoo import ZOO

SMALL = "diff_pruning{alpha=1,density=0.05}"
DRAWS = True  # gates
Values = Mapping[str, Mapping[str, Tensor]]


def values(program: peftfx.Program) -> dict[str, dict[str, Tensor]]:
    """The branches' tensors by the name of the stored tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for attachment in program.attachments:
        branch = program.branch(attachment)
        if attachment.adapter != "diff_pruning":
            continue
        name = attachment.path.partition(".")[2].partition(".")[2].removesuffix(".expression")
        found[name] = {n: p.detach() for n, p in branch.named_parameters()}
        found[name] |= {n: b for n, b in branch.named_buffers() if n == "indices"}
    return found


def gate(alpha: Tensor) -> Tensor:
    return (3 / (1 + torch.exp(-alpha)) - 1.5).clip(0, 1)


def reference(model: nn.Module, found: Values) -> Any:
    """A copy of the plain model with theta_0 + z w, or the sparse values, as its parameters."""
    other = copy.deepcopy(model)
    held = dict(other.named_parameters())
    with torch.no_grad():
        for name, t in found.items():
            if "indices" in t:
                held[name].view(-1)[t["indices"].long()] += t["values"]
                continue
            z = gate(t["alpha"]) * (gate(t["group"]) if "group" in t else 1)
            held[name].add_(z * t["w"])
    return other


def subject(name: str, captured: Any, zoo: Any) -> tuple[Any, peftfx.Program, dict[str, Tensor]]:
    if name in ("encoder", "decoder"):
        return *captured[name], batch(4, 11, pad=3)
    inputs = ZOO[name].inputs(4, 7)
    inputs["attention_mask"][0, -3:] = 0
    return zoo.model(name), zoo[name], inputs


def baked(program: peftfx.Program) -> peftfx.Program:
    return peftfx.run(program, peftfx.controllers(program).finish())


# Against the equations.


@pytest.mark.parametrize("structured", ["true", "false"])
@pytest.mark.parametrize("name", ["encoder", "decoder", "t5"])
def test_each_stage_equals_its_reference(
    captured: Any, zoo: Any, name: str, structured: str
) -> None:
    model, base, inputs = subject(name, captured, zoo)
    before = first(base(**inputs))
    text = f"diff_pruning{{alpha=1,density=0.05,structured={structured}}}"
    program = randomise(peftfx.run(base, text), 0.3)
    assert program.history[-1].certificate.kind == "identity"
    assert ("group" in next(iter(values(program).values()))) == (structured == "true")
    sparse = randomise(baked(program), 0.3)
    for stage in (program, sparse):
        got = first(stage(**inputs)).detach()
        want = first(reference(model, values(stage))(**inputs)).detach()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        assert moved(before, got) > 0.01
    for row, length in ((0, inputs["attention_mask"][0].sum()), (1, None)):
        alone = {n: t[row : row + 1] for n, t in inputs.items()}
        for key in ("input_ids", "attention_mask"):
            alone[key] = alone[key][:, :length]
        got = first(sparse(**alone)).detach()
        want = first(sparse(**inputs))[row : row + 1, : got.shape[1]].detach()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_the_projection_keeps_the_largest_of_all(captured: Any) -> None:
    _, base = captured["decoder"]
    program = randomise(peftfx.run(base, SMALL), 0.3)
    with torch.no_grad():
        for a in program.attachments:
            if "v_proj" in a.site:
                program.module.get_parameter(f"{a.path}.w").mul_(1e-6)
    all_of = {n: gate(t["alpha"]) * gate(t["group"]) * t["w"] for n, t in values(program).items()}
    sparse = baked(program)
    assert str(sparse.history[-1].applied) == "bake{names=[diff_pruning]}"
    found = values(sparse)
    total = sum(d.numel() for d in all_of.values())
    count = round(0.05 * total)
    cut = torch.cat([d.abs().flatten() for d in all_of.values()]).sort().values[-count]
    for name, d in all_of.items():
        want = (d.abs() >= cut).flatten().nonzero().flatten()
        if not want.numel():
            assert name not in found and "v_proj" in name
            continue
        assert torch.equal(found[name]["indices"].long(), want)
        torch.testing.assert_close(found[name]["values"], d.flatten()[want])
    assert sum(t["values"].numel() for t in found.values()) == count
    assert sparse.text().count("SparseDelta(") == len(found) == 12
    assert "%diff_pruning.layers.0.v_proj" not in sparse.text()


def test_training_draws_from_torchs_generator_and_evaluation_does_not(captured: Any) -> None:
    _, base = captured["encoder"]
    program = randomise(peftfx.run(base, SMALL), 0.3)
    want = first(program(**batch()))
    assert torch.equal(first(program(**batch())), want)

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return first(program.train()(**batch())).detach()

    one, again, other = drawn(0), drawn(0), drawn(1)
    assert torch.equal(one, again) and not torch.equal(one, other)
    draws = torch.stack([drawn(seed) for seed in range(64)]).std(0)
    assert float(draws.mean()) > 0.01
    folded = peftfx.run(program, "fold")  # in training mode, too, without noise
    torch.testing.assert_close(first(folded.eval()(**batch())), want)


def test_penalty_is_the_expected_number_of_open_gates(captured: Any) -> None:
    _, base = captured["encoder"]
    for text, product in (("", True), (",compat=true", False), (",structured=false", None)):
        program = randomise(peftfx.run(base, f"diff_pruning{{alpha=1,l0=0.01{text}}}"), 0.5)
        controllers = peftfx.controllers(program)
        penalty = controllers.loss(None)
        want = 0.0
        for t in values(program).values():
            p = 1 / (1 + torch.exp(-t["alpha"].double()))
            g = 1 / (1 + torch.exp(-t["group"].double())) if "group" in t else 1.0
            want += float(p.sum() * g if product else p.sum() + (g if product is False else 0))
        assert float(penalty.detach()) == pytest.approx(0.01 * want, rel=1e-5)
        penalty.backward()
        for a in program.attachments:
            branch = program.branch(a)
            assert isinstance(branch, GatedDelta) and branch.w.grad is None
            p = branch.alpha.detach().sigmoid()
            g = branch.group.detach().sigmoid() if branch.group is not None and product else 1.0
            torch.testing.assert_close(branch.alpha.grad, 0.01 * p * (1 - p) * g)
            if branch.group is not None:
                g = branch.group.detach().sigmoid()
                slope = 0.01 * g * (1 - g) * (p.sum() if product else 1.0)
                torch.testing.assert_close(branch.group.grad, slope)
    silent = peftfx.controllers(peftfx.run(base, "diff_pruning{l0=0}"))
    assert silent.loss(None) == 0.0


# Trainable sets, optimisers.


def test_counts_groups_and_rates(captured: Any) -> None:
    _, base = captured["encoder"]
    chosen = [s for s in base.sites.of("linear") if isinstance(s, LinearSite) and s.role != "head"]
    n = sum(base.module.get_parameter(s.weight).numel() for s in chosen)
    n += sum(base.module.get_parameter(s.bias).numel() for s in chosen if s.bias)
    tensors = 2 * len(chosen)
    for text, more in (("", tensors), ("{structured=false}", 0)):
        program = peftfx.run(base, f"diff_pruning{text}")
        assert sum(p.numel() for p in program.trainable_parameters()) == 2 * n + more
        assert len(program.attachments) == tensors
    program = peftfx.run(base, "diff_pruning{alpha_lr=100,density=0.01}")
    groups = peftfx.controllers(program).param_groups(lr=0.001, weight_decay=0.1)
    by_name = {name: g for g in groups for name in g["names"]}
    for name, group in by_name.items():
        gates = name.endswith((".alpha", ".group"))
        assert group["lr"] == pytest.approx(0.1 if gates else 0.001)
        matrix = name.endswith(".weight.expression.w")
        assert group["weight_decay"] == (0.1 if matrix else 0.0)
    bare = peftfx.run(base, "diff_pruning{bias=false,density=0.01}")
    assert len(bare.attachments) == len(chosen)
    sparse = baked(randomise(program))
    assert sum(p.numel() for p in sparse.trainable_parameters()) == round(0.01 * n)


def test_optimisers_hold_two_numbers_an_entry_and_reach_no_frozen_one(captured: Any) -> None:
    model, base = captured["decoder"]
    program = baked(randomise(peftfx.run(base, SMALL), 0.3)).train()
    count = sum(p.numel() for p in program.trainable_parameters())
    optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=0.05, weight_decay=0.1)
    stored = {n: p.detach().clone() for n, p in base.module.named_parameters()}
    started = {n: t["values"].clone() for n, t in values(program).items()}
    for seed in range(3):
        first(program(**batch(seed=seed))).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = [t for s in optimizer.state.values() for n, t in s.items() if n != "step"]
    assert sum(t.numel() for t in state) == 2 * count
    held = dict(program.module.named_parameters())
    assert all(torch.equal(held[n], t) for n, t in stored.items())
    folded = peftfx.run(program.eval(), "fold").export_state_dict()
    for name, t in values(program).items():
        index = t["indices"].long()
        assert not torch.equal(t["values"], started[name])
        before, after = stored[name].flatten(), folded[name].flatten()
        assert torch.equal(after[index], before[index] + t["values"])
        outside = torch.ones_like(before, dtype=torch.bool)
        outside[index] = False
        assert torch.equal(after[outside].view(torch.int32), before[outside].view(torch.int32))
    other = copy.deepcopy(model)
    other.load_state_dict(folded, strict=True)
    torch.testing.assert_close(first(other(**batch())), first(program(**batch())))


# Storage.


def test_save_load_replay_and_removal_at_each_stage(captured: Any, tmp_path: Path) -> None:
    model, base = captured["decoder"]
    gated = randomise(peftfx.run(base, f"lora{{rank=2}};{SMALL}"), 0.3)
    settled = randomise(baked(gated), 0.2)
    for index, program in enumerate((gated, settled, peftfx.run(settled, "fold"))):
        want = first(program(**batch()))
        assert moved(first(base(**batch())), want) > 0.01
        peftfx.save(program, tmp_path / str(index))
        for target in (model, base):
            loaded = peftfx.load(target, tmp_path / str(index))
            assert torch.equal(first(loaded(**batch())), want)
            assert loaded.text() == program.text()
        assert torch.equal(first(program.only(program.adapters)(**batch())), want)
        alone = program.without("lora")
        plain = first(reference(model, values(settled if index else gated))(**batch()))
        torch.testing.assert_close(first(alone(**batch())), plain, rtol=1e-4, atol=1e-5)
        bare = program.without("diff_pruning").without("lora")
        assert torch.equal(first(bare(**batch())), first(model(**batch())))
        assert all(c.holds for c in program.verify())
    names = set(settled.adapter_tensors("diff_pruning"))
    assert all(n.endswith(".values") for n in names)


def test_an_artifact_is_as_small_as_its_entries(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
    x = torch.randn(3, 256)
    base = peftfx.capture(model, args=(x,))
    program = baked(randomise(peftfx.run(base, "diff_pruning{where=linear}")))
    nnz = round(0.005 * sum(p.numel() for p in model.parameters()))
    assert sum(p.numel() for p in program.trainable_parameters()) == nnz == 1315
    peftfx.save(program, tmp_path / "a")
    raw = (tmp_path / "a" / "tensors.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", raw[:8])
    assert len(raw) - 8 - header == nnz * (4 + 4)
    assert len(raw) < 0.011 * 4 * sum(p.numel() for p in model.parameters()) + 1024
    assert torch.equal(peftfx.load(model, tmp_path / "a")(x), program(x))


def test_weights_that_come_later(tmp_path: Path) -> None:
    """Captured on the meta device: stage 1 waits for weights, stage 3 loads and folds to files."""
    model = ZOO["gpt2"].build()
    inputs = ZOO["gpt2"].inputs(3, 9)
    model.save_pretrained(tmp_path / "model")
    with torch.device("meta"):
        empty = ZOO["gpt2"].make().eval()
    hollow = peftfx.capture(empty, kwargs=inputs)
    with pytest.raises(MetaTensorError, match="load_weights"):
        peftfx.run(hollow, f"{SMALL};bake")
    program = baked(randomise(peftfx.run(peftfx.capture(model, kwargs=inputs), SMALL), 0.3))
    randomise(program, 0.2)
    want = first(program(**inputs)).detach()
    peftfx.save(program, tmp_path / "adapter")
    attached = attach(hollow, read(tmp_path / "adapter"), "adapter")
    loaded = peftfx.load_weights(attached, tmp_path / "model")
    torch.testing.assert_close(first(loaded(**inputs)).detach(), want)
    folded = peftfx.fold_checkpoint(
        hollow, tmp_path / "model", tmp_path / "folded", adapter=tmp_path / "adapter"
    )
    assert folded.changed
    merged = type(model).from_pretrained(tmp_path / "folded").eval()
    torch.testing.assert_close(first(merged(**inputs)).detach(), want, rtol=1e-4, atol=1e-5)


def test_training_continues_where_it_was(captured: Any, tmp_path: Path) -> None:
    _, base = captured["encoder"]

    def steps(program: peftfx.Program, optimizer: Any, seeds: range) -> None:
        controllers = peftfx.controllers(program)
        controllers.load_state_dict(controllers.state_dict())
        controllers.start(optimizer, 6)
        for seed in seeds:
            torch.manual_seed(seed)
            controllers.begin_forward(batch(seed=seed))
            outputs = first(program.train()(**batch(seed=seed)))
            (outputs.pow(2).mean() + controllers.loss(outputs)).backward()
            controllers.before_step(seed)
            optimizer.step()
            controllers.after_step(seed)
            optimizer.zero_grad()

    def optimizer_of(program: peftfx.Program) -> torch.optim.Optimizer:
        groups = peftfx.controllers(program).param_groups(lr=0.01, weight_decay=0.1)
        return torch.optim.AdamW(groups)

    text = "diff_pruning{l0=0.0001,alpha_lr=10,density=0.05}"
    for stage in (text, f"{text};bake"):
        start = peftfx.run(base, stage)
        through, halfway = start.fork(), start.fork()
        through_optimizer, optimizer = optimizer_of(through), optimizer_of(halfway)
        steps(through, through_optimizer, range(6))
        steps(halfway, optimizer, range(3))
        peftfx.save(halfway, tmp_path / "half")
        resumed = peftfx.load(base, tmp_path / "half")
        fresh = optimizer_of(resumed)
        fresh.load_state_dict(optimizer.state_dict())
        steps(resumed, fresh, range(3, 6))
        want = through.named_trainable_parameters()
        got = resumed.named_trainable_parameters()
        assert all(torch.equal(got[n], p) for n, p in want.items())
        assert set(got) == set(want)
        assert any(not torch.equal(p, start.module.get_parameter(n)) for n, p in got.items())
