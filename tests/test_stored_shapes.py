"""Few bits behind every shape of weight: lookups, convolutions and experts, and what is sparse."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import PassError

from .models import batch, first, moved, randomise
from .test_weight_shapes import FORMULAS, IDS, Mixed, branches, close, matrices, put_back

PLACES = "linear|conv|embedding|experts"
KINDS = {"codebook": "group=8,", "int4": "group=8,", "onebit": "", "sparse24": ""}


@pytest.fixture(scope="module")
def model() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.fixture(scope="module")
def stored(model: Mixed) -> Callable[[str], peftfx.Program]:
    base = peftfx.capture(model, (torch.randint(1, 20, (2, 5)),))
    programs: dict[str, peftfx.Program] = {}

    def of(kind: str) -> peftfx.Program:
        if kind not in programs:
            text = f"quantise{{format={kind},{KINDS[kind]}where={PLACES}}}"
            programs[kind] = peftfx.run(base, text)
        return programs[kind].fork()

    return of


def plain(program: peftfx.Program) -> Mixed:
    """The model itself, with the matrices that are stored."""
    other = Mixed().eval()
    other.load_state_dict(program.only(()).export_state_dict())
    return other


def rounded(kind: str, rows: Tensor) -> Tensor:
    """A matrix in signs or pairs, from what these are."""
    if kind == "onebit":
        return torch.where(rows >= 0, 1.0, -1.0) * rows.abs().mean(1, keepdim=True)
    pairs = torch.zeros(len(rows), -(-rows.shape[1] // 4) * 4)
    pairs[:, : rows.shape[1]] = rows
    quads = pairs.unflatten(1, (-1, 4))
    largest = torch.zeros_like(quads).scatter(2, quads.abs().topk(2, 2).indices, 1.0)
    return (quads * largest).flatten(1)[:, : rows.shape[1]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_shape_computes_what_is_stored(model: Mixed, stored: Any, kind: str) -> None:
    """Tables by ids, convolutions by output channel, experts by row; equal to the plain model."""
    program, before = stored(kind), model.state_dict()
    assert not program.history[-1].skipped and len(program.history[-1].edited) == 9
    other = plain(program)
    close(program(IDS), other(IDS))
    assert moved(model(IDS)[0], other(IDS)[0]) > 0.001
    state = other.state_dict()
    assert state.keys() == before.keys()
    for name in ("token.weight", "block.up", "image.weight", "grouped.weight", "back.weight"):
        if kind in ("onebit", "sparse24"):
            rows = (
                before[name]
                if name == "token.weight"
                else matrices(name, before[name]).flatten(0, 1)
            )
            want = rounded(kind, rows)
            got = (
                state[name] if name == "token.weight" else matrices(name, state[name]).flatten(0, 1)
            )
            torch.testing.assert_close(got, want)
        else:  # a step of the group's range at most
            assert (
                float((state[name] - before[name]).abs().max())
                < float(before[name].abs().max()) / 5
            )
    names = {n for n, _ in program.module.named_parameters()}
    assert not names & {n for n in before if "norm" not in n and "bias" not in n}


@pytest.mark.parametrize("kind", ["codebook", "sparse24"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_methods_stand_beside_and_fold_with_what_is_left(
    stored: Any, method: str, kind: str, tmp_path: Path
) -> None:
    options = "" if method == "ia3" else "rank=2,alpha=3,"
    text = f"{method}{{{options}where=conv|embedding|experts}}"
    program = randomise(peftfx.run(stored(kind), text), 0.2)
    other = plain(program)
    state = dict(other.state_dict())
    if method != "ia3":
        for name, own in branches(program).items():
            stack = FORMULAS[method](matrices(name, state[name]), own, 1.5)
            state[name] = put_back(name, stack, state[name])
        other.load_state_dict(state)
        close(program(IDS), other(IDS))
    program(IDS)[0].pow(2).sum().backward()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fold: .* left nothing")
        folded = peftfx.run(program, "fold{lossy=true}")
    assert not folded.attachments
    exact = method == "ia3" and kind == "sparse24"  # columns and rows of their own
    assert exact == ("delta_left" not in folded.history[-1].certificate.measured)
    if exact:
        close(folded(IDS), program(IDS))
    again = folded.without("quantise")
    want = program.without("quantise")
    close(again(IDS), want(IDS))
    if (method, kind) == ("lora", "codebook"):
        peftfx.save(program, tmp_path / "a")
        close(peftfx.load(program.base, tmp_path / "a")(IDS), program(IDS), 1e-6)
        peftfx.save_program(program, tmp_path / "p")
        close(peftfx.load_program(tmp_path / "p")(IDS), program(IDS), 1e-6)


@pytest.mark.parametrize("kind", ["int4", "sparse24"])
def test_sparse_changes_stand_beside_few_bits(stored: Any, kind: str, tmp_path: Path) -> None:
    before = stored(kind)
    text = f"diff_pruning{{density=0.1,where={PLACES}}};dora{{rank=2,alpha=3,where={PLACES}}}"
    program = randomise(peftfx.run(before, text), 0.1)
    baked = peftfx.run(program, "bake")
    other = plain(baked)
    state = dict(other.state_dict())
    count = 0
    for attachment in baked.attachments:
        branch: Any = baked.branch(attachment)
        if attachment.slot == "expression":
            name = attachment.path.removeprefix("peftfx.diff_pruning.").removesuffix(".expression")
            flat = state[name].flatten()
            count += len(branch.values)
            flat[branch.indices.long()] += branch.values.detach()
            state[name] = flat.view(state[name].shape)
    entries = sum(t.numel() for n, t in state.items() if "norm" not in n)
    assert count == round(0.1 * entries)
    for attachment in baked.attachments:
        if attachment.slot != "expression":
            own = {n: p.detach() for n, p in baked.branch(attachment).named_parameters()}
            name = attachment.site
            linear = name in ("block.router.weight", "head.weight")
            stack = state[name][None] if linear else matrices(name, state[name])
            made = FORMULAS["dora"](stack, own, 1.5)
            state[name] = made[0] if linear else put_back(name, made, state[name])
    other.load_state_dict(state)
    close(baked(IDS), other(IDS))
    assert moved(before(IDS)[0], baked(IDS)[0]) > 0.01
    peftfx.save(baked, tmp_path / "a")
    close(peftfx.load(baked.base, tmp_path / "a")(IDS), baked(IDS), 1e-6)
    alone = baked.without("dora").without("diff_pruning")
    assert all(torch.equal(a, b) for a, b in zip(alone(IDS), before(IDS), strict=True))
    kept = peftfx.run(baked, "fold")
    reasons = {reason for _, reason in kept.history[-1].skipped}
    assert any("hold no other value of single entries" in r and "lossy=true" in r for r in reasons)
    close(kept(IDS), baked(IDS))
    folded = peftfx.run(baked, "fold{lossy=true}")
    left = folded.history[-1].certificate.measured["delta_left"]
    assert not folded.attachments and 0 < left <= 1.2
    close(folded.without("quantise")(IDS), baked.without("quantise")(IDS))


def test_what_settles_to_nothing_gives_the_operator_back(stored: Any) -> None:
    """A tensor without entries that changed is multiplied as it was stored."""
    before = stored("int4")
    program = peftfx.run(before, "diff_pruning{density=0.001,where=embedding|linear}")
    with torch.no_grad():
        for name, p in program.named_trainable_parameters().items():
            p.fill_(5.0 if "head.weight" in name else 0.0)
    assert "quantised_linear" not in program.text() and "dequantise_rows" not in program.text()
    baked = peftfx.run(program, "bake")
    assert [a.site for a in baked.attachments] == ["head.weight"]
    assert baked.text().count("quantised_linear(") == 1 and "dequantise_rows(" in baked.text()
    bare = baked.without("diff_pruning")
    assert bare.text() == before.text()


def test_lookups_gather_codes_and_take_any_ids(stored: Any) -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(20, 16))

        def forward(self, ids: Tensor) -> Tensor:
            return self.table[ids].cumsum(1)

    torch.manual_seed(0)
    model = Indexed().eval()
    ids = torch.tensor([[3, -1, 19], [-20, 0, 7]])
    program = peftfx.run(
        peftfx.capture(model, (torch.randint(0, 20, (2, 3)),)), "quantise{where=embedding}"
    )
    assert "codebook_dense_rows" in program.text() and "codebook_dense(" not in program.text()
    adapted = randomise(peftfx.run(program, "lora{rank=2,alpha=3,where=embedding}"), 0.2)
    state = program.export_state_dict()
    (own,) = branches(adapted).values()
    want = state["table"][ids].cumsum(1)
    torch.testing.assert_close(program(ids), want)
    table = state["table"] + 1.5 * (own["b"] @ own["a"]).T
    torch.testing.assert_close(adapted(ids), table[ids].cumsum(1))
    token = randomise(peftfx.run(stored("codebook"), "lora{rank=2,where=embedding.token}"), 0.2)
    token(IDS)[0].pow(2).sum().backward()
    gradient = token.named_trainable_parameters()["peftfx.lora.token.delta.a"].grad
    assert gradient is not None  # of all ids but that of padding
    read = {int(i) for i in IDS.flatten() if i}
    assert set(gradient.abs().sum(0).nonzero().flatten().tolist()) == read


def test_grouped_rows_multiply_by_stored_experts(zoo: Any, tmp_path: Path) -> None:
    """Mixtral's, whose stack holds gates and ups: all or nothing of it."""
    base, model = zoo["mixtral"], zoo.model("mixtral")
    program = peftfx.run(base, "quantise{where=experts}")
    inputs = batch(3, 7, pad=2)
    state, own = program.export_state_dict(), dict(model.named_parameters())
    names = [n for n in own if "experts" in n]
    old = {n: own[n].data for n in names}
    try:
        for name in names:
            assert not torch.equal(state[name], old[name])
            own[name].data = state[name]
        want = first(model(**inputs))
    finally:
        for name, tensor in old.items():
            own[name].data = tensor
    torch.testing.assert_close(first(program(**inputs)), want, rtol=1e-4, atol=1e-5)
    adapted = randomise(peftfx.run(program, "lora{rank=2,where=experts}"), 0.1)
    got = first(adapted(**inputs))
    peftfx.save(adapted, tmp_path / "a")
    torch.testing.assert_close(first(peftfx.load(base, tmp_path / "a")(**inputs)), got)
    assert moved(got, want) > 0.001
    skipped = peftfx.run(base, "quantise{where=name:gate_up_proj and ffn.up}").history[-1].skipped
    assert all("select all or none of it" in reason for _, reason in skipped) and skipped


def test_compiled_and_in_half_precision(model: Mixed) -> None:
    base = peftfx.capture(model, (torch.randint(1, 20, (2, 5)),), dtype=torch.bfloat16)
    program = peftfx.run(base, f"quantise{{where={PLACES}}};lora{{rank=2,where={PLACES}}}")
    program = randomise(program, 0.05)
    compiled = torch.compile(program.module, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(IDS), program(IDS), strict=True):
        assert got.dtype == want.dtype == torch.bfloat16
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    state = program.module.state_dict()
    assert {t.dtype for n, t in state.items() if n.endswith(".scale")} == {torch.float32}


def test_a_prompt_stands_in_front_of_a_stored_table(captured: Any) -> None:
    """Whatever comes first; rows of the table that tokens train on stand on top of it."""
    _, base = captured["block"]
    inputs, prompt = batch(3, 7), "prompt_tuning{length=2}"
    one = randomise(peftfx.run(base, f"quantise{{where=embedding}};{prompt}"), 0.2)
    two = peftfx.run(base, f"{prompt};quantise{{where=embedding}}")
    values = one.named_trainable_parameters()
    with torch.no_grad():
        for name, parameter in two.named_trainable_parameters().items():
            parameter.copy_(values[name])
    torch.testing.assert_close(first(one(**inputs)), first(two(**inputs)))
    assert moved(first(base(**inputs)), first(one(**inputs))) > 0.01
    rows = peftfx.run(base, "quantise{where=embedding};train_tokens{ids=[3,5]}")
    assert torch.equal(first(rows(**inputs)), first(rows.without("train_tokens")(**inputs)))
    cut = peftfx.run(rows.without("train_tokens"), "width_pruning{ratio=0.5}")
    assert "width_pruning" in cut.history[-1].text and first(cut(**inputs)).isfinite().all()


def test_what_does_not_fit_is_said() -> None:
    torch.manual_seed(0)
    tied = peftfx.capture(Mixed(tied=True).eval(), (torch.randint(1, 20, (2, 5)),))
    record = peftfx.run(tied, "quantise{where=embedding|conv}").history[-1]
    assert "tied" in dict(record.skipped)["token.weight"]
    program = peftfx.run(tied, "quantise{where=conv}")
    with pytest.raises(PassError, match="quantised already"):
        peftfx.run(program, "quantise{where=conv}")
