"""Which values are of which sample: tokens first, masks either way, sizes that are equal, and rows
that hold several samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import InputError, PassError

from .models import randomise

GATED = "unipelt{rank=2,length=2,bottleneck=2,where=linear|attention and self|ffn and sublayer}"


class Masked(nn.Module):
    """A layer with a padding mask laid out like the tokens."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batch_first = batch_first
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = (mask if self.batch_first else mask.mT) == 0
        return self.layers(x, src_key_padding_mask=hidden)


def captured_as(batch_first: bool, dynamic: Any = "auto") -> peftfx.Program:
    x, mask = torch.randn(3, 7, 16), torch.ones(3, 7, dtype=torch.long)
    given = (x, mask) if batch_first else (x.transpose(0, 1), mask.mT)
    model = Masked(batch_first).eval().requires_grad_(False)
    return peftfx.capture(model, given, dynamic=dynamic)


def test_tokens_first_is_the_same_turned() -> None:
    """With a mask `[tokens, batch]`, and where samples and tokens are on one axis (`out_proj`)."""
    one, other = (randomise(peftfx.run(captured_as(first), GATED), 0.3) for first in (True, False))
    assert {s for s, _ in one.history[-1].skipped} == {s for s, _ in other.history[-1].skipped}
    assert any("out_proj" in a.site for a in other.attachments)
    with torch.no_grad():
        values = one.named_trainable_parameters()
        for name, parameter in other.named_trainable_parameters().items():
            parameter.copy_(values[name])
    x = torch.randn(4, 9, 16)
    real = torch.arange(9) < torch.tensor([9, 4, 7, 9])[:, None]
    want = one(x, real.long())
    got = other(x.transpose(0, 1), real.long().mT).transpose(0, 1)
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)
    x[~real] += 3.0
    again = other(x.transpose(0, 1), real.long().mT).transpose(0, 1)
    torch.testing.assert_close(again[real], got[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_as_many_samples_as_tokens(batch_first: bool) -> None:
    """Fixed sizes that are equal: dataflow tells them apart, and the mask is read."""
    model = Masked(batch_first).eval().requires_grad_(False)
    x, mask = torch.randn(5, 5, 16), torch.ones(5, 5, dtype=torch.long)
    program = peftfx.capture(model, (x, mask), dynamic=None)
    gated = randomise(peftfx.run(program, GATED), 0.3)
    assert len(gated.attachments) > 6
    axis = 0 if batch_first else 1
    hidden = mask.clone()
    hidden.select(1 - axis, 4).zero_()  # the last token of every sample
    y = x.clone()
    y.select(axis, 1).add_(3.0)
    y.select(1 - axis, 4).add_(3.0)
    before, after = gated(x, hidden), gated(y, hidden)
    others = torch.tensor([0, 2, 3, 4])
    tokens = torch.arange(4)
    kept = [t.index_select(axis, others).index_select(1 - axis, tokens) for t in (before, after)]
    torch.testing.assert_close(*kept)
    assert not torch.allclose(before.select(axis, 1), after.select(axis, 1), atol=1e-3)


class Packed(nn.Module):
    """Attention within samples that lie behind one another in a row, told apart in some way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.table = nn.Embedding(30, 16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def segments(self, ids: Tensor, given: Tensor) -> Tensor:
        if self.way == "segments":
            return given
        if self.way == "positions":
            return (given == 0).cumsum(1)
        places = torch.arange(ids.shape[1], device=ids.device)
        return torch.bucketize(places, given, right=True).expand(ids.shape[0], -1)

    def forward(self, ids: Tensor, given: Tensor) -> Tensor:
        x, own = self.table(ids), self.segments(ids, given)
        mask = (own[:, :, None] == own[:, None, :])[:, None]
        q, k, v = (m(x).unflatten(-1, (2, 8)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        return x + self.down(F.gelu(self.up(x)))


WAYS = {
    "segments": torch.tensor([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 2, 2]]),
    "positions": torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]]),
    "bounds": torch.tensor([3, 7]),
}


@pytest.fixture(scope="module", params=WAYS)
def packed(request: pytest.FixtureRequest) -> tuple[str, peftfx.Program]:
    way = request.param
    model = Packed(way).eval().requires_grad_(False)
    inputs = {"ids": torch.randint(30, (2, 7)), "given": WAYS[way]}
    return way, peftfx.capture(model, kwargs=inputs)


@pytest.mark.parametrize("text", ["prompt_tuning{length=2}", "coda{bottleneck=2}"])
def test_rows_of_several_samples_are_refused(packed: tuple[str, peftfx.Program], text: str) -> None:
    with pytest.raises(PassError, match="a row holds several samples, which 'given' tells apart"):
        peftfx.run(packed[1], text)


def test_gates_do_not_mix_them(packed: tuple[str, peftfx.Program]) -> None:
    with pytest.raises(
        PassError, match="a row holds several samples, which 'given' tells apart: a mean"
    ):
        peftfx.run(packed[1], "unipelt")


def test_what_each_sample_sees_alone_is_right(packed: tuple[str, peftfx.Program]) -> None:
    """Prefixes and low-rank branches: each sample of a row gets what it gets in a row of its own."""
    way, base = packed
    program = randomise(peftfx.run(base, "prefix_tuning{length=2};lora{rank=2}"), 0.3)
    ids = torch.randint(30, (2, 7))
    got = program(ids=ids, given=WAYS[way])
    ends = (3, 3) if way == "bounds" else (3, 5)
    for row, end in enumerate(ends):
        for part in (slice(0, end), slice(end, 7)):
            given = WAYS[way][..., part] if way == "bounds" else WAYS[way][row : row + 1, part]
            own = ids[row : row + 1, part]
            given = torch.tensor([50, 60]) if way == "bounds" else given
            want = program(ids=own, given=given)
            torch.testing.assert_close(got[row : row + 1, part], want, rtol=1e-4, atol=1e-5)


class Paired(nn.Module):
    """Attention with a mask for pairs of tokens as the caller gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Packed("segments")

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.inner.table(ids)
        heads = [m(x).unflatten(-1, (2, 8)) for m in (self.inner.q, self.inner.k, self.inner.v)]
        q, k, v = (t.transpose(1, 2) for t in heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + self.inner.o(y)
        return x + self.inner.down(F.gelu(self.inner.up(x)))


def _blocks(segments: Tensor, numbers: bool) -> Tensor:
    seen = (segments[:, :, None] == segments[:, None, :])[:, None]
    return torch.where(seen, 0.0, -1e9) if numbers else seen


NAMED = {"ids": {0: "batch", 1: "tokens"}, "mask": {0: "batch", 2: "tokens", 3: "tokens"}}


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("dynamic", [NAMED, None])
def test_a_ready_made_mask_may_pack_rows(numbers: bool, dynamic: Any) -> None:
    """Who gives a mask by pairs may tell samples apart by it: what mixes tokens is refused, and
    prefixes are what they are where the model makes the mask itself."""
    segments = WAYS["segments"]
    inputs = {"ids": torch.randint(30, (2, 7)), "mask": _blocks(segments, numbers)}
    model = Paired().eval().requires_grad_(False)
    base = peftfx.capture(model, kwargs=inputs, dynamic=dynamic)
    for text in (
        "coda{bottleneck=2}",
        "unipelt",
        *(["prompt_tuning{length=2}"] if dynamic else []),
    ):
        with pytest.raises(PassError, match="may hold several samples, which 'mask' tells apart"):
            peftfx.run(base, text)
    prefixed = randomise(peftfx.run(base, "prefix_tuning{length=2}"), 0.3)
    own = peftfx.capture(model.inner, kwargs={"ids": inputs["ids"], "given": segments})
    want = randomise(peftfx.run(own, "prefix_tuning{length=2}"), 0.3)
    values = list(prefixed.named_trainable_parameters().values())
    with torch.no_grad():
        for parameter, value in zip(
            want.named_trainable_parameters().values(), values, strict=True
        ):
            parameter.copy_(value)
    got = prefixed(**inputs)
    torch.testing.assert_close(got, want(ids=inputs["ids"], given=segments))
    assert not torch.allclose(got, base(**inputs), atol=1e-3)


class Bags(nn.Module):
    """Sums over equal bags of ids, then linears: nothing shows the order of ids."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bag = nn.EmbeddingBag(30, 16, mode=mode, padding_idx=0)
        self.inner, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.gelu(self.inner(self.bag(ids))))


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_bags_of_equal_sizes_are_samples(mode: str, tmp_path: Path) -> None:
    model = Bags(mode).eval().requires_grad_(False)
    base = peftfx.capture(model, (torch.randint(30, (3, 8)),))
    text = "lora{rank=2,name=a,where=linear};lora{rank=2,name=b,where=linear}"
    two = randomise(peftfx.run(base, text), 0.3)
    values = two.named_trainable_parameters()
    banked = peftfx.run(two, "bank")
    ids, rows = torch.randint(30, (5, 6)), torch.tensor([0, 1, 2, 1, -1])

    def changed(layer: nn.Linear, x: Tensor, k: int, path: str) -> Tensor:
        y = layer(x)
        if k in (0, 1):
            a, b = (values[f"peftfx.{'ab'[k]}.{path}.delta.{n}"] for n in "ab")
            y = y + x @ a.T @ b.T * (16 / 2)
        return y

    for row, k in enumerate(rows.tolist()):
        x = F.gelu(changed(model.inner, model.bag(ids[row : row + 1]), k, "inner"))
        want = changed(model.head, x, k, "head")
        torch.testing.assert_close(banked(ids, adapter=rows)[row : row + 1], want)
    peftfx.export_onnx(banked, tmp_path / "bags.onnx")  # measures itself against the program


class Grouped(nn.Module):
    """Four letters are one token: their number is a multiple of four."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Packed("segments")

    def forward(self, ids: Tensor) -> Tensor:
        x = self.inner.table(ids)
        x = x.view(x.shape[0], x.shape[1] // 4, 4, 16).mean(2)
        q, k, v = (m(x)[:, None] for m in (self.inner.q, self.inner.k, self.inner.v))
        x = x + self.inner.o(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + self.inner.down(F.gelu(self.inner.up(x)))


def test_sizes_named_by_the_user_that_are_multiples() -> None:
    """A trial shows which of the two names is that of samples, though tokens have neither size."""
    model = Grouped().eval().requires_grad_(False)
    ids = torch.randint(30, (3, 8))
    base = peftfx.capture(model, (ids,), dynamic={"ids": {0: "rows", -1: "letters"}})
    assert base.spec.kinds == {"rows": "batch"}
    text = "lora{rank=2,name=a,where=linear};lora{rank=2,name=b,where=linear}"
    two = randomise(peftfx.run(base, text), 0.3)
    banked, ids = peftfx.run(two, "bank"), torch.randint(30, (2, 12))
    for k in (0, 1):
        got, want = banked(ids, adapter=torch.tensor([k, k])), two.without("ba"[k])(ids)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=3e-4)
    assert len(peftfx.run(base, "coda{bottleneck=2,reduction=2}").attachments) > 0


class Strided(nn.Module):
    """Every second frame is a token."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Packed("segments")
        self.conv = nn.Conv1d(4, 16, 3, stride=2, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        x = F.gelu(self.conv(frames)).mT
        q, k, v = (m(x)[:, None] for m in (self.inner.q, self.inner.k, self.inner.v))
        return x + self.inner.o(F.scaled_dot_product_attention(q, k, v)[:, 0])


def test_strided_convolutions_in_front_of_attention(tmp_path: Path) -> None:
    model = Strided().eval().requires_grad_(False)
    names = {"frames": {-3: "rows", -1: "length"}}
    base = peftfx.capture(model, (torch.randn(2, 4, 12),), dynamic=names)
    assert base.spec.inputs[0].shape == ("rows", 4, "length")
    text = "lora{rank=2,name=a,where=linear|conv};lora{rank=2,name=b,where=linear|conv}"
    two = randomise(peftfx.run(base, text), 0.1)
    banked, x = peftfx.run(two, "bank"), torch.randn(3, 4, 9)
    got = banked(x, adapter=torch.tensor([1, -1, 0]))
    for row, alone in enumerate((two.without("a"), base, two.without("b"))):
        torch.testing.assert_close(got[row], alone(x)[row], rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="'adapter' holds -2; it takes -1 to 2"):
        banked(x, adapter=torch.tensor([1, -2, 0]))
    peftfx.export_onnx(banked, tmp_path / "strided.onnx")  # measures itself against the program
