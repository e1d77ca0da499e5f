"""LoRA adapters of ONNX Runtime: `.onnx_adapter` files, tensors for the inputs of a model.

    MODULE.lora_A.weight [in, rank], MODULE.lora_B.weight [rank, out], all scales in B

So Olive names and lays them out, and so `export_onnx(..., slots=True)` calls its inputs. The file
has no other description. Of ONNX Runtime 1.32: `run_with_iobinding` takes no notice of an active
adapter, two adapters for one input are no error, and a `LoraAdapter` must outlive its `RunOptions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...rewriter.errors import ArtifactError, BaseMismatchError, nearest
from ...rewriter.files.files import read_file, write_file
from ...rewriter.parts.parts import LowRank, Part
from ...rewriter.storage.artifact import require_finite
from ...rewriter.storage.parts import Parts
from ..base import Base
from ..hf_peft.config import PREFIX, by_module
from ..plain_lora import factored
from .adapter_file import MARK, onnx_adapter_pieces, parse_onnx_adapter

A, B = "lora_A.weight", "lora_B.weight"


def is_onnx_adapter(start: bytes) -> bool:
    """Whether a file that starts so is an adapter of ONNX Runtime."""
    return start[4:8] == MARK


def read_onnx_adapter(program: Base, path: str | Path) -> Parts:
    """An adapter in parts.

    Args:
        program: which it belongs to.
        path: of the file.

    Raises:
        ArtifactError: (CorruptFileError, NonFiniteError) damaged, not understood, or not of this
            model.
    """
    where = str(path)
    tensors = {k.removeprefix(PREFIX): t for k, t in onnx_adapter_tensors(path).items()}
    names = program.base.base_tensors().keys() | program.tensors.aliases.keys()
    parts: list[Part] = []
    for module, leaves in by_module(tensors, [A, B]).items():
        for leaf in leaves:
            del tensors[f"{module}.{leaf}"]
        if len(leaves) < 2:
            raise ArtifactError(f"{where}: {module} has {', '.join(leaves)} alone. Save it again.")
        a, b, target = leaves[A].mT.contiguous(), leaves[B].mT.contiguous(), f"{module}.weight"
        if target not in names:
            raise BaseMismatchError(
                f"{where}: this model has no {target!r}. Nearest: {nearest(target, names)}. Use "
                "the base that the adapter was trained on."
            )
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise ArtifactError(
                f"{where}: {module} has factors {list(leaves[A].shape)} and "
                f"{list(leaves[B].shape)}, whose ranks do not agree. Save it again."
            )
        parts.append(LowRank(target, a, b, 1.0))
    if tensors or not parts:
        first = next(iter(tensors), None)
        what = f"the tensor {first!r} is not understood" if tensors else "the adapter holds nothing"
        raise ArtifactError(f"{where}: {what}. Known are MODULE.{A} and MODULE.{B}.")
    return Parts(tuple(parts), "onnxruntime LoRA")


def onnx_adapter_tensors(path: str | Path) -> dict[str, Tensor]:
    """A file's tensors by name, all finite.

    Raises:
        ArtifactError: (CorruptFileError, NonFiniteError) damaged, or not understood.
    """
    tensors = parse_onnx_adapter(read_file(path), str(path))
    for name, tensor in tensors.items():
        require_finite(f"{path}: {name}", tensor, "Save it again.")
    return tensors


def slots(part: Part) -> dict[str, Tensor]:
    """The tensors of one weight, by the names of a model's inputs.

    Raises:
        ArtifactError: it is no plain pair of factors beside a product.
    """
    if (
        not isinstance(part, LowRank)
        or part.lookup
        or part.a.dim() != 2
        or part.magnitude is not None
    ):
        raise ArtifactError(
            f"{part.target or part.kind}: inputs of ONNX models are factors beside products "
            "alone. Leave all else out of the adapter, or export it folded."
        )
    module = part.target.removesuffix(".weight")
    b = part.b if part.scale == 1 else part.b.float() * part.scale
    return {f"{module}.{A}": part.a.mT, f"{module}.{B}": b.mT}


def write_onnx_adapter(
    program: Base, path: str | Path, parts: Parts, rank: int | None = None
) -> Mapping[str, float]:
    """Writes an adapter for a model that `export_onnx(..., slots=True)` wrote.

    Args:
        program: whose base it belongs to.
        path: of the file.
        parts: of the adapter.
        rank: of what is not low-rank, see `plain_lora` (default: the adapter's largest).

    Returns:
        What was lost: parameter -> share of the change's norm.

    Raises:
        ArtifactError: such models have no input for it, or the file cannot be written.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    done = factored(program, parts, rank)
    tensors: dict[str, Tensor] = {}
    for part in done.parts.parts:
        tensors |= slots(part)
    for name, tensor in tensors.items():
        require_finite(name, tensor)
    save(path, tensors)
    return done.lost


def save(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes named tensors as an adapter file; bfloat16 becomes float32."""
    wide = {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in tensors.items()}
    write_file(path, onnx_adapter_pieces(wide))
