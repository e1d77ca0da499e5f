"""Training weights themselves: against plain PyTorch, and beside adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import PassError, SelectorError

from ..models import batch, first, randomise
from .common import check

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Classifier(nn.Module):
    """A backbone and a new head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.up(self.embed(x).relu()).relu()))


def learn(module: Any, parameters: Any, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (module(X) - 1).square().mean().backward()
        optimizer.step()


def test_train_equals_plain_training() -> None:
    torch.manual_seed(0)
    model = Classifier()
    program = peftfx.run(peftfx.capture(model, (X,)), "train{where='name:head|norm'}")
    reference = copy.deepcopy(model).requires_grad_(False)
    for part in (reference.head, reference.norm):
        part.requires_grad_(True)
    want = {n for n, p in reference.named_parameters() if p.requires_grad}
    assert set(program.named_trainable_parameters()) == want == set(program.owned["train"])
    learn(program, program.trainable_parameters())
    learn(reference, [p for p in reference.parameters() if p.requires_grad])
    torch.testing.assert_close(program(X), reference(X))
    torch.testing.assert_close(program.export_state_dict(), dict(reference.state_dict()))


def test_train_beside_an_adapter(hand: Any, tmp_path: Path) -> None:
    _, model, base = hand
    program = randomise(peftfx.run(base, "lora{rank=2,where=q|v};train{where=norm};ia3"))
    inputs = batch(3, 6)
    want = first(program(**inputs)).detach()
    program.verify()
    peftfx.save(program, tmp_path / "a")
    loaded = peftfx.load(model, tmp_path / "a")
    assert torch.equal(first(loaded(**inputs)), want)
    assert set(loaded.named_trainable_parameters()) == set(program.named_trainable_parameters())
    folded = peftfx.run(program, "fold")
    torch.testing.assert_close(first(folded(**inputs)), want, rtol=1e-4, atol=1e-4)
    alone = program.without("train")
    held = dict(base.module.named_parameters())
    for parameter in program.owned["train"]:
        assert torch.equal(alone.module.get_parameter(parameter), held[parameter])
        assert not alone.module.get_parameter(parameter).requires_grad
    only = program.only(("train",))
    values = {n: p.detach() for n, p in only.named_trainable_parameters().items()}

    def reference() -> Any:
        eager = copy.deepcopy(model)
        eager.load_state_dict(values, strict=False)
        return eager(**inputs)

    check(only, base, reference(), inputs)


def test_biases_can_be_left_out() -> None:
    base = peftfx.capture(Classifier(), (X,))
    program = peftfx.run(base, "train{where='name:head',bias=false}")
    assert list(program.named_trainable_parameters()) == ["head.weight"]
    with pytest.raises(SelectorError, match="matches none"):
        peftfx.run(base, "train{where='name:heat'}")


def test_what_is_shared_and_what_cannot_train_is_said() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mid, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.mid(self.table(ids)))

    base = peftfx.capture(Tied(), (torch.randint(0, 9, (2, 5)),))
    tied = peftfx.run(base, "train{where='name:head'}")
    assert "table.weight trains whole: for" in str(tied.history[-1])
    both = peftfx.run(base, "peqa{where='name:mid',group=8};train{where='name:mid|name:head'}")
    assert [site for site, _ in both.history[-1].skipped] == ["mid.weight"]
    assert "no floating-point parameter" in str(both.history[-1])
    turned = peftfx.run(base, "train{where='name:mid'}")
    with pytest.raises(PassError, match=r"mid.weight trains as it is"):
        peftfx.run(turned, "peqa{where='name:mid',group=8}")
