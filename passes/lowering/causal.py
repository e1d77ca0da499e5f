"""Causal: run attentions whose explicit mask is causal without padding as `is_causal=True`.

The mask is no longer computed, grouped keys are no longer repeated, and flash attention can run.
The padding mask is no input of the result: a batch with padding is an error there. The masks are
compared with a causal one up to `length`, which becomes the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...rewriter.edits.attention.causal import use_causal
from ...rewriter.edits.edit import Editor
from ...rewriter.pipeline.passes import Pass
from ...rewriter.program.history import Contract, Plan


@dataclass(frozen=True, kw_only=True)
class Causal(Pass):
    """Chooses the fused causal kernel where it computes the same.

    Attributes:
        length: the longest sequence that the result takes.
    """

    portable: ClassVar[bool] = False
    contract: ClassVar[Contract] = Contract("bounded")

    length: int = 2048

    def check(self) -> None:
        self.require(self.length >= 1, "length", "at least 1")

    def apply(self, edit: Editor, plan: Plan) -> None:
        use_causal(edit, self.length)
