"""Modules that run a graph: a program's own, its transformer blocks, and regions of those."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.graph_module import _forward_from_src
from torch.utils.checkpoint import checkpoint

from ..api import Program
from ..errors import BlockError
from ..graph.module import copy_graph, device_of, keeps_dtype
from ..graph.placement import relocate, relocate_graph
from .checkpointing import Report, Saved, choose, measure, reached, report
from .hidden_names import names
from .offload import Offload, aside, staying
from .partition import Part
from .recompute import Recompute, compiled
from .substitutes import Kept


class Traced(nn.Module):
    """A module that runs a graph over the tensors and modules below it."""

    graph: Graph
    run: Callable[..., Any]
    _in_spec: Any = None
    _out_spec: Any = None

    def trace(self, graph: Graph) -> None:
        """Runs `graph` from now on; its inputs are the signature of `run`."""
        own = names(self)
        own.graph = graph
        code = graph.python_code("self")
        codegen = graph._codegen
        if isinstance(codegen, _PyTreeCodeGen):
            info: Any = codegen.pytree_info
            self._in_spec, self._out_spec = info.in_spec, info.out_spec
        own.run = MethodType(_forward_from_src(code.src, code.globals), self)

    def fixed(self) -> list[Any]:
        """What copies of the module share."""
        return [names(self).graph, self._in_spec, self._out_spec]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo |= {id(fixed): fixed for fixed in names(self).fixed()}
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


class Inner(Traced):
    """A part of an outlined module.

    Attributes:
        path: its name in the outlined module.
        label: the layers or sublayers that it holds, `s0.layer3`.
        root: the outlined module, which has what it reads and calls elsewhere; no child of it.
        kept: what its block keeps for the backward pass instead of some tensors, or None.
        offload: brings frozen parameters from the CPU when they are needed, or None.
        recompute: lets cheap values be computed again for the backward pass, or None.
    """

    root: Outlined

    def __init__(self, part: Part, root: Outlined) -> None:
        super().__init__()
        self.path, self.label = part.path, part.label
        self.kept: Kept | None = None
        self.offload: Offload | None = None
        self.recompute: Recompute | None = None
        self.__dict__["root"] = root


class Block(Inner):
    """A transformer block: takes what it needs of other blocks, returns what others need.

    Attributes:
        checkpointed: computes its values again for the backward pass instead of keeping them.
    """

    checkpointed = False

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions in it, in the order in which they run."""
        return tuple(m for m in self.children() if isinstance(m, Region))

    def forward(self, *values: Any) -> Any:
        """The values that others need, one or a tuple, from those that it needs."""
        compiling, learning = torch.compiler.is_compiling(), torch.is_grad_enabled()
        if self.checkpointed and learning:
            return checkpoint(self.run, *values, use_reentrant=False)
        if compiling and learning and self.recompute is not None and self.recompute.pure:
            return checkpoint(self.run, *values, use_reentrant=False, context_fn=compiled)
        if compiling or self.kept is None:
            return self.run(*values)
        with self.kept.hooks():
            return self.run(*values)

    def extra_repr(self) -> str:
        return f"{self.label}, checkpointed" if self.checkpointed else self.label


class Region(Inner):
    """The part of a block that runs on some tokens: takes gathered values, returns the last one.

    It has no parameters of its own: it reads its block's where they are.

    Attributes:
        branch: path of the branch that chooses its tokens.
    """

    def __init__(self, part: Part, root: Outlined) -> None:
        super().__init__(part, root)
        self.branch = part.branch

    def forward(self, *values: Any) -> Any:
        """`[batch, slots, width]`, from what the chosen tokens have of all that enters."""
        return self.run(*values)

    def extra_repr(self) -> str:
        return f"{self.label}, tokens chosen by {self.branch}"


@dataclass(frozen=True, eq=False)
class Flat:
    """What an outlined module keeps of its program beside tensors."""

    program: Program
    graph: Graph
    name: str


class Outlined(Traced):
    """A program's module with callable blocks and regions; see `outline`.

    Where the model has a child or tensor of the name of something here (vision transformers have
    `blocks`), that name is the model's; `peftfx_outlined` has all of this under its names.

    Attributes:
        flat: the program without its tensors.
    """

    supports_gradient_checkpointing = True

    def __init__(self, flat: Flat, paths: tuple[str, ...]) -> None:
        super().__init__()
        own = names(self)
        own.flat, own._paths = flat, paths

    def fixed(self) -> list[Any]:
        return [*super().fixed(), names(self).flat]

    @property
    def peftfx_outlined(self) -> Outlined:
        """What this class defines, whatever the names of the model's children."""
        own: Any = names(self)
        return own

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks, in the order in which they run."""
        blocks: Any = tuple(self.get_submodule(path) for path in names(self)._paths)
        return blocks

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions that run on some tokens, in the order in which they run."""
        return tuple(region for block in names(self).blocks for region in block.regions)

    def trace(self, graph: Graph) -> None:
        super().trace(graph)
        self.forward = names(self).run

    def checkpoint(
        self, which: bool | int | Sequence[int], inputs: Mapping[str, Tensor] | None = None
    ) -> None:
        """Chooses the blocks whose values are computed again for the backward pass.

        A block that keeps nothing, because nothing trains in it or before it, is never one.

        Args:
            which: all blocks, none, the numbers of some, or a budget in bytes for all that
                training saves for the backward pass; as few blocks as meet it are chosen.
            inputs: what the budget is measured on (default: the sample of the capture).

        Raises:
            BlockError: there is no such block, or the budget cannot be met.
        """
        blocks = names(self).blocks
        if isinstance(which, bool):
            chosen = range(len(blocks)) if which else ()
        elif isinstance(which, int):
            chosen = choose(names(self).saved(inputs), which)
        else:
            chosen = [range(len(blocks))[i] for i in which if -len(blocks) <= i < len(blocks)]
            if len(chosen) != len(which):
                raise BlockError(
                    f"checkpoint={list(which)} names a block that is not there. This program has "
                    f"the blocks 0 to {len(blocks) - 1}."
                )
        live = reached(self)
        for i, block in enumerate(blocks):
            block.checkpointed = i in chosen and block.path in live

    def saved(self, inputs: Mapping[str, Tensor] | None = None) -> Saved:
        """What one forward pass saves for the backward pass, by block; runs one."""
        return measure(self, names(self).flat.program.sample if inputs is None else inputs)

    def report(self, inputs: Mapping[str, Tensor] | None = None) -> Report:
        """Bytes saved for the backward pass, with and without checkpointing; prints as a table.

        Args:
            inputs: what is measured on (default: the sample of the capture).
        """
        return report(self, names(self).saved(inputs))

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Checkpoints all blocks; what `transformers.Trainer` calls.

        Raises:
            BlockError: `use_reentrant=True` is asked for, which loses gradients of branches.
        """
        names(self).activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The same, for every n-th block: what `transformers.Trainer` calls from 5.23 on.

        Raises:
            BlockError: `use_reentrant=True` or `offload=True`.
        """
        if (activation_checkpointing_kwargs or {}).get("use_reentrant") or offload:
            raise BlockError(
                "blocks are checkpointed with use_reentrant=False and without offload only: the "
                "other kind needs a block's inputs to require gradients, which those of frozen "
                "models do not. Leave these options out."
            )
        names(self).checkpoint(range(0, len(names(self).blocks), every_n_layers))

    def gradient_checkpointing_disable(self) -> None:
        """Keeps the values of all blocks again."""
        names(self).checkpoint(False)

    def units(self, count: int) -> tuple[tuple[Block, ...], ...]:
        """The blocks in `count` groups of consecutive ones, as even as can be.

        Raises:
            BlockError: there are fewer blocks than that.
        """
        blocks = names(self).blocks
        if not 1 <= count <= len(blocks):
            raise BlockError(
                f"{len(blocks)} blocks cannot be put into {count} groups. Choose 1 to "
                f"{len(blocks)}."
            )
        ends = [len(blocks) * i // count for i in range(count + 1)]
        return tuple(blocks[a:b] for a, b in itertools.pairwise(ends))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()` and the like call; moves the devices that the graphs name, too.

        Raises:
            CaptureError: it would change a floating-point dtype; nothing is changed.
        """
        with aside(self):
            before = device_of(self)
            keeps_dtype(self, fn, before)
            super()._apply(fn, recurse)
            after = device_of(self)
        names(self).follow(before, after)
        return self

    def follow(self, before: torch.device, after: torch.device) -> None:
        """Moves the devices that the graphs name behind the tensors."""
        if after == before:
            return
        for traced in (self, *names(self).blocks, *names(self).regions):
            graph = copy_graph(names(traced).graph)
            relocate_graph(graph, before, after)
            names(traced).trace(graph)
        graph = copy_graph(names(self).flat.graph)
        relocate_graph(graph, before, after)
        moved = names(self).flat.program._moved(after, staying(self))
        if names(self).flat.program.origin is None:
            moved = replace(moved, origin=None)
        names(self).flat = Flat(moved, graph, names(self).flat.name)
        relocate(self, before, after)
