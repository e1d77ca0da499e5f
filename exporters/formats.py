"""Adapters in all formats: told by their content, read onto programs, written, converted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..rewriter.api import Program
from ..rewriter.errors import ArtifactError, OptionError
from ..rewriter.storage.artifact import MANIFEST, save
from ..rewriter.storage.loading import load
from .hf_peft import load_peft, save_peft
from .hf_peft_config import CONFIG

FORMATS = ("peftfx", "peft", "plain-lora")
"""What adapters are written as; the first two are read."""


def format_of(path: str | Path) -> str:
    """The format of an adapter.

    Raises:
        ArtifactError: it is none that is known.
    """
    folder = Path(path)
    marks = {MANIFEST: "peftfx", CONFIG: "peft"}
    for mark, kind in marks.items():
        if (folder / mark).is_file():
            return kind
    what = "does not exist" if not folder.exists() else "is no adapter that is known"
    raise ArtifactError(
        f"{path} {what}: looked for a directory with {' or '.join(marks)}. Save one with "
        "peftfx.save, or with PEFT."
    )


def load_adapter(program: Program, path: str | Path) -> Program:
    """Loads an adapter of any format; see `load` and `load_peft`."""
    if format_of(path) == "peft":
        return load_peft(program, path)
    return load(program, path)


def save_adapter(
    program: Program, path: str | Path, to: str, adapter: str = "", rank: int | None = None
) -> Mapping[str, float]:
    """Writes an adapter in a format.

    Args:
        program: which holds it.
        path: new, empty, or an adapter of that format to replace.
        to: one of `FORMATS`.
        adapter: its name; the only one by default.
        rank: of plain LoRA.

    Returns:
        What was lost: parameter -> share of the change's norm (plain LoRA).

    Raises:
        OptionError: the format is unknown, or has no rank. ArtifactError: see the writers.
    """
    if to not in FORMATS:
        raise OptionError(f"there is no format {to!r}. Choose one of {', '.join(FORMATS)}.")
    if rank is not None and to != "plain-lora":
        raise OptionError(f"rank={rank} goes with plain-lora, not with {to}.")
    if to == "peftfx":
        save(program, path, [adapter] if adapter else None)
        return {}
    return save_peft(program, path, adapter, plain=to == "plain-lora", rank=rank)
