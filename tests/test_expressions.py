"""Expressions of several stored tensors at once, as an author would write one; and branches that
would take the place of others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.branches.branch import Delta
from peftfx.rewriter.errors import FoldError, PassError
from peftfx.rewriter.pipeline.method import Method
from peftfx.rewriter.pipeline.passes import REGISTRY

from . import test_reads
from .authored.shared_down import SharedDown, SharedDownBranch
from .methods.common import hooked
from .models import batch, first, moved, randomise

toy = test_reads.toy
REGISTRY.pop("shared_down", None)


@pytest.fixture(scope="module")
def placed(captured: Any) -> peftfx.Program:
    return randomise(peftfx.run(captured["encoder"][1], [SharedDown()]), 0.3)


def eager(model: Any, program: peftfx.Program, inputs: dict[str, Tensor]) -> Tensor:
    """What the model gives with `W + b a` in its queries and keys."""
    tensors = program.named_trainable_parameters()

    def changed(name: str, layer: int, place: int) -> Callable[..., Tensor]:
        (a,) = (t for n, t in tensors.items() if f".{layer}." in n and n.endswith(".a"))
        (b,) = (t for n, t in tensors.items() if f".{layer}." in n and n.endswith(".b"))
        linear = model.get_submodule(name)
        return lambda i, o: nn.functional.linear(i[0], linear.weight + b[place] @ a, linear.bias)

    hooks = {
        f"layers.{layer}.{name}": changed(f"layers.{layer}.{name}", layer, place)
        for layer in range(len(model.layers)) for place, name in enumerate(("query", "key"))
    }  # fmt: skip
    with torch.no_grad(), hooked(model, hooks):
        return first(model(**inputs))


def test_several_tensors_at_once(captured: Any, placed: peftfx.Program) -> None:
    model, base = captured["encoder"]
    inputs = batch(4, 11, pad=3)
    got = first(placed(**inputs))
    torch.testing.assert_close(got, eager(model, placed, inputs), rtol=1e-5, atol=1e-5)
    assert moved(first(base(**inputs)), got) > 0.05
    assert all(c.holds for c in placed.verify())
    folded = peftfx.run(placed, "fold")
    assert not folded.attachments
    torch.testing.assert_close(first(folded(**inputs)), got, rtol=1e-5, atol=1e-5)
    before, after = model.state_dict(), folded.export_state_dict()
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert {n.split(".", 2)[2] for n in changed} == {"query.weight", "key.weight"}


def test_what_stands_beside_folds_behind(captured: Any, placed: peftfx.Program) -> None:
    """A low-rank branch at the second weight folds once the first has made way."""
    program = randomise(peftfx.run(placed, "lora{rank=2,where=k,name=beside}"), 0.3)
    inputs = batch(4, 11)
    want = first(program(**inputs))
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    torch.testing.assert_close(first(folded(**inputs)), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(FoldError, match="its weight or bias is computed by an expression"):
        peftfx.run(program, "fold{names=[beside]}")


def test_saved_rebuilt_and_taken_out(
    captured: Any, placed: peftfx.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REGISTRY, "shared_down", SharedDown)
    model, base = captured["encoder"]
    inputs = batch(3, 9)
    peftfx.save(placed, tmp_path / "adapter")
    loaded = peftfx.load(model, tmp_path / "adapter")
    assert torch.equal(first(loaded(**inputs)), first(placed(**inputs)))
    peftfx.save_program(placed, tmp_path / "program")
    whole = peftfx.load_program(tmp_path / "program")
    torch.testing.assert_close(first(whole(**inputs)), first(placed(**inputs)))
    again = placed.without("shared_down")
    assert torch.equal(first(again(**inputs)), first(base(**inputs)))


class Constant(Delta):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.full((32,), size))

    def branch(self, x: Tensor) -> Tensor:
        return x * self.size

    def delta(self) -> Tensor:
        return torch.diag(self.size)


def twice(self: Method, edit: Any, site: Any) -> None:
    edit.add(site, Constant(0.0))
    edit.add(site, Constant(1.0))


def apart(self: Method, edit: Any, site: Any) -> None:
    edit.add(site, Constant(0.0))
    with edit.below("second"):
        edit.add(site, Constant(0.0))


def shared_twice(self: Method, edit: Any, site: Any) -> None:
    for _ in range(2):
        edit.share("one", nn.Identity())


def test_no_branch_takes_the_place_of_another(captured: Any, toy: Any) -> None:
    base = captured["encoder"][1]
    message = "toy: .*query.weight has a delta branch of this adapter already .*edit.below"
    with pytest.raises(PassError, match=message):
        peftfx.run(base, [toy("q and layer==0", insert=twice)])
    with pytest.raises(PassError, match="there is a shared module 'one' of this adapter already"):
        peftfx.run(base, [toy("q and layer==0", insert=shared_twice)])
    program = peftfx.run(base, [toy("q and layer==0", insert=apart)])
    assert len({a.path for a in program.attachments}) == 2


@pytest.mark.parametrize("names", [(), ("layers.0.query.weight",) * 2])
def test_each_tensor_once(captured: Any, toy: Any, names: tuple[str, ...]) -> None:
    def insert(self: Method, edit: Any, site: Any) -> None:
        edit.express(site, names, SharedDownBranch([site, site], 2, edit))

    with pytest.raises(PassError, match="Name one stored tensor, or several different ones"):
        peftfx.run(captured["encoder"][1], [toy("q and layer==0", insert=insert)])


def test_shards_have_one_weight_at_a_time(placed: peftfx.Program, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(placed.base.export_state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(FoldError, match="computes 2 weights together"):
        peftfx.fold_checkpoint(placed, tmp_path, tmp_path / "out")
