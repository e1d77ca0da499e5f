"""Along which sizes the samples of a batch lie: those along which no sample influences another.

A forward does not say what its axes mean: `[batch, tokens, width]` and `[tokens, batch, width]` are
one type. So one place along an axis is changed, and what happens at the others is looked at, at
all sites and outputs. Where there are no values, the attentions say along which axis they mix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph.aten import output_node, placeholders, shape
from ..graph.module import state_tensors
from ..graph.sharded import Gathering, whole
from ..inputs.axes import Kind
from ..inputs.changed import altered, levelled
from ..inputs.probes import fit
from ..inputs.spec import InputSpec
from ..inputs.tensor_input import TensorInput
from ..program.sites import AttentionSite, MixerSite, Site
from .compare import TOLERANCE, gaps
from .still import undisturbed

_PLACES = 5
"""How many places an axis is given: one is changed, two lie on each side of it."""


@dataclass(frozen=True)
class Values:
    """A captured graph, with what it takes to evaluate it.

    Attributes:
        gm, spec, symbols, sample: of the program.
        sites: whose values are looked at.
    """

    gm: GraphModule
    spec: InputSpec
    symbols: Mapping[str, str]
    sample: Mapping[str, Tensor]
    sites: Collection[Site]
    nodes: dict[str, Node] = field(init=False)

    def __post_init__(self) -> None:
        names = {n for s in self.sites for n in s.nodes}
        names |= {n.name for n in output_node(self.gm).all_input_nodes}
        nodes = {n.name: n for n in self.gm.graph.nodes if n.name in names}
        object.__setattr__(self, "nodes", nodes)

    def mixes(self, label: str) -> bool | None:
        """Whether places along the size `label` influence one another; None if unknown."""
        tensors = [t for m in (self.gm.parameters(), self.gm.buffers()) for t in m]
        if any(t.is_meta for t in (*tensors, *self.sample.values())):
            return self._attended(label)
        example = {n: max(2, s) for n, s in self.spec.sizes_of(self.sample).items()}
        sizes = fit(self.spec, {**example, label: _PLACES})
        if sizes is None or sizes[label] < 2:
            return self._attended(label)
        inputs = self.spec.resize(self.sample, **sizes)
        axes = {n: self._axes(node, label) for n, node in self.nodes.items()}
        given = {i.name: [a for a, s in enumerate(i.shape) if s == label] for i in self.spec.inputs}
        moved = self._moved(inputs, given, axes, sizes[label])
        if moved is None:
            return self._attended(label)
        return moved or bool(self._attended(label, computed=True))

    def mixes_fixed(self, axis: int, size: int) -> bool | None:
        """The same for an axis of all inputs whose size is a number, two at least."""
        if any(t.is_meta for t in (*self.gm.parameters(), *self.sample.values())):
            return None
        given = {n: [axis] if t.shape[axis : axis + 1] == (size,) else []
                 for n, t in self.sample.items()}  # fmt: skip
        axes = {
            n: [a for a, s in enumerate(shape(node) or ()) if type(s) is int and s == size]
            for n, node in self.nodes.items()
        }
        return self._moved(dict(self.sample), given, axes, size)

    def _axes(self, node: Node, label: str) -> list[int]:
        return [a for a, s in enumerate(shape(node) or ()) if self.symbols.get(str(s)) == label]

    def _labels(self, size: str) -> set[str | None]:
        """The names of the sizes that a size is computed from."""
        return {self.symbols.get(word) for word in re.findall(r"\w+", size)}

    def _attended(self, label: str, computed: bool = False) -> bool | None:
        """Whether an attention, `[..., tokens, width]`, has that size as its tokens, or a size that
        is `computed` from it (groups of tokens): no value has then shown what they do."""
        cores = [s for s in self.sites if isinstance(s, AttentionSite)]
        for core in cores:
            for operand in self.nodes[core.nodes[0]].all_input_nodes[:2]:
                size = shape(operand) or ()
                own = str(size[-2]) if len(size) > 1 else ""
                pure = self.symbols.get(own) == label
                if (pure and not computed) or (not pure and label in self._labels(own)):
                    return True
        mixers = any(isinstance(s, MixerSite) for s in self.sites)
        return False if cores and not mixers else None

    def _moved(
        self, inputs: dict[str, Tensor], given: Mapping[str, Sequence[int]],
        axes: Mapping[str, Sequence[int]], size: int,
    ) -> bool | None:  # fmt: skip
        before = self._run(inputs)
        tried = (self._compared(before, inputs, given, axes, size, c) for c in (altered, levelled))
        return next((verdict for verdict in tried if verdict is not None), None)

    def _compared(
        self, before: Mapping[str, Tensor] | None, inputs: Mapping[str, Tensor],
        given: Mapping[str, Sequence[int]], axes: Mapping[str, Sequence[int]], size: int,
        change: Callable[[Tensor, Sequence[int], int], Tensor],
    ) -> bool | None:  # fmt: skip
        seen = False
        for place in (size // 2,) if size > 2 else (0, 1):
            changed = {n: change(t, given[n], place) for n, t in inputs.items()}
            if all(t is inputs[n] for n, t in changed.items()):
                return None
            after = self._run(changed)
            if before is None or after is None:
                return None
            for name in before.keys() & after.keys():
                x, y = before[name], after[name]
                if not axes[name] or x.shape != y.shape:
                    continue
                seen = seen or not torch.equal(x, y)
                rest = torch.tensor([i for i in range(size) if i != place], device=x.device)
                for axis in axes[name]:
                    x, y = x.index_select(axis, rest), y.index_select(axis, rest)
                gap, largest = gaps([x], [y])
                if gap > TOLERANCE.get(x.dtype, 2e-5) * largest:
                    return True
        return False if seen else None

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        device = next((p.device for p in self.gm.parameters()), torch.device("cpu"))
        training = self.gm.training
        recorder = _Recorder(self.gm, self.nodes)
        flat = [inputs[n].to(device) for n in placeholders(self.gm)]
        try:
            self.gm.eval()
            with undisturbed(self.gm, state_tensors(self.gm)):
                recorder.run(*flat, enable_io_processing=False)
        except Exception:  # noqa: BLE001 - whatever the graph raises here means: no evidence
            return None
        finally:
            self.gm.train(training)
        return recorder.kept


class _Recorder(Gathering):
    """Keeps the floating-point values of some nodes."""

    def __init__(self, gm: GraphModule, names: Collection[str]) -> None:
        super().__init__(gm)
        self.names = names
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self.names and isinstance(result, Tensor) and result.is_floating_point():
            self.kept[n.name] = whole(result.detach()).clone()
        return result


def relabelled(values: Values) -> tuple[InputSpec, dict[str, str]]:
    """The spec and the symbols with sizes called `batch` where samples lie, as far as a trial
    shows that axis 0 is another: then the first size along which nothing mixes is the batch."""
    spec, symbols = values.spec, dict(values.symbols)
    guessed = spec.of_kind("batch")
    batches = {n for n in guessed if values.mixes(n) is not True}
    if len(batches) == len(guessed):
        return spec, symbols
    if not batches:
        rest = (n for n in spec.sizes if n not in guessed)
        batches = set([n for n in rest if values.mixes(n) is False][:1])
    names: dict[str, str] = {}
    for word, group in (("batch", batches), ("sequence", set(spec.sizes) - batches)):
        for index, name in enumerate(n for n in spec.sizes if n in group):
            names[name] = f"{word}_{index + 1}" if index else word
    return _renamed(spec, names), {s: names[n] for s, n in symbols.items()}


def kinds_of(values: Values) -> dict[str, Kind]:
    """What lies along the sizes that the user has named, where the names do not say: where none is
    called a batch, samples lie along the only size that a trial shows them along."""
    spec = values.spec
    if spec.of_kind("batch") or not spec.sizes:
        return {}
    apart = [n for n in spec.sizes if values.mixes(n) is False]
    return {apart[0]: "batch"} if len(apart) == 1 else {}


def _renamed(spec: InputSpec, names: Mapping[str, str]) -> InputSpec:
    def text(old: str) -> str:
        return re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), old)

    def item(given: TensorInput) -> TensorInput:
        dims = tuple(names.get(s, s) if isinstance(s, str) else s for s in given.shape)
        return replace(given, shape=dims)

    keys = {*names, *spec.relations}
    return replace(
        spec,
        inputs=tuple(item(i) for i in spec.inputs),
        ranges={names[n]: bounds for n, bounds in spec.ranges.items()},
        relations=tuple(text(r) for r in spec.relations),
        reasons={text(k) if k in keys else k: why for k, why in spec.reasons.items()},
    )
