"""Edits of what a program takes and returns: new inputs and outputs, and inputs that it does not
need any more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from ...errors import PassError
from ...graph.aten import output_node, placeholders, value
from ...graph.output_class import extended
from ...inputs.tensor_input import TensorInput
from ...program.state import State
from .samples import sample_axis

_NUMBERS = 2**16
"""Most numbers of an input that a program keeps for calls that leave it out."""


def add_input(
    program: State,
    name: str,
    example: Tensor,
    per_sample: bool = False,
    values: tuple[int, int] | None = None,
    sizes: Mapping[int, str] | None = None,
) -> Node:
    """A new input; a call may leave it out and then gets `example`.

    Args:
        example: of fixed shape but for `sizes`.
        per_sample: the input is `[batch]` instead, with one such number for each sample.
        values: the smallest and the largest that it may hold; a call with others is refused.
        sizes: axis, of size 1 in `example` -> the dynamic size of another input that it has.

    Raises:
        PassError: there is an input of that name, or no such dynamic size, or `example` is empty
            or too large.
    """
    _require_new(program, name, example, per_sample)
    if per_sample:
        example, sizes = example.flatten()[:1], {0: _samples(program)}
    dynamic = {axis: (label, *_place(program, label)) for axis, label in (sizes or {}).items()}
    if wrong := [axis for axis in dynamic if tuple(example.shape)[axis : axis + 1] != (1,)]:
        raise PassError(
            f"the example of the input {name!r} is {tuple(example.shape)}, but axis {wrong[0]} is "
            f"{dynamic[wrong[0]][0]}. Give an example of size 1 there."
        )
    gm = program.module
    inputs = placeholders(gm)
    last = list(inputs.values())[-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(name)
    beside = value(last)
    node.meta["val"] = beside.fake_mode.from_tensor(example.to(beside.device), static_shapes=True)
    numbers = example.flatten().tolist()
    start = None if all(n == numbers[0] for n in numbers) else tuple(numbers)
    shape: list[Any] = list(example.shape)
    symbols, sample = list(shape), list(shape)
    for axis, (label, source, place) in dynamic.items():
        shape[axis], sample[axis] = label, program.sample[source].shape[place]
        symbols[axis] = value(inputs[source]).shape[place]
    if dynamic:
        with beside.fake_mode:
            node.meta["val"] = node.meta["val"].expand(symbols)
    example = example.expand(sample)
    added = TensorInput(name, tuple(shape), example.dtype, numbers[0], True, values, start)
    program.spec = replace(program.spec, inputs=(*program.spec.inputs, added))
    program.sample = {**program.sample, name: example}
    _sign(gm, lambda names: [*names, name])
    return node


def _require_new(program: State, name: str, example: Tensor, per_sample: bool) -> None:
    """Raises PassError unless there can be such an input."""
    if name in placeholders(program.module) or name in program.spec.names:
        raise PassError(
            f"the program has an input {name!r} already. Give the new one another name; the "
            f"inputs are {program.spec}."
        )
    if not 0 < example.numel() <= _NUMBERS:
        raise PassError(
            f"the input {name!r} is its example where a call leaves it out, and the program keeps "
            f"1 to {_NUMBERS} numbers of it, but it holds {example.numel()}. Give a smaller one, "
            "and the others in the calls."
        )
    if per_sample and bool((example != example.flatten()[0]).any()):
        raise PassError(
            f"the input {name!r} is one number for each sample, but its example holds several. "
            "Give one number, and the others in the calls."
        )


def _place(program: State, label: str) -> tuple[str, int]:
    """An input with a dynamic size, and that axis of it."""
    for source in program.spec.inputs:
        if label in source.shape:
            return source.name, source.shape.index(label)
    known = ", ".join(program.spec.sizes) or "none"
    raise PassError(f"no input has a dynamic size {label!r}. Choose one of: {known}.")


def _samples(program: State) -> str:
    """The name of the dynamic size that is the number of samples."""
    samples = sample_axis(program)
    for label in program.spec.sizes:
        if label in samples.names:
            return label
    fixed = f"the number of samples is fixed at {samples.size}" if samples.size else "none has one"
    raise PassError(
        f"no input has a dynamic batch size ({program.spec}), so there is nothing to give a number "
        f"for each sample: {samples.reason or fixed}. {samples.remedy}"
    )


def add_output(program: State, name: str, read: Node) -> None:
    """See `Editor.add_output`."""
    gm, end = program.module, output_node(program.module)
    codegen = gm.graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen):
        raise PassError(f"the output {name!r} cannot be added to a graph without output structure.")
    info = codegen.pytree_info
    try:
        structure = extended(info.out_spec, name)
    except ValueError as error:
        raise PassError(
            f"the output {name!r} cannot be added: {error}. Choose another name, or wrap the model "
            "so that it returns a tensor, a tuple or a dict."
        ) from error
    leaves: Any = end.args[0]
    end.args = ([*leaves, read],)
    arguments = _PyTreeInfo(info.orig_args, info.in_spec, structure)
    gm.graph.set_codegen(_PyTreeCodeGen(arguments))
    program.outputs_added = (*program.outputs_added, name)


def drop_output(program: State, name: str) -> None:
    """See `Editor.drop_output`."""
    gm, end = program.module, output_node(program.module)
    place = program.outputs_added.index(name)
    program.outputs_added = tuple(n for n in program.outputs_added if n != name)
    leaves: Any = list(end.args[0])  # pyright: ignore[reportArgumentType]
    del leaves[place - len(program.outputs_added) - 1]
    end.args = (leaves,)
    structure = _tree(program.base.module).out_spec
    for left in program.outputs_added:
        structure = extended(structure, left)
    info = _tree(gm)
    gm.graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(info.orig_args, info.in_spec, structure)))


def _tree(gm: GraphModule) -> _PyTreeInfo:
    codegen: Any = gm.graph._codegen
    return codegen.pytree_info


def drop_input(program: State, name: str, reason: str) -> None:
    """Removes an input that nothing reads; `reason` is what a call that gives it is told.

    Raises:
        PassError: something reads it.
    """
    gm = program.module
    node = placeholders(gm)[name]
    if node.users:
        raise PassError(f"the input {name!r} is still read by {next(iter(node.users)).name}.")
    gm.graph.erase_node(node)
    spec = program.spec
    program.spec = replace(
        spec,
        inputs=tuple(i for i in spec.inputs if i.name != name),
        reasons={**spec.reasons, name: reason},
    )
    program.sample = {n: t for n, t in program.sample.items() if n != name}
    forget_input(gm, name)


def forget_input(gm: GraphModule, name: str) -> None:
    """Takes a placeholder that is gone out of the module's signature."""
    _sign(gm, lambda names: [n for n in names if n != name])


def _sign(gm: GraphModule, change: Callable[[list[str]], list[str]]) -> None:
    """Rewrites the signature for the graph's placeholders."""
    codegen = gm.graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen):
        return
    info = codegen.pytree_info
    _, spec = pytree.tree_flatten(((), dict.fromkeys(placeholders(gm))))
    arguments = change(list(info.orig_args))
    gm.graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(arguments, spec, info.out_spec)))
