"""Adapters folded into the files of a model that is neither built nor captured.

Where an adapter changes matrices that linears multiply by, and nothing else reads (`Layout`), its
parts say all that folding needs. Whatever else it holds takes a captured model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..passes.interchange.formula_parts import branches_of
from ..passes.interchange.imported import branch_of
from ..passes.interchange.shared import bound_branch
from ..rewriter.branches.branch import Branch
from ..rewriter.errors import ArtifactError, CorruptFileError, FoldError
from ..rewriter.parts.formula_parts import Formula
from ..rewriter.parts.parts import Change, LowRank, Part, Trained
from ..rewriter.parts.shared_parts import Mixture, Vera
from ..rewriter.program.site_table import Sites
from ..rewriter.program.sites import LinearSite
from ..rewriter.program.tensors import Tensors
from ..rewriter.storage.artifact import Artifact
from ..rewriter.storage.artifact import read as read_artifact
from ..rewriter.storage.folding import LayoutFolder, Rest
from ..rewriter.storage.parts import Parts
from ..rewriter.storage.safetensors_checkpoint import Checkpoint
from ..rewriter.storage.stream import Base
from ..rewriter.tracing.reads import Layout
from .adapter_changes import saved_parts
from .base import Files, checkpoint, require_fit
from .formats import format_of, read_adapter, write_adapter
from .hf_peft.adapter import name_of


def uncaptured(
    layout: Layout, source: Checkpoint, adapter: str | Path, least: float = 0.0, rank: int = 0
) -> tuple[LayoutFolder, Base] | None:
    """How an adapter folds into a checkpoint, and what that has to hold; None where only a captured
    model tells.

    Args:
        layout: of the model.
        source: its checkpoint.
        adapter: of any format that is read.
        least, rank: see `Folding`; what stays is written as a LoRA of PEFT.

    Raises:
        CorruptFileError: the adapter is damaged.
        FoldError: what would stay has no such form.
    """
    base = Base(str(adapter))
    try:
        files = _files(layout, source)
        if format_of(adapter) == "peftfx":
            artifact = read_artifact(adapter)
            parts, base.expected = _parts(artifact), artifact.base
            name = ", ".join(artifact.adapters)
        else:
            parts, name = read_adapter(files, adapter), name_of(adapter)
        if parts is None:
            return None
        require_fit(files, parts, str(adapter))
    except CorruptFileError:
        raise
    except ArtifactError:  # of another model, or of places that files do not tell: capture says it
        return None
    rest = _rest(files, parts, least, rank) if least or rank else None
    folder = _folder(layout, source, files, parts, name, rest)
    return None if folder is None else (folder, base)


def _rest(files: Files, parts: Parts, least: float, rank: int) -> Rest:
    """What is not folded, written as PEFT writes LoRA."""
    whole = [p for p in parts.parts if isinstance(p, Change | Formula)]
    if least and whole:
        raise FoldError(
            f"{whole[0].target}: its change is no LoRA, so it cannot stay beside the weight. Use "
            "mode=residual, or mode=fold."
        )

    def write(folder: Path, factors: Mapping[str, tuple[Tensor, Tensor] | None]) -> None:
        stays = [n for n, pair in factors.items() if pair is None]
        kept = [p for p in parts.parts if files.tensors.stored(p.target) in stays]
        made = [LowRank(n, pair[1], pair[0], 1.0) for n, pair in factors.items() if pair]
        write_adapter(files, Parts((*kept, *made), parts.source), folder, "peft")

    return Rest(least, rank, write)


def _files(layout: Layout, source: Checkpoint) -> Files:
    """The base, with what its calls do with matrices."""
    names = source.places(layout.state_names, layout.aliases, layout.tensors)
    known, mapped = checkpoint(source.directory), source.all_mapped()
    for name, about in source.wholes.items():
        mapped[name] = torch.empty(about.shape, dtype=about.dtype, device="meta")
    stored = {first: mapped[name] for first, name in names.items()}
    sites = tuple(_site(name, stored[name], turned) for name, turned in layout.matrices.items())
    return replace(known, stored=stored, sites=Sites(sites), tensors=Tensors(layout.aliases))


def _site(name: str, weight: Tensor, in_out: bool) -> LinearSite:
    out, size = weight.shape[::-1] if in_out else weight.shape
    return LinearSite(
        id=name, kind="linear", role="", layer=None, stream="", nodes=(), weight=name,
        in_out=in_out, out_features=out, in_features=size,
    )  # fmt: skip


def _parts(artifact: Artifact) -> Parts | None:
    """What one of ours is, where its passes tell without a program, and do nothing else."""
    plain = all(item.adapter for item, _, _ in artifact.steps)
    parts = [part for *_, part in saved_parts(artifact)]
    if not plain or artifact.updated or artifact.dtype is not None or None in parts:
        return None
    return Parts(tuple(p for p in parts if p is not None), "peftfx")


def _folder(
    layout: Layout,
    source: Checkpoint,
    files: Files,
    parts: Parts,
    called: str,
    rest: Rest | None,
) -> LayoutFolder | None:
    branches: dict[str, list[Branch]] = {}
    trained: dict[str, Tensor] = {}
    for part in parts.parts:
        name = files.tensors.stored(part.target)
        if isinstance(part, Trained) and files.tensors.names(name) == [part.target]:
            trained[name] = part.values
            continue
        if name not in layout.matrices:
            return None
        stored = files.stored[name]
        like = torch.empty(0, dtype=torch.promote_types(stored.dtype, torch.float32))
        if isinstance(part, Formula):
            own = branches_of(part, stored.shape[0 if layout.matrices[name] else 1], like)
        elif isinstance(part, Vera | Mixture) and _plain(part) and part.whole():
            own = [bound_branch(part, like)]
        elif isinstance(part, LowRank | Change) and _plain(part):
            own = [branch_of(part, like)]
        else:
            return None
        branches.setdefault(name, []).extend(own)
    return LayoutFolder(layout, source, branches, trained, called, rest)


def _plain(part: Part) -> bool:
    """Whether it is of one matrix, and for all inputs."""
    if not isinstance(part, LowRank):
        return True
    return part.a.dim() == part.b.dim() == 2 and not part.lookup and part.gate is None
