"""From a program to an ONNX graph in memory: export again, translate, say what stands in the way.

`torch.onnx` reports a missing operator in the innermost of several errors, and never the model's
line; `translate` names both.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...rewriter.api import Program
from ...rewriter.errors import ExportError
from ...rewriter.graph.aten import value
from ...rewriter.program.state import BRANCHES

_TORCH = str(PurePath(torch.__file__).parent)

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')

_NARRATORS = ("torch.onnx", "torch._subclasses.fake_tensor", "onnxscript", "onnx_ir")

_WAYS_OUT = {
    "grouped_mm": "If these are experts of transformers, set config._experts_implementation = "
    "'batched_mm' and capture again.",
    "complex": "ONNX has no complex numbers: write it with real ones (a rotation as cos and sin of "
    "pairs).",
    BRANCHES: "A pass computes it: fold or bake the adapter first.",
}
"""What to do, by a word in the operator's name, the reason or the module's path."""


@dataclass(frozen=True)
class Exported:
    """A program as `torch.export` has it.

    Attributes:
        program: the exported program.
        symbols: its symbols for dynamic sizes -> their names in the program's spec.
    """

    program: Any
    symbols: Mapping[str, str]

    @property
    def nodes(self) -> list[Node]:
        """The graph's nodes in order."""
        return list(self.program.graph.nodes)


def reexport(program: Program, example: Mapping[str, Tensor]) -> Exported:
    """Exports a program's graph, branches written as operators, in evaluation mode.

    Raises:
        ExportError: torch.export refuses it.
    """
    shapes = program.spec.dynamic_shapes()
    try:
        exported: Any = torch.export.export(
            program.module, (), dict(example), dynamic_shapes=shapes, strict=False
        )
    except Exception as error:
        reason, line = str(error).strip().splitlines() or [""], line_of(str(error))
        place = f" (at {line})" if line else ""
        raise ExportError(f"re-export fails: {type(error).__name__}: {reason[0]}{place}") from error
    symbols: dict[str, str] = {}
    values = {n.name: n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"}
    for spec in program.spec.inputs:
        given = values.get(spec.name)
        sizes: tuple[Any, ...] = tuple(given.shape) if given is not None else ()
        for size, label in zip(sizes, spec.shape, strict=False):
            if isinstance(label, str) and not isinstance(size, int):
                symbols[str(size)] = label
    return Exported(exported, symbols)


def translate(
    exported: Exported, opset: int, inputs: Sequence[str], outputs: Sequence[str], table: Any
) -> Any:
    """The ONNX graph (`onnx_ir.Model`), not optimised, so that stored tensors keep their names.

    Raises:
        ExportError: an operator has no translation (the message names it, the model's line and
            the way out), or another operator set came out than was asked for.
    """
    try:
        result: Any = torch.onnx.export(
            exported.program,
            (),
            None,
            dynamo=True,
            verbose=False,
            optimize=False,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            custom_translation_table=table or None,
        )
    except Exception as error:
        raise ExportError(_explained(error, exported)) from error
    model = result.model
    written = model.opset_imports.get("")
    if written != opset:
        raise ExportError(
            f"it cannot be written: torch.onnx could not convert its operators and left opset "
            f"{written}. Ask for one between 18 and 26, or for none."
        )
    return model


def _explained(error: BaseException, exported: Exported) -> str:
    """One line: the operator, where in the model it stands, why, and what to do."""
    errors = list(_causes(error))
    texts = [str(e) for e in errors]
    reason = next((line for line in texts[-1].splitlines() if line.strip()), type(error).__name__)
    at = re.compile(r"translating node %(\S+) : .*?target=(?:torch\.ops\.)?([^\]]+)\]", re.DOTALL)
    match = next((m for t in reversed(texts) if (m := at.search(t))), None)
    if match is None:
        return f"translation fails: {type(errors[-1]).__name__}: {reason}"
    name, operator = match[1], match[2].strip()
    node = _origin(exported.nodes, name, operator, "complex" in reason)
    if node is not None:
        operator = _name_of(node)
    line = model_line(node) if node is not None else ""
    path = str(node.meta.get("nn_module_stack", "")) if node is not None else ""
    ways = [w for word, w in _WAYS_OUT.items() if word in f"{operator} {reason} {path}"]
    ways = ways or ["Write that line with operators that have one."]
    place = f" ({line})" if line else ""
    return f"{operator}{place} has no ONNX translation: {reason} {' '.join(ways)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _origin(nodes: Sequence[Node], name: str, operator: str, is_complex: bool) -> Node | None:
    """The node of the model that a node of the decomposed graph comes from, as far as its name
    and operator say; of complex values, the first one that the model computes."""
    calls = [n for n in nodes if n.op == "call_function"]
    if is_complex:
        complex_calls = [n for n in calls if isinstance(value(n), Tensor) and value(n).is_complex()]
        return complex_calls[0] if complex_calls else None
    same = [n for n in calls if _name_of(n) == operator]
    return next((n for n in same if n.name == name), same[0] if same else None)


def _name_of(node: Node) -> str:
    return str(node.target)


def model_line(node: Node) -> str:
    """`file.py:line` of the innermost line outside of torch that a node comes from, or ''."""
    return line_of(str(node.meta.get("stack_trace") or ""))


def line_of(trace: str) -> str:
    """`file.py:line` of the innermost frame outside of torch in a stack trace, or ''."""
    frames = [f for f in _FRAME.findall(trace) if not f[0].startswith(_TORCH)]
    return f"{PurePath(frames[-1][0]).name}:{frames[-1][1]}" if frames else ""


@contextlib.contextmanager
def silence() -> Generator[None]:
    """torch.onnx narrates; what matters comes back as errors."""
    loggers = [logging.getLogger(n) for n in _NARRATORS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def rename_sizes(model: Any, symbols: Mapping[str, str]) -> None:
    """Calls the dynamic sizes in a `ModelProto` what the program's spec calls them."""
    graph = model.graph
    for info in (*graph.input, *graph.output, *graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(
                    r"\bs\d+\b", lambda m: symbols.get(m[0], m[0]), dim.dim_param
                )
