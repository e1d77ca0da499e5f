"""Running a region on further tokens, in front of its own, which leave the stream behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...graph.aten import operands, submodule, value
from ...graph.modes import Attention
from ...program.state import State
from ..attention.keyvalue import add_call
from ..calls.call import given
from ..prompts.pads import InsertedCausal, StripTokens
from .region import Region
from .route import Rewrite, known


def run_on_more(
    program: State, region: Region, path: str, valid: Node | None, reads: Mapping[str, Node]
) -> None:
    """Puts the `Inserted` branch at `path` in front of a region, and takes its tokens off behind.

    Arguments and errors are those of `run_on_chosen`.
    """
    reads = known(program, region, path, {**reads, **given({"valid": valid})})
    rewrite = _Longer(program, region, path, reads)
    rewrite.gather()
    rewrite.strip()


class _Longer(Rewrite):
    """A region under edit that runs on further tokens, in front of its own."""

    def __init__(
        self, program: State, region: Region, path: str, reads: Mapping[str, Node]
    ) -> None:
        self.enter_at(program, region)
        branch: Any = self.gm.get_submodule(path)
        self.length: int = branch.length
        x: Any = value(region.entry)
        size = region.tokens + self.length

        def values() -> tuple[Tensor, ...]:
            with x.fake_mode:
                index = x.new_empty([x.shape[region.batch], size], dtype=torch.long)
                sizes = [size if k != region.batch else n for k, n in enumerate(x.shape[:2])]
                return x.new_empty([*sizes, x.shape[2]]), index

        longer, self.index = self.call(path, region.entry, reads, ("longer", "index"), values)
        del longer.meta["val"]  # new to those who read the entry, see `propagate`
        self.taken[region.entry, 3] = longer
        fixed = isinstance(size, int)
        self.size = size if fixed else self.size_of(self.index, self.index, 1)
        for node in region.nodes:
            if isinstance(submodule(self.gm, node), Attention):
                self._unfold_causal(node)

    def _unfold_causal(self, core: Node) -> None:
        """Gives a fused causal attention the mask that it stands for, which is then gathered."""
        query, key, value_node, mask, causal = (*operands(core), None, False)[:5]
        kwargs = dict(core.kwargs)
        mask, causal = kwargs.pop("mask", mask), kwargs.pop("is_causal", causal)
        if causal and mask is None:
            with self.gm.graph.inserting_before(core):
                mask = add_call(self.gm, "inserted_causal", InsertedCausal(self.length), (query,))
        core.args, core.kwargs = (query, key, value_node, mask, False), kwargs

    def strip(self) -> None:
        """Takes the tokens off behind the region."""
        region = self.region
        module = StripTokens(self.length, (1 - region.batch,))
        with self.gm.graph.inserting_after(region.exit):
            own = add_call(self.gm, "strip_tokens", module, (region.exit,))
        own.meta["val"] = value(region.exit)
        region.exit.replace_all_uses_with(own, delete_user_cb=lambda u: u is not own)
