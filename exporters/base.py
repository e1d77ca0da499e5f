"""What readers and writers of adapters ask of a model; its files answer that without the model.

A program is a base. So is a checkpoint: headers give names and shapes, and values are read from the
file where a formula needs them (norms for DoRA). And so are an adapter's own factors, which say how
large the weights beside them are, and no more.

What calls do with a tensor, files do not say: each matrix is offered as a product and as a table of
rows, each larger one as a convolution.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..rewriter.api import Program
from ..rewriter.errors import (
    BaseMismatchError,
    BaseNeededError,
    CorruptFileError,
    nearest,
)
from ..rewriter.files.files import JSON_LIMIT, parse_json, read_file
from ..rewriter.parts.formula_parts import Formula
from ..rewriter.parts.parts import Change, LowRank, Part, Rows, Scaling, Trained
from ..rewriter.program.site_table import Sites
from ..rewriter.program.sites import ConvSite, EmbeddingSite, LinearSite, NormSite, Site
from ..rewriter.program.tensors import Tensors
from ..rewriter.storage.parts import Parts
from ..rewriter.storage.safetensors_checkpoint import Checkpoint, Entry

GIVE_BASE = "Give the base: --base with its directory, or base=checkpoint(directory)."
CAPTURE = "Capture the model: --base MODEL --capture, or load the adapter onto a program."


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Files:
    """A base made of files.

    Attributes:
        stored: the tensors by name, mapped from their file; on meta, where only sizes are known.
        sites: what calls read them, or may.
        tensors: other names of tied ones.
        knows: `calls` of a captured model, its `tensors`, or the `sizes` of some.
        model: the name of its class, '' if nothing says it.
        head_dim: the width of an attention's heads, 0 if nothing says it.
    """

    stored: Mapping[str, Tensor]
    sites: Sites
    tensors: Tensors = field(default_factory=Tensors)
    knows: str = "tensors"
    model: str = ""
    head_dim: int = 0

    @property
    def base(self) -> Files:
        return self

    def base_tensors(self) -> Mapping[str, Tensor]:
        return self.stored


Base = Program | Files
"""A model, as far as its adapters' files are concerned: `base.base_tensors()` is what it stores (on
meta, where its values are not known), `tensors` has other names, `sites` the calls."""


def checkpoint(directory: str | Path, in_out: bool = False) -> Files:
    """The base that a directory of safetensors files holds; reads their headers.

    Args:
        directory: of a model, with its `config.json` if it has tied weights.
        in_out: matrices are stored `[in, out]` (PEFT's `fan_in_fan_out`).

    Raises:
        ArtifactError: (CorruptFileError) there is no checkpoint, or it is damaged.
    """
    files = Checkpoint.read(directory)
    stored = files.all_mapped()
    config = _config(Path(directory))
    table = Tensors(aliases=_tied(config, stored))
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    head_dim = config.get("head_dim")
    if not head_dim and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        head_dim = width // heads
    classes = config.get("architectures") or [""]
    return Files(
        stored, Sites(tuple(_sites(stored, in_out))), table, model=str(classes[0]),
        head_dim=head_dim if isinstance(head_dim, int) else 0,
    )  # fmt: skip


def tied_names(directory: Path, files: Checkpoint) -> Mapping[str, str]:
    """Other names of a checkpoint's tensors, by what its configuration says: name -> stored."""
    return _tied(_config(directory), files.entries)


def _config(directory: Path) -> Mapping[str, Any]:
    if not (directory / "config.json").is_file():
        return {}
    where = str(directory / "config.json")
    config = parse_json(read_file(where, JSON_LIMIT), where)
    if not isinstance(config, dict):
        raise CorruptFileError(f"{where} is no JSON object. Save the model again.")
    return config  # pyright: ignore[reportUnknownVariableType]


def sizes(shapes: Mapping[str, Shape], in_out: bool = False) -> Files:
    """The base as far as low-rank factors tell it: one meta tensor beside each pair.

    Args:
        shapes: of an adapter's tensors, by key.
        in_out: see `checkpoint`.
    """
    stored: dict[str, Tensor] = {}
    for key, narrow in shapes.items():
        leaf = next((n for n in _PAIRS if key.endswith(f".{n}")), "")
        wide = shapes.get(f"{key.removesuffix(leaf)}{_PAIRS.get(leaf)}", ())
        if len(narrow) > 1 and len(wide) > 1:
            shape = _beside(leaf, narrow, wide, in_out)
            for path in _paths(key.removesuffix(f".{leaf}")):
                stored[f"{path}.weight"] = torch.empty(shape, device="meta")
    for key in shapes:
        path, _, leaf = key.rpartition(".")
        if leaf in ("hada_w1_a", "lokr_w1", "lokr_w1_a") and (shape := _product(path, shapes)):
            for name in _paths(path):
                stored[f"{name}.weight"] = torch.empty(shape, device="meta")
    return Files(stored, Sites(tuple(_sites(stored, in_out))), knows="sizes")


def _product(path: str, shapes: Mapping[str, Shape]) -> Shape:
    """The shape of the weight beside LoHa's or LoKr's factors; () where these do not tell."""

    def side(name: str) -> Shape:
        whole, first, second = (shapes.get(f"{path}.{name}{end}", ()) for end in ("", "_a", "_b"))
        return whole or ((first[0], second[1]) if len(first) == len(second) == 2 else ())

    if any(f"{path}.{name}" in shapes for name in ("hada_t1", "lokr_t2")):
        return ()
    left, right = side("lokr_w1"), side("lokr_w2")
    if len(left) == len(right) == 2:
        return left[0] * right[0], left[1] * right[1]
    return side("hada_w1")


_PAIRS = {
    "lora_A.weight": "lora_B.weight", "lora_A": "lora_B", "lora_a": "lora_b",
    "lora_embedding_A": "lora_embedding_B",
}  # fmt: skip
"""Leaf of the factor that reads -> of the one that writes."""


def _beside(leaf: str, narrow: Shape, wide: Shape, in_out: bool) -> Shape:
    """The shape of the weight beside two factors."""
    if leaf == "lora_a":  # transposed: [in, rank], [rank, out]
        return wide[1], narrow[0]
    if leaf == "lora_embedding_A" or (in_out and len(narrow) == 2):
        return narrow[1], wide[0]
    return wide[0], *narrow[1:]


def _paths(path: str) -> Iterator[str]:
    """What a module may be called: without the name of the library, or of the component."""
    for prefix in ("base_model.model.", "base_model."):
        if path.startswith(prefix):
            yield path.removeprefix(prefix)
            return
    yield path
    if "." in path:
        yield path.partition(".")[2]


def _sites(stored: Mapping[str, Tensor], in_out: bool) -> Iterator[Site]:
    for name, tensor in stored.items():
        shape = tuple(tensor.shape)
        about: dict[str, Any] = {"layer": None, "stream": "", "nodes": (), "weight": name}
        if len(shape) == 1 and name.endswith(".weight"):
            yield NormSite(id=name, kind="norm", role="norm", **about)
        if len(shape) == 2:
            rows, columns = shape
            out, inner = (columns, rows) if in_out else (rows, columns)
            yield LinearSite(
                id=name, kind="linear", role="", in_out=in_out, out_features=out, in_features=inner,
                **about,
            )  # fmt: skip
            yield EmbeddingSite(
                id=f"{name}:rows", kind="embedding", role="", size=rows, width=columns, **about
            )
        if len(shape) > 2:
            sides = (shape[1], shape[0])
            yield ConvSite(
                id=name, kind="conv", role="conv", channels=sides, kernel=shape[2:], **about
            )


def _tied(config: Mapping[str, Any], stored: Mapping[str, Tensor | Entry]) -> dict[str, str]:
    """The head's name where the config says that it is the table of tokens, which alone is stored:
    the only matrix with a row a token."""
    tables = [
        n for n, t in stored.items() if len(t.shape) == 2 and t.shape[0] == config.get("vocab_size")
    ]
    alone = len(tables) == 1 and "lm_head.weight" not in stored
    return (
        {"lm_head.weight": tables[0]} if alone and config.get("tie_word_embeddings", True) else {}
    )


def values(base: Base, name: str, where: str) -> Tensor:
    """The numbers of a stored tensor.

    Raises:
        ArtifactError: only its size is known; `where` says what needs them.
    """
    tensor = base.base.base_tensors().get(base.tensors.stored(name))
    if tensor is None or tensor.is_meta:
        raise BaseNeededError(f"{where} depends on the numbers of {name}. {GIVE_BASE}")
    return tensor.detach()


def snapshot(base: Base) -> Files:
    """A program's base, looked up once (a program collects its tensors whenever it is asked)."""
    if isinstance(base, Files):
        return base
    model = type(base.module).__name__
    return Files(base.base.base_tensors(), base.sites, base.tensors, "calls", model)


@contextlib.contextmanager
def fitting(where: str | Path) -> Iterator[None]:
    """Names the file in errors of adapters that do not fit a program."""
    try:
        yield
    except BaseMismatchError as error:
        raise BaseMismatchError(f"{where}: {error}") from error


def require_fit(base: Base, parts: Parts, where: str) -> None:
    """Raises ArtifactError unless each part has the size of its weight."""
    stored = base.base.base_tensors()
    for part in parts.parts:
        if not part.target:
            continue
        name = base.tensors.stored(part.target)
        if name not in stored:
            raise BaseMismatchError(
                f"{where}: the base has no {part.target!r}. Nearest: {nearest(name, stored)}. Use "
                "the base that the adapter was trained on."
            )
        if not _fits(part, tuple(stored[name].shape)):
            raise BaseMismatchError(
                f"{where}: what the adapter has for {part.target!r} does not fit its shape "
                f"{list(stored[name].shape)}. Use the base that the adapter was trained on."
            )


def _fits(part: Part, shape: Shape) -> bool:
    match part:
        case LowRank(a=a, b=b, lookup=lookup, magnitude=magnitude):
            rows = math.prod(b.shape[:-1]) if magnitude is None else magnitude.numel()
            if rows != math.prod(b.shape[:-1]):
                return False
            if a.dim() > 2:
                sides = (a.shape[2], b.shape[1])
                return shape[0] == len(a) == len(b) and shape[1:] in (sides, sides[::-1])
            ends = (math.prod(b.shape[:-1]), a.shape[-1])
            return _is_matrix((ends[1], ends[0]) if lookup else ends, shape)
        case Change(delta=delta):
            return _is_matrix((delta.shape[0], delta.shape[1]), shape)
        case Formula():
            patch = math.prod(shape[1:])
            return part.fits(shape[0], patch) or (len(shape) == 2 and part.fits(patch, shape[0]))
        case Scaling(vector=vector):
            return len(vector) in shape[:2]
        case Trained(values=own):
            return tuple(own.shape) == shape
        case Rows(ids=ids, values=own):
            return own.shape[1:] == shape[1:] and int(ids.max()) < shape[0]
        case _:
            return True


def _is_matrix(ends: Shape, shape: Shape) -> bool:
    """Whether `[out, in]` is a weight's shape, either way round; `in` of all groups of a
    convolution."""
    if len(shape) == 2:
        return ends in (shape, shape[::-1])
    patch = math.prod(shape[1:])
    return ends[0] == shape[0] and ends[1] % patch == 0
