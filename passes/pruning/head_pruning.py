"""Head pruning: removes the least important heads of attentions, with everything that is coupled to
them: rows of q, k and v, columns of o, biases, prefixes, adapters in place.

    y = sum_h softmax(Q_h K_h^T / sqrt(d)) V_h O_h,    h among the heads that are kept

Michel, Levy and Neubig, NeurIPS 2019 (arXiv:1905.10650), Voita et al., ACL 2019 (arXiv:1905.09418);
coupled groups and their importance as in channel pruning. Where queries are grouped, a head of keys
and values goes with all of its query heads (LLM-Pruner, Ma et al., NeurIPS 2023, arXiv:2305.11627);
with `groups=parted`, query heads go one by one, maybe more of one group than of another, and a head
of keys and values goes once none of its queries is left. Each is then repeated for itself.
The result computes what the model computes with zeros in the columns of o of the heads that go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ...rewriter.edits.edit import Editor
from ...rewriter.edits.structure.groups import part_groups
from ...rewriter.program.sites import Site
from ...rewriter.program.state import State
from ...rewriter.scores.pruning import Pruning


@dataclass(frozen=True, kw_only=True)
class HeadPruning(Pruning):
    """Removes heads; see `rewriter/scores/pruning.py` for the other options.

    Attributes:
        where: which attentions.
        groups: query heads that share keys go together (`whole`), or one by one (`parted`).
    """

    unit: ClassVar[str] = "heads"

    where: str = "attn"
    groups: Literal["whole", "parted"] = "whole"

    def places(self, program: State) -> Iterable[Site]:
        return program.sites.select(self.where, ("attention",))

    def shown(self, program: State) -> State:
        if self.groups == "whole":
            return program
        fork = program.fork()
        for site in self.places(fork):
            part_groups(fork, site)  # pyright: ignore[reportArgumentType]
        return fork

    def remedy(self, site: Any) -> str:
        shared = self.groups == "whole" and site.kv_heads < site.heads
        return " Or choose groups=parted: its query heads share keys." if shared else ""

    def remove(self, edit: Editor, site_id: str, kept: Sequence[int]) -> str:
        site: Any = edit.program.sites[site_id]
        if self.groups == "parted" and not site.parted and len(kept) < site.heads:
            if site.kv_heads > 1:
                kept = _without_groups(edit, site_id, kept)
            edit.part_groups(edit.program.sites[site_id])  # pyright: ignore[reportArgumentType]
            if len(kept) == edit.program.sites[site_id].heads:  # pyright: ignore
                return ""
        reason = super().remove(edit, site_id, kept)
        return reason and reason + self.remedy(site)


def _without_groups(edit: Editor, site_id: str, kept: Sequence[int]) -> list[int]:
    """Cuts the groups of which nothing is kept; what is kept, numbered among the others."""
    group = edit.channels(edit.program.sites[site_id])  # pyright: ignore[reportArgumentType]
    left = torch.isin(group.roots, group.roots[list(kept)]).nonzero().flatten().tolist()
    if len(left) < group.count:
        edit.cut(group, left)
    return [left.index(k) for k in kept]
