"""What a program returns where the class of its outputs does not serve: a dict with attributes.

Classes of outputs (Hugging Face's `ModelOutput` and the like) belong to the model's code. In a
program file, or with an output more, they become `Outputs` with the same names; tuples, lists and
dicts stay what they are.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch.utils import _pytree as pytree

_PLAIN = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
OUTPUTS = "peftfx.Outputs"
ALONE = "output"
"""Name of the output of a model that returns one value, beside others that are added."""


class Outputs(dict[str, Any]):
    """Named outputs: `out.logits`, `out["logits"]` and `out[0]` are the same."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getitem__(name)
        except KeyError as error:
            raise AttributeError(f"there is no output {name!r}: {', '.join(self)}.") from error

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else list(self.values())[key]


def _flatten(outputs: Outputs) -> tuple[list[Any], list[str]]:
    return list(outputs.values()), list(outputs)


def _unflatten(values: Iterable[Any], names: Any) -> Outputs:
    return Outputs(zip(names, values, strict=True))


def _with_keys(outputs: Outputs) -> tuple[list[tuple[Any, Any]], list[str]]:
    return [(pytree.MappingKey(k), v) for k, v in outputs.items()], list(outputs)


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


def extended(structure: Any, name: str) -> Any:
    """An output structure, a pytree spec, with one leaf more behind all others. One value becomes
    `Outputs`, in which it is called `output`.

    Raises:
        ValueError: there is no place for one, or an output of that name.
    """
    template: Any = pytree.tree_unflatten(range(structure.num_leaves), structure)
    if type(template) in (tuple, list):
        return pytree.tree_structure(type(template)([*template, len(template)]))
    if structure.is_leaf():
        template = Outputs({ALONE: template})
    if type(template) not in (dict, OrderedDict, Outputs):
        spec = pytree.treespec_loads(portable(pytree.treespec_dumps(structure)))
        template = pytree.tree_unflatten(range(structure.num_leaves), spec)
    if not isinstance(template, dict):
        raise ValueError(f"the outputs are a {type(template).__name__}, whose parts have no names")
    if name in template:
        raise ValueError(f"there is an output {name!r} already")
    return pytree.tree_structure(type(template)([*template.items(), (name, len(template))]))


def shortened(output: Any, count: int) -> Any:
    """Outputs without the last `count` that `extended` has added."""
    if not count:
        return output
    if isinstance(output, dict):
        left = type(output)(list(output.items())[:-count])
        return left[ALONE] if list(left) == [ALONE] and type(left) is Outputs else left
    return output[:-count]
