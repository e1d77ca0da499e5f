"""More that every registered method gets for free: determinism, meta, causality, exact deltas,
program files, outputs of all kinds, and the way back into the model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.branches.branch import Delta, RowScale
from peftfx.rewriter.errors import ExportError, MetaTensorError, RewriteError
from peftfx.rewriter.graph.output_class import shortened
from peftfx.rewriter.measure.compare import compare
from peftfx.rewriter.measure.still import Expected

from .cpu import shared
from .models import Decoder, Tiny, batch, build, first, moved, randomise
from .recipes import METHODS, RECIPES, method_class, start, stated, turn


def made(base: peftfx.Program, method: str) -> peftfx.Program:
    """A method's recipe with values that are not its initial ones."""
    return randomise(peftfx.run(*start(base, method)))


def stored(program: peftfx.Program) -> dict[str, Tensor]:
    return dict([*program.module.named_parameters(), *program.module.named_buffers()])


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_twice_gives_the_same_bits(captured: Any, method: str) -> None:
    one = stored(captured.placed("decoder", method))
    torch.rand(7)  # moves the global generator, which no method may draw from
    two = stored(peftfx.run(captured["decoder"][1], RECIPES[method]))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one)


class Mixed(nn.Module):
    """A causal decoder with a large, a small, an integer and a boolean output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Decoder(layers=1)
        self.score = nn.Linear(64, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        logits = self.inner(input_ids, attention_mask)
        score = self.score(logits)
        return {
            "logits": 1e3 * logits, "small": 1e-4 * score.sigmoid(),
            "label": logits.argmax(-1), "positive": score > 0,
        }  # fmt: skip


@pytest.fixture(scope="module")
def mixed() -> tuple[nn.Module, peftfx.Program]:
    torch.manual_seed(0)
    model = Mixed().eval()
    with shared():
        return model, peftfx.capture(model, kwargs=batch())


@pytest.mark.parametrize("method", METHODS)
def test_outputs_of_all_sizes_and_kinds(mixed: Any, method: str) -> None:
    model, base = mixed
    program = made(base, method)
    want, got = model(**batch()), own_outputs(program)
    gaps = {g.name: g for g in compare(want, got)}
    assert not any(g.form or g.spoilt for g in gaps.values())
    assert all(gaps[n].relative > 1e-4 for n in ("['logits']", "['small']"))
    assert all(c.holds for c in program.verify())
    try:
        folded = peftfx.run(program, "fold")
    except RewriteError as error:  # what folds promises the same outputs; nothing else may fail
        assert program.attachments == (), error
        return
    for gap in compare(got, own_outputs(folded)):
        assert gap.discrete or gap.relative < 1e-4, gap


def own_outputs(program: peftfx.Program) -> Any:
    """What the model itself returns, without what a method adds."""
    return shortened(program(**batch()), len(program.outputs_added))


def causal_unless_said(method: str) -> bool:
    (*_, item) = peftfx.parse(RECIPES[method])
    return getattr(item, "causal", "") == getattr(type(item), "causal", "")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base_name", ["decoder", "fused"])
def test_a_causal_model_stays_causal(captured: Any, method: str, base_name: str) -> None:
    """Changing the last token moves no earlier output, unless the recipe says so."""
    program = randomise(captured.placed(base_name, method))
    names = program.spec.names
    inputs = {n: t for n, t in batch(2, 9).items() if n in names}
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -1] = (other["input_ids"][:, -1] + 7) % 60 + 2
    one, two = first(program(**inputs)), first(program(**other))
    assert moved(one[:, -1], two[:, -1]) > 1e-3
    if causal_unless_said(method):
        assert moved(one[:, :-1], two[:, :-1]) < 1e-6
    else:
        assert moved(one[:, :-1], two[:, :-1]) > 1e-6, "the recipe need not say so"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base_name", ["decoder", "fused"])
def test_each_branch_is_its_delta(captured: Any, method: str, base_name: str) -> None:
    """In float32 and by itself, so that no network around it hides a wrong one."""
    program = randomise(captured.placed(base_name, method)).eval()
    generator = torch.Generator().manual_seed(0)
    for attachment in program.attachments:
        branch = program.branch(attachment)
        if not isinstance(branch, Delta | RowScale) or attachment.reads or branch.not_foldable:
            continue
        delta = branch.delta().detach()
        x = torch.randn(5, delta.shape[1], generator=generator)
        with torch.no_grad():
            got = branch.branch(x)
        torch.testing.assert_close(got, x @ delta.T, rtol=1e-4, atol=1e-5 * float(got.abs().max()))
        factors = branch.factors()
        if factors is not None:
            a, b, scale = factors
            torch.testing.assert_close(scale * b @ a, delta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_program_files(captured: Any, method: str, tmp_path: Path) -> None:
    program = randomise(captured.placed("tiny", method))
    inputs = batch(2, 7, pad=2)
    want = first(program(**inputs))
    peftfx.save_program(program, tmp_path / "p")
    loaded = peftfx.load_program(tmp_path / "p")
    torch.testing.assert_close(first(loaded(**inputs)), want, rtol=1e-5, atol=1e-5)
    assert set(program.named_trainable_parameters()) == set(loaded.named_trainable_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_the_way_back_into_the_model(captured: Any, method: str) -> None:
    """What folds away loads into the original model; the rest is refused, and names why."""
    model, _ = captured["encoder"]
    program = randomise(captured.placed("encoder", method))
    if program.attachments:
        program = peftfx.run(program, "fold")
    if program.attachments or program.added:
        with pytest.raises(ExportError, match="no place in the original model"):
            program.export_state_dict()
        return
    other = copy.deepcopy(model)
    other.load_state_dict(program.export_state_dict())
    want = first(program(**batch()))
    assert moved(first(model(**batch())), want) > 1e-3
    torch.testing.assert_close(first(other(**batch())), want, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def hollow() -> peftfx.Program:
    """The block without values."""
    with torch.device("meta"):
        model = Tiny().eval()
    with shared():
        return peftfx.capture(model, kwargs=batch())


@pytest.mark.parametrize("method", METHODS)
def test_on_the_meta_device(
    captured: Any, hollow: peftfx.Program, method: str, tmp_path: Path
) -> None:
    """Placed without weights, then given them: the same program. Or refused for want of values."""
    model = build("tiny")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    want = captured.placed("tiny", method)
    try:
        program = peftfx.run(hollow, RECIPES[method])
    except MetaTensorError as error:
        assert "load" in str(error)
        return
    loaded = peftfx.load_weights(program, tmp_path, buffers=dict(model.named_buffers()))
    assert not any(t.is_meta for t in stored(loaded).values())
    # What branches start as, where it does not follow from weights, is drawn with the seed.
    torch.testing.assert_close(first(loaded(**batch())), first(want(**batch())))


ON_LINEARS = [m for m in METHODS if "linear" in method_class(m).kinds]
FOLDABLE = [m for m in ON_LINEARS if method_class(m).folds == "exactly"]
KEPT = [m for m in ON_LINEARS if method_class(m).folds == "nothing to fold"]
"""Train base tensors that others fold into."""


def partners(method: str, count: int) -> list[str]:
    """Methods that fold, drawn by the names."""
    others = [m for m in FOLDABLE if m != method]
    return sorted(others, key=lambda other: turn(method, other))[:count]


PAIRS = [*((one, two) for two in FOLDABLE for one in partners(two, 4)),
         *((one, two) for two in KEPT for one in partners(two, 2))]  # fmt: skip


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_folding_one_of_two(captured: Any, one: str, two: str) -> None:
    """The other keeps its values and trains on; without it, the folded one is left alone."""
    items = [list(peftfx.parse(RECIPES[n]))[-1] for n in (one, two)]
    _, block = captured["block"]
    recipe: list[Any] = [replace(i, where="v|ffn.down") for i in items]  # pyright: ignore[reportCallIssue]
    try:
        both = randomise(peftfx.run(block, recipe))
    except RewriteError as error:
        assert "fold that adapter first" in str(error)
        return
    owned = both.owned.get(two, ())
    trained = {n for n in both.named_trainable_parameters() if f".{two}." in n or n in owned}
    assert trained
    try:
        folded = peftfx.run(both, f"fold{{names=[{one}]}}")
    except RewriteError as error:
        assert "fold" in str(error)
        return
    torch.testing.assert_close(
        first(folded(**batch())), first(both(**batch())), rtol=1e-4, atol=1e-5
    )
    assert set(folded.named_trainable_parameters()) == trained
    alone = folded.without(two)
    torch.testing.assert_close(
        first(alone(**batch())), first(both.without(two)(**batch())), rtol=1e-4, atol=1e-5
    )


class Turned(nn.Module):
    """An encoder of ids `[tokens, batch]`, or of their transpose."""

    def __init__(self, tokens_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=not tokens_first)
        self.embed = nn.Embedding(64, 16)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(input_ids)))


@pytest.fixture(scope="module")
def turned() -> tuple[peftfx.Program, peftfx.Program]:
    """The same model with tokens first, and with the batch first."""
    ids = batch(2, 7)["input_ids"]
    programs: list[peftfx.Program] = []
    for tokens_first in (True, False):
        torch.manual_seed(0)
        model = Turned(tokens_first).eval().requires_grad_(False)
        with shared():
            programs.append(peftfx.capture(model, (ids.mT.contiguous() if tokens_first else ids,)))
    return programs[0], programs[1]


@pytest.mark.parametrize("method", METHODS)
def test_tokens_first(turned: Any, method: str) -> None:
    """Samples do not mix, and all is as with the batch first. Or refused."""
    base, other = turned
    try:
        program = made(base, method)
    except RewriteError as error:
        assert not stated(method, "TOKENS_FIRST", True), error
        return
    assert stated(method, "TOKENS_FIRST", True)
    ids = batch(3, 5, seed=1)["input_ids"]
    moved_ids = ids.clone()
    moved_ids[1] = (ids[1] + 5) % 60 + 2
    one, two = first(program(ids.mT)), first(program(moved_ids.mT))
    assert moved(one[:, [0, 2]], two[:, [0, 2]]) < 1e-6 and moved(one[:, 1], two[:, 1]) > 1e-3
    twin = made(other, method)
    held = twin.named_trainable_parameters()
    mine = program.named_trainable_parameters()
    assert [t.shape for t in held.values()] == [t.shape for t in mine.values()]
    with torch.no_grad():
        for tensor, value in zip(held.values(), mine.values(), strict=True):
            tensor.copy_(value)
    assert moved(base(ids.mT), one) > 1e-4
    torch.testing.assert_close(one.transpose(0, 1), first(twin(ids)), rtol=1e-4, atol=1e-5)


class Nested(nn.Module):
    """A decoder behind a part with dropout and batch norm, which the user keeps in eval()."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Decoder(layers=1)
        self.part = nn.ModuleList([nn.BatchNorm1d(64), nn.Dropout(0.37), nn.Linear(64, 64)])
        self.drop = nn.Dropout(0.25)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        norm, drop, last = self.part
        h = self.drop(self.inner(input_ids, attention_mask))
        return h + last(drop(norm(h.mT).mT))


@pytest.fixture(scope="module")
def nested() -> peftfx.Program:
    torch.manual_seed(0)
    model = Nested().train()
    model.part.eval()
    with shared():
        return peftfx.capture(model, kwargs=batch())


def acting(program: peftfx.Program) -> set[float]:
    """Probabilities of the dropouts that act now."""
    with Expected() as mode, torch.no_grad():
        program(**batch())
    numbers = [n for *_, each in mode.draws for n in (each if isinstance(each, tuple) else [each])]
    return {
        p for p in (0.25, 0.37) if any(abs(n - p) < 1e-6 or abs(n - 1 + p) < 1e-6 for n in numbers)
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_part_in_eval_stays_so(nested: peftfx.Program, method: str) -> None:
    """Under a training root its dropout is off and its statistics stand still, pass or no pass."""
    program = made(nested, method)
    statistics = {n: t.clone() for n, t in program.module.named_buffers() if "running" in n}
    assert len(statistics) == 2 and acting(nested) == acting(program) == {0.25}
    for name, value in statistics.items():
        assert torch.equal(program.module.get_buffer(name), value)
    assert acting(program.fork().train()) == {0.25, 0.37}, "the check sees nothing"
