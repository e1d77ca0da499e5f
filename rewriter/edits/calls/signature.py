"""Edits of what a program takes: new inputs, and inputs that it does not need any more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from ...errors import PassError
from ...graph.aten import placeholders, value
from ...inputs.spec import TensorInput
from ...program.state import State
from .samples import sample_axis


def add_input(
    program: State,
    name: str,
    example: Tensor,
    per_sample: bool = False,
    values: tuple[int, int] | None = None,
) -> Node:
    """A new input; a call may leave it out and then gets `example`.

    Args:
        example: one value of fixed shape.
        per_sample: the input is `[batch]` instead, with one such number for each sample.
        values: the smallest and the largest that it may hold; a call with others is refused.

    Raises:
        PassError: there is an input of that name, or no dynamic number of samples.
    """
    gm = program.module
    held = placeholders(gm)
    if name in held or name in program.spec.names:
        raise PassError(
            f"the program has an input {name!r} already. Give the new one another name; the "
            f"inputs are {program.spec}."
        )
    last = list(held.values())[-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(name)
    beside = value(last)
    on_device = example.to(beside.device)
    shape: tuple[int | str, ...] = tuple(example.shape)
    node.meta["val"] = beside.fake_mode.from_tensor(on_device, static_shapes=True)
    if per_sample:
        source, axis, label = _samples(program)
        with beside.fake_mode:
            node.meta["val"] = node.meta["val"].expand(value(held[source]).shape[axis])
        example, shape = example.expand(program.sample[source].shape[axis]), (label,)
    fill = example.flatten()[0].item()
    added = TensorInput(name, shape, example.dtype, fill, optional=True, values=values)
    program.spec = replace(program.spec, inputs=(*program.spec.inputs, added))
    program.sample = {**program.sample, name: example}
    _sign(gm, lambda names: [*names, name])
    return node


def _samples(program: State) -> tuple[str, int, str]:
    """An input with a dynamic number of samples, that axis of it, and the size's name."""
    samples = sample_axis(program)
    for source in program.spec.inputs:
        for axis, label in enumerate(source.shape):
            if isinstance(label, str) and label in samples.names:
                return source.name, axis, label
    fixed = f"the number of samples is fixed at {samples.size}" if samples.size else "none has one"
    raise PassError(
        f"no input has a dynamic batch size ({program.spec}), so there is nothing to give a number "
        f"for each sample: {samples.reason or fixed}. {samples.remedy}"
    )


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
