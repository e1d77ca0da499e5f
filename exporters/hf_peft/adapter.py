"""Adapters of Hugging Face PEFT: its directories read onto programs, and written from them.

    program = peftfx.load_peft(program, "adapter/")
    peftfx.save_peft(program, "adapter/")

Keys, shapes and formulas are those of PEFT 0.21, measured; what older versions meant by the same
files is told by `peft_version`. A key or an option that is not understood is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...passes.interchange.imported import Imported
from ...rewriter.api import Program
from ...rewriter.capture.capture import capture
from ...rewriter.errors import (
    ArtifactError,
    BaseMismatchError,
    BaseNeededError,
    PassError,
    RewriteError,
    nearest,
)
from ...rewriter.files.directory import Folder, reading, write_directory
from ...rewriter.files.files import JSON_LIMIT, Content, parse_json, parse_tensors, tensor_pieces
from ...rewriter.files.torch_bin import LIMIT, parse_torch_bin
from ...rewriter.parts.parts import Invoked, Part, Trained
from ...rewriter.program.history import Certificate
from ...rewriter.program.unchanged import require_unchanged
from ...rewriter.run.run import apply_plan
from ...rewriter.storage.artifact import require_finite
from ...rewriter.storage.card import CARD, is_ours, short_card
from ...rewriter.storage.parts import Parts
from ...rewriter.verify.verify import check_graph
from ..adapter_parts import adapter_parts, unchanged
from ..base import GIVE_BASE, Base, fitting, snapshot
from ..plain_lora import plain_lora
from .changes import biases, norms, prefixes, prompts, scalings, token_rows
from .config import CONFIG, PICKLED, PREFIX, TENSORS, Config
from .formulas import changes
from .lora import lora_parts
from .products import products
from .shared import vector_bank
from .writing import VERSION, with_head, written

Reader = Callable[[Config, dict[str, Tensor], Base], list[Part]]

_CHANGES = ("SHIRA", "MISS", "HIRA", "HRA", "C3A")
"""Types that come in as their exact change."""

READERS: Mapping[str, tuple[Reader, ...]] = {
    "LORA": (lora_parts, token_rows),
    "ADALORA": (lora_parts, token_rows),
    "IA3": (scalings,),
    "PROMPT_TUNING": (prompts,),
    "P_TUNING": (prompts,),
    "MULTITASK_PROMPT_TUNING": (prompts,),
    "PREFIX_TUNING": (prefixes,),
    "CARTRIDGE": (prefixes,),
    "VBLORA": (vector_bank,),
    "BEFT": (biases,),
    "TRAINABLE_TOKENS": (token_rows,),
    "LN_TUNING": (norms,),
    **dict.fromkeys(("VERA", "DELORA", *_CHANGES), (changes,)),
    **dict.fromkeys(("LOHA", "LOKR", "OFT", "BOFT"), (products,)),
}

_MERGE = "no formula of it is known here. Merge it there (merge_and_unload), and take that model"
_STAYS = "{}, so no file of weights holds it. Use it with PEFT, or train one of the others"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "ADAMSS", "DEFT", "FOURIERFT", "FROD", "GLORA", "GRALORA", "OSF", "PEANUT", "PSOFT",
            "PVERA", "RANDLORA", "ROAD", "SUPERTUNING", "TINYLORA", "UNILORA", "WAVEFT",
        ), _MERGE,
    ),
    "ADAPTION_PROMPT": _STAYS.format("its layers attend to rows of their own behind a gate"),
    "CPT": _STAYS.format("it wraps each input in tokens of a context"),
    "LILY": _STAYS.format("a router mixes its factors for each input"),
    "POLY": _STAYS.format("a router mixes its factors by an id that each call gives"),
    "SHADOW": _STAYS.format("a small model of its own runs beside the layers"),
    "XLORA": _STAYS.format("the input says how much of each of its LoRAs is used")
    + "; its LoRAs are read one by one",
}  # fmt: skip
"""Types that are not read -> why, and what to do instead."""

UNMEASURED = "as read, not measured here"
"""The certificate of an adapter from another library."""

_PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CARTRIDGE")


def load_peft(
    target: Program | nn.Module, directory: str | Path, name: str = "", **captured: Any
) -> Program:
    """Inserts an adapter that PEFT wrote.

    Args:
        target: a program, or a model to capture (a transformers model with its `dummy_inputs`, any
            other with the arguments of `capture`).
        directory: with `adapter_config.json` and `adapter_model.safetensors`, or `.bin`.
        name: of the adapter; by default the directory's name.
        captured: arguments of `capture` for a model.

    Returns:
        A new program; its record names what wrote the adapter. `program.verify()` measures it.

    Raises:
        ArtifactError: (CorruptFileError, NonFiniteError) a file, key or option that is damaged, not
            understood, or (BaseMismatchError) does not fit this model. Nothing is inserted.
        PassError: the program cannot hold a part of it.
    """
    program = target if isinstance(target, Program) else _captured(target, captured)
    parts = read_peft(program, directory)
    with fitting(directory):
        return inserted(program, parts, name or name_of(directory))


def inserted(program: Program, parts: Parts, name: str) -> Program:
    """A program with an adapter that was read from a file.

    As of saved adapters that are loaded, what it promises is not measured: `program.verify()` does.

    Raises:
        PassError: the program cannot hold a part of it.
    """
    require_unchanged(program)
    if name in program.adapters:
        raise PassError(
            f"the program has an adapter {name!r} already. Give this one another name, such as "
            f"name={name + '_2'!r}."
        )
    if parts.original and _says_all(program, parts):
        parts = replace(parts, original={})
    item = Imported(name=name, invoked=any(isinstance(p, Invoked) for p in parts.parts))
    result = apply_plan(program, item, item.plan(program, sources=[parts]), check=False)
    check_graph(result)
    record = replace(result.history[-1], certificate=Certificate(UNMEASURED))
    return replace(result, history=(*program.history, record))


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
    read = unchanged(program, parts)
    return write_peft(program, parts, directory, read, base=base, task=task, plain=plain, rank=rank)


def write_peft(
    program: Base,
    parts: Parts,
    directory: str | Path,
    read: Parts | None = None,
    *,
    base: str | None = None,
    task: str | None = None,
    plain: bool = False,
    rank: int | None = None,
) -> Mapping[str, float]:
    """Writes parts as an adapter of PEFT; see `save_peft`.

    Args:
        program: the base that the parts are of, captured or in files.
        parts: of an adapter.
        directory: see `save_peft`, as are all further arguments but the next one.
        read: the parts as they were read from a file, if they are still the same.
    """
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
    files: dict[str, Content] = {
        CONFIG: text.encode(),
        TENSORS: tensor_pieces(tensors, {"format": "pt"}),
    }
    if is_ours(directory):
        named = str(about["base_model_name_or_path"] or "")
        files[CARD] = short_card(f"{config['peft_type']} adapter", "peft", named).encode()
    write_directory(directory, files, CONFIG)
    return lost


def read_peft(program: Base, directory: str | Path) -> Parts:
    """An adapter of PEFT in parts; see `load_peft`."""
    return peft_parts(program, *reading(directory, f"a directory with a {CONFIG}", peft_files))


def peft_parts(
    program: Base, data: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> Parts:
    """The same of what its files hold, or of some of the tensors."""
    program = snapshot(program)
    config = Config(data, where)
    readers = READERS.get(config.type)
    if readers is None:
        if config.type in REFUSED:
            why = REFUSED[config.type]
            raise ArtifactError(f"{where}: adapters of type {config.type} are not read: {why}.")
        raise ArtifactError(
            f"{where}: adapters of type {config.type} are not read. Nearest that are: "
            f"{nearest(config.type, READERS)}. Merge it with PEFT, or convert it to LORA there."
        )
    plain = {_plain(k, where): t for k, t in tensors.items()}
    parts = [part for reader in readers for part in _parts(reader, config, plain, program)]
    parts += _whole(config, plain, program)
    config.finish()
    if not parts:
        raise ArtifactError(f"{where}: the adapter holds nothing.")
    source = f"peft {data.get('peft_version') or 'of unknown version'} {config.type}"
    return Parts(tuple(parts), source, _notes(config), dict(data), dict(tensors))


def _parts(reader: Reader, config: Config, tensors: dict[str, Tensor], program: Base) -> list[Part]:
    """What a reader takes; shapes that no formula fits are an error of the file."""
    try:
        return reader(config, tensors, program)
    except RewriteError:
        raise
    except (RuntimeError, LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise ArtifactError(
            f"{config.where}: its tensors or options are not those of {config.type} "
            f"({str(error).splitlines()[0][:200]}). Save the adapter again with PEFT."
        ) from error


def _says_all(program: Program, parts: Parts) -> bool:
    """Whether the parts are written as the tensors that they were read from."""
    tensors = parts.original
    try:
        _, again = written(program, parts)
    except ArtifactError:
        return False
    return again.keys() == tensors.keys() and all(
        again[k].dtype == t.dtype and torch.equal(_comparable(again[k]), _comparable(t))
        for k, t in tensors.items()
    )


def _comparable(tensor: Tensor) -> Tensor:
    """Numbers of 8 bits as integers: torch compares no others of that size."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 and tensor.dim() else tensor


def peft_files(folder: Folder) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """The config, the tensors, and where they are.

    Raises:
        ArtifactError: (CorruptFileError, NonFiniteError) they are damaged, or not of PEFT.
    """
    where = str(folder.path / CONFIG)
    data = parse_json(folder.read(CONFIG, JSON_LIMIT), where)
    if not isinstance(data, dict) or not isinstance(data.get("peft_type"), str):
        raise ArtifactError(f"{where}: there is no peft_type; it is no config of PEFT.")
    old = not folder.has(TENSORS) and folder.has(PICKLED)
    file, parse, limit = (
        (PICKLED, parse_torch_bin, LIMIT) if old else (TENSORS, parse_tensors, None)
    )
    path = str(folder.path / file)
    tensors = parse(folder.read(file, limit), path)
    for name, tensor in tensors.items():
        require_finite(f"{path}: {name}", tensor, "Save it again.")
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


def _whole(config: Config, tensors: dict[str, Tensor], program: Base) -> list[Part]:
    """Parameters that the file has whole (`modules_to_save`, biases, saved embeddings)."""
    base, known = program.base.base_tensors(), snapshot(program).knows != "sizes"
    parts: list[Part] = []
    for key, tensor in tensors.items():
        name = key.replace(".base_layer.", ".")
        stored = program.tensors.stored(name)
        own = base.get(stored)
        if not known:
            raise BaseNeededError(
                f"{config.where}: whether {key!r} is as the base has it, depends on its numbers. "
                f"{GIVE_BASE}"
            )
        if own is None:
            raise BaseMismatchError(
                f"{config.where}: the key {key!r} belongs to no layer of {config.type} and is no "
                f"parameter of this model. Nearest: {nearest(name, base)}. Use the base that the "
                "adapter was trained on."
            )
        if _same_values(own, tensor):
            continue  # as the base has it
        parts.append(Trained(name, tensor))
    return parts


def _same_values(own: Tensor, tensor: Tensor) -> bool:
    if own.is_meta or own.shape != tensor.shape:
        return False
    return torch.equal(own.to(tensor), tensor)


def _notes(config: Config) -> tuple[str, ...]:
    notes: list[str] = []
    if config.type in _CHANGES:
        notes.append(f"came in as its exact change: {config.type} is no method here")
    for option in ("velora_config", "monteclora_config"):
        if config.data.get(option):
            notes.append(f"{option} is of training there; here the adapter trains on as LoRA")
    return tuple(notes)


def name_of(path: str | Path) -> str:
    """What to call an adapter that was read from there."""
    stem = re.sub(r"\.(safetensors|gguf|onnx_adapter)$", "", Path(path).resolve().name)
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
