"""Bank: each row of a batch gets the adapter that its id says, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import InputError

from ..models import Decoder, batch, build, first, moved, randomise

MEMBERS = "lora{rank=2,name=a};lora{rank=3,name=b,seed=1,where=q|o};adalora{rank=2,target=1,name=c}"
IDS = torch.tensor([1, 0, 2, -1, 3])
"""b, a, c, and twice no adapter."""


def members(base: peftfx.Program, text: str = MEMBERS) -> peftfx.Program:
    return randomise(peftfx.run(base, text))


def expected(program: peftfx.Program, inputs: dict[str, Tensor]) -> Tensor:
    """Row by row, what the program with one member alone gives."""
    alone = [first(program.only((n,))(**inputs)) for n in "abc"]
    alone.append(first(program.base(**inputs)))
    return torch.stack([alone[k][row] for row, k in enumerate([1, 0, 2, 3, 3])])


@pytest.mark.parametrize("name", ["encoder", "decoder", "fused", "gpt2"])
def test_each_row_has_its_own_adapter(captured: Any, zoo: Any, name: str) -> None:
    base: peftfx.Program = zoo[name] if name == "gpt2" else captured[name][1]
    inputs = {n: t for n, t in batch(5, 11, pad=3).items() if n in base.spec.names}
    inputs["input_ids"] = inputs["input_ids"] % 60
    program = members(base)
    bank = peftfx.run(program, "bank")
    want, got = expected(program, inputs), first(bank(**inputs, adapter=IDS))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    plain = first(base(**inputs))
    assert all(moved(plain[row], got[row]) > 0.01 for row in range(3))
    assert torch.equal(got[3:], plain[3:])
    torch.testing.assert_close(first(bank(**inputs)), first(program.only(("a",))(**inputs)))
    for ids, value in ((IDS + 1, 4), (IDS - 1, -2)):
        with pytest.raises(InputError, match=f"'adapter' holds {value}.* -1 to 3"):
            bank(**inputs, adapter=ids)


def test_half_precision_and_dropout() -> None:
    base = peftfx.capture(build("encoder"), kwargs=batch(), dtype=torch.bfloat16)
    program = members(base, "lora{name=a,dropout=0.5};lora{name=b,seed=1,dropout=0.5}")
    bank = peftfx.run(program, "bank")
    got = first(bank(**batch(), adapter=torch.tensor([1, 0, 1])))
    alone = [first(program.only((n,))(**batch())) for n in "ab"]
    want = torch.stack([alone[1][0], alone[0][1], alone[1][2]])
    assert got.dtype == torch.bfloat16 and moved(want, got) < 0.02
    assert moved(first(base(**batch())), got) > 0.05


def test_saved_loaded_replayed_and_taken_apart(captured: Any, tmp_path: Path) -> None:
    model, base = captured["encoder"]
    program = members(base)
    bank = peftfx.run(program, "bank")
    inputs = {**batch(5, 11), "adapter": IDS}
    want = first(bank(**inputs))
    assert bank.adapters == ("a", "b", "c", "bank")
    assert all(c.holds for c in bank.verify())
    peftfx.save(bank, tmp_path / "adapters")
    loaded = peftfx.load(model, tmp_path / "adapters")
    assert torch.equal(first(loaded(**inputs)), want) and loaded.text() == bank.text()
    peftfx.save(program, tmp_path / "members")
    held = [(tmp_path / d / "tensors.safetensors").stat().st_size for d in ("adapters", "members")]
    assert held[0] == held[1]
    peftfx.save_program(bank, tmp_path / "program")
    whole = peftfx.load_program(tmp_path / "program")
    torch.testing.assert_close(first(whole(**inputs)), want)
    apart = bank.without("bank")
    assert torch.equal(first(apart(**batch())), first(program(**batch())))
    assert apart.named_trainable_parameters().keys() == program.named_trainable_parameters().keys()
    assert not bank.trainable_parameters()


def test_other_adapters_go_on(captured: Any) -> None:
    """What is not low-rank acts on all rows, and trains."""
    _, base = captured["decoder"]
    program = members(
        base, "lora{name=a};lora{name=b,seed=1};ia3;serial_adapter{bottleneck=4,norms=false}"
    )
    bank = peftfx.run(program, "bank{names=[b,a],others=keep}")
    own = {"ia3", "serial_adapter"}
    assert {site for site, _ in bank.history[-1].skipped} == own
    assert all("acts on all rows" in why for _, why in bank.history[-1].skipped)
    assert {n.split(".")[1] for n in bank.named_trainable_parameters()} == own
    assert set(peftfx.controllers(bank).each) >= own
    got = first(bank(**batch(), adapter=torch.tensor([1, 0, 2])))
    rest = ("ia3", "serial_adapter")
    for row, names in enumerate((("a", *rest), ("b", *rest), rest)):
        alone = first(program.only(names)(**batch()))
        torch.testing.assert_close(got[row], alone[row], rtol=1e-5, atol=1e-5)
    folded = peftfx.run(bank, "fold")
    torch.testing.assert_close(first(folded(**batch())), first(bank(**batch())))
    assert any("which adapter acts" in why for _, why in folded.history[-1].skipped)


def test_channels_are_cut_through_it(captured: Any) -> None:
    _, base = captured["decoder"]
    program = members(base, "lora{name=a,where=ffn};lora{name=b,seed=1,where=ffn.down}")
    cut = "channel_pruning{ratio=0.25}"
    pruned = peftfx.run(program, f"bank;{cut}")
    assert all(c.holds for c in pruned.verify())
    got = first(pruned(**batch(), adapter=torch.tensor([0, 1, 2])))
    want = first(peftfx.run(base, cut)(**batch()))
    torch.testing.assert_close(got[2], want[2])
    assert moved(want[0], got[0]) > 0.01 < moved(want[1], got[1])


def test_generate_takes_ids(captured: Any) -> None:
    _, base = captured["decoder"]
    program = randomise(peftfx.run(base, "lora{name=a,where=linear};lora{name=b,seed=1}"), 1.0)
    bank = peftfx.run(program, "bank")
    ids = batch(2, 5)["input_ids"]
    got = bank.generate(ids, max_new_tokens=6, adapter=torch.tensor([1, 0]))
    alone = {n: program.only((n,)).generate(ids, max_new_tokens=6) for n in "ab"}
    assert got[0].tolist() == alone["b"][0].tolist() != alone["a"][0].tolist()
    assert got[1].tolist() == alone["a"][1].tolist()


def test_onnx_runtime_switches_rows(captured: Any, tmp_path: Path) -> None:
    from peftfx.exporters.onnx.export import session

    _, base = captured["decoder"]
    bank = peftfx.run(members(base), "bank")
    report = peftfx.export_onnx(bank, tmp_path / "bank.onnx")
    assert report.inputs[-1] == "adapter"
    inputs = {**batch(5, 11), "adapter": IDS}
    feed = {n: t.numpy() for n, t in inputs.items()}
    found = session(tmp_path / "bank.onnx").run(None, feed)[0]
    torch.testing.assert_close(torch.from_numpy(found), first(bank(**inputs)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bitfit;bank", "no adapter can be a member .there is none.*Insert some first"),
        ("lora{name=a};bank{names=[aa]}", "no adapter 'aa' .*nearest: a"),
        ("lora{name=a};dora;bank{names=[dora]}", "'a' is no member .it is not in names"),
        ("lora{name=a};bank;bank", "has a bank already"),
        ("lora{name=a};bank{names=[a,a]}", "different adapters"),
        ("lora{name=a};bank{input=attention_mask}", "has an input 'attention_mask' already"),
        (
            "unipelt{rank=2,bottleneck=4};bank{names=[unipelt]}",
            "reads gate|branch cannot be chosen",
        ),
        ("lora{name=a};lora{name=b};fold;bank", "no adapter can be a member"),
        ("lora{name=a};ia3;bank", "'ia3' is no member .it is not in names.*all rows.*others=keep"),
        ("lora{name=a};lora{name=b};bank{names=[a]}", "'b' is no member .it is not in names"),
        ("bitfit;lora{name=a};bank", "'bitfit' is no member .it trains .* tensors of the base"),
    ],
)
def test_refusals(captured: Any, text: str, said: str) -> None:
    _, base = captured["decoder"]
    with pytest.raises(peftfx.RewriteError, match=said):
        peftfx.run(base, text)


def test_members_must_be_there_and_samples_told_apart(captured: Any) -> None:
    _, base = captured["decoder"]
    bank = peftfx.run(base, "lora{name=a};lora{name=b};bank")
    with pytest.raises(peftfx.RewriteError, match="made of the adapter 'b'"):
        bank.without("b")
    fixed = peftfx.capture(Decoder(layers=1), kwargs=batch(), dynamic={})
    with pytest.raises(peftfx.RewriteError, match="no input has a dynamic batch size"):
        peftfx.run(fixed, "lora;bank")


@pytest.mark.parametrize("name", ["encoder", "fused"])
def test_lowered_it_adds_to_the_linears_own_result(captured: Any, name: str) -> None:
    _, base = captured[name]
    bank = peftfx.run(members(base), "bank")
    lowered = peftfx.run(bank, "lower")
    assert lowered.history[-1].edited
    inputs = {"input_ids": batch(5, 11)["input_ids"], "adapter": IDS}
    inputs = {**batch(5, 11), **inputs} if "attention_mask" in bank.spec.names else inputs
    with torch.no_grad(), torch.profiler.profile() as seen:
        torch.testing.assert_close(first(lowered(**inputs)), first(bank(**inputs)))
    added = [e for e in seen.events() if e.name == "aten::baddbmm_"]  # pyright: ignore
    assert len(added) >= len(lowered.history[-1].edited)
    assert peftfx.run(lowered, "lower{target=off}").text() == bank.text()
