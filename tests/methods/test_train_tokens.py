"""Trained rows of the token table, against plain PyTorch with a masked gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import OptionError

from ..models import batch, randomise
from .common import check, hooked

IDS = torch.tensor([[1, 4, 2, 4], [3, 1, 5, 0]])


class Tied(nn.Module):
    """A table that looks up tokens and is the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(7, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)).relu())


def test_only_these_rows_train() -> None:
    torch.manual_seed(0)
    model = Tied()
    program = peftfx.run(peftfx.capture(model, (IDS,)), "train_tokens{ids=[4,1]}").train()
    assert torch.equal(program(IDS), model(IDS))
    (rows,) = program.named_trainable_parameters().values()
    reference = copy.deepcopy(model).requires_grad_(False)
    table = reference.embed.weight.requires_grad_(True)
    for _ in range(3):
        for module, tensor in ((program.module, rows), (reference, table)):
            (module(IDS) - 1).square().mean().backward()
            gradient = tensor.grad
            assert gradient is not None
            with torch.no_grad():
                if tensor is table:
                    gradient[[0, 2, 3, 5, 6]] = 0
                tensor -= 0.5 * gradient
            tensor.grad = None
    torch.testing.assert_close(rows, table[[4, 1]])
    torch.testing.assert_close(program(IDS), reference(IDS))
    folded = peftfx.run(program, "fold")
    torch.testing.assert_close(folded.export_state_dict()["embed.weight"], table.detach())


def test_a_model_of_two_kinds(captured: Any) -> None:
    model, base = captured["encoder"]
    inputs = batch()
    ids = inputs["input_ids"]
    tokens = ids.unique()[:3].tolist()
    program = randomise(peftfx.run(base, f"train_tokens{{ids={tokens}}}"))
    (rows,) = program.named_trainable_parameters().values()

    def put(_: Any, y: Tensor) -> Tensor:
        for row, token in zip(rows, tokens, strict=True):
            y = torch.where((ids == token)[..., None], row, y)
        return y

    table = "words" if hasattr(model, "words") else "embed"
    with hooked(model, {table: put}):
        want = model(**inputs)
    check(program, base, want, inputs)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ids=[]", "at least one"),
        ("ids=[3,3]", "different ones"),
        ("ids=[-1]", "no negative ones"),
        ("ids=[4000000]", "beyond its"),
    ],
)
def test_bad_ids_are_refused(captured: Any, text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        peftfx.run(captured["encoder"][1], f"train_tokens{{{text}}}")
