"""The layout and the architecture's invariants, as ARCHITECTURE.md states them."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import peftfx
from peftfx import stubs
from peftfx.methods import methods, split_docstring
from peftfx.rewriter.pipeline.method import Method
from peftfx.rewriter.pipeline.passes import REGISTRY

from .models import batch, first, randomise

ROOT = Path(__file__).parent.parent
LAYERS = ("rewriter", "passes", "kernels", "exporters")
SOURCES = sorted(p for d in (*LAYERS, "peftfx") for p in (ROOT / d).rglob("*.py")
                 if not any((ROOT / "peftfx" / x) in p.parents for x in LAYERS))  # fmt: skip
PICKLES = ROOT / "rewriter" / "files" / "torch_bin.py"
"""The only file that may read what torch.save wrote."""

METHODS = {name: cls for name, cls in REGISTRY.items() if issubclass(cls, Method)}


def layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


@functools.cache
def tree(path: Path) -> ast.Module:
    """A file's syntax."""
    return ast.parse(path.read_text())


def imports(path: Path) -> set[str]:
    """First parts of everything a file imports; relative imports resolved inside the package."""
    found: set[str] = set()
    depth = len(path.relative_to(ROOT).parts)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {a.name.partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == depth:  # from ..layer import
                found.add(module.partition(".")[0])
            elif not node.level:
                found.add(module.removeprefix("peftfx.").partition(".")[0])
    return found


def test_links_and_namespaces() -> None:
    for name in LAYERS:
        link = ROOT / "peftfx" / name
        assert link.is_symlink() and link.resolve() == ROOT / name, (
            f"peftfx/{name} must be a symbolic link to ../{name}; was the copy made without links?"
        )
        assert not list((ROOT / name).rglob("__init__.py"))


@pytest.mark.parametrize(
    ("name", "banned"),
    [
        ("rewriter", {"passes", "kernels", "exporters"}),
        ("kernels", {"passes", "rewriter", "exporters"}),
        ("passes", {"exporters"}),
    ],
)
def test_layers_import_downwards_only(name: str, banned: set[str]) -> None:
    for path in SOURCES:
        if layer(path) == name:
            assert not imports(path) & banned, path


def test_methods_touch_no_graph_nodes() -> None:
    assert len(METHODS) >= 6
    for cls in METHODS.values():
        path = Path(inspect.getfile(cls))
        text = path.read_text()
        assert "torch.fx" not in text and "graph_module" not in text and "Node" not in text, path
        lines = [
            line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")
        ]
        assert len(lines) < 130, path


def test_no_forbidden_constructs() -> None:
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            assert not isinstance(node, ast.Assert), where
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), where
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.export.load"), where
                assert called != "torch.load" or path == PICKLES, where
                restricted = any(ast.unparse(k) == "weights_only=True" for k in node.keywords)
                assert called != "torch.load" or restricted, where
        assert "pickle" not in imports(path), path


def test_files_stay_small() -> None:
    long = {str(p): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_one_file_one_pass() -> None:
    for name, cls in REGISTRY.items():
        assert cls.__name__.lower() == name.replace("_", "")
        assert getattr(peftfx, cls.__name__) is cls
        assert len(list((ROOT / "passes").glob(f"*/{name}.py"))) == 1


@functools.cache
def identifiers(path: Path) -> frozenset[str]:
    """All names that a file's code uses."""
    nodes = list(ast.walk(tree(path)))
    names = {n.id for n in nodes if isinstance(n, ast.Name)}
    names |= {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    return frozenset(names | {n.name for n in nodes if isinstance(n, ast.alias)})


@functools.cache
def code(path: Path) -> str:
    """A file without its docstrings and comments."""
    return re.sub(r'"""(?s:.*?)"""|#.*', "", path.read_text())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_is_three_files(name: str) -> None:
    """One source file, one test file, one golden text (but for what needs sources), and no other
    code knows it."""
    source = Path(inspect.getfile(METHODS[name]))
    golden = () if METHODS[name].sourced else (f"tests/golden/{name}.txt",)
    for path in (f"tests/methods/test_{name}.py", *golden):
        assert (ROOT / path).exists(), f"the method {name} needs a file {path} (CONTRIBUTING.md)"
    title, citation = split_docstring(source.read_text().split('"""')[1])
    assert title, f"{source}: the docstring needs a first line that says what it inserts"
    assert citation, f"{source}: the docstring's second paragraph must start with the paper"
    assert METHODS[name].folds, f"{source}: say what becomes of it: folds: ClassVar[str] = ..."
    word = re.compile(rf"\b{METHODS[name].__name__}\b")
    for path in SOURCES:
        known = layer(path) in ("rewriter", "kernels")
        if layer(path) == "exporters":  # other libraries' types have the names of methods
            assert METHODS[name].__name__ not in identifiers(path), path
        if known or (path.parent == ROOT / "peftfx" and path.suffix == ".py"):
            assert not word.search(code(path)), path


TOY = '''"""Toy: adds a trained multiple of one fixed direction beside a linear.

Nobody et al., 2026, arXiv:0000.00000.
"""
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import nn
from peftfx.authors import Delta, Method

class ToyBranch(Delta):
    def __init__(self, site):
        super().__init__()
        self.t = nn.Parameter(torch.zeros(site.out_features, 1))
        self.register_buffer("d", torch.ones(1, site.in_features))
    def branch(self, x):
        return x @ self.d.T @ self.t.T
    def delta(self):
        return self.t @ self.d

@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    folds: ClassVar[str] = "exactly"
    where: str = "q|v"
    def insert(self, edit, site):
        edit.add(site, ToyBranch(site))
'''


def test_a_new_file_is_all_a_method_needs(captured: Any, tmp_path: Path) -> None:
    """Text, options, selectors, contract, training, artifact and fold come by themselves."""
    (tmp_path / "toy.py").write_text(TOY)
    sys.path.insert(0, str(tmp_path))
    try:
        importlib.import_module("toy")
        model, base = captured["decoder"]
        program = randomise(peftfx.run(base, "toy{where=q and layer>=1,name=mine}"))
        assert len(program.history[-1].edited) == 1 and program.adapters == ("mine",)
        want = first(program(**batch()))
        peftfx.save(program, tmp_path / "adapter")
        assert torch.equal(first(peftfx.load(model, tmp_path / "adapter")(**batch())), want)
        folded = peftfx.run(program, "fold")
        assert not folded.attachments
        torch.testing.assert_close(first(folded(**batch())), want)
        assert "toy" in [e.name for e in methods(base)]
    finally:
        sys.path.remove(str(tmp_path))
        REGISTRY.pop("toy", None)
        sys.modules.pop("toy", None)


def test_importing_needs_no_extras_and_shadows_no_package() -> None:
    extras = ("transformers", "onnx", "onnxruntime", "gguf", "triton", "PIL", "optuna")
    code = (
        f"import sys, peftfx; print([m for m in {extras} if m in sys.modules]); import transformers"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]" and done.returncode == 0, done.stdout + done.stderr
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or "site-packages" in spec.origin


def test_the_stub_is_fresh() -> None:
    assert stubs.STUB.read_text() == stubs.stub(), "run `make stubs`"


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["pyright"]]
)
def test_style(command: list[str]) -> None:
    tool = Path(sys.executable).with_name(command[0])
    if not tool.exists():
        pytest.skip(f"{command[0]} is not installed")
    extra = ["--pythonpath", sys.executable] if command[0] == "pyright" else []
    done = subprocess.run(
        [str(tool), *command[1:], *extra], cwd=ROOT, capture_output=True, text=True
    )
    if command[0] == "pyright" and "error:" not in done.stdout and "errors" not in done.stdout:
        pytest.skip("pyright cannot run here (it needs node)")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-500:]
