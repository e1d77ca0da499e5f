"""Everything that writes files, in one form: write number n, read which number is there.

Used by the tests of damage and by `benchmarks/faults.py`, which kills, fills disks and flips bits.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import peftfx
from peftfx.exporters.formats import convert
from peftfx.exporters.hf_peft.adapter import read_peft
from peftfx.exporters.merge import merge
from peftfx.many import fold_all
from peftfx.rewriter.capture import cache
from peftfx.rewriter.distributed.checkpoint import load_checkpoint, save_checkpoint
from peftfx.rewriter.parts.parts import LowRank
from peftfx.rewriter.storage.artifact import read as read_artifact
from peftfx.rewriter.storage.safetensors_checkpoint import Checkpoint
from peftfx.training.state import read_state, state_bytes

from .temporary import lasting


class Net(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


@functools.cache
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@functools.cache
def base() -> peftfx.Program:
    return peftfx.capture(model(), (torch.randn(2, 3, 16),))


@functools.cache
def program() -> peftfx.Program:
    return peftfx.run(base(), "lora{rank=2,where=ffn}")


def _filled(number: int) -> peftfx.Program:
    with torch.no_grad():
        for parameter in program().trainable_parameters():
            parameter.fill_(number)
    return program()


def _number(tensors: Any) -> int:
    """The one number that all of some tensors are filled with."""
    found = {float(t) for tensor in tensors for t in tensor.detach().flatten()}
    if len(found) != 1:
        raise AssertionError(f"mixed: {sorted(found)[:4]}")
    return int(found.pop())


@dataclass(frozen=True)
class Writer:
    """One way of writing files below a folder.

    Attributes:
        write: writes number n. It replaces what is there, if `replaces`.
        read: which number is there; an error of ours if none or damaged.
        state: everything that reading finds, as text, to tell whether a flip changed something.
        files: what it writes, relative to the folder.
        resumes: where it was killed, the same call goes on; what it writes then is in `made`.
        several: that is several folders, each of which appears whole or not at all.
    """

    write: Callable[[Path, int], Any]
    read: Callable[[Path], int]
    state: Callable[[Path], str]
    files: tuple[str, ...]
    replaces: bool = True
    numbered: bool = True
    resumes: bool = False
    made: str = ""
    several: bool = False


def _save(folder: Path, number: int) -> None:
    peftfx.save(_filled(number), folder / "a")


def _read_save(folder: Path) -> int:
    return _number(read_artifact(folder / "a").tensors.values())


def _state_save(folder: Path) -> str:
    artifact = read_artifact(folder / "a")
    tensors = {n: t.tolist() for n, t in artifact.tensors.items()}
    steps = [(str(item), plan.decisions, said) for item, plan, said in artifact.steps]
    return repr([artifact.adapters, steps, tensors, artifact.base, artifact.spec])


def _save_program(folder: Path, number: int) -> None:
    peftfx.save_program(_filled(number), folder / "p")


def _state_program(folder: Path) -> str:
    loaded = peftfx.load_program(folder / "p")
    tensors = {n: (t.tolist(), t.requires_grad) for n, t in loaded.module.named_parameters()}
    return repr([tensors, loaded.text(), loaded.spec, list(loaded.sites), loaded.state_names])


def _read_program(folder: Path) -> int:
    return _number(peftfx.load_program(folder / "p").trainable_parameters())


def _base(folder: Path) -> Path:
    """The model's checkpoint, a shard for each tensor."""
    source = folder / "base"
    if not source.exists():
        source.mkdir()
        state = {n: t.detach().clone() for n, t in model().state_dict().items()}
        listed: dict[str, str] = {}
        for name, tensor in state.items():  # a shard each
            safetensors.torch.save_file({name: tensor}, source / f"{name}.safetensors")
            listed[name] = f"{name}.safetensors"
        index = json.dumps({"metadata": {}, "weight_map": listed})
        (source / "model.safetensors.index.json").write_text(index)
    return source


def _fold(folder: Path, number: int) -> None:
    peftfx.fold_checkpoint(_filled(number), _base(folder), folder / "folded")


def _folded(folder: Path, under: str = "folded") -> dict[str, Tensor]:
    checkpoint = Checkpoint.read(folder / under)
    return {n: checkpoint.tensor(n) for n in checkpoint.entries}


def _read_fold(folder: Path, under: str = "folded") -> int:
    change = _folded(folder, under)["up.weight"] - model().up.weight.detach()
    return _number([(change / 16).sqrt().round()])  # alpha * number ** 2 everywhere


MANY = 3
"""Adapters of one base: of number n, n + 2, n + 4."""


def hollow() -> tuple[Net, dict[str, Tensor]]:
    """The model without values, as a command line names it."""
    with torch.device("meta"):
        return Net().eval(), {"x": torch.randn(2, 3, 16)}


@functools.cache
def _adapters(number: int) -> list[Path]:
    place = lasting("peftfx-adapters")
    found = [place / f"a{index}" for index in range(MANY)]
    for index, adapter in enumerate(found):
        peftfx.save(_filled(number + 2 * index), adapter)
    return found


def _fold_all(folder: Path, number: int, jobs: int = 1) -> None:
    done = fold_all(
        f"{__name__}:hollow", _adapters(number), folder / "folded", weights=_base(folder), jobs=jobs
    )
    if failed := [o for o in done if o.status == "failed"]:
        if {o.kind for o in failed} != {"system"}:
            raise AssertionError(failed[0].error)
        raise peftfx.RewriteError(failed[0].error)


def _read_fold_all(folder: Path) -> int:
    """Those that are there are whole; all must be."""
    names = [f"folded/a{index}" for index in range(MANY)]
    there = [(i, n) for i, n in enumerate(names) if (folder / n).exists()]
    numbers = {_read_fold(folder, name) - 2 * index for index, name in there}
    if len(there) < MANY:
        raise peftfx.RewriteError(f"{len(there)} of {MANY}")
    return _number([torch.tensor(sorted(numbers))])


def _merge(folder: Path, number: int) -> None:
    source = folder / "base"
    if not source.exists():
        source.mkdir()
        files = {f"m-{i}.safetensors": {f"w{i}": torch.ones(16, 64)} for i in range(2)}
        for name, state in files.items():
            safetensors.torch.save_file(state, source / name)
        listed = {n: file for file, state in files.items() for n in state}
        (source / "m.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    text = (
        f"merge_method: linear\nparameters: {{normalize: false}}\nmodels:\n- model: base\n"
        f"  parameters: {{weight: {number}}}\n"
    )
    config = folder / "merge.yml"
    if not config.exists() or config.read_text() != text:
        config.write_text(text)
    merge(config, folder / "folded")


def _read_merge(folder: Path) -> int:
    return _number(_folded(folder).values())


def _export(folder: Path, number: int) -> None:
    peftfx.export_onnx(_filled(number), folder / "m.onnx")


def _read_export(folder: Path) -> int:
    import onnx
    from onnx import numpy_helper

    held = onnx.load(folder / "m.onnx")
    values = [numpy_helper.to_array(i) for i in held.graph.initializer if "lora" in i.name]
    return _number([torch.from_numpy(v.copy()) for v in values])


@functools.cache
def _optimizer() -> torch.optim.Optimizer:
    parameters = program().trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def _checkpoint(folder: Path, number: int) -> None:
    optimizer = _optimizer()
    save_checkpoint(folder, _filled(number), optimizer, step=1, extra={"number": number})


def _resume(folder: Path) -> Any:
    program().train()
    try:
        return load_checkpoint(folder / "step-00000001", program(), _optimizer())
    finally:
        program().eval()


def _read_checkpoint(folder: Path) -> int:
    _filled(-1)
    resumed = _resume(folder)
    number = _number(program().trainable_parameters())
    if resumed.extra["number"] != number:
        raise AssertionError("mixed: the manifest is of another step")
    return number


def _state_checkpoint(folder: Path) -> str:
    _filled(-1)
    resumed = _resume(folder)
    values = [p.tolist() for p in program().trainable_parameters()]
    return repr([resumed, values, _optimizer().state_dict(), torch.get_rng_state().tolist()])


@functools.cache
def _traced() -> tuple[cache.Entry, cache.Traced]:
    """What `capture` hands to the cache."""
    taken: list[Any] = []
    real = cache.Entry.store
    cache.Entry.store = lambda entry, traced: taken.append((entry, traced))  # pyright: ignore[reportAttributeAccessIssue]
    try:
        peftfx.capture(model(), (torch.randn(2, 3, 16),), cache="nowhere")
    finally:
        cache.Entry.store = real
    return taken[0]


def _store(folder: Path, number: int) -> None:
    del number
    entry, traced = _traced()
    entry.path, entry.note = folder / "entry.json", ""
    entry.store(traced)
    if entry.note:
        raise peftfx.RewriteError(entry.note)


def _recall(folder: Path) -> Any:
    entry, _ = _traced()
    entry.path = folder / "entry.json"
    recalled = entry.recall()
    if recalled is None:
        raise peftfx.RewriteError(entry.note)
    entry.note = ""
    return recalled


def _read_cache(folder: Path) -> int:
    _recall(folder)
    return 1


def _state_cache(folder: Path) -> str:
    recalled = _recall(folder)
    return repr([str(recalled.module.graph), recalled.spec, list(recalled.sites)])


def _controllers(folder: Path, number: int) -> None:
    state = {"lora": {"scale": torch.full((4,), number), "step": number, "deep": {"names": ["a"]}}}
    from peftfx.rewriter.files.files import write_file

    write_file(folder / "state.safetensors", state_bytes(state))


def _state_controllers(folder: Path) -> str:
    return repr(read_state(folder / "state.safetensors"))


def _read_controllers(folder: Path) -> int:
    state = read_state(folder / "state.safetensors")["lora"]
    return _number([state["scale"], torch.tensor([state["step"]])])


@functools.cache
def _adapter(number: int) -> Path:
    """An adapter in PEFT's form, which says the number in both of its files."""
    place = lasting("peftfx-adapter")
    peftfx.save_peft(_filled(number), place / "a", base=str(number))
    return place / "a"


def _convert(folder: Path, number: int) -> None:
    convert(_adapter(number), folder / "c", "peft")


def _read_converted(folder: Path) -> int:
    read = read_peft(base(), folder / "c")
    number = _number(t for p in read.parts if isinstance(p, LowRank) for t in (p.a, p.b))
    if read.config["base_model_name_or_path"] != str(number):
        raise AssertionError("mixed: the config is of another adapter")
    return number


WRITERS = {
    "save": Writer(_save, _read_save, _state_save, ("a/manifest.json", "a/tensors.safetensors")),
    "save_program": Writer(
        _save_program, _read_program, _state_program,
        ("p/program.json", "p/graph.json", "p/tensors.safetensors"),
    ),
    "fold_checkpoint": Writer(
        _fold, _read_fold, lambda f: repr({n: t.tolist() for n, t in _folded(f).items()}), (),
        replaces=False, resumes=True, made="folded",
    ),
    "merge": Writer(
        _merge, _read_merge, lambda f: repr({n: t.tolist() for n, t in _folded(f).items()}), (),
        replaces=False, resumes=True, made="folded",
    ),
    "fold_all": Writer(
        _fold_all, _read_fold_all, lambda f: str(_read_fold_all(f)), (),
        replaces=False, resumes=True, made="folded", several=True,
    ),
    "fold_all, 2 jobs": Writer(
        functools.partial(_fold_all, jobs=2), _read_fold_all, lambda f: str(_read_fold_all(f)), (),
        replaces=False, resumes=True, made="folded", several=True,
    ),
    "export_onnx": Writer(_export, _read_export, lambda f: str(_read_export(f)), ()),
    "save_checkpoint": Writer(
        _checkpoint, _read_checkpoint, _state_checkpoint,
        ("step-00000001/manifest.json", "step-00000001/shard-00001-model-00001-of-00001.safetensors"),
    ),
    "cache": Writer(_store, _read_cache, _state_cache, ("entry.json",), numbered=False),
    "convert": Writer(_convert, _read_converted, lambda f: str(_read_converted(f)), ()),
    "controllers": Writer(
        _controllers, _read_controllers, _state_controllers, ("state.safetensors",)
    ),
}  # fmt: skip


@contextmanager
def prepared() -> Iterator[None]:
    """Writers work out once what they write: how it is written is what counts here."""
    import onnx_ir as ir

    from peftfx.exporters.onnx import export as onnx_export
    from peftfx.rewriter.storage import program_file

    translate, flatten = onnx_export.translate, program_file.flattened
    export = onnx_export.reexport
    flat = functools.cache(flatten)

    def filled(given: peftfx.Program) -> peftfx.Program:
        held = given.named_trainable_parameters()
        with torch.no_grad():
            for name, parameter in flat(given).named_trainable_parameters().items():
                parameter.copy_(held[name])
        return flat(given)

    models: dict[Any, Any] = {}
    graphs: dict[float, Any] = {}

    def number() -> float:
        return float(program().trainable_parameters()[0].detach()[0, 0])

    def reexported(_: peftfx.Program, example: Any) -> Any:
        if number() not in graphs:
            graphs[number()] = export(program(), example)
        return graphs[number()]

    def translated(*args: Any) -> Any:
        key = number(), args[1]
        if key not in models:
            models[key] = ir.to_proto(translate(*args))
        return ir.from_proto(models[key])

    onnx_export.translate, program_file.flattened = translated, filled
    onnx_export.reexport = reexported
    try:
        yield
    finally:
        onnx_export.translate, program_file.flattened = translate, flatten
        onnx_export.reexport = export
