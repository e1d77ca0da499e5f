"""Lower: replace a linear and its low-rank branch, or a change of some entries or rows of its
weight, by one fused operator, and back.

What it becomes saves less for its backward and writes no temporaries, by torch's operators
(`target=cpu`, right on GPUs, too) or by Triton kernels; `target=off` restores the plain graph.
Found by pattern; parameters keep their names and keep training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...kernels.lora_linear import lora_linear, require_triton, triton_lora_linear
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
    """

    portable: ClassVar[bool] = False
    contract: ClassVar[Contract] = Contract("bounded")

    target: Literal["cpu", "triton", "off"] = "cpu"

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
        if self.target != "off":
            fuse_deltas(edit, triton_lora_linear if self.target == "triton" else lora_linear)
            fuse_partial(edit, partial_linear)


_LOWERED = Delta, RowScale, PartialDelta
