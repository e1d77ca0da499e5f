"""GGUF files as bases: the model that a file holds, and its Hugging Face directory, dequantised.

What transformers reads of a file is taken from there (configuration, tokenizer, the class); what it
drops without a word, the scaling of the rotary embedding, is read here. Tensors of architectures
whose order is known (`gguf_names`) are written one at a time.
"""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...rewriter.errors import ArtifactError, WeightsError, nearest
from ...rewriter.files.files import write_json
from ...rewriter.storage.artifact import require_finite
from ...rewriter.storage.safetensors_checkpoint import DTYPES, INDEX
from .file import GgufFile, opened
from .names import AS_THEY_ARE, PAIRED, Names, names_of, paired, to_halves

SHARD = 5_000_000_000
"""Bytes of tensors in one safetensors file, by default."""

WHOLE = ("gpt2", "qwen2moe", "qwen3moe")
"""Architectures whose tensors transformers turns or stacks as it reads them, all at once."""

SHIFTED = ("gemma", "gemma2", "gemma3")
"""Architectures whose norms files hold with one added."""

FREQUENCIES = "rope_freqs.weight"

_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What all models have that scale rotations like Llama 3.1; files hold the factors alone."""


@dataclass
class Dequantised:
    """What `write_directory` wrote.

    Attributes:
        tensors: how many.
        notes: what the file lacks, or had to be done otherwise.
    """

    tensors: int = 0
    notes: list[str] = field(default_factory=list[str])


def load_gguf(path: str | Path, hollow: bool = False) -> Any:
    """The model of a file, in float32 and in evaluation mode; it can be saved, halved and trained.

    Args:
        path: of the file.
        hollow: on the meta device, without its weights.

    Raises:
        ArtifactError: (CorruptFileError) damaged, an adapter, of an architecture that transformers
            does not read, or with a rotary embedding that it cannot express.
    """
    path = Path(path)
    with opened(path) as file:
        config = _config(path, file)
    auto = _transformers().AutoModelForCausalLM
    try:
        if hollow:
            with torch.device("meta"):
                return auto.from_config(config, dtype=torch.float32).eval()
        model, about = auto.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32,
            quantization_config=_transformers().GgufConfig(dequantize=True),
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:
        raise ArtifactError(f"{path} cannot be loaded: {_first(error)}") from error
    if about["missing_keys"]:  # which transformers draws at random
        raise WeightsError(
            f"{path} lacks the model's {min(about['missing_keys'])}. It is incomplete, or of "
            "another model than it says."
        )
    vars(model.config).pop("quantization_config", None)
    return model.eval()


def write_directory(
    path: str | Path,
    folder: Path,
    *,
    shard: int = SHARD,
    progress: Callable[[str], None] | None = None,
) -> Dequantised:
    """Writes a file's model as a Hugging Face directory in float32, which holds what it means bit
    for bit: safetensors with their index, configuration, generation configuration, tokenizer.

    Memory: one tensor; of the architectures in `WHOLE`, and of those that only transformers knows,
    the model.

    Args:
        path: of the file.
        folder: new or empty.
        shard: bytes of tensors in one file.
        progress: called with the name of each file before it is written.

    Raises:
        ArtifactError: see `load_gguf` (WeightsError: tensors of the model are not in the file, or
            are of other shapes, or the other way round; NonFiniteError: NaN or infinity).
    """
    path = Path(path)
    folder.mkdir(exist_ok=True)
    done = Dequantised()
    with opened(path) as file:
        if file.architecture in WHOLE or file.architecture not in (*PAIRED, *AS_THEY_ARE):
            model = load_gguf(path)
            done.tensors = len(model.state_dict())
            done.notes.append(f"{file.architecture}: the model was in memory as a whole")
            model.save_pretrained(folder, max_shard_size=shard)
        else:
            model = load_gguf(path, hollow=True)
            done.tensors = _write_tensors(file, model, folder, shard, progress)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    if model.can_generate():
        _transformers().GenerationConfig.from_model_config(model.config).save_pretrained(folder)
    done.notes += _write_tokenizer(path, model, folder)
    return done


def _write_tensors(
    file: GgufFile,
    model: Any,
    folder: Path,
    shard: int,
    progress: Callable[[str], None] | None,
) -> int:
    state = model.state_dict()
    tied = set(model.all_tied_weights_keys) if "output.weight" not in file.tensors else set[str]()
    wanted = {n: t for n, t in state.items() if n not in tied}
    names = names_of(wanted, file.architecture, file.where)
    _require_all(file, names, wanted)
    files = _files({n: t.numel() * 4 for n, t in wanted.items()}, shard)
    for name, members in files.items():
        if progress is not None:
            progress(name)
        _write_file(
            folder / name, {n: wanted[n] for n in members}, lambda n: _value(file, model, names, n)
        )
    if len(files) > 1:
        about = {"total_size": sum(t.numel() * 4 for t in wanted.values())}
        listed = {n: name for name, members in files.items() for n in members}
        index = write_json({"metadata": about, "weight_map": listed})
        (folder / f"model{INDEX}").write_bytes(index)
    return len(wanted)


def _require_all(file: GgufFile, names: Names, wanted: Mapping[str, Tensor]) -> None:
    """Raises WeightsError unless file and model have the same tensors."""
    for name, tensor in wanted.items():
        stored = file.tensors.get(names.files.get(name, ""))
        if stored is None:
            raise WeightsError(
                f"{file.where} lacks {names.files.get(name, name)!r}, the model's {name}. It is "
                "incomplete, or of another model than it says."
            )
        if stored.shape != tuple(tensor.shape):
            raise WeightsError(
                f"{file.where}: {names.files[name]!r} is {list(stored.shape)}, and the model's "
                f"{name} is {list(tensor.shape)}. The file says other sizes than it has."
            )
    left = set(file.tensors) - set(names.files.values()) - {FREQUENCIES}
    if left:
        name = min(left)
        raise WeightsError(
            f"{file.where}: the model has no place for {name!r}. Nearest: "
            f"{nearest(name, names.models)}. Use a file that transformers reads."
        )


def _value(file: GgufFile, model: Any, names: Names, name: str) -> Tensor:
    """A tensor as the model has it, in float32."""
    key, config = names.files[name], model.config
    value = file.tensor(key).float()
    require_finite(f"{file.where}: {key}", value, "Write it again.")
    if paired(file.architecture, key):
        queries = ".attn_q." in key
        heads = config.num_attention_heads if queries else config.num_key_value_heads
        return to_halves(value, heads)
    shifted = file.architecture in SHIFTED and key.endswith("norm.weight")
    return value - 1 if shifted else value


def _files(sizes: Mapping[str, int], most: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, at most so many bytes of them, or one."""
    shards: list[list[str]] = [[]]
    left = most
    for name, size in sizes.items():
        if size > left and shards[-1]:
            shards.append([])
            left = most
        shards[-1].append(name)
        left -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": s for i, s in enumerate(shards, 1)}


def _write_file(path: Path, tensors: Mapping[str, Tensor], value: Callable[[str], Tensor]) -> None:
    """One safetensors file of float32, tensor by tensor."""
    code = next(c for c, dtype in DTYPES.items() if dtype == torch.float32)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * 4
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in tensors:
            numbers: Any = value(name).contiguous().numpy()
            out.write(memoryview(numbers).cast("B"))  # no copy


def _config(path: Path, file: GgufFile) -> Any:
    """The configuration, with the rotary embedding that the file says."""
    if file.fields.get("general.type", "model") != "model":
        raise ArtifactError(
            f"{path} is of general.type {file.fields['general.type']!r}, not a model. Give an "
            "adapter as ADAPTER, beside its base."
        )
    try:
        config = _transformers().AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        raise ArtifactError(
            f"{path}: transformers reads no configuration of architecture {file.architecture!r}: "
            f"{_first(error)}"
        ) from error
    if file.architecture == "llama" and config.model_type != "llama":
        config = _as_llama(config)
    if file.architecture == "gpt2":
        config.n_positions = config.n_ctx  # transformers reads the length into the latter alone
    if scaling := _rotation(file, config):
        config.rope_parameters = {**config.rope_parameters, **scaling}
    return config


def _as_llama(config: Any) -> Any:
    """A file that calls its model "mistral" gets another class of transformers than one of another
    name, with an attention window that the file does not have."""
    other = ("model_type", "architectures", "sliding_window", "transformers_version")
    said = {k: v for k, v in config.to_dict().items() if k not in other}
    return _transformers().LlamaConfig(**said)


def _rotation(file: GgufFile, config: Any) -> dict[str, Any]:
    """How the rotary embedding is scaled, as transformers says it."""
    prefix = f"{file.architecture}.rope.scaling."
    said = {k.removeprefix(prefix): v for k, v in file.fields.items() if k.startswith(prefix)}
    kind = said.pop("type", "none")
    if FREQUENCIES in file.tensors:
        return _factors(file, config)
    if kind == "none":
        return {}
    known = {"factor": "factor", "original_context_length": "original_max_position_embeddings"}
    if kind not in ("linear", "yarn") or "factor" not in said or said.keys() - known:
        raise ArtifactError(
            f"{file.where}: {prefix}type is {kind!r} with {', '.join(sorted(said)) or 'nothing'}, "
            "which transformers does not read. Use the model's Hugging Face directory."
        )
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(said["factor"])}
    return {"rope_type": "yarn", **{known[k]: v for k, v in said.items()}}


def _factors(file: GgufFile, config: Any) -> dict[str, Any]:
    """Llama 3.1's scaling, if the factors of the file are of that kind."""
    factors = file.tensor(FREQUENCIES).double()
    theta, size = float(config.rope_parameters["rope_theta"]), 2 * len(factors)
    lengths = 2 * torch.pi * theta ** (torch.arange(0, size, 2).double() / size)
    low, high, context = _LLAMA3.values()
    smooth = ((context / lengths - low) / (high - low)).clamp(0, 1)
    factor = float(factors.max())
    want = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(want, factors, rtol=1e-4):
        raise ArtifactError(
            f"{file.where}: {FREQUENCIES} holds factors that are not those of Llama 3.1, and "
            "transformers takes no others. Use the model's Hugging Face directory."
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _write_tokenizer(path: Path, model: Any, folder: Path) -> list[str]:
    """Writes the file's tokenizer, if it has one; what to know about it."""
    with opened(path) as file:
        if "tokenizer.ggml.tokens" not in file.fields:
            return ["no tokenizer: the file has none"]
    try:
        auto = _transformers().AutoTokenizer
        tokenizer = auto.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - whatever it is, the model is whole without
        return [f"no tokenizer: transformers cannot read the file's: {_first(error)}"]
    rows = model.config.vocab_size
    if len(tokenizer) > rows:
        return [
            f"the tokenizer has {len(tokenizer)} tokens, {len(tokenizer) - rows} more than rows"
        ]
    return []


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def _transformers() -> Any:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ArtifactError(
            "models in GGUF files need transformers. Get it: pip install 'peftfx[hf,gguf]'."
        ) from error
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers
