"""Where prompts start, and in which half of an encoder-decoder they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import ArtifactError, OptionError, PassError

from ..models import batch, first, randomise
from .common import attention_with_rows, hooked


def prompt(base: peftfx.Program, options: str) -> Tensor:
    program = peftfx.run(base, f"prompt_tuning{{{options}}}")
    (branch,) = (program.branch(a) for a in program.attachments)
    return branch.get_parameter("prompt").detach()


def test_of_a_text_and_of_class_labels(captured: Any) -> None:
    base = captured["encoder"][1]
    table = base.module.get_parameter("words.weight").detach()
    got = prompt(base, "length=5,init=text,ids=[7,9]")
    assert torch.equal(got, table[[7, 9, 7, 9, 7]])
    assert torch.equal(prompt(base, "length=1,init=text,ids=[7,9]"), table[[7]])
    got = prompt(base, "length=4,init=classes,classes=[[3,4,5],[6]],common=10")
    torch.testing.assert_close(got[:2], torch.stack([table[3:6].mean(0), table[6]]))
    rest = (got[2:, None] - table[None]).abs().amax(-1)
    assert rest.min(1).values.eq(0).all() and rest.argmin(1).max() < 10  # of the first 10 rows
    text = str(peftfx.parse("prompt_tuning{length=4,init=classes,classes=[[3,4,5],[6]]}"))
    assert "classes=[[3,4,5],[6]]" in text and str(peftfx.parse(text)) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("init=text", "ids"),
        ("init=text,ids=[]", "ids of the table"),
        ("ids=[1]", "given with init=text"),
        ("init=classes", "classes"),
        ("init=classes,classes=[[1],[]]", "ids of the table"),
        ("init=classes,classes=[[-1]]", "ids of the table"),
        ("length=1,init=classes,classes=[[1],[2]]", "at most length=1"),
        ("init=text,ids=[64]", "the id 64 is beyond its 64 rows"),
        ("halves=all", "halves"),
    ],
)
def test_bad_options(captured: Any, options: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        peftfx.run(captured["encoder"][1], f"prompt_tuning{{{options}}}")


@pytest.mark.parametrize("method", ["prefix_tuning", "p_tuning_v2"])
def test_of_the_keys_and_values_of_a_prompt(hand: Any, method: str, tmp_path: Path) -> None:
    """A causal model behind that prefix, at its positions, is the model behind that prompt."""
    name, model, base = hand
    real, given = batch(1, 4, seed=3), batch(2, 6)
    text = f"{method}{{length=4,init=data"
    moved = f"{text},shift_positions=true}}" if name == "decoder" else f"{text}}}"
    program = peftfx.run(base, moved, data=[real])
    got = first(program(**given))
    if name == "decoder":
        both = {n: torch.cat([real[n].expand(2, -1), t], 1) for n, t in given.items()}
        torch.testing.assert_close(got, model(**both)[:, 4:], rtol=1e-5, atol=1e-5)
    else:  # the rows are those that its layers compute
        seen = list[Tensor]()
        keep = {f"layers.{i}.{m}": lambda _, y: seen.append(y) for i in range(2)
                for m in ("key", "value")}  # fmt: skip
        with hooked(model, keep):
            model(**real)
        rows = [(seen[i][0].unflatten(-1, (4, -1)), seen[i + 1][0].unflatten(-1, (4, -1)))
                for i in (0, 2)]  # fmt: skip
        with attention_with_rows(rows):
            want = first(model(**given))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    peftfx.save(program, tmp_path / "a")
    loaded = peftfx.load(base, tmp_path / "a")  # without the data
    assert torch.equal(first(loaded(**given)), got)
    with pytest.raises(PassError, match=r"none is given\. Give it as a batch"):
        peftfx.run(base, moved)
    with pytest.raises(PassError, match=r"has 4 keys .* length=5"):
        peftfx.run(base, moved.replace("length=4", "length=5"), data=[real])
    with pytest.raises(OptionError, match="normal with projection"):
        peftfx.parse(f"{text},projection=8}}")


@pytest.mark.parametrize("method", ["prompt_tuning{length=3", "p_tuning{length=3"])
def test_in_both_halves_of_an_encoder_decoder(zoo: Any, method: str) -> None:
    model, base = zoo.model("t5"), zoo["t5"]
    inputs = {**batch(3, 7, pad=2), "decoder_input_ids": batch(3, 9)["input_ids"] % 60}

    def longer(name: str) -> Tensor:
        return torch.cat([torch.ones(3, 3, dtype=torch.long), inputs[name]], 1)

    for halves in ("encoder", "decoder", "both"):
        program = randomise(peftfx.run(base, f"{method},halves={halves}}}"), 0.5)
        rows = [program.branch(a).rows().detach() for a in program.attachments]
        assert len(rows) == (2 if halves == "both" else 1)
        given, calls = dict(inputs), list[Tensor | None]()
        calls = [rows[0], rows[-1]] if halves == "both" else \
            [rows[0], None] if halves == "encoder" else [None, rows[0]]  # fmt: skip
        if calls[0] is not None:
            given |= {n: longer(n) for n in ("input_ids", "attention_mask")}
        if calls[1] is not None:
            given["decoder_input_ids"] = longer("decoder_input_ids")
        hooks = {
            f"{half}.embed_tokens": lambda _, e, own=own: torch.cat(
                [own.expand(3, -1, -1), e[:, 3:]], 1
            )
            for half, own in zip(("encoder", "decoder"), calls, strict=True)
            if own is not None
        }
        with hooked(model, hooks):
            want = first(model(**given))
        want = want if calls[1] is None else want[:, 3:]
        torch.testing.assert_close(first(program(**inputs)), want, rtol=1e-5, atol=1e-5)
    two = peftfx.run(base, "smop{prompts=2,halves=both}")
    assert len(two.attachments) == 2


def test_peft_has_no_two_prompts(zoo: Any, tmp_path: Path) -> None:
    both = peftfx.run(zoo["t5"], "prompt_tuning{length=3,halves=both}")
    with pytest.raises(ArtifactError, match="no type of PEFT holds prompt in one adapter"):
        peftfx.save_peft(both, tmp_path / "peft")


def test_a_model_of_one_half(captured: Any) -> None:
    with pytest.raises(PassError, match=r"halves=both: the model has no .* Leave halves out"):
        peftfx.run(captured["decoder"][1], "prompt_tuning{halves=both}")
