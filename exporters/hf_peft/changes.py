"""Parts of PEFT's other tensors: scalings, prompts, prefixes, rows, biases, whole parameters."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ...passes.interchange.prompt_parts import prefix_sites
from ...rewriter.errors import ArtifactError, BaseMismatchError
from ...rewriter.parts.parts import Part, Prefix, Prompt, Rows, Scaling, Trained
from ..base import Base, snapshot, values
from .config import Config, by_module


def scalings(config: Config, tensors: dict[str, Tensor], program: Base) -> list[Part]:
    """IA3: `ia3_l [out, 1]` times the outputs, or `[1, in]` the inputs of feedforward modules."""
    inputs = config.take("feedforward_modules", [], list, str)
    parts: list[Part] = []
    for path, leaves in by_module(tensors, ["ia3_l"]).items():
        vector = leaves["ia3_l"]
        del tensors[f"{path}.ia3_l"]
        at_input = vector.dim() > 1 and vector.shape[0] == 1 and vector.shape[1] > 1
        if vector.numel() == 1:
            at_input = _targeted(inputs, path)
        parts.append(
            Scaling(weight_of(program, path, config), vector.flatten(), ("out", "in")[at_input])
        )
    return parts


def _targeted(modules: list[str] | str, path: str) -> bool:
    """Whether PEFT takes a module for one of these."""
    if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
    return any(path == m or path.endswith(f".{m}") for m in modules)


def prompts(config: Config, tensors: dict[str, Tensor], program: Base) -> list[Part]:
    """PROMPT_TUNING and P_TUNING: `prompt_embeddings [length, width]`, the encoder's output.
    MULTITASK_PROMPT_TUNING: times a matrix a task, `sum over ranks of cols x rows`."""
    rows = _embeddings(config, tensors)
    length = int(config.take("num_virtual_tokens", 0))
    submodules = int(config.take("num_transformer_submodules", 1))
    tasks = int(config.take("num_tasks", 1))
    if config.type == "MULTITASK_PROMPT_TUNING":
        columns, wide = (tensors.pop(f"prefix_task_{n}", None) for n in ("cols", "rows"))
        if columns is None or wide is None or tasks != 1:
            raise ArtifactError(
                f"{config.where}: it holds prompts of {tasks} tasks, and a program one. Write the "
                "prompt of one task with the library that made it."
            )
        rows = rows * (columns[0] @ wide[0])
    if submodules != 1 or len(rows) != length:
        raise ArtifactError(
            f"{config.where}: {len(rows)} rows for {length} tokens in {submodules} submodules: "
            "only prompts of models with one stack are read."
        )
    return [Prompt("", rows)]


def prefixes(config: Config, tensors: dict[str, Tensor], program: Base) -> list[Part]:
    """PREFIX_TUNING: `[length, layers * 2 * kv_heads * width]`, keys, values by layer.

    Of an encoder-decoder PEFT 0.21 makes two copies, of which every other pair goes to the
    decoder's own attention, the rest nowhere: layer l has pair `2 l` modulo the number of layers.
    """
    rows = _embeddings(config, tensors)
    decoder = int(config.take("num_transformer_submodules", 1)) == 2
    place = "decoder" if decoder else "stack"
    sites = prefix_sites(program.sites)[place]
    length, layers = int(config.take("num_virtual_tokens", 0)), int(config.take("num_layers", 0))
    heads = int(config.data.get("num_attention_heads") or 0)
    if layers < 1 or heads < 1 or rows.shape[0] != length or rows.shape[1] % (2 * layers * heads):
        raise ArtifactError(
            f"{config.where}: prompt_embeddings is {tuple(rows.shape)}, which is not {length} "
            f"tokens of {layers} layers and {heads} heads."
        )
    stack = rows.view(length, layers, 2, heads, -1)
    if decoder and len(sites) > layers:
        raise BaseMismatchError(
            f"{config.where}: the prefix is of {layers} layers, and this model's decoder has "
            f"{len(sites)}. Use the base that the adapter was trained on."
        )
    count = len(sites) or layers if decoder else layers
    pairs = [2 * i % layers if decoder else i for i in range(count)]
    return [Prefix("", stack[:, p, 0], stack[:, p, 1], i, place=place) for i, p in enumerate(pairs)]


def _embeddings(config: Config, tensors: dict[str, Tensor]) -> Tensor:
    rows = tensors.pop("prompt_embeddings", None)
    if rows is None or rows.dim() != 2:
        raise ArtifactError(f"{config.where}: prompt_embeddings is missing, or no matrix.")
    return rows


def token_rows(config: Config, tensors: dict[str, Tensor], program: Base) -> list[Part]:
    """Trained rows of a table: `trainable_tokens_delta [count, width]`, no differences."""
    said = config.take("token_indices", None, list)
    said = said or config.take("trainable_token_indices", None, list, dict)
    parts: list[Part] = []
    leaf = "trainable_tokens_delta"
    for path, leaves in by_module(tensors, [f"token_adapter.{leaf}", leaf]).items():
        ((name, rows),) = leaves.items()
        del tensors[f"{path}.{name}"]
        ids = _ids(said, path) if isinstance(said, Mapping) else said
        if not ids or len(ids) != len(rows):
            raise ArtifactError(
                f"{config.where}: {path} has {len(rows)} trained rows, and the config names "
                f"{len(ids or ())} tokens."
            )
        name = weight_of(program, path, config)
        stored = program.tensors.stored(name)
        known = next((p for p in parts if p.target == stored), None)
        if isinstance(known, Rows):
            if not torch.equal(known.values, rows):
                raise ArtifactError(
                    f"{config.where}: {path} has other rows than {stored}, its tie."
                )
            continue
        parts.append(Rows(stored, torch.tensor(ids), rows))
    return parts


def _ids(said: Mapping[str, list[int]], path: str) -> list[int]:
    return next((i for k, i in said.items() if path == k or path.endswith(f".{k}")), [])


def norms(config: Config, tensors: dict[str, Tensor], program: Base) -> list[Part]:
    """LN_TUNING: whole copies of what a normalisation learns."""
    parts: list[Part] = []
    for key in [k for k in tensors if ".ln_tuning_layers." in k]:
        parts.append(Trained(key.replace(".ln_tuning_layers.", "."), tensors.pop(key)))
    return parts


def biases(config: Config, tensors: dict[str, Tensor], program: Base) -> list[Part]:
    """BEFT: `beft_bias [1, out]` added to what a layer gives, whose bias it joins."""
    parts: list[Part] = []
    for path, leaves in by_module(tensors, ["beft_bias"]).items():
        del tensors[f"{path}.beft_bias"]
        weight, vector = weight_of(program, path, config), leaves["beft_bias"].flatten()
        parts.append(bias_with(program, weight, vector.float()))
    return parts


def bias_with(program: Base, weight: str, change: Tensor) -> Part:
    """The layer's bias with that of `lora_B` added; it may have had none."""
    name = weight.removesuffix("weight") + "bias"
    if name not in program.base.base_tensors() and snapshot(program).knows != "sizes":
        return Trained(name, change)
    own = values(program, name, f"the bias of {weight}")
    return Trained(name, own.float() + change)


def weight_of(program: Base, path: str, config: Config) -> str:
    """The weight of a module that an adapter's key names.

    Raises:
        ArtifactError: this model has none.
    """
    plain = re.sub(r"(^|\.)base_layer(?=\.|$)", "", path)
    names = program.base.base_tensors().keys() | program.tensors.aliases.keys()
    if f"{plain}.weight" not in names:
        raise no_module(config, plain, names)
    return f"{plain}.weight"


def no_module(config: Config, module: str, names: Collection[str]) -> ArtifactError:
    """The error for a module that the model has not, with what is in its place: the adapter may be
    of a version of the architecture whose projections are fused, or apart."""
    parent = module.rpartition(".")[0]
    beside = {n.removeprefix(f"{parent}.").partition(".")[0] for n in names
              if parent and n.startswith(f"{parent}.")}  # fmt: skip
    there = ""
    if beside:
        there = (
            f"; {parent} has {', '.join(sorted(beside)[:8])}, and where those are the same "
            "projections fused or apart, it is another version of the architecture"
        )
    return BaseMismatchError(
        f"{config.where}: the adapter changes {module!r}, and this model has no such module with a "
        f"weight{there}. Use the base that it was trained on."
    )


def require_depth(config: Config, program: Base) -> None:
    """Raises BaseMismatchError where PEFT repeats layers of the base, and this model does not have
    as many of them, each with weights of its own."""
    asked: Any = config.take("layer_replication", None, list)
    if not asked:
        return
    try:
        count = sum(int(end) - int(start) for start, end in asked)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"{config.where}: layer_replication={asked!r} is no list of [start, end]. Save the "
            "adapter again."
        ) from error
    found = (_LAYER.search(n) for n in program.base.base_tensors())
    here = 1 + max((int(m[1]) for m in found if m), default=-1)
    aliases = program.tensors.aliases.items()
    shared = [n for n, first in aliases if _LAYER.search(n) and _LAYER.search(first)]
    told = snapshot(program).knows != "sizes"  # else of the layers that have adapters alone
    if not shared and (here == count or (here <= count and not told)):
        return
    have = f"shares weights of its layers ({shared[0]})" if shared else f"has {here} layers"
    raise BaseMismatchError(
        f"{config.where}: layer_replication={asked} makes a model of {count} layers of the base, "
        f"whose adapters these are, and this model {have}. Repeat them before the capture: "
        f"layers = [copy.deepcopy(model.model.layers[i]) for a, b in {asked} "
        "for i in range(a, b)]; model.model.layers = nn.ModuleList(layers); "
        f"model.config.num_hidden_layers = {count}; in each layer i, self_attn.layer_idx = i."
    )


_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h)\.(\d+)\.")
"""The names that PEFT looks for when it repeats layers."""
