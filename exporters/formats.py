"""Adapters in all formats: told by their content, read onto programs, written, converted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..passes.interchange.imported import Imported
from ..rewriter.api import Program
from ..rewriter.errors import ArtifactError, OptionError
from ..rewriter.files.files import (
    JSON_LIMIT,
    open_regular,
    parse_json,
    read_file,
    write_file,
    write_tensors,
)
from ..rewriter.run.run import run
from ..rewriter.storage.artifact import MANIFEST, require_finite, save
from ..rewriter.storage.loading import load
from .adapter_parts import adapter_parts
from .gguf_adapter import read_gguf_adapter, write_gguf_adapter
from .gguf_file import is_gguf
from .hf_peft import load_peft, name_of, save_peft
from .hf_peft_config import CONFIG
from .mlx import is_mlx, read_mlx
from .onnx_adapter import is_onnx_adapter, read_onnx_adapter, write_onnx_adapter
from .single_file import kohya_file, read_single_file

FORMATS = ("peftfx", "peft", "plain-lora", "kohya", "gguf", "onnx_adapter")
"""What adapters are written as; beside these, diffusers', LyCORIS's and mlx-lm's are read."""


_BY_START = {"gguf": is_gguf, "onnx_adapter": is_onnx_adapter}

_READERS = {"mlx": read_mlx, "gguf": read_gguf_adapter, "onnx_adapter": read_onnx_adapter}
_WRITERS = {"gguf": write_gguf_adapter, "onnx_adapter": write_onnx_adapter}


def format_of(path: str | Path) -> str:
    """The format of an adapter.

    Raises:
        ArtifactError: it is none that is known.
    """
    folder = Path(path)
    if folder.is_file():
        with open_regular(folder) as file:
            start = file.read(8)
        return next((kind for kind, told in _BY_START.items() if told(start)), "single file")
    if (folder / CONFIG).is_file():
        config = parse_json(read_file(folder / CONFIG, JSON_LIMIT), str(folder / CONFIG))
        return "mlx" if is_mlx(config) else "peft"
    if (folder / MANIFEST).is_file():
        return "peftfx"
    what = "does not exist" if not folder.exists() else "is no adapter that is known"
    raise ArtifactError(
        f"{path} {what}: looked for a directory with {MANIFEST} or {CONFIG}, or a safetensors "
        "file. Save one with peftfx.save, or with PEFT."
    )


def load_adapter(
    program: Program, path: str | Path, name: str = "", component: str = ""
) -> Program:
    """Loads an adapter of any format; see `load`, `load_peft` and `read_single_file`.

    Args:
        program: which it goes onto.
        path: a directory, or one safetensors file.
        name: of the adapter; by default what the file has, or is called.
        component: which adapter of a file with several.
    """
    kind = format_of(path)
    if component and kind != "single file":
        raise OptionError(f"component={component!r} goes with a single file, which {path} is not.")
    if kind == "peftfx":
        return load(program, path, name=name or None)
    if kind == "peft":
        return load_peft(program, path, name)
    reader = _READERS.get(kind)
    parts = reader(program, path) if reader else read_single_file(program, path, component)
    return run(program, Imported(name=name or name_of(path)), sources=[parts])


def save_adapter(
    program: Program, path: str | Path, to: str, adapter: str = "", rank: int | None = None
) -> Mapping[str, float]:
    """Writes an adapter in a format.

    Args:
        program: which holds it.
        path: new, empty, or an adapter of that format to replace; a file of kohya, gguf and
            onnx_adapter.
        to: one of `FORMATS`.
        adapter: its name; the only one by default.
        rank: of plain LoRA, and of what is not low-rank in gguf and onnx_adapter.

    Returns:
        What was lost: parameter -> share of the change's norm (where there is a rank).

    Raises:
        OptionError: the format is unknown, or has no rank. ArtifactError: see the writers.
    """
    if to not in FORMATS:
        raise OptionError(f"there is no format {to!r}. Choose one of {', '.join(FORMATS)}.")
    if rank is not None and to not in ("plain-lora", *_WRITERS):
        raise OptionError(f"rank={rank} goes with plain-lora, not with {to}.")
    if writer := _WRITERS.get(to):
        return writer(program, path, adapter_parts(program, adapter), rank)
    if to == "kohya":
        tensors, metadata = kohya_file(program, adapter_parts(program, adapter))
        for name, tensor in tensors.items():
            require_finite(name, tensor)
        write_file(path, write_tensors(tensors, metadata))
        return {}
    if to == "peftfx":
        save(program, path, [adapter] if adapter else None)
        return {}
    return save_peft(program, path, adapter, plain=to == "plain-lora", rank=rank)
