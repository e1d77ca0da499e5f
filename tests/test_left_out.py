"""Inputs that calls leave out: the program is then what the model is without them, or says why not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import InputError
from peftfx.rewriter.inputs.specfile import read_spec

IDS = torch.tensor([[5, 9, 3, 7, 8, 2], [4, 6, 9, 2, 5, 7]])
PAD = 1


class Placed(nn.Module):
    """Attention over tokens with positions, whose default is made in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8, padding_idx=PAD if way == "padded" else None)
        self.places, self.out, self.way = nn.Embedding(12, 8), nn.Linear(8, 4), way
        if way == "unseen":
            nn.init.zeros_(self.places.weight)

    def positions(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        count = torch.arange(ids.shape[1])
        if self.way == "masked" and mask is not None:
            return (mask.cumsum(1) - 1).clamp_min(0)
        if self.way == "padded":
            return (ids != PAD).long().cumsum(1)
        return (count + 2 if self.way == "two" else count).expand_as(ids)

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        positions = self.positions(ids, mask) if positions is None else positions
        x = self.words(ids) + self.places(positions)
        shown = None if mask is None else mask[:, None].bool()
        return self.out(F.scaled_dot_product_attention(x, x, x, shown))


def made(way: str) -> tuple[nn.Module, peftfx.Program]:
    torch.manual_seed(0)
    model = Placed(way).eval()
    positions = torch.arange(6).expand(2, -1) + 2 * (way == "two") + (way == "padded")
    inputs = {"ids": IDS, "mask": torch.ones_like(IDS), "positions": positions}
    return model, peftfx.capture(model, kwargs=inputs)


@pytest.mark.parametrize("way", ["count", "two"])
def test_what_the_model_makes_itself_is_made(way: str) -> None:
    """At other sizes, one by one and together; also as it comes back from a file, and rewritten."""
    model, program = made(way)
    ids = torch.randint(10, (3, 4), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
    again = read_spec(json.loads(json.dumps(program.spec.to_json())))
    assert again == program.spec
    for given in ({"ids": ids}, {"ids": ids, "mask": mask}):
        want = model(**given)
        assert torch.equal(program(**given), want)
        assert torch.equal(program.module(**again.bind((), given)), want)
    other = {"ids": ids, "positions": torch.tensor([0, 0, 1, 3]).expand(3, -1)}
    assert torch.equal(program(**other), model(**other))
    adapted = peftfx.run(program, "lora{rank=2,where=linear}")
    assert torch.equal(adapted(ids), model(ids))
    with pytest.raises(InputError, match="'ids' is missing"):
        program(mask=mask)


@pytest.mark.parametrize(("way", "why"), [
    ("masked", "neither one number nor a count"),
    ("padded", "neither one number nor a count"),
    ("unseen", "nothing depends on it yet"),
])  # fmt: skip
def test_what_depends_on_more_is_asked_for(way: str, why: str) -> None:
    """On the mask, on which ids pad, or on what is zero as long as nothing is trained."""
    _, program = made(way)
    with pytest.raises(InputError, match=f"'positions' is missing .*{why}"):
        program(IDS, torch.ones_like(IDS))


def test_masks_of_a_transformer(captured: Any) -> None:
    """`generate` still makes a mask itself, and hands on the one that it is given."""
    model, program = captured["llama"]
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))
    assert torch.equal(program(input_ids=ids).logits, model(input_ids=ids).logits)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    shown, whole = program.generate(ids, mask, 4), program.generate(ids, None, 4)
    alone = program.generate(ids[:1, 2:], None, 4)
    assert torch.equal(shown[1], whole[1])
    assert shown.shape == whole.shape and alone.shape == (1, 7)
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).logits[0, -1].argmax()
    assert shown[0, 5] == want
