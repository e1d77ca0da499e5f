"""Lower: replace a linear and its low-rank branch, or a change of some entries or rows of its
weight, by one fused operator, and back.

What it becomes saves less for its backward and writes no temporaries, by torch's operators
(`target=cpu`, right on GPUs, too) or by Triton kernels; `target=off` restores the plain graph.
Found by pattern; parameters keep their names and keep training.

Of the forms of a product (in which order, with what kept for the backward pass), each size of
weight gets the one that costs least for `tokens`: chosen from FLOPs and measured once, on the
device of the weight. The record says which and why; a replay repeats it without measuring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from ...kernels.lora_linear import Form, lora_linear, require_triton, triton_lora_linear
from ...kernels.low_rank_forms import Sizes, chosen
from ...kernels.partial_linear import partial_linear
from ...rewriter.branches.branch import Delta, RowScale
from ...rewriter.edits.edit import Editor
from ...rewriter.edits.folding.lower import fuse_deltas, fuse_partial, restore_deltas
from ...rewriter.edits.linear.sparse import PartialDelta
from ...rewriter.errors import PassError
from ...rewriter.pipeline.passes import Pass
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.state import State


@dataclass(frozen=True, kw_only=True)
class Lower(Pass):
    """Chooses how low-rank branches run.

    Attributes:
        target: `cpu` (torch operators, also right on GPUs), `triton` (kernels on a CUDA device),
            or `off` (undo).
        tokens: of a batch, for which forms are chosen.
    """

    portable: ClassVar[bool] = False
    contract: ClassVar[Contract] = Contract("bounded")

    target: Literal["cpu", "triton", "off"] = "cpu"
    tokens: int = 512

    def check(self) -> None:
        self.require(self.tokens >= 1, "tokens", "at least 1")

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        if self.target == "triton":
            try:
                require_triton()
            except RuntimeError as error:
                raise PassError(f"lower: {error}") from error
        branches = [program.branch(a) for a in program.attachments]
        if self.target != "off" and not any(isinstance(b, _LOWERED) for b in branches):
            raise PassError(
                "lower: there is no low-rank branch to lower, nor a change of some entries or rows "
                "of a weight. Use lora or dora first."
            )
        return Plan()

    def apply(self, edit: Editor, plan: Plan) -> None:
        restore_deltas(edit)
        if self.target == "triton":
            fuse_deltas(edit, lambda *_: triton_lora_linear)
        elif self.target == "cpu":
            fuse_deltas(edit, partial(self._cheapest, edit))
        if self.target != "off":
            fuse_partial(edit, partial_linear)

    def _cheapest(self, edit: Editor, weight: Tensor, factors: tuple[Tensor, Tensor, float]) -> Any:
        """The operator in the form that costs least, chosen once for each size."""
        sizes = Sizes(self.tokens, weight.shape[1], weight.shape[0], factors[0].shape[0])
        forms: dict[str, Any] = edit.decided.setdefault("forms", {})
        name = f"{sizes.outputs} x {sizes.inputs}, rank {sizes.rank}, {weight.dtype}"
        if name not in forms:
            form, why = chosen(sizes, weight)
            forms[name] = {"form": list(form), "why": why}
        edit.note(f"{name.replace('torch.', '')}: {forms[name]['why']}")
        return partial(lora_linear, form=Form(*forms[name]["form"]))


_LOWERED = Delta, RowScale, PartialDelta
