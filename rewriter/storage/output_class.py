"""What a program returns when the class of its outputs is not there: a dict with attributes.

Classes of outputs (Hugging Face's `ModelOutput` and the like) belong to the model's code. In a
program file they become `Outputs` with the same names; tuples, lists and dicts stay what they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from torch.utils import _pytree as pytree

_PLAIN = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
OUTPUTS = "peftfx.Outputs"


class Outputs(dict[str, Any]):
    """Named outputs: `out.logits`, `out["logits"]` and `out[0]` are the same."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getitem__(name)
        except KeyError as error:
            raise AttributeError(f"there is no output {name!r}: {', '.join(self)}.") from error

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else list(self.values())[key]


def _flatten(held: Outputs) -> tuple[list[Any], list[str]]:
    return list(held.values()), list(held)


def _unflatten(values: Iterable[Any], names: Any) -> Outputs:
    return Outputs(zip(names, values, strict=True))


def _with_keys(held: Outputs) -> tuple[list[tuple[Any, Any]], list[str]]:
    return [(pytree.MappingKey(k), v) for k, v in held.items()], list(held)


pytree.register_pytree_node(
    Outputs, _flatten, _unflatten, serialized_type_name=OUTPUTS, flatten_with_keys_fn=_with_keys
)


def portable(structure: str) -> str:
    """A written output structure (`treespec_dumps`) with every class of the model's replaced.

    Raises:
        ValueError: a class does not say the names of its parts.
    """
    version, spec = json.loads(structure)
    return json.dumps([version, _portable(spec)])


def _portable(spec: Any) -> Any:
    children = [_portable(child) for child in spec["children_spec"]]
    if spec["type"] in _PLAIN | {OUTPUTS}:
        return {**spec, "children_spec": children}
    names: Any = json.loads(spec["context"]) if spec["context"] else None
    if not isinstance(names, list) or len(names) != len(children):
        raise ValueError(f"the outputs are a {spec['type']}, whose parts have no names")
    if not all(isinstance(n, str) for n in names):
        raise ValueError(f"the outputs are a {spec['type']}, whose parts have no names")
    return {"type": OUTPUTS, "context": json.dumps(names), "children_spec": children}
