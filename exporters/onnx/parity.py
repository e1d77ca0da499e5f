"""ONNX Runtime against the program: sessions, padding, and how far two outputs are apart."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...rewriter.api import Program
from ...rewriter.edits.prompts.tokens import meaning_of
from ...rewriter.errors import ExportError
from ...rewriter.graph.aten import placeholders, shape, value
from .translate import Exported


def require(name: str) -> Any:
    """Imports an optional package.

    Raises:
        ExportError: it is not installed; says how to get it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(
            f"ONNX export needs the package {name!r}: pip install 'peftfx[onnx]' "
            "(or 'peftfx[onnx-gpu]', never both)."
        ) from error


def session(path: str | Path, threads: int = 0) -> Any:
    """A CPU session of ONNX Runtime.

    Raises:
        ExportError: the runtime refuses the file.
    """
    ort: Any = require("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime refuses {path}: {error}") from error


def masks_of(program: Program, exported: Exported) -> tuple[str | None, ...]:
    """For each tensor output, the input that says which of its rows are padding, if any.

    That is an integer or boolean input `[batch, tokens]` whose values go into attention alone, of
    the sizes that the output starts with.
    """
    values = {n.name: value(n) for n in exported.nodes}

    def sizes(tensor: Tensor) -> tuple[str, ...]:
        return tuple(exported.symbols.get(str(s), str(s)) for s in tensor.shape[:2])

    masks: dict[tuple[str, ...], str] = {}
    for name, source in placeholders(program.module).items():
        given = values.get(name)
        if not isinstance(given, Tensor) or given.is_floating_point() or given.dim() != 2:
            continue
        dims = shape(source)
        if dims is None or isinstance(dims[1], int) or meaning_of(program, source) != "mask":
            continue
        masks.setdefault(sizes(given), name)
    outputs = [values.get(str(n)) for n in exported.program.graph_signature.user_outputs]
    return tuple(masks.get(sizes(v)) for v in outputs if isinstance(v, Tensor))


def padded(feed: Mapping[str, Tensor], masks: Sequence[str | None]) -> dict[str, Tensor]:
    """Masks the last two tokens of the first of several rows."""
    changed = dict(feed)
    for name in {m for m in masks if m is not None}:
        mask = feed[name].clone()
        if mask.shape[0] >= 2 and mask.shape[1] >= 4:
            mask[0, -2:] = 0
            changed[name] = mask
    return changed


def gap(name: str, expected: Tensor, result: Any, mask: Tensor | None) -> float:
    """Largest difference relative to the largest finite value, on rows that are not padding.

    Args:
        name: of the output.
        expected, result: the program's tensor and ONNX Runtime's array.
        mask: `[batch, tokens]`, zero where the output's rows are padding.

    Returns:
        Infinity where integers differ, or where only one of the two is finite.

    Raises:
        ExportError: the shapes differ.
    """
    got = torch.as_tensor(np.asarray(result)) if not isinstance(result, Tensor) else result
    got, want = got.detach().cpu(), expected.detach().cpu()
    if got.shape != want.shape:
        raise ExportError(f"output {name!r} is {tuple(got.shape)}, expected {tuple(want.shape)}.")
    if mask is not None:
        rows = mask.bool().cpu()
        got, want = got[rows], want[rows]
    if not want.numel():
        return 0.0
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    got, want = got.double(), want.double()
    apart = torch.where(got == want, 0.0, (got - want).abs())
    largest = float(torch.where(torch.isfinite(want), want.abs(), 0.0).max())
    worst = float(apart.nan_to_num(float("inf")).max())
    return worst / max(largest, 1e-30)
