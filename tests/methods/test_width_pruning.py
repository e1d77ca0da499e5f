"""Width pruning: the cut program is the smaller model, built anew, with slices of every weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import PassError
from peftfx.rewriter.program.sites import EmbeddingSite, LinearSite, SublayerSite
from peftfx.rewriter.weights.weight import dense_weights

from .. import models
from ..models import batch, moved, randomise

HEADS, DIM, INNER, VOCABULARY = 2, 8, 48, 40


class Small(nn.Module):
    """A causal model whose heads do not depend on its width; norms with learnt scale and bias."""

    def __init__(self, width: int, tied: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(32, width)
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(width, HEADS * DIM) for _ in range(3))
        self.o = nn.Linear(HEADS * DIM, width)
        self.up, self.down = nn.Linear(width, INNER), nn.Linear(INNER, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        b, t = input_ids.shape
        x = self.words(input_ids) + self.places(torch.arange(t))
        h = self.norm1(x)
        q, k, v = (m(h).view(b, t, HEADS, DIM).transpose(1, 2) for m in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).reshape(b, t, HEADS * DIM))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm(x))


def ids(rows: int = 3, tokens: int = 9) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=[False, True])
def small(request: Any) -> tuple[Small, Any]:
    torch.manual_seed(0)
    model = Small(24, tied=request.param).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, peftfx.capture(model, (ids(),))


def sliced(full: dict[str, Tensor], kept: Tensor, width: int) -> dict[str, Tensor]:
    """Every weight with the kept features of the stream, by hand for each name."""
    rows = {"o", "down", "norm1", "norm2", "norm"}
    columns = {"words", "places", "q", "k", "v", "up", "head"}
    found: dict[str, Tensor] = {}
    for name, tensor in full.items():
        module = name.split(".")[0]
        if module in rows:
            assert tensor.shape[0] == width
            found[name] = tensor[kept]
        elif module in columns and tensor.dim() == 2:
            assert tensor.shape[1] == width
            found[name] = tensor[:, kept]
        else:
            found[name] = tensor
    return found


def kept_of(program: Any) -> Tensor:
    (kept,) = program.history[-1].plan.decisions["kept"].values()
    return torch.tensor(kept)


def test_it_is_the_smaller_model(small: Any) -> None:
    model, program = small
    pruned = peftfx.run(program, "width_pruning")
    kept = kept_of(pruned)
    assert len(kept) == 18 and kept.tolist() != list(range(18))
    smaller = Small(18, tied=model.head.weight is model.words.weight).eval()
    smaller.load_state_dict(sliced(model.state_dict(), kept, 24))
    with torch.no_grad():
        want, got, before = (m(ids(2, 12)) for m in (smaller, pruned, model))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert moved(before, want) > 1e-2
    assert {s.width for s in pruned.sites if isinstance(s, SublayerSite | EmbeddingSite)} == {18}
    sizes = {
        s.role: (s.in_features, s.out_features) for s in pruned.sites if isinstance(s, LinearSite)
    }
    assert sizes["q"] == (18, 16) and sizes["ffn.down"] == (48, 18)
    state = pruned.export_state_dict(strict=False)
    assert {n: t.shape for n, t in state.items()} == {
        n: t.shape for n, t in smaller.state_dict().items()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("int4,group=4", "embedding"),
        ("codebook,group=8", "linear|embedding"),
        ("onebit,group=8", "linear|embedding"),
        ("sparse24", "embedding"),
    ],
)
def test_weights_in_few_bits_lose_whole_groups(kind: str, where: str) -> None:
    """Tables and linears alike: columns that share what they are stored with go together."""
    torch.manual_seed(0)
    base = peftfx.capture(Small(24).eval(), (ids(),))
    stored = peftfx.run(base, f"quantise{{format={kind},where={where}}}")
    program = peftfx.run(stored, "width_pruning{ratio=0.35}")
    kept, group = kept_of(program), int(kind[-1])
    assert torch.equal(
        kept.view(-1, group) // group, kept[::group, None].expand(-1, group) // group
    )
    assert len(kept) == 16
    smaller = Small(16).eval()
    smaller.load_state_dict(sliced(values_of(stored), kept, 24))
    got = program(input_ids=ids(4, 7))
    torch.testing.assert_close(got, smaller(ids(4, 7)), rtol=1e-4, atol=1e-5)
    assert moved(stored(input_ids=ids(4, 7)), got) > 0.01
    assert {"words.weight", "places.weight"} <= dense_weights(program).keys()


def values_of(program: Any) -> dict[str, Tensor]:
    """What its weights in few bits stand for, and all others, by original name."""
    module = program.module
    plain = {n: t for n, t in module.state_dict().items() if n.count(".") == 1}
    return {**plain, **dense_weights(program)}


def test_adapters_are_cut_along(small: Any) -> None:
    model, program = small
    adapted = randomise(peftfx.run(program, "lora{rank=2,where=linear|embedding};ia3"), 0.1)
    pruned = peftfx.run(adapted, "width_pruning{ratio=0.5}")
    kept = kept_of(pruned)
    folded = peftfx.run(adapted, "fold{tied=untie}").export_state_dict(strict=False)
    smaller = Small(12).eval()
    smaller.load_state_dict(sliced(folded, kept, 24))
    with torch.no_grad():
        want, got, before = (m(ids(2, 12)) for m in (smaller, pruned, model))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert moved(before, want) > 1e-2


def test_written_out_norms_and_llama() -> None:
    torch.manual_seed(0)
    model = models.llama(head_dim=8).eval()
    program = peftfx.capture(model, kwargs=batch())
    pruned = peftfx.run(program, "width_pruning")
    kept = kept_of(pruned)
    config = type(model.config)(**{**model.config.to_dict(), "hidden_size": 24, "head_dim": 8})
    smaller = type(model)(config).eval()
    state = model.state_dict()
    for name, tensor in smaller.state_dict().items():
        full = state[name]
        for axis in range(full.dim()):
            if full.shape[axis] != tensor.shape[axis]:
                full = full.index_select(axis, kept)
        tensor.copy_(full)
    with torch.no_grad():
        want, got, before = (m(**batch(2, 12)).logits for m in (smaller, pruned, model))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert moved(before, want) > 1e-2


def test_a_width_that_is_returned_is_refused(captured: Any) -> None:
    with pytest.raises(PassError, match="they are an output of the model"):
        peftfx.run(captured["encoder"][1], "width_pruning")


def test_it_trains_on(small: Any) -> None:
    _, program = small
    pruned = peftfx.run(program, "width_pruning;lora{rank=2}")
    before = pruned(ids()).detach()
    loss = pruned(ids()).square().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in pruned.trainable_parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad.sign() * 0.1)
    assert moved(before, pruned(ids())) > 1e-3
