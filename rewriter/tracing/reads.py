"""Which calls read a model's matrices, told by one call on the meta device.

That costs a hundredth of a capture and says much less: which parameters are what linears multiply
by, and nothing else reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_OTHER = "other"
_CALLS: Mapping[Any, Mapping[str, str]] = {
    nn.functional.linear: {"input": _OTHER, "weight": "product", "bias": "bias"},
    torch.addmm: {"input": "bias", "mat1": _OTHER, "mat2": "turned product"},
}
"""Calls that may read a matrix -> what each of their arguments is, in order."""

_T: Any = torch.Tensor
_ASKING: frozenset[Any] = frozenset((
    *(getattr(_T, n).__get__ for n in ("shape", "dtype", "device", "is_meta", "requires_grad",
                                       "ndim", "layout", "is_cuda", "is_quantized")),
    _T.size, _T.dim, _T.numel, _T.is_floating_point,
))  # fmt: skip
"""What asks about a tensor, and reads none of its values."""


@dataclass(frozen=True)
class Layout:
    """What a model stores.

    Attributes:
        state_names: of its state dict.
        aliases: tied names -> the first name of their tensor.
        tensors: all of them by first name, on any device.
        matrices: weights that linears multiply by, and nothing else reads -> whether they are
            stored `[in, out]`. None has a second name.
    """

    state_names: tuple[str, ...]
    aliases: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    matrices: Mapping[str, bool]


def layout_of(model: nn.Module, example: Mapping[str, Tensor]) -> Layout | None:
    """The layout of a model; None where it cannot be called without values.

    Args:
        model: on the meta device.
        example: inputs of a call, by name.
    """
    aliases = aliases_of(model)
    state = model.state_dict(keep_vars=True)
    tensors = {aliases.get(n, n): t for n, t in state.items()}
    watch = _Watch({id(t): n for n, t in tensors.items()})
    try:
        with torch.no_grad(), watch:
            model(**{n: t.to("meta") for n, t in example.items()})
    except Exception:  # noqa: BLE001 - whatever it is: it reads values, or is no model of that kind
        return None
    tied = {*aliases.values()}
    turned = {"product": False, "turned product": True}
    matrices = {
        name: turned[next(iter(reads))]
        for name, reads in watch.reads.items()
        if len(reads) == 1 and reads <= {*turned} and name not in tied
    }
    return Layout(tuple(state), aliases, tensors, matrices)


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Further names of a model's parameters and buffers -> the first ones."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    both: list[tuple[str, Tensor]] = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in both:
        known = first.setdefault(id(tensor), name)
        if known != name:
            aliases[name] = known
    return aliases


class _Watch(TorchFunctionMode):
    """Notes as what tensors are read."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.reads: dict[str, set[str]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        given = kwargs or {}
        if func not in _ASKING:
            for item, role in _arguments(func, args, given):
                for leaf in tree_leaves(item):
                    if isinstance(leaf, Tensor) and (name := self.names.get(id(leaf))):
                        self.reads.setdefault(name, set()).add(role)
        return func(*args, **given)


def _arguments(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[Any, str]]:
    """What a call is given, with its role."""
    roles = _CALLS.get(func, {})
    if len(args) > len(roles) or not kwargs.keys() <= roles.keys():  # `alpha` of addmm, and so on
        roles = {}
    named = [*zip(roles, args, strict=False), *kwargs.items()]
    yield from ((item, roles.get(name, _OTHER)) for name, item in named)
    yield from ((item, _OTHER) for item in args[len(roles) :])
