"""Pipelines: three spellings, one meaning; transactional; every step recorded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peftfx
from peftfx.rewriter.branches.branch import Delta
from peftfx.rewriter.edits.calls.requirements import failing_branch
from peftfx.rewriter.edits.edit import Editor
from peftfx.rewriter.errors import OptionError, PassError
from peftfx.rewriter.measure import witness
from peftfx.rewriter.pipeline.options import write_value
from peftfx.rewriter.pipeline.syntax import as_pipeline, parse, parse_value, parse_yaml, to_yaml
from peftfx.rewriter.program.sites import LinearSite
from peftfx.rewriter.tracing.propagate import propagate

from .models import batch, first

TEXT = "lora{rank=2,alpha=4.0,where=q|v and layer>=1};ia3{name=x};fold{names=[lora]}"
LIST = [
    peftfx.LoRA(rank=2, alpha=4.0, where="q|v and layer>=1"),
    peftfx.IA3(name="x"),
    peftfx.Fold(names=("lora",)),
]
YAML = """
passes:
  - lora: {rank: 2, alpha: 4e0, where: "q|v and layer>=1"}
  - ia3: {name: x}
  - fold: {names: [lora]}
"""


def test_text_list_and_yaml_mean_the_same(captured: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(YAML)
    pipelines = [as_pipeline(p) for p in (TEXT, LIST, recipe, str(recipe), [TEXT])]
    assert all(p == pipelines[0] for p in pipelines)
    assert str(pipelines[0]) == TEXT
    assert parse_yaml(to_yaml(pipelines[0])) == pipelines[0]
    _, base = captured["encoder"]
    texts = {peftfx.run(base, p).text() for p in (TEXT, LIST, recipe)}
    assert len(texts) == 1


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.from_regex(r"[a-z_]\w{0,5}", fullmatch=True), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(VALUE)
def test_values_survive_text(value: Any) -> None:
    assert parse_value(write_value(value)) == value


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 99), st.floats(-9, 9), st.text(min_size=1, max_size=10), st.booleans(),
    st.none() | st.lists(st.text(max_size=6), max_size=3),
)  # fmt: skip
def test_pipelines_survive_text(
    rank: int, alpha: float, where: str, rslora: bool, names: list[str] | None
) -> None:
    lora = peftfx.LoRA(rank=rank, alpha=alpha, where=where, rslora=rslora)
    fold = peftfx.Fold(names=None if names is None else tuple(names))
    pipeline = as_pipeline([lora, fold])
    assert parse(str(pipeline)) == pipeline


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"), ("loar", "Nearest: lora"), ("lora{rnk=2}", "Nearest: rank"),
        ("lora{rank=two}", "must be int"), ("lora{rank=2.5}", "must be int"), ("lora{rank=0}", "at least 1"),
        ("lora{dropout=1}", r"in \[0, 1\)"), ("lora{rank=2", "not closed"), ("lora}", "closes nothing"),
        ("lora{rank=1,rank=2}", "given twice"), ("lora{rank}", "not option=value"),
        ("lora{rank=}", "empty"), ("lora{name='a.b'}", "not a name"), ("lora{rank=true}", "must be int"),
        ("serial_adapter{activation=sine}", "one of gelu, relu, silu"), ("lora{where='q}", "not closed"),
        ("lora;;{}", "not a pass"), ("missing.yaml", "cannot be read"),
    ],
)  # fmt: skip
def test_bad_text(captured: Any, text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        peftfx.run(captured["encoder"][1], text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- lora: {rank: 2, rank: 3}", "duplicate key 'rank'"), ("lora: {}", "must be a list"),
        ("- [1]", "not a pass"), ("- lora: 3", "must be a mapping"), ("- {", "not YAML"),
    ],
)  # fmt: skip
def test_bad_yaml(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_yaml(text)


def test_yaml_reads_exponents_as_numbers() -> None:
    (item,) = parse_yaml("- serial_adapter: {std: 1e-3}")
    assert item == peftfx.SerialAdapter(std=0.001)


def test_a_failing_pass_changes_nothing(captured: Any) -> None:
    _, base = captured["encoder"]
    before, want = base.text(), first(base(**batch()))
    with pytest.raises(OptionError, match="at most 32") as caught:
        peftfx.run(base, "ia3;lora{rank=500}")
    assert "after ia3" in "".join(caught.value.__notes__)
    with pytest.raises(PassError, match="another name"):
        peftfx.run(base, "lora;lora")
    assert base.text() == before and torch.equal(first(base(**batch())), want)
    assert base.history == () and base.adapters == ()


def test_history_records_decisions_and_certificates(captured: Any) -> None:
    _, base = captured["decoder"]
    program = peftfx.run(base, "lora{where=q};bitfit;lora{name=b,where=v};fold{names=[lora, b]}")
    texts = [r.text for r in program.history]
    assert texts[0] == "lora{where=q}"
    assert program.history[0].plan.decisions == {
        "sites": ["layers.0.q_proj.weight", "layers.1.q_proj.weight"]
    }
    assert [r.certificate.kind for r in program.history] == [
        "identity", "identity", "identity", "bounded",
    ]  # fmt: skip
    assert program.history[1].skipped[0][1] == "this normalisation has no bias"
    assert program.history[0].certificate.measured["max_abs"] == 0.0


def test_wrong_arguments_are_named(captured: Any) -> None:
    with pytest.raises(PassError, match="capture the model first"):
        peftfx.run(torch.nn.Linear(2, 2), "lora")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="must be a Pass"):
        peftfx.run(captured["encoder"][1], 3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="list of passes is empty"):
        peftfx.run(captured["encoder"][1], [])


def test_threads_may_rewrite_one_base(captured: Any) -> None:
    """The programs of one capture share the symbols of their sizes; edits take turns."""
    base = peftfx.capture(captured["decoder"][0].eval().requires_grad_(False), kwargs=batch())
    texts = ["lora{rank=2}", "ia3", "prefix_tuning{length=2}", "lora{rank=2};fold"] * 3
    want = {text: peftfx.run(base, text) for text in set(texts)}
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda text: peftfx.run(base, text), texts))
    for text, program in zip(texts, made, strict=True):
        assert program.text() == want[text].text()
        assert torch.equal(first(program(**batch())), first(want[text](**batch())))


class Guardian(Delta):
    def branch(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("the guardian said no")


class Fixing(Delta):
    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 if x.shape[1] == 9 else 2)


@pytest.mark.parametrize(
    ("branch", "message"),
    [(Guardian, "fails on what it reads.*guardian"), (Fixing, "Fixing .* fixes a dynamic size")],
)
def test_a_fixed_size_is_told_from_other_failures(
    captured: Any, branch: type[Delta], message: str
) -> None:
    program = captured["decoder"][1].fork()
    site = next(s for s in program.sites if isinstance(s, LinearSite))
    edit = Editor(program, "mine")
    edit.add(site, branch())
    edit.finish()
    with pytest.raises(PassError, match=message):
        propagate(edit.program, explain=partial(failing_branch, edit.program))


def test_text_keeps_what_was_typed() -> None:
    """Also where it is the default; what the pass is does not depend on it."""
    text = "lora{rank=8,where=q|v};lora{name=b};fold{tied=refuse}"
    pipeline = parse(text)
    assert str(pipeline) == text and parse(str(pipeline)) == pipeline
    assert pipeline == parse("lora;lora{name=b};fold") != parse("lora{rank=4};lora{name=b};fold")
    assert str(parse_yaml("- lora: {where: q|v}")) == "lora{where=q|v}"


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The programs whose forwards are run to be compared."""
    seen: list[Any] = []
    original = witness.Witness.forward

    def counted(self: Any, inputs: Any) -> Any:
        seen.append(self.program)
        return original(self, inputs)

    monkeypatch.setattr(witness.Witness, "forward", counted)
    return seen


@pytest.mark.parametrize(
    ("text", "own", "most"),
    # Of a further adapter everything is compared with the base. Before a fold: that the program
    # repeats; what it does without its branches is what the base does.
    [("lora{where=q}", 0, 11), ("fold", 1, 6)],
)
def test_what_the_run_before_has_measured_is_not_measured_again(
    captured: Any, forwards: list[Any], text: str, own: int, most: int
) -> None:
    base = peftfx.run(captured["encoder"][1], "ia3")
    forwards.clear()
    made = peftfx.run(base, text)
    assert made.history[-1].certificate.holds
    assert sum(p is base for p in forwards) == own
    assert len(forwards) <= most


def test_what_has_changed_since_is_measured_again(captured: Any, forwards: list[Any]) -> None:
    program = peftfx.run(captured["encoder"][1], "ia3")
    with torch.no_grad():
        program.trainable_parameters()[0].data.mul_(1.5)  # no version counter tells
    forwards.clear()
    peftfx.run(program, "fold")
    assert (
        sum(p is program for p in forwards) == 3 + 2
    )  # at three sizes, once more, and in training
