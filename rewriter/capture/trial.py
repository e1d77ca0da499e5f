"""Trials: a captured graph against the model itself, in evaluation mode, at other sizes.

Export's guards are sufficient, not necessary: Mamba-2's graph is right for sequences below its
chunk, though a guard says otherwise; and size one is excluded for every model. What the model and
the graph agree on is measured here, so that the input spec is neither too wide nor too narrow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..graph.module import modes_kept, state_tensors
from ..inputs.probes import fit
from ..inputs.relation import violations
from ..inputs.spec import InputSpec
from ..measure.compare import TOLERANCE, relative, tensors
from ..measure.still import is_modeless, undisturbed
from ..tracing.propagate import quiet
from ..tracing.tracing import prepared


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
        tensors = [*model.parameters(), *model.buffers(), *sample.values()]
        self.state = state_tensors(gm) - {n for n, _ in model.named_buffers()}
        self.possible = not any(t.is_meta for t in tensors)
        self._written: set[str] | None = None  # by the graph in evaluation mode

    def gap(self, **sizes: int) -> float | None:
        """Largest difference of an output relative to its own largest value, in evaluation mode.

        None if nothing can be said (the model fails, or has no values); infinite if the graph
        fails, or returns something of another form.
        """
        return self._gap(False, sizes)

    def gap_as_they_are(self) -> float | None:
        """The same with every module, of the model and the graph, in the mode that it is in."""
        return self._gap(None, {})

    def _gap(self, training: bool | None, sizes: Mapping[str, int]) -> float | None:
        if not self.possible:
            return None
        return self._compared(training, sizes)[0]

    def _compared(
        self, training: bool | None, sizes: Mapping[str, int]
    ) -> tuple[float | None, set[str]]:
        """The gap in a mode, and the names of what only one of both writes."""
        inputs = self.spec.resize(self.sample, **sizes)
        wanted = self.of_model(inputs, training)
        if wanted is None:
            return None, set()
        got = self.of_graph(inputs, training)
        if got is None:
            return float("inf"), set()
        if training is False:
            self._written = got[1]
        return relative(wanted[0], got[0]), wanted[1] ^ got[1]

    def _only_one_writes(self, training: bool | None) -> set[str]:
        """Names of what only one of both writes at the sample."""
        if training is None or self._written is None or not is_modeless(self.gm):
            return self._compared(training, {})[1]
        wanted = self.of_model(self.sample, training)  # the graph does what it did before
        return set() if wanted is None else wanted[1] ^ self._written

    def of_model(
        self, inputs: Mapping[str, Tensor], training: bool | None = False
    ) -> tuple[list[Tensor], set[str]] | None:
        """What the model returns, and what it writes; None if it fails, which is no evidence."""
        try:
            return self._run(self.model, self._model, inputs, training)
        except Exception:  # noqa: BLE001 - any failure of the user's model means: no evidence
            return None

    def of_graph(
        self, inputs: Mapping[str, Tensor], training: bool | None = False
    ) -> tuple[list[Tensor], set[str]] | None:
        """The same of the graph; whatever it raises, it is not what the model does."""
        try:
            return self._run(self.gm, self._graph, inputs, training)
        except Exception:  # noqa: BLE001 - see above
            return None

    def agrees(self, **sizes: int) -> bool:
        """Whether nothing speaks against the graph at the given sizes."""
        return self.accepts(self.gap(**sizes))

    def outcome(self) -> tuple[float | None, list[str]]:
        """The gap at the sample, and `wrong_updates`, from one run in each mode."""
        if not self.possible:
            return None, []
        gap, wrong = self._compared(False, {})
        return gap, sorted({*wrong, *self.wrong_updates((True,))})

    def agrees_wholly(self) -> bool:
        """Whether nothing speaks against the graph at the sample: neither what it returns in
        evaluation mode nor what it writes in both."""
        gap, wrong = self.outcome()
        return self.accepts(gap) and not wrong

    def accepts(self, gap: float | None) -> bool:
        """Whether a gap is none, or one of rounding."""
        dtype = next((p.dtype for p in self.gm.parameters()), torch.float32)
        return gap is None or gap <= TOLERANCE.get(dtype, 2e-5)

    def wrong_updates(self, modes: Sequence[bool | None] = (True, False)) -> list[str]:
        """Names of buffers that model and graph do not both write, or both leave, in each mode."""
        wrong: set[str] = set()
        if not self.possible or not (self.state or any(True for _ in self.model.buffers())):
            return []
        for training in modes:
            wrong |= self._only_one_writes(training)
        return sorted(wrong)

    def _run(
        self,
        module: nn.Module,
        run: Callable[..., list[Tensor]],
        inputs: Mapping[str, Tensor],
        training: bool | None,
    ) -> tuple[list[Tensor], set[str]]:
        """What a module returns, and the names of the tensors that it writes meanwhile."""
        with undisturbed(module, self.state) as before:
            outputs = run(inputs, training)
            tensors = (*module.named_buffers(), *module.named_parameters())
            written = {n for n, b in tensors if n in before and not torch.equal(b, before[n])}
            return outputs, written

    def _model(self, inputs: Mapping[str, Tensor], training: bool | None = False) -> list[Tensor]:
        args, kwargs = self.spec.arguments({n: t.clone() for n, t in inputs.items()})
        with prepared(self.model, training), quiet():
            return tensors(self.model(*args, **kwargs))

    def _graph(self, inputs: Mapping[str, Tensor], training: bool | None = False) -> list[Tensor]:
        with modes_kept(self.gm):
            if training is not None:
                self.gm.train(training)
            return tensors(self.gm(**{n: t.clone() for n, t in inputs.items()}))


def must_be_equal(trial: Trial, symbols: Mapping[str, str]) -> list[tuple[str, str]]:
    """Symbols whose sizes the model needs to be equal, though no guard says so.

    Only sizes that are equal in the example can be: both are changed to one other size, and one of
    them is. Where no trial is possible, that goes for the first axes of all inputs.
    """
    spec, owner = trial.spec, {label: symbol for symbol, label in symbols.items()}
    example = spec.sizes_of(trial.sample)
    firsts = {i.shape[0] for i in spec.inputs if i.shape}
    equal: dict[str, str] = {}
    for first, later in itertools.combinations(spec.sizes, 2):
        if example[first] != example[later] or {first, later} & set(equal):
            continue
        needed = _needs_equal(trial, example, first, later)
        if needed or (needed is None and {first, later} <= firsts):
            equal[later] = first
    return [(owner[first], owner[later]) for later, first in equal.items()]


def _needs_equal(trial: Trial, example: Mapping[str, int], first: str, later: str) -> bool | None:
    """Whether one size must be equal to another; None if the model tells nothing.

    Tried are more and fewer, because rows that are too many may just be left over, and sizes of two
    at least, because one is broadcast.
    """
    small = {name: max(2, size) for name, size in example.items()}
    size = max(3, small[first])
    larger = {**small, first: size, later: size + 1}, {**small, first: size + 1, later: size}
    more = [f"{first} >= 2", f"{later} >= 2", f"{first} != {later}"]
    apart = [sizes for wanted in larger if (sizes := fit(trial.spec, wanted, more)) is not None]
    if not apart:
        return False
    gaps_apart = [trial.gap(**sizes) for sizes in apart]
    if all(gap is not None and trial.accepts(gap) for gap in gaps_apart):
        return False
    together = fit(trial.spec, larger[0], [f"{first} == {later}", f"{first} >= 2"])
    gap = trial.gap(**together) if together is not None else None
    return True if gap is not None and trial.accepts(gap) else None


def settle(spec: InputSpec, trial: Trial) -> InputSpec:
    """The spec with ranges and relations as far as model and graph agree."""
    if not trial.possible:
        return spec
    ranges, reasons = dict(spec.ranges), dict(spec.reasons)
    for name, (low, high) in spec.ranges.items():
        below = _smaller(trial, name, sorted({1, low // 2, low - 1} - {0}))
        gaps_below = [trial.gap(**sizes) for sizes in below]
        if low == 1:
            if not all(map(trial.accepts, gaps_below)):
                ranges[name] = 2, high
                reasons[name] = "the model treats size 1 in another way"
        elif below and all(g is not None and trial.accepts(g) for g in gaps_below):
            ranges[name] = 1, high
            if high is None:
                reasons.pop(name, None)
    relations = tuple(r for r in spec.relations if not _needless(r, trial))
    for relation in set(spec.relations) - set(relations):
        reasons.pop(relation, None)
    return replace(spec, ranges=ranges, reasons=reasons, relations=relations)


def _smaller(trial: Trial, name: str, tried: Sequence[int]) -> list[dict[str, int]]:
    """Sizes like the example's but for one, which is small, and those that relations move with it;
    none for a size that the relations exclude."""
    spec, example = trial.spec, trial.spec.sizes_of(trial.sample)
    wider = replace(spec, ranges={**spec.ranges, name: (1, spec.ranges[name][1])})
    fitted = (fit(wider, {**example, name: size}, [f"{name} == {size}"]) for size in tried)
    return [sizes for sizes in fitted if sizes is not None]


def _needless(relation: str, trial: Trial) -> bool:
    cases: Iterator[dict[str, int]] = islice(violations(relation, trial.spec.ranges), 3)
    gaps = [trial.gap(**sizes) for sizes in cases if max(sizes.values()) <= 64]
    return bool(gaps) and all(gap is not None and gap <= 1e-5 for gap in gaps)
