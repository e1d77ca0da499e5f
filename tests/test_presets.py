"""Presets: methods that are several methods under one name, from the plan to the disk and back."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import peftfx
from peftfx.exporters.adapter_changes import saved_parts
from peftfx.passes.additive.prefix_tuning import PrefixTuning
from peftfx.passes.reparameterized.adalora import AdaLoRA
from peftfx.passes.reparameterized.lora import LoRA
from peftfx.rewriter.parts.parts import LowRank
from peftfx.rewriter.pipeline.passes import REGISTRY
from peftfx.rewriter.pipeline.preset import Member, Preset
from peftfx.rewriter.program.history import Contract
from peftfx.rewriter.program.state import State
from peftfx.rewriter.storage.artifact import read

from .models import batch, first, moved, randomise


@dataclass(frozen=True, kw_only=True)
class Both(Preset, abstract=True):
    """LoRA at values, AdaLoRA at queries of the last layers, and a prefix of a real prompt."""

    text: ClassVar[str] = "both"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "attention")
    contract: ClassVar[Contract] = Contract("trainable")
    where: str = "q|v|attention and self"

    def members(self, program: State) -> Mapping[str, Member]:
        rows = PrefixTuning(length=2, init="data")
        ranks = AdaLoRA(rank=2, where="q")
        return {
            "zeta": Member(rows),  # not in the order of the alphabet
            "beta": Member(ranks, lambda s: s.layer == 1),
            "alpha": Member(LoRA(rank=2, where="v")),
        }


@pytest.fixture(autouse=True)
def registered() -> Generator[None]:
    REGISTRY["both"] = Both
    yield
    REGISTRY.pop("both")


@pytest.fixture
def program(captured: Any) -> peftfx.Program:
    _, base = captured["encoder"]
    return peftfx.run(base, "both", data=[batch(1, 4)])


def test_members_are_below_their_names(program: peftfx.Program) -> None:
    paths = [a.path for a in program.attachments]
    assert [p.split(".")[2] for p in paths] == ["zeta", "zeta", "beta", "alpha", "alpha"]
    assert paths[2] == "peftfx.both.beta.layers.1.query.delta"
    assert program.adapters == ("both",)
    assert len(program.history) == 1 and len(program.history[0].edited) == 5


def test_what_members_decided_is_replayed(
    captured: Any, program: peftfx.Program, tmp_path: Path
) -> None:
    """The rows of the prompt are in the plan, so neither loading nor verifying needs it."""
    _, base = captured["encoder"]
    assert {n.partition("/")[0] for n in program.history[0].plan.tensors} == {"zeta"}
    program.verify()
    randomise(program, 0.2)
    peftfx.save(program, tmp_path / "a")
    again = peftfx.load(base, tmp_path / "a", name="mine")
    inputs = batch(3, 7)
    assert torch.equal(first(again(**inputs)), first(program(**inputs)))
    assert moved(first(base(**inputs)), first(program(**inputs))) > 0.01
    assert [a.path for a in again.attachments] == [
        a.path.replace("peftfx.both", "peftfx.mine") for a in program.attachments
    ]
    rest = peftfx.run(again, "lora{where=k}").without("mine")
    assert rest.adapters == ("lora",)


def test_each_member_is_driven_by_its_own_controller(program: peftfx.Program) -> None:
    controllers = peftfx.controllers(program)
    groups = controllers.param_groups(lr=1e-2, weight_decay=0.1)
    assert sum(len(g["params"]) for g in groups) == len(program.trainable_parameters())
    (mine,) = controllers.each.values()
    each: Any = mine.each  # pyright: ignore[reportAttributeAccessIssue]
    seen = {n: [p for p, _ in c.branches()] for n, c in each.items()}
    assert [len(seen[n]) for n in ("zeta", "beta", "alpha")] == [2, 1, 2]
    controllers.start(torch.optim.AdamW(groups), total_steps=6)
    optimizer = each["beta"].optimizer
    inputs = batch(3, 7)
    for step in range(6):
        controllers.begin_forward(inputs)
        outputs = program(**inputs)
        loss = first(outputs).square().mean() + controllers.loss(outputs, inputs, program)
        loss.backward()
        controllers.before_step(step)
        optimizer.step()
        controllers.after_step(step)
        optimizer.zero_grad()
    assert controllers.state_dict()["both"].keys() == {"zeta", "beta", "alpha"}
    controllers.load_state_dict(controllers.state_dict())
    finished = peftfx.run(program, controllers.finish())
    assert "bake" in finished.history[-1].text
    torch.testing.assert_close(
        first(finished(**inputs)), first(program(**inputs)), rtol=1e-4, atol=1e-5
    )


def test_saved_members_tell_what_they_are(program: peftfx.Program, tmp_path: Path) -> None:
    randomise(program, 0.2)
    peftfx.save(program, tmp_path / "a")
    found = {target: part for _, target, _, part in saved_parts(read(tmp_path / "a"))}
    low = [p for p in found.values() if isinstance(p, LowRank)]
    assert {p.target for p in low} >= {"layers.0.value.weight", "layers.1.value.weight"}


def test_altered_members_are_refused(
    captured: Any, program: peftfx.Program, tmp_path: Path
) -> None:
    _, base = captured["encoder"]
    for change in ("fold", "prefix_tuning{length=2};lora", "nothing"):
        peftfx.save(program, tmp_path / "a")
        path = tmp_path / "a" / "manifest.json"
        text = path.read_text()
        assert "lora{rank=2,where=v}" in text
        path.write_text(json.dumps(json.loads(text.replace("lora{rank=2,where=v}", change))))
        with pytest.raises(peftfx.RewriteError):
            peftfx.load(base, tmp_path / "a")


def test_a_model_that_has_no_place_for_any(captured: Any) -> None:
    _, base = captured["encoder"]
    with pytest.raises(peftfx.RewriteError, match=r"none of its members has a place.*Say where"):
        peftfx.run(base, "mam{where=attn and sublayer}")
