"""Axes that are as long as one another: two streams of one size, fixed sizes that are equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import PassError

from .models import randomise

SIZE = 6
CODA = "coda{bottleneck=2,reduction=2}"
ONE = {n: {0: "batch", 1: "n"} for n in ("ids", "target", "mask")}
TWO = {**ONE, "target": {0: "batch", 1: "m"}}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.o = nn.LayerNorm(16), nn.Linear(16, 16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        given = h if y is None else y
        q = self.q(h).view(x.shape[0], x.shape[1], 2, 8).transpose(1, 2)
        k, v = (m(given).view(given.shape[0], given.shape[1], 2, 8) for m in (self.k, self.v))
        a = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return x + self.o(a.transpose(1, 2).reshape(x.shape))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Pair(nn.Module):
    """An encoder with padding, and a second stream that looks at it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.other = nn.Embedding(30, 16), nn.Embedding(30, 16)
        self.own, self.second, self.cross = Attention(), Attention(), Attention()
        self.ffn, self.last = FeedForward(), FeedForward()

    def forward(self, ids: Tensor, target: Tensor, mask: Tensor) -> Any:
        seen = (mask != 0)[:, None, None]
        y = self.ffn(self.own(self.table(ids), mask=seen))
        x = self.second(self.other(target))
        return y, self.last(self.cross(x, y, seen))


class Single(nn.Module):
    """One stream, samples first or tokens first."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batch_first, self.table = batch_first, nn.Embedding(30, 16)
        self.layers = nn.Sequential(Attention(), FeedForward(), Attention(), FeedForward())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.layers(self.table(ids if self.batch_first else ids.mT))
        return x if self.batch_first else x.transpose(0, 1)


def frozen(model: nn.Module, inputs: dict[str, Tensor], dynamic: Any) -> peftfx.Program:
    return peftfx.capture(model.eval().requires_grad_(False), kwargs=inputs, dynamic=dynamic)


def pair(dynamic: Any) -> tuple[peftfx.Program, dict[str, Tensor]]:
    torch.manual_seed(1)
    inputs = {n: torch.randint(30, (SIZE, SIZE)) for n in ("ids", "target")}
    mask = (torch.arange(SIZE) < torch.tensor([6, 4, 5, 6, 3, 6])[:, None]).long()
    inputs["mask"] = mask
    return frozen(Pair(), inputs, dynamic), inputs


def with_values_of(program: peftfx.Program, other: peftfx.Program) -> peftfx.Program:
    values = other.named_trainable_parameters()
    with torch.no_grad():
        for name, parameter in program.named_trainable_parameters().items():
            parameter.copy_(values[name])
    return program


@pytest.mark.parametrize("dynamic", [ONE, None])
def test_regions_of_two_streams_of_one_size(dynamic: Any) -> None:
    """Each has its own tokens and padding, as where their sizes have two names."""
    (base, inputs), (apart, _) = pair(dynamic), pair(TWO)
    want = randomise(peftfx.run(apart, CODA), 0.3)
    got = with_values_of(peftfx.run(base, CODA), want)
    reads = [dict(a.reads) for a in want.attachments]
    assert reads == [{"valid": "valid_mask"}, {}]
    assert [dict(a.reads) for a in got.attachments] == reads
    for one, other, plain in zip(got(**inputs), want(**inputs), base(**inputs), strict=True):
        torch.testing.assert_close(one, other)
        assert not torch.allclose(one, plain, atol=1e-3)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_region_of_fixed_sizes_that_are_equal(batch_first: bool) -> None:
    """As many samples as tokens as features of a head; none of the sizes is a symbol."""
    ids = torch.randint(30, (8, 8))
    names = {0: "batch", 1: "tokens"} if batch_first else {1: "batch", 0: "tokens"}
    fixed, named = (frozen(Single(batch_first), {"ids": ids}, d) for d in (None, {"ids": names}))
    want = randomise(peftfx.run(named, CODA), 0.3)
    got = with_values_of(peftfx.run(fixed, CODA), want)
    torch.testing.assert_close(got(ids=ids), want(ids=ids))
    assert len(got.attachments) == 2


def test_a_prompt_is_of_one_stream() -> None:
    apart, inputs = pair(TWO)
    prompted = randomise(peftfx.run(apart, "prompt_tuning{length=2,where=table}"), 0.3)
    (prompt,) = prompted.named_trainable_parameters().values()
    model, rows = Pair().eval(), prompt.expand(SIZE, -1, -1)
    seen = torch.cat([torch.ones(SIZE, 2), inputs["mask"]], 1)[:, None, None] != 0
    longer = torch.cat([rows, model.table(inputs["ids"])], 1)
    y = model.ffn(model.own(longer, mask=seen))
    x = model.cross(model.second(model.other(inputs["target"])), y, seen)
    for got, want in zip(prompted(**inputs), (y[:, 2:], model.last(x)), strict=True):
        torch.testing.assert_close(got, want)
    with pytest.raises(PassError, match="'ids' and of 'target', which are two streams"):
        peftfx.run(pair(ONE)[0], "prompt_tuning{length=2,where=table}")
    ids = torch.randint(30, (8, 8))
    both = frozen(Single(True), {"ids": ids}, {"ids": {0: "n", 1: "n"}})
    with pytest.raises(PassError, match="n is the number of samples of 'ids', too"):
        peftfx.run(both, "prompt_tuning{length=2}")


class Masked(nn.Module):
    """A decoder whose padding mask is `[tokens, batch]`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = nn.Embedding(30, 16), Attention()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.table(ids.mT)
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return self.layer(x, mask=past & (mask.mT != 0)[:, None, None])


@pytest.mark.parametrize("dynamic", ["auto", None])
def test_causal_masks_of_tokens_first_or_of_fixed_sizes(dynamic: Any) -> None:
    """A proof up to a length binds the tokens, not the samples; one length needs one proof."""
    inputs = {"ids": torch.randint(30, (7, 3)), "mask": torch.ones(7, 3, dtype=torch.long)}
    base = frozen(Masked(), inputs, dynamic)
    fast = peftfx.run(base, "causal{length=64}")
    torch.testing.assert_close(fast(ids=inputs["ids"]), base(**inputs))
    if dynamic:
        assert fast.spec.inputs[0].shape == ("sequence", "batch")
        assert fast.spec.ranges["sequence"][1] == 64
        assert fast.spec.ranges["batch"][1] is None
