"""Freezing all but the top: trains the layers nearest to the outputs, and what stands above them.

Lee et al. 2019, arXiv:1911.03090 (a quarter of the layers comes within 10 % of training all).
Layers are counted from the outputs on the longest way through the graph, so no frozen layer
stands above one that trains: below the boundary, nothing is kept for backward, and no gradient is
computed. Of an encoder-decoder the decoder's layers come first; towers side by side count each for
themselves. Nothing to fold: what trains are the weights themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...rewriter.edits.edit import Editor
from ...rewriter.errors import OptionError
from ...rewriter.program.history import Plan
from ...rewriter.program.sites import Site
from ...rewriter.program.state import State
from ...rewriter.sites.order import layers_above
from .train import Train


@dataclass(frozen=True, kw_only=True)
class Freeze(Train):
    """Trains the top layers.

    Attributes:
        layers: how many of them; none: a quarter, rounded up.
        embeddings: also all that stands outside of layers below the boundary (tables, patches,
            their norms): then every layer keeps what the gradients to those need.
        head: also what stands above the last layer (its norm, a pooler, the head). A head that
            is tied to the token table trains with `embeddings` only.
        norms: with the normalisations of what trains.
        where: what may train at all.
    """

    layers: int | None = None
    embeddings: bool = False
    head: bool = True
    norms: bool = True
    where: str = "linear|conv|experts|embedding|norm"

    def check(self) -> None:
        self.require(self.layers is None or self.layers >= 0, "layers", "none, or at least 0")

    def sites(self, program: State) -> list[Site]:
        above = layers_above(program)
        depth = max((above[s.id] + 1 for s in program.sites if s.layer is not None), default=0)
        count = -(-depth // 4) if self.layers is None else self.layers
        if not depth:
            raise OptionError(f"{self.text}: this model has no layers. Use train{{where=...}}.")
        rule = f"at most {depth}, the depth of the model"
        self.require(count <= depth, "layers", rule, f"Choose at most {depth}.")
        lowest = _lowest(program, above)
        chosen = [s for s in super().sites(program) if self._trains(s, above, lowest, count)]
        if count and not any(s.layer is not None for s in chosen):
            raise OptionError(
                f"{self.text}: no weight that where={self.where!r} selects is of the top {count} "
                f"of {depth} layers alone. Choose more layers (they may share weights), or say "
                "where else."
            )
        if not chosen:
            raise OptionError(f"{self.text}: nothing is left to train. Choose layers=1 or more.")
        return chosen

    def _trains(
        self, site: Site, above: Mapping[str, int], lowest: Mapping[str, int], count: int
    ) -> bool:
        if site.kind == "norm" and not self.norms:
            return False
        if site.layer is None and not above[site.id]:
            return self.head
        if site.layer is None and lowest[site.id] >= count:
            return self.embeddings
        return lowest[site.id] < count

    def obstacle(self, site: Site) -> str:
        tied: tuple[str, ...] = getattr(site, "tied", ())
        if site.kind != "linear" or not tied or self.embeddings:
            return ""
        return f"it is tied to {tied[0]}, below the boundary. Choose embeddings=true to train it"

    def apply(self, edit: Editor, plan: Plan) -> None:
        super().apply(edit, plan)
        if any(edit.program.sites[i].kind == "embedding" for i in edit.edited):
            edit.note("tables train, so the layers above them keep what their gradients need")


def _lowest(program: State, above: Mapping[str, int]) -> dict[str, int]:
    """By site, the number of layers above the lowest site of its weight."""
    by_name: dict[str, int] = {}
    names = {s.id: {getattr(s, "weight", s.id), *getattr(s, "tied", ())} for s in program.sites}
    for site, own in names.items():
        for name in own:
            by_name[name] = max(by_name.get(name, 0), above[site])
    return {site: max(by_name[name] for name in own) for site, own in names.items()}
