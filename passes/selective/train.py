"""Training the selected weights themselves: a fresh head, the last layers, all norms.

Yosinski et al., NeurIPS 2014, arXiv:1411.1792. Weights and biases of the selected sites become
trainable, whole: a fused or shared tensor trains for every site that it serves, which the record
says. Beside adapters it keeps a new classifier trained, which they would freeze. Nothing to fold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ...rewriter.edits.edit import Editor
from ...rewriter.pipeline.aliases import PLACES, Alias
from ...rewriter.pipeline.method import Method
from ...rewriter.program.sites import ConvSite, EmbeddingSite, ExpertsSite, LinearSite, NormSite


@dataclass(frozen=True, kw_only=True)
class Train(Method):
    """Makes weights and biases trainable.

    Attributes:
        bias: the biases, too.
    """

    folds: ClassVar[str] = "nothing to fold"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "experts", "embedding", "norm")
    aliases: ClassVar[Mapping[str, Alias]] = {
        "target_modules": PLACES["target_modules"], "exclude_modules": PLACES["exclude_modules"],
    }  # fmt: skip

    bias: bool = True
    where: str = "head|norm"

    def insert(
        self, edit: Editor, site: LinearSite | ConvSite | ExpertsSite | EmbeddingSite | NormSite
    ) -> None:
        if not edit.is_parameter(site.weight):
            edit.skip(site, f"{site.weight} is no floating-point parameter (quantised?)")
            return
        edit.train(site.weight)
        own = getattr(site, "bias", None)
        if self.bias and own is not None and edit.is_parameter(own):
            edit.train(own)
        edit.edited.append(site.id)
        shared: tuple[str, ...] = getattr(site, "tied", ())
        if getattr(site, "features", None) is not None:
            shared = (*shared, "all features of a fused weight")
        if shared:
            edit.note(f"{site.weight} trains whole: for {', '.join(shared)}")
