"""Inserting parts of imported adapters that are the formulas of methods here."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...rewriter.branches.branch import Branch, Delta, RowScale
from ...rewriter.branches.input_map import InputMap
from ...rewriter.edits.edit import Editor
from ...rewriter.errors import BaseMismatchError, PassError
from ...rewriter.parts.formula_parts import Butterfly, Formula, Hadamard, Kronecker, Rotation
from ..reparameterized.boft import BOFTBranch, BOFTRows
from ..reparameterized.loha import LoHaBranch
from ..reparameterized.lokr import LoKrBranch
from ..reparameterized.oft import OFTBranch
from .sublayer_parts import sites_of


def insert_formula(edit: Editor, part: Formula) -> None:
    """Puts a part at all calls of its weight, of a fused one at all of it.

    Raises:
        BaseMismatchError: the program has no such weight, or its sizes are others.
    """
    calls: set[tuple[str, ...]] = set()
    for site in sites_of(edit.program, part.target, False):
        if site.nodes in calls:
            continue
        calls.add(site.nodes)
        count, _, size = site.matrices
        weight = edit.weight(site)
        if not part.fits(count * weight.out_features, size):
            raise BaseMismatchError(
                f"what the adapter has for {site.weight} does not fit this model. Use the base "
                "that the adapter was trained on."
            )
        whole = replace(site, features=None)
        for branch in branches_of(part, size, edit.like(site)):
            match branch:
                case Delta():
                    edit.add(whole, branch)
                case InputMap():
                    edit.map(whole, branch)
                case RowScale():
                    edit.rescale(whole, branch)
                case _:
                    raise PassError(f"{part.kind} is no part of a weight.")


def branches_of(part: Formula, inputs: int, like: Tensor) -> list[Branch]:
    """What computes a part, beside a weight of so many inputs."""

    def own(tensor: Tensor) -> Tensor:
        return tensor.to(like, copy=True)

    match part:
        case Hadamard():
            factors = {name: own(getattr(part, name)) for name in LoHaBranch.axes}
            return [LoHaBranch(factors, part.scale)]
        case Kronecker():
            tensors = {name: own(tensor) for name, tensor in part.tensors().items()}
            return [LoKrBranch(tensors, part.scale, part.rank)]
        case Rotation():
            return [OFTBranch(own(part.q), part.size, part.share, part.terms, part.eps).to(like)]
        case Butterfly():
            turn = [] if part.blocks is None else [BOFTBranch(own(part.blocks))]
            return [*turn, *([] if part.s is None else [BOFTRows(own(part.s), inputs)])]
        case _:
            raise PassError(f"no program can hold a part of kind {part.kind!r}.")
