"""Artifacts: atomic, hashed, strict; a bad file is a clear error and loads nothing."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import (
    ArtifactError,
    BaseMismatchError,
    CorruptFileError,
    FormatTooNewError,
    NonFiniteError,
    PassError,
)  # fmt: skip
from peftfx.rewriter.files import directory, files, leftovers

from . import damage
from .models import batch, build, first, randomise


@pytest.fixture
def saved(captured: Any, tmp_path: Path) -> tuple[Any, peftfx.Program, Path]:
    model, base = captured["encoder"]
    program = randomise(peftfx.run(base, "lora{rank=2,where=q}"))
    peftfx.save(program, tmp_path / "a")
    return model, program, tmp_path / "a"


def test_several_adapters_and_a_choice(captured: Any, tmp_path: Path) -> None:
    model, base = captured["encoder"]
    program = randomise(peftfx.run(base, "lora{name=en};ia3{name=de};fold{names=en}"))
    peftfx.save(program, tmp_path / "both")
    loaded = peftfx.load(model, tmp_path / "both")
    assert loaded.adapters == ("en", "de")
    assert torch.equal(first(loaded(**batch())), first(program(**batch())))
    peftfx.save(program, tmp_path / "one", adapters=["en"])
    alone = peftfx.load(model, tmp_path / "one")
    assert alone.adapters == ("en",)
    want = first(program.without("de")(**batch()))
    assert torch.equal(first(alone(**batch())), want)
    with pytest.raises(PassError, match="no adapter 'fr'"):
        peftfx.save(program, tmp_path / "x", adapters=["fr"])
    with pytest.raises(PassError, match="no adapter to save"):
        peftfx.save(base, tmp_path / "x")


def test_certificates_are_kept_and_measured_again(saved: Any, tmp_path: Path) -> None:
    model, program, folder = saved
    loaded = peftfx.load(model, folder)
    said = "as saved, identity: max_abs 0, max_rel 0"
    assert [r.certificate.text for r in loaded.history] == [said]
    peftfx.save(loaded, tmp_path / "b")
    again = peftfx.load(model, tmp_path / "b")
    assert [r.certificate.text for r in again.history] == [said]
    assert again.verify()[0] == program.history[0].certificate


def test_another_base_is_refused_by_one_ulp(saved: Any) -> None:
    _, _, folder = saved
    other = build("encoder")
    weight = other.get_parameter("layers.1.fc1.weight")
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    with pytest.raises(BaseMismatchError, match=r"1 differ \(first: layers.1.fc1.weight\)"):
        peftfx.load(other, folder)
    loaded = peftfx.load(other, folder, allow_base_mismatch=True)
    assert loaded.adapters == ("lora",)
    said = r"loaded on another base \(of \d+ tensors, 1 differ \(first: layers.1.fc1.weight\)\)$"
    for _ in range(2):  # it stays in the history, also once saved with the base that it is on now
        assert re.search(said, loaded.history[0].certificate.text)
        peftfx.save(loaded, folder)
        loaded = peftfx.load(other, folder)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: d.update(format_version=99), FormatTooNewError, "Upgrade"),
        (lambda d: d.update(surprise=1), CorruptFileError, "unknown key 'surprise'"),
        (lambda d: d.pop("recipe"), CorruptFileError, "'recipe' is missing"),
        (lambda d: d["recipe"][0].update({"pass": "loar"}), CorruptFileError, "Nearest: lora"),
        (lambda d: d["recipe"][0].update({"pass": "lora{rank=-1}"}), CorruptFileError, "rank"),
        (lambda d: d["recipe"][0].update(extra=1), CorruptFileError, "unknown key"),
        (lambda d: d["base"].update(root="0"), CorruptFileError, "do not add up"),
        (lambda d: d["tensors"].popitem(), CorruptFileError, "unknown tensors"),
        (lambda d: d["recipe"][0]["decisions"].update(sites=["nowhere"]), ArtifactError, "site"),
        (lambda d: d["recipe"].clear(), CorruptFileError, "belongs to no adapter"),
        (lambda d: d.update(inputs={}), CorruptFileError, "input spec"),
        (lambda d: d.update(adapters=3), CorruptFileError, "wrong type"),
    ],
)
def test_altered_manifests(saved: Any, change: Any, error: Any, message: str) -> None:
    _, program, folder = saved
    damage.change(folder / "manifest.json", change)
    with pytest.raises(error, match=message):
        peftfx.load(program.base, folder)


def test_every_truncation_and_flip_of_the_tensors_is_found(saved: Any) -> None:
    _, program, folder = saved
    path = folder / "tensors.safetensors"
    good = path.read_bytes()
    digests = json.loads((folder / "manifest.json").read_text())["tensors"]
    for cut in (*range(0, len(good), max(1, len(good) // 60)), len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(CorruptFileError):
            files.read_tensors(path, digests)
    unharmed = files.read_tensors
    for position in range(0, len(good), max(1, len(good) // 150)):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(bad))
        try:
            found = unharmed(path, digests)
        except CorruptFileError:
            continue
        path.write_bytes(good)  # a flip in insignificant header space must not change anything
        assert all(torch.equal(t, unharmed(path, digests)[n]) for n, t in found.items())
    path.write_bytes(good)
    assert peftfx.load(program.base, folder).adapters == ("lora",)


def test_nan_is_refused_on_save_and_missing_files_on_load(saved: Any, tmp_path: Path) -> None:
    _, program, folder = saved
    (folder / "tensors.safetensors").unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        peftfx.load(program.base, folder)
    with pytest.raises(ArtifactError, match="not a directory"):
        peftfx.load(program.base, tmp_path / "nowhere")
    with torch.no_grad():
        program.trainable_parameters()[0][1, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"first at \[1, 0\]"):
        peftfx.save(program, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_foreign_directory_is_not_replaced(saved: Any, tmp_path: Path) -> None:
    _, program, folder = saved
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(ArtifactError, match="other files"):
        peftfx.save(program, tmp_path / "photos")
    peftfx.save(program, folder)  # an artifact is
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "photos"]


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_crash_at_any_step_keeps_the_old_artifact(
    saved: Any, monkeypatch: pytest.MonkeyPatch, call: str, at: int
) -> None:
    _, program, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    owner: Any = os if call == "fsync" else Path
    real, count = getattr(owner, call), 0

    def failing(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == at + 1:
            raise OSError(28, "No space left on device")
        return real(*args, **options)

    randomise(program, seed=3)
    monkeypatch.setattr(owner, call, failing)
    try:
        peftfx.save(program, folder)
    except ArtifactError as error:
        assert "No space left" in str(error)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.undo()
    assert peftfx.load(program.base, folder).adapters == ("lora",)
    assert [p.name for p in folder.parent.iterdir()] == ["a"]


WRITER = """
import resource, signal, sys
from pathlib import Path
from peftfx.rewriter.files.directory import write_directory
if sys.argv[2] != "0":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
big = bytes(200_000)
print("ready", flush=True)
for i in range(10**6 if sys.argv[2] == "0" else 1):
    write_directory(sys.argv[1], {"manifest.json": b"%d" % i, "big": big + b"%d" % i}, "manifest.json")
"""


def test_kill_and_full_disk(tmp_path: Path) -> None:
    target = tmp_path / "a"
    directory.write_directory(target, {"manifest.json": b"x", "big": b"x"}, "manifest.json")
    command = [sys.executable, "-c", WRITER, str(target)]
    full = subprocess.run([*command, "100000"], capture_output=True, text=True)
    assert full.returncode != 0 and "cannot be written" in full.stderr
    assert (target / "big").read_bytes() == b"x"
    for attempt in range(4):
        process = subprocess.Popen([*command, "0"], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.01 + 0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        directory.write_directory(tmp_path / "b", {"manifest.json": b""}, "manifest.json")
        leftovers.clean(target.parent)
        number = (target / "manifest.json").read_bytes()
        assert (target / "big").read_bytes().endswith(number)
    directory.write_directory(target, {"manifest.json": b"y"}, "manifest.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100000


@pytest.mark.parametrize(
    "text",
    [b'{"a":1,"a":2}', b'{"a":NaN}', b'{"a":Infinity}', b"\xff", b"[" * 50 + b"]" * 50, b"{", b""],
)
def test_strict_json(text: bytes) -> None:
    with pytest.raises(CorruptFileError):
        files.parse_json(text, "the file")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, width=32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
).filter(lambda x: x not in (float("inf"), float("-inf")))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans(), max_size=4))
def test_json_round_trip(data: dict[str, Any]) -> None:
    assert files.parse_json(files.write_json(data), "it") == data


def test_nothing_is_pickled(saved: Any) -> None:
    _, _, folder = saved
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".md", ".safetensors"]


def test_a_card_says_what_is_saved(saved: Any, tmp_path: Any) -> None:
    _, program, folder = saved
    text = (folder / "README.md").read_text()
    assert (
        text.startswith("---\nlibrary_name: peftfx\ntags:\n- peftfx\n") and program.identity in text
    )
    for record in program.history:
        row = record.text.replace("|", "\\|")
        assert f"| `{row}` | {len(record.edited)} | {record.certificate.text} |" in text
    copy = tmp_path / "a"
    peftfx.save(program, copy)
    (copy / "README.md").write_text("my own words")
    peftfx.save(program, copy)
    assert (copy / "README.md").read_text() == "my own words"


class Late(nn.Module):
    """Reads a token by its index, which no guard says; `tokens` is how many it needs."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.inner = tokens, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        rest = x[:, self.tokens :]
        if rest.shape[1] == 0 and not torch.compiler.is_exporting():
            raise ValueError(f"needs more than {self.tokens} tokens")
        return self.inner(x) + rest.sum(1, keepdim=True)


@pytest.mark.parametrize("tokens", [5, 20, 700])
def test_a_model_is_captured_at_sizes_that_it_runs_at(tokens: int, tmp_path: Path) -> None:
    model = Late(tokens).eval()
    x = torch.randn(2, tokens + 9, 8)
    program = randomise(peftfx.run(peftfx.capture(model, (x,)), "lora{rank=2,where=linear}"))
    peftfx.save(program, tmp_path / "a")
    loaded = peftfx.load(model, tmp_path / "a")
    assert torch.equal(loaded(x), program(x))


def test_a_model_that_runs_at_no_size(tmp_path: Path) -> None:
    model = Late(2).eval()
    program = peftfx.capture(model, (torch.randn(2, 9, 8),))
    peftfx.save(peftfx.run(program, "lora{rank=2,where=linear}"), tmp_path / "a")
    model.tokens = 10**5
    with pytest.raises(ArtifactError, match=r"none of the sizes .*needs more than.*load\(program"):
        peftfx.load(model, tmp_path / "a")


def test_loading_onto_a_model_takes_the_capture_from_a_cache(captured: Any, tmp_path: Path) -> None:
    model, base = captured["encoder"]
    program = peftfx.run(base, "lora{rank=2,where=q}")
    peftfx.save(program, tmp_path / "a")
    first, again = (peftfx.load(model, tmp_path / "a", cache=tmp_path / "cache") for _ in range(2))
    assert first.base.cached == "stored" and again.base.cached == "recalled"
    assert again.text() == first.text()
    assert torch.equal(again(**batch())[0], first(**batch())[0])


def test_loading_and_removing_fork_once_whatever_the_adapters(
    captured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base = captured["encoder"]
    program = base
    for index in range(8):
        program = peftfx.run(program, f"lora{{rank=2,where=q,name=a{index}}}")
    with torch.no_grad():
        for tensor in program.trainable_parameters():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    peftfx.save(program, tmp_path / "a")
    forks: list[str] = []
    original = peftfx.Program.fork

    def counted(self: peftfx.Program, printed: bool = True) -> peftfx.Program:
        forks.append("fork")
        return original(self, printed)

    monkeypatch.setattr(peftfx.Program, "fork", counted)
    loaded = peftfx.load(base, tmp_path / "a")
    assert len(forks) == 1 and not base.attachments
    assert loaded.text() == program.text()
    assert torch.equal(loaded(**batch())[0], program(**batch())[0])
    forks.clear()
    less = program.without("a3")
    assert len(forks) <= 2
    want = peftfx.load(base, tmp_path / "a").without("a3")
    assert less.text() == want.text() and "a3" not in less.adapters
    assert torch.equal(less(**batch())[0], want(**batch())[0])
    less.verify()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_tensors_are_written_as_safetensors_writes_them(metadata: dict[str, str] | None) -> None:
    """Byte for byte, of every dtype, of no numbers, of one, and of a transposed view."""
    dtypes = [*files.DTYPE_NAMES, torch.complex64]
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{len(shape)}.{dtype}.ü": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for dtype in dtypes for shape in ((3, 5), (), (0, 2), (7,))
    }  # fmt: skip
    for some in (tensors, {n: t for n, t in tensors.items() if not t.is_complex()}):
        want = safetensors.torch.save({n: t.clone() for n, t in sorted(some.items())}, metadata)
        assert files.write_tensors(some, metadata) == want
    view = torch.arange(6.0).view(2, 3).mT
    assert torch.equal(files.parse_tensors(files.write_tensors({"x": view}), "it")["x"], view)
