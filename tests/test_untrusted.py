"""Files that anybody may have written: nothing is imported, run or waited for while one is read."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import peftfx
from peftfx.rewriter.capture.graphfile import decode
from peftfx.rewriter.capture.operators import find_operator
from peftfx.rewriter.capture.structure import read_structure
from peftfx.rewriter.errors import (
    ArtifactError,
    CorruptFileError,
    OptionError,
    RewriteError,
    SelectorError,
)  # fmt: skip
from peftfx.rewriter.files import files
from peftfx.rewriter.graph.output_class import OUTPUTS, Outputs
from peftfx.rewriter.graph.symbols import Symbols
from peftfx.rewriter.inputs.relation import holds
from peftfx.rewriter.inputs.specfile import read_spec
from peftfx.rewriter.pipeline.syntax import parse, parse_yaml
from peftfx.rewriter.program.selector import _suffix, choose

from .damage import change
from .models import batch, first, randomise


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that must not be imported."""
    (tmp_path / "canary_module.py").write_text("class Thing(dict): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "canary_module"
    assert "canary_module" not in sys.modules


@pytest.fixture
def in_time() -> Iterator[None]:
    """Reading took no longer than a person waits; the limits make it milliseconds."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 5


LEAF = {"type": None, "context": None, "children_spec": []}


def spec(kind: Any, context: Any, *children: Any) -> str:
    return json.dumps([1, {"type": kind, "context": context, "children_spec": [*children]}])


@pytest.mark.parametrize(
    "tree",
    [0, (1, [2, None], {"a": (3,), "b": {}}), OrderedDict(x=1, y=[2]), Outputs(logits=1, h=(2, 3))],
)
def test_structures_read_back(tree: Any) -> None:
    structure = pytree.tree_structure(tree)
    assert read_structure(pytree.treespec_dumps(structure), (OUTPUTS,)) == structure


def test_structures_import_nothing(canary: str) -> None:
    factory = {"default_factory_module": canary, "default_factory_name": "Thing",
               "dict_context": ["a"]}  # fmt: skip
    enum = {"__enum__": True, "fqn": f"{canary}:Thing", "name": "x"}
    for text in (
        spec("collections.defaultdict", json.dumps(factory), LEAF),
        spec("collections.namedtuple", json.dumps(f"{canary}.Thing"), LEAF),
        spec("builtins.dict", json.dumps([enum]), LEAF),
        spec("builtins.tuple", json.dumps(enum), LEAF),
        spec(f"{canary}.Thing", json.dumps(["a"]), LEAF),
        spec(OUTPUTS, json.dumps(["a", "b"]), LEAF),
        spec("builtins.dict", json.dumps(["a", "a"]), LEAF, LEAF),
        spec("builtins.dict", "[" * 10**5),
        '[1, {"type": "builtins.list", "context": "null", "children_spec": [' * 3000,
        spec("builtins.list", "null", 3),
        json.dumps([2, LEAF]),
        "",
    ):  # fmt: skip
        with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
            read_structure(text, (OUTPUTS,))


@pytest.mark.parametrize(
    "text",
    [
        "aten.from_file.default", "aten.save.default", "aten._print.default", "aten.warn.default",
        "aten.set_.source_Storage", "aten.set_.source_Tensor", "aten.set_data.default",
        "aten.resize_.default", "aten.record_stream.default", "aten._reshape_alias.default",
        "aten.requires_grad_.default", "aten.manual_seed.default", "aten.set_grad_enabled.default",
        "aten._assert_async.default", "aten.backward.default", "aten.get_autocast_dtype.default",
        "aten._cufft_clear_plan_cache.default", "prims.convert_element_type.default",
        "inductor.resize_storage_bytes_.default", "os.system", "builtins.eval", "aten.add",
        "aten.__class__.mro", "aten.add.__class__", "aten.add.Tensor.redispatch", "aten.no.default",
        "c10d.send.default", "profiler._record_function_enter.default", "aten.to_here.default",
    ],
)  # fmt: skip
def test_operators_that_do_more_than_compute(text: str) -> None:
    with pytest.raises((ValueError, AttributeError)):
        find_operator(text, frozenset({"peftfx"}))


def test_operators_that_compute() -> None:
    """What models are made of, those that write into their operands included."""
    for text in (
        "aten.linear.default", "aten.gelu.default", "aten.div.Tensor_mode", "aten.einsum.default",
        "aten.scaled_dot_product_attention.default", "aten.dropout.default", "aten.rand.default",
        "aten.batch_norm.default", "aten.add_.Tensor", "aten.index_put_.default", "aten.sym_size.int",
        "aten._to_copy.default", "aten.conv1d.padding", "aten.pad.default", "aten.split.Tensor",
        "aten.__and__.Tensor", "aten.item.default", "aten.zeros.default", "aten.to.dtype_layout",
    ):  # fmt: skip
        assert str(find_operator(text, frozenset())) == text


@pytest.fixture
def program_file(captured: Any, tmp_path: Path) -> Path:
    _, base = captured["encoder"]
    peftfx.save_program(randomise(peftfx.run(base, "lora{rank=2}")), tmp_path / "p")
    return tmp_path / "p"


def alter_graph(folder: Path, edit: Any) -> None:
    """Edits the graph, with the right hashes."""
    import hashlib

    change(folder / "graph.json", edit)
    digest = hashlib.sha256((folder / "graph.json").read_bytes()).hexdigest()
    change(folder / "program.json", lambda d: d.update(graph=digest))


def test_a_program_file_touches_nothing(program_file: Path, canary: str, tmp_path: Path) -> None:
    good = {p.name: p.read_bytes() for p in program_file.iterdir()}
    factory = {"default_factory_module": canary, "default_factory_name": "Thing",
               "dict_context": ["a"]}  # fmt: skip

    def call(data: Any) -> None:
        node = next(n for n in data["nodes"] if n[0] == "call_function")
        node[2], node[3] = "aten.from_file.default", ["tuple", str(tmp_path / "made"), True, 8]

    def keyword(data: Any) -> None:
        data["inputs"][0][0] = "lambda"

    def huge(data: Any) -> None:
        data["constants"]["x"] = ["torch.float32", [2**40], ""]
        node = next(n for n in data["nodes"] if n[0] == "get_attr")
        node[2] = "x"

    def of_outputs(text: str) -> Any:
        return lambda data: data.update(output=text)

    for edit in (
        call, keyword, huge, of_outputs(spec("collections.defaultdict", json.dumps(factory), LEAF)),
        lambda d: d["environment"]["symbols"].append(["s99999999999", 8, 2, None]),
        lambda d: d["environment"]["guards"].append("Eq(s0, 10**10**10)"),
        lambda d: d["nodes"][-1].__setitem__(3, 5), lambda d: d["nodes"][-1].__setitem__(4, True),
    ):  # fmt: skip
        alter_graph(program_file, edit)
        with pytest.raises(CorruptFileError, match="malformed"):
            peftfx.load_program(program_file)
        for name, content in good.items():
            (program_file / name).write_bytes(content)
    change(program_file / "program.json", lambda d: d["inputs"]["inputs"][0].update(dtype="load"))
    with pytest.raises(CorruptFileError, match="malformed"):
        peftfx.load_program(program_file)
    assert not (tmp_path / "made").exists()


def test_files_of_the_first_format_load(program_file: Path, captured: Any, tmp_path: Path) -> None:
    """They hold no hash of themselves."""
    model, base = captured["encoder"]
    program = randomise(peftfx.run(base, "lora{rank=2}"))
    peftfx.save(program, tmp_path / "a")
    for path in (program_file / "program.json", tmp_path / "a" / "manifest.json"):
        data = json.loads(path.read_text())
        assert data.pop("sha256") and data["format_version"] == 2
        for key in ("trained", "updated", "dtype"):
            data.pop(key, None)
        path.write_text(json.dumps({**data, "format_version": 1}))
    want = first(program(**batch()))
    assert torch.equal(first(peftfx.load_program(program_file)(**batch())), want)
    assert torch.equal(first(peftfx.load(model, tmp_path / "a")(**batch())), want)


@pytest.mark.parametrize(
    "edit",
    [
        lambda i: i.update(dtype="load"), lambda i: i.update(dtype="float33"),
        lambda i: i.update(shape=[10**18]), lambda i: i.update(shape=[2**20, 2**20]),
        lambda i: i.update(shape=[-1]), lambda i: i.update(shape=[True]),
        lambda i: i.update(shape=[1] * 65), lambda i: i.update(fill="0"), lambda i: i.update(name=3),
        lambda i: i.update(fill=10**30), lambda i: i.pop("name"),
        lambda i: i.update(values=[3, 1]), lambda i: i.update(values=["a", "b"]),
    ],
)  # fmt: skip
def test_input_specs(captured: Any, edit: Any) -> None:
    data = captured["encoder"][1].spec.to_json()
    assert read_spec(data) == captured["encoder"][1].spec
    edit(data["inputs"][0])
    with pytest.raises((KeyError, TypeError, ValueError)):
        read_spec(data)


def test_other_parts_of_input_specs(captured: Any) -> None:
    for key, item in (
        ("ranges", {"batch": [10**12, None]}), ("ranges", {"batch": [3, 1]}),
        ("relations", ["batch % (" * 300]), ("relations", ["nothing > 1"]),
        ("structure", {"x": {"load": 1}}), ("structure", {"x": {"input": 1}}), ("variadic", 3),
        ("reasons", {"x": 1}), ("parameters", [1]), ("inputs", [{}]), ("inputs", 3),
    ):  # fmt: skip
        data = captured["encoder"][1].spec.to_json()
        data[key] = item
        with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
            read_spec(data)


@pytest.mark.parametrize(
    "text",
    [
        "s0 ** 10**9", "2**64**64**64 > s0", "PowByNatural(s0, 100000)", "s0 > " + "9" * 4000,
        "-" * 4000 + "1", "(" * 4000, "s0" + "*s0" * 10**5, "__import__('os')", "s1", "1 if 2 else 3",
        "Mod(s0, 2)(s0)", "s0.bit_length()",
    ],
)  # fmt: skip
def test_guards(text: str, in_time: None) -> None:
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
        Symbols({"symbols": [["s0", 8, 2, None]], "guards": [text]})


@pytest.mark.parametrize(
    "symbol",
    [
        ["s99999999", 8, 2, None],
        ["x0", 8, 2, None],
        ["s0", 10**30, 2, None],
        ["s0", 8, 2, "x"],
        ["s0", -1, 2, None],
        ["s0", 8, -2, None],
    ],
)
def test_symbols(symbol: list[Any], in_time: None) -> None:
    with pytest.raises((ValueError, TypeError)):
        Symbols({"symbols": [symbol], "guards": []})


def test_relations(in_time: None) -> None:
    assert holds("(a + 1) % 8 == 0", {"a": 7})
    for text in (
        "(" * 3000,
        "-" * 4000 + "1",
        "-" * 1500 + "a",
        "a" * 5000,
        "a ** 9",
        "a.b",
        "exit()",
    ):
        with pytest.raises(ValueError, match="relation"):
            holds(text, {"a": 1})


@pytest.mark.parametrize(
    "data",
    [
        b'"' * 10**6, b'"\\' * 10**6, b'["' + b'\\"' * 10**6, b"[" * 10**6, b"[]" * 10**6,
        b"[" * 33 + b"]" * 33, b'{"a":' * 10**5, b"1" * 10**6, b"[1e999]", b"[-1e999]",
        b'["\\ud800"]', b"[" + b"9" * 41 + b"]", b'{"a": 1, "a": 2}', b"[NaN]", b"\xff\xfe",
    ],
    ids=range(15),
)  # fmt: skip
def test_json_takes_linear_time(data: bytes, in_time: None) -> None:
    with pytest.raises(CorruptFileError):
        files.parse_json(data, "it")


def test_json_within_the_limits(in_time: None) -> None:
    for item in (
        ["[" * 1000, '"\\' * 1000, "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")],
        [list(range(10**5)), 1e-300, 0.1, 2**64, -(2**63)], {"a\\": ["]", "\x00"]},
    ):  # fmt: skip
        assert files.parse_json(files.write_json(item), "it") == item
        assert files.parse_json(json.dumps(item).encode(), "it") == item


@pytest.mark.parametrize(
    "text",
    [
        "lora{a=" + "[" * 10**4, "lora{rank=" + "1" * 5000 + "}", "lora{rank=" + "1" * 10**5 + "x}",
        "lora{a='" + "\\" * 10**5, "lora{" + "a=1," * 10**4 + "}", "x" * 10**6, ";" * 10**5,
        "lora{rank=٣}", "(" * 40 + ")" * 40,
    ],
    ids=range(9),
)  # fmt: skip
def test_pipeline_text(text: str, in_time: None) -> None:
    with pytest.raises(OptionError):
        parse(text)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "- " * 10**4, "[" * 10**5, "- {" * 1000, "? " * 10**4, "- " + "1" * 10**4, BOMB, "&a [*a]",
        "- 2020-99-99", "- {[a]: 1}", "- !!int ''", "- !!python/name:os.system", "*a",
        "- " + "1:" * 1000 + "1", "x" * 10**6,
    ],
    ids=range(14),
)  # fmt: skip
def test_recipes(text: str, in_time: None) -> None:
    with pytest.raises(OptionError):
        parse_yaml(text)


def test_recipes_may_repeat_themselves() -> None:
    text = "- lora: {rank: &r 4}\n- lora: {name: b, rank: *r}\n"
    assert str(parse_yaml(text)) == "lora{rank=4};lora{rank=4,name=b}"


def test_recipes_are_regular_files(tmp_path: Path, captured: Any) -> None:
    (tmp_path / "r.yaml").mkdir()
    with pytest.raises(OptionError, match="not a regular file"):
        peftfx.run(captured["encoder"][1], str(tmp_path / "r.yaml"))


class Named:
    def __init__(self, name: str) -> None:
        self.module = self.id = self.weight = name


def test_wildcards_match_as_before_and_fast(in_time: None) -> None:
    import itertools

    words = ["".join(w) for n in (1, 2, 3, 4, 5) for w in itertools.product("a.*", repeat=n)]
    names = ["".join(w) for n in (1, 2, 3, 4, 5) for w in itertools.product("ab.", repeat=n)]
    for word in words[::7]:
        slow = re.compile(r"(?:.*\.)?" + re.escape(word).replace(r"\*", r"[^.]*"))
        test: Any = _suffix(word)
        for name in names[::3]:
            assert test(Named(name)) == bool(slow.fullmatch(name)), (word, name)
    for word in ("*" * 2000 + "x", "a*" * 2000 + "x", "*a*b" * 500 + "x"):
        assert not _suffix(word)(Named("ab" * 3000))  # pyright: ignore[reportArgumentType]


def test_what_is_no_argument() -> None:
    for item in (["node", 5], ["site", "Nothing", {}], ["torch", "load"], ["import", "os"], [[]]):
        with pytest.raises((ValueError, LookupError, TypeError)):
            decode(item, [])


def test_manifests_of_newer_versions(program_file: Path, captured: Any) -> None:
    change(program_file / "program.json", lambda d: d["versions"].update(torch="99.1.0"))
    with pytest.warns(UserWarning, match=r"written with torch 99.1.0"):
        peftfx.load_program(program_file)
    change(program_file / "program.json", lambda d: d.update(format_version=3))
    with pytest.raises(ArtifactError, match=r"format 3, written by peftfx .*Upgrade"):
        peftfx.load_program(program_file)
    assert issubclass(ArtifactError, RewriteError)


@pytest.mark.parametrize("text", ["not " * 5000 + "q", "(" * 5000 + "q" + ")" * 5000])
def test_nested_selectors(text: str, in_time: None) -> None:
    with pytest.raises(SelectorError, match="deeper than"):
        choose(text, [])


def test_guards_that_contradict_a_size() -> None:
    """Torch asserts that the value of a size stays within what guards leave of its range."""
    data = {"symbols": [["s77", 10**12, 2, 5212]], "guards": ["s77 >= 600"]}
    with pytest.raises(ValueError, match=r"s77 >= 600 contradicts the sizes: 10{12} not in"):
        Symbols(data)
    data["symbols"] = [["s77", 1000, 2, 5212]]
    assert str(Symbols(data).names["s77"]) == "s77"
