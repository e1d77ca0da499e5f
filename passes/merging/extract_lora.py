"""Extract LoRA: what a fine-tuned checkpoint changed, as an adapter of its base.

At each weight the difference becomes the nearest product `B A` of a rank (Eckart & Young), and the
record says what each lost. What is no such matrix (norms, biases, tables that the head shares) is
kept whole: the adapter trains it, as other libraries' `modules_to_save`. Tensors that did not
change are left alone.

    program = peftfx.run(base, "extract_lora{rank=16}", sources=["fine-tuned/"])
    program = peftfx.run(base, "extract_lora{energy=0.95}", sources=[model.state_dict()])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ...rewriter.edits.edit import Editor
from ...rewriter.errors import (
    MetaTensorError,
    NonFiniteError,
    OptionError,
    PassError,
    WeightsError,
    nearest,
)
from ...rewriter.measure.compare import all_finite
from ...rewriter.pipeline.passes import NAME, Pass
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.sites import WeightSite
from ...rewriter.program.state import State
from ...rewriter.storage.safetensors_checkpoint import Checkpoint
from ...rewriter.verify.verify import is_meta
from ..reparameterized.lora import LoRABranch
from . import low_rank


@dataclass(frozen=True, kw_only=True)
class ExtractLora(Pass):
    """Inserts what a fine-tuned checkpoint changed, low-rank.

    Attributes:
        rank: of each weight; smaller ones have what they can.
        energy: as few ranks as hold this share of the change's square, in (0, 1]; with `rank`, at
            most so many.
        whole: keep what is no matrix of a call, with its new values; without, the record names it.
        name: of the adapter.
    """

    contract: ClassVar[Contract] = Contract("trainable")
    sourced: ClassVar[bool] = True

    rank: int | None = None
    energy: float | None = None
    whole: bool = True
    name: str = "extracted"

    @property
    def adapter(self) -> str:
        return self.name

    def check(self) -> None:
        self.require(bool(NAME.fullmatch(self.name)), "name", "letters, digits, _ and -")
        self.require(self.rank is None or self.rank >= 1, "rank", "at least 1")
        self.require(self.energy is None or 0 < self.energy <= 1, "energy", "in (0, 1]")
        if self.rank is None and self.energy is None:
            raise OptionError(f"{self.text} needs a rank or an energy. Choose one: {{rank=16}}.")

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        if is_meta(program):
            raise MetaTensorError(
                f"{self.text}: the program has no values. Give it those of the base first: "
                "peftfx.load_weights."
            )
        if len(sources) != 1:
            raise PassError(
                f"{self.text} takes one source, the fine-tuned checkpoint: sources=[directory]."
            )
        read = _reader(program.base, sources[0], self.text)
        found = _Found(self, Editor(program.fork()))
        stored = program.base.base_tensors()
        for name in stored:
            found.add(name, stored[name], read(name))
        if not found.changed:
            raise PassError(f"{self.text}: the checkpoint changed nothing, so there is no adapter.")
        if self.rank is not None and found.limit and self.rank > found.limit:
            raise PassError(
                f"{self.text}: rank={self.rank}, but the largest weight that changed has "
                f"{found.limit} ranks. Choose that or less."
            )
        decisions = {
            "sites": list(found.forms), "forms": found.forms, "trained": found.trained,
            "left": found.left, "lost": found.lost(),
        }  # fmt: skip
        return Plan(decisions, found.tensors)

    def apply(self, edit: Editor, plan: Plan) -> None:
        forms: Mapping[str, Any] = plan.decisions["forms"]
        for name in forms:
            site: Any = edit.program.sites[name]
            like = edit.like(site)
            a, b = (plan.tensors[f"{name}.{k}"].to(like, copy=True) for k in "ab")
            edit.add(site, LoRABranch(a, b, 1.0, 0.0))
        for name in plan.decisions["trained"]:
            edit.train(name)
            with torch.no_grad():
                edit.stored(name).copy_(plan.tensors[f"{name}.whole"])
            edit.edited.append(name)
        edit.skipped.extend(plan.decisions["left"].items())
        edit.figures["lost"] = plan.decisions["lost"]
        worst = sorted(((about["error"], n) for n, about in forms.items()), reverse=True)
        for error, name in worst[:3]:
            edit.note(f"{name}: {error:.2g} of its change's norm is lost at rank "
                      f"{forms[name]['rank']}")  # fmt: skip
        if trained := plan.decisions["trained"]:
            edit.note(f"{len(trained)} tensors are kept whole (first: {trained[0]})")


class _Found:
    """What changed, gathered tensor by tensor."""

    def __init__(self, item: ExtractLora, edit: Editor) -> None:
        self.item, self.edit = item, edit
        self.forms: dict[str, dict[str, Any]] = {}
        self.trained: list[str] = []
        self.left: dict[str, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.limit = self.changed = 0
        self.square = self.missing = 0.0

    @torch.no_grad()
    def add(self, name: str, old: Tensor, new: Tensor) -> None:
        if torch.equal(old, new.to(old.device)):
            return
        self.changed += 1
        if not old.is_floating_point() or not self.edit.is_parameter(name):
            self.left[name] = "it is no parameter, so no adapter holds its change"
            return
        if not all_finite(new):
            raise NonFiniteError(f"the fine-tuned {name} holds NaN or infinity. Nothing is done.")
        sites = self._sites(name)
        if not sites:
            self._keep(name, new)
            return
        change = new.double().to(old.device) - old.double()
        matrix = self.edit.shape(sites[0]).matrix(change)
        for site in sites:
            self._factor(site, matrix)

    def _keep(self, name: str, new: Tensor) -> None:
        if not self.item.whole:
            self.left[name] = "it changed, and is no matrix of a call: say whole=true to keep it"
            return
        self.trained.append(name)
        self.tensors[f"{name}.whole"] = new.clone()

    def _sites(self, name: str) -> list[WeightSite]:
        """The sites that hold all of a weight, each row once; none where it has other readers."""
        sites = [s for s in self.edit.program.sites
                 if isinstance(s, WeightSite) and s.weight == name]  # fmt: skip
        if not sites or any(s.tied or self.edit.obstacle(s) for s in sites):
            return []
        rows = [f for s in sites for f in (s.features or ())]
        whole = len(sites) == 1 and sites[0].features is None
        width = self.edit.weight(sites[0]).out_features
        return sites if whole or sorted(rows) == list(range(width)) else []

    def _factor(self, site: Any, matrix: Tensor) -> None:
        count, out, size = site.matrices
        own = matrix.unflatten(0, (count, -1))
        own = own if site.features is None else own[:, list(site.features)]
        if not bool(own.any()):
            return
        found = low_rank.nearest(own if count > 1 else own[0], self.item.rank, self.item.energy)
        self.limit = max(self.limit, min(out, size))
        square = float(own.square().sum())
        self.square, self.missing = self.square + square, self.missing + found.error**2 * square
        like = self.edit.like(site)
        a, b = (t.to(like).contiguous() for t in (found.a, found.b))
        self.forms[site.id] = {"rank": a.shape[-2], "error": found.error}
        self.tensors |= {f"{site.id}.a": a, f"{site.id}.b": b}

    def lost(self) -> float:
        """The norm of all that is missing, as a share of that of all changes of weights."""
        return (self.missing / self.square) ** 0.5 if self.square else 0.0


def _reader(base: State, source: Any, what: str) -> Callable[[str], Tensor]:
    """Gives the fine-tuned tensors, one at a time, by the base's canonical names.

    Raises:
        PassError: the source is nothing of the kind.
        WeightsError: it has other tensors, or of other shapes.
    """
    shapes: dict[str, tuple[int, ...]]
    value: Callable[[str], Tensor]
    if isinstance(source, str | Path):
        files = Checkpoint.read(source)
        shapes = {n: e.shape for n, e in files.entries.items()}
        value = files.tensor
    elif isinstance(source, Mapping):
        given = cast("Mapping[str, Tensor]", source)
        if not all(isinstance(t, Tensor) for t in given.values()):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PassError(f"{what}: a state dict holds tensors alone.")
        shapes = {n: tuple(t.shape) for n, t in given.items()}
        value = lambda n: given[n].detach()  # noqa: E731
    else:
        said = f"a directory with safetensors files or a state dict, not {type(source).__name__}"
        raise PassError(f"{what}: the fine-tuned checkpoint is {said}.")
    if unknown := sorted(set(shapes) - set(base.state_names)):
        raise WeightsError(
            f"the fine-tuned checkpoint holds {unknown[0]!r} ({len(unknown)} such tensors), which "
            f"the base does not have. Nearest: {nearest(unknown[0], base.state_names)}."
        )
    names: dict[str, str] = {}
    for name in (n for n in base.state_names if n in shapes):
        one = names.setdefault(base.aliases.get(name, name), name)
        if shapes[one] != shapes[name] or (
            one != name and not torch.equal(value(one), value(name))
        ):
            raise WeightsError(
                f"the fine-tuned checkpoint holds different tensors for {one!r} and {name!r}, "
                "which the base ties. Capture the base with untied weights."
            )
    for name, tensor in base.base_tensors().items():
        if name in base.state_names and name not in names:
            raise WeightsError(
                f"the fine-tuned checkpoint has no tensor {name!r}. Use a whole one."
            )
        if name in names and shapes[names[name]] != tuple(tensor.shape):
            raise WeightsError(
                f"{name!r} is {list(shapes[names[name]])} in the fine-tuned checkpoint, and "
                f"{list(tensor.shape)} in the base. An adapter changes no shapes."
            )
    stored = base.base_tensors()
    return lambda name: value(names[name]) if name in names else stored[name]
