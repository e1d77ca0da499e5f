"""Folding into a checkpoint's tensors, one weight at a time: those of a program, or of a model of
which the layout is known and no more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..api import Program
from ..branches.branch import Branch
from ..branches.shapes import LinearShape
from ..edits.edit import Editor
from ..edits.folding.apart import fold_apart
from ..edits.folding.fold import by_weight, fold_weight
from ..edits.folding.result import Folding
from ..edits.linear.compose import fold_ready
from ..errors import FoldError, NonFiniteError
from ..graph.aten import set_attribute
from ..graph.turns import alone
from ..measure.compare import all_finite
from ..measure.constants import constant_reads
from ..program.sites import WeightSite
from ..tracing.reads import Layout
from ..weights.weight import stored_calls
from .safetensors_checkpoint import Checkpoint


class Folder(ABC):
    """New values of a checkpoint's tensors, one at a time.

    Attributes:
        names: first name of each of the model's tensors -> its name in the checkpoint.
        state_names: all names that the model has for its tensors.
        result: what was measured.
        changed: names in the checkpoint of what is new.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Mapping[str, str],
        state_names: Sequence[str],
        aliases: Mapping[str, str],
        result: Folding,
    ) -> None:
        self.checkpoint, self.names, self.state_names = checkpoint, names, state_names
        self.aliases, self.result = aliases, result
        self.changed: list[str] = []
        self.weight_of: dict[str, str] = {}
        self.uses = Counter(self.canonical(n) for n in checkpoint.entries)
        self.ready: dict[str, Tensor | None] = {}
        self.resumed: set[str] = set()

    def canonical(self, name: str) -> str:
        whole = self.checkpoint.whole(name)
        return self.aliases.get(whole, whole)

    def resume(self, names: Iterable[str]) -> None:
        """Leaves out tensors that are written already."""
        for name in names:
            self.uses[self.canonical(name)] -= 1
            self.resumed.add(self.canonical(name))

    def folded(self, name: str) -> Tensor | None:
        """The new value of a checkpoint's tensor, in its dtype; None if it stays as it is."""
        canonical = self.canonical(name)
        weight = self.weight_of.get(canonical)
        if weight is None:
            current = self._trained(canonical)
        else:
            if canonical not in self.ready:
                for member, tensor in self._fold(weight).items():
                    self.ready[member] = tensor if self.uses[member] > 0 else None
            self.uses[canonical] -= 1
            current = self.ready[canonical] if self.uses[canonical] else self.ready.pop(canonical)
        changed = None if current is None else self._if_changed(name, canonical, current)
        if changed is not None:
            self.changed.append(name)
        return changed

    @abstractmethod
    def _fold(self, weight: str) -> Mapping[str, Tensor]:
        """The values of the tensors that folding into a weight may change, itself included."""

    @abstractmethod
    def _trained(self, name: str) -> Tensor | None:
        """What an adapter has for a tensor that nothing is folded into; None if it has nothing."""

    called = "the adapter"
    """What is folded, in the card."""

    @abstractmethod
    def kinds(self) -> Mapping[str, int]:
        """What is folded, in words -> at how many weights."""

    @abstractmethod
    def finish(self) -> None:
        """Everything that was not written before was folded, or it is an error."""

    def leave(self, folder: Path) -> list[str]:
        """Writes what was not folded into a new folder; gives the weights' names."""
        del folder
        return []

    def _if_changed(self, name: str, canonical: str, current: Tensor) -> Tensor | None:
        """What the files store under a name (what trained may be wider); None if it is the same."""
        old, files = self.checkpoint.mapped(name), self.checkpoint
        current = current.detach().cpu()
        whole = files.wholes.get(self.names[canonical], files.entries.get(name))
        if whole is None or tuple(current.shape) != whole.shape:
            raise FoldError(
                f"{canonical}: the folded tensor is {tuple(current.shape)}, but the checkpoint's "
                f"{name} is {tuple(old.shape)}."
            )
        current = files.piece(name, current.to(old.dtype))
        if self._trained(canonical) is not None and not all_finite(current):
            raise NonFiniteError(
                f"{canonical}: what was learnt gives NaN or infinity in {str(old.dtype)[6:]}, "
                "the checkpoint's dtype."
            )
        return None if torch.equal(current, old) else current


class ShardFolder(Folder):
    """A program whose base is hollow; weights get values while they are folded, one at a time."""

    def __init__(self, program: Program, checkpoint: Checkpoint) -> None:
        self.given, self.program = program, program.fork()
        constants = constant_reads(program, program.attachments)
        super().__init__(
            checkpoint, checkpoint.match(program), program.base.state_names, program.aliases,
            Folding(constants=constants),
        )  # fmt: skip
        self.edit = Editor(self.program)
        self.called = ", ".join(program.owners)
        self.owned = program.tensors.trained
        self.hollowed = {n for n in self.names if n not in self.owned}
        self._refuse()
        for name in self.hollowed:
            self._hollow(name)
        paths = [a.path for a in program.attachments]
        with alone():
            fold_ready(self.program, frozenset(paths))
        self.groups = by_weight(self.program, paths)
        sites = {w: self.program.sites[group[0].site] for w, group in self.groups.items()}
        self.sites = {w: s for w, s in sites.items() if isinstance(s, WeightSite)}
        self.weight_of = {n: weight for weight in self.groups for n in self._members(weight)}

    def _refuse(self) -> None:
        """Everything that a checkpoint has no place for, before anything is written."""
        program = self.program
        if program.added:
            raise FoldError(
                f"{program.added[0]!r} and {len(program.added) - 1} more biases were added to the "
                "model; its checkpoint has no place for them."
            )
        if quantised := list(stored_calls(program)):
            raise FoldError(
                f"{len(quantised)} weights are quantised (first: {quantised[0]}); the "
                "checkpoint has no place for integers. Export to ONNX instead, or take dense "
                "weights from program.export_state_dict()."
            )
        for node in program.module.graph.nodes:
            if names := node.meta.get("expressions"):
                raise FoldError(
                    f"{node.target} computes {len(names)} weights together ({', '.join(names)}), "
                    "and shards are folded one weight at a time. Load the weights and use fold."
                )
        for attachment in program.attachments:
            site = program.sites[attachment.site]
            if reason := getattr(program.branch(attachment), "not_foldable", ""):
                raise FoldError(
                    f"{attachment.site}: the adapter {attachment.adapter!r} cannot be folded: "
                    f"{reason}. Fold the others with save(program, directory, adapters=[...])."
                )
            if not isinstance(site, WeightSite):
                raise FoldError(
                    f"{attachment.site}: the adapter {attachment.adapter!r} changes a {site.kind}, "
                    "which is not folded file by file. Fold it in memory: run(program, 'fold'), or "
                    "peftfx fold MODEL ADAPTER --out merged.safetensors."
                )
        if not program.attachments and not self.owned:
            raise FoldError("there is no adapter to fold. Pass adapter=DIRECTORY.")

    def _members(self, weight: str) -> list[str]:
        bias = self.sites[weight].bias
        return [weight] if bias is None else [weight, bias]

    def _hollow(self, name: str) -> None:
        parameter = self._parameter(name)
        if parameter is not None and not parameter.is_meta:
            set_attribute(self.program.module, name, nn.Parameter(parameter.to("meta"), False))

    def _parameter(self, name: str) -> nn.Parameter | None:
        try:
            return self.program.module.get_parameter(name)
        except AttributeError:  # a buffer, or not in the graph: it is copied as it is
            return None

    def _trained(self, name: str) -> Tensor | None:
        return self.program.module.get_parameter(name) if name in self.owned else None

    def _fold(self, weight: str) -> Mapping[str, Tensor]:
        gm = self.program.module
        members = self._members(weight)
        for member in members:
            if gm.get_parameter(member).is_meta:
                value = self.checkpoint.mapped(self.names[member])
                set_attribute(gm, member, nn.Parameter(value, requires_grad=False))
        with alone():
            fold_weight(self.edit, self.groups[weight], "keep", self.result)
        if self.result.kept:
            path, reason = next(iter(self.result.kept.items()))
            raise FoldError(
                f"{weight}: the branch {path} cannot be folded: "
                f"{reason.removeprefix('not foldable: ')}."
            )
        values = {member: gm.get_parameter(member).detach() for member in members}
        for member, value in values.items():
            set_attribute(gm, member, nn.Parameter(value.to("meta"), False))
        return values

    def kinds(self) -> Mapping[str, int]:
        attached = self.given.attachments
        return Counter(_kind(self.given.branch(a)) for a in attached)

    def finish(self) -> None:
        groups = (g for w, g in self.groups.items() if w not in self.resumed)
        left = [a for g in groups for a in g if a.path not in self.result.folded]
        if left:
            raise FoldError(f"{left[0].site}: its weight is not in the checkpoint.")


Leave = Callable[[Path, Mapping[str, tuple[Tensor, Tensor] | None]], None]
"""Writes an adapter into a new folder: weight -> the factors `(b, a)` beside it, or None where its
branches stay as they are."""


@dataclass(frozen=True)
class Rest:
    """What is not folded.

    Attributes:
        least, rank: see `Folding`.
        write: of what stays.
    """

    least: float
    rank: int
    write: Leave


class LayoutFolder(Folder):
    """Branches beside the matrices of a model that was not captured."""

    def __init__(
        self,
        layout: Layout,
        checkpoint: Checkpoint,
        branches: Mapping[str, Sequence[Branch]],
        trained: Mapping[str, Tensor],
        called: str,
        rest: Rest | None = None,
    ) -> None:
        """
        Args:
            branches: of `layout.matrices`, by their names.
            trained: values of other tensors, by their first names.
            called: the adapter's name.
            rest: what is to stay, else all is folded.
        """
        names = checkpoint.places(layout.state_names, layout.aliases, layout.tensors)
        result = Folding() if rest is None else Folding(least=rest.least, rank=rest.rank)
        super().__init__(checkpoint, names, layout.state_names, layout.aliases, result)
        self.rest = rest
        self.layout, self.branches, self.trained = layout, branches, trained
        self.called = called
        self.weight_of = {name: name for name in branches}

    def _fold(self, weight: str) -> Mapping[str, Tensor]:
        stored = self.checkpoint.mapped(self.names[weight])
        shape = LinearShape(self.layout.matrices[weight])
        return {weight: fold_apart(weight, stored, shape, self.branches[weight], self.result)}

    def _trained(self, name: str) -> Tensor | None:
        return self.trained.get(name)

    def kinds(self) -> Mapping[str, int]:
        return Counter(_kind(b) for beside in self.branches.values() for b in beside)

    def finish(self) -> None:
        left = {*self.branches} - {*self.result.shares, *self.result.kept} - self.resumed
        if left:
            raise FoldError(f"{min(left)}: its weight is not in the checkpoint.")

    def leave(self, folder: Path) -> list[str]:
        if self.rest is None:
            return []
        for weight in sorted(self.resumed & {*self.branches}):  # written before a kill: once more
            self._fold(weight)
        factors = dict.fromkeys(self.result.kept) | self.result.parts
        if factors:
            self.rest.write(folder, factors)
        return sorted(factors)


def _kind(branch: nn.Module) -> str:
    """What a branch is called, with what its graph text says of it."""
    name = type(branch).__name__.removesuffix("Branch")
    said = branch.describe() if isinstance(branch, Branch) else ""
    return f"{name} ({said})" if said else name
