"""Banks of every kind of branch: each row of a batch gets what its adapter alone gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import InputError, PassError

from ..models import batch, first, moved, randomise

IDS = torch.tensor([1, 0, 1, -1, 2])
"""b, a, b, and twice no adapter."""

TWO = {
    "serial": "serial_adapter{bottleneck=4,norms=false,name=a};serial_adapter{bottleneck=6,"
    "norms=false,name=b,seed=1}",
    "scales": "ia3{name=a};ia3{name=b}",
    "scales of some sites": "ia3{name=a,where=k|v};ia3{name=b,where=v|ffn.down}",
    "Kronecker products": "lokr{rank=2,name=a,where=q};lokr{rank=1,name=b,where=q}",
    "embeddings": "lora{rank=2,where=embedding.token,name=a};lora{rank=2,name=b,seed=1,"
    "where=embedding.token}",
    "several slots": "lora{rank=2,name=a,where=q};lora{rank=3,name=b,seed=1,where=q};"
    "ia3{name=c,where=q|v};bank{names=[a,b,c]}",
}


def alone(program: Any, names: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What each member gives alone, and the model without adapters."""
    found = [first(program.only((n,))(**inputs)) for n in names]
    return [*found, first(program.base(**inputs))]


def check(program: Any, bank: Any, names: str, inputs: dict[str, Tensor], ids: Tensor) -> None:
    want, got = alone(program, names, inputs), first(bank(**inputs, adapter=ids))
    for row, k in enumerate(ids.tolist()):
        expected = want[-1 if k in (-1, len(names)) else k][row]
        torch.testing.assert_close(got[row], expected, rtol=1e-4, atol=1e-5)
        for other, values in enumerate(want):
            if other != (len(names) if k < 0 else k):
                assert moved(values[row], got[row]) > 1e-3, (row, other)


@pytest.mark.parametrize("kind", TWO)
@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_each_row_has_its_own(captured: Any, name: str, kind: str) -> None:
    base = captured[name][1]
    text = TWO[kind].removesuffix(";bank{names=[a,b,c]}")
    program = randomise(peftfx.run(base, text), 0.2)
    bank = peftfx.run(program, "bank{names=[a,b,c]}" if "name=c" in text else "bank")
    names = "abc" if "name=c" in text else "ab"
    ids = torch.tensor([1, 0, 2, -1, 3]) if names == "abc" else IDS
    check(program, bank, names, batch(5, 11, pad=2), ids)
    assert not bank.trainable_parameters() and all(c.holds for c in bank.verify())


def test_prefixes_of_every_row(captured: Any) -> None:
    text = "prefix_tuning{length=3,name=a};prefix_tuning{length=3,name=b,seed=1}"
    for name in ("decoder", "fused"):
        base = captured[name][1]
        inputs = {n: t for n, t in batch(4, 11, pad=2).items() if n in base.spec.names}
        program = randomise(peftfx.run(base, text), 0.5)
        bank = peftfx.run(program, "bank")
        want = alone(program, "ab", inputs)
        ids = torch.tensor([1, 0, 0, 1])
        got = first(bank(**inputs, adapter=ids))
        for row, k in enumerate(ids.tolist()):
            torch.testing.assert_close(got[row], want[k][row], rtol=1e-4, atol=1e-5)
            assert moved(want[1 - k][row], got[row]) > 1e-3
        with pytest.raises(InputError, match="'adapter' holds -1; it takes 0 to 1"):
            bank(**inputs, adapter=-ids)
        apart = bank.without("bank")
        assert torch.equal(first(apart(**inputs)), first(program(**inputs)))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.two(F.relu(self.one(x)))).mean((2, 3)))


def test_convolutions() -> None:
    torch.manual_seed(0)
    base = peftfx.capture(Images().eval(), (torch.randn(4, 3, 8, 8),))
    text = "lora{rank=2,where=conv,name=a};lora{rank=2,where=conv,name=b,seed=1}"
    program = randomise(peftfx.run(base, text), 0.5)
    bank = peftfx.run(program, "bank")
    check(program, bank, "ab", {"x": torch.randn(5, 3, 8, 8)}, IDS)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=2)
        self.two = nn.ConvTranspose2d(8, 4, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x)))


def test_each_row_takes_its_tensors(captured: Any) -> None:
    """Bottlenecks, lookups and convolutions in groups, of unlike ranks, are tables by adapter."""
    torch.manual_seed(0)
    sizes = {"x": {0: "batch", 2: "height", 3: "width"}}
    pictures = peftfx.capture(Grouped().eval(), (torch.randn(4, 4, 9, 8),), dynamic=sizes)
    text = "lora{rank=1,where=conv,name=a};lora{rank=2,where=conv,name=b,seed=1}"
    tables = "lora{rank=2,where=embedding.token,name=b,seed=1}"
    cases = (
        (pictures, text, "RowwiseConvolution", {"x": torch.randn(5, 4, 7, 6)}),
        (captured["tiny"][1], TWO["serial"], "RowwiseBottleneck", batch(5, 9)),
        (captured["tiny"][1], f"lora{{rank=3,where=embedding.token,name=a}};{tables}",
         "RowwiseLookup", batch(5, 9)),
    )  # fmt: skip
    for base, text, kind, inputs in cases:
        program = randomise(peftfx.run(base, text), 0.5)
        bank = peftfx.run(program, "bank")
        branches = [bank.branch(a) for a in bank.attached_by("bank")]
        assert {type(b).__name__ for b in branches} == {kind}
        assert not any(isinstance(m, nn.ModuleList) for b in branches for m in b.children())
        check(program, bank, "ab", inputs, IDS)


def test_saved_and_loaded(captured: Any, tmp_path: Path) -> None:
    model, base = captured["encoder"]
    program = randomise(peftfx.run(base, TWO["serial"]), 0.2)
    bank = peftfx.run(program, "bank")
    inputs = {**batch(5, 11), "adapter": IDS}
    want = first(bank(**inputs))
    peftfx.save(bank, tmp_path / "adapters")
    loaded = peftfx.load(model, tmp_path / "adapters")
    assert torch.equal(first(loaded(**inputs)), want) and loaded.text() == bank.text()
    peftfx.save_program(bank, tmp_path / "program")
    torch.testing.assert_close(first(peftfx.load_program(tmp_path / "program")(**inputs)), want)
    apart = bank.without("bank")
    assert torch.equal(first(apart(**batch())), first(program(**batch())))


def test_compiled_outlined_and_exported(captured: Any, tmp_path: Path) -> None:
    program = randomise(peftfx.run(captured["tiny"][1], f"{TWO['serial']};ia3{{name=c}}"), 0.2)
    bank = peftfx.run(program, "bank{names=[a,b,c]}")
    inputs = {**batch(4, 8), "adapter": torch.tensor([0, 1, 2, -1])}
    want = first(bank(**inputs))
    assert torch.equal(first(peftfx.outline(bank)(**inputs)), want)
    compiled: Any = torch.compile(bank.module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(first(compiled(**inputs)), want, rtol=1e-4, atol=1e-5)
    assert peftfx.export_onnx(bank, tmp_path / "bank.onnx").error < 1e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prefix_tuning{length=2,name=a};prefix_tuning{length=3,name=b};bank",
         "its length is 3, that of the first 2"),
        ("prefix_tuning{length=2,name=a};ia3{name=b};bank", "'b' has no rows in front of the keys"),
        ("prompt_tuning{length=2,name=a};bank", "its prompt cannot be taken out of the graph. Save it"),
    ],
)  # fmt: skip
def test_what_is_no_bank(captured: Any, text: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        peftfx.run(captured["encoder"][1], text)


def saved(base: Any, texts: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """Each adapter alone, trained at random and saved, by its name."""
    alone = {n: randomise(peftfx.run(base, t), 0.4) for n, t in texts.items()}
    for name, program in alone.items():
        peftfx.save(program, tmp_path / name)
    return alone


def check_saved(base: Any, bank: Any, alone: dict[str, Any], ids: Tensor, inputs: Any) -> None:
    want = [first(p(**inputs)) for p in (*alone.values(), base)]
    got = first(bank(**inputs, adapter=ids))
    for row, k in enumerate(ids.tolist()):
        torch.testing.assert_close(got[row], want[k][row], rtol=1e-4, atol=1e-5)
        assert moved(want[k - 1][row], got[row]) > 1e-3


@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_row_scales_of_saved_adapters(captured: Any, tmp_path: Path, name: str) -> None:
    """DoRAs, of which one weight takes one: at the same sites, of other ranks, and of some."""
    model, base = captured[name]
    texts = {"a": "dora{rank=2}", "b": "dora{rank=3,seed=1,where=q|ffn.down}"}
    alone = saved(base, texts, tmp_path)
    bank = peftfx.run(base, "bank{names=[a,b]}", sources=[tmp_path / n for n in "ab"])
    inputs = batch(4, 11, pad=2)
    check_saved(base, bank, alone, torch.tensor([1, 0, 2, -1]), inputs)
    assert all(c.holds for c in bank.verify()) and not bank.trainable_parameters()
    peftfx.save(bank, tmp_path / "bank")
    for n in "ab":  # the bank needs them no more
        (tmp_path / n).rename(tmp_path / f"gone_{n}")
    loaded = peftfx.load(model, tmp_path / "bank")
    given = {**inputs, "adapter": torch.tensor([1, 0, 2, -1])}
    assert torch.equal(first(loaded(**given)), first(bank(**given)))
    assert torch.equal(first(bank.without("bank")(**inputs)), first(base(**inputs)))


@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_prompts_of_saved_adapters(captured: Any, tmp_path: Path, name: str) -> None:
    base = captured[name][1]
    texts = {"a": "prompt_tuning{length=3}", "b": "prompt_tuning{length=3,seed=1}"}
    alone = saved(base, texts, tmp_path)
    bank = peftfx.run(base, "bank{names=[a,b]}", sources=[tmp_path / n for n in "ab"])
    inputs = batch(4, 11, pad=2)
    check_saved(base, bank, alone, torch.tensor([1, 0, 0, 1]), inputs)
    with pytest.raises(InputError, match="'adapter' holds -1; it takes 0 to 1"):
        bank(**inputs, adapter=torch.tensor([-1, 0, 0, 1]))
    saved(base, {"c": "prompt_tuning{length=2}"}, tmp_path)
    with pytest.raises(PassError, match="its length is 2, that of the first 3"):
        peftfx.run(base, "bank{names=[a,c]}", sources=[tmp_path / n for n in "ac"])
    with pytest.raises(PassError, match=r"the sources hold .* Say names=\[...\]"):
        peftfx.run(base, "bank{names=[a]}", sources=[tmp_path / n for n in "ab"])


def test_scales_are_gathered(captured: Any, tmp_path: Path) -> None:
    """No member computes for rows that are not its own; compiled and exported alike."""
    program = randomise(peftfx.run(captured["tiny"][1], "ia3{name=a};ia3{name=b}"), 0.3)
    bank = peftfx.run(program, "bank{names=[a,b]}")
    assert all(not bank.branch(a).members for a in bank.attached_by("bank"))
    given = {**batch(4, 8), "adapter": torch.tensor([0, 1, 2, -1])}
    compiled: Any = torch.compile(bank.module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(first(compiled(**given)), first(bank(**given)), rtol=1e-4, atol=1e-5)
    assert peftfx.export_onnx(bank, tmp_path / "bank.onnx").error < 1e-5


def test_tokens_first_with_merged_axes() -> None:
    """Scales and DoRAs where samples and tokens share an axis (`out_proj`)."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    base = peftfx.capture(model, (torch.randn(7, 3, 16),))
    text = "ia3{name=a,where=o|ffn.down};ia3{name=b,where=o|v}"
    program = randomise(peftfx.run(base, text), 0.5)
    bank = peftfx.run(program, "bank")
    x = torch.randn(5, 3, 16)
    got = bank(x, adapter=torch.tensor([1, -1, 0]))
    for sample, alone in enumerate((program.only(("b",)), base, program.only(("a",)))):
        torch.testing.assert_close(got[:, sample], alone(x)[:, sample], rtol=1e-4, atol=1e-5)
        assert moved(got[:, sample], (base if sample != 1 else program)(x)[:, sample]) > 1e-3
