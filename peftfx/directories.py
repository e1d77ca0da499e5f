"""Whole Hugging Face directories, from a base (a directory or a GGUF file) and an adapter."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .exporters.formats import format_of, load_adapter
from .exporters.gguf.base import Dequantised, write_directory
from .exporters.hf_names import checkpoint_of
from .exporters.uncaptured import uncaptured
from .models import Named, is_gguf_model, load_model
from .rewriter.api import Program
from .rewriter.capture.capture import capture
from .rewriter.errors import FoldError, OptionError
from .rewriter.files.directory import new_directory
from .rewriter.files.job import finished
from .rewriter.files.leftovers import clean, make_parents, real_path, temporary
from .rewriter.storage.filling import load_weights
from .rewriter.storage.folding import LayoutFolder
from .rewriter.storage.safetensors_checkpoint import Checkpoint
from .rewriter.storage.stream import (
    RECORD,
    Base,
    FoldedCheckpoint,
    files_of,
    fold_checkpoint,
    said_again,
    told,
    writing,
)


@dataclass
class Directory:
    """What `to_directory` wrote.

    Attributes:
        changed: names of the tensors that folding wrote.
        left_out: files of the base that were not copied: other weights.
        notes: what to know about it.
        shares: by site, (what rounding left of what was learnt along its own direction, its errors
            relative to the size of what was learnt).
        beside: weights of which not all was folded; `adapter/` in the directory has the rest.
        resumed: files that a killed run of the same had written.
        nothing_to_do: it was there already, from the same base and adapter.
    """

    changed: list[str] = field(default_factory=list[str])
    left_out: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])
    shares: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    beside: list[str] = field(default_factory=list[str])
    resumed: list[str] = field(default_factory=list[str])
    nothing_to_do: bool = False


def to_directory(
    base: str | Path,
    target: str | Path,
    adapter: str | Path | None = None,
    *,
    weights: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    capturing: Mapping[str, Any] | None = None,
    allow_base_mismatch: bool = False,
    least: float = 0.0,
    rank: int = 0,
) -> Directory:
    """Writes a directory that `from_pretrained` loads, with an adapter folded in.

    The model is captured only where the adapter holds more than changes of linears' weights. Memory
    holds one tensor of the base at a time, beside what is mapped from files. Killed at any
    time, the same call goes on; once it is done, it does nothing more.

    Args:
        base: a Hugging Face directory, `module:function` with `weights`, or a GGUF file, which is
            dequantised into float32.
        target: new or empty; it appears complete, or not at all.
        adapter: of any format that is read; only a GGUF file is written without.
        weights: the directory with the safetensors files, if `base` is none.
        progress: called with the name of each file before it is written.
        capturing: `cache` and `dynamic` of `capture`.
        allow_base_mismatch: see `load`.
        least: weights where rounding would leave less of the change stay as they are; `adapter/`
            in the target is then an adapter of PEFT with their branches (`fold{mode=keep}`).
        rank: above 0, the largest part of each change is not folded: `adapter/` has it as a LoRA
            of this rank (`fold{mode=residual}`).

    Raises:
        OptionError: there is nothing to fold.
        FoldError: with `least` or `rank`, the adapter holds more than changes of linears.
        RewriteError: of `load_adapter`, `write_directory` and `fold_checkpoint`.
    """
    if adapter is None:
        if not is_gguf_model(base):
            raise OptionError(
                f"{base} is a directory already, and there is no adapter to fold into it. Give "
                "one: peftfx convert MODEL ADAPTER OUT --to hf."
            )
        with new_directory(target, None) as fresh:
            return Directory(notes=write_directory(base, fresh, progress=progress).notes)
    made_of = identity(base, adapter, weights)
    if least or rank:
        made_of |= {"least": least, "rank": rank}
    if (record := finished(target, RECORD, made_of)) is not None:
        return _said(said_again(target, record))
    with _checkpoint(base, weights, target, progress) as (source, read):
        named = load_model(str(base), hollow=True)
        called = Path(base).resolve().name
        some = bool(least or rank)
        if some and allow_base_mismatch:
            raise OptionError(
                "what is left beside a model is left for the base that it was trained on. Leave "
                "out --mode, or --allow-base-mismatch."
            )
        direct = None
        files = checkpoint_of(source, named.model)
        if not allow_base_mismatch:
            direct = _uncaptured(named, files, adapter, least, rank)
        if direct is None and some:
            raise FoldError(
                f"{adapter} holds more than changes of linears' weights that nothing else reads, "
                "and of others nothing can stay beside a model's files. Leave --mode out; convert "
                "it first, where PEFT has a form for it (peftfx convert ADAPTER OUT --to peft "
                "--base MODEL); or fold in memory: run(program, 'fold{mode=...}')."
            )
        if direct is not None:
            folder, wanted = direct
            wanted.model = called
            done = told(writing(folder, target, made_of, wanted), progress)
        else:
            program = capture(named.model, kwargs=named.example, **(capturing or {}))
            done = _fold(
                program, files, target, adapter, made_of, progress, allow_base_mismatch, called
            )
    return _said(done, read.notes)


def _uncaptured(
    named: Named, source: Checkpoint, adapter: str | Path, least: float, rank: int
) -> tuple[LayoutFolder, Base] | None:
    layout = named.layout()
    if layout is None:
        return None
    return uncaptured(layout, source, adapter, least, rank)


def _said(done: FoldedCheckpoint, notes: Sequence[str] = ()) -> Directory:
    notes = [*notes, *(f"{site}: {about}" for site, about in done.notes)]
    return Directory(
        done.changed, done.left_out, notes, done.shares, done.beside, done.resumed,
        done.nothing_to_do,
    )  # fmt: skip


def identity(
    base: str | Path, adapter: str | Path, weights: str | Path | None = None
) -> dict[str, Any]:
    """What decides all that a fold writes, told from files without reading the base's tensors."""
    source = Path(weights or base)
    if source.is_file():
        status = source.stat()
        files: Mapping[str, Any] = {source.name: [status.st_size, status.st_mtime_ns]}
    else:
        files = files_of(Checkpoint.read(source))
    made_of: dict[str, Any] = {"base": files, "adapter": _hash(Path(adapter))}
    if (config := Path(base) / "config.json").is_file():
        made_of["config"] = _hash(config)
    return made_of if weights is None else {**made_of, "model": str(base)}


def _hash(path: Path) -> str:
    """sha256 of a file, or of the files in a folder."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\n".encode())
        with open(file, "rb") as handle:
            while piece := handle.read(2**20):
                digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def _checkpoint(
    base: str | Path,
    weights: str | Path | None,
    target: str | Path,
    progress: Callable[[str], None] | None,
) -> Iterator[tuple[Path, Dequantised]]:
    """The base's safetensors files; those of a GGUF file are beside the target meanwhile."""
    if not is_gguf_model(base):
        yield Path(weights or base), Dequantised()
        return
    real = real_path(target)
    make_parents(real)
    clean(real.parent)
    folder = temporary(real, "new")
    try:
        yield folder, write_directory(base, folder, progress=progress)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fold(
    program: Program,
    source: Checkpoint,
    target: str | Path,
    adapter: str | Path,
    made_of: Mapping[str, Any],
    progress: Callable[[str], None] | None,
    allow: bool,
    model: str,
) -> FoldedCheckpoint:
    if format_of(adapter) == "peftfx" and not allow:
        return fold_checkpoint(
            program, source, target, adapter=adapter, model=model, made_of=made_of,
            progress=progress,
        )  # fmt: skip
    filled = load_weights(program, source)  # some depend on the base
    program = load_adapter(filled, adapter, allow_base_mismatch=allow)
    return fold_checkpoint(program, source, target, model=model, made_of=made_of, progress=progress)
