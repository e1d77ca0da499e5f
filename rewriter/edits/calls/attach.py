"""The plumbing below the editor: modules registered, calls made, and what a report will say."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...branches.branch import Branch
from ...branches.shapes import Shape
from ...errors import PassError
from ...graph.aten import erase_dead
from ...graph.flow import site_nodes
from ...graph.module import outdate
from ...program.history import Attachment
from ...program.sites import Site, WeightSite
from ...program.state import BRANCHES, State
from ...weights.shape import call_obstacle, shape_of
from ...weights.weight import Weight, weight_of
from .call import EMPTY, Value, branch_call, given
from .requirements import require_axes, require_order
from .values import unshared


class Attaching:
    """Edits a fork of a program; nothing else may hold the fork while it is edited.

    Attributes:
        program: the fork.
        method: the text name of the pass that edits, for messages.
        generator: the random source of everything that a pass initialises.
        edited, skipped: what the report will say.
        notes: further lines of the record.
        figures: measured by the pass itself, added to its certificate.
        decided, tensors: the plan's decisions and tensors; what only applying can tell is added for
            replays.
    """

    def __init__(
        self,
        program: State,
        adapter: str | None = None,
        seed: int = 0,
        decisions: Mapping[str, Any] | None = None,
        method: str = "",
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.program = program
        self.adapter = adapter
        self.method = method or adapter or "this pass"
        self.generator = torch.Generator().manual_seed(seed)
        self.edited: list[str] = []
        self.skipped: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.figures: dict[str, float] = {}
        self.tensors: dict[str, Tensor] = dict(tensors or {})
        self.decided: dict[str, Any] = copy.deepcopy(dict(decisions or {}))
        self._folder = ""
        self._states: list[str] = []
        self._nodes = site_nodes(self.graph_module)

    @property
    def graph_module(self) -> GraphModule:
        """The graph under edit."""
        return self.program.module

    def node(self, name: str) -> Node:
        """The graph node of a site."""
        return self._nodes[name]

    def refresh(self) -> None:
        """Looks for the nodes of sites again, once there are others."""
        self._nodes = site_nodes(self.graph_module)

    def name(self, site: Site) -> str:
        """A site's id as the name of a module."""
        return site.id.removesuffix(".weight").replace(":", ".")

    def weight(self, site: WeightSite) -> Weight:
        """What the site multiplies by."""
        return weight_of(self.graph_module, site, self._nodes.get(site.nodes[0]))

    def shape(self, site: WeightSite) -> Shape:
        """How a site's calls multiply by its weight."""
        return shape_of(site, self._nodes.get(site.nodes[0]))

    def obstacle(self, site: WeightSite) -> str:
        """Why no branch can stand beside a site's calls; empty if one can."""
        return call_obstacle(site, [self.node(name) for name in site.nodes])

    def skip(self, site: Site, reason: str) -> None:
        """Reports that a selected site was left alone."""
        self.skipped.append((site.id, reason))

    def note(self, line: str) -> None:
        """Adds a line to the record, once."""
        if line not in self.notes:
            self.notes.append(line)

    def like(self, site: Site) -> Tensor:
        """What new parameters at a site are like, for `.to(...)`: on the device of its value, and
        of its dtype, but float32 at least (small steps would be rounded away in less)."""
        val = self.node(site.nodes[0]).meta.get("val")
        if not isinstance(val, Tensor):
            raise PassError(f"{site.id} has no recorded value.")
        return torch.empty(0, dtype=wide(val.dtype), device=val.device)

    @contextlib.contextmanager
    def below(self, name: str) -> Generator[None]:
        """Branches inserted meanwhile go below `name` in this pass's own adapter."""
        outer, self._folder = self._folder, f"{self._folder}{name}."
        try:
            yield
        finally:
            self._folder = outer

    @contextlib.contextmanager
    def deciding(self, name: str, keys: Sequence[Any]) -> Generator[None]:
        """Meanwhile `tensors` are those of the plan below `name`, and `decided` is what the plan
        holds below `keys`."""
        tensors, decided = self.tensors, self.decided
        prefix, inner = f"{name}/", decided
        self.tensors = {
            n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)
        }
        for key in keys:
            inner = inner[key]
        self.decided = inner
        yield
        self.decided = decided
        self.tensors = tensors | {f"{prefix}{n}": t for n, t in self.tensors.items()}

    def _owner(self) -> str:
        if self.adapter is None:
            raise PassError("only a pass with an adapter name can insert branches.")
        return self.adapter

    def _attach(
        self,
        site: Site,
        branch: Branch,
        reads: Mapping[str, Value | None] = EMPTY,
        tail: str = "",
        members: tuple[str, ...] = (),
    ) -> str:
        adapter = self._owner()
        require_axes(self.method, site, branch, reads)
        there = [a for a in self.program.attached(site.id) if a.slot == branch.slot]
        if branch.single and there:
            raise PassError(
                f"{site.id} has a branch of the adapter {there[0].adapter!r} already, and "
                f"{branch.single}. Select other sites with where=, or fold that adapter first."
            )
        path = f"{BRANCHES}.{adapter}.{self._folder}{tail or f'{self.name(site)}.{branch.slot}'}"
        branches = getattr(self.graph_module, BRANCHES, None)
        if adapter not in self.program.folders and hasattr(branches, adapter):
            raise PassError(
                f"this program holds the tensors of an earlier adapter {adapter!r}; give this one "
                "another name with name=."
            )
        self._require_free(path, f"{site.id} has a {branch.slot} branch")
        branch.train(self.graph_module.training)
        self.graph_module.add_submodule(path, branch)
        names = {k: v.name for k, v in given(reads).items()}
        attachment = Attachment(adapter, site.id, branch.slot, path, names, members)
        self.program.attachments = (*self.program.attachments, attachment)
        self.edited.append(site.id)
        return path

    def _require_free(self, path: str, what: str) -> None:
        """Raises PassError where a module of this adapter has that path: its branch would be lost,
        and calls of it would be calls of another."""
        try:
            self.graph_module.get_submodule(path)
        except AttributeError:
            return
        raise PassError(
            f"{self.method}: {what} of this adapter already ({path}), and a second one would take "
            "its place. Use one branch for both, or insert it under a name of its own: "
            'with edit.below("second").'
        )

    def _call(
        self, path: str, args: tuple[Node, ...], reads: Mapping[str, Value | None] = EMPTY
    ) -> Node:
        node = branch_call(self.graph_module, path, args, reads)
        self._nodes[node.name] = node
        return node

    def finish(self) -> None:
        """Removes what no output needs; the code is made when it is first needed.

        Raises:
            PassError: a branch reads what is computed only after it, or a state is not set.
        """
        for name in self._states:
            if name not in self.program.outputs_added:
                raise PassError(
                    f"{self.method}: the state {name!r} is read, but nothing says what it becomes. "
                    f"Call edit.add_output({name!r}, value)."
                )
        erase_dead(self.graph_module)
        require_order(self.program, self.method)
        self.program.shared = unshared(self.graph_module, self.program.shared)
        outdate(self.program.module)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of this dtype train in."""
    return torch.promote_types(dtype, torch.float32)
