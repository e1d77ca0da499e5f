"""Adapters of Hugging Face PEFT: its directories read onto programs, and written from them.

    program = peftfx.load_peft(program, "adapter/")
    peftfx.save_peft(program, "adapter/")

Keys, shapes and formulas are those of PEFT 0.21, measured; what older versions meant by the same
files is told by `peft_version`. A key or an option that is not understood is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.interchange.imported import Imported
from ..rewriter.api import Program
from ..rewriter.branches.parts import Invoked, Part, Trained
from ..rewriter.capture.capture import capture
from ..rewriter.errors import ArtifactError, nearest
from ..rewriter.files.directory import Folder, reading, write_directory
from ..rewriter.files.files import JSON_LIMIT, parse_json, parse_tensors, write_tensors
from ..rewriter.run.run import run
from ..rewriter.storage.artifact import require_finite
from ..rewriter.storage.parts import Parts, of_plan, same
from .adapter_parts import adapter_parts
from .hf_peft_changes import changes, norms, prefixes, prompts, scalings, token_rows
from .hf_peft_config import CONFIG, PREFIX, TENSORS, Config
from .hf_peft_lora import lora_parts
from .hf_peft_writing import VERSION, with_head, written
from .plain_lora import plain_lora

Reader = Callable[[Config, dict[str, Tensor], Program], list[Part]]

_READERS: Mapping[str, tuple[Reader, ...]] = {
    "LORA": (lora_parts, token_rows),
    "ADALORA": (lora_parts, token_rows),
    "IA3": (scalings,),
    "PROMPT_TUNING": (prompts,),
    "P_TUNING": (prompts,),
    "MULTITASK_PROMPT_TUNING": (prompts,),
    "PREFIX_TUNING": (prefixes,),
    "TRAINABLE_TOKENS": (token_rows,),
    "LN_TUNING": (norms,),
    **dict.fromkeys(("LOHA", "LOKR", "VERA", "SHIRA", "MISS", "OFT"), (changes,)),
}

_PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")


def load_peft(
    target: Program | nn.Module, directory: str | Path, name: str = "", **captured: Any
) -> Program:
    """Inserts an adapter that PEFT wrote.

    Args:
        target: a program, or a model to capture (a transformers model with its `dummy_inputs`, any
            other with the arguments of `capture`).
        directory: with `adapter_config.json` and `adapter_model.safetensors`.
        name: of the adapter; by default the directory's name.
        captured: arguments of `capture` for a model.

    Returns:
        A new program; its record names what wrote the adapter.

    Raises:
        ArtifactError: (CorruptFileError, NonFiniteError) a file, key or option that is damaged, not
            understood, or does not fit this model. Nothing is inserted.
        PassError: the program cannot hold a part of it.
    """
    program = target if isinstance(target, Program) else _captured(target, captured)
    parts = read_peft(program, directory)
    invoked = any(isinstance(p, Invoked) for p in parts.parts)
    item = Imported(name=name or name_of(directory), invoked=invoked)
    return run(program, item, sources=[parts])


def save_peft(
    program: Program,
    directory: str | Path,
    adapter: str | Sequence[str] = "",
    *,
    base: str | None = None,
    task: str | None = None,
    plain: bool = False,
    rank: int | None = None,
) -> Mapping[str, float]:
    """Writes an adapter as PEFT does; `peft.PeftModel.from_pretrained` reads it.

    Args:
        program: which holds the adapter unfolded.
        directory: new, empty, or one with an `adapter_config.json` to replace.
        adapter: its name, or several that PEFT has as one, see `adapter_parts`.
        base: name or path of the base model, for the config.
        task: PEFT's `task_type`, such as CAUSAL_LM; of SEQ_CLS and its kind PEFT reads the head
            from the file, so that goes along, trained or not.
        plain: as the one LoRA that serving engines take, see `plain_lora`.
        rank: of plain LoRA.

    Returns:
        What plain LoRA lost: parameter -> share of the change's norm.

    Raises:
        ArtifactError: PEFT has no form for it, or the directory cannot be written; what was there
            stays. NonFiniteError: a tensor holds NaN or infinity.
    """
    parts = adapter_parts(program, adapter)
    read = _unchanged(program, parts.source, parts)
    lost: Mapping[str, float] = {}
    if plain:
        done = plain_lora(program, parts, rank)
        lost = done.lost
        config, tensors = written(program, done.parts)
    elif read is not None and read.original:
        config, tensors = dict(read.config), dict(read.original)
    else:
        config, tensors = written(program, parts)
    said: Mapping[str, Any] = {} if read is None else read.config
    if not plain:
        config, tensors = with_head(program, config, tensors, task or said.get("task_type"))
    for name, tensor in tensors.items():
        require_finite(name, tensor)
    about = {
        "auto_mapping": said.get("auto_mapping"), "inference_mode": True,
        "base_model_name_or_path": base or said.get("base_model_name_or_path"),
        "peft_version": VERSION, "revision": said.get("revision"),
        "task_type": task or said.get("task_type"),
    }  # fmt: skip
    if config["peft_type"] in _PROMPTS and about["task_type"] is None:
        raise ArtifactError(
            f"PEFT uses {config['peft_type']} only with a task_type. Say which: "
            "save_peft(..., task='CAUSAL_LM')."
        )
    text = json.dumps(config | about, indent=2, sort_keys=True, allow_nan=False)
    files = {CONFIG: text.encode(), TENSORS: write_tensors(tensors, {"format": "pt"})}
    write_directory(directory, files, CONFIG)
    return lost


def read_peft(program: Program, directory: str | Path) -> Parts:
    """An adapter of PEFT in parts; see `load_peft`."""
    data, tensors, where = reading(directory, f"a directory with a {CONFIG}", _files)
    config = Config(data, where)
    readers = _READERS.get(config.type)
    if readers is None:
        raise ArtifactError(
            f"{where}: adapters of type {config.type} are not read. Nearest that are: "
            f"{nearest(config.type, _READERS)}. Merge it with PEFT, or convert it to LORA there."
        )
    plain = {_plain(k, where): t for k, t in tensors.items()}
    parts = [part for reader in readers for part in reader(config, plain, program)]
    parts += _whole(config, plain, program)
    config.finish()
    if not parts:
        raise ArtifactError(f"{where}: the adapter holds nothing.")
    source = f"peft {data.get('peft_version') or 'of unknown version'} {config.type}"
    read = Parts(tuple(parts), source, _notes(config), data)
    return read if _says_all(program, read, tensors) else replace(read, original=tensors)


def _says_all(program: Program, parts: Parts, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the parts are written as the tensors that they were read from."""
    try:
        _, again = written(program, parts)
    except ArtifactError:
        return False
    return again.keys() == tensors.keys() and all(
        again[k].dtype == t.dtype and torch.equal(again[k], t) for k, t in tensors.items()
    )


def _unchanged(program: Program, adapter: str, parts: Parts) -> Parts | None:
    """What an adapter was read from, if it still is that."""
    steps = [r for r in program.history if r.adapter == adapter and isinstance(r.applied, Imported)]
    if not steps:
        return None
    read = of_plan(steps[0].plan)
    current = adapter_parts(program, adapter).parts
    wanted = {_key(p): p for p in read.parts}
    equal = len(current) == len(read.parts) and all(
        (w := wanted.get(_key(p))) is not None and same(w, p) for p in current
    )
    return read if equal else None


def _key(part: Part) -> tuple[Any, ...]:
    return part.kind, part.target, getattr(part, "layer", None), getattr(part, "lookup", None)


def _files(folder: Folder) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    where = str(folder.path / CONFIG)
    data = parse_json(folder.read(CONFIG, JSON_LIMIT), where)
    if not isinstance(data, dict) or not isinstance(data.get("peft_type"), str):
        raise ArtifactError(f"{where}: there is no peft_type; it is no config of PEFT.")
    tensors = parse_tensors(folder.read(TENSORS), str(folder.path / TENSORS))
    for name, tensor in tensors.items():
        require_finite(f"{folder.path / TENSORS}: {name}", tensor, "Save it again.")
    return data, tensors, where  # pyright: ignore[reportUnknownVariableType]


def _plain(key: str, where: str) -> str:
    """A key without PEFT's prefix."""
    for prefix in (PREFIX, "base_model."):
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    if key == "prompt_embeddings" or key.startswith("prefix_task_"):
        return key
    raise ArtifactError(
        f"{where}: the key {key!r} does not start with {PREFIX!r}. PEFT would load nothing of it; "
        "rename the keys."
    )


def _whole(config: Config, tensors: dict[str, Tensor], program: Program) -> list[Part]:
    """Parameters that the file has whole (`modules_to_save`, biases, saved embeddings)."""
    base = program.base.base_tensors()
    parts: list[Part] = []
    for key, tensor in tensors.items():
        name = key.replace(".base_layer.", ".")
        stored = program.tensors.stored(name)
        if stored not in base:
            raise ArtifactError(
                f"{config.where}: the key {key!r} belongs to no layer of {config.type} and is no "
                f"parameter of this model. Nearest: {nearest(name, base)}."
            )
        if base[stored].shape == tensor.shape and torch.equal(base[stored].to(tensor), tensor):
            continue  # as the base has it
        parts.append(Trained(name, tensor))
    return parts


def _notes(config: Config) -> tuple[str, ...]:
    notes: list[str] = []
    if config.type in ("LOHA", "LOKR", "SHIRA", "MISS", "OFT"):
        notes.append(f"came in as its exact change: {config.type} is no method here")
    for option in ("velora_config", "monteclora_config"):
        if config.data.get(option):
            notes.append(f"{option} is of training there; here the adapter trains on as LoRA")
    return tuple(notes)


def name_of(path: str | Path) -> str:
    """What to call an adapter that was read from there."""
    stem = Path(path).resolve().name.removesuffix(".safetensors")
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in stem)[:50]
    return stem if stem[:1].isalpha() else f"adapter_{stem}"


def _captured(model: nn.Module, captured: Mapping[str, Any]) -> Program:
    if captured:
        return capture(model, **captured)
    inputs = getattr(model, "dummy_inputs", None)
    if not isinstance(inputs, Mapping):
        raise ArtifactError(
            f"{type(model).__name__} has no dummy_inputs, so how to call it is unknown. Capture it "
            "first: load_peft(peftfx.capture(model, (example,)), directory)."
        )
    return capture(model, kwargs=dict(inputs))  # pyright: ignore[reportUnknownArgumentType]
