"""A program as a module whose transformer blocks are callable submodules, and back.

Names, Parameter objects, outputs and gradients are those of the program. A block sits where its
parameters have always been (`model.layers.3`), so that engines that work by module (FSDP,
checkpointing) find both; what passes have inserted stays where it is, below the root.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.graph_module import _forward_from_src

from ..aten import value
from ..capture.placement import relocate, relocate_graph
from ..module import CapturedModule, copy_graph, device_of, keeps_dtype, sharing_module
from ..program import Program
from ..sharded import reshard
from .partition import Part, partition


class Traced(nn.Module):
    """A module that runs a graph over the tensors and modules below it."""

    graph: Graph
    _in_spec: Any = None
    _out_spec: Any = None

    def trace(self, graph: Graph) -> None:
        """Runs `graph` from now on; its inputs are the signature of `forward`."""
        self.graph = graph
        code = graph.python_code("self")
        codegen = graph._codegen
        if isinstance(codegen, _PyTreeCodeGen):
            info: Any = codegen.pytree_info
            self._in_spec, self._out_spec = info.in_spec, info.out_spec
        self.forward = MethodType(_forward_from_src(code.src, code.globals), self)

    def fixed(self) -> list[Any]:
        """What copies of the module share."""
        return [self.graph, self._in_spec, self._out_spec]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo |= {id(held): held for held in self.fixed()}
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


class Block(Traced):
    """A transformer block: takes what it needs of other blocks, returns what others need.

    Attributes:
        path: its name in the outlined module.
        label: the layers that it holds, `s0.layer3`.
        root: the outlined module, whose branches it calls; no child of the block.
    """

    root: Outlined

    def __init__(self, part: Part, root: Outlined) -> None:
        super().__init__()
        self.path, self.label = part.path, part.label
        self.__dict__["root"] = root

    def extra_repr(self) -> str:
        return self.label


@dataclass(frozen=True, eq=False)
class Flat:
    """What an outlined module keeps of its program beside tensors."""

    program: Program
    graph: Graph
    name: str


class Outlined(Traced):
    """A program's module with callable blocks; see `outline`.

    Attributes:
        flat: the program without its tensors.
    """

    def __init__(self, flat: Flat, paths: tuple[str, ...]) -> None:
        super().__init__()
        self.flat, self._paths = flat, paths

    def fixed(self) -> list[Any]:
        return [*super().fixed(), self.flat]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks, in the order in which they run."""
        found: Any = tuple(self.get_submodule(path) for path in self._paths)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()` and the like call; moves the devices that the graphs name, too.

        Raises:
            CaptureError: it would change a floating-point dtype; nothing is changed.
        """
        before = device_of(self)
        keeps_dtype(self, fn, before)
        super()._apply(fn, recurse)
        self.follow(before)
        return self

    def follow(self, before: torch.device) -> None:
        """Moves the devices that the graphs name from `before` to where the tensors are now."""
        after = device_of(self)
        if after == before:
            return
        for traced in (self, *self.blocks):
            graph = copy_graph(traced.graph)
            relocate_graph(graph, before, after)
            traced.trace(graph)
        graph = copy_graph(self.flat.graph)
        relocate_graph(graph, before, after)
        moved = self.flat.program.to(after)
        if self.flat.program.origin is None:
            moved = replace(moved, origin=None)
        self.flat = Flat(moved, graph, self.flat.name)
        relocate(self, before, after)


def outline(program: Program) -> Outlined:
    """The program's module with every transformer block as a callable submodule.

    It has the program's Parameter objects, so training it trains the program, and the same
    inputs, outputs, `state_dict` and parameter names. `blocks` has the blocks.

    Args:
        program: is not changed.

    Raises:
        BlockError: its blocks are not regular; the message says which layer and why.
    """
    order = partition(program)
    parts = [one for one in order if isinstance(one, Part)]
    gm = program.module
    empty = CapturedModule(nn.Module(), Graph())
    flat = Flat(replace(program, module=empty), copy_graph(gm.graph), type(gm).__name__)
    module = Outlined(flat, tuple(part.path for part in parts))
    _adopt(module, sharing_module(gm, gm.graph, flat.name))
    for part in parts:
        block = Block(part, module)
        _adopt(block, module.get_submodule(part.path))
        module.set_submodule(part.path, block)
    _cut(module, order)
    return module


def inline(module: Outlined) -> Program:
    """The flat program of an outlined module, with the Parameter objects that it has now."""
    reshard(module)  # a forward leaves gathered tensors in the place of shards
    flat = module.flat
    return replace(flat.program, module=sharing_module(module, flat.graph, flat.name))


def _adopt(module: nn.Module, holder: nn.Module) -> None:
    """Takes over the children, parameters and buffers of another module."""
    module._modules.update(holder._modules)
    module._parameters.update(holder._parameters)
    module._buffers.update(holder._buffers)
    module._non_persistent_buffers_set |= holder._non_persistent_buffers_set
    module.training = holder.training


def _cut(module: Outlined, order: tuple[Part | Node, ...]) -> None:
    """Gives the root and every block its own part of the graph."""
    graph = Graph()
    graph.set_codegen(module.flat.graph._codegen)
    copied: dict[Node, Node] = {}

    def known(node: Node) -> Node:
        if node not in copied:
            copied[node] = graph.node_copy(node, known)
        return copied[node]

    for one in order:
        if isinstance(one, Node):
            if one.op != "get_attr":
                known(one)
            continue
        inner, entering, leaving = _inner(one)
        module.get_submodule(one.path).trace(inner)  # pyright: ignore
        call = graph.call_module(one.path, tuple(known(n) for n in entering))
        call.meta["val"] = value(leaving[0])
        if len(leaving) == 1:
            copied[leaving[0]] = call
            continue
        call.meta["val"] = tuple(map(value, leaving))
        for place, node in enumerate(leaving):
            copied[node] = graph.call_function(operator.getitem, (call, place))
            copied[node].meta.update(node.meta)
    module.trace(graph)


def _inner(part: Part) -> tuple[Graph, list[Node], list[Node]]:
    """A block's own graph, the values that enter it, and those that leave."""
    inside, own = set(part.nodes), f"{part.path}."
    read = dict.fromkeys(source for node in part.nodes for source in node.all_input_nodes)
    stored = [n for n in read if n.op == "get_attr" and str(n.target).startswith(own)]
    entering = [n for n in read if n not in inside and n not in stored]
    leaving = [n for n in part.nodes if any(user not in inside for user in n.users)]
    graph = Graph()
    copied: dict[Node, Node] = {}
    for node in entering:
        copied[node] = graph.placeholder(node.name)
        copied[node].meta.update(node.meta)
    for node in (*stored, *part.nodes):
        made = copied[node] = graph.node_copy(node, copied.__getitem__)
        if node.op == "get_attr":
            made.target = str(node.target).removeprefix(own)
        elif node.op == "call_module":
            made.target = f"root.{node.target}"
    results = tuple(copied[n] for n in leaving)
    graph.output(results[0] if len(results) == 1 else results)
    return graph, entering, leaving
