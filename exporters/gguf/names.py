"""What GGUF files call the tensors of a model, and in which order they have their rows.

Names are those of the package gguf (`TensorNameMap`). The order follows from how the runtime
rotates: neighbouring features of a head in pairs, where transformers' classes rotate its first half
with its second. Architectures of which neither is known are refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...rewriter.errors import ArtifactError, nearest
from ...rewriter.program.sites import AttentionSite, LinearSite
from ..base import Base, snapshot
from .file import package

PAIRED = ("llama", "granite", "granitemoe")
"""Architectures whose queries and keys lie in pairs."""

AS_THEY_ARE = (
    "bert", "gemma", "gemma2", "gemma3", "gpt2", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe",
    "starcoder2",
)  # fmt: skip
"""Architectures whose products have their rows as transformers' classes have them."""

_OTHERWISE = {"mistral": "llama", "mixtral": "llama"}
"""Classes of transformers that the runtime knows as another architecture."""

_CLASS = re.compile(r"(.+?)(?:Text)?(?:For[A-Z]\w*|LMHeadModel|Model)")


_STACK = "_exps"
"""How files call tensors of a matrix for each expert, `[experts, out, in]`."""


@dataclass(frozen=True)
class Names:
    """The names of a model's weights.

    Attributes:
        architecture: as files have it.
        files: name in transformers -> name in files.
        halves: the same, of tensors that lie in two there, gates and what they open.
    """

    architecture: str
    files: Mapping[str, str]
    halves: Mapping[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])

    @functools.cached_property
    def models(self) -> dict[str, str]:
        """Name in files -> name in transformers."""
        whole = {file: name for name, file in self.files.items()}
        return whole | {half: name for name, pair in self.halves.items() for half in pair}


def architecture_of(cls: str) -> str:
    """The architecture of a transformers class, '' if none is known.

    Args:
        cls: such as `LlamaForCausalLM`.
    """
    match = _CLASS.fullmatch(cls)
    stem = match[1].lower() if match else ""
    known = {_letters(n): n for n in package().MODEL_ARCH_NAMES.values()}
    return known.get(_OTHERWISE.get(stem, stem), "")


@functools.lru_cache(maxsize=8)
def _table(architecture: Any, blocks: int) -> Any:
    """The package's names of a model with so many blocks, which take long to make."""
    return package().get_tensor_name_map(architecture, blocks)


def names_of(weights: Collection[str], architecture: str, where: str) -> Names:
    """The names of all weights and biases that files can hold.

    Args:
        weights: names of parameters in transformers.
        architecture: as files have it.
        where: for errors.

    Raises:
        ArtifactError: nobody knows the architecture, or how files of it order their rows.
    """
    gguf = package()
    known = {n: a for a, n in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ArtifactError(
            f"{where}: the package gguf knows no architecture {architecture!r}. Nearest: "
            f"{nearest(architecture, known)}."
        )
    require_known(architecture, where)
    numbers = [int(n) for name in weights for n in re.findall(r"\.(\d+)\.", name)]
    table = _table(known[architecture], max(numbers, default=-1) + 1)
    files: dict[str, str] = {}
    halves: dict[str, tuple[str, str]] = {}
    for name in weights:
        module, _, leaf = name.rpartition(".")
        named = table.get_name(module) or table.get_name(module.partition(".")[2])
        if leaf in ("weight", "bias") and named is not None:
            files[name] = f"{named}.{leaf}"
        elif (stack := table.get_name(name)) is not None and stack.endswith(_STACK):
            files[name] = f"{stack}.weight"
        elif leaf == "gate_up_proj":
            pair = [table.get_name(f"{module}.{n}_proj") for n in ("gate", "up")]
            if all(n is not None and n.endswith(_STACK) for n in pair):
                halves[name] = (f"{pair[0]}.weight", f"{pair[1]}.weight")
    return Names(architecture, files, halves)


def require_known(architecture: str, where: str) -> None:
    """Raises ArtifactError unless the order of an architecture's rows is known."""
    if architecture not in (*PAIRED, *AS_THEY_ARE):
        raise ArtifactError(
            f"{where}: how GGUF files of architecture {architecture!r} order the rows of their "
            f"weights is not known; it is of {', '.join((*PAIRED, *AS_THEY_ARE))}. Use PEFT's "
            "format and llama.cpp's own converter."
        )


def paired(architecture: str, file: str) -> bool:
    """Whether a tensor's rows lie in pairs; `file` is its name in files."""
    return architecture in PAIRED and re.search(r"\.attn_[qk]\.(weight|bias)$", file) is not None


def to_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows `[heads * width, ...]` in halves of each head, as files have them: in pairs."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """Undoes `to_pairs`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def heads_of(program: Base, weight: str) -> int:
    """The heads of the queries or keys that a weight makes.

    Raises:
        ArtifactError: no attention reads it alone.
    """
    stored = program.tensors.stored(weight)
    width = snapshot(program).head_dim
    if width:
        return len(program.base.base_tensors()[stored]) // width
    ids = {s.id for s in program.sites if isinstance(s, LinearSite) and s.weight == stored}
    for site in program.sites:
        if isinstance(site, AttentionSite) and ids & {site.q, site.k}:
            return site.heads if site.q in ids else site.kv_heads
    raise ArtifactError(f"no attention of this model has its queries or keys from {weight!r}.")


def weights_of(program: Base) -> list[str]:
    """All names of a program's captured parameters."""
    names: dict[str, Any] = {**program.base.base_tensors(), **program.tensors.aliases}
    return sorted(names)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def rows_in_file(program: Base, names: Names, weight: str, rows: Tensor) -> Tensor:
    """Rows of a weight as files have them."""
    if not paired(names.architecture, names.files.get(weight, "")):
        return rows
    return to_pairs(rows, heads_of(program, weight)).contiguous()


def rows_in_model(program: Base, names: Names, weight: str, rows: Tensor) -> Tensor:
    """Undoes `rows_in_file`."""
    if not paired(names.architecture, names.files.get(weight, "")):
        return rows
    return to_halves(rows, heads_of(program, weight)).contiguous()
