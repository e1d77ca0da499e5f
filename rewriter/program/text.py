"""Graph text: stable, readable, one line a node; and the diff of two programs.

Text shows original parameter names, named sizes and what trains, and hides what a reader never
asks for (stored-tensor nodes, size queries become names where they are inputs' sizes).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..graph.aten import attribute, submodule, value
from ..graph.stored_call import Lookup, StoredCall, Unpacked
from ..inputs.spec import short_type
from .state import State


def _symbol(size: object, symbols: dict[str, str]) -> str:
    text = str(size)
    if text in symbols:
        return symbols[text]

    named = re.sub(r"\b\w+\b", lambda m: _name(m[0], symbols), text)
    product = re.fullmatch(r"[\w/]+(\*[\w/]+)+", named)
    return "*".join(sorted(named.split("*"))) if product else named  # symbols' order is chance


def with_names(text: str, symbols: Mapping[str, str]) -> str:
    """A message with dynamic sizes by their names in the spec, where torch's symbols stood.

    Names of sites and modules that are spelt like a symbol (`s0.layer0.attn`) stay.
    """

    symbol = r"(?<![\w.'\"/-])s\d+(?![\w'\"/-]|\.\w)"
    return re.sub(symbol, lambda m: _name(m[0], symbols), text)


def _name(symbol: str, symbols: Mapping[str, str]) -> str:
    name = symbols.get(symbol, symbol)
    return f"({name})" if " " in name else name


def _type(val: Any, symbols: dict[str, str]) -> str:
    if isinstance(val, Tensor):
        return short_type(val.dtype, [_symbol(s, symbols) for s in val.shape])
    if isinstance(val, tuple | list):
        return f"({', '.join(_type(v, symbols) for v in val)})"
    return _symbol(val, symbols) if isinstance(val, torch.SymInt) else type(val).__name__


class _Names:
    """Display names: branches by their path, the rest numbered in order of appearance."""

    def __init__(self) -> None:
        self.given: dict[Node, str] = {}
        self.counts: dict[str, int] = {}

    def __getitem__(self, node: Node) -> str:
        if node not in self.given:
            path = str(node.target)
            name = node.name
            if node.op == "call_module" and path.startswith("peftfx."):
                name = path.removeprefix("peftfx.")
            elif node.op == "placeholder":
                name = path
            else:
                name = re.sub(r"(_\d+)+$", "", name).removeprefix("peftfx_")
            count = self.counts.get(name, 0)
            self.counts[name] = count + 1
            self.given[node] = f"{name}_{count}" if count else name
        return self.given[node]


def _argument(arg: Any, names: _Names) -> str:
    if isinstance(arg, Node):
        return f"@{arg.target}" if arg.op == "get_attr" else f"%{names[arg]}"
    if isinstance(arg, tuple | list):
        return f"[{', '.join(_argument(a, names) for a in arg)}]"
    if isinstance(arg, torch.dtype | torch.device | torch.layout):
        return str(arg).removeprefix("torch.")
    return f"{arg:g}" if isinstance(arg, float) else str(arg)


def _operation(gm: GraphModule, node: Node) -> str:
    module = submodule(gm, node)
    if module is None:
        name = getattr(node.target, "__name__", str(node.target))
        packet = str(node.target)
        return packet.split(".")[1] if packet.startswith("aten.") else name.split(".")[0]
    return type(module).__name__


def _detail(module: nn.Module | None) -> str:
    if module is None:
        return ""
    describe = getattr(module, "describe", None)
    parts = [describe() if describe is not None else module.extra_repr()]
    if front := getattr(module, "front", 0):
        parts.append(f"behind {front}")
    count = sum(p.numel() for p in module.parameters() if p.requires_grad)
    if count:
        parts.append(f"trains {count:,}")
    text = ", ".join(p for p in parts if p)
    return f" {{{text}}}" if text else ""


def program_text(program: State, axes: Callable[[Node | str], Sequence[str]] | None = None) -> str:
    """See `Program.text`; `axes` names what lies along the axes of a value or a stored tensor."""
    gm = program.module
    symbols = dict(program.symbols)
    names = _Names()
    used: dict[str, object] = {}
    lines = [f"program {type(gm).__name__}({program.spec}) {{"]
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            used[str(node.target)] = attribute(gm, str(node.target))
            continue
        if node.op == "placeholder":
            continue
        args = [_argument(a, names) for a in node.args]
        args += [f"{k}={_argument(v, names)}" for k, v in node.kwargs.items()]
        if node.op == "output":
            lines.append(f"  return {', '.join(_argument(a, names) for a in _flat(node.args[0]))}")
            continue
        call = f"{_operation(gm, node)}({', '.join(args)}){_detail(submodule(gm, node))}"
        shown = f"  %{names[node]} = {call} : {_type(value(node), symbols)}"
        along = axes(node) if axes is not None else ()
        lines.append(f"{shown}  # {', '.join(along)}" if along else shown)
    lines.append("}")
    if axes is not None:
        lines += [f"# @{name}: {', '.join(axes(name))}" for name in sorted(used)]
    trained = [n for n, t in used.items() if isinstance(t, nn.Parameter) and t.requires_grad]
    frozen = sum(1 for t in used.values() if isinstance(t, nn.Parameter)) - len(trained)
    lines.append(f"# parameters of the base: {frozen} frozen, {len(trained)} trained")
    history = any(r.adapter for r in program.history)
    lines += [f"#   trains @{name}" for name in trained] if history else []
    return "\n".join(lines) + "\n"


def _flat(arg: Any) -> list[Any]:
    if isinstance(arg, tuple | list):
        return [a for item in arg for a in _flat(item)]
    return [arg]


def _size(program: State) -> tuple[int, int]:
    nodes = sum(n.op != "get_attr" for n in program.module.graph.nodes)
    return nodes, len({a.site for a in program.attachments})


def _stored_entries(gm: GraphModule) -> int:
    """How many numbers the weights have that are stored in formats of ours."""
    entries: dict[str, int] = {}
    for node in gm.graph.nodes:
        read = StoredCall.of(node) or Lookup.of(node) or Unpacked.of(node)
        if read is not None:
            entries[read.weight] = read.entries
    return sum(entries.values())


def diff_text(before: State, after: State) -> str:
    """See `Program.diff`."""
    old, new = program_text(before).splitlines(), program_text(after).splitlines()
    body = [
        line
        for line in difflib.unified_diff(old, new, lineterm="", n=2)
        if not line.startswith(("---", "+++"))
    ]
    nodes = _size(after)[0] - _size(before)[0]
    sites = _size(after)[1] - _size(before)[1]
    count = sum(p.numel() for p in after.trainable_parameters())
    total = sum(p.numel() for p in after.module.parameters()) + _stored_entries(after.module)
    share = 100 * count / total if total else 0.0
    summary = f"edits: {nodes:+d} nodes, {sites:+d} sites, {count:,} trainable ({share:.2f} %)"
    return "\n".join([*body, summary]) + "\n"
