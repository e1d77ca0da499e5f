"""Trials: a captured graph against the model itself, in evaluation mode, at other sizes.

Export's guards are sufficient, not necessary: Mamba-2's graph is right for sequences below its
chunk, though a guard says otherwise; and size one is excluded for every model. What the model and
the graph agree on is measured here, so that the input spec is neither too wide nor too narrow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..running.compare import relative, tensors
from ..running.propagate import quiet
from ..running.verify import TOLERANCE
from .relation import violations
from .spec import InputSpec
from .tracing import prepared


class Trial:
    """Runs model and graph side by side.

    Args:
        model: what was captured; its buffers and mode are put back after every run.
        gm: the captured graph.
        spec: what it accepts.
        sample: the example inputs.
    """

    def __init__(
        self, model: nn.Module, gm: GraphModule, spec: InputSpec, sample: Mapping[str, Tensor]
    ) -> None:
        self.model, self.gm, self.spec, self.sample = model, gm, spec, sample
        held = [*model.parameters(), *model.buffers(), *sample.values()]
        self.possible = not any(t.is_meta for t in held)

    def gap(self, **sizes: int) -> float | None:
        """Largest difference of an output relative to its own largest value.

        None if nothing can be said (the model fails, or has no values); infinite if the graph
        fails, or returns something of another form.
        """
        if not self.possible:
            return None
        inputs = self.spec.resize(self.sample, **sizes)
        try:
            with _undisturbed(self.model):
                want = self._model(inputs)
        except Exception:  # noqa: BLE001 - any failure of the user's model means: no evidence
            return None
        try:
            with _undisturbed(self.gm):
                got = self._graph(inputs)
        except Exception:  # noqa: BLE001 - whatever the graph raises, it is not what the model does
            return float("inf")
        return relative(want, got)

    def agrees(self, **sizes: int) -> bool:
        """Whether nothing speaks against the graph at the given sizes."""
        return self.accepts(self.gap(**sizes))

    def accepts(self, gap: float | None) -> bool:
        """Whether a gap is none, or one of rounding."""
        dtype = next((p.dtype for p in self.gm.parameters()), torch.float32)
        return gap is None or gap <= TOLERANCE.get(dtype, 2e-5)

    def wrong_updates(self) -> list[str]:
        """Names of buffers that model and graph do not both write, or both leave, in each mode."""
        wrong: set[str] = set()
        if not self.possible or not any(True for _ in self.model.buffers()):
            return []
        for training in (True, False):
            try:
                ours = self._written(self.gm, self._graph, training)
                wrong |= ours ^ self._written(self.model, self._model, training)
            except Exception:  # noqa: BLE001 - as in `gap`: no evidence
                continue
        return sorted(wrong)

    def _written(self, module: nn.Module, run: Callable[..., Any], training: bool) -> set[str]:
        with _undisturbed(module) as kept:
            run(self.sample, training)
            held = module.named_buffers()
            return {n for n, b in held if n in kept and not torch.equal(b, kept[n])}

    def _model(self, inputs: Mapping[str, Tensor], training: bool = False) -> list[Tensor]:
        args, kwargs = self.spec.arguments({n: t.clone() for n, t in inputs.items()})
        with prepared(self.model, training), quiet():
            return tensors(self.model(*args, **kwargs))

    def _graph(self, inputs: Mapping[str, Tensor], training: bool = False) -> list[Tensor]:
        before = self.gm.training
        self.gm.train(training)
        try:
            return tensors(self.gm(**{n: t.clone() for n, t in inputs.items()}))
        finally:
            self.gm.train(before)


@contextlib.contextmanager
def _undisturbed(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """No gradients, the same random numbers every time, and buffers put back afterwards.

    Yields the buffers' values from before.
    """
    kept = {n: b.clone() for n, b in module.named_buffers()}
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            yield kept
    finally:
        for name, buffer in module.named_buffers():
            if name in kept and not torch.equal(buffer, kept[name]):
                buffer.data.copy_(kept[name])


def settle(spec: InputSpec, trial: Trial) -> InputSpec:
    """The spec with ranges and relations as far as model and graph agree."""
    if not trial.possible:
        return spec
    ranges, reasons = dict(spec.ranges), dict(spec.reasons)
    for name, (low, high) in spec.ranges.items():
        below = sorted({1, low // 2, low - 1} - {0})
        if low == 1:
            if not trial.agrees(**{name: 1}):
                ranges[name] = 2, high
                reasons[name] = "the model treats size 1 in another way"
        elif all(trial.gap(**{name: n}) is not None for n in below) and all(
            trial.agrees(**{name: n}) for n in below
        ):
            ranges[name] = 1, high
            if high is None:
                reasons.pop(name, None)
    relations = tuple(r for r in spec.relations if not _needless(r, trial))
    for relation in set(spec.relations) - set(relations):
        reasons.pop(relation, None)
    return replace(spec, ranges=ranges, reasons=reasons, relations=relations)


def _needless(relation: str, trial: Trial) -> bool:
    cases: Iterator[dict[str, int]] = islice(violations(relation, trial.spec.ranges), 3)
    found = [trial.gap(**sizes) for sizes in cases if max(sizes.values()) <= 64]
    return bool(found) and all(gap is not None and gap <= 1e-5 for gap in found)
