"""What a training checkpoint holds: the state of program, optimizer and controllers by name.

Tensors (sharded or not) and the rest, which is strict JSON. Only what training changes is here: the
frozen base is not, so a checkpoint is as small as the adapters and their optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..api import Program
from ..errors import ArtifactError
from ..files.nested import flatten, nest
from ..graph.module import state_buffers
from ..graph.sharded import is_sharded, whole
from ..training.controllers import Controllers

Tensors = dict[str, Tensor]


def learnt(program: Program) -> Tensors:
    """Everything that training changes: what adapters hold, what trains, updated statistics."""
    tensors: Tensors = {}
    for adapter in program.owners:
        tensors |= program.adapter_tensors(adapter)
    tensors |= {n: p.detach() for n, p in program.named_trainable_parameters().items()}
    updated = state_buffers(program.module)
    return tensors | {n: b for n, b in program.module.named_buffers() if n in updated}


# Optimizers. States are named by their parameters, so that neither order nor sharding matters.


def optimizer_tensors(program: Program, optimizer: torch.optim.Optimizer) -> Tensors:
    """Tensors of the optimizer's state, `<parameter>.<key>`.

    Raises:
        ArtifactError: it optimises a tensor that is not in the program (before `fully_shard`?), or
            a state is sharded otherwise than its parameter.
    """
    tensors: Tensors = {}
    for name, parameter, state in _states(program, optimizer):
        for key, item in state.items():
            if not isinstance(item, Tensor):
                continue
            if is_sharded(item) and item.shape != parameter.shape:
                raise ArtifactError(
                    f"the optimizer's {key!r} of {name} is sharded, {tuple(item.shape)}, and has "
                    f"another shape than the parameter, {tuple(parameter.shape)}. Such a state "
                    "cannot be saved; use an optimizer like AdamW."
                )
            tensors[f"{name}.{key}"] = item.detach()
    return tensors


def optimizer_rest(program: Program, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's class, the options and parameter names of its groups, and plain states."""
    names = {id(p): n for n, p in program.module.named_parameters()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        options = {k: _plain(v, k) for k, v in group.items() if k not in ("params", "names")}
        groups.append({"params": [names.get(id(p), "") for p in group["params"]], **options})
    state = {
        f"{name}.{key}": _plain(item, key)
        for name, _, states in _states(program, optimizer)
        for key, item in states.items()
        if not isinstance(item, Tensor)
    }
    return {"class": type(optimizer).__name__, "groups": groups, "state": state}


def _states(
    program: Program, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
    names = {id(p): n for n, p in program.module.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                raise ArtifactError(
                    f"the optimizer holds a tensor {tuple(parameter.shape)} that the program does "
                    "not have. Build the optimizer after the module was sharded or wrapped, from "
                    "its parameters."
                )
            yield name, parameter, optimizer.state.get(parameter, {})


def _plain(item: Any, key: str) -> Any:
    if isinstance(item, Tensor) and item.numel() == 1:
        return float(item)
    if isinstance(item, tuple):
        return [_plain(i, key) for i in item]  # pyright: ignore[reportUnknownVariableType]
    if item is None or isinstance(item, bool | int | float | str):
        return item
    raise ArtifactError(f"the optimizer's option {key!r} is a {type(item).__name__}, not JSON.")


def put_optimizer(
    program: Program, optimizer: torch.optim.Optimizer, tensors: Tensors, rest: Mapping[str, Any]
) -> None:
    """Gives an optimizer the state that the two functions above took.

    Raises:
        ArtifactError: it holds a state of another parameter, or other options; nothing was changed.
    """
    of = {n: p for n, p, _ in _states(program, optimizer)}
    states = [
        (_owner(key, of), key, item) for key, item in (*tensors.items(), *rest["state"].items())
    ]
    for group, saved in zip(optimizer.param_groups, rest["groups"], strict=True):
        _check_options(group, saved)
    optimizer.state.clear()
    for name, key, item in states:
        optimizer.state[of[name]][key.removeprefix(f"{name}.")] = item
    for group, saved in zip(optimizer.param_groups, rest["groups"], strict=True):
        for option, item in saved.items():
            current = group.get(option)
            if option == "params":
                continue
            if isinstance(current, Tensor):
                current.fill_(item)
            else:
                group[option] = tuple(item) if isinstance(current, tuple) else item


def _owner(key: str, names: Iterable[str]) -> str:
    """The parameter whose state has this key."""
    owners = [n for n in names if key.startswith(f"{n}.")]
    if not owners:
        raise ArtifactError(f"the checkpoint holds a state {key!r}, of no parameter here.")
    return max(owners, key=len)


def _check_options(group: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises ArtifactError unless saved options are of the kinds that a group has."""
    for option, item in saved.items():
        own = group.get(option)
        number = isinstance(item, int | float) and not isinstance(item, bool)
        wants = isinstance(own, int | float | Tensor) and not isinstance(own, bool)
        if option != "params" and wants and not number:
            raise ArtifactError(f"the checkpoint says {option}={item!r}, but here it is a number.")


def optimizer_place(program: Program, key: str, saved: Tensor) -> Tensor:
    """An empty tensor for a saved state: sharded like its parameter if it has the same shape."""
    names = dict(program.module.named_parameters())
    parameter = names[_owner(key, names)]
    if parameter.shape != saved.shape:
        scalar = saved.dim() == 0  # step counts, which optimizers keep on the CPU
        return torch.empty_like(saved, device="cpu" if scalar else parameter.device)
    return torch.empty_like(parameter, dtype=saved.dtype, requires_grad=False)


# Controllers.


def controller_leaves(controllers: Controllers) -> tuple[Tensors, list[Any]]:
    """Tensors by the JSON text of their path, and `[path, item]` for the rest."""
    tensors, rest = flatten(controllers.state_dict())
    return {name: whole(tensor).detach() for name, tensor in tensors.items()}, rest


def put_controllers(controllers: Controllers, tensors: Tensors, rest: list[Any]) -> None:
    """Gives controllers the state that `controller_leaves` took."""
    controllers.load_state_dict(nest(tensors, rest))
