"""Adapters of mlx-lm, read: a directory with `adapter_config.json` and `adapters.safetensors`.

    PATH.lora_a [in, rank], PATH.lora_b [rank, out], DoRA's PATH.m [out]; scale as the config has it

There is no alpha: `lora_parameters.scale` multiplies as it is, 20 where it is not said.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..rewriter.errors import ArtifactError, BaseMismatchError, nearest
from ..rewriter.files.directory import Folder, reading
from ..rewriter.files.files import JSON_LIMIT, parse_json, parse_tensors
from ..rewriter.parts.parts import LowRank, Part, Trained
from ..rewriter.storage.artifact import require_finite
from ..rewriter.storage.parts import Parts
from .base import Base
from .hf_peft.config import CONFIG, by_module

TENSORS = "adapters.safetensors"
TYPE = "fine_tune_type"
"""The key by which the config is told from that of PEFT."""

_SCALE = 20.0


def read_mlx(program: Base, directory: str | Path) -> Parts:
    """An adapter of mlx-lm in parts.

    Raises:
        ArtifactError: (CorruptFileError, NonFiniteError) damaged, not understood, or not of this
            model.
    """
    return reading(directory, f"a directory with a {CONFIG}", lambda f: _read(program, f))


def _read(program: Base, folder: Folder) -> Parts:
    where = str(folder.path / CONFIG)
    config = parse_json(folder.read(CONFIG, JSON_LIMIT), where)
    kind = config.get(TYPE, "lora")
    if kind not in ("lora", "dora", "full"):
        raise ArtifactError(f"{where}: {TYPE}={kind!r} is not read. Known are lora, dora and full.")
    tensors = parse_tensors(folder.read(TENSORS), str(folder.path / TENSORS))
    for name, tensor in tensors.items():
        require_finite(f"{folder.path / TENSORS}: {name}", tensor, "Save it again.")
    names = program.base.base_tensors().keys() | program.tensors.aliases.keys()
    if kind == "full":
        return Parts(
            tuple(Trained(_known(n, names, where), t) for n, t in tensors.items()), "mlx full"
        )
    scale = _scale(config, where)
    parts: list[Part] = []
    for path, leaves in by_module(tensors, ["lora_a", "lora_b", "m"]).items():
        for leaf in leaves:
            del tensors[f"{path}.{leaf}"]
        if "lora_a" not in leaves or "lora_b" not in leaves:
            raise ArtifactError(f"{where}: {path} has {', '.join(leaves)} alone.")
        a, b = leaves["lora_a"], leaves["lora_b"]
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
            raise ArtifactError(
                f"{where}: {path} has factors {list(a.shape)} and {list(b.shape)}: only matrices "
                "of one rank are read, no stacks of experts. Save it again, or use PEFT's format."
            )
        parts.append(
            LowRank(_known(f"{path}.weight", names, where), a.mT, b.mT, scale, leaves.get("m"))
        )
    if tensors:
        raise ArtifactError(f"{where}: the key {next(iter(tensors))!r} is not understood.")
    return Parts(tuple(parts), f"mlx {kind}")


def _scale(config: Mapping[str, Any], where: str) -> float:
    parameters: Any = config.get("lora_parameters", {})
    scale: Any = parameters.get("scale", _SCALE) if isinstance(parameters, dict) else None  # pyright: ignore
    if type(scale) not in (int, float) or "alpha" in parameters:
        raise ArtifactError(
            f"{where}: lora_parameters has no number `scale` (mlx-lm knows no alpha). Say the "
            "scale that multiplies: alpha / rank."
        )
    return float(scale)


def _known(name: str, names: Any, where: str) -> str:
    if name not in names:
        raise BaseMismatchError(
            f"{where}: this model has no {name!r}. Nearest: {nearest(name, names)}. Use the base "
            "that the adapter was trained on."
        )
    return name


def is_mlx(config: Any) -> bool:
    """Whether an `adapter_config.json` is mlx-lm's."""
    return isinstance(config, dict) and "peft_type" not in config and (
        TYPE in config or "lora_parameters" in config
    )  # fmt: skip
