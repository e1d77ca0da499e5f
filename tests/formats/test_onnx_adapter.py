"""Adapters as inputs of an ONNX model, and their files: what ONNX Runtime computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.cli import main
from peftfx.exporters.formats import format_of, load_adapter, save_adapter
from peftfx.exporters.onnx.adapter import save
from peftfx.exporters.onnx.adapter_file import parse_onnx_adapter
from peftfx.rewriter.errors import ArtifactError, CorruptFileError, ExportError, NonFiniteError

from ..damage import cuts, flips
from ..models import Decoder, batch, first, randomise
from .peft_cases import base, inputs, output, program, write
from .test_hf_peft import near

pytestmark = pytest.mark.filterwarnings("ignore")

QUERY = "layers.0.q_proj"
A, B = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"


def values_of(path: Path) -> dict[str, Tensor]:
    """A file's tensors, by ONNX Runtime (which lends the memory)."""
    runtime: Any = ort
    values = runtime.AdapterFormat.read_adapter(str(path)).get_parameters()
    return {k: torch.from_numpy(v.numpy().copy()) for k, v in values.items()}


def by_runtime(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a file with ONNX Runtime."""
    runtime: Any = ort
    made = runtime.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    made.set_parameters(
        {n: runtime.OrtValue.ortvalue_from_numpy(t.numpy()) for n, t in tensors.items()}
    )
    made.export_adapter(str(path))


@pytest.fixture(scope="module")
def decoder() -> peftfx.Program:
    torch.manual_seed(0)
    return peftfx.capture(Decoder(layers=1).eval(), kwargs=batch())


@pytest.fixture(scope="module")
def slotted(decoder: peftfx.Program, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model with slots at q, v and down, exported with factors of rank 2."""
    path = tmp_path_factory.mktemp("slots") / "model.onnx"
    made = randomise(peftfx.run(decoder, "lora{rank=2,alpha=6,where=q|v|ffn.down}"), 0.3)
    return path, peftfx.export_onnx(made, path, slots=True)


def computed(path: Path, adapter: Path | None) -> Tensor:
    """By ONNX Runtime, with its own reader of adapters."""
    options = ort.RunOptions()
    loaded = ort.LoraAdapter()
    if adapter is not None:
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {n: t.numpy() for n, t in batch().items()}
    return torch.from_numpy(session.run(None, feeds, options)[0])


def test_a_slot_takes_any_adapter_of_any_rank(
    decoder: peftfx.Program, slotted: tuple[Path, Any], tmp_path: Path
) -> None:
    path, report = slotted
    assert any("no adapter" in key for key in report.parity) and report.error < 1e-5
    near(computed(path, None), first(decoder(**batch())))
    for index, recipe in enumerate(
        ("lora{rank=2,alpha=6,where=q|v|ffn.down}", "lora{rank=5,where=v}", "dora{rank=3,where=q}")
    ):
        made = randomise(peftfx.run(decoder, recipe), 0.3)
        file = tmp_path / f"{index}.onnx_adapter"
        rank = 32 if "dora" in recipe else None  # of a whole matrix
        assert not save_adapter(made, file, "onnx_adapter", rank=rank)
        want = first(made(**batch()))
        assert (want - first(decoder(**batch()))).abs().max() > 0.01 * want.abs().max()
        near(computed(path, file), want)
        assert format_of(file) == "onnx_adapter"
        near(first(load_adapter(decoder, file)(**batch())), want)


def test_ranks_that_differ_by_site(
    decoder: peftfx.Program, slotted: tuple[Path, Any], tmp_path: Path
) -> None:
    """Small ones first, which is what one shared size for the rank cannot do."""
    made = randomise(
        peftfx.run(decoder, "lora{rank=1,where=q};lora{rank=6,where=ffn.down,name=more}"), 0.3
    )
    for name in ("lora", "more"):
        save_adapter(made, tmp_path / name, "onnx_adapter", name)
    values: dict[str, Tensor] = {}
    for name in ("lora", "more"):
        values |= values_of(tmp_path / name)
    save(tmp_path / "both.onnx_adapter", values)
    near(computed(slotted[0], tmp_path / "both.onnx_adapter"), first(made(**batch())))


def test_a_directory_of_peft_becomes_a_file(tmp_path: Path) -> None:
    """As Olive lays it out: factors turned round, the scale of each module in B."""
    want = write("patterns", tmp_path / "peft")
    read = peftfx.load_peft(program("llama"), tmp_path / "peft")
    save_adapter(read, tmp_path / "a.onnx_adapter", "onnx_adapter")
    near(
        output(load_adapter(program("llama"), tmp_path / "a.onnx_adapter")(**inputs("llama"))), want
    )
    model, arrays = base("llama"), values_of(tmp_path / "a.onnx_adapter")
    with torch.no_grad():
        for name, a in arrays.items():
            if name.endswith("lora_A.weight"):
                module = name.removesuffix(".lora_A.weight")
                change = a @ arrays[f"{module}.lora_B.weight"]
                model.get_submodule(module).weight += change.T
        near(output(model(**inputs("llama"))), want)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


BAD: dict[str, tuple[dict[str, Tensor], type[Exception], str]] = {
    "no partner": ({A: draw(32, 2)}, ArtifactError, "lora_A.weight alone"),
    "ranks": ({A: draw(32, 2), B: draw(3, 32)}, ArtifactError, "ranks do not agree"),
    "another model": ({A.replace("q_", "x_"): draw(32, 2), B.replace("q_", "x_"): draw(2, 32)},
                      ArtifactError, "no 'layers.0.x_proj.weight'. Nearest"),
    "unknown": ({A: draw(32, 2), B: draw(2, 32), f"{QUERY}.dora_M": draw(32)}, ArtifactError,
                "dora_M' is not understood"),
    "codes": ({A: torch.ones(4, dtype=torch.uint8)}, ArtifactError, "uint8"),
    "not a number": ({A: draw(32, 2) * float("inf"), B: draw(2, 32)}, NonFiniteError, "infinity"),
    "nothing": ({}, ArtifactError, "holds nothing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(BAD))
def test_a_bad_file_is_refused(fault: str, decoder: peftfx.Program, tmp_path: Path) -> None:
    tensors, kind, text = BAD[fault]
    by_runtime(tmp_path / "a.onnx_adapter", tensors)
    with pytest.raises(kind, match=text) as caught:
        load_adapter(decoder, tmp_path / "a.onnx_adapter")
    assert "a.onnx_adapter" in str(caught.value) and not decoder.adapters


def test_a_cut_file_is_refused(decoder: peftfx.Program, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx_adapter"
    save(path, {A: draw(32, 2), B: draw(2, 32)})
    for bad in (b for b in cuts(path.read_bytes(), 12) if len(b) >= 8):
        path.write_bytes(bad)
        with pytest.raises(CorruptFileError, match="is damaged"):
            load_adapter(decoder, path)


def test_each_tensor_is_what_the_runtime_reads(tmp_path: Path) -> None:
    """Of all types, sizes and alignments; files are read and written without it."""
    path = tmp_path / "a.onnx_adapter"
    tensors = {"a": draw(3, 5), "bb": draw(7).half(), "ccc": draw(2, 1, 3).double(),
               "empty": torch.empty(0, 4)}  # fmt: skip
    save(path, tensors)
    ours, theirs = parse_onnx_adapter(path.read_bytes(), "it"), values_of(path)
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype
        assert tensor.shape == theirs[name].shape
    by_runtime(path, tensors)
    again = parse_onnx_adapter(path.read_bytes(), "it")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[n], t) and again[n].dtype == t.dtype for n, t in tensors.items())


def test_only_floats_are_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="int64, which no factor is"):
        save(tmp_path / "a.onnx_adapter", {A: torch.ones(2, dtype=torch.int64)})
    assert not list(tmp_path.iterdir())


def test_damage_is_an_error_or_the_tensors(tmp_path: Path) -> None:
    """Nothing outside of the file is read, and no more than it holds."""
    path = tmp_path / "a.onnx_adapter"
    save(path, {A: draw(3, 2), B: draw(2, 4)})
    refused, good = 0, path.read_bytes()
    for bad in flips(good, 400):
        try:
            read = parse_onnx_adapter(bad, "it")
        except ArtifactError:
            refused += 1
        else:
            assert sum(t.nbytes for t in read.values()) <= len(bad)
    assert refused > 50
    with pytest.raises(CorruptFileError, match="is there twice"):
        parse_onnx_adapter(good.replace(B.encode(), A.encode()), "it")


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ("dora{rank=2,where=q}", "factors beside products alone"),
        ("lora{rank=2,where=embedding.token}", "factors beside products alone"),
        ("ia3", "factors beside products alone"),
        ("lora{rank=2,where=q,name=x};lora{rank=2,where=v,name=y}", "say which"),
    ],
)
def test_what_has_no_slot_is_refused(
    recipe: str, text: str, decoder: peftfx.Program, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=text):
        peftfx.export_onnx(peftfx.run(decoder, recipe), tmp_path / "a.onnx", slots=True)
    assert not list(tmp_path.iterdir())


def test_one_adapter_of_several_has_slots(tmp_path: Path) -> None:
    """The other one stays in the graph; a head that shares the table has its own name."""
    torch.manual_seed(0)
    tied = peftfx.capture(Decoder(layers=1, tied=True).eval(), kwargs=batch())
    made = randomise(peftfx.run(tied, "lora{rank=2,where=q|head};ia3"), 0.3)
    peftfx.export_onnx(made, tmp_path / "a.onnx", slots="lora")
    save_adapter(made, tmp_path / "a.onnx_adapter", "onnx_adapter", "lora")
    assert "head.lora_A.weight" in values_of(tmp_path / "a.onnx_adapter")
    near(computed(tmp_path / "a.onnx", None), first(made.without("lora")(**batch())))
    near(computed(tmp_path / "a.onnx", tmp_path / "a.onnx_adapter"), first(made(**batch())))


def tiny() -> Any:
    torch.manual_seed(0)
    return Decoder(layers=1).eval(), batch()


def test_on_the_command_line(decoder: peftfx.Program, tmp_path: Path) -> None:
    model, made = f"{__name__}:tiny", randomise(peftfx.run(decoder, "lora{rank=2,where=q|v}"), 0.3)
    peftfx.save(made, tmp_path / "adapter")
    file, graph = tmp_path / "a.onnx_adapter", tmp_path / "a.onnx"
    adapter = str(tmp_path / "adapter")
    assert main(["convert", adapter, str(file), "--to", "onnx_adapter", "--base", model]) == 0
    assert main(["export", model, "--adapter", adapter, "--slots", "--out", str(graph)]) == 0
    near(computed(graph, file), first(made(**batch())))
    session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    bound = {k: v.numpy() for k, v in (batch() | values_of(file)).items()}
    near(torch.from_numpy(session.run(None, bound)[0]), first(made(**batch())))
