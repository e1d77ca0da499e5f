"""MAM: keys and values before every attention, and a scaled adapter beside every feed-forward.

He et al., ICLR 2022, arXiv:2110.04366. The paper compares where updates join and of which form they
are, and takes the best of each: few parameters for attention (a prefix of `length` rows from an
MLP of width `projection`), most for the feed-forward blocks (`h <- h + s (U relu(D z + b_D) + b_U)`
beside them). The defaults are those for summaries and translation; for classification the paper has
`length=16,bottleneck=16,scale=2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...rewriter.pipeline.preset import Member, Preset
from ...rewriter.program.history import Contract
from ...rewriter.program.state import State
from ..additive.parallel_adapter import ParallelAdapter
from ..additive.prefix_tuning import PrefixTuning


@dataclass(frozen=True, kw_only=True)
class MAM(Preset):
    """A prefix at attentions and a scaled parallel adapter at feed-forward blocks.

    Attributes:
        length, projection: of the prefix, see `prefix_tuning`.
        bottleneck, scale, reads, dropout: of the adapter, see `parallel_adapter`.
    """

    kinds: ClassVar[tuple[str, ...]] = ("attention", "sublayer")
    contract: ClassVar[Contract] = Contract("trainable")
    folds: ClassVar[str] = "no: a prefix, and not linear"

    length: int = 30
    projection: int | None = 800
    bottleneck: int = 512
    scale: float | None = 4.0
    reads: Literal["input", "residual"] = "input"
    dropout: float = 0.0
    where: str = "attention and self|ffn and sublayer"

    def check(self) -> None:
        self._both()

    def members(self, program: State) -> Mapping[str, Member]:
        prefix, adapter = self._both()
        return {"prefix": Member(prefix), "parallel": Member(adapter)}

    def _both(self) -> tuple[PrefixTuning, ParallelAdapter]:
        adapter = {n: getattr(self, n) for n in ("bottleneck", "scale", "reads", "dropout")}
        prefix = PrefixTuning(length=self.length, projection=self.projection)
        return prefix, ParallelAdapter(**adapter)
