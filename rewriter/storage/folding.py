"""Folding into a checkpoint's tensors, one weight at a time, and reading back what was written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..api import Program
from ..edits.edit import Editor
from ..edits.folding.fold import branch_of, by_weight, fold_weight
from ..edits.folding.result import Folding
from ..edits.linear.compose import ORDER, fold_ready
from ..errors import FoldError, NonFiniteError, VerifyError
from ..graph.aten import expression_of, set_attribute
from ..graph.turns import alone
from ..measure.compare import all_finite
from ..measure.constants import constant_reads
from ..program.sites import WeightSite
from ..weights.certificate import check_folded
from ..weights.verdict import Matrix
from ..weights.weight import stored_calls
from .safetensors_checkpoint import Checkpoint


class ShardFolder:
    """A program whose base is hollow; weights get values while they are folded, one at a time."""

    def __init__(self, program: Program, checkpoint: Checkpoint) -> None:
        self.given, self.program = program, program.fork()
        self.checkpoint = checkpoint
        self.names = checkpoint.match(program)
        self.result = Folding(constants=constant_reads(program, program.attachments))
        self.changed: list[str] = []
        self.edit = Editor(self.program)
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
        self.uses = Counter(self.canonical(n) for n in checkpoint.entries)
        self.ready: dict[str, Tensor | None] = {}

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
            reason = getattr(program.branch(attachment), "not_foldable", "")
            if reason or not isinstance(site, WeightSite):
                raise FoldError(
                    f"{attachment.site}: the adapter {attachment.adapter!r} cannot be folded"
                    f"{f': {reason}' if reason else ''}. Fold the others with "
                    "save(program, directory, adapters=[...])."
                )
        if not program.attachments and not self.owned:
            raise FoldError("there is no adapter to fold. Pass adapter=DIRECTORY.")

    def canonical(self, name: str) -> str:
        return self.program.aliases.get(name, name)

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

    def folded(self, name: str) -> Tensor | None:
        """The new value of a checkpoint's tensor; None if it stays as it is."""
        canonical = self.canonical(name)
        weight = self.weight_of.get(canonical)
        if weight is None and canonical not in self.owned:
            return None
        if weight is None:
            changed = self._if_changed(canonical)
        else:
            if canonical not in self.ready:
                self._fold(weight)
            self.uses[canonical] -= 1
            changed = self.ready[canonical] if self.uses[canonical] else self.ready.pop(canonical)
        if changed is not None:
            self.changed.append(name)
        return changed

    def _if_changed(self, canonical: str) -> Tensor | None:
        """A tensor as the files store it (what trained may be wider); None if it is the same."""
        old = self.checkpoint.tensor(self.names[canonical])
        current = self.program.module.get_parameter(canonical).detach().cpu().to(old.dtype)
        if not all_finite(current):
            raise NonFiniteError(
                f"{canonical}: what was learnt gives NaN or infinity in {str(old.dtype)[6:]}, "
                "the checkpoint's dtype."
            )
        return None if current.shape == old.shape and torch.equal(current, old) else current

    def _fold(self, weight: str) -> None:
        gm = self.program.module
        members = self._members(weight)
        for member in members:
            if gm.get_parameter(member).is_meta:
                value = self.checkpoint.tensor(self.names[member])
                set_attribute(gm, member, nn.Parameter(value, requires_grad=False))
        with alone():
            fold_weight(self.edit, self.groups[weight], "keep", self.result)
        if self.result.kept:
            path, reason = next(iter(self.result.kept.items()))
            raise FoldError(
                f"{weight}: the branch {path} cannot be folded: "
                f"{reason.removeprefix('not foldable: ')}."
            )
        for member in members:
            self.ready[member] = self._if_changed(member)
            hollow = gm.get_parameter(member).detach().to("meta")
            set_attribute(gm, member, nn.Parameter(hollow, False))

    def read_back(self, directory: Path) -> float:
        """Compares the files that were written with the source and the branches.

        Returns:
            The largest relative difference between a branch and its matrix.

        Raises:
            VerifyError: a weight is not the old one with its branches, or differs by its name.
        """
        written, gap = Checkpoint.read(directory), 0.0
        for weight, group in self.groups.items():
            site = self.sites[weight]
            mine = sorted((a for a in group if a.slot in ORDER), key=lambda a: ORDER[a.slot])
            constants = self.result.constants
            branches = [(a.path, branch_of(self.given, a, constants.get(a.path, {}))) for a in mine]
            before = self._matrix(site, {m: self._before(m) for m in self._members(weight)})
            after = self._matrix(
                site, {m: self._written(written, m) for m in self._members(weight)}
            )
            if mine:
                gap = max(gap, check_folded(site.id, before, after, branches).gap)
        return gap

    def _before(self, member: str) -> Tensor:
        """A tensor as the branches of linears find it: what trains it, expressions included."""
        own = self.given.module.get_parameter(member) if member in self.owned else None
        stored = self.checkpoint.tensor(self.names[member]) if own is None else own.detach().cpu()
        with torch.no_grad():
            for node in self.given.module.graph.nodes:
                if expression_of(node) == member:
                    path = str(node.target)
                    reads = self.result.constants.get(path, {})
                    stored = self.given.module.get_submodule(path).eval()(stored, **reads)
        return stored

    def _written(self, written: Checkpoint, member: str) -> Tensor:
        names = [n for n in written.entries if self.canonical(n) == member]
        tensors = [written.tensor(n) for n in names]
        for name, tensor in zip(names, tensors, strict=True):
            if not torch.equal(tensor, tensors[0]):
                raise VerifyError(f"{name!r} and {names[0]!r} are one tensor, but differ in files.")
        return tensors[0]

    def _matrix(self, site: WeightSite, tensors: Mapping[str, Tensor]) -> Matrix:
        stored = tensors[site.weight]
        dtype = self.checkpoint.entries[self.names[site.weight]].dtype
        bias = tensors[site.bias] if site.bias is not None else None
        return Matrix(self.edit.shape(site).matrix(stored), bias, dtype)

    def finish(self) -> None:
        """Everything was folded, or it is an error."""
        left = [p for group in self.groups.values() for p in group]
        left = [a for a in left if a.path not in self.result.folded]
        if left:
            raise FoldError(f"{left[0].site}: its weight is not in the checkpoint.")
