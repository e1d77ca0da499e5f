"""The tensors of one place in AdapterHub's files, by what is below the adapter's name."""

from __future__ import annotations

from torch import Tensor

from ...rewriter.errors import ArtifactError

Leaves = dict[str, Tensor]


def needed(leaves: Leaves, name: str, where: str) -> Tensor:
    """A tensor; an ArtifactError if there is none."""
    if name not in leaves:
        have = ", ".join(sorted(leaves)) or "nothing"
        raise ArtifactError(f"{where}: {name} is missing beside {have}. Save the adapter again.")
    return leaves[name]


def popped(leaves: Leaves, name: str, where: str) -> Tensor:
    """A tensor that is taken out; an ArtifactError if there is none."""
    tensor = needed(leaves, name, where)
    del leaves[name]
    return tensor
