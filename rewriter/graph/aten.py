"""The one file that knows ATen: operator classes and typed access to `torch.fx`.

Operators are grouped by what a dataflow walk may do with them (look through a view, stop at a
linear), never by what a model calls them.
"""

from __future__ import annotations

import keyword
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx import graph as fx_graph
from torch.utils import _pytree as pytree

ATEN: Any = torch.ops.aten

Target = Callable[..., Any] | str


def _format_target(base: str, target: str) -> str:
    """The code that reads a path, where torch's own is none: children may be called `in`, `class`
    or, in letters that Python takes for others, `ﬁrst`."""
    code = base
    for part in target.split("."):
        plain = part.isidentifier() and part.isascii() and not keyword.iskeyword(part)
        code = f"{code}.{part}" if plain else f"getattr({code}, {part!r})"
    return code


# Of all graphs, as torch.export makes some of its own on the way; else such code does not compile.
fx_graph._format_target = _format_target


def overloads(*names: str) -> frozenset[Any]:
    """All overloads of the named ATen operators, and of their in-place twins (`name_`)."""
    packets: set[Any] = set()
    for name in (*names, *(f"{n}_" for n in names)):
        packet = getattr(ATEN, name, None)  # not all torch versions have all
        if packet is not None:
            packets |= {getattr(packet, o) for o in packet.overloads()}
    return frozenset(packets)


CASTS = overloads("to", "_to_copy", "type_as", "float", "half")
VIEWS = CASTS | overloads(
    "view", "reshape", "transpose", "permute", "contiguous", "unsqueeze", "squeeze", "expand",
    "flatten", "unflatten", "t", "clone", "alias", "detach", "detach_", "lift_fresh_copy",
    "swapaxes", "movedim", "repeat_interleave", "roll", "constant_pad_nd", "pad", "repeat",
    "expand_as", "_unsafe_view", "view_as", "reshape_as", "rot90", "flip", "view_as_complex",
    "view_as_real", "broadcast_to", "numpy_T", "mT",
)  # fmt: skip
SLICES = overloads(
    "select", "slice", "split", "split_with_sizes", "chunk", "unbind", "narrow", "tensor_split"
) | {operator.getitem}
DROPOUTS = overloads("dropout", "dropout_", "native_dropout", "alpha_dropout", "feature_dropout")
ARITHMETIC = overloads(
    "mul", "mul_", "div", "div_", "neg", "cat", "stack", "add", "add_", "sub", "rsub"
)
ADDS = overloads("add", "add_")
MULS = overloads("mul", "mul_", "div", "div_")
NORMS = overloads("layer_norm", "rms_norm", "group_norm", "native_layer_norm", "batch_norm")
NORM_PARTS = NORMS | overloads(
    "pow", "mean", "rsqrt", "sqrt", "reciprocal", "norm", "linalg_vector_norm", "clamp",
    "clamp_min", "square",
)  # fmt: skip
ACTIVATIONS = overloads(
    "gelu", "relu", "relu_", "silu", "silu_", "tanh", "sigmoid", "softplus", "elu", "leaky_relu",
    "hardswish", "mish", "relu6", "hardtanh", "glu", "selu", "hardsigmoid", "log_sigmoid", "erf",
)  # fmt: skip
POINTWISE = overloads(
    "abs", "exp", "log", "log1p", "erf", "clamp", "clamp_min", "clamp_max", "minimum", "maximum",
    "where", "masked_fill", "masked_fill_",
)  # fmt: skip
GATHERS = overloads("index", "index_select", "gather")
TOP = overloads("topk", "max", "argmax", "sort", "argsort")
CONVS = overloads(
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d",
)  # fmt: skip
TRANSPOSED_CONVS = overloads("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
SDPA = ATEN.scaled_dot_product_attention.default
SOFTMAX = overloads("softmax", "_softmax", "_safe_softmax")
MATMULS = frozenset({ATEN.matmul.default, ATEN.bmm.default, ATEN.mm.default, ATEN.baddbmm.default})
SIZES = overloads("sym_size", "sym_numel", "sym_stride")
EMBEDDING = ATEN.embedding.default
LINEAR = ATEN.linear.default

RANDOM = DROPOUTS | {SDPA}


def is_op(node: object, targets: frozenset[Any] | object) -> bool:
    """Whether `node` calls one of `targets` (a set of operators or one operator)."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    return node.target in targets if isinstance(targets, frozenset) else node.target is targets


def submodule(gm: GraphModule, node: object) -> nn.Module | None:
    """The module that a `call_module` node calls, else None."""
    if isinstance(node, Node) and node.op == "call_module":
        return gm.get_submodule(str(node.target))
    return None


def attribute(gm: nn.Module, path: str) -> Any:
    """The object at a dotted path below `gm`."""
    owner: Any = gm
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


def set_attribute(gm: nn.Module, path: str, value: Any, transient: bool = True) -> None:
    """Registers a parameter or buffer at a dotted path, making parents.

    A new buffer is left out of the state dict if `transient`; anything else becomes a plain
    attribute.
    """
    *parents, leaf = path.split(".")
    owner: nn.Module = gm
    for part in parents:
        child = getattr(owner, part, None)
        if not isinstance(child, nn.Module):
            child = nn.Module()
            owner.add_module(part, child)
        owner = child
    if isinstance(value, nn.Parameter):
        owner._buffers.pop(leaf, None)
        owner.register_parameter(leaf, value)
    elif not isinstance(value, Tensor):
        setattr(owner, leaf, value)
    elif leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        owner._parameters.pop(leaf, None)
        owner.register_buffer(leaf, value, persistent=not transient)


def value(node: object) -> Any:
    """The fake value recorded for a node (None where there is none)."""
    return node.meta.get("val") if isinstance(node, Node) else None


def outdate(node: Node) -> None:
    """Lets `propagate` compute a node's value again, and compare it with what its readers saw."""
    if "val" in node.meta:
        node.meta["previous"] = node.meta.pop("val")


def alike(one: Any, other: Any) -> bool:
    """Whether two fake values have the same structure, dtypes and sizes."""
    if one is other:
        return True
    a, b = pytree.tree_leaves(one), pytree.tree_leaves(other)
    return len(a) == len(b) and all(map(_alike, a, b))


def _alike(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        same = x.dtype == y.dtype and x.dim() == y.dim()
        return same and all(map(_alike, x.shape, y.shape))
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        return False
    if isinstance(x, torch.SymInt) and isinstance(y, torch.SymInt):
        return x.node.expr == y.node.expr
    return str(x) == str(y)


def shape(node: object) -> tuple[Any, ...] | None:
    """The (possibly symbolic) shape of a node's tensor value."""
    val = value(node)
    return tuple(val.shape) if isinstance(val, Tensor) else None


def is_float(node: object) -> bool:
    """Whether a node's value is a floating-point tensor."""
    val = value(node)
    return isinstance(val, Tensor) and val.is_floating_point()


def is_index(node: object) -> bool:
    """Whether a node's value is a tensor of integers or booleans, or a size."""
    val = value(node)
    if isinstance(val, Tensor):
        return not (val.is_floating_point() or val.is_complex())
    return isinstance(val, int | torch.SymInt)


def operands(node: Node) -> tuple[Any, ...]:
    """The positional arguments of a node, untyped as fx has them."""
    return node.args


def named_arguments(node: Node) -> dict[str, Any]:
    """A call's given arguments by the names in the operator's schema."""
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else []
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def inputs(node: Node) -> list[Node]:
    """The nodes that `node` reads, in argument order."""
    return list(node.all_input_nodes)


def users(node: Node) -> list[Node]:
    """The nodes that read `node`'s value, without those that only ask for its size."""
    return [u for u in node.users if not is_op(u, SIZES)]


def source_line(node: Node) -> str:
    """`file.py:line` of the user's code that a node comes from, or an empty string."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in str(trace).splitlines() if line.strip().startswith("File ")]
    if not lines:
        return ""
    name, _, rest = lines[-1].partition('", line ')
    file = name.rpartition("/")[2].removeprefix('File "')
    return f"{file}:{rest.partition(',')[0]}"


def expression_of(node: object) -> str | None:
    """The stored tensor's path if `node` is an expression that computes it afresh."""
    return node.meta.get("expression") if isinstance(node, Node) else None


def dense_of(node: object) -> str | None:
    """The stored tensor's path if `node` is that tensor, computed from parts that a format has."""
    return node.meta.get("dense") if isinstance(node, Node) else None


def expressed(node: Node) -> list[Node]:
    """The expressions of the stored tensor that a node gives: calls, or entries of a call that
    computes several tensors at once."""
    values: list[Node] = []
    for user in users(node):
        if expression_of(user) is not None:
            values.append(user)
        elif "expressions" in user.meta:
            values += [e for e in users(user) if user.args[entry_of(e)] is node]
    return values


def entry_of(node: Node) -> int:
    """Which of several values a `getitem` gives."""
    place: Any = node.args[1]
    return place


def parameter_of(node: object, depth: int = 6) -> tuple[str, tuple[Node, ...]] | None:
    """Follows views, casts and slices from `node` to a stored tensor: its path and the ops.

    An expression of a stored tensor counts as that tensor, and so does one computed from parts.
    """
    steps: list[Node] = []
    while isinstance(node, Node) and depth:
        path = expression_of(node) or dense_of(node)
        path = str(node.target) if node.op == "get_attr" else path
        if path is not None:
            return path, tuple(reversed(steps))
        if not (is_op(node, VIEWS) or is_op(node, SLICES)):
            return None
        steps.append(node)
        node = node.args[0]
        depth -= 1
    return None


def strip(node: Node, through: frozenset[Any]) -> Node:
    """Walks up through single-input ops in `through`, and into no stored tensor."""
    while is_op(node, through) and isinstance(node.args[0], Node) and dense_of(node) is None:
        node = node.args[0]
    return node


def reaches(start: Node, stop: Callable[[Node], bool], block: Callable[[Node], bool]) -> list[Node]:
    """Nodes satisfying `stop` found by walking forward from `start`, not through `block`."""
    nodes: list[Node] = []
    seen: set[Node] = set()
    stack = [start]
    while stack:
        node = stack.pop()
        for user in users(node):
            if user in seen:
                continue
            seen.add(user)
            if stop(user):
                nodes.append(user)
            elif not block(user):
                stack.append(user)
    return nodes


def ancestors(node: Node, block: Callable[[Node], bool] | None = None) -> Iterator[Node]:
    """`node` and everything it is computed from, not walking through `block`."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        yield current
        if block is None or not block(current):
            stack.extend(inputs(current))


def placeholders(gm: GraphModule) -> dict[str, Node]:
    """The graph's inputs by name."""
    return {str(n.target): n for n in gm.graph.nodes if n.op == "placeholder"}


def output_node(gm: GraphModule) -> Node:
    """The graph's output node."""
    return next(n for n in reversed(gm.graph.nodes) if n.op == "output")


def written(node: Node) -> Node | None:
    """The tensor (looking through views of it) that an in-place operation writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable or not node.args:
        return None
    target = node.args[0]
    while isinstance(target, Node) and (is_op(target, VIEWS) or is_op(target, SLICES)):
        target = target.args[0]
    return target if isinstance(target, Node) else None


def updates_stored(node: Node) -> bool:
    """Whether a node writes a stored tensor in place."""
    target = written(node)
    return target is not None and target.op == "get_attr"


def _writes_to_live(node: Node) -> bool:
    """Whether an in-place operation without users still shows in another node's value."""
    target = written(node)
    if target is None:
        return False
    stack = [target]
    while stack:
        current = stack.pop()
        if current.op in ("get_attr", "placeholder"):
            return True
        for user in users(current):
            if is_op(user, VIEWS) or is_op(user, SLICES):
                stack.append(user)
            elif user is not node and (user.users or written(user) is None):
                return True
    return False


def erase_dead(gm: GraphModule) -> int:
    """Removes nodes without users, also random ones; mode modules that update state stay."""
    erased = 0
    for node in reversed(list(gm.graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        module = submodule(gm, node)
        if module is not None and getattr(module, "updates_state", False):
            continue
        if _writes_to_live(node):
            continue
        gm.graph.erase_node(node)
        erased += 1
    return erased
