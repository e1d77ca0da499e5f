"""Files of torch.save: plain tensors by name come in, nothing else, and nothing runs."""

from __future__ import annotations

import io
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftfx
from peftfx.rewriter.errors import ArtifactError, CorruptFileError
from peftfx.rewriter.files.torch_bin import parse_torch_bin

from .peft_cases import CASES, inputs, output, program, write

TENSORS = {"b": torch.randn(3, 2), "a": torch.arange(4), "half": torch.randn(2).half()}


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_tensors_by_name(kind: type) -> None:
    tied = torch.randn(4, 4)
    content = kind(TENSORS | {"x": tied, "y": tied, "t": tied.mT, "p": nn.Parameter(tied)})
    got = parse_torch_bin(saved(content), "x.bin")
    assert list(got) == sorted(content)
    assert all(torch.equal(got[k], t) and type(got[k]) is torch.Tensor for k, t in content.items())


class Payload:
    """What unpickling would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(ArtifactError, match=r"x\.bin holds something else than tensors"):
        parse_torch_bin(saved({"a": Payload(canary)}), "x.bin")
    assert not canary.exists()


def repacked(data: bytes, change: Callable[[str, bytes], tuple[str, bytes]], packed: bool) -> bytes:
    buffer = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", kind) as new:
        for entry in old.infolist():
            new.writestr(*change(entry.filename, old.read(entry)))
    return buffer.getvalue()


PLAIN = saved(TENSORS)
BAD: dict[str, tuple[bytes, str]] = {
    "a list": (saved([torch.ones(2)]), "holds a list"),
    "one tensor": (saved(torch.ones(2)), "holds a Tensor"),
    "a number": (saved({"a": torch.ones(2), "epoch": 3}), "'epoch' is a int"),
    "another level": (saved({"a": {"b": torch.ones(2)}}), "'a' is a dict"),
    "no text": (saved({1: torch.ones(2)}), "1 is a Tensor"),
    "a module": (saved({"a": nn.Linear(2, 2)}), "something else than tensors"),
    "sparse": (saved({"a": torch.eye(3).to_sparse()}), "'a' is torch.sparse_coo"),
    "on no device": (saved({"a": torch.ones(2, device="meta")}), "something else|on meta"),
    "repeated": (saved({"a": torch.ones(1).expand(2**40)}), "'a' is a view that repeats"),
    "views": (saved({str(i): v for v in [torch.ones(10000)] for i in range(9)}), "views of more"),
    "packed": (repacked(PLAIN, lambda n, b: (n, b), True), "records claim other sizes"),
    "no pickle": (repacked(PLAIN, lambda n, b: (n.replace("data.pkl", "x"), b), False), "0 pickles"),
    "long pickle": (repacked(PLAIN, lambda n, b: (n, b + bytes(2**24) * n.endswith("data.pkl")),
                             False), "1 pickles"),
    "legacy": (saved(TENSORS, _use_new_zipfile_serialization=False), "before 1.6"),
    "empty": (b"", "no file of torch.save"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "no file of torch.save"),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(BAD))
def test_anything_else_is_refused(fault: str) -> None:
    data, text = BAD[fault]
    with pytest.raises(ArtifactError, match=text) as refused:
        parse_torch_bin(data, "dir/x.bin")
    assert "dir/x.bin" in str(refused.value)


def test_damage_is_refused_or_harmless() -> None:
    """Cut anywhere it is refused; a flipped bit is refused, or leaves every tensor as it was."""
    for size in range(0, len(PLAIN), 7):
        with pytest.raises(ArtifactError):
            parse_torch_bin(PLAIN[:size], "x.bin")
    refused = 0
    for place in range(0, len(PLAIN), 3):
        damaged = bytearray(PLAIN)
        damaged[place] ^= 1 << (place % 8)
        try:
            got = parse_torch_bin(bytes(damaged), "x.bin")
        except ArtifactError:
            refused += 1
            continue
        assert all(torch.equal(got[k], t) for k, t in TENSORS.items())
    assert refused > 0


def test_a_peft_adapter_in_a_pickle(tmp_path: Path) -> None:
    name, _ = CASES["lora"]
    want = write("lora", tmp_path)
    old = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(old), tmp_path / "adapter_model.bin")
    old.unlink()
    read = peftfx.load_peft(program(name), tmp_path, name="old")
    got = output(read(**inputs(name)))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    (tmp_path / "adapter_model.bin").write_bytes(saved({"a": 1}))
    with pytest.raises(ArtifactError, match=r"adapter_model\.bin: 'a' is a int"):
        peftfx.load_peft(program(name), tmp_path)


def test_quotas_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftfx.rewriter.files import torch_bin

    monkeypatch.setattr(torch_bin, "LIMIT", 10)
    with pytest.raises(CorruptFileError, match="larger than 10 bytes"):
        parse_torch_bin(PLAIN, "x.bin")


def test_a_foreign_object_is_named() -> None:
    """Not torch's words, which tell how to run it all the same."""
    data = io.BytesIO()
    torch.save({"a": torch.nn.Linear(1, 1)}, data)
    with pytest.raises(
        ArtifactError, match=r"torch\.nn\.modules\.linear\.Linear.*Save the"
    ) as told:
        parse_torch_bin(data.getvalue(), "x.bin")
    assert "trust" not in str(told.value)
