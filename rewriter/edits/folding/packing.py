"""Folding into a weight in few bits: unpacked meanwhile, and packed again in the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from ...graph.aten import attribute, set_attribute
from ...program.sites import WeightSite
from ...weights.certificate import check_packed
from ...weights.verdict import Verdict
from ..calls.attach import Attaching
from ..linear.compose import compose
from ..linear.forms import store_as


def while_unpacked(
    edit: Attaching, site: WeightSite, fold: Callable[[], None], first: frozenset[str]
) -> tuple[Verdict, str] | None:
    """Runs `fold` while the weight of a site is one dense tensor, so that the rules and checks are
    those of any weight, and stores the result in the format of before.

    Args:
        first: the paths of the branches that fold, see `compose`.

    Returns:
        What packing has left of the change, and what the format is called; None if nothing
        changed: then the weight is stored as it was.
    """
    gm, weight = edit.graph_module, edit.weight(site)
    weight.require_values()
    stored = {name: attribute(gm, name) for name in weight.tensors()}
    for call in store_as(edit, site, weight.unpacked()):
        compose(edit.program, call, site.weight, first)
    edit.refresh()
    before = edit.weight(site).dense()
    fold()
    folded = edit.weight(site)
    exact = folded.dense()
    changed = not torch.equal(exact, before)
    packed = weight.packed_again(exact) if changed else weight
    store_as(edit, site, replace(folded, format=packed.format, dtype=weight.dtype))
    for name, old in stored.items():
        if not changed:
            set_attribute(gm, name, old, transient=False)
        elif isinstance(old, nn.Parameter):
            gm.get_parameter(name).requires_grad_(old.requires_grad)
    if not changed:
        return None
    verdict = check_packed(site.id, before, exact, packed.dense())
    return verdict, packed.format.said
