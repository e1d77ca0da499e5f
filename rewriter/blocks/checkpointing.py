"""What training saves for the backward pass, by block, and which blocks to checkpoint for it.

A checkpointed block saves what enters it instead of what it computes (Chen et al. 2016,
arXiv:1604.06174), and computes again in the backward pass, with the same random numbers.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx import Graph, Node

from ..errors import BlockError
from ..graph.aten import attribute
from .hidden_names import names
from .substitutes import watched

Storages = dict[int, torch.UntypedStorage]


@dataclass(frozen=True)
class Saved:
    """Distinct storages that one forward pass saves, without parameters.

    Attributes:
        outside: of the nodes outside of blocks.
        inside: of each block, if it is not checkpointed.
        entering: of each block, if it is.
    """

    outside: Storages
    inside: tuple[Storages, ...]
    entering: tuple[Storages, ...]

    def total(self, checkpointed: Collection[int]) -> int:
        """Bytes saved with the given blocks checkpointed; what several save counts once."""
        both = zip(self.inside, self.entering, strict=True)
        chosen = [b if i in checkpointed else a for i, (a, b) in enumerate(both)]
        return size(*chosen, self.outside)


def size(*parts: Storages) -> int:
    """Bytes of distinct storages."""
    return sum(s.nbytes() for s in {k: s for part in parts for k, s in part.items()}.values())


def measure(module: nn.Module, inputs: Mapping[str, Tensor]) -> Saved:
    """Runs one forward pass without checkpointing and looks at what autograd would save."""
    blocks = names(module).blocks
    known = {p.untyped_storage()._cdata for p in module.parameters()}
    saved = Saved({}, tuple({} for _ in blocks), tuple({} for _ in blocks))
    current: list[Storages] = [saved.outside]

    def keep(into: Storages, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            into[storage._cdata] = storage

    def enter(block: nn.Module, values: tuple[Any, ...]) -> None:
        index = blocks.index(block)
        for tensor in (v for v in values if isinstance(v, Tensor)):
            keep(saved.entering[index], tensor)
        current.append(saved.inside[index])

    def leave(*_: Any) -> None:
        current.pop()

    handles = [b.register_forward_pre_hook(enter) for b in blocks]
    handles += [b.register_forward_hook(leave) for b in blocks]

    def seen(tensor: Tensor) -> None:
        keep(current[-1], tensor)

    hooks = torch.autograd.graph.saved_tensors_hooks(seen, lambda t: t)
    try:
        plain, random, gradients = _plain(blocks), torch.random.fork_rng(), torch.enable_grad()
        with plain, watched(module, seen), random, gradients, hooks:
            module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return saved


@contextlib.contextmanager
def _plain(blocks: Sequence[Any]) -> Generator[None]:
    """Blocks run without checkpointing."""
    before = [block.checkpointed for block in blocks]
    try:
        for block in blocks:
            block.checkpointed = False
        yield
    finally:
        for block, was in zip(blocks, before, strict=True):
            block.checkpointed = was


def choose(saved: Saved, budget: int) -> list[int]:
    """As few blocks as keep all saved bytes within a budget, the largest first.

    Raises:
        BlockError: no choice does; the message has the smallest figure.
    """
    chosen: list[int] = []
    while (now := saved.total(chosen)) > budget:
        left = [i for i in range(len(saved.inside)) if i not in chosen]
        best = min(left, key=lambda i: saved.total([*chosen, i]), default=None)
        if best is None or saved.total([*chosen, best]) >= now:
            raise BlockError(
                f"{budget:,} bytes are too few: training saves at least {now:,} for the backward "
                f"pass, with {len(chosen)} of {len(saved.inside)} blocks checkpointed. Give at "
                "least that, or train on fewer or shorter rows."
            )
        chosen.append(best)
    return chosen


@dataclass(frozen=True)
class Row:
    """One block: bytes that it saves by itself, and would save if checkpointed."""

    path: str
    label: str
    kept: int
    entering: int
    checkpointed: bool


@dataclass(frozen=True)
class Report:
    """Bytes saved for the backward pass; parameters are not counted.

    Attributes:
        rows: the blocks.
        outside: what is saved outside of blocks.
        total: all together, with the blocks checkpointed that are; what several save counts once.
        without: the same without any checkpointing.
    """

    rows: tuple[Row, ...]
    outside: int
    total: int
    without: int

    def __str__(self) -> str:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("block", "layers", "saves", "checkpointed", ""):
            table.add_column(name, justify="right" if name in ("saves", "checkpointed") else "left")
        for row in self.rows:
            mark = "checkpointed" if row.checkpointed else ""
            table.add_row(row.path, row.label, f"{row.kept:,}", f"{row.entering:,}", mark)
        table.add_row("(outside)", "", f"{self.outside:,}", "", "")
        text = io.StringIO()
        Console(width=120, file=text, color_system=None).print(table)
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        total = f"{self.total:,} bytes saved for the backward pass"
        return "\n".join([*lines, f"{total}, {self.without:,} without checkpointing"])


def report(module: nn.Module, saved: Saved) -> Report:
    """See `Outlined.report`."""
    blocks = names(module).blocks
    rows = [
        Row(block.path, block.label, size(inside), size(entering), block.checkpointed)
        for block, inside, entering in zip(blocks, saved.inside, saved.entering, strict=True)
    ]
    chosen = [i for i, block in enumerate(blocks) if block.checkpointed]
    return Report(tuple(rows), size(saved.outside), saved.total(chosen), saved.total(()))


def reached(module: nn.Module) -> set[str]:
    """Paths of the blocks that gradients pass through; the others save nothing."""
    paths = {block.path for block in names(module).blocks}
    live: set[Node] = set()
    reached_names: set[str] = set()
    for node in names(module).graph.nodes:
        trained = any(i in live for i in node.all_input_nodes) or _trains(module, node)
        if trained:
            live.add(node)
        if trained and node.target in paths:
            reached_names.add(str(node.target))
    return reached_names


def _trains(owner: nn.Module, node: Node) -> bool:
    """Whether a node reads or calls something trainable."""
    if node.op not in ("get_attr", "call_module"):
        return False
    tensor = attribute(owner, str(node.target))
    graph = getattr(tensor, "graph", None)
    if isinstance(graph, Graph):
        return any(_trains(tensor, inner) for inner in graph.nodes)
    tensors: Iterable[Any] = (
        tensor.parameters() if isinstance(tensor, torch.nn.Module) else (tensor,)
    )
    return any(getattr(t, "requires_grad", False) for t in tensors)
