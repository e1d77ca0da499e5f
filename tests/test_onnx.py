"""ONNX: every method exports, names stay, ONNX Runtime agrees, and failure leaves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import peftfx
from peftfx.exporters.onnx import export as onnx_export
from peftfx.rewriter.errors import ExportError, NonFiniteError
from peftfx.rewriter.graph.output_class import ALONE

from .models import batch, first, moved, randomise
from .recipes import METHODS, least_change, stacked, stated

onnx = pytest.importorskip("onnx")

STACKED = 3
"""Methods in one file: half of an export's time is that of the model below."""


@pytest.mark.parametrize(
    "methods", [METHODS[i : i + STACKED] for i in range(0, len(METHODS), STACKED)], ids="-".join
)
def test_every_method_exports(captured: Any, methods: tuple[str, ...], tmp_path: Path) -> None:
    """On one block (a second one is the first once more), together with others that it stacks with."""
    base = captured["tiny"][1]
    for method in methods:
        alone = randomise(captured.placed("tiny", method), stated(method, "STRENGTH", 0.3))
        share = moved(first(base(**batch())), first(alone(**batch())))
        assert share > least_change(method, "tiny")
    for number, program in enumerate(stacked(captured, "tiny", methods)):
        strength = min(stated(a, "STRENGTH", 0.3) for a in program.adapters)
        (tmp_path / str(number)).mkdir()
        output = ALONE if program.outputs_added else "output_0"
        exports(randomise(program, strength), output, tmp_path / str(number))


def test_an_encoder_exports(captured: Any, tmp_path: Path) -> None:
    """Whose mask holds for all queries, which takes an older operator set."""
    program = randomise(peftfx.run(captured["encoder"][1], "lora;prefix_tuning"), 0.3)
    assert moved(first(captured["encoder"][1](**batch())), first(program(**batch()))) > 0.01
    exports(program, "output_0", tmp_path)


def test_what_was_folded_exports(captured: Any, tmp_path: Path) -> None:
    _, base = captured["llama"]
    program = randomise(peftfx.run(base, "lora;ia3"), 0.3)
    assert moved(first(base(**batch())), first(program(**batch()))) > 0.01
    exports(peftfx.run(program, "fold"), "logits", tmp_path)


def exports(program: peftfx.Program, output: str, tmp_path: Path) -> None:
    """The file computes what the program does, under its names."""
    report = peftfx.export_onnx(program, tmp_path / "m.onnx")
    assert report.error <= 1e-5 and len(report.parity) == 3
    graph = onnx.load(str(report.path)).graph
    kept = {n for n, _ in program.module.named_parameters()}
    assert kept <= {i.name for i in graph.initializer}
    sizes = [d.dim_param for d in graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", "sequence"]
    assert [i.name for i in graph.input] == list(program.spec.names)
    assert graph.output[0].name == output
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("name", ["t5", "vit", "phi3"])
def test_folded_lora_exports_elsewhere(zoo: Any, name: str, tmp_path: Path) -> None:
    """An encoder-decoder, a vision model, and fused projections."""
    program = randomise(peftfx.run(zoo[name], "lora{rank=4}"), 0.1)
    report = peftfx.export_onnx(peftfx.run(program, "fold"), tmp_path / "m.onnx")
    assert report.error <= 1e-5
    graph = onnx.load(str(report.path)).graph
    assert not any("peftfx" in i.name for i in graph.initializer)


def test_a_wrong_file_never_appears(
    captured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base = captured["encoder"]
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(onnx_export, "OPSETS", (20,))
    with pytest.raises(ExportError, match="differs by"):
        peftfx.export_onnx(base, path, tolerance=-1.0)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    program = randomise(peftfx.run(base, "lora"))
    with torch.no_grad():
        program.trainable_parameters()[0].fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        peftfx.export_onnx(program, path)
    with pytest.raises(ExportError, match="does not exist"):
        peftfx.export_onnx(base, tmp_path / "no" / "m.onnx")


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"peftfx\[onnx\]"):
        onnx_export.require("a_package_that_is_not_there")
