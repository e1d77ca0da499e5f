"""A captured graph as strict JSON and back: nodes, fake values, mode modules, output structure.

Nothing in a file is executed: operators are those that compute tensors (`operators.py`), or of the
model's own package, or in a short list of functions; modules are the mode modules with their
constructor's values, structures name no code (`structure.py`), and paths must look like paths.
What cannot be written so is a ValueError, and the graph is not stored.
"""

from __future__ import annotations

import base64
import inspect
import keyword
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from ..graph import modes
from ..graph.aten import attribute, set_attribute
from ..graph.module import CapturedModule
from ..graph.symbols import Symbols, symbols_in, write_environment
from ..graph.turns import alone
from ..program import sites
from ..tracing.propagate import fake_mode
from .operators import find_operator, require_pure
from .structure import read_structure

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{n}": getattr(operator, n) for n in (
        "getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pow", "eq", "ne",
        "lt", "le", "gt", "ge", "and_", "or_", "not_")},
    **{f"math.{n}": getattr(math, n) for n in ("ceil", "floor", "trunc")},
    **{f"torch.{n}": getattr(torch, n) for n in (
        "sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_sqrt", "sym_ite")
       if hasattr(torch, n)},
}  # fmt: skip
_NAMES: dict[Any, str] = {f: n for n, f in FUNCTIONS.items()}
_PATH = re.compile(r"[\w-]+(\.[\w-]+)*")
_NODE = re.compile(r"[A-Za-z_]\w*")
CONSTANT_LIMIT = 2**20
"""Largest tensor constant that is written, in bytes."""

_STEADY = "steady"
_MODULES: dict[str, type[nn.Module]] = {
    c.__name__: c for c in vars(modes).values()
    if isinstance(c, type) and issubclass(c, modes.Switch) and c is not modes.Switch
}  # fmt: skip
_SITES: dict[str, type[Any]] = {
    c.__name__: c for c in vars(sites).values() if isinstance(c, type) and is_dataclass(c)
}
_TYPES: dict[str, Any] = {str(t): t for t in vars(torch).values()
          if isinstance(t, torch.dtype | torch.layout | torch.memory_format)}  # fmt: skip


# Values: arguments of nodes, and the fields of sites.


def encode(item: Any, index: Mapping[Node, int]) -> Any:
    """One argument as JSON; anything that is not itself in JSON is a list with a tag."""
    match item:
        case None | bool() | int() | str():
            return item
        case float():
            return item if math.isfinite(item) else ["float", repr(item)]
        case Node():
            return ["node", index[item]]
        case list():
            return ["list", *(encode(i, index) for i in item)]  # pyright: ignore[reportUnknownVariableType]
        case tuple():
            return ["tuple", *(encode(i, index) for i in item)]  # pyright: ignore[reportUnknownVariableType]
        case slice():
            return ["slice", *(encode(i, index) for i in (item.start, item.stop, item.step))]
        case dict():
            return ["dict", *([encode(k, index), encode(v, index)] for k, v in item.items())]  # pyright: ignore[reportUnknownVariableType]
        case torch.dtype() | torch.layout() | torch.memory_format():
            return ["torch", str(item)]
        case torch.device():
            return ["device", str(item)]
        case _ if type(item).__name__ in _SITES:
            attributes = {f.name: encode(getattr(item, f.name), index) for f in fields(item)}
            return ["site", type(item).__name__, attributes]
        case _:
            raise ValueError(f"an argument is a {type(item).__name__}")


def decode(item: Any, nodes: list[Node]) -> Any:
    """Reads `encode`'s form."""
    if not isinstance(item, list):
        return item
    tag, rest = item[0], item[1:]  # pyright: ignore[reportUnknownVariableType]
    match tag:
        case "node":
            return nodes[rest[0]]
        case "list":
            return [decode(i, nodes) for i in rest]
        case "tuple":
            return tuple(decode(i, nodes) for i in rest)
        case "slice":
            return slice(*(decode(i, nodes) for i in rest))
        case "dict":
            return {decode(k, nodes): decode(v, nodes) for k, v in rest}
        case "float":
            return float(rest[0])
        case "torch":
            return _TYPES[rest[0]]
        case "device":
            return torch.device(rest[0])
        case "site":
            return _SITES[rest[0]](**{k: decode(v, nodes) for k, v in rest[1].items()})
        case _:
            raise ValueError(f"unknown tag {tag!r}")


def _write_target(node: Node, packages: frozenset[str]) -> str:
    target = node.target
    if isinstance(target, str):
        pattern = _NODE if node.op in ("placeholder", "output", "call_method") else _PATH
        if node.op == "call_method" or not pattern.fullmatch(target):
            raise ValueError(f"{node.op} of {target!r}")
        return target
    if isinstance(target, torch._ops.OpOverload):
        require_pure(target, packages)
        return str(target)
    if target in _NAMES:
        return _NAMES[target]
    raise ValueError(f"a call of {target}")


def _read_target(op: str, text: str, packages: frozenset[str]) -> Any:
    if op != "call_function":
        pattern = _NODE if op in ("placeholder", "output") else _PATH
        if op not in ("placeholder", "output", "get_attr", "call_module") or (
            not pattern.fullmatch(text) or keyword.iskeyword(text)
        ):
            raise ValueError(f"{op} of {text!r}")
        return text
    if text in FUNCTIONS:
        return FUNCTIONS[text]
    return find_operator(text, packages)


# Fake values.


def _size(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


def _write_value(val: Any, table: dict[str, list[Any]]) -> Any:
    match val:
        case None | bool() | int() | float() | str():
            return val
        case Tensor():
            sizes, strides = [_size(s) for s in val.shape], [_size(s) for s in val.stride()]
            described: list[Any] = [str(val.dtype), str(val.device), sizes, strides]
            key = repr(described)
            table.setdefault(key, described)
            return ["tensor", list(table).index(key)]
        case torch.SymInt():
            return ["size", str(val)]
        case list() | tuple():
            return [type(val).__name__, *(_write_value(v, table) for v in val)]  # pyright: ignore[reportUnknownVariableType]
        case _:
            raise ValueError(f"a value is a {type(val).__name__}")


def _read_value(val: Any, table: list[Any], symbols: Symbols) -> Any:
    if not isinstance(val, list):
        return val
    tag, rest = val[0], val[1:]  # pyright: ignore[reportUnknownVariableType]
    if tag == "tensor":
        dtype, device, sizes, strides = table[rest[0]]
        return symbols.tensor(str(rest[0]), _TYPES[dtype], device, sizes, strides)
    if tag == "size":
        return symbols.expression(rest[0])
    items = [_read_value(v, table, symbols) for v in rest]
    return tuple(items) if tag == "tuple" else items


# Modules, constants, graphs.


def _write_module(module: nn.Module, packages: frozenset[str]) -> list[Any]:
    kind = type(module)
    if isinstance(module, modes.TrainingOnly) and module.region is not None:
        region = ["region", *_write_region(module.region, packages)]
        return [kind.__name__, {"region": region} | _steady(module)]
    if _MODULES.get(kind.__name__) is not kind or list(module.state_dict()):
        raise ValueError(f"the module {kind.__name__} has no written form")
    wanted = inspect.signature(kind).parameters.values()
    names = [p.name for p in wanted if p.kind is p.POSITIONAL_OR_KEYWORD]
    return [kind.__name__, {n: encode(getattr(module, n), {}) for n in names} | _steady(module)]


def _steady(module: nn.Module) -> dict[str, bool]:
    """The mode in which a switch stays, if it does."""
    steady = module.steady if isinstance(module, modes.Switch) else None
    return {} if steady is None else {_STEADY: steady}


def _write_region(region: GraphModule, packages: frozenset[str]) -> tuple[list[Any], Any]:
    """The nodes and modules of a graph without stored tensors of its own."""
    index = {n: i for i, n in enumerate(region.graph.nodes)}
    if any(n.op == "get_attr" for n in index):
        raise ValueError("a region that runs in training only holds a tensor of its own")
    nodes = [
        [n.op, n.name, _write_target(n, packages), encode(tuple(n.args), index),
         encode(dict(n.kwargs), index)]
        for n in index
    ]  # fmt: skip
    called = (str(n.target) for n in index if n.op == "call_module")
    return nodes, {t: _write_module(region.get_submodule(t), packages) for t in called}


def _read_module(kind: str, options: Mapping[str, Any], packages: frozenset[str]) -> nn.Module:
    module = _read_plain(kind, {k: v for k, v in options.items() if k != _STEADY}, packages)
    steady = options.get(_STEADY)
    if isinstance(module, modes.Switch) and isinstance(steady, bool):
        module.steady = steady
    return module


def _read_plain(kind: str, options: Mapping[str, Any], packages: frozenset[str]) -> nn.Module:
    region = options.get("region")
    if kind != modes.TrainingOnly.__name__ or region is None:
        return _MODULES[kind](**{k: decode(v, []) for k, v in options.items()})
    _, nodes, tensors = region
    root, graph, nodes_read = nn.Module(), Graph(), list[Node]()
    for path, (inner, values) in tensors.items():
        if not _NODE.fullmatch(path):
            raise ValueError(f"the module {path!r} has no name")
        root.add_module(path, _read_module(inner, values, packages))
    for op, title, text, args, kwargs in nodes:
        target = _read_target(op, text, packages)
        nodes_read.append(
            graph.create_node(
                op, target, decode(args, nodes_read), decode(kwargs, nodes_read), title
            )
        )
    return modes.TrainingOnly(GraphModule(root, graph))


def _write_constant(tensor: Any) -> list[Any]:
    if not isinstance(tensor, Tensor) or tensor.is_meta or isinstance(tensor, nn.Parameter):
        raise ValueError("a constant is not a tensor with values")
    if tensor.nbytes > CONSTANT_LIMIT:
        raise ValueError(f"a constant has {tensor.nbytes} bytes")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return [str(tensor.dtype), list(tensor.shape), base64.b64encode(data).decode()]


def _read_constant(dtype: str, sizes: list[int], data: str) -> Tensor:
    raw = bytearray(base64.b64decode(data, validate=True))
    if not raw:
        if 0 not in sizes:
            raise ValueError(f"a constant of shape {sizes} has no bytes")
        return torch.empty(sizes, dtype=_TYPES[dtype])
    return torch.frombuffer(raw, dtype=torch.uint8).view(_TYPES[dtype]).view(sizes)


@alone()
def write_graph(gm: GraphModule, state: frozenset[str], packages: frozenset[str]) -> dict[str, Any]:
    """A captured graph as JSON.

    Args:
        gm: the graph, in canonical form.
        state: names of the model's own parameters and buffers, which are not written.
        packages: libraries whose operators may be called beside ATen's.

    Raises:
        ValueError: it holds something that has no written form.
    """
    mode = fake_mode(gm)
    codegen = gm.graph._codegen
    if mode is None or type(codegen) is not _PyTreeCodeGen:
        raise ValueError("the graph has no recorded values or structure")
    info: Any = codegen.pytree_info
    index = {n: i for i, n in enumerate(gm.graph.nodes)}
    values: dict[str, list[Any]] = {}
    traces: dict[str, int] = {}
    stacks: dict[str, tuple[int, Any]] = {}
    nodes: list[Any] = []
    modules: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for node in gm.graph.nodes:
        target = _write_target(node, packages)
        if node.op == "call_module":
            modules[target] = _write_module(gm.get_submodule(target), packages)
        elif node.op == "get_attr" and target not in state:
            constants[target] = _write_constant(attribute(gm, target))
        trace = "\n".join(str(node.meta.get("stack_trace") or "").splitlines()[-2:])
        stack = [[k, list(v)] for k, v in (node.meta.get("nn_module_stack") or {}).items()]
        nodes.append([
            node.op, node.name, target, encode(tuple(node.args), index),
            encode(dict(node.kwargs), index), _write_value(node.meta.get("val"), values),
            traces.setdefault(trace, len(traces)),
            stacks.setdefault(repr(stack), (len(stacks), stack))[0],
        ])  # fmt: skip
    return {
        "nodes": nodes, "values": list(values.values()), "traces": list(traces),
        "stacks": [s for _, s in stacks.values()], "modules": modules, "constants": constants,
        "environment": write_environment(
            mode.shape_env, symbols_in(n.meta.get("val") for n in gm.graph.nodes)
        ),
        "inputs": [list(info.orig_args), pytree.treespec_dumps(info.in_spec)],
        "output": pytree.treespec_dumps(info.out_spec),
    }  # fmt: skip


@alone()
def read_graph(
    data: Mapping[str, Any], state: Mapping[str, tuple[Tensor, bool]], packages: frozenset[str],
    name: str, classes: Collection[str],
) -> CapturedModule:  # fmt: skip
    """Builds a graph that `write_graph` wrote, over a model's own tensors.

    Args:
        data: its JSON.
        state: the model's parameters and buffers; True marks those in its state dict.
        packages: as when writing.
        name: class name of the result.
        classes: of outputs, which may be in it beside tuples, lists and dicts.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: it is malformed.
    """
    symbols = Symbols(data["environment"])
    root = _read_modules(data["modules"], packages)
    graph = Graph()
    nodes: list[Node] = []
    for op, title, text, args, kwargs, val, trace, stack in data["nodes"]:
        target = _read_target(op, text, packages)
        if op == "get_attr":
            tensor, persistent = _stored(target, data["constants"], state)
            set_attribute(root, target, tensor, not persistent)
        operands, named = decode(args, nodes), decode(kwargs, nodes)
        if not isinstance(operands, tuple) or not isinstance(named, dict):
            raise TypeError(f"the arguments of the node {title} are no arguments")
        node = graph.create_node(op, target, operands, named, title)
        if node.name != title:
            raise ValueError(f"the node {title} cannot be made again")
        if op != "output":
            node.meta["val"] = _read_value(val, data["values"], symbols)
        if data["traces"][trace]:
            node.meta["stack_trace"] = data["traces"][trace]
        if data["stacks"][stack]:
            node.meta["nn_module_stack"] = {k: tuple(v) for k, v in data["stacks"][stack]}
        nodes.append(node)
    graph.set_codegen(_read_codegen(data, classes))
    return CapturedModule(root, graph, class_name=name)


def _read_modules(modules: Mapping[str, Any], packages: frozenset[str]) -> nn.Module:
    """A tree of the graph's modules, plain ones where only their children are known."""
    root = nn.Module()
    for path, (kind, options) in modules.items():
        module = _read_module(kind, options, packages)
        *parents, leaf = path.split(".")
        owner = root
        for part in parents:
            child = owner._modules.get(part)
            if child is None:
                child = nn.Module()
                owner.add_module(part, child)
            owner = child
        owner.add_module(leaf, module)
    return root


def _stored(
    target: str, constants: Mapping[str, Any], state: Mapping[str, tuple[Tensor, bool]]
) -> tuple[Tensor, bool]:
    """A tensor of the model or, if it has none of the name, of the file."""
    if target in state:
        return state[target]
    return _read_constant(*constants[target]), True


def _read_codegen(data: Mapping[str, Any], classes: Collection[str]) -> _PyTreeCodeGen:
    names, structure = data["inputs"]
    if not all(_NODE.fullmatch(n) and not keyword.iskeyword(n) for n in names):
        raise ValueError("an input's name is not a name")
    output = read_structure(data["output"], classes)
    return _PyTreeCodeGen(_PyTreeInfo([str(n) for n in names], read_structure(structure), output))
