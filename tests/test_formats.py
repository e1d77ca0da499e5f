"""Weights in every format: what is stored, and methods beside it, against dense references."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.edits.edit import Editor
from peftfx.rewriter.edits.folding.packing import while_unpacked
from peftfx.rewriter.errors import ExportError, FoldError, OptionError, PassError
from peftfx.rewriter.weights.codebook import NF4, Codebook
from peftfx.rewriter.weights.format import Dense, Format
from peftfx.rewriter.weights.integers import Quantised
from peftfx.rewriter.weights.onebit import OneBit
from peftfx.rewriter.weights.sparse24 import Sparse24

from .models import Decoder, Encoder, batch, build, first, moved, randomise

KINDS: dict[str, tuple[type[Format], dict[str, Any]]] = {
    "dense": (Dense, {}),
    "int8": (Quantised, {"bits": 8, "group": 8}),
    "int4": (Quantised, {"bits": 4, "group": 8}),
    "real zeros": (Quantised, {"bits": 4, "group": 8, "real_zeros": True}),
    "codebook": (Codebook, {"group": 8}),
    "onebit": (OneBit, {"group": 8}),
    "onebit rows": (OneBit, {"group": None}),
    "sparse24": (Sparse24, {}),
}
FORMATS = ("integers", "codebook", "onebit", "sparse24", "packed")
FEW = [name for name in KINDS if name != "dense"]
PASSES = ["codebook", "int8", "int4", "int2", "onebit", "sparse24"]


def matrix(rows: int = 6, columns: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, columns, generator=generator)
    made[1, :8] = 0  # a group of zeros
    return made


def packed(name: str, weight: Tensor) -> Format:
    kind, options = KINDS[name]
    return kind.packed(weight, **options)


# What is stored.


def by_hand(name: str, weight: Tensor) -> Tensor:
    """Each entry on its own."""
    want = torch.zeros_like(weight)
    for i, row in enumerate(weight):
        if name == "sparse24":
            for start in range(0, len(row), 4):
                four = row[start : start + 4]
                for j in four.abs().argsort(descending=True)[:2]:
                    want[i, start + int(j)] = four[j]
            continue
        width = len(row) if name == "onebit rows" else 8
        for start in range(0, len(row), width):
            group = row[start : start + width]
            if name.startswith("onebit"):
                values = [group.abs().mean() * (1 if w >= 0 else -1) for w in group]
            else:
                top = group.abs().max()
                values = [
                    top * min(NF4, key=lambda v, w=w, top=top: abs(v * top - w)) for w in group
                ]
            want[i, start : start + width] = torch.stack(values)
    return want


@pytest.mark.parametrize("name", ["codebook", "onebit", "onebit rows", "sparse24"])
@pytest.mark.parametrize("columns", [24, 21])
def test_a_matrix_is_what_its_formula_says(name: str, columns: int) -> None:
    weight = matrix(columns=columns)
    torch.testing.assert_close(packed(name, weight).dense(), by_hand(name, weight))


@pytest.mark.parametrize("name", KINDS)
def test_the_operator_multiplies_by_the_dense_matrix(name: str) -> None:
    form = packed(name, matrix())
    if isinstance(form, Dense):
        return
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(1))
    space, _, leaf = form.operator.partition("::")
    operator = getattr(getattr(torch.ops, space), leaf)
    y = operator(x, *form.tensors.values(), None, *form.integers.values())
    torch.testing.assert_close(y, x @ form.dense().T)
    space, _, leaf = form.unpacks.partition("::")
    unpack = getattr(getattr(torch.ops, space), leaf)
    dense = unpack(*form.tensors.values(), *form.integers.values(), form.columns)
    torch.testing.assert_close(dense, form.dense(), rtol=0, atol=0)


@pytest.mark.parametrize("name", KINDS)
def test_every_part_has_the_axes_that_it_says(name: str) -> None:
    form = packed(name, matrix())
    assert list(form.tensors) == list(form.parts) and form.scaled in form.parts
    assert (form.rows, form.columns) == (6, 24)
    for part, axes in form.parts.items():
        assert "out" not in axes[1:]
        assert ("out" in axes) == (form.tensors[part].shape[0] == form.rows)
    if name not in ("dense", "sparse24"):
        stored = sum(t.numel() * t.element_size() for t in form.tensors.values())
        assert stored < 24 * 6 * 4 * 0.6


@pytest.mark.parametrize("name", KINDS)
def test_rows_and_columns_are_scaled(name: str) -> None:
    form, generator = packed(name, matrix()), torch.Generator().manual_seed(2)
    rows, columns = torch.randn(6, generator=generator), torch.randn(24, generator=generator)
    torch.testing.assert_close(form.rows_scaled(rows).dense(), rows[:, None] * form.dense())
    if form.own_columns:
        scaled = form.columns_scaled(columns[None])
        torch.testing.assert_close(scaled.dense(), form.dense() * columns)
    else:
        with pytest.raises(FoldError, match="share what they are stored with"):
            form.columns_scaled(columns[None])
    assert form.own_columns == (name in ("dense", "sparse24"))


@pytest.mark.parametrize("name", KINDS)
def test_slices_are_those_of_the_dense_matrix(name: str) -> None:
    form = packed(name, matrix())
    index = torch.tensor([4, 1, 5])
    assert torch.equal(form.slice("out", index).dense(), form.dense()[index])
    if name == "onebit rows":
        with pytest.raises(PassError, match="only whole groups"):
            form.slice("in", torch.arange(8))
        return
    index = torch.cat([torch.arange(16, 24), torch.arange(8)])
    sliced = form.slice("in", index)
    assert torch.equal(sliced.dense(), form.dense()[:, index]) and sliced.columns == 16
    if name != "dense":
        with pytest.raises(PassError, match="only whole groups"):
            form.slice("in", torch.tensor([0, 1, 3, 2, 7, 6, 5, 4]))


def test_a_shorter_last_group_stays_last() -> None:
    form = Codebook.packed(matrix(columns=21), group=8)
    index = torch.cat([torch.arange(8), torch.arange(16, 21)])
    assert torch.equal(form.slice("in", index).dense(), form.dense()[:, index])
    with pytest.raises(PassError, match="only whole groups"):
        form.slice("in", index.roll(5))


@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("name", FEW)
def test_packing_again_is_never_further_than_the_old_matrix(name: str, size: float) -> None:
    form = packed(name, matrix())
    exact = form.dense() + size * matrix(seed=1)
    again = form.replaced(exact)
    assert {n: t.shape for n, t in again.tensors.items()} == {
        n: t.shape for n, t in form.tensors.items()
    }
    error = (again.dense() - exact).norm(dim=1)
    assert bool((error <= (form.dense() - exact).norm(dim=1) * (1 + 1e-6)).all())
    if size >= 1:
        assert bool((error < 0.9 * (form.dense() - exact).norm(dim=1)).all())


@pytest.mark.parametrize("name", FEW)
def test_what_is_representable_stays_as_it_is(name: str) -> None:
    form = packed(name, matrix())
    torch.testing.assert_close(form.replaced(form.dense()).dense(), form.dense())


@pytest.mark.parametrize("name", FEW)
def test_without_values_the_shapes_are_known(name: str) -> None:
    real, meta = packed(name, matrix()), packed(name, matrix().to("meta"))
    for part, tensor in meta.tensors.items():
        want = real.tensors[part]
        assert (tensor.shape, tensor.dtype) == (want.shape, want.dtype)


def test_only_known_layouts_are_asked_for() -> None:
    assert packed("codebook", matrix()).pack("matmulnbits") is None
    with pytest.raises(ExportError, match="there is no layout 'tiles'"):
        packed("int4", matrix()).pack("tiles")


# Methods beside them.


def stored_model(program: peftfx.Program, name: str) -> Any:
    """The plain model with the weights that a program multiplies by."""
    model = build(name)
    model.load_state_dict(program.export_state_dict())
    return model


@pytest.fixture(scope="module")
def stored(captured: Any) -> Callable[[str], peftfx.Program]:
    made: dict[str, peftfx.Program] = {}

    def of(kind: str) -> peftfx.Program:
        if kind not in made:
            made[kind] = peftfx.run(captured["block"][1], f"quantise{{format={kind}}}")
        return made[kind].fork()

    return of


def test_a_program_computes_what_is_stored(captured: Any, stored: Any) -> None:
    """And what that is: NF4 by groups of 64 or a row, whichever is shorter."""
    model, base = captured["block"]
    changes: dict[str, float] = {}
    for kind in PASSES:
        program = stored(kind)
        other = stored_model(program, "block")
        torch.testing.assert_close(first(program(**batch())), first(other(**batch())))
        changes[kind] = moved(first(base(**batch())), first(program(**batch())))
        assert torch.equal(other.head.weight, model.head.weight)
        old, new = model.layers[0].up.weight.detach(), other.layers[0].up.weight.detach()
        if kind == "codebook":
            values = (new / old.abs().amax(1, keepdim=True)).unique()
            assert bool((values[:, None] - torch.tensor(NF4)).abs().amin(1).max() < 1e-6)
        if kind == "sparse24":
            assert bool(((new != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all())
            assert torch.equal(new[new != 0], old[new != 0])
    assert 0 < changes["int8"] < changes["int4"] < changes["int2"]
    assert changes["codebook"] < changes["sparse24"] and changes["codebook"] < changes["onebit"]


Tensors = Mapping[str, Tensor]


def lora(w: Tensor, t: Tensors) -> Tensor:
    return w + 1.5 * t["b"] @ t["a"]


def dora(w: Tensor, t: Tensors) -> Tensor:
    v = lora(w, t)
    return t["m"][:, None] * v / v.norm(dim=1, keepdim=True)


def adalora(w: Tensor, t: Tensors) -> Tensor:
    return w + 1.5 * t["p"] @ torch.diag(t["e"]) @ t["q"]


METHODS: dict[str, tuple[str, Callable[[Tensor, Tensors], Tensor]]] = {
    "lora": ("lora{rank=2,alpha=3,where=linear and not head}", lora),
    "dora": ("dora{rank=2,alpha=3,where=linear and not head}", dora),
    "adalora": ("adalora{rank=2,alpha=3,where=linear and not head}", adalora),
    "ia3": ("ia3{where=k|v|ffn.up}", lambda w, t: t["l"][:, None] * w),
    "ia3 in": ("ia3{where=ffn.down}", lambda w, t: t["l"] * w),
}


def references(program: peftfx.Program, formula: Callable[[Tensor, Tensors], Tensor]) -> Any:
    """The plain model, with weights formed from what is stored and a method's equation."""
    model = build("block")
    quantised = program.only(())
    state = dict(quantised.export_state_dict())
    for attachment in program.attachments:
        own = {n: p.detach() for n, p in program.branch(attachment).named_parameters()}
        state[attachment.site] = formula(state[attachment.site], own)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("kind", ["codebook", "int4", "onebit", "sparse24"])
@pytest.mark.parametrize("equation", METHODS)
def test_a_method_stands_beside_a_format(
    stored: Any, equation: str, kind: str, tmp_path: Path
) -> None:
    text, formula = METHODS[equation]
    before = stored(kind)
    program = randomise(peftfx.run(before, text), 0.2)
    want = first(references(program, formula)(**batch(3, 7)))
    got = first(program(**batch(3, 7)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert moved(first(before(**batch(3, 7))), got) > 0.01
    got.pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in program.trainable_parameters())
    if kind != "onebit" and equation != "lora":
        return
    alone = program.without(equation.partition(" ")[0])
    assert torch.equal(first(alone(**batch(3, 7))), first(before(**batch(3, 7))))
    peftfx.save(program, tmp_path / "a")
    loaded = peftfx.load(program.base, tmp_path / "a")
    assert torch.equal(first(loaded(**batch(3, 7))), got)


EXACT = {"ia3": set(PASSES), "ia3 in": {"sparse24"}}
"""Scales of outputs fold into those of rows, and pairs have columns of their own."""


@pytest.mark.parametrize("kind", ["codebook", "int4", "onebit", "sparse24"])
@pytest.mark.parametrize("equation", METHODS)
def test_a_method_folds_exactly_or_with_loss_or_says_why(
    stored: Any, equation: str, kind: str
) -> None:
    text, formula = METHODS[equation]
    program = randomise(peftfx.run(stored(kind), text), 0.2)
    name, inputs = equation.partition(" ")[0], batch(3, 7)
    exact = references(program, formula)
    if kind in EXACT.get(equation, ()):
        folded = peftfx.run(program, "fold")
        torch.testing.assert_close(
            first(folded(**inputs)), first(exact(**inputs)), rtol=1e-4, atol=1e-5
        )
        assert folded.history[-1].certificate.kind == "bounded" and not folded.attachments
        return
    kept = peftfx.run(program, "fold")
    assert torch.equal(first(kept(**inputs)), first(program(**inputs)))
    reasons = {reason for _, reason in kept.history[-1].skipped}
    assert all("stored in" in r and "fold{lossy=true}" in r for r in reasons) and reasons
    with pytest.raises(FoldError, match=r"stored in .* say fold\{lossy=true\}"):
        peftfx.run(program, f"fold{{names=[{name}]}}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fold: .* rounding to 1 bit left")
        folded = peftfx.run(program, "fold{lossy=true}")
    assert not folded.attachments
    assert folded.text().count("_linear(") == program.text().count("_linear(")
    record = folded.history[-1]
    before = program.only(()).export_state_dict()
    after, want = folded.export_state_dict(), exact.state_dict()
    shares: list[float] = []
    for site in dict.fromkeys(a.site for a in program.attachments):
        change, made = want[site] - before[site], after[site] - before[site]
        shares.append(float((made * change).sum() / change.square().sum()))
        assert float((made - change).norm()) <= float(change.norm()) * (1 + 1e-5)
    assert record.certificate.measured["delta_left"] == pytest.approx(min([*shares, 1.0]), abs=1e-4)
    assert sum("of what was learnt" in note for note in str(record).splitlines()) == len(shares)
    other = stored_model(folded, "block")
    torch.testing.assert_close(first(folded(**inputs)), first(other(**inputs)))
    bare = folded.only(())
    assert torch.equal(first(bare(**inputs)), first(stored(kind)(**inputs)))


def test_a_lossy_fold_is_saved_and_verified(stored: Any, tmp_path: Path) -> None:
    program = randomise(peftfx.run(stored("codebook"), "lora{rank=2};ia3"), 0.2)
    folded = peftfx.run(program, "fold{lossy=true}")
    assert all(c.holds for c in folded.verify())
    peftfx.save(folded, tmp_path / "a")
    loaded = peftfx.load(folded.base, tmp_path / "a")
    assert torch.equal(first(loaded(**batch())), first(folded(**batch())))
    peftfx.save_program(folded, tmp_path / "p")
    again = peftfx.load_program(tmp_path / "p")
    assert torch.equal(first(again(**batch())), first(folded(**batch())))


def test_scales_that_train_are_packed_again_and_go_on_training(captured: Any) -> None:
    _, base = captured["block"]
    program = randomise(peftfx.run(base, "peqa{group=16};lora{rank=2}"), 0.01)
    folded = peftfx.run(program, "fold{lossy=true,names=[lora]}")
    names = program.owned["peqa"]
    assert names and all(folded.module.get_parameter(n).requires_grad for n in names)
    left = folded.without("lora")
    assert torch.equal(first(left(**batch())), first(program.without("lora")(**batch())))


def test_nothing_is_packed_again_where_nothing_folds(stored: Any) -> None:
    program = stored("codebook")
    before = dict(program.module.named_parameters())
    edit, site = Editor(program), program.sites["layers.0.up.weight"]
    assert while_unpacked(edit, site, lambda: None, frozenset()) is None
    edit.finish()
    assert dict(program.module.named_parameters()).keys() == before.keys()
    assert all(program.module.get_parameter(n) is p for n, p in before.items())
    assert torch.equal(first(program(**batch())), first(stored("codebook")(**batch())))


@pytest.mark.parametrize("kind", PASSES)
def test_biases_names_and_layouts_stay(captured: Any, kind: str) -> None:
    """A bias of the model's, one that is added, and a weight stored `[in, out]`."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm = nn.Linear(16, 24), nn.LayerNorm(16)
            self.down = nn.Parameter(torch.randn(24, 16) * 0.2)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.relu(self.up(self.norm(x))) @ self.down

    torch.manual_seed(0)
    model, x = Turned().eval(), torch.randn(2, 5, 16)
    base = peftfx.capture(model, (x,))
    program = randomise(
        peftfx.run(
            base,
            f"quantise{{format={kind},where=linear}};bitfit{{where=linear}};dora{{rank=2,where=linear}}",
        ),
        0.1,
    )
    assert program.text().count("_linear(") == 2
    other = Turned().eval()
    state = {n: t for n, t in program.without("dora").export_state_dict(strict=False).items()}
    extra = {n: state.pop(n) for n in list(state) if n not in other.state_dict()}
    other.load_state_dict(state)
    own = {
        a.site: {n: p.detach() for n, p in program.branch(a).named_parameters()}
        for a in program.attachments
    }
    with torch.no_grad():
        for name, tensors in own.items():
            weight = other.get_parameter(name)
            turned = weight.T if name == "down" else weight
            v = turned + 8 * tensors["b"] @ tensors["a"]
            made = tensors["m"][:, None] * v / v.norm(dim=1, keepdim=True)
            weight.copy_(made.T if name == "down" else made)
    want = other(x) + sum(extra.values())
    torch.testing.assert_close(program(x), want, rtol=1e-4, atol=1e-5)


GROUPS = {"codebook": 8, "int4": 16, "onebit": 8, "sparse24": 4}


@pytest.mark.parametrize("kind", GROUPS)
def test_channels_are_cut_by_whole_groups(captured: Any, kind: str) -> None:
    """As the program with those channels at zero, adapters included."""
    group = "" if kind == "sparse24" else f",group={GROUPS[kind]}"
    text = f"quantise{{format={kind}{group}}};lora{{rank=2,alpha=3,where=ffn}}"
    program = randomise(peftfx.run(captured["block"][1], text), 0.2)
    cut = peftfx.run(program, "channel_pruning{ratio=0.4}")
    (kept,) = cut.history[-1].plan.decisions["kept"].values()
    whole = torch.tensor(kept).view(-1, GROUPS[kind])
    assert 30 < len(kept) < 50 and bool((whole % GROUPS[kind] == torch.arange(GROUPS[kind])).all())
    other = references(program, lora)
    with torch.no_grad():
        gone = [i for i in range(64) if i not in kept]
        other.layers[0].down.weight[:, gone] = 0
    got = first(cut(**batch(3, 7)))
    torch.testing.assert_close(got, first(other(**batch(3, 7))), rtol=1e-4, atol=1e-5)
    assert moved(first(program(**batch(3, 7))), got) > 0.01
    stored = cut.module.state_dict()
    assert all(torch.equal(stored[n], t) for n, t in program.module.state_dict().items()
               if "proj.weight" in n)  # fmt: skip
    share = cut.history[-1].certificate.measured["removed"]
    entries = sum(p.numel() for p in build("block").parameters())
    added = sum(p.numel() for p in program.trainable_parameters())
    lost = len(gone) * (3 * 32 + 2 * 3)  # columns and rows of three weights, and of their factors
    assert share == pytest.approx(lost / (entries + added), rel=1e-6)
    with pytest.raises(PassError, match="score=taylor asks for gradients of all entries"):
        peftfx.run(program, "channel_pruning{score=taylor}", data=[batch()])


MIXED = ";".join(
    f"quantise{{format={kind},where={where}}}"
    for kind, where in zip(PASSES, ("q", "k", "v", "o", "ffn.up", "ffn.down"), strict=True)
)
"""Every format at some place."""


def test_every_format_exports(captured: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    program = peftfx.run(captured["block"][1], f"{MIXED};dora{{rank=2,where=q|k|v|o|ffn}}")
    assert program.text().count("_linear(") == 6
    report = peftfx.export_onnx(randomise(program), tmp_path / "m.onnx")
    assert report.error < 1e-5
    kinds = [n.op_type for n in onnx.load(str(report.path)).graph.node]
    assert kinds.count("MatMulNBits") == 3 and kinds.count("MatMulBnb4") == 1
    assert sum("dense while the file runs" in note for note in report.notes) == 2  # signs, pairs


def test_codes_of_nf4_are_stored_as_onnx_runtime_reads_them(captured: Any, tmp_path: Path) -> None:
    """Bytes and scales are those of the program; another table or group stays ours."""
    onnx = pytest.importorskip("onnx")
    program = peftfx.run(captured["block"][1], "quantise{group=16,where=ffn.up|ffn.down}")
    report = peftfx.export_onnx(program, tmp_path / "m.onnx")
    assert report.error < 1e-5 and not any("dense" in note for note in report.notes)
    file = onnx.load(str(report.path))
    calls = [n for n in file.graph.node if n.op_type == "MatMulBnb4"]
    assert len(calls) == 2 and all(n.domain == "com.microsoft" for n in calls)
    given = {t.name: onnx.numpy_helper.to_array(t) for t in file.graph.initializer}
    sizes: set[tuple[int, int]] = set()
    for call in calls:
        numbers = {a.name: a.i for a in call.attribute}
        codes, scales = (torch.from_numpy(given[n].copy()).flatten() for n in call.input[1:3])
        values = torch.stack([codes >> 4, codes & 15], 1).flatten().long()
        groups = torch.tensor(NF4)[values].view(-1, numbers["block_size"]) * scales[:, None]
        dense = groups.view(numbers["N"], numbers["K"])
        sizes.add((numbers["N"], numbers["K"]))
        known = program.export_state_dict().values()
        assert any(t.shape == dense.shape and torch.equal(t, dense) for t in known)
        assert (numbers["block_size"], numbers["quant_type"]) == (16, 1)
    assert sizes == {(64, 32), (32, 64)}
    other = peftfx.run(captured["block"][1], "quantise{group=24,where=ffn.up}")
    report = peftfx.export_onnx(other, tmp_path / "other.onnx")
    assert report.error < 1e-5 and "NF4 in groups of 16" in str(report)


def test_weights_may_come_later(captured: Any, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Decoder(layers=1).eval()
    meta = peftfx.run(peftfx.capture(model, kwargs=batch()), MIXED)
    assert meta.history[-1].certificate.kind == "unmeasured"
    save_file(build("block").state_dict(), tmp_path / "model.safetensors")
    known = dict(build("block").named_buffers())
    loaded = peftfx.load_weights(meta, tmp_path, buffers=known)
    real = peftfx.run(captured["block"][1], MIXED)
    assert torch.equal(first(loaded(**batch())), first(real(**batch())))


def test_half_precision_keeps_its_scales_and_compiles() -> None:
    torch.manual_seed(0)
    base = peftfx.capture(Encoder(layers=1).eval(), kwargs=batch(), dtype=torch.bfloat16)
    program = peftfx.run(base, f"{MIXED};lora{{rank=2,where=q|k|v|o|ffn}}")
    state = program.module.state_dict()
    assert {t.dtype for n, t in state.items() if n.endswith("weight.scale")} == {torch.float32}
    assert {t.dtype for n, t in state.items() if n.endswith("weight.values")} == {torch.bfloat16}
    other = Encoder(layers=1).eval().to(torch.bfloat16)
    other.load_state_dict(program.only(()).export_state_dict())
    got = first(program(**batch()))
    torch.testing.assert_close(got, first(other(**batch())), rtol=0.05, atol=0.05)
    assert got.dtype == torch.bfloat16 and moved(first(base(**batch())), got) > 0.01
    got = first(randomise(program, 0.02)(**batch()))
    compiled = torch.compile(program.module, fullgraph=True, backend="aot_eager")
    y = first(compiled(**batch()))
    torch.testing.assert_close(y, got, rtol=0.05, atol=0.05)
    y.float().pow(2).sum().backward()
    assert all(p.grad is not None for p in program.trainable_parameters())


# Limits.


def test_what_does_not_fit_is_said(captured: Any, stored: Any) -> None:
    for text, what in (("format=onebit,group=12", "whole bytes"), ("format=sparse24,group=4", "2 of 4"),
                       ("group=0", "positive"), ("format=nf4", "format")):  # fmt: skip
        with pytest.raises(OptionError, match=what):
            peftfx.parse(f"quantise{{{text}}}")
    with pytest.raises(PassError, match="quantised already"):
        peftfx.run(stored("onebit"), "quantise")
    program = peftfx.run(stored("sparse24"), "lora{rank=2};lower")
    assert all("quantised (2 of 4 entries)" in reason for _, reason in program.history[-1].skipped)
    sparse = randomise(peftfx.run(stored("codebook"), "diff_pruning{where=q}"), 0.1)
    with pytest.raises(FoldError, match=r"hold no other value of single entries.*lossy=true"):
        peftfx.run(sparse, "fold{names=[diff_pruning]}")


# Nobody else knows.

KNOWING = {"weights", "graph/stored_call.py", "graph/weighted_call.py"}
PARTS = {part for kind, _ in KINDS.values() for part in kind.parts} - {"scale", "values", "matrix"}
"""Names that mean nothing else in the compiler, but of positions of tokens."""


def knowledge(path: Path) -> list[str]:
    """Where code asks for a format, for a part of one, or for a call's operand by its number."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        said = ""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            said = node.value if node.value.startswith("peftfx::") else ""
        elif isinstance(node, ast.ImportFrom) and (node.module or "").rpartition(".")[2] in FORMATS:
            said = f"imports {node.module}"
        elif isinstance(node, ast.Attribute) and node.attr in PARTS - {"positions"}:
            said = f".{node.attr}"
        elif isinstance(node, ast.JoinedStr):
            said = next((f".{p}" for p in PARTS if ast.unparse(node).endswith(f".{p}'")), "")
        elif isinstance(node, ast.Subscript) and path.parent.name in ("linear", "folding"):
            text = ast.unparse(node)
            said = text if re.search(r"\.args\[[1-9]\]|operands\(\w+\)\[", text) else ""
        if said:
            found.append(f"{getattr(node, 'lineno', 0)}: {said}")
    return found


def test_only_weights_and_calls_know_how_a_weight_is_stored() -> None:
    root = Path(__file__).parent.parent / "rewriter"
    sources = [p for p in sorted(root.rglob("*.py")) if not _knowing(p.relative_to(root))]
    assert len(sources) > 100
    found = {str(p.relative_to(root)): where for p in sources if (where := knowledge(p))}
    assert not found


def _knowing(path: Path) -> bool:
    return path.parts[0] in KNOWING or path.as_posix() in KNOWING
