"""mergekit's configurations: which models to merge, how, and each parameter's value at each tensor.

The language is mergekit 0.1.5's for `models` and for `slices`: parameters of a model come before
those of its slice, and these before those of all; a list of numbers is a gradient over the layers
of a slice, one of `value` and `filter` takes the first whose filter is part of the tensor's name.
What mergekit would ignore (unknown keys, parameters that the method does not have) is an error with
its line, and so is what is not done here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

from ..rewriter.errors import OptionError, nearest
from ..rewriter.pipeline.syntax import Node, yaml_nodes

DTYPES = ("float32", "float16", "bfloat16", "float64")
_TOP = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source",
)  # fmt: skip
_LATER = {
    "modules": "name models, or slices of layers",
    "tokenizer": "leave it out: models of one vocabulary alone are merged",
    "chat_template": "leave it out, and set it in the merged tokenizer_config.json",
}
LAYER = re.compile(r"^(.*?)\.(\d+)\.")
_SHARED, _EACH, _OTHERS = "shared", "each input", "each input but the base"


@dataclass(frozen=True)
class Parameter:
    """One of a method: whose it is, and its default (None: it must be given)."""

    scope: str
    default: float | bool | None
    optional: bool = False


def _task(normalize: bool, rescale: bool, **more: Parameter) -> Mapping[str, Parameter]:
    return {
        "weight": Parameter(_OTHERS, None), "density": Parameter(_OTHERS, 1.0),
        "normalize": Parameter(_SHARED, normalize), "rescale": Parameter(_SHARED, rescale),
        "lambda": Parameter(_SHARED, 1.0), "int8_mask": Parameter(_SHARED, False), **more,
    }  # fmt: skip  # int8_mask: how signs are kept meanwhile; it changes no number


_GAMMA, _EPSILON = Parameter(_OTHERS, 0.01), Parameter(_OTHERS, 0.15)

METHODS: Mapping[str, Mapping[str, Parameter]] = {
    "linear": {"weight": Parameter(_EACH, None), "normalize": Parameter(_SHARED, True)},
    "slerp": {"t": Parameter(_SHARED, None)},
    "passthrough": {"scale": Parameter(_EACH, None, optional=True)},
    "task_arithmetic": _task(False, False),
    "ties": _task(True, False),
    "dare_linear": _task(False, True),
    "dare_ties": _task(False, True),
    "breadcrumbs": _task(False, False, gamma=_GAMMA),
    "breadcrumbs_ties": _task(False, False, gamma=_GAMMA),
    "della": _task(True, True, epsilon=_EPSILON),
    "della_linear": _task(False, True, epsilon=_EPSILON),
}
"""Method -> its parameters, with mergekit's defaults."""


@dataclass(frozen=True)
class Config:
    """A merge.

    Attributes:
        method: one of `METHODS`.
        models: directories as the file has them, the base among them (last, if it is only named
            as the base).
        base: the base's, or ''.
        settings: model -> its own parameters; '' -> those of all.
        dtype: that the result is in, '' for that of the models.
        tokenizer: whose tokenizer is taken, '' for the base's or the first model's.
        where: what it was read from, for errors.
        slices: of which the result is stacked; none where models are merged whole.
    """

    method: str
    models: tuple[str, ...]
    base: str
    settings: Mapping[str, Mapping[str, Node]]
    dtype: str
    tokenizer: str
    where: str
    slices: tuple[Slice, ...] = field(default=())

    @property
    def others(self) -> tuple[str, ...]:
        """The models that are not the base."""
        return tuple(m for m in self.models if m != self.base)

    def values(self, tensor: str, place: float) -> dict[str, dict[str, Any]]:
        """Every parameter at a tensor: '' -> the shared ones, model -> its own.

        Args:
            tensor: its name.
            place: of its layer among all, from 0 to 1; 0 for tensors of no layer.

        Raises:
            OptionError: one that must be given is not.
        """
        found: dict[str, dict[str, Any]] = {"": {}, **{m: {} for m in self.models}}
        for name, parameter in METHODS[self.method].items():
            shared = parameter.scope == _SHARED
            owners = ("",) if shared else self.models
            if parameter.scope == _OTHERS:
                owners = self.others
            for owner in owners:
                found[owner][name] = self._value(name, parameter, owner, tensor, place)
        return found

    def _value(
        self, name: str, parameter: Parameter, owner: str, tensor: str, place: float
    ) -> float | bool | None:
        for scope in dict.fromkeys((owner, "")):
            node = self.settings.get(scope, {}).get(name)
            value = None if node is None else _at(node, tensor, place)
            if value is not None:
                return bool(value) if isinstance(parameter.default, bool) else float(value)
        if parameter.default is None and not parameter.optional:
            of = f" of {owner}" if owner else ""
            raise OptionError(
                f"{self.where}: {self.method} needs the parameter {name!r}{of}, and nothing gives "
                f"it for {tensor}. Give it below parameters, without a filter."
            )
        return parameter.default


def _at(node: Node, tensor: str, place: float) -> Any:
    """The value of a setting at a tensor; None where no filter fits."""
    if isinstance(node.value, dict):
        node = Node((node,), node.line)
    if not isinstance(node.value, tuple):
        return node.value
    steps: tuple[Node, ...] = node.value
    if any(isinstance(s.value, dict) for s in steps):
        for step in steps:
            wanted = step.value["filter"].value if "filter" in step.value else None
            if wanted in (None, "*") or wanted in tensor:
                return _at(step.value["value"], tensor, place)
        return None
    values = [s.value for s in steps]
    if any(isinstance(v, bool) for v in values):
        return values[int(place * (len(values) - 1))]
    along = place * (len(values) - 1)
    low = int(along)
    high, part = min(len(values) - 1, low + 1), along - low
    return (1 - part) * values[low] + part * values[high]


@dataclass(frozen=True)
class Slice:
    """Layers of the result.

    Attributes:
        line: of the file.
        config: how they are merged.
        ranges: model -> (its first layer, the one behind its last); all are as many.
    """

    line: int
    config: Config
    ranges: Mapping[str, tuple[int, int]]

    @property
    def count(self) -> int:
        """How many layers it has."""
        return next(end - first for first, end in self.ranges.values())


def places(names: Collection[str]) -> dict[str, float]:
    """Tensor -> where its layer is among all of its stack, from 0 to 1; 0 for those of no layer, 1
    where there is one layer."""
    found = {n: m for n in names if (m := LAYER.match(n))}
    last: dict[str, int] = {}
    for match in found.values():
        last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    return {
        n: (int(found[n][2]) / last[found[n][1]] if last[found[n][1]] else 1.0)
        if n in found
        else 0.0
        for n in names
    }


# Reading.


def read_config(text: str, where: str) -> Config:
    """Reads a configuration.

    Raises:
        OptionError: it is not YAML, or says something that is unknown or not done here; with the
            line.
    """
    return _Reader(where).config(yaml_nodes(text, where))


@dataclass(frozen=True)
class _Asked:
    """What a file says of all its slices."""

    method: str
    top: Mapping[str, Node]
    base: str
    shared: Mapping[str, Node]


class _Reader:
    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, node: Node, said: str) -> OptionError:
        return OptionError(f"{self.where}, line {node.line}: {said}")

    def mapping(self, node: Node, known: Sequence[str], what: str) -> dict[str, Node]:
        if not isinstance(node.value, dict):
            raise self.fail(node, f"{what} must have keys ({', '.join(known)}).")
        found: dict[str, Node] = node.value
        for key, child in found.items():
            if key in _LATER and what == "the configuration":
                raise self.fail(child, f"{key} is not done here; {_LATER[key]}.")
            if key not in known:
                raise self.fail(
                    child, f"{what} has no key {key!r}. Nearest: {nearest(key, known)}. Choose "
                    f"among {', '.join(known)}."
                )  # fmt: skip
        return found

    def text(self, node: Node | None, what: str, line: Node) -> str:
        if node is None:
            raise self.fail(line, f"{what} is missing.")
        if not isinstance(node.value, str) or not node.value:
            raise self.fail(node, f"{what} must be a text, not {node.value!r}.")
        return node.value

    def many(self, node: Node, what: str) -> tuple[Node, ...]:
        if not isinstance(node.value, tuple) or not node.value:
            raise self.fail(node, f"{what} must be a list with something in it.")
        return node.value  # pyright: ignore[reportUnknownVariableType]

    def config(self, root: Node) -> Config:
        top = self.mapping(root, _TOP, "the configuration")
        method = self.text(top.get("merge_method"), "merge_method", root)
        if method not in METHODS:
            raise self.fail(
                top["merge_method"], f"there is no method {method!r} here. Nearest: "
                f"{nearest(method, METHODS)}. Choose among {', '.join(METHODS)}."
            )  # fmt: skip
        base = self.text(top["base_model"], "base_model", root) if "base_model" in top else ""
        if ("models" in top) == ("slices" in top):
            raise self.fail(root, "give either models or slices.")
        asked = _Asked(method, top, base, self.parameters(top.get("parameters"), method))
        if "models" in top:
            entries = self.many(top["models"], "models")
            models, settings = self.group(asked, entries, ("model", "parameters"), "a model")
            self.sizes(top, method, models, base)
            if base and base not in models:
                models.append(base)
            slices: tuple[Slice, ...] = ()
        else:
            slices = tuple(self.slice(node, asked) for node in self.many(top["slices"], "slices"))
            models = [*dict.fromkeys(m for s in slices for m in s.config.models)]
            settings = {"": asked.shared}
        dtype, tokenizer = self.dtype(top), self.tokenizer(top, models, base)
        first = base if base in models else ""
        return Config(method, tuple(models), first, settings, dtype, tokenizer, self.where, slices)

    def group(
        self, asked: _Asked, entries: Sequence[Node], known: Sequence[str], what: str
    ) -> tuple[list[str], dict[str, Mapping[str, Node]]]:
        """Models that are merged with one another, and their parameters."""
        models: list[str] = []
        settings: dict[str, Mapping[str, Node]] = {"": asked.shared}
        for entry in entries:
            own = self.mapping(entry, known, what)
            name = self.text(own.get("model"), "model", entry)
            if name in models:
                raise self.fail(entry, f"the model {name!r} is given twice.")
            models.append(name)
            settings[name] = self.parameters(own.get("parameters"), asked.method)
        return models, settings

    def slice(self, node: Node, asked: _Asked) -> Slice:
        """One slice of the result."""
        own = self.mapping(node, ("sources", "parameters", "base_model"), "a slice")
        if "sources" not in own:
            raise self.fail(node, "the slice has no sources.")
        base = asked.base
        if "base_model" in own:
            base = self.text(own["base_model"], "base_model", node)
        shared = {**asked.shared, **self.parameters(own.get("parameters"), asked.method)}
        entries = self.many(own["sources"], "sources")
        keys = ("model", "layer_range", "parameters")
        models, settings = self.group(replace(asked, shared=shared), entries, keys, "a source")
        if asked.method in (_FROM_BASE, *_TASKS) and base and base not in models:
            raise self.fail(
                own["sources"], f"the base_model {base!r} is not among the sources of this slice, "
                "so it has no layers here. Add it, with its layer_range."
            )  # fmt: skip
        base = base if base in models else ""
        self.sizes(asked.top, asked.method, models, base)
        ranges = {m: self.layers(entry) for m, entry in zip(models, entries, strict=True)}
        if len({end - first for first, end in ranges.values()}) > 1:
            said = ", ".join(f"{end - first} of {m}" for m, (first, end) in ranges.items())
            raise self.fail(node, f"the sources of a slice have as many layers each, not {said}.")
        config = Config(asked.method, tuple(models), base, settings, self.dtype(asked.top), "",
                        self.where)  # fmt: skip
        return Slice(node.line, config, ranges)

    def layers(self, entry: Node) -> tuple[int, int]:
        ends = entry.value.get("layer_range", entry)
        found = [n.value for n in ends.value] if isinstance(ends.value, tuple) else []
        whole = [n for n in found if type(n) is int and n >= 0]
        if len(found) != 2 or whole != found or not found[0] < found[1]:
            said = "layer_range must be [first layer, the one behind the last], as [0, 12]."
            raise self.fail(ends, said)
        return found[0], found[1]

    def sizes(self, top: Mapping[str, Node], method: str, models: list[str], base: str) -> None:
        node = top["merge_method"]
        if method in (_FROM_BASE, *_TASKS) and not base:
            raise self.fail(node, f"{method} needs a base_model.")
        others = [m for m in models if m != base]
        if method == _FROM_BASE and len(others) != 1:
            said = f"slerp goes from the base to one other model, not to {len(others)}."
            raise self.fail(node, said)
        if method == "passthrough" and (len(models) != 1 or (base and others)):
            raise self.fail(node, "passthrough takes one model.")
        if method in _TASKS and not others:
            raise self.fail(node, f"{method} needs a model beside the base.")

    def parameters(self, node: Node | None, method: str) -> dict[str, Node]:
        if node is None or node.value is None:
            return {}
        found = self.mapping(node, tuple(METHODS[method]), f"{method}'s parameters")
        for name, setting in found.items():
            self.setting(setting, name, isinstance(METHODS[method][name].default, bool))
        return found

    def setting(self, node: Node, name: str, switch: bool, above: str = "") -> None:
        """Checks a value; `above` is what it stands in: a filter's value or a list."""
        value = node.value
        if isinstance(value, dict) and above != "value":
            given = self.mapping(node, ("value", "filter"), f"a value of {name}")
            if "value" not in given:
                raise self.fail(node, f"{name}: a filter needs a value.")
            self.setting(given["value"], name, switch, "value")
            if "filter" in given and not isinstance(given["filter"].value, str | None):
                raise self.fail(given["filter"], f"{name}: a filter is a part of names.")
        elif isinstance(value, tuple) and above != "list":
            for step in self.many(node, name):
                self.setting(step, name, switch, above if above else "list")
            kinds = {isinstance(s.value, dict) for s in node.value}
            if len(kinds) > 1 or any(isinstance(s.value, tuple) for s in node.value):
                raise self.fail(node, f"{name}: a list is of numbers, or of filters with values.")
        elif switch and not isinstance(value, bool):
            raise self.fail(node, f"{name} is true or false, not {value!r}.")
        elif not switch and not _is_number(value):
            raise self.fail(node, f"{name} is a number, not {value!r}.")
        elif name in _SHARES and _is_number(value) and not 0 <= value <= 1:
            raise self.fail(node, f"{name} is a share, from 0 to 1, not {value!r}.")

    def dtype(self, top: Mapping[str, Node]) -> str:
        found = ""
        for key in ("dtype", "out_dtype"):
            if key in top:
                found = self.text(top[key], key, top[key]).removeprefix("torch.")
                if found not in DTYPES:
                    raise self.fail(top[key], f"{key} must be one of {', '.join(DTYPES)}.")
        return found

    def tokenizer(self, top: Mapping[str, Node], models: Sequence[str], base: str) -> str:
        if "tokenizer_source" not in top:
            return ""
        node = top["tokenizer_source"]
        source = self.text(node, "tokenizer_source", node)
        if source in ("base", "union"):  # of one vocabulary, the union is any of them
            return base or models[0]
        if source not in models:
            raise self.fail(node, f"the tokenizer is base, union or a model's, not {source!r}'s.")
        return source


_TASKS = tuple(m for m in METHODS if "lambda" in METHODS[m])
_FROM_BASE = "slerp"
_SHARES = ("density", "gamma")


def _is_number(value: object) -> TypeGuard[int | float]:
    return type(value) in (int, float) and math.isfinite(value)  # pyright: ignore[reportArgumentType]
