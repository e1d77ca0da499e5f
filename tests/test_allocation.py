"""Sizes that nobody can have meant are refused before anything of that size is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import peftfx
from peftfx.rewriter.errors import ArtifactError, OptionError, PassError, RewriteError
from peftfx.rewriter.run import allocation
from peftfx.rewriter.run.allocation import Allocation, UnexplainedError, available

from .damage import change
from .recipes import METHODS

GIVEN = 10**7


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor that was made has."""

    elements = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        real = [t for t in pytree.tree_leaves(made) if isinstance(t, Tensor) and not t.is_meta]
        sizes = [t.numel() for t in real if all(type(n) is int for n in t.shape)]
        self.elements = max(self.elements, *sizes, 0)
        return made


@pytest.mark.parametrize("method", METHODS)
def test_a_manifest_cannot_ask_for_much(captured: Any, method: str, tmp_path: Path) -> None:
    """Every option of a method that is a number, as somebody would write it who means harm."""
    _, base = captured["encoder"]
    program = captured.placed("encoder", method)
    peftfx.save(program, tmp_path / "a")
    manifest = tmp_path / "a" / "manifest.json"
    good, item = manifest.read_bytes(), program.history[-1].applied
    numbers = [f.name for f in fields(item) if str(f.type).startswith("int")]
    for option in set(numbers) - {"seed"}:
        try:
            text = str(replace(item, **{option: GIVEN}))
        except OptionError:
            continue
        change(manifest, lambda d, text=text: d["recipe"][-1].update({"pass": text}))
        with Largest() as largest:
            try:
                peftfx.load(base, tmp_path / "a")
            except ArtifactError as error:
                assert largest.elements < 10**6, (option, error)
        assert largest.elements < 10**6, option
        manifest.write_bytes(good)
    peftfx.load(base, tmp_path / "a")


@pytest.mark.parametrize("text", ["lora{rank=10000000}", "lora{rank=1000000000}"])
def test_what_a_manifest_asks_for_is_said(captured: Any, text: str, tmp_path: Path) -> None:
    _, base = captured["encoder"]
    peftfx.save(peftfx.run(base, "lora{rank=2}"), tmp_path / "a")
    change(tmp_path / "a" / "manifest.json", lambda d: d["recipe"][0].update({"pass": text}))
    with pytest.raises(ArtifactError, match=r"lora\{rank=.*explain .*elements.*save the adapter"):
        peftfx.load(base, tmp_path / "a")


def test_ranks_that_training_pruned_load(captured: Any, tmp_path: Path) -> None:
    """The file holds fewer values than the first step makes."""
    _, base = captured["encoder"]
    program = peftfx.run(base, "adalora{rank=30,target=1,where=linear}")
    controllers = peftfx.controllers(program)
    optimizer = torch.optim.AdamW(controllers.param_groups(lr=1e-2))
    controllers.start(optimizer, total_steps=1)
    program = peftfx.run(program, controllers.finish())
    peftfx.save(program, tmp_path / "a")
    loaded = peftfx.load(base, tmp_path / "a")
    assert {n: t.shape for n, t in loaded.adapter_tensors("adalora").items()} == {
        n: t.shape for n, t in program.adapter_tensors("adalora").items()
    }


def test_run_asks_what_memory_is_left(captured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, base = captured["encoder"]
    monkeypatch.setattr(allocation, "available", lambda: 2**25)
    for text in (
        "serial_adapter{bottleneck=1000000,norms=false}", "prefix_tuning{length=1000000}",
        "hyperformer{tasks=1000000}", "prompt_tuning{length=1000000,init=uniform}",
    ):  # fmt: skip
        with Largest() as largest, pytest.raises(PassError, match=r"memory .*GiB.*smaller sizes"):
            peftfx.run(base, text)
        assert largest.elements * 4 <= 2**25, text


def test_what_is_measured_has_to_fit_twice(captured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor fits, and all of them, but not a second time."""
    _, base = captured["encoder"]
    text = "serial_adapter{bottleneck=32768,norms=false}"  # 2 x 4 MiB a site, 4 sites
    monkeypatch.setattr(allocation, "available", lambda: 2**25)
    with pytest.raises(PassError, match=r"0.031\d* GiB are needed, 0.0312 GiB left"):
        peftfx.run(base, text)


def test_causal_masks_that_fit_no_memory(captured: Any) -> None:
    with pytest.raises(RewriteError, match="memory"):
        peftfx.run(captured["decoder"][1], "causal{length=1000000}")


def test_what_is_counted() -> None:
    """Tensors made of numbers, by any operator; neither views nor the meta device."""
    row = torch.zeros(1, 64)
    made = (
        (lambda: torch.zeros(3, 50), 150), (lambda: torch.randn(7), 7),
        (lambda: row.new_full((5, 2), 1.0), 10), (lambda: torch.arange(2, 20, 3), 6),
        (lambda: row.repeat(4, 1), 256), (lambda: row.expand(100, 64), 0),
        (lambda: torch.empty(10**9, device="meta"), 0), (lambda: row + 1, 0),
    )  # fmt: skip
    for make, count in made:
        with Allocation() as allocated:
            make()
        assert allocated.made == count
    with Allocation(100), pytest.raises(UnexplainedError, match="120 elements, at most 100"):
        [torch.zeros(40) for _ in range(3)]


def test_pointwise_products_are_measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "available", lambda: 2**20)
    column = torch.zeros(10**5, 1)
    with Allocation(), pytest.raises(MemoryError, match=r"37\.3 GiB are needed"):
        _ = column < column.T


def test_control_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The least of what the system and all groups around the process leave."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    files = {
        proc / "meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
        proc / "self" / "cgroup": "5:cpu:/else\n4:memory:/a/b\n0::/c\n",
        groups / "memory.max": "max\n", groups / "memory.current": "5\n",
        groups / "c" / "memory.max": "7000000\n", groups / "c" / "memory.current": "3000000\n",
        groups / "c" / "memory.stat": "anon 1\ninactive_file 400000\nactive_file 100000\n",
    }  # fmt: skip
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(allocation, "_PROC", proc)
    monkeypatch.setattr(
        allocation, "_GROUPS",
        tuple((groups / m.relative_to(allocation._CGROUP), *rest)
              for m, *rest in allocation._GROUPS),
    )  # fmt: skip
    assert available() == 7000000 - 3000000 + 500000
    older = groups / "memory" / "a" / "b"
    older.mkdir(parents=True)
    (older / "memory.limit_in_bytes").write_text("2000000")
    (older / "memory.usage_in_bytes").write_text("1500000")
    assert available() == 500000
    monkeypatch.setattr(allocation, "_PROC", tmp_path / "none")
    monkeypatch.setattr(allocation, "_GROUPS", ())
    assert available() is None
