"""BitFit: train the biases and nothing else.

Ben-Zaken et al., ACL 2022, arXiv:2106.10199. Biases of the selected linears, convolutions and
norms become trainable; a linear or convolution without bias gets a zero one (then the model has
parameters that the original class does not know, and `export_state_dict()` says so). Nothing to
fold: the biases are weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...rewriter.edits.edit import Editor
from ...rewriter.pipeline.method import Method
from ...rewriter.program.sites import ConvSite, LinearSite, NormSite


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Makes biases trainable.

    Attributes:
        add: give selected linears and convolutions without bias a zero one; with false they are
            skipped.
    """

    folds: ClassVar[str] = "nothing to fold"

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "norm")

    add: bool = True
    where: str = "linear and not head|conv|norm"

    def insert(self, edit: Editor, site: LinearSite | ConvSite | NormSite) -> None:
        bias = site.bias
        if bias is None:
            if isinstance(site, NormSite):
                edit.skip(site, "this normalisation has no bias")
                return
            if not self.add:
                edit.skip(site, "it has no bias and add=false")
                return
            bias = edit.add_bias(site)
        if not edit.is_parameter(bias):
            edit.skip(site, f"its bias {bias} is no parameter")
            return
        edit.train(bias)
        edit.edited.append(site.id)
