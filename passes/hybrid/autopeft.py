"""AutoPEFT: adapters behind and beside feed-forward blocks, prefixes and LoRA in chosen layers.

Zhou et al., TACL 2024, arXiv:2301.12132. A configuration says for each layer whether it is tuned,
and how large each kind of module is in those that are (0: there is none); `peftfx.search` looks for
the best ones of each cost, by Bayesian optimisation of several objectives, and gives them as text
of this pass. Where both adapters are there, their updates add up: the serial one (Pfeiffer's
placement) reads the stream behind the block, the parallel one what the block reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from ...rewriter.errors import OptionError
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.preset import Member, Preset
from ...rewriter.program.history import Contract
from ...rewriter.program.state import State
from ..additive.parallel_adapter import ParallelAdapter
from ..additive.prefix_tuning import PrefixTuning
from ..additive.serial_adapter import SerialAdapter
from ..reparameterized.lora import LoRA


@dataclass(frozen=True, kw_only=True)
class AutoPEFT(Preset):
    """Up to four kinds of modules in chosen layers, of one size each.

    Attributes:
        layers: numbers of the layers that are tuned, in each stream; none: all.
        serial, parallel: inner widths of the adapters.
        prefix: rows before keys and values.
        lora: rank at queries and values. Kinds of size 0 are not there, and neither are those that
            are left out where another one is given; without any, 48, 48 and 10 rows.
        scale: of the parallel adapter.
        projection: of the prefix, see `prefix_tuning`.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "attention", "sublayer")
    contract: ClassVar[Contract] = Contract("trainable")
    folds: ClassVar[str] = "its LoRA; the rest is not linear"

    layers: tuple[int, ...] | None = None
    serial: int | None = None
    parallel: int | None = None
    prefix: int | None = None
    lora: int | None = None
    scale: float = 4.0
    projection: int | None = None
    where: str = "q|v|attention and self|ffn and sublayer"

    def check(self) -> None:
        for kind, size in self._given().items():
            self.require(size >= 0, kind, "at least 0")
        self.require(self.layers != (), "layers", "none, or numbers of layers")
        if not self._methods():
            raise OptionError(
                "autopeft: all sizes are 0, so nothing would be inserted. Choose one above 0: "
                "autopeft{serial=48}."
            )

    def members(self, program: State) -> Mapping[str, Member]:
        there = {s.layer for s in program.sites if s.layer is not None}
        if missing := sorted({*(self.layers or ())} - there):
            raise OptionError(
                f"autopeft: there is no layer {missing[0]}; the model has {len(there)}, from "
                f"{min(there, default=0)} to {max(there, default=0)}. Choose others with layers=."
            )
        chosen = there if self.layers is None else {*self.layers}
        taken = {n: Member(m, lambda s: s.layer in chosen) for n, m in self._methods().items()}
        return taken

    def _methods(self) -> dict[str, Method]:
        """By kind, those that are not of size 0; the serial adapter reads what no other changed."""
        sizes = self._given() or {"serial": 48, "parallel": 48, "prefix": 10}
        makers: dict[str, Callable[[int], Method]] = {
            "lora": lambda size: LoRA(rank=size),
            "prefix": lambda size: PrefixTuning(length=size, projection=self.projection),
            "serial": lambda size: SerialAdapter(
                bottleneck=size, placement="pfeiffer", activation="relu", norms=False
            ),
            "parallel": lambda size: ParallelAdapter(bottleneck=size, scale=self.scale),
        }
        return {kind: make(sizes[kind]) for kind, make in makers.items() if sizes.get(kind)}

    def _given(self) -> dict[str, int]:
        sizes = {kind: getattr(self, kind) for kind in ("serial", "parallel", "prefix", "lora")}
        return {kind: size for kind, size in sizes.items() if size is not None}
