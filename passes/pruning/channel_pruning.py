"""Channel pruning: removes the least important inner channels of feed-forward blocks, with
everything that is coupled to them: rows of up and gate, columns of down, biases, adapters in place.

Coupled groups and their importance follow DepGraph (Fang et al., CVPR 2023, arXiv:2301.12900) and
LLM-Pruner (Ma et al., NeurIPS 2023, arXiv:2305.11627), on the adapted weights `V = W + s B A` as in
structured pruning adapters (Hedegaard et al. 2022, arXiv:2211.10155). With V_c the rows and columns
of channel c,

    magnitude   I_c = sum |v|^2,  divided by the block's mean   (v in V_c)
    taylor      I_c = sum |v dL/dv|                              (gradients summed over the batches)

The result computes what the masked model computes: slicing commutes with the branches,
`(W + B A)[o, i] = W[o, i] + B[o] A[:, i]`. Scores are decided in `plan`; replaying needs no data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...rewriter.program.sites import Site
from ...rewriter.program.state import State
from ...rewriter.scores.pruning import Pruning


@dataclass(frozen=True, kw_only=True)
class ChannelPruning(Pruning):
    """Shrinks feed-forward blocks; see `rewriter/scores/pruning.py` for the other options.

    Attributes:
        where: which blocks.
    """

    where: str = "ffn"

    def places(self, program: State) -> Iterable[Site]:
        return program.sites.select(self.where, ("feedforward",))
