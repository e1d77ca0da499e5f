"""Names and relations of sizes: which axis is the batch, what is tied, what programs are tried at."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.edits.edit import Editor
from peftfx.rewriter.errors import CaptureError, InputError, PassError
from peftfx.rewriter.inputs.probes import probes
from peftfx.rewriter.inputs.spec import InputSpec
from peftfx.rewriter.inputs.specfile import read_spec
from peftfx.rewriter.inputs.tensor_input import TensorInput
from peftfx.rewriter.measure.influence import SAMPLES, TOKENS, _changes
from peftfx.rewriter.measure.trials import sizes
from peftfx.rewriter.pipeline.passes import Pass
from peftfx.rewriter.program.history import Plan
from peftfx.rewriter.program.state import State
from peftfx.rewriter.program.text import with_names

from .models import Encoder, batch, randomise

TIME_FIRST = {"src": {0: "time", 1: "rows"}}
SAID_WRONG = {"src": {0: "batch", 1: "sequence"}}


def transformer(batch_first: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval().requires_grad_(False)


def shapes(program: Any) -> list[tuple[int | str, ...]]:
    return [i.shape for i in program.spec.inputs]


@pytest.mark.parametrize(
    ("dynamic", "shape"),
    [
        ("auto", ("sequence", "batch", 16)),
        (TIME_FIRST, ("time", "rows", 16)),
        ({"src": {-3: "time"}}, ("time", 2, 16)),
        (None, (7, 2, 16)),
    ],
)
def test_samples_of_a_tokens_first_model_do_not_mix(
    dynamic: Any, shape: tuple[int | str, ...]
) -> None:
    program = peftfx.capture(transformer(), (torch.randn(7, 2, 16),), dynamic=dynamic)
    assert shapes(program) == [shape]
    x = torch.randn(7, 2, 16)
    y = x.clone()
    y[:, 1] += 3
    gated = randomise(peftfx.run(program, "unipelt{rank=2,length=2,bottleneck=2}"), 0.3)
    assert torch.equal(gated(x)[:, 0], gated(y)[:, 0])
    assert not torch.equal(gated(x)[:, 1], gated(y)[:, 1])
    routed = randomise(peftfx.run(program, "coda{bottleneck=2}"), 0.3)
    assert torch.equal(routed(x)[:, 0], routed(y)[:, 0])
    assert not torch.equal(routed(x)[:, 1], routed(y)[:, 1])


def test_fixed_tokens_are_routed_as_those_of_any_number() -> None:
    model, x = transformer(), torch.randn(7, 2, 16)
    fixed, free = (
        peftfx.run(peftfx.capture(model, (x,), dynamic=d), "coda{bottleneck=2}")
        for d in (None, "auto")
    )
    randomise(fixed, 0.3)
    own = dict(fixed.module.named_parameters())
    with torch.no_grad():
        for name, parameter in free.module.named_parameters():
            parameter.copy_(own[name])
    assert torch.equal(fixed(x), free(x))


@pytest.mark.parametrize("dynamic", ["auto", TIME_FIRST])
@pytest.mark.parametrize("where", ["q|v", "linear"])
def test_a_bank_of_a_tokens_first_model_takes_one_id_a_sample(where: str, dynamic: Any) -> None:
    """Also where tokens and samples are on one axis, and heads before it on another."""
    program = peftfx.capture(transformer(), (torch.randn(7, 2, 16),), dynamic=dynamic)
    alone = randomise(peftfx.run(program, f"lora{{name=a,rank=2,where={where}}}"), 0.3)
    bank = peftfx.run(alone, "bank")
    x = torch.randn(5, 3, 16)
    got = bank(x, adapter=torch.tensor([0, -1, 0]))
    assert torch.allclose(got[:, [0, 2]], alone(x)[:, [0, 2]], atol=1e-5)
    assert torch.allclose(got[:, 1], program(x)[:, 1], atol=1e-6)
    assert not torch.allclose(got[:, 0], program(x)[:, 0], atol=1e-3)
    with pytest.raises(InputError, match="adapter"):
        bank(x, adapter=torch.tensor([0, -1, 0, 0, 0]))


@pytest.mark.parametrize("method", ["coda", "unipelt", "lora;bank"])
def test_a_batch_that_is_none_is_refused(method: str) -> None:
    program = peftfx.capture(transformer(), (torch.randn(7, 2, 16),), dynamic=SAID_WRONG)
    with pytest.raises(PassError, match="influence"):
        peftfx.run(program, method)


@pytest.mark.parametrize(
    ("dynamic", "known", "remedy"),
    [
        (None, "fixed at 2", "dynamic={'src': {1: 'batch'}}"),
        ({"src": {0: "time"}}, "fixed at 2", "dynamic={'src': {0: 'time', 1: 'batch'}}"),
        (SAID_WRONG, "along 'sequence' it does not",
         "dynamic={'src': {0: 'sequence', 1: 'batch'}}"),
    ],
)  # fmt: skip
def test_a_bank_without_samples_says_what_is_known(dynamic: Any, known: str, remedy: str) -> None:
    program = peftfx.capture(transformer(), (torch.randn(7, 2, 16),), dynamic=dynamic)
    with pytest.raises(PassError) as caught:
        peftfx.run(program, "lora;bank")
    assert known in str(caught.value) and remedy in str(caught.value)
    text = str(caught.value).partition("Capture with dynamic=")[2]
    written: Any = ast.literal_eval(text.rstrip("."))
    again = peftfx.capture(transformer(), (torch.randn(7, 2, 16),), dynamic=written)
    assert peftfx.run(again, "lora;bank").history[-1].edited


@dataclass(frozen=True, kw_only=True)
class Refusing(Pass, abstract=True):
    """A pass that speaks of sizes as torch does."""

    text: ClassVar[str] = "refusing"

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        raise PassError(f"its stream ({', '.join(program.symbols)}, 16) is another.")

    def apply(self, edit: Editor, plan: Plan) -> None:
        raise AssertionError("the plan was refused")


def test_messages_call_sizes_what_the_spec_calls_them() -> None:
    program = peftfx.capture(transformer(), (torch.randn(7, 2, 16),), dynamic=TIME_FIRST)
    with pytest.raises(PassError, match=r"its stream \(time, rows, 16\) is another"):
        peftfx.run(program, Refusing())


def test_only_symbols_are_renamed_in_messages() -> None:
    symbols = {"s1": "batch", "s2": "sequence + 4", "s0": "time"}
    text = "at s0.layer0.attn ('s1'), layers.s2.weight: view [s0*s1, s2], got s9 and s1."
    named = "at s0.layer0.attn ('s1'), layers.s2.weight: view [time*batch, (sequence + 4)], got "
    assert with_names(text, symbols) == f"{named}s9 and batch."


def test_batch_first_models_keep_their_names_and_free_names_work() -> None:
    x = torch.randn(3, 7, 16)
    assert shapes(peftfx.capture(transformer(True), (x,))) == [("batch", "sequence", 16)]
    named = peftfx.capture(transformer(True), (x,), dynamic={"src": {0: "rows", 1: "time"}})
    routed = randomise(peftfx.run(named, "coda{bottleneck=2}"), 0.3)
    y = x.clone()
    y[1] += 3
    assert torch.equal(routed(x)[0], routed(y)[0])


def test_without_values_attention_tells_the_axis() -> None:
    with torch.device("meta"):
        model = transformer()
    program = peftfx.capture(model, (torch.randn(7, 2, 16),))
    assert shapes(program) == [("sequence", "batch", 16)]
    assert peftfx.run(program, "unipelt").history[-1].edited
    with torch.device("meta"):
        plain = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    unknown = peftfx.capture(plain, (torch.randn(7, 2, 16),))
    with pytest.raises(PassError, match="cannot be tried"):
        peftfx.run(unknown, "lora{where=linear};bank")


def test_two_candidates_and_no_name_are_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    program = peftfx.capture(model, (torch.randn(7, 2, 16),), dynamic={"input": {0: "a", 1: "b"}})
    with pytest.raises(PassError, match="samples may lie along a or b"):
        peftfx.run(program, "lora{where=linear};bank")


class Ids(nn.Module):
    """Token ids `[tokens, batch]`, or `[batch, tokens]` that the model turns; sums of the tokens
    beside them, and a mask `[batch, tokens]` if it is given."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.table, self.inner, self.turned = nn.Embedding(30, 16), transformer(), turned

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.table(ids.mT if self.turned else ids)
        y = self.inner(x, src_key_padding_mask=None if mask is None else mask == 0)
        return y, y[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_a_prompt_is_put_in_front_of_the_tokens_not_among_the_samples(
    turned: bool, masked: bool
) -> None:
    model = Ids(turned).eval().requires_grad_(False)
    ids = torch.randint(1, 30, (3, 7) if turned else (7, 3))
    inputs = {"ids": ids, "mask": torch.ones(3, 7, dtype=torch.long)} if masked else {"ids": ids}
    program = peftfx.capture(model, kwargs=inputs)
    assert shapes(program)[0] == (("batch", "sequence") if turned else ("sequence", "batch"))
    program = randomise(peftfx.run(program, "prompt_tuning{length=2}"), 0.5)
    assert shapes(program)[0] == (("batch", "sequence") if turned else ("sequence", "batch"))
    (prompt,) = program.trainable_parameters()
    ids = torch.randint(1, 30, (4, 9) if turned else (9, 4))
    real = torch.arange(9) < torch.tensor([9, 9, 5, 8])[:, None]
    given = {"ids": ids, "mask": real.long()} if masked else {"ids": ids}
    embedded = model.table(ids.mT if turned else ids)
    x = torch.cat([prompt[:, None].expand(-1, 4, -1), embedded])
    hidden = torch.cat([torch.zeros(4, 2, dtype=torch.bool), ~real], 1) if masked else None
    want = model.inner(x, src_key_padding_mask=hidden)[2:]
    got, start = program(**given)
    places = real.mT if masked else slice(None)
    torch.testing.assert_close(got[places], want[places], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(start, want[0], rtol=1e-5, atol=1e-5)
    assert (want - model(**given)[0])[places].abs().max() > 0.01


# Names.


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(a), self.layer(b)


def test_one_name_ties_axes_and_no_name_does_not() -> None:
    example = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    names = {0: "rows", 1: "length"}
    tied = peftfx.capture(Two(), example, dynamic={"a": names, "b": names})
    assert shapes(tied) == [("rows", "length", 8)] * 2
    with pytest.raises(InputError, match="length is 4, but 5"):
        tied(torch.randn(2, 5, 8), torch.randn(2, 4, 8))
    free = peftfx.capture(Two(), example)
    assert shapes(free) == [("batch", "sequence", 8), ("batch_2", "sequence_2", 8)]
    free(torch.randn(3, 5, 8), torch.randn(2, 4, 8))
    with pytest.raises(CaptureError, match="one is 2 and the other 3"):
        peftfx.capture(
            Two(), (torch.randn(2, 5, 8), torch.randn(3, 5, 8)),
            dynamic={"a": {0: "rows"}, "b": {0: "rows"}},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({7: "q"}, "axis 7 of 'src'"), ({-4: "q"}, "axis -4"), ({0: "a", -3: "b"}, "twice"),
        ({0: "two words"}, "'two words'"), ({0: "min"}, "'min'"), ({"0": "a"}, "axis '0'"),
    ],
)  # fmt: skip
def test_bad_axes_are_refused(axes: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        peftfx.capture(transformer(), (torch.randn(7, 2, 16),), dynamic={"src": axes})


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


def test_two_names_of_one_size_are_refused() -> None:
    example = torch.randn(3, 8), torch.randn(3, 8)
    with pytest.raises(CaptureError, match="'n' and 'm'"):
        peftfx.capture(Sum(), example, dynamic={"a": {0: "n"}, "b": {0: "m"}})


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 2)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return self.layer(x) * weights.mean()


class Gathered(nn.Module):
    """Needs a row of `rows` for every row of x, which no guard says."""

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        return x * 2 + rows[torch.arange(x.shape[0])][:, None]


def test_equal_sizes_are_one_only_where_the_model_needs_it() -> None:
    free = peftfx.capture(Weighted(), (torch.randn(2, 7, 16), torch.ones(2)))
    assert free(torch.randn(5, 7, 16), torch.ones(2)).shape == (5, 7, 2)
    tied = peftfx.capture(Gathered(), (torch.randn(2, 7), torch.ones(2)))
    assert [s[0] for s in shapes(tied)] == ["batch", "batch"]
    said = peftfx.capture(
        Gathered(), (torch.randn(2, 7), torch.ones(2)), dynamic={"x": {0: "n"}, "rows": {0: "m"}}
    )
    assert said.spec.relations == ("n == m",)


# Probes, and limits.


class Joint(nn.Module):
    """A past, new rows, and weights over both."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, new: Tensor, past: Tensor, total: Tensor) -> Tensor:
        return (torch.cat([past, self.layer(new)], 1) * total[..., None]).sum(1)


def test_probes_obey_relations(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    example = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.rand(2, 8)
    dynamic = {
        "new": {0: "batch", 1: "new"}, "past": {0: "batch", 1: "past"},
        "total": {0: "batch", 1: "total"},
    }  # fmt: skip
    program = peftfx.capture(Joint(), example, dynamic=dynamic)
    found = probes(program.spec, {})
    assert len(found) == 3
    for probe in found:
        assert probe["total"] == probe["past"] + probe["new"]
    assert found[-1] == {"batch": 1, "new": 1, "past": 1, "total": 2}
    assert len({tuple(probe.values()) for probe in found}) == 3
    assert len(set(found[0].values())) == 4
    with pytest.raises(InputError, match="total"):
        program(torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.rand(2, 7))
    folded = peftfx.run(program, "lora{rank=2,where=linear};fold")
    report = peftfx.export_onnx(folded, tmp_path / "m.onnx")
    assert list(report.parity) == [", ".join(f"{n}={s}" for n, s in p.items()) for p in found]
    assert all(text in str(report) for text in report.parity)


def test_reports_name_the_sizes_that_ran(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    fixed = peftfx.capture(nn.Linear(8, 3), (torch.randn(4, 8),), dynamic=None)
    assert [x["input"].shape[0] for x in sizes(fixed)] == [4]
    assert list(peftfx.export_onnx(fixed, tmp_path / "m.onnx").parity) == ["fixed sizes"]


def test_probes_are_apart_and_within_ranges() -> None:
    inputs = tuple(TensorInput(n, (n,), torch.float32) for n in ("batch", "h", "w"))
    ranges = {"batch": (1, None), "h": (16, None), "w": (4, 6)}
    spec = InputSpec(inputs, ranges, relations=("h % 4 == 0",))
    found = probes(spec, {"batch": 2, "h": 32, "w": 4})
    assert [p["h"] % 4 for p in found] == [0, 0, 0]
    assert all(4 <= p["w"] <= 6 for p in found)
    assert found[-1] == {"batch": 1, "h": 16, "w": 4} and found[0]["h"] > 16
    impossible = InputSpec(inputs, ranges, relations=("h % 4 == 5",))
    assert probes(impossible, {"batch": 2, "h": 32, "w": 4}) == [{"batch": 2, "h": 32, "w": 4}]


def test_every_limit_is_told(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    program = peftfx.capture(Encoder(layers=1).eval(), kwargs=batch())
    (limit,) = program.spec.limits
    assert limit.startswith("sequence is 1 to 40 (models.py:") and limit in str(program.spec)
    report = peftfx.export_onnx(program, tmp_path / "m.onnx")
    assert report.limits == (limit,) and limit in str(report)
    notes = {p.key: p.value for p in onnx.load(str(report.path)).metadata_props}
    assert notes["peftfx.limits"] == limit


@pytest.mark.parametrize(
    ("dynamic", "batches"),
    [
        (TIME_FIRST, ("rows",)),
        ({"src": {-3: "token", -2: "batch"}}, ("batch",)),
        ({"src": {0: "time"}}, ()),
    ],
)
def test_what_lies_along_named_axes_is_tried(
    dynamic: Any, batches: tuple[str, ...], tmp_path: Path
) -> None:
    program = peftfx.capture(transformer(), (torch.randn(7, 2, 16),), dynamic=dynamic)
    assert program.spec.of_kind("batch") == batches
    assert read_spec(json.loads(json.dumps(program.spec.to_json()))) == program.spec
    one, other = sizes(program)[0], sizes(program)[-1]
    if batches == ("rows",):  # few samples of many tokens, and then one of one
        assert one["src"].shape[0] > one["src"].shape[1]
        assert tuple(other["src"].shape[:2]) == (1, 1)


def test_samples_by_another_name_are_no_tokens() -> None:
    """What a method says of tokens excuses no influence of samples on one another."""
    program = peftfx.capture(transformer(), (torch.randn(7, 2, 16),), dynamic=TIME_FIRST)
    changes = {c.size: c.kind for c in _changes(program, {"src": torch.randn(5, 3, 16)})}
    assert changes == {"time": TOKENS, "rows": SAMPLES}
