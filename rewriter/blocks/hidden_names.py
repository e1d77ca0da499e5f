"""Names of an outlined module that the model uses, too: the model's win.

Attributes of a class hide children of their names (`blocks` of a vision transformer), and the graph
reads children by name. So the class gives way, and our own code asks `names(module)`.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from ..graph.module import own_attribute

_YIELDED = "_yielded"
TRACED = {"graph", "run"}
"""What modules that run a graph have beside what their class defines."""

_OUTLINED = TRACED | {"flat", "_paths"}


class Names:
    """The attributes that a module's class and instance have, where children hide them."""

    def __init__(self, module: nn.Module, kind: type[nn.Module]) -> None:
        self.__dict__["_module"], self.__dict__["_kind"] = module, kind

    def __getattr__(self, name: str) -> Any:
        attributes = vars(self._module)
        return (
            attributes[name]
            if name in attributes
            else getattr(super(self._kind, self._module), name)
        )

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self._module)[name] = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)


def names(module: nn.Module) -> Any:
    """The module itself, or a view of it on which its own attributes hide its children."""
    kinds = type(module).__mro__
    kind = next((k for k in kinds if _YIELDED in vars(k)), None)
    return module if kind is None else Names(module, kind)


def yielding(kind: type[nn.Module], title: str, holder: nn.Module) -> Any:
    """A class like `kind` whose attributes give way to the children and tensors of `holder`."""
    attributes = set(dir(kind)) | _OUTLINED
    own = {*holder._modules, *holder._parameters, *holder._buffers}
    hidden = sorted(own & (attributes - set(dir(nn.Module))))
    doors = {name: property(functools.partial(own_attribute, name=name)) for name in hidden}
    return type(title, (kind,), doors | ({_YIELDED: tuple(hidden)} if hidden else {}))
