"""LoRA adapters as GGUF files: `blk.N.attn_q.weight.lora_a [rank, in]` and `.lora_b [out, rank]`.

Of experts, a pair each: `blk.N.ffn_down_exps.weight.lora_a [experts, rank, in]`, `gguf_experts`.
`adapter.lora.alpha` over each tensor's own rank scales; without it, or where it is 0, nothing does.
Of the token table, `lora_a` is `[tokens, rank]`. Rows lie as those of the base's file do
(`gguf_names`). There is one alpha and nothing else: all other scales are in `lora_b`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...rewriter.errors import (
    ArtifactError,
    BaseMismatchError,
    BaseNeededError,
    NoFormError,
    nearest,
)
from ...rewriter.files.files import fill, new_file
from ...rewriter.parts.parts import LowRank, Part, Trained
from ...rewriter.storage.artifact import require_finite
from ...rewriter.storage.parts import Parts
from ..base import CAPTURE, GIVE_BASE, Base, snapshot
from ..plain_lora import factored
from .experts import joined, parted, require_gates_first
from .file import GgufFile, opened, package
from .names import (
    Names,
    architecture_of,
    names_of,
    rows_in_file,
    rows_in_model,
    weights_of,
)

TYPE, KIND, ALPHA = "general.type", "adapter.type", "adapter.lora.alpha"
INVOKED = "adapter.alora.invocation_tokens"
A, B = ".lora_a", ".lora_b"
TABLE = "token_embd.weight"
STACK = "_exps.weight"


def read_gguf_adapter(program: Base, path: str | Path) -> Parts:
    """An adapter in parts.

    Args:
        program: which it belongs to.
        path: of the file.

    Raises:
        ArtifactError: (CorruptFileError, NonFiniteError) damaged, not understood, of another
            architecture, or not of this model.
    """
    with opened(path) as file:
        return _read(program, file)


def _read(program: Base, file: GgufFile) -> Parts:
    where = file.where
    for key, wanted in ((TYPE, "adapter"), (KIND, "lora")):
        if (said := file.fields.get(key)) != wanted:
            raise ArtifactError(
                f"{where}: {key} is {said!r}, not {wanted!r}. Give a file that llama.cpp's "
                "convert_lora_to_gguf.py or peftfx wrote; a GGUF model goes in MODEL's place."
            )
    if INVOKED in file.fields:
        raise ArtifactError(
            f"{where}: {INVOKED} turns the adapter on behind some tokens only (aLoRA), which is "
            "not understood. Use an adapter without."
        )
    own = architecture_of(snapshot(program).model)
    if own and own != file.architecture:
        raise BaseMismatchError(
            f"{where} is of architecture {file.architecture}, and this model of {own}. Use the "
            "base that the adapter was trained on."
        )
    names = names_of(weights_of(program), file.architecture, where)
    alpha = float(file.number(ALPHA, 0.0))
    pairs: dict[str, dict[str, Tensor]] = {}
    parts: list[Part] = []
    for key in file.tensors:
        tensor = file.tensor(key)
        require_finite(f"{where}: {key}", tensor, "Save it again.")
        if key.endswith((A, B)):
            pairs.setdefault(key[: -len(A)], {})[key[-len(A) :]] = tensor
        elif key.endswith("_norm.weight") and not file.architecture.startswith("gemma"):
            parts.append(Trained(_target(names, key, where), tensor))
        else:
            raise ArtifactError(f"{where}: the tensor {key!r} is not understood.")
    base = program.base.base_tensors()
    low = {name: _low_rank(names, name, each, alpha, where) for name, each in pairs.items()}
    for part in joined(names, low):
        if part.target in names.halves:
            require_gates_first(program, part.target)
        _require_fit(part, base[program.tensors.stored(part.target)], where)
        parts.append(replace(part, b=rows_in_model(program, names, part.target, part.b)))
    if not parts:
        raise ArtifactError(f"{where}: the adapter holds nothing.")
    whole = ("its norms came in, too, which llama.cpp leaves out",)
    notes = whole if any(isinstance(p, Trained) for p in parts) else ()
    return Parts(tuple(parts), f"gguf {file.architecture} LoRA", notes)


def _low_rank(
    names: Names, name: str, factors: Mapping[str, Tensor], alpha: float, where: str
) -> LowRank:
    """A pair of factors, its rows as the file has them."""
    if len(factors) < 2:
        raise ArtifactError(f"{where}: {name} has {', '.join(factors)[1:]} alone. Save it again.")
    target = _target(names, name, where)
    a, b = factors[A], factors[B]
    lookup = name == TABLE
    a = a.mT.contiguous() if lookup else a
    sizes = 3 if name.endswith(STACK) else 2
    alike = a.dim() == b.dim() == sizes and a.shape[:-2] == b.shape[:-2]
    if not alike or a.shape[-2] != b.shape[-1] or a.shape[-2] < 1:
        raise ArtifactError(
            f"{where}: {name} has factors {list(factors[A].shape)} and {list(b.shape)}, whose "
            f"ranks do not agree, or which are no {('matrices', 'stacks')[sizes - 2]}. Save it "
            "again."
        )
    return LowRank(target, a, b, alpha / a.shape[-2] if alpha else 1.0, lookup=lookup)


def _require_fit(part: LowRank, weight: Tensor, where: str) -> None:
    change = [*part.b.shape[:-1], part.a.shape[-1]]
    if weight.numel() != math.prod(change):
        raise BaseMismatchError(
            f"{where}: the change of {part.target} is {change}, and it has {list(weight.shape)}. "
            "Use the base that the adapter was trained on."
        )


def _target(names: Names, file: str, where: str) -> str:
    models = names.models
    if file in models:
        return models[file]
    if file.endswith(STACK):
        raise ArtifactError(
            f"{where}: this base has no {file!r}; checkpoints hold each expert apart. {CAPTURE}"
        )
    raise ArtifactError(
        f"{where}: this model has no {file!r}. Nearest: {nearest(file, models)}. Use the base that "
        "the adapter was trained on."
    )


def write_gguf_adapter(
    program: Base, path: str | Path, parts: Parts, rank: int | None = None
) -> Mapping[str, float]:
    """Writes an adapter that llama.cpp loads.

    Args:
        program: whose base it belongs to.
        path: of the file.
        parts: of the adapter.
        rank: of what is not low-rank, see `plain_lora` (default: the adapter's largest).

    Returns:
        What was lost: parameter -> share of the change's norm.

    Raises:
        ArtifactError: llama.cpp has no form for it, or the file cannot be written.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    if not snapshot(program).model:
        raise BaseNeededError(f"{path}: GGUF's names follow from the model's class. {GIVE_BASE}")
    done = factored(program, parts, rank)
    cls = snapshot(program).model
    names = names_of(weights_of(program), architecture_of(cls) or cls, "this model")
    low = [each for p in done.parts.parts for each in _in_file(program, names, p)]
    (common, _), *_ = Counter(_alpha(p) for _, p in low).most_common(1)
    alpha = common or 1.0  # 0 would mean that nothing scales
    tensors: dict[str, Tensor] = {}
    for file, part in low:
        tensors |= _factors(program, names, file, _scaled(part, alpha))
    for name, tensor in tensors.items():
        require_finite(name, tensor)
    _write(path, names.architecture, alpha, tensors)
    return done.lost


def _in_file(program: Base, names: Names, part: Part) -> list[tuple[str, LowRank]]:
    """What a part is called in the file, with its factors there."""
    if not isinstance(part, LowRank):
        raise NoFormError(f"{part.target}: files hold pairs of factors. Fold it.")
    if part.target in names.halves:
        return list(parted(program, names, part))
    file = names.files.get(part.target)
    if file is None or (part.a.dim() > 2) != file.endswith(STACK):
        raise NoFormError(
            f"{part.target}: files of architecture {names.architecture} have no name for it. Fold "
            "it, or write PEFT's format."
        )
    return [(file, part)]


def _alpha(part: LowRank) -> float:
    """What over the rank is the scale, as far as float32 has it."""
    return float(torch.tensor(part.scale * part.a.shape[-2], dtype=torch.float32))


def _scaled(part: LowRank, alpha: float) -> LowRank:
    """With the scale that alpha over its rank is."""
    own, rank = _alpha(part), part.a.shape[-2]
    b = part.b if own == alpha else part.b.float() * (part.scale * rank / alpha)
    return replace(part, b=b, scale=alpha / rank)


def _factors(program: Base, names: Names, file: str, part: LowRank) -> dict[str, Tensor]:
    """The tensors of one weight, by what files call them."""
    tied = len(program.tensors.names(program.tensors.stored(part.target))) > 1
    if tied or part.lookup != (file == TABLE):
        raise NoFormError(
            f"{part.target}: GGUF files have one tensor for a table and a head that share it, and "
            "no way to change one of both. Leave it out of the adapter, or fold it and untie."
        )
    b = rows_in_file(program, names, part.target, part.b)
    return {f"{file}{A}": part.a.mT if part.lookup else part.a, f"{file}{B}": b}


def _write(
    path: str | Path, architecture: str, alpha: float, tensors: Mapping[str, Tensor]
) -> None:
    gguf = package()
    with new_file(path) as fresh:
        writer: Any = gguf.GGUFWriter(fresh, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(KIND, "lora")
        writer.add_float32(ALPHA, alpha)
        pieces: list[bytes | memoryview] = []
        step: int = writer.data_alignment
        for name, tensor in tensors.items():
            half = tensor.dtype == torch.float16
            values = tensor.detach().cpu().contiguous()
            array = (values if half else values.float()).numpy()
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
            pieces += [array.reshape(-1).view("u1").data, bytes(-array.nbytes % step)]
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        start = bytes(-fresh.stat().st_size % step)
        fill(fresh, [start, *pieces], append=True)
