"""Head pruning: removes the least important heads of attentions, with everything that is coupled to
them: rows of q, k and v, columns of o, biases, prefixes, adapters in place.

    y = sum_h softmax(Q_h K_h^T / sqrt(d)) V_h O_h,    h among the heads that are kept

Michel, Levy and Neubig, NeurIPS 2019 (arXiv:1905.10650), Voita et al., ACL 2019 (arXiv:1905.09418);
coupled groups and their importance as in channel pruning. Where queries are grouped, a head of keys
and values goes with all of its query heads (LLM-Pruner, Ma et al., NeurIPS 2023, arXiv:2305.11627).
The result computes what the model computes with zeros in the columns of o of the heads that go.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ...rewriter.program.sites import Site
from ...rewriter.program.state import State
from ...rewriter.run.pruning import Pruning


@dataclass(frozen=True, kw_only=True)
class HeadPruning(Pruning):
    """Removes heads; see `rewriter/run/pruning.py` for the other options.

    Attributes:
        where: which attentions.
    """

    unit: ClassVar[str] = "heads"

    where: str = "attn"

    def places(self, program: State) -> Iterable[Site]:
        return program.sites.select(self.where, ("attention",))
