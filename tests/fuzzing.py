"""Every reader as a function of bytes that raises nothing but what it promises; and where to begin.

`benchmarks/fuzz.py` drives them by coverage (atheris); `tests/test_damage.py` by fixed mutations.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peftfx.exporters.mergekit import read_config
from peftfx.rewriter.capture.structure import read_structure
from peftfx.rewriter.errors import RewriteError
from peftfx.rewriter.files.files import parse_json, write_json
from peftfx.rewriter.files.sealed import SEAL, sealed
from peftfx.rewriter.graph.symbols import Symbols
from peftfx.rewriter.inputs.relation import holds
from peftfx.rewriter.inputs.specfile import read_spec
from peftfx.rewriter.pipeline.syntax import parse, parse_yaml
from peftfx.rewriter.program.selector import choose
from peftfx.rewriter.storage import artifact, loading, program_file
from peftfx.rewriter.storage.safetensors_checkpoint import Checkpoint
from peftfx.training.state import read_state

from . import fuzzing_adapters, writers
from .temporary import lasting
from .writers import WRITERS

CORPUS = Path(__file__).parent / "corpus"
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)
"""What readers of parts raise; readers of files make our errors of them."""


class Held:
    """A directory in memory, read like `directory.Folder`."""

    path = Path("held")

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def read(self, name: str, limit: int | None = None) -> bytes:
        del limit
        return self.files[name]


@functools.cache
def written(name: str) -> dict[str, bytes]:
    """The files of a writer, by path."""
    with tempfile.TemporaryDirectory() as place:
        WRITERS[name].write(Path(place), 3)
        return {f: (Path(place) / f).read_bytes() for f in WRITERS[name].files}


def _json(data: bytes) -> Any:
    return parse_json(data, "it")


def _manifest(data: bytes) -> bytes:
    """Altered JSON with the right seal, as somebody would write it who means harm."""
    item = _json(data)
    if not isinstance(item, dict):
        return data
    return sealed({k: v for k, v in item.items() if k != SEAL})


def _artifact(data: bytes) -> None:
    files = {f.partition("/")[2]: content for f, content in written("save").items()}
    held: Any = Held({**files, "manifest.json": _manifest(data)})
    loading.attach(writers.base(), artifact._read(held), "held")


def _program(data: bytes) -> None:
    files = {f.partition("/")[2]: content for f, content in written("save_program").items()}
    held: Any = Held({**files, "program.json": _manifest(data)})
    program_file._read(held)


def _graph(data: bytes) -> None:
    files = {f.partition("/")[2]: content for f, content in written("save_program").items()}
    manifest = json.loads(files["program.json"])
    manifest["graph"] = hashlib.sha256(data).hexdigest()
    held: Any = Held({**files, "graph.json": data, "program.json": _manifest(write_json(manifest))})
    program_file._read(held)


@functools.cache
def _place() -> Path:
    shared = Path("/dev/shm")
    return lasting("peftfx-fuzz", shared if shared.is_dir() else None)


def _on_disk(name: str, path: str, data: bytes) -> Path:
    for file, content in written(name).items():
        (_place() / file).parent.mkdir(parents=True, exist_ok=True)
        (_place() / file).write_bytes(data if file == path else content)
    return _place()


def _resume(data: bytes) -> None:
    name = "step-00000001/manifest.json"
    WRITERS["save_checkpoint"].state(_on_disk("save_checkpoint", name, _manifest(data)))


def _cache(data: bytes) -> None:
    body = hashlib.sha256(data).hexdigest().encode() + b"\n" + data
    WRITERS["cache"].read(_on_disk("cache", "entry.json", body))


def _controllers(data: bytes) -> None:
    path = _place() / "state"
    path.write_bytes(data)
    read_state(path)


def _weights(data: bytes) -> None:
    (_place() / "weights").mkdir(exist_ok=True)
    (_place() / "weights" / "model.safetensors").write_bytes(data)
    checkpoint = Checkpoint.read(_place() / "weights")
    for name in checkpoint.entries:
        checkpoint.tensor(name)


def _text(read: Callable[[str], Any]) -> Callable[[bytes], None]:
    return lambda data: read(data.decode("utf-8", "replace"))


def _part(read: Callable[[Any], Any]) -> Callable[[bytes], None]:
    """A reader of a part of a file, which may raise the errors of malformed data."""

    def call(data: bytes) -> None:
        try:
            read(_json(data))
        except MALFORMED as error:
            if isinstance(error, AssertionError):
                raise

    return call


def _mergekit(text: str) -> None:
    config = read_config(text, "it")
    for place, name in (
        (0.0, "norm.weight"),
        (0.3, "layers.1.mlp.up"),
        (1.0, "layers.3.self_attn.q"),
    ):
        config.values(name, place)


def _choose(text: str) -> None:
    choose(text, list(writers.base().sites))


def _relation(text: str) -> None:
    try:
        holds(text, {"batch": 2, "sequence": 8})
    except (ValueError, KeyError, TypeError):
        return


def _only_ours(read: Callable[[bytes], None]) -> Callable[[bytes], None]:
    def target(data: bytes) -> None:
        try:
            read(data)
        except RewriteError:
            return

    return target


TARGETS: dict[str, Callable[[bytes], None]] = {
    name: _only_ours(read)
    for name, read in {
        "json": _json, "artifact": _artifact, "program": _program, "graph": _graph,
        "checkpoint": _resume, "cache": _cache, "controllers": _controllers, "weights": _weights,
        "pipeline": _text(parse), "recipe": _text(parse_yaml), "selector": _text(_choose),
        "mergekit": _text(_mergekit),
        "structure": _part(read_structure), "symbols": _part(Symbols), "relation": _text(_relation),
        "spec": _part(read_spec),
        **fuzzing_adapters.TARGETS,
    }.items()
}  # fmt: skip

_WRITTEN = {
    "artifact": ("save", "a/manifest.json"), "program": ("save_program", "p/program.json"),
    "graph": ("save_program", "p/graph.json"), "cache": ("cache", "entry.json"),
    "checkpoint": ("save_checkpoint", "step-00000001/manifest.json"),
    "controllers": ("controllers", "state.safetensors"), "weights": ("save", "a/tensors.safetensors"),
}  # fmt: skip


def corpus(name: str) -> list[bytes]:
    """Where to begin: files of `tests/corpus`, and what is written today."""
    seeds = [p.read_bytes() for p in sorted((CORPUS / name).glob("*"))]
    if name in _WRITTEN:
        writer, path = _WRITTEN[name]
        content = written(writer)[path]
        seeds.append(content.partition(b"\n")[2] if name == "cache" else content)
    return seeds


TOKENS = (
    b"null", b"true", b"[]", b"{}", b"-1", b"0", b"1e308", b"18446744073709551616", b'""', b'"x"',
    b"[", b"]", b"{", b"}", b",", b":", b"\\", b"\x00", b"\xff", b"*", b"'", b"(", b")", b"..",
    b"99999999", b'"aten.from_file.default"', b'["node", 0]',
)  # fmt: skip


def mutations(seeds: list[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """Bytes like those of the corpus: flipped, cut, repeated, with values exchanged."""
    draw = random.Random(seed)
    for _ in range(count):
        data = bytearray(draw.choice(seeds))
        for _ in range(draw.choice((1, 1, 2, 4))):
            at = draw.randrange(len(data) + 1)
            to = min(len(data), at + draw.choice((1, 2, 8, 40)))
            match draw.randrange(5):
                case 0 if data:
                    data[at % len(data)] ^= 1 << draw.randrange(8)
                case 1:
                    del data[at:to]
                case 2:
                    data[at:at] = data[at:to] * draw.choice((1, 3, 50))
                case 3:
                    data[at:to] = draw.choice(TOKENS)
                case _:
                    data = _exchanged(data, draw)
        yield bytes(data)


def _exchanged(data: bytearray, draw: random.Random) -> bytearray:
    """JSON with one value replaced by another one of it, or by a token."""
    try:
        item = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        keys = inner.keys() if isinstance(inner, dict) else range(len(inner))
        for key in keys:
            places.append((inner, key))
            if isinstance(inner[key], dict | list):
                walk(inner[key])

    if not isinstance(item, dict | list):
        return data
    walk(item)
    if not places:
        return data
    (to, key), (source, other) = draw.choice(places), draw.choice(places)
    new = draw.choice((source[other], None, -1, 10**12, "x", [], {}, True, [[]], 1.5))
    to[key] = json.loads(json.dumps(new))
    return bytearray(json.dumps(item).encode())
