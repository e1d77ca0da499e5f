"""Folding what computes a stored tensor: its value takes the tensor's place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import Node

from ...branches.branch import Branch, Expression
from ...errors import MetaTensorError, NonFiniteError
from ...graph.aten import dense_of, set_attribute
from ...graph.sharded import placed_like, whole
from ...measure.compare import all_finite
from ...program.history import Attachment
from ...program.sites import WeightSite
from ...weights.certificate import require_finite_base
from ...weights.verdict import lost_share
from ..calls.attach import Attaching
from ..linear.expression import remember, unexpress
from .result import Folding


def fold_expression(
    edit: Attaching, attachment: Attachment, branch: Expression, result: Folding
) -> str | None:
    """Stores the value of an expression under the parameter's name."""
    gm = edit.graph_module
    call = next(n for n in gm.graph.nodes if n.target == attachment.path)
    names = call.meta.get("expressions") or (str(call.meta["expression"]),)
    site = edit.program.sites[attachment.site]
    if any(dense_of(source) in names for source in call.args) and isinstance(site, WeightSite):
        return f"not foldable: {edit.weight(site).refuses(branch)}"
    if any(not isinstance(source, Node) or source.op != "get_attr" for source in call.args):
        return "another expression that does not fold stands between it and the stored tensor"
    require_branch_values(attachment.path, branch)
    old = [gm.get_parameter(name) for name in names]
    for name, tensor in zip(names, old, strict=True):
        if tensor.is_meta:
            raise MetaTensorError(
                f"{name} is on the meta device. Load weights before folding (peftfx.load_weights)."
            )
    with torch.no_grad():
        before = [whole(tensor.detach()) for tensor in old]
        for name, tensor in zip(names, before, strict=True):
            require_finite_base(name, tensor)
        computed = _computed(branch.eval(), before)  # in training it may be random
        wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in before]
        if any(t.dtype != w.dtype for t, w in zip(before, wide, strict=True)):
            lost = map(lost_share, before, _computed(branch, wide), computed)
            result.rounded = max(result.rounded, *lost)
    for name, tensor, stored in zip(names, computed, old, strict=True):
        if not all_finite(tensor):
            raise NonFiniteError(
                f"folding into {name} gives NaN or infinity in {str(tensor.dtype)[6:]}. Look for "
                "non-finite branch parameters, or keep the branch."
            )
        set_attribute(gm, name, nn.Parameter(placed_like(tensor, stored), stored.requires_grad))
    remember(edit.program, attachment.path)
    unexpress(call)
    gm.delete_submodule(attachment.path)
    return None


def _computed(branch: Expression, stored: Sequence[Tensor]) -> list[Tensor]:
    """What an expression makes of stored tensors, in memory of its own."""
    values = branch(*stored, **branch.constants)
    return [v.clone() for v in (values if len(stored) > 1 else (values,))]


def require_branch_values(path: str, branch: Branch) -> None:
    """Raises MetaTensorError, naming the tensor, where a branch has one without storage: operators
    that mix devices may read memory that nobody wrote."""
    for name, tensor in (*branch.named_parameters(), *branch.named_buffers()):
        if tensor.is_meta:
            raise MetaTensorError(
                f"{path}.{name} is on the meta device and has no values, so it cannot be folded. "
                "Give the program its weights first: peftfx.load_weights(program, directory)."
            )
