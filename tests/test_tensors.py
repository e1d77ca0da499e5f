"""The table of a program's stored tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import PassError
from peftfx.rewriter.program.history import ITSELF
from peftfx.rewriter.program.tensors import Tensors

from .models import batch, build


def test_names_follow_ties_and_what_was_untied() -> None:
    table = Tensors(aliases={"head.weight": "embed.weight", "out.weight": "embed.weight"})
    assert table.names("embed.weight") == ["embed.weight", "head.weight", "out.weight"]
    assert table.stored("out.weight") == "embed.weight" and table.stored("up") == "up"
    apart = table.with_untied("head.weight", ["out.weight"])
    assert apart.stored("head.weight") == "head.weight" == apart.stored("out.weight")
    assert apart.names("head.weight") == ["head.weight", "out.weight"]
    assert apart.names("embed.weight") == ["embed.weight"]
    assert table.untied == () and apart.untied == ("head.weight",)


def test_who_trains_what() -> None:
    table = Tensors().with_trained("bitfit", ["a", "b"]).with_trained(ITSELF, ["c"])
    table = table.with_trained("bitfit", ["b", "d"])
    assert table.owned == {"bitfit": ("a", "b", "d"), ITSELF: ("c",)}
    assert table.trained == {"a", "b", "c", "d"}
    assert (table.owner("d"), table.owner("c"), table.owner("e")) == ("bitfit", ITSELF, None)


def test_a_program_shows_its_table(tmp_path: Path) -> None:
    model = build("decoder")
    base = peftfx.capture(model, kwargs=batch())
    program = peftfx.run(base, "bitfit{where=q}")
    name = "layers.0.q_proj.bias"
    assert program.tensors.owner(name) == "bitfit" and name in program.tensors.added
    assert program.owned == program.tensors.owned and program.added == program.tensors.added
    assert base.tensors.trained == frozenset()
    folded = peftfx.run(peftfx.run(program, "lora{rank=2,where=v}"), "fold{names=[lora]}")
    assert {n.rpartition(".")[2] for n in folded.removed} == {"a", "b"}
    with pytest.raises(AttributeError):
        program.added = ()  # pyright: ignore[reportAttributeAccessIssue]
    peftfx.save_program(program, tmp_path / "program")
    loaded = peftfx.load_program(tmp_path / "program")
    assert loaded.tensors.added == program.tensors.added
    assert torch.equal(loaded(**batch()), program(**batch()))


class Shared(nn.Module):
    """A table that is the head, too, and a linear called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(7, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.body(self.embed(ids)).relu()))


def test_one_row_says_who_reads_a_tensor() -> None:
    base = peftfx.capture(Shared(), (torch.randint(7, (2, 3)),))
    row = base.stored("head.weight")
    assert row.name == "embed.weight" and set(row.names) == {"embed.weight", "head.weight"}
    assert [r.rpartition(" (")[2] for r in row.readers] == ["in embed)", "in head)"]
    assert (row.owner, row.added, row.before) == (None, False, None)
    program = peftfx.run(base, "lora{where=body};train{where=head}")
    weight = program.stored("body.weight")
    assert len(weight.readers) == 2 and weight.shape == (8, 8)
    branch = next(n for n in program.named_trainable_parameters() if n.endswith(".a"))
    assert program.stored(branch).shape == program.module.get_parameter(branch).shape
    with torch.no_grad():
        program.module.get_parameter("embed.weight").add_(1)
    row = program.stored("head.weight")
    assert row.owner == "train" and row.before is not None
    torch.testing.assert_close(row.before + 1, program.module.get_parameter("embed.weight"))
    said = str(row)
    assert "also called head.weight; trained by train; changed since capture" in said
    with pytest.raises(PassError, match=r"no tensor 'heads.weight'. Nearest: "):
        program.stored("heads.weight")
