"""Quantise: stores the selected weights in few bits; they stay what they are while adapters train.

| format | stored | |
|---|---|---|
| `codebook` | codes of 4 bits into the NF4 table, a scale a group | arXiv:2305.14314 |
| `int8`, `int4`, `int2` | integers, a scale and a zero point a group | arXiv:2305.14152 |
| `onebit` | signs, a scale a row or group | arXiv:2402.10193 |
| `sparse24` | the 2 largest of every 4 entries, as they are | arXiv:2104.08378 |

Outputs change by the error of rounding, which is measured. Branches stand beside such weights as
beside any others; they read the weight that is stored. Output scales fold exactly; others with
`fold{lossy=true}`, which packs again and says what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...kernels import codebook_linear, onebit_linear, quantised_linear, sparse24_linear
from ...rewriter.edits.edit import Editor
from ...rewriter.pipeline.passes import Pass
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.state import State

_FORMATS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "codebook": (codebook_linear.OPERATOR, {"group": 64}),
    "int8": (quantised_linear.OPERATOR, {"bits": 8, "group": 32}),
    "int4": (quantised_linear.OPERATOR, {"bits": 4, "group": 32}),
    "int2": (quantised_linear.OPERATOR, {"bits": 2, "group": 32}),
    "onebit": (onebit_linear.OPERATOR, {"group": None}),
    "sparse24": (sparse24_linear.OPERATOR, {}),
}
"""Format -> its operator, and the usual options."""


@dataclass(frozen=True, kw_only=True)
class Quantise(Pass):
    """Stores weights in another format.

    Attributes:
        format: see above.
        group: inputs that share a scale, of whole bytes; by default 64 of a codebook, 32 of
            integers, a row of signs. Of fewer inputs, a row is one group.
        where: which linears; of a fused weight, all parts.
    """

    contract: ClassVar[Contract] = Contract("trainable")

    format: Literal["codebook", "int8", "int4", "int2", "onebit", "sparse24"] = "codebook"
    group: int | None = None
    where: str = "linear and not head"

    def check(self) -> None:
        known = self.group is None or "group" in _FORMATS[self.format][1]
        self.require(known, "group", "left out: pairs are 2 of 4", "Leave group out.")
        fits = self.group is None or (self.group > 0 and self.group * self._bits % 8 == 0)
        self.require(fits, "group", f"positive and of whole bytes (of {self._bits} bits each)")

    @property
    def options(self) -> dict[str, Any]:
        """The format's own."""
        usual = dict(_FORMATS[self.format][1])
        return usual if self.group is None else usual | {"group": self.group}

    @property
    def _bits(self) -> int:
        return {"codebook": 4, "onebit": 1}.get(self.format, int(self.options.get("bits", 8)))

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        sites = program.sites.select(self.where, ("linear",))
        return Plan({"sites": [site.id for site in sites]})

    def apply(self, edit: Editor, plan: Plan) -> None:
        operator, _ = _FORMATS[self.format]
        for site in edit.whole(plan.decisions["sites"]):
            edit.quantise(site, operator, **self.options)
