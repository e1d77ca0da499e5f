"""Measured only where the captured model itself runs; what is left out is told with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import VerifyError
from peftfx.rewriter.measure import trials
from peftfx.rewriter.measure.trials import beyond, measured

LORA = "lora{rank=2,where=linear}"


class Tokens(nn.Module):
    """Token ids to hidden states `[batch, sequence, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = nn.Embedding(20, 8), nn.Linear(8, 8)

    def hidden(self, input_ids: Tensor) -> Tensor:
        return self.layer(self.table(input_ids))


class LastToken(Tokens):
    def forward(self, input_ids: Tensor, last: Tensor) -> Tensor:
        return self.hidden(input_ids)[torch.arange(input_ids.shape[0]), last]


class TwoLargest(Tokens):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.hidden(input_ids).topk(2, 1).values.sum(1)


class Fourth(Tokens):
    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.hidden(input_ids)
        return h[:, 3] + h.mean(1)


IDS = torch.arange(12).reshape(2, 6)


def names(program: peftfx.Program) -> list[tuple[int, ...]]:
    return [tuple(sizes.values()) for sizes in measured(program)]


@pytest.mark.parametrize(
    ("model", "given", "smallest", "reason"),
    [
        (LastToken, (IDS, torch.tensor([2, 4])), (1, 3), "IndexError: index 2 is out of bounds"),
        (TwoLargest, (IDS,), (1, 2), "RuntimeError: selected index k out of range"),
    ],
)
def test_left_out_where_the_model_fails(
    model: type[Tokens], given: tuple[Tensor, ...], smallest: tuple[int, int], reason: str
) -> None:
    program = peftfx.capture(model().eval(), given)
    assert names(program) == [(2, 12), (3, 7), smallest]
    after = peftfx.run(program, f"{LORA};fold")
    for record in after.history:
        (line,) = (n for n in record.notes if n.startswith("not measured"))
        assert line.startswith("not measured at batch=1, sequence=1: the model fails there (")
        assert reason in line and line in str(record)
    assert all(certificate.holds for certificate in after.verify())


def test_a_prompt_is_measured_where_the_captured_model_runs() -> None:
    program = peftfx.capture(Fourth().eval(), (IDS,))
    (limit,) = program.spec.limits
    assert limit.startswith("sequence is 4 or more (test_probe_sizes.py:")
    after = peftfx.run(program, "prompt_tuning{length=3}")
    assert min(n for _, n in names(after)) >= 4
    assert "size 1 is outside the model's range 4.." in str(after.history[0])
    after.verify()


def test_a_loaded_program_is_measured(tmp_path: Path) -> None:
    given = IDS, torch.tensor([2, 4])
    model = LastToken().eval()
    after = peftfx.run(peftfx.capture(model, given), LORA)
    peftfx.save(after, tmp_path / "a")
    again = peftfx.load(model, tmp_path / "a")
    assert torch.equal(again(*given), after(*given))
    peftfx.run(again, "fold")


def test_parity_is_measured_where_the_model_runs(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    program = peftfx.capture(TwoLargest().eval(), (IDS,))
    report = peftfx.export_onnx(program, tmp_path / "m.onnx")
    assert list(report.parity) == [
        "batch=2, sequence=12", "batch=3, sequence=7", "batch=1, sequence=2",
    ]  # fmt: skip


class Tabled(Tokens):
    """Fails at more tokens than a table of positions that the tracing does not see."""

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.ones_like(input_ids).cumsum(1) - 1
        return self.hidden(input_ids) + self.table.weight[:6][positions]


def test_the_example_remains_where_longer_ones_fail() -> None:
    program = peftfx.capture(Tabled().eval(), (IDS,))
    assert names(program) == [(2, 6), (3, 6), (1, 1)]
    notes = peftfx.run(program, LORA).history[0].notes
    assert sum("sequence=12" in n or "sequence=7" in n for n in notes) == 2


def test_tried_once_and_nothing_told_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    program = peftfx.capture(nn.Linear(8, 8), (torch.randn(2, 8),))
    counts: list[int] = []
    real = trials.forward
    monkeypatch.setattr(trials, "forward", lambda *a: (counts.append(1), real(*a))[1])  # pyright: ignore
    after = peftfx.run(program, f"{LORA};fold")
    peftfx.run(program, LORA).verify()
    assert len(counts) == len(measured(program)) == 3
    assert not any("measured" in n for r in after.history for n in r.notes)


def test_on_a_gpu_no_index_out_of_range_is_tried() -> None:
    ids, mask = IDS + 5, torch.ones(2, 6, dtype=torch.int64)
    program = peftfx.capture(LastToken().eval(), (ids, torch.tensor([2, 4])))
    spec, sample = program.spec, program.sample
    assert beyond(spec, sample, {"batch": 1, "sequence": 2}) == "last"
    assert beyond(spec, sample, {"batch": 1, "sequence": 3}) == ""  # its first value is 2
    assert beyond(spec, sample, {"batch": 2, "sequence": 4}) == "last"
    assert beyond(spec, sample, {"batch": 3, "sequence": 12}) == ""
    # Neither ids above every size nor masks are taken for indices.
    assert beyond(spec, {"input_ids": ids, "last": mask[0, :2]}, {"batch": 1, "sequence": 1}) == ""


def test_a_model_that_runs_nowhere_is_refused() -> None:
    program = peftfx.capture(TwoLargest().eval(), (IDS,))
    program.sample = {"input_ids": IDS + 100}
    with pytest.raises(VerifyError, match=r"fails at every size.*sequence=6.*index out of range"):
        peftfx.run(program, LORA)
