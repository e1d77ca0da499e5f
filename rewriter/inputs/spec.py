"""What a captured program accepts: input names, dtypes, shapes and the ranges of dynamic sizes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .axes import Kind, axis_of
from .nesting import differences, leaves, rebuild, template_of
from .relation import holds
from .tensor_input import TensorInput


@dataclass(frozen=True)
class InputSpec:
    """The inputs of a program.

    Attributes:
        inputs: the tensor inputs in the order of the graph's placeholders.
        ranges: dynamic size name -> (smallest, largest or None).
        parameters: names that the model's `forward` takes, in order.
        constants: non-tensor arguments whose value is part of the captured graph.
        structure: arguments that are containers of tensors, as templates (see `nesting`).
        variadic: name of the `*args` parameter of the model's `forward`, or ''.
        relations: what else must hold between dynamic sizes (see `relation`).
        reasons: why a size is bounded (by its name) or fixed (by `input.axis`), or why a
            relation must hold (by its text).
        kinds: dynamic size name -> what lies along it, where the name does not say (see `axes`).
    """

    inputs: tuple[TensorInput, ...]
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict[str, Any])
    parameters: tuple[str, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict[str, Any])
    structure: Mapping[str, Any] = field(default_factory=dict[str, Any])
    variadic: str = ""
    relations: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict[str, str])
    kinds: Mapping[str, Kind] = field(default_factory=dict[str, Kind])

    def of_kind(self, kind: Kind) -> tuple[str, ...]:
        """Names of the dynamic sizes of axes of a kind."""
        return tuple(n for n in self.sizes if axis_of(n, self.kinds).kind == kind)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensor inputs' names."""
        return tuple(i.name for i in self.inputs)

    def __str__(self) -> str:
        text = ", ".join(f"{i.name}: {short_type(i.dtype, i.shape)}" for i in self.inputs)
        return "; ".join((text, *self.limits))

    @property
    def limits(self) -> tuple[str, ...]:
        """Everything that sizes are bound to, with the reasons: ranges, relations, and axes that
        the model fixed although they were to be dynamic."""
        bounded = [n for n in self.sizes if self.ranges.get(n, (1, None)) != (1, None)]
        return (
            *(f"{n} is {self._range(n)}{self._because(n)}" for n in bounded),
            *(f"{r}{self._because(r)}" for r in self.relations),
            *(
                f"{i.name} holds {i.values[0]} to {i.values[1]}"
                for i in self.inputs
                if i.values is not None
            ),
            *(
                f"{i.name} axis {axis} is always {size} ({self.reasons[f'{i.name}.{axis}']})"
                for i in self.inputs
                for axis, size in enumerate(i.shape)
                if f"{i.name}.{axis}" in self.reasons
            ),
        )

    def _range(self, name: str) -> str:
        low, high = self.ranges[name]
        return f"{low} or more" if high is None else f"{low} to {high}"

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Matches a call to the captured inputs and checks them.

        Returns:
            The tensors by flat name, which is what the module takes.

        Raises:
            InputError: unknown, missing, wrongly typed or out of range inputs.
        """
        given = self._named(args, kwargs)
        for name in self.structure:
            given.update(self._flattened(name, given.pop(name, None)))
        bound: dict[str, Tensor] = {}
        there = {i.name: given[i.name] for i in self.inputs if given.get(i.name) is not None}
        for spec in self.inputs:
            item = given.pop(spec.name, None)
            bound[spec.name] = self._left_out(spec, there) if item is None else item
        for name, item in given.items():
            self._check_extra(name, item)
        self._check_sizes(bound)
        return bound

    def _left_out(self, spec: TensorInput, beside: Mapping[str, Any]) -> Tensor:
        """What an optional input is where it is not given, on the device of the others."""
        tensors = {n: t for n, t in beside.items() if isinstance(t, Tensor)}
        known = self.sizes_of(tensors)
        if not spec.optional or not {s for s in spec.shape if isinstance(s, str)} <= known.keys():
            why = f" ({spec.needed})" if spec.needed else ""
            raise InputError(
                f"input {spec.name!r} is missing{why}. The program was "
                f"captured with: {self}. Give it, or capture again without it."
            )
        device = next((t.device for t in tensors.values()), torch.device("cpu"))
        return spec.left_out([s if isinstance(s, int) else known[s] for s in spec.shape], device)

    def sizes_of(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """The dynamic sizes, by name, that some of the inputs have."""
        return {
            size: tensors[i.name].shape[axis]
            for i in self.inputs
            if i.name in tensors and tensors[i.name].dim() == len(i.shape)
            for axis, size in enumerate(i.shape)
            if isinstance(size, str)
        }

    def _named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return named_arguments(self.parameters, self.variadic, args, kwargs)
        except TypeError as error:
            raise InputError(f"{error}.") from error

    def _flattened(self, name: str, item: Any) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        try:
            template = template_of(name, item, tensors)
        except TypeError as error:
            raise InputError(f"input {error}; it was captured as a plain container.") from error
        for difference in differences(self.structure[name], template):
            raise InputError(
                f"input {name!r} was captured with {difference}. Capture again with the new form."
            )
        return tensors

    def arguments(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments of the model's own forward for flat tensors."""
        remaining = dict(tensors)
        nested = {name: rebuild(template, remaining) for name, template in self.structure.items()}
        inside = {n for t in self.structure.values() for n in leaves(t)}
        named: dict[str, Any] = {n: t for n, t in remaining.items() if n not in inside}
        named.update(self.constants)
        named.update(nested)
        if not self.variadic or self.variadic not in named:
            return (), named
        rest = named.pop(self.variadic)
        return (*(named.pop(n, None) for n in self.parameters), *rest), named

    def _check_extra(self, name: str, item: Any) -> None:
        if name in self.constants:
            if item is not None and item != self.constants[name]:
                raise InputError(
                    f"input {name!r} was captured as the constant {self.constants[name]!r}, not "
                    f"{item!r}. Capture again with kwargs={{..., {name!r}: {item!r}}}."
                )
        elif item is not None and name in self.reasons:
            raise InputError(
                f"input {name!r} is not taken any more: {self.reasons[name]}. Leave it out, or use "
                "the program before that pass."
            )
        elif item is not None:
            known = ", ".join(f"{n!r}: ..." for n in self.names)
            raise InputError(
                f"input {name!r} was not captured. Captured inputs: {self}. To add it: "
                f"peftfx.capture(model, kwargs={{{known}, {name!r}: <example>}})."
            )

    def _check_sizes(self, bound: Mapping[str, Tensor]) -> None:
        sizes: dict[str, tuple[int, str]] = {}
        for spec in self.inputs:
            tensor = bound[spec.name]
            if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InputError(
                    f"input {spec.name!r} must be a tensor, not {type(tensor).__name__}."
                )
            want = short_type(spec.dtype, spec.shape)
            if tensor.dtype != spec.dtype or tensor.dim() != len(spec.shape):
                got = short_type(tensor.dtype, tuple(tensor.shape))
                raise InputError(f"input {spec.name!r} must be {want}, not {got}.")
            if spec.values is not None:
                _check_values(spec.name, tensor, *spec.values)
            for axis, (size, expected) in enumerate(zip(tensor.shape, spec.shape, strict=True)):
                where = f"input {spec.name!r}, axis {axis}"
                if isinstance(expected, int):
                    if size != expected:
                        raise InputError(
                            f"{where}: size {size}, but it was captured as the fixed size "
                            f"{expected}. {self._remedy(spec.name, axis)}"
                        )
                    continue
                low, high = self.ranges.get(expected, (1, None))
                if size < low or (high is not None and size > high):
                    limit = f"{low}..{'' if high is None else high}"
                    raise InputError(
                        f"{where} ({expected}): size {size} is outside the model's range {limit}"
                        f"{self._because(expected)}."
                    )
                first, owner = sizes.setdefault(expected, (size, spec.name))
                if size != first:
                    raise InputError(
                        f"{where}: {expected} is {size}, but {first} in input {owner!r}."
                    )

        known = {name: size for name, (size, _) in sizes.items()}
        for relation in self.relations:
            if not holds(relation, known):
                raise InputError(
                    f"the sizes {known} break {relation}{self._because(relation)}. Pad the "
                    "inputs, or capture again with an example of this size."
                )

    def _because(self, key: str) -> str:
        return f" ({self.reasons[key]})" if self.reasons.get(key) else ""

    def _remedy(self, name: str, axis: int) -> str:
        why = self.reasons.get(f"{name}.{axis}")
        if why is not None:
            return f"The model allows no other: {why}. Pad or cut to it, or capture again."
        return (
            f"Capture again with dynamic={{{name!r}: {{{axis}: 'size'}}}} if the model allows it."
        )

    @property
    def sizes(self) -> tuple[str, ...]:
        """Names of the dynamic sizes."""
        return tuple(dict.fromkeys(s for i in self.inputs for s in i.shape if isinstance(s, str)))

    def check(self, sizes: Mapping[str, int]) -> None:
        """Refuses anything but one valid value for every dynamic size.

        Raises:
            InputError: a size is missing, unknown, no positive integer or out of range.
        """
        listed = f"Dynamic sizes: {', '.join(self.sizes) or 'none'} ({self})."
        for name, size in sizes.items():
            if name not in self.sizes:
                raise InputError(f"the program has no dynamic size {name!r}. {listed}")
            if type(size) is not int or size < 1:
                raise InputError(f"size {name} must be a positive integer, not {size!r}.")
        if missing := [n for n in self.sizes if n not in sizes]:
            raise InputError(f"the size {missing[0]!r} is not given. {listed}")
        with torch.device("meta"):
            self._check_sizes(self.example(None, **sizes))

    def example(self, generator: torch.Generator | None = None, **sizes: int) -> dict[str, Tensor]:
        """Builds valid inputs: filled with `fill`, or random below it with a generator."""
        example: dict[str, Tensor] = {}
        for spec in self.inputs:
            dims = [s if isinstance(s, int) else self._size(s, sizes) for s in spec.shape]
            if generator is None or spec.dtype == torch.bool:
                example[spec.name] = spec.full(dims)
            elif spec.dtype.is_floating_point:
                example[spec.name] = torch.randn(dims, generator=generator).to(spec.dtype)
            elif spec.fill <= 1:
                example[spec.name] = spec.full(dims)
            else:
                example[spec.name] = torch.randint(
                    0, int(spec.fill) + 1, dims, generator=generator, dtype=spec.dtype
                )
        return example

    def _size(self, name: str, sizes: Mapping[str, int]) -> int:
        if name in sizes:
            return sizes[name]
        low, high = self.ranges.get(name, (1, None))
        default = 2 if axis_of(name, self.kinds).kind == "batch" else 8
        return max(low, min(default, high) if high is not None else default)

    def resize(self, example: Mapping[str, Tensor], **sizes: int) -> dict[str, Tensor]:
        """Repeats or cuts example inputs along their dynamic axes to the given sizes."""
        resized: dict[str, Tensor] = {}
        for spec in self.inputs:
            tensor = example[spec.name]
            for axis, name in enumerate(spec.shape):
                if isinstance(name, str) and name in sizes:
                    index = torch.arange(sizes[name], device=tensor.device) % tensor.shape[axis]
                    tensor = tensor.index_select(axis, index)
            resized[spec.name] = tensor
        return resized

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """The argument of `torch.export.export` that declares the dynamic axes."""
        auto = torch.export.Dim.AUTO
        return {
            i.name: {axis: auto for axis, s in enumerate(i.shape) if isinstance(s, str)}
            for i in self.inputs
        }

    def to_json(self) -> dict[str, Any]:
        """A JSON form that `specfile.read_spec` reads back."""
        return {
            "inputs": [
                {
                    "name": i.name,
                    "shape": list(i.shape),
                    "dtype": str(i.dtype)[6:],
                    "fill": i.fill,
                    "optional": i.optional,
                }
                | ({} if i.values is None else {"values": list(i.values)})
                | ({} if i.start is None else {"start": list(i.start)})
                | ({} if i.absent is None else {"absent": [i.absent.first, i.absent.axis]})
                | ({"needed": i.needed} if i.needed else {})
                for i in self.inputs
            ],
            "ranges": {k: list(v) for k, v in self.ranges.items()},
            "parameters": list(self.parameters),
            "constants": dict(self.constants),
            "structure": dict(self.structure),
            "variadic": self.variadic,
            "relations": list(self.relations),
            "reasons": dict(self.reasons),
        } | ({"kinds": dict(self.kinds)} if self.kinds else {})


def _check_values(name: str, tensor: Tensor, low: int, high: int) -> None:
    if tensor.is_meta or not tensor.numel():
        return
    ends = int(tensor.min()), int(tensor.max())
    if ends[0] < low or ends[1] > high:
        wrong = ends[0] if ends[0] < low else ends[1]
        raise InputError(f"input {name!r} holds {wrong}; it takes {low} to {high}.")


def short_type(dtype: torch.dtype, shape: Sequence[object]) -> str:
    """`i64[batch, sequence]`: dtype and shape the way graph text shows them."""
    name = str(dtype)[6:]
    for long, brief in (("bfloat", "bf"), ("float", "f"), ("int", "i"), ("bool", "b1")):
        name = name.replace(long, brief) if name.startswith(long) else name
    return f"{name}[{', '.join(str(s) for s in shape)}]"


def forward_parameters(forward: Any) -> tuple[tuple[str, ...], str]:
    """The names `forward` takes, in order, and the name of its `*args` ('' without)."""
    names: list[str] = []
    variadic = ""
    for parameter in inspect.signature(forward).parameters.values():
        if parameter.kind == parameter.VAR_POSITIONAL:
            variadic = parameter.name
        elif parameter.kind != parameter.VAR_KEYWORD:
            names.append(parameter.name)
    return tuple(names), variadic


def named_arguments(
    parameters: Sequence[str], variadic: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """A call's arguments by name; surplus positional ones are a tuple under `variadic`.

    Raises:
        TypeError: too many positional arguments, or one given twice.
    """
    given: dict[str, Any] = dict(zip(parameters, args, strict=False))
    if len(args) > len(parameters):
        if not variadic:
            raise TypeError(
                f"{len(args)} positional inputs given, but forward takes {len(parameters)}: "
                f"{', '.join(parameters)}"
            )
        given[variadic] = tuple(args[len(parameters) :])
    for name, item in kwargs.items():
        if name in given:
            raise TypeError(f"input {name!r} is given twice (by position and by keyword)")
        given[name] = item
    return given
