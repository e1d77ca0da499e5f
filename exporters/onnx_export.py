"""ONNX export that proves itself: a file appears only after ONNX Runtime has run it and agreed.

The program is re-exported in evaluation mode, translated by `torch.onnx`, given back its names
(parameters, inputs, outputs, dynamic sizes), checked, and run at other batch and sequence sizes
with padding. What differs by more than the tolerance is an error and leaves no file.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..rewriter.capture.probes import probes
from ..rewriter.edits.edit import Editor
from ..rewriter.edits.lowering import restore_deltas
from ..rewriter.edits.quantised import repack
from ..rewriter.errors import ArtifactError, ExportError, MetaTensorError, NonFiniteError
from ..rewriter.fingerprint import require_unchanged
from ..rewriter.program import Program
from ..rewriter.running.verify import evaluation, is_meta
from ..rewriter.sharded import require_whole
from ..rewriter.storage.files import new_file
from .onnx_quantised import LAYOUT, translations

OPSETS = (24, 20)
"""Tried in order: 24 has a real Attention operator; 20 runs on older runtimes."""

LIMIT = 1_800_000_000
"""Largest model in bytes; one protobuf file cannot hold more than 2 GB."""


@dataclass(frozen=True)
class OnnxReport:
    """What was written and how far ONNX Runtime is from the program.

    Attributes:
        path: the file.
        opset: its operator set.
        nodes: number of graph nodes.
        size: bytes.
        inputs, outputs: names.
        parity: {"batch=2, sequence=12": largest difference relative to the largest output}, for
            all sizes that were run; the key is `fixed sizes` where none is dynamic.
        limits: what the program's spec says of sizes: ranges, relations and fixed ones; the file
            has them as its metadata `peftfx.limits`.
    """

    path: Path
    opset: int
    nodes: int
    size: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parity: Mapping[str, float]
    limits: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The worst parity figure."""
        return max(self.parity.values())

    def __str__(self) -> str:
        text = (
            f"{self.path}: opset {self.opset}, {self.nodes} nodes, {self.size / 1e6:.1f} MB, "
            f"parity {self.error:.1e} of the largest output at {'; '.join(self.parity)}"
        )
        return "; ".join((text, *self.limits))


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


def export_onnx(
    program: Program,
    path: str | Path,
    *,
    opset: int | None = None,
    tolerance: float = 1e-5,
) -> OnnxReport:
    """Writes a program, folded or not, as one ONNX file and verifies it in ONNX Runtime.

    Args:
        program: not changed; its mode is irrelevant (evaluation is exported).
        path: of the file; replaced atomically.
        opset: operator set; the newest of `OPSETS` that passes by default.
        tolerance: largest difference allowed, relative to the largest output.

    Raises:
        ExportError: an operator has no translation, the checker or ONNX Runtime refuses the
            file, or results differ; no file is left and an old one is kept.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require(name)
    require_whole(program.module, "export_onnx")
    require_unchanged(program)
    if is_meta(program):
        raise MetaTensorError("parameters are on the meta device; load weights before exporting.")
    for name, parameter in program.module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(f"{name} holds NaN or infinity; nothing was exported.")
    size = sum(t.numel() * t.element_size() for t in program.module.state_dict().values())
    if size > LIMIT:
        raise ExportError(
            f"the parameters take {size / 1e9:.1f} GB; one ONNX file holds {LIMIT / 1e9:.1f} GB. "
            "Export in bfloat16 or quantise first."
        )
    newest: int = require("onnx").defs.onnx_opset_version()
    if opset is not None and not 1 <= opset <= newest:
        raise ExportError(
            f"there is no opset {opset}: the newest that is known here is {newest}. Choose "
            f"{' or '.join(map(str, OPSETS))}, or leave it out."
        )
    path = Path(path)
    if not path.parent.is_dir():
        raise ExportError(f"the folder {path.parent} does not exist.")
    failures: list[str] = []
    for version in (opset,) if opset is not None else OPSETS:
        try:
            return _attempt(program, path, version, tolerance)
        except ExportError as error:
            failures.append(f"opset {version}: {error}")
    raise ExportError("the program cannot be exported. " + " | ".join(failures))


def _attempt(program: Program, path: Path, opset: int, tolerance: float) -> OnnxReport:
    onnx: Any = require("onnx")
    fork = program.fork()
    plain = Editor(fork)
    restore_deltas(plain)
    quantised = repack(plain, LAYOUT)
    plain.finish()
    names = _output_names(fork)
    with evaluation(fork), _silence():
        exported, symbols = _reexport(fork)
        table = translations() if quantised else None
        model = _translate(exported, opset, fork.spec.names, names, table)
    _rename_sizes(model, symbols)
    for text in fork.spec.limits[:1]:
        note = model.metadata_props.add()
        note.key, note.value = "peftfx.limits", "; ".join((text, *fork.spec.limits[1:]))
    try:
        with new_file(path) as fresh:
            onnx.save_model(model, str(fresh))
            parity = _verify(fork, str(fresh), names, tolerance)
    except ArtifactError as error:
        raise ExportError(str(error)) from error
    nodes = len(model.graph.node)
    size, limits = path.stat().st_size, fork.spec.limits
    return OnnxReport(path, opset, nodes, size, fork.spec.names, names, parity, limits)


@contextlib.contextmanager
def _silence() -> Generator[None]:
    """torch.onnx narrates; what matters comes back as errors."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _sizes(program: Program) -> list[dict[str, int]]:
    """The sizes of the parity runs; all are two at least in the first, where they may be."""
    return probes(program.spec, program.spec.sizes_of(program.sample))


def _output_names(program: Program) -> tuple[str, ...]:
    with evaluation(program):
        output = program.module(**program.spec.resize(program.sample, **_sizes(program)[0]))
    names: list[str] = []
    for path, leaf in pytree.tree_flatten_with_path(output)[0]:
        if isinstance(leaf, Tensor):
            text = "_".join(s for p in path if (s := _key(p)))
            names.append(text if text and not text[0].isdigit() else f"output_{text or 0}")
    return tuple(names)


def _key(part: Any) -> str:
    found = (getattr(part, n) for n in ("key", "name", "idx") if hasattr(part, n))
    return str(next(found, ""))


def _reexport(program: Program) -> tuple[Any, dict[str, str]]:
    example = program.spec.resize(program.sample, **_sizes(program)[0])
    try:
        exported = torch.export.export(
            program.module, (), example, dynamic_shapes=program.spec.dynamic_shapes(), strict=False
        )
    except Exception as error:
        raise ExportError(f"re-export fails: {type(error).__name__}: {error}") from error
    symbols: dict[str, str] = {}
    held = {n.name: n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"}
    for spec in program.spec.inputs:
        value = held.get(spec.name)
        held_shape: tuple[Any, ...] = tuple(value.shape) if value is not None else ()
        for size, label in zip(held_shape, spec.shape, strict=False):
            if isinstance(label, str) and not isinstance(size, int):
                symbols[str(size)] = label
    return exported, symbols


def _translate(
    exported: Any, opset: int, inputs: Sequence[str], outputs: Sequence[str], table: Any
) -> Any:
    try:
        # Unoptimised keeps original parameter names; the runtime folds transposes as it loads.
        result: Any = torch.onnx.export(
            exported,
            (),
            None,
            dynamo=True,
            verbose=False,
            optimize=False,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            custom_translation_table=table,
        )
        return result.model_proto
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ExportError(
            f"translation fails: {type(error).__name__}: {reason[0] if reason else ''}"
        ) from error


def _rename_sizes(model: Any, symbols: Mapping[str, str]) -> None:
    graph = model.graph
    for info in (*graph.input, *graph.output, *graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(
                    r"\bs\d+\b", lambda m: symbols.get(m[0], m[0]), dim.dim_param
                )


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


def _verify(
    program: Program, path: str, names: Sequence[str], tolerance: float
) -> dict[str, float]:
    onnx: Any = require("onnx")
    try:
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:
        raise ExportError(f"the ONNX checker refuses the model: {error}") from error
    running = session(path)
    wanted = {i.name for i in running.get_inputs()}
    parity: dict[str, float] = {}
    for sizes in _sizes(program):
        key = ", ".join(f"{name}={size}" for name, size in sizes.items()) or "fixed sizes"
        feed = _padded(program.spec.resize(program.sample, **sizes))
        arrays = {n: t.cpu().numpy() for n, t in feed.items() if n in wanted}
        try:
            found = running.run(None, arrays)
        except Exception as error:
            raise ExportError(f"ONNX Runtime fails at {key}: {error}") from error
        with evaluation(program):
            leaves = pytree.tree_leaves(program.module(**feed))
        expected = [t for t in leaves if isinstance(t, Tensor)]
        parity[key] = max(
            (_gap(name, e, f, feed) for name, e, f in zip(names, expected, found, strict=True)),
            default=0.0,
        )
        if not parity[key] <= tolerance:
            raise ExportError(
                f"ONNX Runtime differs by {parity[key]:.3g} of the largest output at {key}; "
                f"allowed is {tolerance:.3g}."
            )
    return parity


def _mask(feed: Mapping[str, Tensor]) -> Tensor | None:
    return next((t for n, t in feed.items() if "mask" in n and t.dim() == 2), None)


def _padded(feed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Masks the last two tokens of the first of several rows."""
    mask = _mask(feed)
    if mask is None or mask.shape[0] < 2 or mask.shape[1] < 4 or mask.is_floating_point():
        return feed
    name = next(n for n, t in feed.items() if t is mask)
    padded = mask.clone()
    padded[0, -2:] = 0
    return {**feed, name: padded}


def _gap(name: str, expected: Tensor, found: Any, feed: Mapping[str, Tensor]) -> float:
    """Largest difference relative to the largest value, on rows that are not padding."""
    got = torch.from_numpy(np.asarray(found))
    want = expected.detach().cpu()
    if got.shape != want.shape:
        raise ExportError(f"output {name!r} is {tuple(got.shape)}, expected {tuple(want.shape)}.")
    mask = _mask(feed)
    if mask is not None and want.dim() >= 2 and want.shape[:2] == mask.shape:
        got, want = got[mask.bool()], want[mask.bool()]
    if not want.numel():
        return 0.0
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    gap = float((got.double() - want.double()).abs().max())
    return gap / max(float(want.double().abs().max()), 1e-30)
