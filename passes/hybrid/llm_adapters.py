"""LLM-Adapters: one form of adapter in the place where language models learnt most with it.

Hu et al., EMNLP 2023, arXiv:2304.01933. Of the places that the paper compares for each form, the
best ones are the defaults: `series` (`h <- h + s U tanh(D h)`) behind the feed-forward block,
`parallel` (`h <- h + s U tanh(D z)`) beside it, `lora` in attention and feed-forward, `prefix` in
attention; on LLaMA they came out in the order lora, parallel, series, prefix for 7 B, parallel
first for 13 B. `at=` chooses other places. Bottlenecks have no biases and start normal with
deviation 0.02, as in the authors' code, so outputs change at the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.preset import Member, Preset
from ...rewriter.program.history import Contract
from ...rewriter.program.state import State
from ..additive.parallel_adapter import ParallelAdapter
from ..additive.prefix_tuning import PrefixTuning
from ..additive.serial_adapter import SerialAdapter
from ..reparameterized.lora import LoRA

SUBLAYERS = {"attention": "attn and self and sublayer", "mlp": "ffn and sublayer"}
LINEARS = {"attention": "q|k|v", "mlp": "ffn.up|ffn.down"}
BEST = {"series": "mlp", "parallel": "mlp", "lora": "both", "prefix": "attention"}


@dataclass(frozen=True, kw_only=True)
class LLMAdapters(Preset):
    """One of four forms of adapters in its place.

    Attributes:
        form: what is inserted.
        at: where: `best` for the form, or another place; a prefix is in attention alone.
        bottleneck: inner width of series and parallel adapters.
        scale: s, of parallel adapters (series ones have 1).
        rank, alpha, dropout: of LoRA.
        length: of the prefix.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "attention", "sublayer")
    contract: ClassVar[Contract] = Contract("trainable")
    folds: ClassVar[str] = "LoRA; the other forms are not linear"

    form: Literal["lora", "parallel", "series", "prefix"] = "lora"
    at: Literal["best", "mlp", "attention", "both"] = "best"
    bottleneck: int = 256
    scale: float = 1.0
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    length: int = 10
    where: str = (
        "attention and self|attn and self and sublayer|ffn and sublayer|q|k|v|ffn and linear"
    )

    def check(self) -> None:
        fits = self.form != "prefix" or self.at in ("best", "attention")
        self.require(fits, "at", "attention or best with form=prefix")
        for place in SUBLAYERS:
            self._method(place)

    def promise(self) -> Contract:
        return Contract("identity") if self.form == "lora" else self.contract

    def members(self, program: State) -> Mapping[str, Member]:
        at = BEST[self.form] if self.at == "best" else self.at
        places = SUBLAYERS if at == "both" else (at,)
        return {place: Member(self._method(place)) for place in places}

    def _method(self, place: str) -> Method:
        """The form at one place."""
        narrow: dict[str, Any] = {
            "activation": "tanh",
            "biases": False,
            "bottleneck": self.bottleneck,
        }
        match self.form:
            case "series":
                return SerialAdapter(**narrow, std=0.02, norms=False, where=SUBLAYERS[place])
            case "parallel":
                return ParallelAdapter(
                    **narrow, scale=self.scale, init="bert", joins="output", where=SUBLAYERS[place]
                )
            case "lora":
                options: dict[str, Any] = {"rank": self.rank, "alpha": self.alpha}
                return LoRA(**options, dropout=self.dropout, where=LINEARS[place])
            case "prefix":
                return PrefixTuning(length=self.length)
