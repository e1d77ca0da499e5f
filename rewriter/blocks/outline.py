"""A program as a module whose transformer blocks are callable submodules, and back.

Names, Parameter objects, outputs and gradients are those of the program. A block sits where its
parameters have always been (`model.layers.3`), so that engines that work by module (FSDP,
checkpointing) find both; what passes have inserted stays where it is, below the root.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from ..api import Program
from ..errors import BlockError
from ..graph.aten import value
from ..graph.module import CapturedModule, copy_graph, sharing_module
from ..graph.sharded import reshard
from .hidden_names import TRACED, names, yielding
from .loss import fuse_losses
from .module import Block, Flat, Outlined, Region
from .offload import offload as move_out
from .partition import Part, partition
from .recompute import recompute as compute_again


def outline(
    program: Program,
    checkpoint: bool | int | Sequence[int] = False,
    offload: bool = False,
    recompute: bool = False,
    fuse_loss: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
) -> Outlined:
    """The program's module with every transformer block as a callable submodule.

    It has the program's Parameter objects, so training it trains the program, and the same
    inputs, outputs, `state_dict` and parameter names. `blocks` has the blocks. What a block runs
    on some of its tokens (CoDA) is one callable submodule in it; `regions` has those.

    Args:
        program: is not changed.
        checkpoint: blocks that are computed again for the backward pass: all, none, some by
            number, or a budget in bytes (see `Outlined.checkpoint`).
        offload: the frozen parameters of blocks are moved to the CPU, those of the program too
            since they are the same, and brought to the device when needed. Not compilable. Memory
            is free when no model and no other program holds them: delete these.
        recompute: activations, products and norms of blocks that are not checkpointed are computed
            again for the backward pass, at little cost and bit for bit. A compiler computes again
            all but matrix products, attention and what is random or an operator of our own; it
            decides by itself for a block in which something is changed in place.
        fuse_loss: the cross entropy of a linear's outputs is computed with its gradient, some rows
            at a time, which keeps no log-probabilities; equal to rounding. Where the program has
            no such loss, nothing changes. Not twice differentiable.
        inputs: what a budget is measured on (default: the sample of the capture).

    Raises:
        BlockError: its blocks are not regular (the message says which layer and why), or an
            option does not fit.
    """
    order = partition(program)
    parts = [one for one in order if isinstance(one, Part)]
    gm = program.module
    nothing = Graph()
    nothing.output(None)
    without = replace(program, module=CapturedModule(nn.Module(), nothing))
    flat = Flat(without, copy_graph(gm.graph), type(gm).__name__)
    kind: Any = yielding(Outlined, flat.name, gm)
    module: Outlined = kind(flat, tuple(part.path for part in parts))
    _adopt(module, sharing_module(gm, gm.graph, flat.name))
    for part in parts:
        block = Block(part, module)
        holder = module.get_submodule(part.path)
        _names_free(block, holder, part.path)
        _adopt(block, holder)
        module.set_submodule(part.path, block)
        for inner in part.parts:
            module.set_submodule(inner.path, Region(inner, module))
    _cut(module, order)
    bound: Any = module.forward
    kind.forward = bound.__func__  # trainers look up inputs and labels in the class
    if offload:
        move_out(module)
    if recompute:
        compute_again(module)
    if fuse_loss and fuse_losses(names(module).graph):
        names(module).trace(names(module).graph)
    if checkpoint is not False:
        names(module).checkpoint(checkpoint, inputs)
    return module


def inline(module: Outlined) -> Program:
    """The flat program of an outlined module, with the Parameter objects that it has now."""
    reshard(module)  # a forward leaves gathered tensors in the place of shards
    flat = names(module).flat
    return replace(flat.program, module=sharing_module(module, flat.graph, flat.name))


def _names_free(block: Block, holder: nn.Module, path: str) -> None:
    """Raises BlockError where a block's own attribute would hide a child or tensor of it."""
    own = {*holder._modules, *holder._parameters, *holder._buffers}
    taken = sorted(own & ((set(dir(block)) | TRACED) - set(dir(nn.Module()))))
    if taken:
        raise BlockError(
            f"{path} has a child or tensor called {taken[0]!r}, which blocks use themselves. "
            "Rename it in the model, or train program.module without outlining it."
        )


def _adopt(module: nn.Module, holder: nn.Module) -> None:
    """Takes over the children, parameters and buffers of another module."""
    module._modules.update(holder._modules)
    module._parameters.update(holder._parameters)
    module._buffers.update(holder._buffers)
    module._non_persistent_buffers_set |= holder._non_persistent_buffers_set
    module.training = holder.training


def _cut(module: Outlined, order: tuple[Part | Node, ...]) -> None:
    """Gives the root and every part its own part of the graph."""
    graph = Graph()
    graph.set_codegen(names(module).flat.graph._codegen)
    _copy(module, order, graph, {}, "")
    names(module).trace(graph)


def _cut_part(module: Outlined, part: Part) -> tuple[list[Node], list[Node]]:
    """Gives a part its graph; returns the values that enter it, and those that leave."""
    inside, home = set(part.nodes), f"{part.home}."
    read = dict.fromkeys(source for node in part.nodes for source in node.all_input_nodes)
    stored = {n for n in read if n.op == "get_attr" and str(n.target).startswith(home)}
    entering = [n for n in read if n not in inside and n not in stored]
    leaving = [n for n in part.nodes if any(user not in inside for user in n.users)]
    graph = Graph()
    copied: dict[Node, Node] = {}
    for node in entering:
        copied[node] = graph.placeholder(node.name)
        copied[node].meta.update(node.meta)
    _copy(module, part.order, graph, copied, f"{part.path}.")
    results = tuple(copied[n] for n in leaving)
    graph.output(results[0] if len(results) == 1 else results)
    module.get_submodule(part.path).trace(graph)  # pyright: ignore
    return entering, leaving


def _copy(
    module: Outlined,
    order: Sequence[Part | Node],
    graph: Graph,
    copied: dict[Node, Node],
    own: str,
) -> None:
    """Copies nodes to `graph`, with calls of parts, for a module whose names start with `own`."""

    def place(path: object) -> str:
        name = str(path)
        return name.removeprefix(own) if name.startswith(own) else f"root.{name}"

    def known(node: Node) -> Node:
        if node not in copied:
            twin = copied[node] = graph.node_copy(node, known)
            if twin.op in ("get_attr", "call_module"):
                twin.target = place(node.target)
        return copied[node]

    for one in order:
        if isinstance(one, Node):
            if one.op != "get_attr":
                known(one)
            continue
        entering, leaving = _cut_part(module, one)
        call = graph.call_module(place(one.path), tuple(known(n) for n in entering))
        call.meta["val"] = value(leaving[0])
        if len(leaving) == 1:
            copied[leaving[0]] = call
            continue
        call.meta["val"] = tuple(map(value, leaving))
        for at, node in enumerate(leaving):
            copied[node] = graph.call_function(operator.getitem, (call, at))
            copied[node].meta.update(node.meta)
