"""P-tuning: prompt vectors that a small network makes of trained ones, `P = MLP(LSTM(E))`.

Liu et al., 2021, arXiv:2103.10385, "GPT Understands, Too". E is `[length, d]`, N(0, 1). With
`encoder=lstm`, a bidirectional LSTM of `layers` layers, h wide in each direction, is followed by
`W2 relu(W1 .)`, 2h -> 2h -> d (h = d / 2 in the paper, d in PEFT); with `encoder=mlp`, as in PEFT,
P is `W3 relu(W2 relu(W1 E))`, d -> h -> h -> d. The vectors stand in front of the embedded input;
or, with `ids`, wherever the text has these ids: a template with pseudo-tokens inside. `bake` puts
P in the place of its network, exactly; rows for ids then fold into the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...rewriter.branches.branch import Expression
from ...rewriter.branches.prompts import Tokens
from ...rewriter.edits.edit import Editor
from ...rewriter.edits.prompts.tokens import Halves, entrances, separate
from ...rewriter.pipeline.controller import Controller
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.passes import Pass
from ...rewriter.program.history import Contract
from ...rewriter.program.sites import EmbeddingSite, Site
from ...rewriter.program.state import State
from ..merging.bake import Bake
from ..selective.train_tokens import RowsExpression
from .prompt_network import PromptNetwork
from .prompt_tuning import PromptBranch, beyond


class PTuningBranch(Tokens):
    """Prompt vectors of a network."""

    def __init__(self, network: PromptNetwork) -> None:
        super().__init__(len(network.embedding))
        self.network = network

    def rows(self) -> Tensor:
        return self.network()

    def settled(self, **decided: Tensor) -> PromptBranch:
        return PromptBranch(decided["rows"])

    def describe(self) -> str:
        return f"length={self.length}"


class PTuningRows(Expression):
    """Rows of a token table that a network makes: those of the pseudo-tokens `ids`."""

    ids: Tensor

    def __init__(self, network: PromptNetwork, ids: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("ids", ids.to(network.embedding.device), persistent=False)

    def forward(self, w: Tensor) -> Tensor:
        return w.index_copy(0, self.ids, self.network().to(w.dtype))

    def settled(self, **decided: Tensor) -> RowsExpression:
        return RowsExpression(self.ids, decided["rows"])

    def describe(self) -> str:
        return f"{len(self.ids)} rows"


class NetworkController(Controller):
    """Nothing while it trains; then the vectors take the network's place."""

    def finish(self) -> tuple[Pass, ...]:
        here = any(isinstance(b, PTuningBranch | PTuningRows) for _, b in self.branches())
        return (Bake(names=(self.adapter,)),) if here else ()


@dataclass(frozen=True, kw_only=True)
class PTuning(Method):
    """Prepends encoded prompt vectors at the token embedding, or puts them where the text says.

    Attributes:
        length: number of prompt tokens.
        ids: of the pseudo-tokens, in their order, which stand in the texts; none: in front.
        encoder: `lstm` or `mlp`.
        hidden: h; none for the paper's d / 2 of the LSTM, or d of the MLP.
        layers: of the LSTM.
        dropout: between its layers, in training.
        halves: see `prompt_tuning`.
    """

    folds: ClassVar[str] = "no: they are inputs; `bake` drops the network"

    kinds: ClassVar[tuple[str, ...]] = ("embedding",)
    contract: ClassVar[Contract] = Contract("trainable")
    controller: ClassVar[type[Controller]] = NetworkController

    length: int = 20
    ids: tuple[int, ...] | None = None
    encoder: Literal["lstm", "mlp"] = "lstm"
    hidden: int | None = None
    layers: int = 2
    dropout: float = 0.0
    halves: Halves = "encoder"
    where: str = "embedding.token"

    def check(self) -> None:
        self.require(self.length >= 1, "length", "at least 1")
        self.require(self.hidden is None or self.hidden >= 1, "hidden", "at least 1")
        self.require(self.layers >= 1, "layers", "at least 1")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        ids = self.ids
        good = ids is None or (len(ids) > 0 and len(set(ids)) == len(ids) and min(ids) >= 0)
        self.require(good, "ids", "none, or different ids of the table")

    def obstacle(self, site: EmbeddingSite) -> str:
        return beyond(max(self.ids or (0,)), site)

    def sites(self, program: State) -> list[Site]:
        sites = super().sites(program)
        sites = sites if self.placed else entrances(program, sites, self.halves)
        if self.ids is None:
            separate(program, sites)
        return sites

    def insert(self, edit: Editor, site: EmbeddingSite) -> None:
        length = self.length if self.ids is None else len(self.ids)
        layers = self.layers if self.encoder == "lstm" else 0
        network = PromptNetwork(length, site.width, self.hidden, layers, self.dropout)
        network.initialise(edit.generator)
        network.to(edit.like(site))
        if self.ids is None:
            edit.prepend_tokens(site, PTuningBranch(network))
        else:
            edit.express(site, site.weight, PTuningRows(network, torch.tensor(self.ids)))

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        settled: dict[str, dict[str, Any]] = {}
        for path, branch in self.controller(program, self).branches():
            if isinstance(branch, PTuningBranch | PTuningRows):
                network, training = branch.network, branch.network.training
                with torch.no_grad():
                    settled[path] = {"rows": network.eval()()}
                network.train(training)
        return settled
