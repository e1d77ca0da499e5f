"""The capture cache: a model that was captured before is not traced again.

An entry is one file, a checksum and strict JSON (`graphfile.py`), named by a hash of everything
that a trace depends on: the code of the model's classes, every attribute of its modules, names,
shapes, dtypes and ties of its tensors, inputs, constants of the modules and classes that its code
is in, and versions. It also lists the source files that the traced operations came from, and the
inputs and buffers whose values decided what the sites are, with their hashes. What is recalled is
tried against the model, see `capture`. What cannot be described or written is not
cached; an entry that is damaged or stale is traced again and replaced. Neither is ever an error.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ArtifactError, CorruptFileError
from ..files.files import parse_json, read_file, write_file, write_json
from ..files.identity import tensor_digest
from ..files.leftovers import make_parents
from ..graph.module import CapturedModule
from ..inputs.spec import InputSpec
from ..inputs.specfile import read_spec
from ..program.site_table import Sites
from .graphfile import decode, encode, read_graph, write_graph

FORMAT = 1
LIMIT = 64 * 2**20
_DAMAGE = (
    CorruptFileError, ValueError, LookupError, TypeError, AttributeError, RuntimeError,
    ArithmeticError, AssertionError, SyntaxError,  # the last two are torch's
)  # fmt: skip
_INTERNAL = frozenset(vars(nn.Module())) | {"forward"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FILE = re.compile(r'File "([^"]+)", line')
_DRAWN = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""What `uuid` draws: the number of a session, another one in each process."""
ROOMS = (
    "errors", "graph", "inputs", "files", "program", "measure", "tracing", "sites", "capture",
)  # fmt: skip
"""What capturing is made of. The rest of the house may change, and captures stay what they are."""
_UNORDERED = "_use_default_values"
"""Of diffusers' configurations: the names of options that were left out, listed from a set, whose
order differs from process to process. Their values stand beside it."""


@dataclass(frozen=True)
class Traced:
    """The part of a captured program that tracing finds out; the rest is the model's own."""

    module: CapturedModule
    spec: InputSpec
    sites: Sites
    symbols: Mapping[str, str]
    read: frozenset[str] = frozenset()
    """Inputs and stored tensors whose values the sites depend on."""


def place(cache: bool | str | Path) -> Path:
    """The directory that `capture(cache=...)` names; True is the user's own cache."""
    if isinstance(cache, bool):
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(root) / "peftfx" / "captures"
    return Path(cache)


class Entry:
    """The place of one capture in a cache.

    Attributes:
        note: what happened, for `Program.cached`.
    """

    def __init__(
        self, directory: Path, model: nn.Module, inputs: Mapping[str, Tensor], about: Any,
        aliases: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.model, self.inputs, self.path = model, inputs, None
        self.note = ""
        self.packages = frozenset(
            type(m).__module__.partition(".")[0] for m in model.modules()
        ) - {"torch", "builtins"}  # fmt: skip
        persistent = set(model.state_dict(keep_vars=True))
        stored = [*model.named_parameters(), *model.named_buffers()]
        self.held = {n: (t, n in persistent) for n, t in stored}
        try:
            key = _key(model, inputs, about, aliases, self.packages)
        except ValueError as error:
            self.note = f"not cached: {error}"
        else:
            self.path = directory / f"{key}.json"

    def recall(self) -> Traced | None:
        """What was stored, or None."""
        if self.path is None:
            return None
        try:
            data = _read(self.path)
            for file, digest in data["files"].items():
                if _file_digest(Path(file)) != digest:
                    raise ValueError(f"{file} has changed")
            if data["values"] != self._digests(data["values"]):
                raise ValueError("a mask or a buffer that the sites depend on has other values")
            name = type(self.model).__name__
            traced = Traced(
                read_graph(data["graph"], self.held, self.packages, name, _classes()),
                read_spec(data["spec"]),
                Sites(decode(data["sites"], [])),
                dict(data["symbols"]),
                frozenset(data["values"]),
            )
        except FileNotFoundError:
            self.note = "stored"
            return None
        except (*_DAMAGE, OSError) as error:
            self.note = f"stored again: {error}"
            return None
        self.note = "recalled"
        return traced

    def outdated(self, why: str) -> None:
        """Notes that what was recalled does not hold any more."""
        self.note = f"stored again: {why}"

    def _digests(self, names: Iterable[str]) -> dict[str, str]:
        """Hashes of inputs and buffers; parameters are looked at in structure only."""
        buffers = {n: t for n, (t, _) in self.held.items() if not isinstance(t, nn.Parameter)}
        known = buffers | dict(self.inputs)
        return {n: tensor_digest(known[n]) for n in names if n in known and not known[n].is_meta}

    def store(self, traced: Traced) -> None:
        """Writes a capture, if it reads back as it is."""
        if self.path is None:
            return
        try:
            graph = write_graph(traced.module, frozenset(self.held), self.packages)
            files = set(_FILE.findall("\n".join(graph["traces"])))
            data = {
                "graph": graph,
                "spec": traced.spec.to_json(),
                "sites": encode(tuple(traced.sites), {}),
                "symbols": dict(traced.symbols),
                "values": self._digests(sorted(traced.read)),
                "files": {f: _file_digest(Path(f)) for f in sorted(files) if Path(f).is_absolute()},
            }
            body = write_json(data)
            again = read_spec(data["spec"])
            if decode(data["sites"], []) != tuple(traced.sites) or again != traced.spec:
                raise ValueError("its sites or inputs do not read back as they are")
            text = parse_json(write_json(graph), "", LIMIT)
            back = read_graph(text, self.held, self.packages, "Check", _classes())
            if _structure(back) != _structure(traced.module):
                raise ValueError("its inputs' or outputs' structure does not read back as it is")
            make_parents(self.path)
            write_file(self.path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        except (*_DAMAGE, ArtifactError, OSError) as error:
            self.note = f"not cached: {error}"


def _classes() -> list[str]:
    """Names of the classes of outputs that the code that is loaded registered with torch."""
    known = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.items()
    return [n for n, kind in known if kind.__module__ not in ("builtins", "collections")]


def _structure(gm: CapturedModule) -> Any:
    info: Any = gm.graph._codegen
    return info.pytree_info.in_spec, info.pytree_info.out_spec


def _read(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(path)
    digest, _, body = read_file(path, LIMIT).partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise CorruptFileError(f"{path} was altered or is truncated.")
    return parse_json(body, str(path), LIMIT)


# The key.


def _key(
    model: nn.Module, inputs: Mapping[str, Tensor], about: Any, aliases: Mapping[str, str],
    packages: frozenset[str],
) -> str:  # fmt: skip
    """A hash of everything that a trace depends on; ValueError if that cannot be told."""
    describe = _Description()
    persistent = set(model.state_dict(keep_vars=True))
    modules: list[Any] = []
    for path, module in model.named_modules():
        if "forward" in vars(module) or any(getattr(module, h, None) for h in _HOOKS):
            raise ValueError(f"the module {path!r} has hooks or a forward of its own")
        own = {k: v for k, v in vars(module).items() if k not in _INTERNAL}
        modules.append([path, describe(type(module)), describe(own)])
    tensors: list[Any] = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensors.append([name, *_layout(tensor), isinstance(tensor, nn.Parameter)])
        if name not in persistent and not tensor.is_floating_point() and not tensor.is_meta:
            tensors.append(tensor_digest(tensor))  # discovery reads such tables
    payload = {
        "format": FORMAT, "modules": modules, "tensors": tensors, "aliases": dict(aliases),
        "inputs": [[n, *_layout(t), _largest(t)] for n, t in inputs.items()],
        "about": describe(about),
        "state": [str(torch.get_default_dtype()), torch.is_autocast_enabled()],
        "versions": {p: _version(p) for p in sorted(packages | {"torch", "peftfx"})},
        "code": dict(sorted(describe.files.items())),
        "constants": dict(sorted(describe.constants.items())), "self": own_digest(),
    }  # fmt: skip
    return hashlib.sha256(write_json(payload)).hexdigest()


def _layout(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype), str(tensor.device), list(tensor.shape), list(tensor.stride())]


def _largest(tensor: Tensor) -> Any:
    """The value that the input spec keeps of an example."""
    whole = not (tensor.is_meta or tensor.is_floating_point()) and tensor.numel()
    return int(tensor.max()) if whole else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def own_digest() -> str:
    """A hash of this package's code that captures: a newer one may see other sites."""
    house = Path(__file__).parents[1]
    files = [f for f in house.rglob("*.py") if f.relative_to(house).parts[0].split(".")[0] in ROOMS]
    return hashlib.sha256(b"".join(f.read_bytes() for f in sorted(files))).hexdigest()


def _file_digest(path: Path) -> str:
    status = path.stat()
    return _digest_of(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4096)
def _digest_of(path: Path, changed: int, size: int) -> str:
    del changed, size
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _Description:
    """Any attribute of a module as JSON, with the source files of all code that it names."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.constants: dict[str, Any] = {}
        self._known: dict[int, str] = {}
        self._alive: list[Any] = []

    def __call__(self, item: Any) -> Any:
        match item:
            case None | bool() | int() | str():
                return item
            case float() | complex() | bytes() | torch.dtype() | torch.device() | torch.Size():
                return repr(item)
            case Tensor():
                if item.is_meta:
                    return ["tensor", *_layout(item)]
                return ["tensor", tensor_digest(item)]
            case nn.Module():
                return ["module", type(item).__qualname__]
            case type():
                return self._class(item)
            case functools.partial():
                return ["partial", self(item.func), self(item.args), self(item.keywords)]
            case _:
                pass
        if id(item) not in self._known:
            self._alive.append(item)  # so that no id is used twice
            self._known[id(item)] = "itself"
            # By content, not identity: equal values are often one object or two by chance.
            text = write_json(self._compound(item))
            self._known[id(item)] = hashlib.sha256(text).hexdigest()
        return self._known[id(item)]

    def _compound(self, item: Any) -> Any:
        match item:
            case list() | tuple():
                return [type(item).__name__, *(self(i) for i in item)]  # pyright: ignore[reportUnknownVariableType]
            case set() | frozenset():
                return ["set", *sorted(repr(self(i)) for i in item)]  # pyright: ignore[reportUnknownVariableType]
            case dict():
                items = ((k, v) for k, v in item.items() if k != _UNORDERED)  # pyright: ignore[reportUnknownVariableType]
                return ["dict", *([self(k), self(v)] for k, v in items)]
            case _:
                pass
        if callable(item) and hasattr(item, "__qualname__"):
            return self._function(item)
        state = getattr(item, "__dict__", None)
        if not isinstance(state, dict):
            raise ValueError(f"an attribute is a {type(item).__name__}")
        own = _own_hash(item)
        return [
            "object", self._class(type(item)),
            self({n: v for n, v in state.items() if own is None or v != own}),
        ]  # fmt: skip

    def _class(self, kind: type[Any]) -> Any:
        for base in kind.__mro__:
            self._source(base.__module__)
            if base.__module__ in self.files:
                self._constants(f"{base.__module__}.{base.__qualname__}", vars(base))
                for name, item in vars(base).items():
                    names: Any = getattr(getattr(item, "__code__", None), "co_freevars", ())
                    cells = zip(names, getattr(item, "__closure__", None) or (), strict=False)
                    read = {n: _content(cell) for n, cell in cells}
                    self._constants(f"{base.__module__}.{base.__qualname__}.{name}", read)
        return f"{kind.__module__}.{kind.__qualname__}"

    def _function(self, item: Any) -> Any:
        self._source(str(item.__module__ or "builtins"))
        code = getattr(item, "__code__", None)
        cells = [_content(c) for c in getattr(item, "__closure__", None) or ()]
        # With columns, since lambdas of one line have one name.
        lines = list(code.co_positions()) if code is not None else []
        owner = getattr(item, "__self__", None)
        bound = None if owner is None or isinstance(owner, type(sys)) else self(owner)
        return ["function", item.__qualname__, lines, bound, self(cells)]

    def _constants(self, owner: str, namespace: Mapping[str, Any]) -> None:
        """Notes the values of a module's or class's plain variables: code reads them, and they may
        be other ones than the source says."""
        items = {n: v for n, v in namespace.items() if not n.startswith("__")}
        plain = {n: repr(v) for n, v in sorted(items.items()) if _is_plain(v)}
        if plain:
            self.constants[owner] = plain

    def _source(self, module: str) -> None:
        """Notes a module's code and, unless it is installed (its version says enough), that of
        all modules that it names."""
        if module.partition(".")[0] in ("torch", *sys.stdlib_module_names) or module in self.files:
            if module != "__main__" or module in self.files:
                return
        file = getattr(sys.modules.get(module), "__file__", None)
        if file is None:
            raise ValueError(f"the code of {module!r} is in no file")
        self.files[module] = _file_digest(Path(file))
        self._constants(module, vars(sys.modules[module]))
        if "site-packages" in file or "dist-packages" in file:
            return
        for item in list(vars(sys.modules[module]).values()):
            is_module = isinstance(item, type(sys))
            name = item.__name__ if is_module else getattr(item, "__module__", None)
            if isinstance(name, str) and getattr(sys.modules.get(name), "__file__", None):
                self._source(name)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None


def _own_hash(item: Any) -> int | None:
    """The hash of an object whose class defines one. Kept in an attribute, it says nothing that the
    others do not, and Python hashes text differently in each process."""
    if type(item).__hash__ in (object.__hash__, None):
        return None
    try:
        return hash(item)
    except (TypeError, ValueError, AttributeError):
        return None


def _is_plain(item: Any) -> bool:
    """Whether a value is a number, text or a short container of such, which `repr` says all of."""
    match item:
        case None | bool() | int() | float() | complex() | torch.dtype():
            return True
        case str():
            return _DRAWN.fullmatch(item) is None
        case tuple() | list():
            return len(item) <= 64 and all(_is_plain(i) for i in item)  # pyright: ignore
        case dict():
            return len(item) <= 64 and all(_is_plain(i) for i in (*item, *item.values()))  # pyright: ignore
        case _:
            return False
