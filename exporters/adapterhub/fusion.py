"""AdapterHub's fusions: directories that hold several adapters and how they are fused.

adapter_setup.json              {"adapter_setup": {"type": "Fuse", "children": [...]}}
NAME/                           each adapter, see `adapterhub`
NAME,NAME/                      the fusion: `...adapter_fusion_layer.NAME,NAME.query.weight`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ...passes.interchange.imported import Imported
from ...rewriter.api import Program
from ...rewriter.branches.branch import Branch
from ...rewriter.errors import ArtifactError
from ...rewriter.files.directory import Folder, new_directory, reading
from ...rewriter.parts.parts import Bottleneck, Fusion, Part
from ...rewriter.run.run import run
from ...rewriter.storage.parts import Parts
from ..adapter_parts import adapter_parts, unchanged
from ..base import fitting
from .config import FUSION, FUSION_CONFIG, SAFE_FUSION, SETUP, VERSION
from .files import (
    adapter_files,
    json_bytes,
    json_in,
    read_adapterhub,
    tensors_bytes,
    tensors_in,
)
from .places import Places, attentions, sublayer_path
from .reading import grouped


def is_setup(directory: Path) -> bool:
    """Whether a directory holds several adapters and their fusion, or a fusion alone."""
    return (directory / SETUP).is_file() or (directory / FUSION_CONFIG).is_file()


def load_setup(program: Program, directory: str | Path, name: str) -> Program:
    """Loads what `save_adapter_setup` wrote, or a fusion of adapters that are there already.

    Raises:
        ArtifactError: see `read_adapterhub`; or it composes adapters in another way.
    """
    folder = Path(directory)
    if not (folder / SETUP).is_file():
        return run(program, Imported(name=name), sources=[_read_fusion(program, folder)])
    setup = reading(folder, f"a directory with a {SETUP}", lambda f: json_in(f, SETUP))
    members = _members(setup.get("adapter_setup"), str(folder / SETUP))
    for member in members:
        parts = read_adapterhub(program, folder / member)
        with fitting(folder / member):
            program = run(program, item_of(program, member, parts), sources=[parts])
    fusion = _read_fusion(program, folder / ",".join(members))
    return run(program, Imported(name=name), sources=[fusion])


def item_of(program: Program, name: str, parts: Parts) -> Imported:
    """The pass that inserts an adapter: gates in causal models look ahead."""
    gated = any(getattr(p, "gate", None) is not None for p in parts.parts)
    return Imported(name=name, ahead=gated and any(s.causal for s in attentions(program)))


def _members(setup: Any, where: str) -> list[str]:
    kind = setup.get("type") if isinstance(setup, dict) else None
    children: Any = setup.get("children") if kind == "Fuse" else None
    names = [_single(c) for c in children] if isinstance(children, list) else []
    if len(names) < 2 or not all(n and "/" not in n and n[:1] != "." for n in names):
        raise ArtifactError(
            f"{where}: the setup {kind!r} is not read. Read are fusions of adapters (Fuse); load "
            "the adapters of another one by one."
        )
    return names


def _single(child: Any) -> str:
    """The adapter that a child of a setup is; '' if it is none alone."""
    match child:
        case {"type": "single", "children": [str(name)]}:
            return name
        case _:
            return ""


def _read_fusion(program: Program, folder: Path) -> Parts:
    return reading(folder, f"a directory with a {FUSION_CONFIG}", lambda f: _fusion(program, f))


_FUSED = {
    "key": True, "query": True, "value": True, "query_before_ln": False, "residual_before": False,
    "temperature": False, "value_before_softmax": True,
}  # fmt: skip
"""The options of the fusion that is read, beside those of training."""


_TENSORS = ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
"""Of one sublayer, in the order of `Fusion`."""


def _fusion(program: Program, folder: Folder) -> Parts:
    where = str(folder.path / FUSION_CONFIG)
    data = json_in(folder, FUSION_CONFIG)
    config, name = data.get("config"), str(data.get("name") or "")
    if not isinstance(config, dict):
        raise ArtifactError(f"{where}: `config` is {config!r}, and must hold the options.")
    inert = {"dropout_prob", "regularization", "value_initialized"}
    for key, value in config.items():
        free = key in inert or (key == "value_before_softmax" and isinstance(value, bool))
        if not free and _FUSED.get(str(key)) is not value:
            raise ArtifactError(
                f"{where}: {key}={value!r} is not read: the fusion here has a query, keys and "
                "values, and its temperature is 1. Use it with the library."
            )
    tensors = tensors_in(folder, SAFE_FUSION, FUSION)
    file = grouped(tensors, name, where)
    groups = file.take("adapter_fusion_layer")
    file.finish()
    paths = [p.removesuffix(".attention_adapters").removesuffix(".output_adapters") for p in groups]
    places = Places(program, paths, where)
    parts: list[Part] = []
    read = _query_value(program, name.split(","), where)
    for path, leaves in groups.items():
        if odd := sorted(leaves.keys() ^ {*_TENSORS}):
            raise ArtifactError(
                f"{where}: {path} lacks or has too much of {odd[0]!r}. Save it again."
            )
        q, q_bias, k, k_bias, v = (leaves[n] for n in _TENSORS)
        parts.append(Fusion(places.sublayer(path), name, q, q_bias, k, k_bias, v, read))
    source = f"adapterhub {data.get('version') or 'of unknown version'} fusion"
    return Parts(tuple(parts), source, (), {"fusion": data})


def _query_value(program: Program, members: list[str], where: str) -> str:
    """What the members read, and the query, too.

    The library gives all members what the last one would read, and leaves their gates out.
    """
    values: dict[str, set[str]] = {m: set() for m in members}
    for attachment in (a for a in program.attachments if a.adapter in values):
        branch = program.branch(attachment)
        part = branch.part() if isinstance(branch, Branch) else None
        if not isinstance(part, Bottleneck) or part.skips != "output" or "gate" in attachment.reads:
            raise ArtifactError(
                f"{where}: {attachment.adapter!r} at {attachment.site} is no adapter that can be "
                "fused here: one without gate, which skips to the sublayer's output. Use it alone."
            )
        values[attachment.adapter].add(part.reads)
    for member, read in values.items():
        if not read:
            raise ArtifactError(
                f"{where}: the fusion is of the adapters {', '.join(members)}, and {member!r} is "
                "not in the program. Load them first, under these names."
            )
    every = set[str]().union(*values.values())
    if len(every) > 1:
        raise ArtifactError(
            f"{where}: the members read {' and '.join(sorted(every))}; the library would give all "
            "of them what the last one reads. Use adapters of one kind."
        )
    return every.pop()


def save_setup(program: Program, directory: str | Path, parts: Parts) -> None:
    """Writes a fusion with its members; see `save_adapterhub`."""
    fusions = [p for p in parts.parts if isinstance(p, Fusion)]
    if len(fusions) < len(parts.parts):
        raise ArtifactError(f"{parts.source}: AdapterHub's fusions hold nothing but the fusion.")
    name = fusions[0].members
    files = {
        f"{m}/{file}": content
        for m in name.split(",")
        for file, content in adapter_files(program, adapter_parts(program, m, beside=True)).items()
    }
    read = unchanged(program, parts)
    config = dict.fromkeys(("dropout_prob",)) | {"regularization": True, "value_initialized": True}
    about: dict[str, Any] = {
        "config": {**_FUSED, **config}, "name": name, "adapter_names": name.split(","),
        "version": VERSION, "hidden_size": len(fusions[0].query), "model_class": "",
        "model_name": "", "model_type": "",
    }  # fmt: skip
    data = about if read is None else read.config["fusion"]
    single = [{"type": "single", "children": [m]} for m in name.split(",")]
    setup = {"adapter_setup": {"type": "Fuse", "children": single}, "head_setup": None}
    files |= {
        SETUP: json_bytes({**setup, "version": VERSION}),
        f"{name}/{FUSION_CONFIG}": json_bytes(data),
        f"{name}/{FUSION}": tensors_bytes(_fusion_tensors(program, fusions)),
    }
    with new_directory(directory, SETUP) as fresh:
        for file, content in files.items():
            (fresh / file).parent.mkdir(exist_ok=True)
            (fresh / file).write_bytes(content)


def _fusion_tensors(program: Program, fusions: list[Fusion]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part in fusions:
        path = sublayer_path(program, part.target).removesuffix(".adapters")
        start = f"{path}.adapter_fusion_layer.{part.members}"
        weights = (part.query, part.query_bias, part.key, part.key_bias, part.value)
        tensors |= {f"{start}.{k}": t for k, t in zip(_TENSORS, weights, strict=True)}
    return tensors
