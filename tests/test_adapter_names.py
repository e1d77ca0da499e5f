"""Adapters' names and seeds: any name works everywhere, two adapters differ, artifacts rename."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import ArtifactError, CorruptFileError, OptionError
from peftfx.rewriter.files.sealed import SEAL, sealed

from .models import batch, first, randomise
from .recipes import METHODS

NAME = "my-first-try"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6))
    return model.eval().requires_grad_(False)


X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base() -> peftfx.Program:
    return peftfx.capture(net(), (X,))


@pytest.mark.parametrize("method", METHODS)
def test_a_name_with_a_dash(captured: Any, method: str, tmp_path: Path) -> None:
    _, base = captured["encoder"]
    before, text = captured.start("encoder", method)
    (item,) = peftfx.parse(text)
    program = randomise(peftfx.run(before, replace(item, name=NAME)))  # pyright: ignore
    want = first(program(**batch()))
    assert program.adapters[-1] == NAME
    peftfx.save(program, tmp_path / "a")
    assert torch.equal(first(peftfx.load(base, tmp_path / "a")(**batch())), want)


def test_gates_of_a_named_adapter_settle(captured: Any) -> None:
    _, base = captured["encoder"]
    text = f"unipelt{{name={NAME},rank=2,length=2,bottleneck=4}};bake{{names=[{NAME}]}}"
    baked = peftfx.run(base, text, data=[batch()])
    assert not baked.shared and baked.history[-1].edited


def test_names_that_become_one_node_name(captured: Any) -> None:
    """`a.b` and `a_b`, `a-b` and `a_b` are one name to the graph, but two branches."""
    _, base = captured["encoder"]
    both = "prefix_tuning{name=a-b,seed=1,length=2};prefix_tuning{name=a_b,seed=2,length=3}"
    program = randomise(peftfx.run(base, both), 1.0)
    reference = randomise(peftfx.run(base, both.replace("a-b", "c").replace("a_b", "d")), 1.0)
    torch.testing.assert_close(first(program(**batch())), first(reference(**batch())))
    gated = "unipelt{name=a-b,rank=2,bottleneck=4};unipelt{name=a_b,rank=2,bottleneck=4}"
    program = peftfx.run(base, gated)
    assert {a.adapter for a in program.attachments} == {"a-b", "a_b"}
    for attachment in program.attachments:
        assert program.shared_path(attachment, "gate").split(".")[1] == attachment.adapter


def tensors(program: peftfx.Program, name: str) -> dict[str, Tensor]:
    own = program.adapter_tensors(name)
    return {n.replace(f".{name}.", ".", 1): t for n, t in own.items()}


def test_two_adapters_of_a_method_differ(base: peftfx.Program) -> None:
    text = "lora{name=a,rank=2,where=linear};lora{name=b,rank=2,where=linear}"
    program = peftfx.run(base, text)
    a, b = (tensors(program, n) for n in "ab")
    assert a.keys() == b.keys()
    assert all(not torch.equal(a[n], b[n]) for n in a if n.endswith(".a"))
    optimizer = torch.optim.AdamW(program.trainable_parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        (program(X) - 1).square().mean().backward()
        optimizer.step()
    a, b = (tensors(program, n) for n in "ab")
    assert all(not torch.equal(a[n], b[n]) for n in a)


def test_seeds(base: peftfx.Program) -> None:
    def drawn(text: str) -> Tensor:
        program = peftfx.run(base, text)
        return program.module.get_parameter(f"peftfx.{program.adapters[0]}.0.delta.a").detach()

    same = [drawn(f"lora{{rank=2,where=linear{rest}}}") for rest in ("", ",seed=0", ",name=lora")]
    same.append(drawn("lora{rank=2,where=linear,name=other,seed=0}"))
    assert all(torch.equal(same[0], t) for t in same)
    named = [drawn("lora{rank=2,where=linear,name=other}") for _ in range(2)]
    assert torch.equal(*named) and not torch.equal(named[0], same[0])
    assert not torch.equal(drawn("lora{rank=2,where=linear,seed=1}"), same[0])
    generator = torch.Generator().manual_seed(7)
    want = torch.empty(2, 8)
    nn.init.kaiming_uniform_(want, a=5**0.5, generator=generator)
    assert torch.equal(drawn("lora{rank=2,where=linear,seed=7}"), want)
    assert str(peftfx.LoRA(seed=0)) == "lora{seed=0}"


RECIPES = {
    "lora": "lora{rank=2,where=linear}",
    "folded": "lora{rank=2,where=linear};fold{names=[lora]}",
    "all folded": "lora{rank=2,where=linear};fold",
    "baked": "diff_pruning{where=linear};bake{names=[diff_pruning]}",
    "bitfit": "bitfit{where=linear}",
    "peqa": "peqa{where=linear,group=4}",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_artifact_under_another_name(base: peftfx.Program, recipe: str, tmp_path: Path) -> None:
    insert, _, then = RECIPES[recipe].partition(";")
    program = randomise(peftfx.run(base, insert), 0.3)
    program = peftfx.run(program, then) if then else program
    (old,) = program.adapters
    peftfx.save(program, tmp_path / "a")
    loaded = peftfx.load(net(), tmp_path / "a", name="the-other")
    assert loaded.adapters == ("the-other",)
    assert torch.equal(loaded(X), program(X))
    assert all(c.holds for c in loaded.verify())
    assert torch.equal(loaded.without("the-other")(X), base(X))
    peftfx.save(loaded, tmp_path / "b")
    assert torch.equal(peftfx.load(base, tmp_path / "b", name=old)(X), program(X))


def test_two_artifacts_of_one_name(base: peftfx.Program, tmp_path: Path) -> None:
    alone: list[Tensor] = []
    for seed in (1, 2):
        program = randomise(peftfx.run(base, "lora{rank=2,where=linear}"), 0.3, seed)
        peftfx.save(program, tmp_path / str(seed))
        alone.append(program(X))
    once = peftfx.load(base, tmp_path / "1")
    with pytest.raises(ArtifactError, match=r"'lora' already.*load\(\.\.\., name='lora_2'\)"):
        peftfx.load(once, tmp_path / "2")
    both = peftfx.load(once, tmp_path / "2", name="lora_2")
    assert both.adapters == ("lora", "lora_2")
    assert torch.equal(both.without("lora_2")(X), alone[0])
    torch.testing.assert_close(both.without("lora")(X), alone[1])
    with pytest.raises(OptionError, match=r"'a\.b' is not a name"):
        peftfx.load(base, tmp_path / "1", name="a.b")
    peftfx.save(both, tmp_path / "both")
    with pytest.raises(OptionError, match=r"2 adapters \(lora, lora_2\).*one by one"):
        peftfx.load(base, tmp_path / "both", name="c")


@pytest.mark.parametrize(
    ("decisions", "said"),
    [
        ({"sites": ["0.wieght"]}, r"no site '0.wieght'. Nearest: 0.weight.*Load it onto"),
        ({"sites": "0.weight"}, "'sites' is no list"),
        ({}, r"recipe\[0\] \(lora.*cannot be replayed \(KeyError: 'sites'\)"),
        ({"sites": ["0.weight"], "skipped": 3}, r"cannot be replayed \(AttributeError"),
    ],
)
def test_only_a_missing_site_is_called_one(
    base: peftfx.Program, decisions: Any, said: str, tmp_path: Path
) -> None:
    peftfx.save(peftfx.run(base, "lora{rank=2,where=linear}"), tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["recipe"][0]["decisions"] = decisions
    path.write_bytes(sealed({k: v for k, v in manifest.items() if k != SEAL}))
    with pytest.raises(CorruptFileError, match=said) as caught:
        peftfx.load(base, tmp_path / "a")
    assert ("no site" in str(caught.value)) == ("no site" in said)
