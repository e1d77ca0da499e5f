"""Training a few rows of a table: new tokens, or tokens whose meaning moved.

Artetxe et al., ACL 2020, arXiv:1910.11856, train new embeddings under a frozen body; here some
rows. `W'` is W but for the rows `ids`, which train, for every call that reads the table, a tied
head's, too. They start as the table's own, so step 0 is the base model. Folds exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...rewriter.branches.branch import Axes, Expression
from ...rewriter.edits.edit import Editor
from ...rewriter.parts.parts import Part, Rows
from ...rewriter.pipeline.aliases import PLACES, Alias, renamed
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Plan
from ...rewriter.program.sites import EmbeddingSite


class RowsExpression(Expression):
    """`w' = w` but for some rows; parameter `rows [count, width]`."""

    axes: ClassVar[Axes] = {"rows": ("count", "width"), "ids": ("count",)}
    ids: Tensor

    def __init__(self, ids: Tensor, rows: Tensor) -> None:
        super().__init__()
        device = ids.device if rows.is_meta else rows.device
        self.register_buffer("ids", ids.to(device, torch.long), persistent=False)
        self.rows = nn.Parameter(rows)

    def forward(self, w: Tensor) -> Tensor:
        return w.index_copy(0, self.ids, self.rows.to(w.dtype))

    def part(self) -> Part:
        return Rows("", self.ids, self.rows.detach())

    def describe(self) -> str:
        return f"{len(self.rows)} rows"


@dataclass(frozen=True, kw_only=True)
class TrainTokens(Method):
    """Trains rows of the token table.

    Attributes:
        ids: of the tokens.
    """

    folds: ClassVar[str] = "exactly"
    kinds: ClassVar[tuple[str, ...]] = ("embedding",)
    aliases: ClassVar[Mapping[str, Alias]] = {
        **renamed(token_indices="ids"), "target_modules": PLACES["target_modules"],
    }  # fmt: skip

    ids: tuple[int, ...] = (0,)
    where: str = "embedding.token"

    def check(self) -> None:
        self.require(len(self.ids) > 0, "ids", "at least one")
        self.require(len(set(self.ids)) == len(self.ids), "ids", "different ones")
        self.require(min(self.ids, default=0) >= 0, "ids", "no negative ones")

    def obstacle(self, site: EmbeddingSite) -> str:
        if max(self.ids) >= site.size:
            return f"the id {max(self.ids)} is beyond its {site.size} rows. Choose smaller ids"
        return ""

    def insert_all(self, edit: Editor, sites: Sequence[EmbeddingSite], plan: Plan) -> None:
        del plan
        ids = torch.tensor(self.ids)
        for table in {s.weight: s for s in reversed(sites)}.values():  # each once, whoever reads it
            stored = edit.table(table).detach()
            rows = stored[ids.to(stored.device)].to(edit.like(table), copy=True)
            edit.express(table, table.weight, RowsExpression(ids, rows))
            if table.tied:
                edit.note(f"{table.weight} has these rows for {', '.join(table.tied)}, too")
