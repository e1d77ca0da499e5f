"""(IA)3: learnt vectors scale keys, values and the feed-forward block's inner activation.

Liu et al., NeurIPS 2022, arXiv:2205.05638. `k <- l_k k`, `v <- l_v v` on the projections' outputs
(before rotation and caching), and `W_down (l_ff h)` on the input of the down projection, which
for gated blocks is the product. All vectors start at one. Folds exactly: output scales into rows
and bias, input scales into columns.

Its recipe T-Few trains on all choices of a question. To the user's own loss of the right choice its
controller adds (`unlikelihood`, `length_normalised`: their weights, 1 in the paper) over the
choices y of x, n of them wrong, with b(x, y) = mean_t log p(y_t | x, y_<t),

    L_UL = - sum_wrong sum_t log(1 - p(y_t | x, y_<t) + floor) / (number of their tokens)
    L_LN = - log(exp b(x, right) / sum_y exp b(x, y))

`floor` is 0.01 in the authors' code and 0 in the paper. A batch holds all choices, question by
question: `labels [questions * choices, tokens]` with -100 where none counts, and `answer
[questions]`, which is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...rewriter.branches.branch import Axes, InputScale, OutputScale
from ...rewriter.edits.edit import Editor
from ...rewriter.errors import PassError
from ...rewriter.parts.parts import Part, Scaling
from ...rewriter.pipeline.aliases import PLACES, Alias, instead, started_by
from ...rewriter.pipeline.controller import Controller, Forward
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.passes import Saved
from ...rewriter.program.sites import AttentionSite, WeightSite
from ...rewriter.program.state import State
from ...rewriter.training.choices import length_normalised, unlikelihood


class IA3Output(OutputScale):
    """`y = l * base(x)`; parameter `l [out]`."""

    axes: ClassVar[Axes] = {"l": ("out",)}

    def __init__(self, ones: Tensor) -> None:
        super().__init__()
        self.l = nn.Parameter(ones)

    def scale(self) -> Tensor:
        return self.l


class IA3Input(InputScale):
    """`y = base(l * x)`; parameter `l [in]`."""

    axes: ClassVar[Axes] = {"l": ("in",)}

    def __init__(self, ones: Tensor) -> None:
        super().__init__()
        self.l = nn.Parameter(ones)

    def scale(self) -> Tensor:
        return self.l


class IA3Controller(Controller):
    """Adds T-Few's two losses over the choices of questions."""

    method: IA3

    def __init__(self, program: State, method: Any) -> None:
        super().__init__(program, method)
        sites = (s for s in program.sites if isinstance(s, AttentionSite))
        self.shifted = not any(s.cross for s in sites)
        """Labels are the tokens read, each predicted by the one before (decoders alone)."""

    def loss(self, outputs: Any, batch: Any, forward: Forward) -> Tensor | None:
        weights = self.method.unlikelihood, self.method.length_normalised
        if not any(weights):
            return None
        logits, labels, answer = self._choices(outputs, batch)
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        of = logits, labels, answer, len(labels) // len(answer)
        losses = unlikelihood(*of, self.method.floor), length_normalised(*of)
        return sum((w * x for w, x in zip(weights, losses, strict=True) if w), logits.new_zeros(()))

    def _choices(self, outputs: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        given = batch if isinstance(batch, Mapping) else {}
        labels, answer = given.get("labels"), given.get("answer")
        if labels is None or answer is None:
            raise PassError(
                f"{self.adapter}: its losses over choices read labels and answer of the batch. "
                "Give both: controllers.loss(outputs, {'labels': ..., 'answer': ...})."
            )
        named = outputs.get("logits") if isinstance(outputs, Mapping) else None
        logits: Any = next(
            t
            for t in (named, *pytree.tree_leaves(outputs))
            if isinstance(t, Tensor) and t.dim() > 2
        )
        rows, questions = len(labels), len(answer)
        if logits.shape[:2] != labels.shape or rows % questions:
            raise PassError(
                f"{self.adapter}: logits {list(logits.shape)} of labels {list(labels.shape)} and "
                f"{questions} answers. Give labels [questions * choices, tokens], question by "
                "question, and one answer for each."
            )
        return logits, labels, answer


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Scales the selected weights: inputs at `ffn.down`, outputs everywhere else.

    Each expert has vectors of its own.

    Attributes:
        unlikelihood, length_normalised: weights of the losses over choices; 0 leaves them out.
        floor: of the unlikelihood's logarithm.
    """

    folds: ClassVar[str] = "exactly"
    named: ClassVar[tuple[str, ...]] = ("conv", "embedding", "experts")
    aliases: ClassVar[Mapping[str, Alias]] = {
        **PLACES,
        "feedforward_modules": instead(
            "inputs are scaled at ffn.down, outputs elsewhere; leave it out"
        ),
        "init_ia3_weights": started_by(),
    }

    controller: ClassVar[type[Controller]] = IA3Controller

    unlikelihood: float = 0.0
    length_normalised: float = 0.0
    floor: float = 0.01
    where: str = "k|v|ffn.down"

    def check(self) -> None:
        for option in ("unlikelihood", "length_normalised", "floor"):
            self.require(getattr(self, option) >= 0, option, "at least 0")

    def insert(self, edit: Editor, site: WeightSite) -> None:
        at_input = site.role == "ffn.down"
        count, out, _ = site.matrices
        size = site.inputs if at_input else count * out
        ones = torch.ones(size).to(edit.like(site))
        edit.scale(site, IA3Input(ones) if at_input else IA3Output(ones))

    def saved_part(self, saved: Saved) -> Part | None:
        side = "in" if saved.slot == IA3Input.slot else "out"
        return Scaling(saved.target, saved.tensors["l"], side)
