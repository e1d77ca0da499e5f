"""Cross-attention tuning: train what connects decoder and encoder, and nothing else.

Gheini et al., EMNLP 2021, arXiv:2104.08771. The projections of all cross-attentions (found by
dataflow: their keys come from another stream than their queries) and these sublayers' norms train;
for a new language also the embeddings of its side, which the paper starts anew: give the model
with the new table. Nothing to fold: what trains are the weights themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...rewriter.program.sites import AttentionSite, EmbeddingSite, LinearSite, NormSite, Site
from ...rewriter.program.state import State
from ...rewriter.sites.order import downstream
from .train import Train


@dataclass(frozen=True, kw_only=True)
class CrossAttention(Train):
    """Makes cross-attentions trainable.

    Attributes:
        norms: with the normalisations of their sublayers.
        embeddings: also the tables (and their norms) of the side that is new: `source` (what the
            keys are computed from), `target` (with the head), `both` or `frozen`.
        where: other projections of attentions instead, such as those of some layers.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "norm", "embedding")

    norms: bool = True
    embeddings: Literal["frozen", "source", "target", "both"] = "frozen"
    where: str = "linear and cross"

    def sites(self, program: State) -> list[Site]:
        chosen = super().sites(program)
        places = {
            (s.stream, s.layer, "cross" if s.cross else "attn")
            for s in chosen
            if isinstance(s, LinearSite) and s.layer is not None
        }
        norms = {
            s for s in program.sites
            if isinstance(s, NormSite) and (s.stream, s.layer, s.sublayer) in places
        }  # fmt: skip
        taken = {*chosen, *(norms if self.norms else ()), *self._side(program)}
        return [s for s in program.sites if s in taken]

    def _nowhere(self, program: State) -> str:
        return (
            f"{self.text}: no attention of this model has keys from another stream than its "
            "queries. Choose another method, such as train{where=attn}."
        )

    def _side(self, program: State) -> set[Site]:
        """The embeddings of the sides that train, with what belongs to them."""
        if self.embeddings == "frozen":
            return set()
        flows = downstream(program)
        cross = _cross(program)
        keys, begins = {s.k for s in cross}, _beginnings(program, flows) if cross else set[Site]()
        source = {s for s in begins if flows[s.id] & keys}
        target = begins - source
        target |= {s for s in program.sites if s.role == "head"}
        sides = {"source": source, "target": target}
        wanted = ("source", "target") if self.embeddings == "both" else (self.embeddings,)
        for side in wanted:
            found = any(isinstance(s, EmbeddingSite) for s in sides[side])
            rule = f"frozen: there are no tables on the side of the {side}"
            self.require(found, "embeddings", rule, "Choose embeddings=frozen.")
        return {site for side in wanted for site in sides[side]}


def _cross(program: State) -> list[AttentionSite]:
    return [s for s in program.sites if isinstance(s, AttentionSite) and s.cross]


def _beginnings(program: State, flows: Mapping[str, frozenset[str]]) -> set[Site]:
    """The tables that streams begin with, and the norms between those and the first layers."""
    tables = {s for s in program.sites if isinstance(s, EmbeddingSite) and s.role != "relative"}
    fed = {i for s in tables for i in flows[s.id]}
    inside = {i for s in program.sites if s.layer is not None for i in flows[s.id]}
    norms = {
        s for s in program.sites if s.kind == "norm" and s.layer is None and s.id in fed - inside
    }
    return {*tables, *norms}
