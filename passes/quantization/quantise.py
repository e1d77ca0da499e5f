"""Quantise: stores the selected weights in few bits; they stay what they are while adapters train.

| format | stored | |
|---|---|---|
| `codebook` | codes of 4 bits into the NF4 table, a scale a group | arXiv:2305.14314 |
| `int8`, `int4`, `int2` | integers, a scale and a zero point a group | arXiv:2305.14152 |
| `onebit` | signs, a scale a row or group | arXiv:2402.10193 |
| `sparse24` | the 2 largest of every 4 entries, as they are | arXiv:2104.08378 |
| `mixed` | `int2`, `int4` or `int8`, chosen for each weight | |

`mixed` errs least within `budget` bytes: by the sum of squares of what rounding changes in weights
or, of batches (`data=`), in what linears give, with each column's square times the mean square of
what it reads. The choice is exact, and the plan keeps it.

Outputs change by the error of rounding, which is measured. Branches stand beside such weights as
beside any others; they read the weight that is stored. Output scales fold exactly; others with
`fold{lossy=true}`, which packs again and says what is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ...kernels import codebook_linear, onebit_linear, quantised_linear, sparse24_linear
from ...rewriter.edits.edit import Editor
from ...rewriter.edits.read import Reading
from ...rewriter.errors import MetaTensorError
from ...rewriter.pipeline.passes import Pass
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.selector import select, words
from ...rewriter.program.sites import LinearSite
from ...rewriter.program.state import State
from ...rewriter.scores.allocate import Form, best
from ...rewriter.scores.observe import observe_rows
from ...rewriter.weights.format import format_of
from ...rewriter.weights.weight import Weight

_FORMATS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "codebook": (codebook_linear.OPERATOR, {"group": 64}),
    "int8": (quantised_linear.OPERATOR, {"bits": 8, "group": 32}),
    "int4": (quantised_linear.OPERATOR, {"bits": 4, "group": 32}),
    "int2": (quantised_linear.OPERATOR, {"bits": 2, "group": 32}),
    "onebit": (onebit_linear.OPERATOR, {"group": None}),
    "sparse24": (sparse24_linear.OPERATOR, {}),
}
"""Format -> its operator, and the usual options."""

_NAMED = ("conv", "embedding", "experts")
"""Kinds that are taken where the selector names them."""

_MIXED = ("int2", "int4", "int8")


@dataclass(frozen=True, kw_only=True)
class Quantise(Pass):
    """Stores weights in another format.

    Attributes:
        format: see above.
        group: inputs that share a scale, of whole bytes; by default 64 of a codebook, 32 of
            integers, a row of signs. Of fewer inputs, a row is one group.
        budget: bytes that the weights may take together, of `format=mixed`.
        where: which linears; of a fused weight, all parts. Convolutions, embeddings and experts
            where it names them. Lookups gather codes; convolutions and experts multiply by the
            dense weight, computed anew at each call.
    """

    contract: ClassVar[Contract] = Contract("trainable")

    format: Literal["codebook", "int8", "int4", "int2", "onebit", "sparse24", "mixed"] = "codebook"
    group: int | None = None
    budget: float | None = None
    where: str = "linear and not head"

    def check(self) -> None:
        mixed = self.format == "mixed"
        self.require(
            (self.budget is not None) == mixed, "budget", "that of format=mixed, which needs one"
        )
        self.require(self.budget is None or 0 < self.budget < math.inf, "budget", "positive")
        known = self.group is None or self.format != "sparse24"
        self.require(known, "group", "left out: pairs are 2 of 4", "Leave group out.")
        fits = self.group is None or (self.group > 0 and self.group * self._bits % 8 == 0)
        self.require(fits, "group", f"positive and of whole bytes (of {self._bits} bits each)")

    def options(self, form: str) -> dict[str, Any]:
        """A format's own."""
        usual = dict(_FORMATS[form][1])
        return usual if self.group is None else usual | {"group": self.group}

    @property
    def _bits(self) -> int:
        """The fewest of an entry."""
        return {"codebook": 4, "onebit": 1, "int4": 4, "int2": 2, "mixed": 2}.get(self.format, 8)

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        said = words(self.where)
        kinds = ("linear", *(kind for kind in _NAMED if kind in said))
        if not select(self.where, program.sites.items, kinds).taken:
            kinds = ("linear", *_NAMED)
        sites = [s.id for s in program.sites.select(self.where, kinds)]
        if self.budget is None:
            return Plan({"sites": sites})
        return Plan({"sites": sites, "formats": self._mixed(program, sites, self.budget, data)})

    def _mixed(
        self, program: State, sites: Sequence[str], budget: float, data: Any
    ) -> dict[str, str]:
        """The format of each stored weight that can have one, by the site that it is told by."""
        look, squares = Reading(program), dict[str, Tensor]()
        free = [s for s in look.whole(sites) if not (s.tied or look.obstacle(s))]
        weights = {s.id: w for s in free if (w := look.weight(s)).is_dense}
        if any(w.device.type == "meta" for w in weights.values()):
            raise MetaTensorError(
                f"{self.text}: weights on the meta device have no values to round. Load the "
                "weights first: peftfx.load_weights."
            )
        if data is not None:
            linears = [s for s in free if s.id in weights and isinstance(s, LinearSite)]
            squares = dict(observe_rows(program, data, linears, _mean_square))
        forms = {i: self._forms(w, squares.get(i)) for i, w in weights.items()}
        now = sum(w.dense().nbytes for w in weights.values())
        taken = best(forms, budget * now if budget < 1 else budget)
        return {name: _MIXED[index] for name, index in taken.items()}

    def _forms(self, weight: Weight, squares: Tensor | None) -> list[Form]:
        """A weight in each format: what it errs, columns times `squares [in]`, and bytes."""
        dense, forms = weight.dense().float(), list[Form]()
        for name in _MIXED:
            operator, _ = _FORMATS[name]
            packed = weight.in_format(format_of(operator._schema.name), **self.options(name))
            lost = (packed.dense().float() - dense).square().sum(0)
            lost = lost if squares is None else lost * squares.to(lost)
            size = sum(t.nbytes for t in packed.format.tensors.values())
            forms.append(Form(-float(lost.double().sum()), size))
        return forms

    def apply(self, edit: Editor, plan: Plan) -> None:
        edit.freeze()  # what is stored so trains no more, so the rest would seem to be chosen
        formats: Mapping[str, str] = plan.decisions.get("formats", {})
        for site in edit.whole(plan.decisions["sites"]):
            form = formats.get(site.id, self.format)
            if form == "mixed":
                edit.skip(site, "it has no format of its own: it is tied, or stored in few bits")
                continue
            edit.quantise(site, _FORMATS[form][0], **self.options(form))


def _mean_square(rows: Tensor) -> Tensor:
    return rows.float().square().mean(0)
