"""Adapters of AdapterHub's library `adapters`: its directories read onto programs, and written.

    program = peftfx.load_adapter(program, "adapter/")
    peftfx.save_adapter(program, "adapter/", "adapterhub")

Keys and formulas are those of adapters 1.3.0, measured. A key or an option that is not understood
is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...rewriter.api import Program
from ...rewriter.files.directory import reading, write_directory
from ...rewriter.parts.parts import Fusion
from ...rewriter.pipeline.passes import NAME
from ...rewriter.run.run import run
from ..adapter_parts import adapter_parts
from ..base import fitting
from ..hf_peft.adapter import name_of
from .config import CONFIG
from .files import adapter_files, json_in, read_adapterhub
from .fusion import is_setup, item_of, load_setup, save_setup


def is_adapterhub(config: Any) -> bool:
    """Whether an `adapter_config.json` is of AdapterHub."""
    return isinstance(config, dict) and "peft_type" not in config and "config" in config


def load_adapterhub(program: Program, directory: str | Path, name: str = "") -> Program:
    """Inserts an adapter, or a fusion with its members.

    Args:
        program: which it goes onto.
        directory: that `save_adapter` or `save_adapter_setup` of the library wrote.
        name: of the adapter; by default its own. Members of a fusion have their own names.

    Raises:
        ArtifactError: (CorruptFileError, NonFiniteError) damaged, not understood, or not of this
            model. Nothing is inserted. PassError: the program cannot hold a part of it.
    """
    folder = Path(directory)
    if is_setup(folder):
        return load_setup(program, folder, name or name_of(folder))
    own = name or name_in(folder)
    own = own if NAME.fullmatch(own) else name_of(folder)
    parts = read_adapterhub(program, folder)
    with fitting(folder):
        return run(program, item_of(program, own, parts), sources=[parts])


def name_in(directory: str | Path) -> str:
    """What an adapter's own config calls it; '' if it does not say."""
    data = reading(directory, f"a directory with a {CONFIG}", lambda f: json_in(f, CONFIG))
    return str(data.get("name") or "")


def save_adapterhub(program: Program, directory: str | Path, adapter: str = "") -> None:
    """Writes an adapter as the library does; its `load_adapter(directory)` reads it.

    A fusion is written with its members, as `load_adapter_setup(directory)` reads them.

    Args:
        program: which holds the adapter.
        directory: new, empty, or one of such an adapter to replace.
        adapter: its name; by default the only fusion, or the only adapter.

    Raises:
        ArtifactError: the library has no form for it, or the directory cannot be written; what was
            there stays. NonFiniteError: a tensor holds NaN or infinity.
    """
    fusions = {a.adapter for a in program.attachments if a.members}
    only = fusions.pop() if len(fusions) == 1 else ""
    parts = adapter_parts(program, adapter or only, beside=True)
    if any(isinstance(p, Fusion) for p in parts.parts):
        save_setup(program, directory, parts)
        return
    write_directory(directory, adapter_files(program, parts), CONFIG)
