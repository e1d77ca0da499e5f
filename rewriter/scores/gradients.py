"""Gradients of stored tensors, as scores of importance need them.

A score pass runs batches through a fork whose stored tensors require gradients; the program is not
touched. Each tensor's gradient is reduced and freed as soon as backward has it, so that there are
the sums and one gradient at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import MetaTensorError, NonFiniteError, OptionError
from ..measure.compare import all_finite
from ..program.state import State

_ROOM = 1 << 32
"""Bytes of sums that are held at a time; for more of them, the data runs again."""


def gradients(program: State, data: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """The gradients of the loss with respect to stored parameters, summed over batches.

    Args, raises: as of `gradient_sums`.
    """
    return dict(gradient_sums(program, data, names, lambda gradient: gradient))


def gradient_sums(
    program: State,
    data: Any,
    names: Iterable[str],
    reduce: Callable[[Tensor], Tensor],
    room: int = _ROOM,
) -> Iterator[tuple[str, Tensor]]:
    """(name, sum over batches of a reduction of a stored parameter's gradient), in order.

    Args:
        program: not changed; runs in evaluation mode.
        data: batches. A batch is a mapping of inputs for which the program returns a loss (an
            attribute or item `loss`, or a single number), or a pair of such a mapping and a
            function from the outputs to the loss.
        names: of the parameters.
        reduce: gradient -> what to sum, in float32 at least: `Tensor.square`, or the gradient.
        room: bytes of the parameters whose sums are held at a time. Where all need more, the data
            runs again for each part of them; then it has to give the same batches.

    Raises:
        OptionError: there is no data, or a batch gives no loss that depends on the parameters.
        NonFiniteError: a loss, or a sum, is NaN or infinite.
        MetaTensorError: parameters have no values.
    """
    if not isinstance(data, Iterable):
        raise OptionError(
            "this score needs batches with a loss. Give them: run(program, ..., data=batches), "
            "where a batch is a mapping of inputs or a pair (inputs, function from outputs to "
            "loss)."
        )
    stored = dict(program.module.named_parameters())
    parts = _parts({name: stored[name] for name in names}, room)
    batches: Any = data if len(parts) == 1 else list(data)  # pyright: ignore[reportUnknownArgumentType]
    for part in parts:
        sums = _summed(program, batches, part, reduce)
        for name in part:
            total = sums.pop(name)
            if not all_finite(total):
                raise NonFiniteError(
                    f"the gradients of {name} hold NaN or infinity, so they say nothing of what "
                    "matters. Give batches of finite losses, in float32."
                )
            yield name, total


def _parts(stored: Mapping[str, Tensor], room: int) -> list[list[str]]:
    """Names, in parts whose tensors have room in float32."""
    parts: list[list[str]] = [[]]
    left = room
    for name, tensor in stored.items():
        if tensor.is_meta:
            raise MetaTensorError(
                f"{name} has no values to score. Load the weights first: peftfx.load_weights."
            )
        size = 4 * tensor.numel()
        if parts[-1] and size > left:
            parts.append([])
            left = room
        parts[-1].append(name)
        left -= size
    return parts


def _summed(
    program: State, data: Iterable[Any], names: Sequence[str], reduce: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    fork = program.fork().eval()
    wanted = {name: fork.module.get_parameter(name) for name in names}
    sums: dict[str, Tensor] = {}

    def take(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        with torch.no_grad():
            new = reduce(_wide(gradient))
            sums[name] = sums[name].add_(new) if name in sums else new

    for parameter in fork.module.parameters():
        parameter.requires_grad_(False)
    for name, parameter in wanted.items():
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: take(name, p))
    count = 0
    for batch in data:
        loss = _loss(fork, batch)
        if not loss.requires_grad:
            raise _unread(count, names)
        if not math.isfinite(loss.detach()):
            raise NonFiniteError(
                f"the loss of batch {count} is {float(loss.detach())}, so its gradients say "
                "nothing of what matters. Leave the batch out, or mend the loss."
            )
        loss.backward()
        count += 1
    if not count:
        raise OptionError(
            "this score needs batches with a loss, but data is empty. Give it some (an iterator "
            "gives its batches once)."
        )
    if not sums:
        raise _unread(0, names)
    with torch.no_grad():
        return {
            n: sums[n] if n in sums else reduce(_wide(torch.zeros_like(p)))
            for n, p in wanted.items()
        }


def _unread(batch: int, names: Sequence[str]) -> OptionError:
    return OptionError(
        f"the loss of batch {batch} depends on none of the {len(names)} tensors that are scored "
        f"({names[0]}, ...), so they have no gradients. Give a loss of the program's outputs, not "
        "detached, or choose other places with where=."
    )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _loss(program: State, batch: Any) -> Tensor:
    inputs, measure = (
        batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
    )
    if not isinstance(inputs, Mapping):
        raise OptionError(
            f"a batch must be a mapping of inputs, or a pair of one and a function from the "
            f"outputs to the loss; this one is a {type(inputs).__name__}."
        )
    output: Any = program(**inputs)
    if measure is not None:
        loss = measure(output)
    elif isinstance(output, Mapping):
        loss = output.get("loss")
    else:
        loss = getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise OptionError(
            "the program returns no loss for a batch. Capture it with labels, or give pairs "
            "(inputs, function from outputs to loss)."
        )
    return loss
