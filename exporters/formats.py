"""Adapters in all formats: told by their content, read onto programs, written, converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ..rewriter.api import Program
from ..rewriter.errors import ArtifactError, BaseNeededError, NoFormError, OptionError, PathError
from ..rewriter.files.files import (
    JSON_LIMIT,
    open_regular,
    parse_json,
    read_file,
    tensor_pieces,
    write_file,
)
from ..rewriter.files.torch_bin import LIMIT, parse_torch_bin
from ..rewriter.storage.artifact import MANIFEST, require_finite, save
from ..rewriter.storage.loading import load
from ..rewriter.storage.parts import Parts
from ..rewriter.storage.safetensors_checkpoint import header
from .adapter_parts import adapter_parts
from .adapterhub.adapter import is_adapterhub, load_adapterhub, save_adapterhub
from .adapterhub.fusion import is_setup
from .base import GIVE_BASE, Base, Files, checkpoint, fitting, require_fit, sizes
from .gguf.adapter import read_gguf_adapter, write_gguf_adapter
from .gguf.file import is_gguf
from .hf_peft.adapter import inserted, name_of, read_peft, save_peft, write_peft
from .hf_peft.config import CONFIG, PICKLED, TENSORS
from .mlx import TENSORS as MLX_TENSORS
from .mlx import is_mlx, read_mlx
from .onnx.adapter import is_onnx_adapter, read_onnx_adapter, write_onnx_adapter
from .single_file import kohya_file, read_single_file

FORMATS = ("peftfx", "peft", "plain-lora", "kohya", "gguf", "onnx_adapter", "adapterhub")
"""What adapters are written as; beside these, diffusers', LyCORIS's and mlx-lm's are read."""

MARKS = {"peftfx": MANIFEST, "peft": CONFIG, "plain-lora": CONFIG, "adapterhub": CONFIG}
"""Formats that are directories -> the file by which one is known, and replaced."""


_BY_START = {"gguf": is_gguf, "onnx_adapter": is_onnx_adapter}

Reader = Callable[[Base, str | Path], Parts]
Writer = Callable[[Base, str | Path, Parts, int | None], Mapping[str, float]]

_READERS: Mapping[str, Reader] = {
    "peft": read_peft, "mlx": read_mlx, "gguf": read_gguf_adapter,
    "onnx_adapter": read_onnx_adapter,
}  # fmt: skip

_WRITERS: Mapping[str, Writer] = {"gguf": write_gguf_adapter, "onnx_adapter": write_onnx_adapter}
_RANKED = ("plain-lora", *_WRITERS)
"""Formats of factors alone, in which something may be lost."""

_NEEDS_PROGRAM = {
    "peftfx": "{path} was saved by peftfx: its recipe is run on a captured model. Use "
    "peftfx.load(program, directory), or convert with --capture.",
    "adapterhub": "{path} is of AdapterHub, whose files name the places of a captured model. Use "
    "peftfx.load_adapter(program, directory), or convert with --capture.",
}

_TENSORS = {"peft": TENSORS, "mlx": MLX_TENSORS}


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
        if is_mlx(config):
            return "mlx"
        return "adapterhub" if is_adapterhub(config) else "peft"
    if is_setup(folder):
        return "adapterhub"
    if (folder / MANIFEST).is_file():
        return "peftfx"
    what = "does not exist" if not folder.exists() else "is no adapter that is known"
    raise PathError(
        f"{path} {what}: looked for a directory with {MANIFEST} or {CONFIG}, or a safetensors "
        "file. Save one with peftfx.save, or with PEFT."
    )


def load_adapter(
    program: Program,
    path: str | Path,
    name: str = "",
    component: str = "",
    *,
    allow_base_mismatch: bool = False,
) -> Program:
    """Loads an adapter of any format; see `load`, `load_peft` and `read_single_file`.

    Args:
        program: which it goes onto.
        path: a directory, or one safetensors file.
        name: of the adapter; by default what the file has, or is called.
        component: which adapter of a file with several.
        allow_base_mismatch: see `load`; other libraries' files say nothing of the base's numbers.
    """
    kind = format_of(path)
    if kind == "peftfx" and not component:
        return load(program, path, name=name or None, allow_base_mismatch=allow_base_mismatch)
    if kind == "adapterhub" and not component:
        return load_adapterhub(program, path, name)
    parts = read_adapter(program, path, component)
    with fitting(path):
        return inserted(program, parts, name or name_of(path))


def read_adapter(base: Base, path: str | Path, component: str = "") -> Parts:
    """An adapter of another library, in parts.

    Args:
        base: the model that it belongs to, captured or in files.
        path, component: see `load_adapter`.

    Raises:
        ArtifactError: damaged, not understood, or not of this base; or of a format that needs a
            program (ours, and AdapterHub's).
    """
    kind = format_of(path)
    require_component(kind, path, component)
    if kind == "single file":
        return read_single_file(base, path, component)
    if kind not in _READERS:
        raise ArtifactError(_NEEDS_PROGRAM[kind].format(path=path))
    return _READERS[kind](base, path)


def require_component(kind: str, path: str | Path, component: str) -> None:
    """Raises OptionError where one of several adapters is asked of a format that holds one."""
    if component and kind != "single file":
        raise OptionError(f"component={component!r} goes with a single file, which {path} is not.")


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
    _check(to, rank)
    if to == "peftfx":
        save(program, path, [adapter] if adapter else None)
        return {}
    if to == "adapterhub":
        save_adapterhub(program, path, adapter)
        return {}
    if to in ("peft", "plain-lora"):
        return save_peft(program, path, adapter, plain=to == "plain-lora", rank=rank)
    return write_adapter(program, adapter_parts(program, adapter), path, to, rank)


def write_adapter(
    base: Base, parts: Parts, path: str | Path, to: str, rank: int | None = None
) -> Mapping[str, float]:
    """Writes parts in another library's format; see `save_adapter`.

    Raises:
        NoFormError: there is no such form, or `peftfx`, which is saved from a program.
    """
    _check(to, rank)
    if to in _WRITERS:
        return _WRITERS[to](base, path, parts, rank)
    if to in ("peft", "plain-lora"):
        return write_peft(base, parts, path, parts, plain=to == "plain-lora", rank=rank)
    if to == "adapterhub":
        raise NoFormError(
            "AdapterHub's files name the places of a captured model. Load the adapter onto a "
            "program and save that, or convert with --capture."
        )
    if to == "peftfx":
        raise NoFormError(
            "peftfx saves what a program holds, with hashes of its base. Load the adapter onto "
            "a program and save that, or convert with --capture."
        )
    tensors, metadata = kohya_file(base, parts)
    for name, tensor in tensors.items():
        require_finite(name, tensor)
    write_file(path, tensor_pieces(tensors, metadata))
    return {}


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    base: Base | str | Path | None = None,
    rank: int | None = None,
    component: str = "",
) -> Mapping[str, float]:
    """Writes an adapter in another format without building its model.

    Args:
        source: an adapter of another library.
        target, to, rank: see `save_adapter`.
        base: the directory of the model, whose headers tell names and shapes, and of which those
            values are read that a formula needs; or a base. Without one, the adapter's own factors
            tell what they can, and what needs more is an error.
        component: which adapter of a file with several.

    Returns:
        What was lost, see `save_adapter`.

    Raises:
        ArtifactError: (CorruptFileError, NonFiniteError) damaged, not understood, of another base,
            or it has no such form. What was there is unchanged.
    """
    _check(to, rank)
    kind = format_of(source)
    if base is None or isinstance(base, str | Path):
        base = _files(source, kind, base)
    parts = read_adapter(base, source, component)
    require_fit(base, parts, str(source))
    return write_adapter(base, parts, target, to, rank)


def base_of_files(path: str | Path, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> Files:
    """The base of an adapter as far as its own factors tell it.

    Args:
        path, kind: the adapter and its format.
        shapes: of its tensors, by their names in the file.

    Raises:
        BaseNeededError: they name weights in another way than the model.
    """
    if kind == "gguf":
        raise BaseNeededError(f"{path} names weights as its own format does. {GIVE_BASE}")
    if kind == "onnx_adapter":
        shapes = {name: shape[::-1] for name, shape in shapes.items()}
    return sizes(shapes, kind == "peft" and in_out_of(path))


def in_out_of(path: str | Path) -> bool:
    """Whether the config of PEFT in a directory says that matrices are stored `[in, out]`."""
    folder = Path(path)
    config = parse_json(read_file(folder / CONFIG, JSON_LIMIT), str(folder / CONFIG))
    return isinstance(config, dict) and config.get("fan_in_fan_out") is True  # pyright: ignore


def _files(source: str | Path, kind: str, directory: str | Path | None) -> Files:
    """The base of an adapter as files tell it."""
    folder = Path(source)
    in_out = kind == "peft" and in_out_of(folder)
    if directory is not None:
        return checkpoint(directory, in_out)
    if kind in _BY_START:
        raise BaseNeededError(f"{source} names weights as its own format does. {GIVE_BASE}")
    file = folder / _TENSORS[kind] if kind in _TENSORS else folder
    if kind == "peft" and not file.exists() and (pickled := folder / PICKLED).exists():
        tensors = parse_torch_bin(read_file(pickled, LIMIT), str(pickled))
        return sizes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, in_out)
    if kind in _TENSORS and not file.exists():
        raise ArtifactError(f"{file} is missing: the adapter is not whole. Save it again.")
    if not file.is_file():
        raise BaseNeededError(f"{file} is missing. {GIVE_BASE}")
    return sizes({name: entry.shape for name, entry in header(file).items()}, in_out)


def _check(to: str, rank: int | None) -> None:
    if to not in FORMATS:
        raise OptionError(f"there is no format {to!r}. Choose one of {', '.join(FORMATS)}.")
    if rank is not None and to not in _RANKED:
        raise OptionError(f"rank={rank} goes with plain-lora, not with {to}.")
