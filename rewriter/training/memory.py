"""What training keeps in memory, known before anything runs.

Parameters, gradients and optimizer states follow from shapes; what forward saves for backward is
counted on fake tensors (`saved`). Not counted: what exists for a moment only, the outputs, and
what the loss itself saves.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.fx import Node

from ..errors import OptionError, nearest
from ..graph.module import device_of
from ..graph.placement import relocate
from ..program.state import BRANCHES, State
from .autograd_saved import saved_bytes, storage, stored

STATES = {
    "adamw": 2, "adam": 2, "adamax": 2, "nadam": 2, "radam": 2, "adadelta": 2,
    "rmsprop": 1, "adagrad": 1, "momentum": 1, "sgd": 0, "none": 0,
}  # fmt: skip
"""Numbers that torch's optimizers keep for every trained one (`momentum`: SGD with momentum)."""

BASE = "base"
"""The method of what no adapter inserted or trains."""


@dataclass(frozen=True)
class Share:
    """Bytes of a part of training.

    Attributes:
        parameters: stored tensors, those in training included.
        gradients: of what trains, as many as its parameters have.
        optimizer: its states.
        saved: what forward keeps for backward.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    saved: int = 0

    @property
    def total(self) -> int:
        """All four together."""
        return self.parameters + self.gradients + self.optimizer + self.saved

    def __add__(self, other: Share) -> Share:
        return Share(*(getattr(self, f) + getattr(other, f) for f in _COLUMNS))


_COLUMNS = tuple(f.name for f in fields(Share))


def _figures(share: Share) -> dict[str, int]:
    return {n: getattr(share, n) for n in (*_COLUMNS, "total")}


@dataclass(frozen=True)
class Place:
    """Where a share belongs.

    Attributes:
        site: id of a site, with what is computed on the way to it, or ''.
        role, layer: of the site.
        method: the adapter that inserted or trains it, or `base`.
    """

    site: str
    role: str
    layer: int | None
    method: str


@dataclass(frozen=True, kw_only=True)
class Memory(Share):
    """What training a program keeps, in bytes; prints as a table by method and by role.

    Attributes:
        shares: the parts of the whole.
        sizes: dynamic sizes of the inputs.
        training: the program's mode: with dropout, or as in evaluation.
        optimizer_name: see `STATES`.
    """

    shares: Mapping[Place, Share]
    sizes: Mapping[str, int]
    training: bool
    optimizer_name: str

    @property
    def by_method(self) -> dict[str, Share]:
        """Adapter, or `base` -> share."""
        return self._by(lambda place: place.method)

    @property
    def by_site(self) -> dict[str, Share]:
        """Id of a site -> share; '' for what belongs to none."""
        return self._by(lambda place: place.site)

    @property
    def by_role(self) -> dict[str, Share]:
        """Role of sites -> share."""
        return self._by(lambda place: place.role)

    @property
    def by_layer(self) -> dict[int | None, Share]:
        """Layer -> share; None outside of blocks."""
        return self._by(lambda place: place.layer)

    def _by(self, key: Callable[[Place], Any]) -> dict[Any, Share]:
        shares: dict[Any, Share] = {}
        for place, share in self.shares.items():
            shares[key(place)] = shares.get(key(place), Share()) + share
        return shares

    def to_json(self) -> dict[str, Any]:
        """All figures by name, in bytes."""
        groups = {"by_method": self.by_method, "by_role": self.by_role, "by_site": self.by_site}
        return {
            "sizes": dict(self.sizes), "training": self.training,
            "optimizer_name": self.optimizer_name, **_figures(self),
            **{n: {k: _figures(share) for k, share in g.items()} for n, g in groups.items()},
        }  # fmt: skip

    def __str__(self) -> str:
        mode = "training" if self.training else "evaluation"
        given = ", ".join(f"{n} {s}" for n, s in self.sizes.items()) or "fixed sizes"
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("MiB", min_width=16)
        for column in (*_COLUMNS, "total"):
            table.add_column(column, justify="right")

        def row(name: str, share: Share) -> None:
            sizes = _figures(share).values()
            table.add_row(name, *(f"{size / 2**20:,.2f}" if size else "-" for size in sizes))

        row("all", self)
        for title, group in (("method", self.by_method), ("role", self.by_role)):
            table.add_section()
            table.add_row(f"by {title}")
            for name, share in sorted(group.items(), key=lambda item: -item[1].total):
                if share.total:
                    row(f"  {name or 'elsewhere'}", share)
        text = io.StringIO()
        Console(width=100, file=text, color_system=None).print(table)
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        return "\n".join([f"{given}; {self.optimizer_name}; {mode} mode", *lines])


class _Places:
    """To which place the nodes and the stored tensors of a program belong."""

    def __init__(self, program: State) -> None:
        self.program = program
        self.nodes: dict[Node, Place] = {}
        named = {n: s for s in reversed([*program.sites]) for n in s.nodes if s.kind in _SOLID}
        order = list(program.module.graph.nodes)
        for node in reversed(order):
            site = named.get(str(node.meta.get("call", node.name)))
            near = [p for u in node.users if (p := self.nodes[u]).site]
            self.nodes[node] = _NOWHERE if site is None else self._at(site.id)
            if site is None and near:
                self.nodes[node] = replace(near[0], method=BASE)
        for node in order:  # behind the last site
            near = [p for i in node.all_input_nodes if (p := self.nodes[i]).site]
            if not self.nodes[node].site and near:
                self.nodes[node] = replace(near[-1], method=BASE)
        inserted = {a.path: self._at(a.site, a.adapter) for a in program.attachments}
        self.tensors = {str(n.target): self.nodes[n] for n in reversed(order) if n.op == "get_attr"}
        for node in order:
            path = str(node.target)
            if node.op == "call_module" and path.startswith(f"{BRANCHES}."):
                shared = replace(self.nodes[node], method=path.split(".")[1])
                self.nodes[node] = inserted.setdefault(path, shared)
        for path, place in inserted.items():
            module = program.module.get_submodule(path)
            state = (*module.named_parameters(), *module.named_buffers())
            self.tensors |= {f"{path}.{name}": place for name, _ in state}
        for adapter, names in program.owned.items():
            for name in names:
                self.tensors[name] = replace(
                    self.tensors.get(name, _NOWHERE), method=adapter or BASE
                )

    def _at(self, site_id: str, method: str = BASE) -> Place:
        site = self.program.sites[site_id]
        return Place(site_id, site.role, site.layer, method)


_NOWHERE = Place("", "", None, BASE)
_SOLID = ("linear", "experts", "conv", "norm", "embedding", "attention", "mixer")
"""Kinds of sites that compute something; the others group them."""


def states_of(optimizer: str) -> int:
    """How many numbers an optimizer keeps of each that trains.

    Raises:
        OptionError: nobody knows it here.
    """
    count = STATES.get(optimizer)
    if count is None:
        raise OptionError(
            f"there is no optimizer {optimizer!r}. Nearest: {nearest(optimizer, STATES)}. "
            f"Optimizers: {', '.join(STATES)}."
        )
    return count


def memory(
    program: State, common: Mapping[str, int | None], sizes: Mapping[str, int], optimizer: str
) -> Memory:
    """See `Program.memory`; `common` is for all sizes whose names start so."""
    count = states_of(optimizer)
    for word, size in common.items():
        known = [n for n in program.spec.sizes if n.startswith(word)] or [word]
        sizes = {**({} if size is None else dict.fromkeys(known, size)), **sizes}
    program.spec.check(sizes)
    sizes = {name: sizes[name] for name in program.spec.sizes}
    if device_of(program.module).type == "meta":
        program = program.fork()
        relocate(program.module, torch.device("meta"), torch.device("cpu"))
    places = _Places(program)
    shares: dict[Place, Share] = {}

    def add(place: Place, share: Share) -> None:
        shares[place] = shares.get(place, Share()) + share

    seen: set[tuple[Any, ...]] = set()
    for name, tensor in stored(program.module).items():
        key = (storage(tensor), tensor.storage_offset(), tensor.shape)
        if key not in seen:
            seen.add(key)
            trained = tensor.nbytes if tensor.requires_grad else 0
            place = places.tensors.get(name, _NOWHERE)
            add(place, Share(tensor.nbytes, trained, trained * count))
    for place, size in saved_bytes(program, places.nodes, sizes).items():
        add(place, Share(saved=size))
    whole = sum(shares.values(), Share())
    return Memory(
        *(getattr(whole, c) for c in _COLUMNS), shares=shares, sizes=dict(sizes),
        training=program.training, optimizer_name=optimizer,
    )  # fmt: skip
