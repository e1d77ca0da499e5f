"""PEQA: `W = (s + ds) (W_int - z)` by group; the integers stay, the scales s train.

Kim et al., NeurIPS 2023, arXiv:2305.14152. The weights of the selected linears are rounded to
`bits` (`W_int = clamp(round(W / s) + z)`, s and z minimising |W - s (W_int - z)| by group), and
training moves only the scales, `out * in / group` a linear, kept in at least float32. Nothing to
fold: a task is a set of scales. Outputs change by the error of rounding, which is measured.
Scales get no weight decay.

An adapter holds the scales and a hash of the integers, which loading computes again from the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from ...kernels.quantised_linear import OPERATOR
from ...rewriter.edits.edit import Editor
from ...rewriter.pipeline.controller import Controller
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.sites import LinearSite


class Scales(Controller):
    """Scales and zero points are no weights: they do not decay."""

    def group(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        del name, parameter
        return {"weight_decay": 0.0}


@dataclass(frozen=True, kw_only=True)
class PEQA(Method):
    """Stores weights as integers and trains their scales.

    Attributes:
        bits: 2, 4 or 8 a weight.
        group: inputs that share a scale and a zero point; none for one a row (output). The last
            group of a row is smaller where the inputs are no multiple of it.
        zero: train the zero points, too (they are then stored as floating-point numbers).
    """

    contract: ClassVar[Contract] = Contract("trainable")
    controller: ClassVar[type[Controller]] = Scales
    folds: ClassVar[str] = "nothing to fold"

    bits: int = 4
    group: int | None = 32
    zero: bool = False
    where: str = "linear and not head"

    def check(self) -> None:
        self.require(self.bits in (2, 4, 8), "bits", "2, 4 or 8")
        fits = self.group is None or (self.group > 0 and self.group * self.bits % 8 == 0)
        self.require(fits, "group", "none, or positive and of whole bytes (group * bits / 8)")

    def apply(self, edit: Editor, plan: Plan) -> None:
        whole = [site.id for site in edit.whole(plan.decisions["sites"])]
        super().apply(edit, replace(plan, decisions={**plan.decisions, "sites": whole}))

    def insert(self, edit: Editor, site: LinearSite) -> None:
        options = {"bits": self.bits, "group": self.group, "real_zeros": self.zero}
        if edit.quantise(site, OPERATOR, **options):
            for part in ("scale", "zero") if self.zero else ("scale",):
                edit.train(f"{site.weight}.{part}")
