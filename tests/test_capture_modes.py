"""Modes of single submodules: what the model had when it was captured, the program has."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import CaptureError
from peftfx.rewriter.graph.module import modes_kept


class Wrapped(nn.Module):
    """An encoder layer inside of a module of one's own, with a head that drops out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.inner(x).mean(1)))


class Normed(nn.Module):
    """One batch norm, called twice, and stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.depth = nn.Linear(8, 8), nn.BatchNorm1d(8), Depth()

    def forward(self, x: Tensor) -> Tensor:
        return self.depth(self.norm(self.up(self.norm(x))))


class Depth(nn.Module):
    """Drops whole samples in training."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * torch.bernoulli(torch.full((x.shape[0], 1), 0.5))
        return x


class Frozen(Normed):
    """The usual idiom for batch norm that stays frozen."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.norm.eval()
        return self


X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def seeded(module: Any, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        return module(x)


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want)  # torch's encoder rounds otherwise in evaluation


def test_an_evaluating_model_in_a_fresh_wrapper_keeps_its_mode() -> None:
    model = Wrapped()
    model.inner.eval()
    model.drop.eval()
    program = peftfx.capture(model, (X,))
    assert program.training and model.training
    assert torch.equal(seeded(program, X), seeded(program, X))
    torch.manual_seed(4)
    near(program(X), model(X))


def test_every_switch_starts_from_the_mode_of_its_module(tmp_path: Path) -> None:
    model = Wrapped()
    model.inner.eval()  # the head drops out, the encoder does not
    model.requires_grad_(False)
    program = peftfx.capture(model, (X,))
    want = seeded(model, X)
    near(seeded(program, X), want)
    assert not torch.equal(program(X), program(X))  # the head's dropout acts
    changed = peftfx.run(program, "lora{rank=2,where=linear}")
    changed.verify()
    peftfx.save(changed, tmp_path / "a")
    outlined = peftfx.inline(peftfx.outline(program))
    loaded = peftfx.load(model, tmp_path / "a")
    moved, copied = program.to("cpu"), copy.deepcopy(program.module)
    near(seeded(lambda x: copied(x=x), X), want)
    for same in (program, changed, changed.without("lora"), outlined, loaded, moved):
        near(seeded(same, X), want)
    program.train(), model.train()
    near(seeded(program, X), seeded(model, X))  # all of it, as train() says
    assert not torch.equal(seeded(program, X), want)
    program.eval(), model.eval()
    near(program(X), model(X))


def test_a_part_that_trains_in_an_evaluating_model() -> None:
    model = Wrapped().eval()
    model.drop.train()  # Monte Carlo dropout
    program = peftfx.capture(model, (X,))
    assert not program.training
    near(seeded(program, X), seeded(model, X))
    assert not torch.equal(program(X), program(X))
    program.eval()
    assert torch.equal(program(X), program(X))


@pytest.mark.parametrize("kind", [Normed, Frozen])
def test_frozen_batch_norm_stays_frozen(kind: type[Normed]) -> None:
    model = kind().train()
    model.norm.eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    program = peftfx.capture(model, (ROWS,))
    assert torch.equal(seeded(program, ROWS), seeded(model, ROWS))
    program = peftfx.run(program, "lora{rank=2,where=linear}")
    done = peftfx.fit(
        program, [{"x": ROWS}], loss=lambda y, b: y.square().mean(), epochs=2, progress=False
    ).program
    after = peftfx.run(done, "fold").export_state_dict()
    assert not torch.equal(after["up.weight"], before["up.weight"])
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(after[name], before[name])


def test_train_means_what_it_means_to_the_model(tmp_path: Path) -> None:
    model = Frozen().eval()
    program = peftfx.capture(model, (ROWS,))
    program.train(), model.train()
    for _ in range(2):
        assert torch.equal(seeded(program, ROWS), seeded(model, ROWS))  # depth acts, norm does not
    assert not bool(program.module.get_buffer("norm.running_mean").any())
    plain = peftfx.capture(Normed().eval(), (ROWS,)).train()
    plain(ROWS)
    assert bool(plain.module.get_buffer("norm.running_mean").any())  # what would be the fault


def test_a_steady_mode_is_saved_with_the_program(tmp_path: Path) -> None:
    class Quiet(Frozen):
        def __init__(self) -> None:
            super().__init__()
            self.depth = nn.Dropout(0.5)

    peftfx.save_program(peftfx.capture(Quiet().eval(), (ROWS,)), tmp_path / "p")
    again = peftfx.load_program(tmp_path / "p").train()
    again(ROWS)
    assert not bool(again.module.get_buffer("norm.running_mean").any())


def test_modes_come_from_the_model_not_from_the_cache(tmp_path: Path) -> None:
    model = Wrapped()
    notes: list[str] = []
    for part in (model.inner, model.drop, model):
        model.train()
        part.eval()
        program = peftfx.capture(model, (X,), cache=tmp_path)
        notes.append(program.cached)
        near(seeded(program, X), seeded(model, X))
    assert notes[1:] == ["recalled"] * 2 or notes[0].startswith("not cached")


def test_a_mode_that_another_module_reads_is_refused() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.up(x), 0.5, self.drop.training)

    model = Reads()
    model.drop.eval()
    with pytest.raises(CaptureError, match=r"reads the mode of another.*model.train\(\)"):
        peftfx.capture(model, (ROWS,))
    assert model.training and not model.drop.training
    peftfx.capture(model.eval(), (ROWS,))


def test_modes_kept() -> None:
    model = Wrapped()
    model.inner.eval()
    with modes_kept(model):
        model.train()
    assert not model.inner.training and not model.inner.linear1.training and model.drop.training
