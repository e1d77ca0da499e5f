"""AdapterFusion against its equations; its members frozen; their sources; two tasks fused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import BaseMismatchError, OptionError, PassError

from ..models import batch, build, first, moved, randomise
from .common import LAST, digits, hooked, readout, subject

LEAST_CHANGE = {"": 0.005, "tiny": 0.002, "zoo": 1e-5}
"""What is fused is frozen near its small initial values."""
MEMBER = "serial_adapter{{name={},bottleneck=4,norms=false}}"


def member(base: peftfx.Program, name: str, seed: int) -> peftfx.Program:
    """An adapter as if it had been trained alone."""
    return randomise(peftfx.run(base, MEMBER.format(name)), 0.3, seed)


@pytest.fixture
def saved(captured: Any, tmp_path: Path) -> tuple[peftfx.Program, list[Path]]:
    """The encoder, and two artifacts of adapters a and b for it."""
    _, base = captured["encoder"]
    for seed, name in enumerate("ab"):
        peftfx.save(member(base, name, seed), tmp_path / name)
    return base, [tmp_path / "a", tmp_path / "b"]


def two(base: peftfx.Program, folder: Path) -> peftfx.Program:
    """A program with the adapters a and b, each trained alone."""
    for seed, name in enumerate("ab"):
        peftfx.save(member(base, name, seed), folder / name)
    return peftfx.load(peftfx.load(base, folder / "a"), folder / "b")


def fused(own: Mapping[str, Tensor], members: list[Mapping[str, Tensor]]) -> Callable[..., Tensor]:
    """h <- h + sum_n softmax_n((Q h + b_Q) . (K u_n + b_K)) V u_n, as a hook."""

    def fuse(_: Any, h: Tensor) -> Tensor:
        query = h @ own["query"].T + own["query_bias"]
        scores: list[Tensor] = []
        values: list[Tensor] = []
        for t in members:
            u = F.gelu(h @ t["down"].T + t["down_bias"]) @ t["up"].T + t["up_bias"]
            scores.append((query * (u @ own["key"].T + own["key_bias"])).sum(-1))
            values.append(u @ own["value"].T)
        p = torch.stack(scores).softmax(0)
        return h + sum(p[n][..., None] * v for n, v in enumerate(values))

    return fuse


def reference(program: peftfx.Program, name: str) -> dict[str, Any]:
    """The hooks by module, from the tensors of the program by name."""
    held: dict[tuple[str, str], dict[str, Tensor]] = {}
    for full, p in program.module.named_parameters():
        if full.startswith("peftfx."):
            _, adapter, stream, layer, kind, _, leaf = full.split(".")
            place = LAST[name][stream][kind].format(layer.removeprefix("layer"))
            held.setdefault((place, adapter), {})[leaf] = p.detach()
    places = {place for place, _ in held}
    return {p: fused(held[p, "adapter_fusion"], [held[p, n] for n in "ab"]) for p in places}


@pytest.mark.parametrize("name", list(LAST))
def test_fusion_equals_its_reference(captured: Any, zoo: Any, name: str, tmp_path: Path) -> None:
    model, base, inputs = subject(captured, zoo, name)
    stacked = two(base, tmp_path)
    program = randomise(peftfx.run(stacked, "adapter_fusion{names=[a,b]}"), 0.3, 3)
    hooks = reference(program, name)
    assert set(hooks) == {
        p.format(i) for s in LAST[name].values() for p in s.values() for i in (0, 1)
    }
    with hooked(model, hooks):
        want = first(model(**inputs))
    got = first(program(**inputs))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # T5: values of 0.04 in a sum
    for other in (base, stacked):
        assert moved(first(other(**inputs)), got) > 0.01
    merged = peftfx.run(program, "bake{names=[adapter_fusion]}")
    torch.testing.assert_close(first(merged(**inputs)), got, rtol=1e-4, atol=2e-5)
    assert not any("key" in n for n in merged.named_trainable_parameters())


def test_equal_scores_give_the_mean(captured: Any, tmp_path: Path) -> None:
    """At tau -> infinity; members that are equal give one of them, which is the adapter alone."""
    _, base = captured["encoder"]
    program = peftfx.run(two(base, tmp_path), "adapter_fusion{temperature=1e9}")
    alone = peftfx.load(base, tmp_path / "a")
    with torch.no_grad():
        held = dict(program.module.named_parameters())
        for name, parameter in held.items():
            if name.startswith("peftfx.b."):
                parameter.copy_(held[name.replace("peftfx.b.", "peftfx.a.")])
            if name.endswith(".value"):
                parameter.copy_(torch.eye(32))
    torch.testing.assert_close(first(program(**batch())), first(alone(**batch())))


def test_trainable_count() -> None:
    """The count of MiniLM's shapes (one fusion a layer): 6 (3 d^2 + 2 d)."""
    with torch.device("meta"):
        model = build_wide()
    base = peftfx.capture(model, kwargs={n: t.to("meta") for n, t in batch().items()})
    members = ";".join(f"serial_adapter{{name={n},norms=false,where=ffn}}" for n in "ab")
    program = peftfx.run(base, f"{members};adapter_fusion")
    assert sum(p.numel() for p in program.trainable_parameters()) == 2_658_816


def build_wide() -> nn.Module:
    from ..models import Encoder

    return Encoder(384, 12, 6).eval()


def test_members_are_frozen_and_stay_theirs(captured: Any, tmp_path: Path) -> None:
    model, base = captured["encoder"]
    stacked = two(base, tmp_path)
    program = peftfx.run(stacked, "adapter_fusion{names=[a,b]}").train()
    trained = set(program.named_trainable_parameters())
    leaves = {n.rpartition(".")[2] for n in trained}
    assert all(n.startswith("peftfx.adapter_fusion.") for n in trained)
    assert leaves == {"query", "query_bias", "key", "key_bias", "value"} and len(trained) == 20
    before = {n: p.detach().clone() for n, p in program.module.named_parameters()}
    controllers = peftfx.controllers(program)
    assert list(controllers.each) == ["adapter_fusion"]
    optimizer = torch.optim.AdamW(controllers.param_groups(lr=0.01, weight_decay=0.1))
    controllers.start(optimizer, 3)
    for step in range(3):
        outputs = program(**batch(seed=step))
        (first(outputs).pow(2).mean() + controllers.loss(outputs)).backward()
        assert all(p.grad is not None for p in program.trainable_parameters())
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, p in program.module.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in trained if not n.endswith("key_bias")} <= changed <= trained
    # Another pass leaves them frozen; without the fusion they stand in series and train again.
    more = peftfx.run(program, "lora")
    assert not any(
        n.startswith(("peftfx.a.", "peftfx.b.")) for n in more.named_trainable_parameters()
    )
    bare = more.without("lora").without("adapter_fusion")
    assert bare.text() == stacked.text()
    assert torch.equal(first(bare.eval()(**batch())), first(stacked(**batch())))
    assert set(bare.named_trainable_parameters()) == set(stacked.named_trainable_parameters())
    with pytest.raises(PassError, match="made of the adapter 'a', which is not here"):
        program.without("a")
    peftfx.save(program, tmp_path / "f")
    loaded = peftfx.load(model, tmp_path / "f")
    assert torch.equal(first(loaded(**batch())), first(program.eval()(**batch())))
    assert loaded.text() == program.text() and set(loaded.named_trainable_parameters()) == trained


def test_trained_norms_freeze_with_their_adapter(captured: Any) -> None:
    _, base = captured["encoder"]
    members = "serial_adapter{name=a,bottleneck=4};serial_adapter{name=b,bottleneck=4}"
    program = peftfx.run(base, f"{members};adapter_fusion")
    assert not any("norm" in n for n in program.named_trainable_parameters())
    kept = peftfx.run(base, f"{members};bitfit;adapter_fusion{{names=[a,b]}}")
    trained = {n for n in kept.named_trainable_parameters() if "norm" in n}
    assert trained and all(n.endswith("bias") for n in trained)


def test_members_may_come_from_artifacts(saved: Any, tmp_path: Path) -> None:
    base, folders = saved
    model = build("encoder")
    program = peftfx.run(base, "adapter_fusion", sources=folders)
    loaded = peftfx.load(peftfx.load(base, folders[0]), folders[1])
    same = peftfx.run(loaded, "adapter_fusion")
    assert torch.equal(first(program(**batch())), first(same(**batch())))
    assert program.adapters == ("adapter_fusion",)
    assert len(program.trainable_parameters()) == len(same.trainable_parameters())
    adopted = program.history[-1].plan.decisions["adopted"]
    assert list(adopted) == ["a", "b"] and all(len(s["digest"]) == 64 for s in adopted.values())
    # Replaying needs no source: everything is in the artifact, and goes with the fusion.
    randomise(program, 0.3)
    want = first(program(**batch()))
    peftfx.save(program, tmp_path / "f")
    for folder in folders:
        for file in folder.iterdir():
            file.unlink()
    restored = peftfx.load(model, tmp_path / "f")
    assert torch.equal(first(restored(**batch())), want) and restored.text() == program.text()
    assert set(restored.named_trainable_parameters()) == set(program.named_trainable_parameters())
    assert torch.equal(first(restored.only(("adapter_fusion",))(**batch())), want)
    bare = restored.without("adapter_fusion")
    assert torch.equal(first(bare(**batch())), first(base(**batch()))) and not bare.attachments
    assert all(c.holds for c in restored.verify())


def test_names_of_sources(captured: Any, tmp_path: Path) -> None:
    _, base = captured["encoder"]
    for seed in range(2):
        alone = randomise(peftfx.run(base, "serial_adapter{norms=false}"), 0.3, seed)
        peftfx.save(alone, tmp_path / str(seed))
    folders = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(PassError, match=r"the sources hold serial_adapter, serial_adapter"):
        peftfx.run(base, "adapter_fusion", sources=folders)
    program = peftfx.run(base, "adapter_fusion{names=[old,new]}", sources=folders)
    paths = {".".join(a.path.split(".")[:3]) for a in program.attachments}
    assert {"peftfx.adapter_fusion.old", "peftfx.adapter_fusion.new"} <= paths


def test_wrong_members_are_errors(saved: Any, captured: Any, tmp_path: Path) -> None:
    base, folders = saved
    one = peftfx.run(base, MEMBER.format("a"))
    both = peftfx.run(one, MEMBER.format("b"))
    cases: list[tuple[peftfx.Program, str, list[Path], str]] = [
        (base, "adapter_fusion", [], "two adapters or more .* the program has none"),
        (one, "adapter_fusion", [], "not \\[a\\]"),
        (both, "adapter_fusion{names=[a,a]}", [], "not \\[a, a\\]"),
        (both, "adapter_fusion{names=[a,bb]}", [], "no adapter 'bb' .* Nearest: b"),
        (peftfx.run(one, "lora"), "adapter_fusion{names=[a,lora]}", [], "no adapter 'lora'"),
        (
            peftfx.run(one, "serial_adapter{name=c,where=ffn}"), "adapter_fusion", [],
            "only one of them is at s0.layer0.attn",
        ),
        (
            peftfx.run(both, "adapter_fusion"), "adapter_fusion{name=more,names=[a,b]}", [],
            "'adapter_fusion' combines the branch of 'a'",
        ),
        (base, "adapter_fusion{names=[x]}", folders, "the sources hold a, b"),
    ]  # fmt: skip
    for program, text, sources, message in cases:
        before = program.text()
        with pytest.raises(PassError, match=message):
            peftfx.run(program, text, sources=sources)
        assert program.text() == before
    with pytest.raises(OptionError, match="where"):
        peftfx.parse("adapter_fusion{where=ffn}")
    with pytest.raises(PassError, match="not int"):
        peftfx.run(base, "adapter_fusion", sources=[1])
    with pytest.raises(BaseMismatchError):
        peftfx.run(captured["decoder"][1], "adapter_fusion", sources=folders)
    peftfx.save(peftfx.run(base, "serial_adapter{name=n}"), tmp_path / "n")
    with pytest.raises(PassError, match=r"also trained 10 tensors of the base"):
        peftfx.run(base, "adapter_fusion", sources=[folders[0], tmp_path / "n"])


def test_other_serial_branches_keep_their_places(captured: Any) -> None:
    """c stands between a and b, d comes after the fusion: h -> fusion(a, b) -> c -> d."""
    _, base = captured["encoder"]
    recipe = ";".join(MEMBER.format(n) for n in "acb")
    program = peftfx.run(base, f"{recipe};adapter_fusion{{names=[a,b]}};{MEMBER.format('d')}")
    program = randomise(program, 0.3)
    text = program.text()
    assert "%a.s0.layer0.attn.serial = SerialAdapterBranch(%dropout, skip=False)" in text
    assert "%b.s0.layer0.attn.serial = SerialAdapterBranch(%dropout, skip=False)" in text
    assert "SerialAdapterBranch(%adapter_fusion_s0_layer0_attn_combine_add)" in text
    assert "SerialAdapterBranch(%c.s0.layer0.attn.serial)" in text
    assert "add(%layer_norm, %d.s0.layer0.attn.serial)" in text
    # LoRA at the linear below changes what all of them read, whenever it comes.
    late = peftfx.run(program, "lora{where=o|ffn.down}")
    assert all(
        f"%{n}.s0.layer0.attn.serial = SerialAdapterBranch(%dropout, skip=False)" in late.text()
        for n in "ab"
    )
    assert torch.equal(first(late(**batch())), first(program(**batch())))


def test_penalty_is_part_of_the_loss(captured: Any) -> None:
    _, base = captured["encoder"]
    recipe = ";".join(MEMBER.format(n) for n in "ab")
    program = randomise(peftfx.run(base, f"{recipe};adapter_fusion{{penalty=0.5}}"))
    values = [p for n, p in program.named_trainable_parameters().items() if n.endswith("value")]
    want = sum(0.5 * ((torch.eye(32) - v) ** 2).sum() for v in values)
    found = peftfx.controllers(program).loss(None)
    torch.testing.assert_close(found, want)
    found.backward()
    for value in values:
        torch.testing.assert_close(value.grad, value.detach() - torch.eye(32))


def test_two_tasks_are_fused(captured: Any, tmp_path: Path) -> None:
    """Scanned digits: an adapter each for `at least five` and `odd`, fused for `one of the two
    but not both`, which needs both."""
    _, base = captured["encoder"]
    inputs, number = digits(300)
    tasks = [number >= 5, number % 2 == 1]

    def fit(program: peftfx.Program, labels: Tensor, steps: int) -> tuple[float, float]:
        program.train()
        controllers = peftfx.controllers(program)
        optimizer = torch.optim.AdamW(controllers.param_groups(lr=1e-2))
        controllers.start(optimizer, steps)
        torch.manual_seed(0)
        losses: list[float] = []
        for _ in range(steps):
            outputs = program(**inputs)
            loss = F.cross_entropy(readout(first(outputs)), labels.long())
            losses.append(float(loss.detach()))
            (loss + controllers.loss(outputs)).backward()
            optimizer.step()
            optimizer.zero_grad()
        program.eval()
        return losses[0], losses[-1]

    for name, labels in zip("ab", tasks, strict=True):
        text = f"serial_adapter{{name={name},bottleneck=16,norms=false,std=0.05}}"
        alone = peftfx.run(base, text)
        start, end = fit(alone, labels, 60)
        assert end < 0.45 < 0.9 < start, (start, end)  # 0.69 is chance
        peftfx.save(alone, tmp_path / name)
    program = peftfx.run(base, "adapter_fusion", sources=[tmp_path / "a", tmp_path / "b"])
    start, end = fit(program, tasks[0] ^ tasks[1], 40)
    assert end < 0.45 < 0.9 < start, (start, end)


def test_a_member_with_reads_can_be_baked_later(captured: Any) -> None:
    """A hypernetwork's adapters are members like any other, and stay frozen when baked."""
    _, base = captured["encoder"]
    hyper = "hyperformer{tasks=3,bottleneck=4,dim=8,hidden=12,projected=8,norms=false}"
    stacked = randomise(peftfx.run(base, f"{hyper};{MEMBER.format('a')}"), 0.3)
    program = randomise(peftfx.run(stacked, "adapter_fusion"), 0.3)
    assert {n.split(".")[1] for n in program.named_trainable_parameters()} == {"adapter_fusion"}
    baked = peftfx.run(program, "bake{names=[hyperformer],inputs={task=1}}")
    want = first(program(**batch(), task=torch.tensor(1)))
    assert moved(first(program(**batch())), want) > 0.01
    torch.testing.assert_close(first(baked(**batch())), want)
    trained = {n: p.shape for n, p in program.named_trainable_parameters().items()}
    assert {n: p.shape for n, p in baked.named_trainable_parameters().items()} == trained
