"""Where AdapterHub's keys belong in a program, and what the keys of a place are.

Keys are module paths of the library's own model classes, whose modules have the original names:
a sublayer is told by the weights below the path, and a path by where the sublayer's norm lies.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor

from ...rewriter.api import Program
from ...rewriter.errors import ArtifactError, BaseMismatchError, nearest
from ...rewriter.program.sites import AttentionSite, EmbeddingSite, LinearSite, NormSite, WeightSite

_SAID = {
    "attention_adapters": ("o", False),
    "cross_attention_adapters": ("o", True),
    "output_adapters": ("ffn.down", False),
}
"""Module that a block has for the adapters of one of its sublayers -> that one's last product."""

_VISION = (
    ("encoder.layer.", "layers."),
    *((f"attention.attention.{n}.", f"attention.{n[0]}_proj.") for n in ("query", "key", "value")),
    ("attention.attention.prefix_tuning.", "attention.prefix_tuning."),
    ("attention.output.dense.", "attention.o_proj."), ("intermediate.dense.", "mlp.fc1."),
    ("output.output_adapters.", "output_adapters."), ("output.dense.", "mlp.fc2."),
)  # fmt: skip
"""What transformers 5 renamed in vision transformers: what the library's keys have -> today's."""

LOCATIONS = ("encoder_prefix", "self_prefix", "cross_prefix")


class Places:
    """Paths of a file as places in a program.

    Args:
        program: which the adapter goes onto, or is of.
        paths: all of the file, to tell how its names differ from the program's in front: a base
            model's lack the first part that a model with a head has.
        where: the file, for errors.
    """

    def __init__(self, program: Program, paths: Collection[str], where: str) -> None:
        self.program, self.where = program, where
        names = sorted(program.base.base_tensors().keys() | program.tensors.aliases.keys())
        self.names = names
        starts = sorted({n.partition(".")[0] for n in names})
        tried = [
            ("", ""),
            *((f"{s}.", "") for s in starts),
            *(("", f"{s}.") for s in sorted({p.partition(".")[0] for p in paths})),
        ]
        fits = (t for t in tried if all(_within(names, _moved(p, t)) for p in paths))
        self.move = next(fits, ("", ""))

    def weight(self, path: str) -> str:
        """The parameter `weight` of a module.

        Raises:
            ArtifactError: the model has no such module.
        """
        name = f"{_moved(path, self.move)}.weight"
        if name not in self.names:
            raise ArtifactError(
                f"{self.where}: the adapter changes {path!r}, and this model has no such module "
                f"with a weight. Nearest: {nearest(name, self.names)}. Use the base that it was "
                "trained on."
            )
        return name

    def sublayer(self, path: str) -> str:
        """The last product's weight of the sublayer that a module of adapters belongs to.

        Raises:
            ArtifactError: there is none, or it cannot be told which.
        """
        owner, _, last = path.rpartition(".")
        said = _SAID.get(last)
        start = _moved(owner if said else path, self.move)
        last_products = [
            s.weight
            for s in _linears(self.program)
            if _within([s.weight], start) and (s.role, s.cross) in ((said,) if said else _LAST)
        ]
        if len(set(last_products)) != 1:
            raise BaseMismatchError(
                f"{self.where}: {path!r} belongs to {len(set(last_products))} sublayers of this "
                "model, where it must be one. Use the base that the adapter was trained on."
            )
        return last_products[0]

    def beginning(self, path: str) -> str:
        """The table of tokens of a stack of layers, the module that holds both.

        Raises:
            ArtifactError: it has none, or several.
        """
        start = _moved(path, self.move)
        tables = {
            s.weight
            for s in self.program.sites
            if isinstance(s, EmbeddingSite) and s.role == "token" and _within([s.weight], start)
        }
        if len(tables) != 1:
            raise BaseMismatchError(
                f"{self.where}: the adapter changes what the embeddings of {path!r} give, and this "
                f"model has {len(tables)} tables of tokens there. Use the base that it was trained "
                "on."
            )
        return tables.pop()

    def role(self, weight: str) -> str:
        """`o`, `cross` (of a cross-attention) or `ffn.down`."""
        site = next(s for s in _linears(self.program) if s.weight == weight)
        return "cross" if site.cross else site.role

    def layer(self, weight: str) -> int:
        """The number of a weight's block, counted as the library does."""
        site = next(s for s in _linears(self.program) if s.weight == weight)
        return blocks(self.program).index((site.stream, site.layer))

    def attention(self, path: str) -> AttentionSite:
        """The attention whose module this is.

        Raises:
            ArtifactError: there is none.
        """
        start = _moved(path, self.move)
        for site in attentions(self.program):
            if _within([site.q], start):
                return site
        raise ArtifactError(
            f"{self.where}: {path!r} is no attention of this model. Use the base that the adapter "
            "was trained on."
        )

    def located(self, location: str, left_out: Collection[int]) -> list[AttentionSite]:
        """The attentions of a location, in their order, without those of layers left out."""
        every = attentions(self.program)
        decoders = {s.stream for s in every if s.cross}
        first = len({(s.stream, s.layer) for s in every if s.stream not in decoders})
        alike = {
            "cross_prefix": [s for s in every if s.cross],
            "self_prefix": [
                s for s in every if not s.cross and (not decoders or s.stream in decoders)
            ],
            "encoder_prefix": [s for s in every if decoders and s.stream not in decoders],
        }[location]
        offset = first if decoders and location != "encoder_prefix" else 0
        return [s for i, s in enumerate(alike) if i + offset not in left_out]


def todays(program: Program, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The library's tensors by today's names of the modules that transformers 5 renamed."""
    names = _VISION if _is_renamed(program) else ()
    return {_renamed(k, names): t for k, t in tensors.items()}


def theirs(program: Program, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undoes `todays`."""
    names = [(today, old) for old, today in _VISION] if _is_renamed(program) else ()
    return {_renamed(k, names): t for k, t in tensors.items()}


def _is_renamed(program: Program) -> bool:
    queries = re.compile(r"(.+\.)?layers\.\d+\.attention\.q_proj\.weight")
    return any(queries.fullmatch(n) for n in program.base.base_tensors())


def _renamed(key: str, names: Iterable[tuple[str, str]]) -> str:
    for old, new in names:
        key = re.sub(rf"(^|\.){re.escape(old)}", lambda m, new=new: m[1] + new, key)
    return key


_LAST = (("o", False), ("o", True), ("ffn.down", False))


def attentions(program: Program) -> list[AttentionSite]:
    """All attentions, in graph order."""
    return [s for s in program.sites if isinstance(s, AttentionSite)]


def ordinal(program: Program, site: AttentionSite) -> int:
    """Which one of its kind an attention is, as `Prefix` counts them."""
    return [s.id for s in attentions(program) if s.cross == site.cross].index(site.id)


def location_of(program: Program, site: AttentionSite) -> str:
    """What the library calls the place of an attention's prefix."""
    decoders = {s.stream for s in attentions(program) if s.cross}
    if site.cross:
        return "cross_prefix"
    return "encoder_prefix" if decoders and site.stream not in decoders else "self_prefix"


def blocks(program: Program) -> list[tuple[str, int | None]]:
    """The blocks as (stream, layer), in the order in which the library counts layers."""
    return list(dict.fromkeys((s.stream, s.layer) for s in attentions(program)))


def sublayer_path(program: Program, weight: str) -> str:
    """The path of the module that holds the adapters behind a weight's sublayer, `...adapters`.

    A module that holds one sublayer with its norm holds its adapters; else the block does.
    """
    norms = [s.weight for s in program.sites if isinstance(s, NormSite)]
    owner = weight.rpartition(".")[0].rpartition(".")[0]
    while owner and not any(_within([n], owner) for n in norms):
        owner = owner.rpartition(".")[0]
    last = [s for s in _linears(program) if (s.role, s.cross) in _LAST]
    inside = {s.weight for s in last if _within([s.weight], owner)}
    if inside == {weight}:
        return f"{owner}.adapters"
    site = next(s for s in last if s.weight == weight)
    name = next(n for n, said in _SAID.items() if said == (site.role, site.cross))
    return f"{owner}.{name}.adapters"


def stack_path(program: Program, table: str) -> str:
    """The module of a stack of layers with its embeddings, of which a table is."""
    last = next((s.weight for s in _linears(program) if s.role in ("o", "ffn.down")), "")
    parts = zip(table.split("."), last.split("."), strict=False)
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], parts)
    return ".".join(word for word, _ in shared)


def attention_path(site: AttentionSite) -> str:
    """The module of an attention: what its queries' projection is in."""
    return site.q.partition(":")[0].rpartition(".")[0].rpartition(".")[0]


def _linears(program: Program) -> list[LinearSite]:
    return [s for s in program.sites if isinstance(s, LinearSite)]


def sites_at(program: Program, name: str) -> list[WeightSite]:
    """The products with a weight, by any of its names."""
    stored = program.tensors.stored(name)
    return [s for s in _linears(program) if s.weight == stored]


def _within(names: Sequence[str], path: str) -> bool:
    """Whether some name lies below a module; all lie below ''."""
    return any(n.startswith(f"{path}." if path else "") for n in names)


def _moved(path: str, move: tuple[str, str]) -> str:
    add, drop = move
    return f"{add}{path}" if add else path.removeprefix(drop)
