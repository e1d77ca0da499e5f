"""Quantised weights: integers, scales and zero points in the place of one tensor.

The parameter `name` leaves the program; `name.codes`, `name.scale` and `name.zero` take its place
and the linear's calls become `operator(x, codes, scale, zero, bias, bits, group)`. Sites, branches
and patterns see a linear as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ...branches.branch import Branch, OutputScale
from ...errors import ExportError, FoldError, PassError
from ...files.identity import merkle_root, tensor_digest
from ...graph.aten import (
    SLICES,
    VIEWS,
    attribute,
    is_op,
    is_quantised,
    set_attribute,
    shape,
    users,
    value,
)  # fmt: skip
from ...graph.pattern import linear_parts
from ...graph.sharded import whole
from ...program.sites import LinearSite
from ...weights.certificate import Matrix
from ...weights.integers import Quantised, quantise
from ...weights.weight import Weight, all_finite
from .compose import compose, site_nodes

if TYPE_CHECKING:
    from ...program.state import Program
    from ..edit import Editor
    from ..read import Reading


@dataclass(kw_only=True)
class QuantisedWeight(Weight):
    """Integers with a scale and a zero point a group; `compute` is the product's dtype.

    Output scales fold exactly into the scales. What would need other integers does not fold.
    """

    tensor: Quantised
    compute: torch.dtype

    @staticmethod
    def of(module: GraphModule, site: LinearSite, call: Node) -> QuantisedWeight:
        """What the quantised linear `call` of a site multiplies by."""
        bias = whole(module.get_parameter(site.bias).detach()) if site.bias else None
        return QuantisedWeight(
            module=module, name=site.weight, bias_name=site.bias, bias=bias,
            tensor=_stored(module, site, call), compute=value(call).dtype,
        )  # fmt: skip

    @property
    def out_features(self) -> int:
        return self.tensor.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.tensor.in_features

    @property
    def dtype(self) -> torch.dtype:
        return self.compute

    @property
    def device(self) -> torch.device:
        return self.tensor.codes.device

    def dense(self) -> Tensor:
        return self.tensor.dense().to(self.compute)

    def matrix(self) -> Matrix:
        return Matrix(self.tensor.dense(), self.bias, self.tensor.scale.dtype, roundings=2)

    def stored(self) -> Mapping[str, Tensor]:
        return {f"{self.name}.scale": self.tensor.scale}

    def refuses(self, branch: Branch) -> str:
        if isinstance(branch, OutputScale):
            return ""
        return (
            f"the weight is stored in {self.tensor.bits} bits, and rounding to them again would "
            "lose most of what the branch learnt. Keep the branch beside the integers, or fold it "
            "before the weight is quantised"
        )

    def replaced(self, exact: Tensor) -> tuple[Self, float]:
        raise FoldError(f"{self.name}: another matrix needs other integers. Keep the branch.")

    def with_rows(self, scale: Tensor) -> Self:
        old = self.tensor.scale
        tensor = replace(self.tensor, scale=old * scale.to(old.dtype)[:, None])
        return replace(self, tensor=tensor, bias=self.scaled_bias(scale))

    def with_columns(self, scale: Tensor) -> Self:
        raise FoldError(f"{self.name}: the columns of a group share a scale. Keep the branch.")

    def pack(self, layout: str) -> Quantised:
        """The tensors as another runtime takes them.

        Args:
            layout: `matmulnbits`, ONNX Runtime's: groups are powers of two from 16 on. Other
                groups are cut into such ones, which repeat the scale; the matrix is the same.

        Raises:
            ExportError: the layout is unknown, or cannot hold groups of this size.
        """
        if layout != "matmulnbits":
            raise ExportError(f"{self.name}: there is no layout {layout!r}. Layouts: matmulnbits.")
        block = self.tensor.group & -self.tensor.group
        if block < 16 and self.tensor.codes.shape[1] == 1:  # padding completes a group of a row
            block = max(16, 1 << (self.tensor.group - 1).bit_length())
        if block < 16:
            raise ExportError(
                f"{self.name}: MatMulNBits has groups of 16, 32, 64, ... columns, and "
                f"{self.tensor.group} is no multiple of 16. Quantise with group=16, 32, 64 or 128."
            )
        return self.tensor if block == self.tensor.group else self.tensor.regrouped(block)


def _stored(module: GraphModule, site: LinearSite, call: Node) -> Quantised:
    """The stored tensors that a quantised linear's call reads."""
    operands: Any = call.args
    codes, scale, zero = (whole(attribute(module, str(n.target))).detach() for n in operands[1:4])
    return Quantised(codes, scale, zero, operands[5], operands[6], site.in_features)


def quantised_calls(program: Program) -> dict[str, Node]:
    """One call of each quantised weight, by the weight's name."""
    nodes = site_nodes(program.module)
    found: dict[str, Node] = {}
    for site in program.sites:
        call = nodes.get(site.nodes[0])
        if isinstance(site, LinearSite) and call is not None and is_quantised(call):
            found[site.weight] = call
    return found


def dense_weights(program: Program) -> dict[str, Tensor]:
    """The quantised weights as dense ones, stored as the model does, by name."""
    sites = {s.weight: s for s in program.sites if isinstance(s, LinearSite)}
    found: dict[str, Tensor] = {}
    for name, call in quantised_calls(program).items():
        dense = QuantisedWeight.of(program.module, sites[name], call).dense()
        found[name] = dense.T.contiguous() if sites[name].in_out else dense
    return found


def repack(edit: Editor, layout: str) -> bool:
    """Stores every quantised weight as another runtime takes it; returns whether there is one.

    Raises:
        ExportError: see `QuantisedWeight.pack`.
    """
    nodes = site_nodes(edit.graph_module)
    found: dict[str, Quantised] = {}
    for site in edit.program.sites:
        weight = edit.weight(site) if isinstance(site, LinearSite) else None
        if not isinstance(site, LinearSite) or not isinstance(weight, QuantisedWeight):
            continue
        if site.weight not in found:
            found[site.weight] = weight.pack(layout)
            replace_tensor(edit.graph_module, site.weight, found[site.weight])
        for name in site.nodes:
            nodes[name].update_arg(6, found[site.weight].group)
    return bool(found)


def whole_weights(edit: Reading, ids: Sequence[str]) -> list[LinearSite]:
    """See `Editor.whole`."""
    chosen = {i: s for i in ids if isinstance(s := edit.program.sites[i], LinearSite)}
    found: dict[str, LinearSite] = {}
    for site in chosen.values():
        same = [s for s in edit.program.sites if isinstance(s, LinearSite)]
        rest = [s.id for s in same if s.weight == site.weight and s.id not in chosen]
        if rest:
            edit.skip(site, f"{site.weight} also holds {', '.join(rest)}: select all or none of it")
        else:
            found.setdefault(site.weight, site)
    return list(found.values())


def quantise_weight(
    edit: Editor,
    site: LinearSite,
    bits: int,
    group: int | None,
    operator: Callable[..., Tensor],
    real_zeros: bool,
) -> bool:
    """See `Editor.quantise`."""
    gm = edit.graph_module
    weight = edit.weight(site)
    if isinstance(weight, QuantisedWeight):
        raise PassError(f"{site.id} is quantised already. Select other sites with where=.")
    for name in site.nodes:
        compose(edit.program, edit.node(name), site.weight)  # a lowered call becomes a linear
    nodes = site_nodes(gm)
    calls = [nodes[name] for name in site.nodes]
    trained = any(site.weight in names for names in edit.program.owned.values())
    reason = f"{site.weight} trains as it is" if trained else _obstacle(gm, site, calls)
    if reason:
        edit.skip(site, reason)
        return False
    dense = weight.dense()
    if not dense.is_meta and not all_finite(dense):
        raise PassError(f"{site.weight} holds NaN or infinity; it cannot be quantised.")
    made = quantise(dense, bits, group)
    _require_known(edit, site.weight, made)
    if real_zeros:
        made = replace(made, zero=made.zeros())
    parts = [linear_parts(call) for call in calls]
    replace_tensor(gm, site.weight, made)
    for call, found in zip(calls, parts, strict=True):
        if found is None:
            raise PassError(f"{site.id}: {call.name} is not a linear.")
        x, _, bias = found
        with gm.graph.inserting_before(call):
            stored = [gm.graph.get_attr(f"{site.weight}.{p}") for p in PARTS]
            operands = (x, *stored, bias, made.bits, made.group)
            new = gm.graph.create_node("call_function", operator, operands, {}, "quantised_linear")
        new.meta = {**call.meta, "call": call.meta.get("call", call.name)}
        call.replace_all_uses_with(new)
        gm.graph.erase_node(call)
        new.name = new.meta["call"]  # sites name it so, also in files
        compose(edit.program, new, site.weight)
    edit.edited.append(site.id)
    return True


def _require_known(edit: Editor, name: str, made: Quantised) -> None:
    """Records the digest of a weight's integers, or compares it with what the plan says."""
    if made.codes.is_meta:
        return
    digest = merkle_root({"codes": tensor_digest(made.codes), "zero": tensor_digest(made.zero)})
    known: dict[str, str] = edit.decided.setdefault("codes", {})
    if known.setdefault(name, digest) != digest:
        raise PassError(
            f"{name}: rounding the base weight gives other integers than those that the scales "
            "were trained with. Load the base that it was trained on, with the version of peftfx "
            "that saved it."
        )


PARTS = ("codes", "scale", "zero")
"""What stands below a quantised weight's name, in the operator's order."""


def replace_tensor(gm: GraphModule, name: str, made: Quantised) -> None:
    """Stores a quantised matrix under a weight's name, in the place of what is there."""
    path, _, leaf = name.rpartition(".")
    owner = gm.get_submodule(path)
    owner._parameters.pop(leaf, None)
    owner._modules.pop(leaf, None)
    set_attribute(gm, f"{name}.codes", made.codes, transient=False)
    set_attribute(gm, f"{name}.scale", nn.Parameter(made.scale, requires_grad=False))
    zero = nn.Parameter(made.zero, requires_grad=False) if made.zero.is_floating_point() else None
    set_attribute(gm, f"{name}.zero", made.zero if zero is None else zero, transient=False)


def _obstacle(gm: GraphModule, site: LinearSite, calls: Sequence[Node]) -> str:
    """Why a site's weight cannot be stored as integers; empty if it can."""
    if site.obstacle:
        return site.obstacle
    if site.tied:
        return f"its weight is tied to {', '.join(site.tied)}"
    if site.left:
        return "its calls multiply from the left (W @ x)"
    keys = {call.meta.get("call") or call.name for call in calls}
    stack = list(gm.graph.find_nodes(op="get_attr", target=site.weight))
    while stack:
        for reader in users(stack.pop()):
            if is_op(reader, VIEWS) or is_op(reader, SLICES):
                stack.append(reader)
            elif reader not in calls and reader.meta.get("composed") not in keys:
                return f"its weight is also read by {reader.name}"
    for call in calls:
        x, _, bias = linear_parts(call) or (None, None, None)
        flat = bias is None or len(shape(bias) or ()) == 1
        if x is None or not flat or set(call.kwargs) - {"bias"}:
            return f"{call.name} is not a plain linear"
    return ""
