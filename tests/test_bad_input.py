"""Bad input, row by row: the error says what, where and what to do, and nothing has changed.

Rows 1 to 32 of the catalogue of what users hand in. Each error is a `RewriteError` and the nearest
builtin; models, programs and files are afterwards what they were.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import struct
from collections.abc import Callable, Generator
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
    CaptureError,
    CorruptFileError,
    ExportError,
    FoldError,
    FormatTooNewError,
    InputError,
    MetaTensorError,
    NonFiniteError,
    OptionError,
    PassError,
    RewriteError,
    SelectorError,
    VerifyError,
)  # fmt: skip
from peftfx.rewriter.files import directory, files
from peftfx.rewriter.pipeline.passes import NAME, REGISTRY, Pass
from peftfx.rewriter.pipeline.syntax import parse_yaml

from .damage import change as edited
from .models import randomise

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
A = "peftfx.lora.0.delta.a"
LORA = "lora{rank=2,where=linear}"


def net(out: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, out))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def base() -> peftfx.Program:
    return peftfx.capture(net(), (X,))


@pytest.fixture
def program(base: peftfx.Program) -> peftfx.Program:
    return randomise(peftfx.run(base, LORA), 0.3)


@pytest.fixture
def saved(program: peftfx.Program, tmp_path: Path) -> Path:
    peftfx.save(program, tmp_path / "a")
    return tmp_path / "a"


def state(target: Any) -> tuple[str, dict[str, Tensor]]:
    module = target.module if isinstance(target, peftfx.Program) else target
    text = target.text() if isinstance(target, peftfx.Program) else ""
    return text, {n: t.clone() for n, t in module.state_dict().items()}


@contextlib.contextmanager
def refused(error: type[RewriteError], builtin: type[Exception], *words: str, of: Any = ()) -> Any:
    """An error of ours and of a builtin, with these words; the targets `of` are unchanged."""
    before = [state(target) for target in of]
    with pytest.raises(error) as caught:
        yield caught
    assert isinstance(caught.value, builtin)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    for target, (text, tensors) in zip(of, before, strict=True):
        again = state(target)
        assert again[0] == text and again[1].keys() == tensors.keys()
        for name, tensor in tensors.items():
            if not tensor.is_meta:
                torch.testing.assert_close(again[1][name], tensor, rtol=0, atol=0, equal_nan=True)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes an artifact's tensors, with digests that fit."""
    path = folder / "tensors.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    path.write_bytes(safetensors.torch.save(tensors))
    digests = {n: digest(t) for n, t in tensors.items()}
    edited(folder / "manifest.json", lambda m: m.update(tensors=digests))


def digest(tensor: Tensor) -> str:
    from peftfx.rewriter.files.identity import tensor_digest

    return tensor_digest(tensor)


def test_row_1_shapes_of_adapter_and_base(saved: Path) -> None:
    other = net(out=7)
    with refused(BaseMismatchError, ValueError, "2.bias", "Load the base", of=[other]):
        peftfx.load(other, saved)
    words = ("peftfx.lora.2.delta.b", "(6, 2)", "(7, 2)")
    with refused(CorruptFileError, ValueError, *words, of=[other]):
        peftfx.load(other, saved, allow_base_mismatch=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_row_2_not_finite(program: peftfx.Program, saved: Path, value: float) -> None:
    rewrite(saved, lambda t: t[A].view(-1).__setitem__(9, value))
    with refused(NonFiniteError, ValueError, A, "[1, 1]", of=[program.base]):
        peftfx.load(program.base, saved)
    with torch.no_grad():
        program.module.get_parameter(A)[1, 1] = value
    with refused(NonFiniteError, ValueError, A, "[1, 1]", "leave it out", of=[program]):
        peftfx.run(program, "fold")
    with refused(NonFiniteError, ValueError, A, "[1, 1]", of=[program]):
        peftfx.save(program, saved.parent / "b")
    assert not (saved.parent / "b").exists()


def test_row_2_not_finite_base_and_overflow() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[1, 2] = float("nan")  # pyright: ignore
    broken = peftfx.run(peftfx.capture(model, (X,)), LORA)
    with refused(NonFiniteError, ValueError, "0.weight", "[1, 2]", of=[broken]):
        peftfx.run(broken, "fold")
    half = randomise(peftfx.run(peftfx.capture(net().half(), (X.half(),)), LORA), 400.0)
    with refused(NonFiniteError, ValueError, "0.weight", "float16", of=[half]):
        peftfx.run(half, "fold")


@pytest.mark.parametrize("where", ["lniear", "linear|lniear", "linear and layer>=3", "re:'^9'"])
def test_row_3_no_site(base: peftfx.Program, where: str) -> None:
    words = ("matches none", "Nearest", "Say where")
    with refused(SelectorError, LookupError, *words, of=[base]):
        peftfx.run(base, f"lora{{where={where}}}")


def test_row_4_two_rules_for_a_site(base: peftfx.Program) -> None:
    both = peftfx.run(base, "lora{rank=2,where=linear|name:0|re:'^2'}")
    assert both.history[-1].edited == ("0.weight", "2.weight")
    words = ("0.weight", "'dora' already", "where=")
    with refused(PassError, RuntimeError, *words, of=[base]):
        peftfx.run(base, "dora{rank=2,where=linear};dora{rank=2,where=name:0,name=b}")


@pytest.mark.parametrize("name", ["a.b", "a b", "1a", "é", "a" * 65, "train", "class", "forward"])
def test_row_5_names(base: peftfx.Program, name: str) -> None:
    with refused(OptionError, ValueError, "lora", repr(name), of=[base]):
        peftfx.LoRA(name=name)


def test_row_5_a_name_twice(base: peftfx.Program, saved: Path) -> None:
    with refused(PassError, RuntimeError, "'lora' already", "name=", of=[base]):
        peftfx.run(base, [LORA, LORA])
    once = peftfx.load(base, saved)
    with refused(ArtifactError, ValueError, "'lora' already", "name='lora_2'", of=[once]):
        peftfx.load(once, saved)
    assert peftfx.load(once, saved, name="lora_2").adapters == ("lora", "lora_2")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=70))
def test_row_5_any_text_is_a_name_or_refused(name: str) -> None:
    try:
        item = peftfx.LoRA(name=name)
    except OptionError:
        return
    assert not name or NAME.fullmatch(item.adapter)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("rank", 0, "at least 1"), ("rank", -3, "at least 1"), ("rank", "8", "must be int"),
        ("rank", True, "must be int"), ("rank", 10**30, "64 bits"), ("rank", 2.0, "must be int"),
        ("alpha", float("nan"), "finite"), ("alpha", float("inf"), "finite"),
        ("alpha", "16", "must be float"), ("dropout", 1.5, "in [0, 1)"),
        ("dropout", -0.1, "in [0, 1)"), ("where", 3, "must be str"), ("seed", -1, "seed=-1"),
    ],
)  # fmt: skip
def test_row_6_values(option: str, value: Any, words: str) -> None:
    with refused(OptionError, ValueError, "lora", option, words):
        peftfx.LoRA(**{option: value})


def test_row_6_a_rank_above_the_weight(base: peftfx.Program) -> None:
    with refused(OptionError, ValueError, "0.weight", "rank=9", "at most 8", of=[base]):
        peftfx.run(base, "lora{rank=9,where=linear}")
    record = peftfx.run(base, "lora{rank=7,where=linear}").history[-1]
    assert record.edited == ("0.weight",)
    assert dict(record.skipped)["2.weight"].startswith("rank=7, but it must be at most 6")


def test_row_7_truncated_or_flipped(base: peftfx.Program, saved: Path) -> None:
    path = saved / "tensors.safetensors"
    good = path.read_bytes()
    for bad in (good[:-1], good[:5], b"", good[:-4] + bytes([good[-4] ^ 1]) + good[-3:]):
        path.write_bytes(bad)
        with refused(CorruptFileError, ValueError, str(path), of=[base]):
            peftfx.load(base, saved)


def _header(text: str | bytes, body: int = 32) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw + bytes(body)


def _entry(start: int, end: int, shape: str = "[4]") -> str:
    return f'{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}'


@pytest.mark.parametrize(
    "data",
    [
        _header(f'{{"a":{_entry(0, 16)},"b":{_entry(8, 24)}}}', 24),
        _header(f'{{"a":{_entry(0, 16)},"b":{_entry(20, 36)}}}', 36),
        _header(f'{{"a":{_entry(0, 2**63)}}}'),
        _header(f'{{"a":{_entry(-16, 0)}}}'),
        _header(f'{{"a":{_entry(0, 16, "[1073741824, 1073741824, 1073741824]")}}}'),
        _header(f'{{"a":{_entry(0, 16)},"a":{_entry(16, 32)}}}'),
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 200_000_000) + b"{}",
        _header('{"a":' + "[" * 100 + "]" * 100 + "}"),
    ],
    ids=["overlap", "hole", "overflow", "negative", "shape", "twice", "size", "bomb", "deep"],
)
def test_row_8_hostile_headers(base: peftfx.Program, saved: Path, data: bytes) -> None:
    (saved / "tensors.safetensors").write_bytes(data)
    with refused(CorruptFileError, ValueError, "tensors.safetensors", of=[base]):
        peftfx.load(base, saved)


@pytest.mark.parametrize(
    "text",
    [
        b'{"format_version":1,"format_version":1}', b'{"a":NaN}', b'{"a":-Infinity}', b"\xff\xfe{}",
        b"[" * 5000 + b"]" * 5000, b'{"a":' + b"9" * 5000 + b"}", b"[]", b"null", b"",
        b'{"format_version":"1"}', b'{"format_version":1,"surprise":1}', b'{"format_version":true}',
    ],
    ids=["twice", "nan", "inf", "utf", "deep", "huge", "list", "null", "empty", "type", "unknown",
         "bool"],
)  # fmt: skip
def test_row_9_json(base: peftfx.Program, saved: Path, text: bytes) -> None:
    (saved / "manifest.json").write_bytes(text)
    with refused(CorruptFileError, ValueError, "manifest.json", of=[base]):
        peftfx.load(base, saved)


def test_row_10_pickles_are_not_read(base: peftfx.Program, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(canary),)

    folder = tmp_path / "a"
    folder.mkdir()
    torch.save({"a": Payload()}, folder / "adapter_model.bin")
    torch.save({"a": Payload()}, folder / "pytorch_model.bin")
    with refused(ArtifactError, ValueError, "manifest.json", of=[base]):
        peftfx.load(base, folder)
    with refused(ArtifactError, ValueError, "safetensors", of=[base]):
        peftfx.load_weights(base, folder)
    (folder / "manifest.json").write_bytes((folder / "pytorch_model.bin").read_bytes())
    with refused(CorruptFileError, ValueError, "manifest.json", of=[base]):
        peftfx.load(base, folder)
    assert not canary.exists()


def test_row_11_names_of_classes(base: peftfx.Program, saved: Path) -> None:
    for text in ("os.system{x=1}", "peftfx.LoRA", "__import__"):
        with refused(OptionError, ValueError, text[:9], of=[base]):
            peftfx.run(base, text)
    with refused(OptionError, ValueError, "not YAML"):
        parse_yaml("- !!python/object/apply:os.system ['true']")
    edited(saved / "manifest.json", lambda m: m["recipe"][0].update({"pass": "builtins.print"}))
    with refused(CorruptFileError, ValueError, "recipe[0]", "builtins.print", of=[base]):
        peftfx.load(base, saved)


@pytest.mark.parametrize(("version", "error"), [(99, FormatTooNewError), (0, CorruptFileError)])
def test_row_12_versions(base: peftfx.Program, saved: Path, version: int, error: Any) -> None:
    manifest = json.loads((saved / "manifest.json").read_text()) | {"format_version": version}
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with refused(error, ValueError, "manifest.json", str(version), of=[base]):
        peftfx.load(base, saved)


def test_row_13_another_base(saved: Path) -> None:
    other = net()
    with torch.no_grad():
        weight: Tensor = other[2].weight  # pyright: ignore
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    words = ("1 differ (first: 2.weight)", "allow_base_mismatch")
    with refused(BaseMismatchError, ValueError, *words, of=[other]):
        peftfx.load(other, saved)
    assert peftfx.load(other, saved, allow_base_mismatch=True).adapters == ("lora",)


def test_row_14_folded_twice_and_back(program: peftfx.Program, saved: Path) -> None:
    once = peftfx.run(program, "fold")
    twice = peftfx.run(once, "fold")
    assert torch.equal(twice(X), once(X)) and not twice.history[-1].edited
    with refused(ArtifactError, ValueError, "'lora' already", "name=", of=[once]):
        peftfx.load(once, saved)
    for _ in range(3):
        once = peftfx.run(once.without("lora"), LORA)
    assert torch.equal(once.without("lora")(X), program.base(X))


def test_row_15_fold_into_integers(base: peftfx.Program) -> None:
    mixed = randomise(peftfx.run(base, f"peqa{{group=4,where=linear}};{LORA}"))
    with refused(FoldError, RuntimeError, "0.weight", "4 bits", "Keep the branch", of=[mixed]):
        peftfx.run(mixed, "fold{names=[lora]}")
    left = peftfx.run(mixed, "fold").history[-1]
    assert not left.edited and "4 bits" in left.skipped[0][1]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))


def test_row_16_tied_weights() -> None:
    tied = peftfx.capture(Tied().eval(), (torch.arange(6).view(2, 3),))
    tied = randomise(peftfx.run(tied, LORA))
    with refused(FoldError, RuntimeError, "tied", "untie", "keep", "both", of=[tied]):
        peftfx.run(tied, "fold")
    assert peftfx.run(tied, "fold{tied=untie}").history[-1].certificate.holds


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.relu(self.a(x)))


def test_row_17_a_module_called_twice() -> None:
    shared = peftfx.run(peftfx.capture(Twice().eval(), (X,)), LORA)
    assert len(shared.attachments) == 1 and len(shared.trainable_parameters()) == 2
    folded = peftfx.run(randomise(shared), "fold")
    torch.testing.assert_close(folded(X), shared(X))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.randn(2, 9), ("axis 1", "size 9", "dynamic=")), (torch.randn(8), ("f32[8]",)),
        (torch.randn(0, 8), ("size 0", "range 1")), (torch.randn(2, 8).double(), ("f64[2, 8]",)),
        ("x", ("a tensor, not str",)),
    ],
)  # fmt: skip
def test_row_18_inputs(base: peftfx.Program, value: Any, words: tuple[str, ...]) -> None:
    with refused(InputError, ValueError, "'input'", *words, of=[base]):
        base(value)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "_exchange"])
def test_rows_19_and_20_disk_full_and_killed(
    program: peftfx.Program, saved: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: Any
) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    randomise(program, seed=5)

    def failing(*_: Any) -> None:
        raise error

    expected = ArtifactError if isinstance(error, OSError) else KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(os if call == "fsync" else directory, call, failing)
        with pytest.raises(expected, match="No space left" if expected is ArtifactError else None):
            peftfx.save(program, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    peftfx.save(program, saved)
    assert [p.name for p in saved.parent.iterdir()] == ["a"]


def test_row_21_saved_over_what_was_loaded(base: peftfx.Program, saved: Path) -> None:
    loaded = peftfx.load(base, saved)
    want = loaded(X)
    for _ in range(2):
        peftfx.save(loaded, saved)
        loaded = peftfx.load(base, saved)
        assert torch.equal(loaded(X), want)


def test_row_22_strides(tmp_path: Path) -> None:
    model = net()
    model[0].weight = nn.Parameter(torch.randn(8, 8).T, requires_grad=False)  # pyright: ignore
    model[2].weight = nn.Parameter(torch.randn(1, 8).expand(6, 8), requires_grad=False)  # pyright: ignore
    program = randomise(peftfx.run(peftfx.capture(model, (X,)), LORA))
    branch = program.module.get_submodule("peftfx.lora.2.delta")
    branch.a = nn.Parameter(torch.randn(1, 8).expand(2, 8))
    peftfx.save(program, tmp_path / "a")
    torch.testing.assert_close(peftfx.load(model, tmp_path / "a")(X), program(X))
    torch.testing.assert_close(peftfx.run(program, "fold")(X), program(X))


def test_row_22_sparse_weights() -> None:
    model = net()
    model[0].weight = nn.Parameter(torch.eye(8).to_sparse(), requires_grad=False)  # pyright: ignore
    with refused(CaptureError, ValueError, "Sequential"):
        peftfx.capture(model, (X,))


def test_row_23_no_values(saved: Path) -> None:
    model = net().to("meta")
    hollow = peftfx.run(peftfx.capture(model, (X,)), LORA)
    calls: list[Callable[[], Any]] = [
        lambda: peftfx.save(hollow, saved.parent / "b"),
        lambda: peftfx.run(hollow, "fold"),
        lambda: peftfx.load(model, saved),
        lambda: peftfx.save_program(hollow, saved.parent / "b"),
    ]
    for call in calls:
        with refused(MetaTensorError, RuntimeError, "oad", "weights", of=[hollow]):
            call()
    assert hollow.history[-1].certificate.kind == "unmeasured"
    assert not (saved.parent / "b").exists()


def test_row_24_mixed_dtypes_round_once() -> None:
    program = peftfx.run(peftfx.capture(net().bfloat16(), (X.bfloat16(),)), LORA)
    randomise(program, 0.3)
    branch: Any = program.module.get_submodule("peftfx.lora.0.delta")
    assert branch.a.dtype == torch.float32
    weight = program.module.get_parameter("0.weight").double()
    exact = weight + branch.scale * branch.b.double() @ branch.a.double()
    folded = peftfx.run(program, "fold").module.get_parameter("0.weight")
    assert torch.equal(folded, exact.bfloat16())


def test_row_25_other_kernels(program: peftfx.Program) -> None:
    """Certificates ask for rounding, not for the bits of one instruction set."""
    folded = peftfx.run(program, "fold")
    with torch.backends.mkldnn.flags(enabled=False):
        assert all(c.holds for c in folded.verify())


def test_row_26_no_such_device(base: peftfx.Program) -> None:
    devices = ["nowhere"] if torch.cuda.is_available() else ["nowhere", "cuda"]
    for device in devices:
        with refused(CaptureError, ValueError, repr(device), "Choose a device", of=[base]):
            base.to(device)


@pytest.mark.parametrize("opset", [0, 99])
def test_row_27_opsets(base: peftfx.Program, tmp_path: Path, opset: int) -> None:
    pytest.importorskip("onnx")
    with refused(ExportError, RuntimeError, f"no opset {opset}", "1..", of=[base]):
        peftfx.export_onnx(base, tmp_path / "a.onnx", opset=opset)
    assert not (tmp_path / "a.onnx").exists()


def test_row_28_folder_of_an_export(base: peftfx.Program, tmp_path: Path) -> None:
    """Nothing is written outside of the one file that was asked for."""
    pytest.importorskip("onnx")
    with refused(ExportError, RuntimeError, "nowhere", of=[base]):
        peftfx.export_onnx(base, tmp_path / "nowhere" / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_row_29_a_decision_by_values() -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                return self.a(x)
            return x

    model = Chooses().eval()
    words = ("Chooses", "test_bad_input.py:", "torch.where")
    with refused(CaptureError, ValueError, *words, of=[model]):
        peftfx.capture(model, (X,))


def test_row_30_missing_and_extra_tensors(base: peftfx.Program, saved: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["peftfx.lora.9.delta.a"] = tensors.pop(A)

    before = copy.deepcopy({p.name: p.read_bytes() for p in saved.iterdir()})
    rewrite(saved, lambda t: t.pop(A))
    with refused(CorruptFileError, ValueError, A, "missing", of=[base]):
        peftfx.load(base, saved)
    rewrite(saved, lambda t: t.update({A: torch.zeros(2, 8), "more": torch.zeros(2)}))
    with refused(CorruptFileError, ValueError, "'more'", "belongs to no adapter", of=[base]):
        peftfx.load(base, saved)
    for name, data in before.items():
        (saved / name).write_bytes(data)
    rewrite(saved, rename)
    with refused(CorruptFileError, ValueError, A, "missing", of=[base]):
        peftfx.load(base, saved)


def test_row_31_sizes_that_fit_no_memory(base: peftfx.Program, captured: Any) -> None:
    with refused(OptionError, ValueError, "at most 8", of=[base]):
        peftfx.run(base, "lora{rank=100000000000,where=linear}")
    encoder = captured["encoder"][1]
    for size in (10**13, 2**62):
        with refused(PassError, RuntimeError, "memory", "smaller", of=[encoder]):
            peftfx.run(encoder, f"serial_adapter{{bottleneck={size},norms=false}}")


@pytest.fixture
def broken() -> Generator[type[Pass]]:
    class Broken(Pass):
        """Edits the graph so that it names a tensor that is not there, or calls too early."""

        def apply(self, edit: Any, plan: Any) -> None:
            graph = edit.graph_module.graph
            call = next(n for n in graph.nodes if n.name.startswith("relu"))
            with graph.inserting_before(call):
                missing = graph.get_attr("nowhere")
            missing.meta["val"] = call.meta["val"]
            call.update_arg(0, missing)

    yield Broken
    REGISTRY.pop(Broken.text)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_row_32_a_pass_that_breaks_the_graph(base: peftfx.Program, broken: type[Pass]) -> None:
    with refused(VerifyError, RuntimeError, "malformed", "nowhere", of=[base]):
        peftfx.run(base, broken())


def test_files_have_the_hash_that_the_manifest_says(saved: Path) -> None:
    digests = json.loads((saved / "manifest.json").read_text())["tensors"]
    held = files.read_tensors(saved / "tensors.safetensors", digests)
    assert held.keys() == digests.keys()
    assert len({hashlib.sha256(d.encode()).hexdigest() for d in digests.values()}) == len(digests)
