"""S4: adapters, prefixes, LoRA and biases, each in the groups of layers where a search put them.

Chen et al., ICLR 2023, arXiv:2301.01821. Layers are parted into four groups, the inner ones larger
(a spindle, here 1:2:2:1 at any depth), all layers have parameters alike, all groups are tuned, and
the groups have an adapter and LoRA; an adapter and a prefix; these and biases; a prefix, biases and
LoRA. Every choice is an option, so that a search can make others (`peftfx.search.staged`). Adapters
stand behind the feed-forward block (Pfeiffer), LoRA at queries and values. With `budget`, a share
of the model's parameters, sizes are solved for: layers cost alike, and so do the parts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...rewriter.errors import OptionError
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.preset import Member, Preset
from ...rewriter.program.history import Contract
from ...rewriter.program.sites import Site
from ...rewriter.program.state import State
from ..additive.prefix_tuning import PrefixTuning
from ..additive.serial_adapter import SerialAdapter
from ..reparameterized.lora import LoRA
from ..selective.bitfit import BitFit
from .layer_groups import ALLOCATIONS, grouped, layers, sizes_within

PARTS = {"a": "adapter", "l": "lora", "p": "prefix", "b": "bias"}


@dataclass(frozen=True, kw_only=True)
class S4(Preset):
    """Four groups of layers with methods of their own.

    Attributes:
        strategies: of each group the letters of its parts: a (adapter), l (LoRA), p (prefix), b
            (biases); `-` for a group that is not tuned.
        grouping: how many layers groups have.
        allocation: how large the parts of each group's layers are.
        bottleneck, rank, length: of adapters, LoRA and prefixes in layers of the mean size.
        budget: the share of the model's parameters that all parts together have at most; their
            sizes follow from it.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "attention", "sublayer", "norm", "conv")
    contract: ClassVar[Contract] = Contract("trainable")
    folds: ClassVar[str] = "its LoRAs; the rest is not linear"

    strategies: tuple[str, ...] = ("al", "ap", "apb", "pbl")
    grouping: Literal["spindle", "uniform", "increasing", "decreasing", "bottleneck"] = "spindle"
    allocation: Literal["uniform", "increasing", "decreasing"] = "uniform"
    bottleneck: int = 48
    rank: int = 8
    length: int = 10
    budget: float | None = None
    where: str = "attention and self|ffn and sublayer|linear and not head|conv|norm"

    def check(self) -> None:
        words = [w for w in self.strategies if w != "-"]
        known = len(self.strategies) == 4 and all(w and {*w} <= PARTS.keys() for w in words)
        self.require(known, "strategies", "four words of the letters a, l, p and b, or -")
        self.require(bool(words), "strategies", "a word for at least one group")
        for option in ("bottleneck", "rank", "length"):
            self.require(getattr(self, option) >= 1, option, "at least 1")
        self.require(self.budget is None or 0 < self.budget <= 1, "budget", "above 0, at most 1")

    def members(self, program: State) -> Mapping[str, Member]:
        found: dict[str, Member] = {}
        groups = grouped(program, self.grouping)
        tuned = sum(layers(s) for w, s in zip(self.strategies, groups, strict=True) if w != "-")
        for k, (word, sites) in enumerate(zip(self.strategies, groups, strict=True)):
            if word == "-" or not sites:
                continue
            own = {s.id for s in sites}
            sizes = self._sizes(program, k, sites, tuned)
            for letter in dict.fromkeys(word):
                method = _method(letter, sizes.get(letter, 0))
                found[f"{PARTS[letter]}{k + 1}"] = Member(method, lambda s, own=own: s.id in own)
        return found

    def _sizes(self, program: State, k: int, sites: Sequence[Site], tuned: int) -> dict[str, int]:
        """Of the parts of one group, by letter."""
        factor, word = ALLOCATIONS[self.allocation][k], self.strategies[k]
        mean = {"a": self.bottleneck, "l": self.rank, "p": self.length}
        if self.budget is None:
            return {letter: max(1, round(size * factor)) for letter, size in mean.items()}
        whole = sum(t.numel() for t in program.base.base_tensors().values())
        each = self.budget * whole * factor / tuned
        sizes = sizes_within(word, program, sites, each * layers(sites))
        if small := [PARTS[n] for n, size in sizes.items() if size < 1]:
            raise OptionError(
                f"s4: budget={self.budget:g} leaves {each:,.0f} parameters for a layer of group "
                f"{k + 1}, which is less than the smallest {small[0]} and its neighbours have. "
                "Choose a larger budget, or fewer parts with strategies=."
            )
        return sizes


def _method(letter: str, size: int) -> Method:
    if letter == "a":
        return SerialAdapter(
            bottleneck=size or 1, placement="pfeiffer", activation="relu", norms=False
        )
    if letter == "l":
        return LoRA(rank=size or 1)
    return PrefixTuning(length=size or 1) if letter == "p" else BitFit()
