"""Width pruning: removes the least important features of a stream of hidden states, with everything
that is coupled to them: embeddings, what writes into the stream and reads it, its norms, the head.

    h' = h[:, F],    W_in' = W_in[:, F],    W_out' = W_out[F],    norms over F alone

SliceGPT's slices without its rotation (Ashkboos et al., ICLR 2024, arXiv:2401.15024), by importance
as in Minitron (Muralidharan et al., NeurIPS 2024, arXiv:2407.14679). Heads and inner channels stay.
The result is the smaller model with the same features F of every weight; norms have other
statistics, so it does not compute what the model computes with zeros there. Constants that were
computed from the width (a scale of embeddings) stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ...rewriter.program.sites import Site
from ...rewriter.program.state import State
from ...rewriter.scores.pruning import Pruning


@dataclass(frozen=True, kw_only=True)
class WidthPruning(Pruning):
    """Narrows streams; see `rewriter/scores/pruning.py` for the other options.

    Attributes:
        where: which streams, by their sublayers.
    """

    unit: ClassVar[str] = "features"

    where: str = "sublayer"

    def places(self, program: State) -> Iterable[Site]:
        sites = program.sites.select(self.where, ("sublayer",))
        return {s.stream: s for s in reversed(sites)}.values()
