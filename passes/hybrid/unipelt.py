"""UniPELT: LoRA, a prefix and an adapter in every layer, each behind a gate that the input opens.

Mao et al., ACL 2022, arXiv:2110.07577. A gate is one number a sample in (0, 1), the mean over its
tokens, `G = mean_t sigmoid(w h_t + b)`, of the hidden states that its part reads:

    q, v:       y = W x + G A(x)              A low rank; G in the place of alpha / rank
    attention:  K = [G P_k; K], V = [G P_v; V]
    ffn:        y = FFN(x) + G U relu(D z + b_D) + b_U)

LoRA's gates (one each for q and v) and the prefix's read what the projection (of the queries)
reads: the layer's input, normed in pre-norm models. The adapter reads the stream behind the block,
normed in post-norm models (Pfeiffer's placement, in which the norm is evaluated twice), and so
does its gate. Unlike in the authors' code, padding does not count, unless `padding=true`.

Where attention is causal, a mean over all tokens would tell each of later ones. There, a gate is
the mean over the tokens so far, equal to the authors' at the last token; and the prefix, whose
rows all queries share, is gated by what they all see: the first token; or with `prefix_gate=past`
for each query by the tokens up to it, which takes an attention in parts. A gate depends on the
input, so nothing folds, until `bake` with calibration data makes the gates numbers: their mean
over the samples. Then LoRA folds, and the certificate says how far the outputs moved on that data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ...rewriter.branches.gated import GatedDelta, GatedKeyValue, GatedSerial, QueryGatedKeyValue
from ...rewriter.edits.calls.call import Value
from ...rewriter.edits.edit import Editor
from ...rewriter.edits.stream.hidden import Reach
from ...rewriter.errors import PassError
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Contract
from ...rewriter.program.sites import AttentionSite, LinearSite, Site, SublayerSite
from ...rewriter.program.state import State
from ...rewriter.scores.observe import observe
from ..additive.prefix_tuning import PrefixTuning
from ..additive.serial_adapter import SerialAdapter
from ..reparameterized.lora import LoRA
from .mean_gate import Gate


@dataclass(frozen=True, kw_only=True)
class UniPELT(Method):
    """Gated LoRA at linears, gated prefixes at attentions, gated adapters at sublayers.

    Attributes:
        rank, alpha: of LoRA; the gate takes the place of alpha / rank unless alpha is given.
        length, projection: of the prefix, see `prefix_tuning`.
        bottleneck, activation: of the adapter.
        placement: the adapter reads the stream behind the block, or (`houlsby`) its output.
        prefix_gate: what opens the prefix where attention is causal, see above.
        padding: let padding count in the gates, as in the authors' code.
        std: of the normal initialisation of gates, prefixes and adapters.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "attention", "sublayer")
    contract: ClassVar[Contract] = Contract("trainable")
    folds: ClassVar[str] = "LoRA, once `bake` has made the gates numbers"

    rank: int = 8
    alpha: float | None = None
    length: int = 10
    projection: int | None = None
    bottleneck: int = 48
    activation: Literal["relu", "gelu", "silu"] = "relu"
    placement: Literal["pfeiffer", "houlsby"] = "pfeiffer"
    prefix_gate: Literal["first", "past"] = "first"
    padding: bool = False
    std: float = 0.02
    where: str = "q|v|attention and self|ffn and sublayer"

    def check(self) -> None:
        self.parts()

    def parts(self) -> tuple[LoRA, PrefixTuning, SerialAdapter]:
        """The three methods that are gated, with their options."""
        return (
            LoRA(rank=self.rank, alpha=float(self.rank) if self.alpha is None else self.alpha),
            PrefixTuning(length=self.length, projection=self.projection, std=self.std),
            SerialAdapter(bottleneck=self.bottleneck, activation=self.activation, std=self.std),
        )

    def obstacle(self, site: Site) -> str:
        return self.parts()[0].obstacle(site) if isinstance(site, LinearSite) else ""

    def insert(self, edit: Editor, site: LinearSite | AttentionSite | SublayerSite) -> None:
        lora, prefix, adapter = self.parts()
        seen = None
        if isinstance(site, SublayerSite):
            seen = edit.behind(site) if self.placement == "pfeiffer" else edit.output(site)
            if seen is None:
                return
        made = self.gate(edit, site, seen)
        if made is None:
            return
        gate, reach = made
        if isinstance(site, LinearSite):
            edit.add(site, GatedDelta(lora.made(edit, site), edit.samples(site)), gate=gate)
        elif isinstance(site, AttentionSite) and reach == "past":
            edit.prepend_kv(site, QueryGatedKeyValue(prefix.made(edit, site)), gates=gate)
        elif isinstance(site, AttentionSite):
            edit.prepend_kv(site, GatedKeyValue(prefix.made(edit, site)), gate=gate)
        else:
            edit.after(site, GatedSerial(adapter.made(edit, site)), gate=gate, seen=seen)

    def gate(self, edit: Editor, site: Site, seen: Value | None) -> tuple[Value, Reach] | None:
        """The gate of one site, evaluated once a forward; None where its tokens are unknown."""
        hidden = edit.hidden(site, seen)
        if hidden is None:
            return None
        prefix = hidden.causal and isinstance(site, AttentionSite)
        reach = self.prefix_gate if prefix else hidden.reach
        weight = torch.randn(1, hidden.width, generator=edit.generator) * self.std
        gate = Gate(weight.to(edit.like(site)), hidden.axes, reach)
        gate.by_query = prefix and reach == "past"
        valid = None if self.padding else hidden.valid
        value = edit.share(f"{edit.name(site)}.gate", gate, hidden=hidden.value, valid=valid)
        return value, reach

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        mine = [a for a in program.attachments if a.adapter == self.adapter and "gate" in a.reads]
        gates = {a.path: program.shared_path(a, "gate") for a in mine}
        if gates and data is None:
            raise PassError(
                f"the gates of {self.adapter!r} depend on the input, so making them numbers needs "
                "data to average over. Give batches of the program's inputs: "
                f"peftfx.run(program, 'bake{{names=[{self.adapter}]}}', data=[batch, ...])."
            )
        if not gates:
            return {}
        totals: dict[str, Any] = {g: program.module.get_submodule(g).total for g in gates.values()}
        means = observe(program, data, {g: g for g in totals}, totals)
        return {path: {"gate": float(means[g][0] / means[g][1])} for path, g in gates.items()}
