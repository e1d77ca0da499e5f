"""ONNX export that proves itself: a file appears only after ONNX Runtime has run it and agreed.

The program is re-exported in evaluation mode, translated by `torch.onnx`, given back its names
(parameters, inputs, outputs, dynamic sizes), checked, and run at other batch and sequence sizes
with padding. What differs by more than the tolerance is an error and leaves no file.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...rewriter.api import Program
from ...rewriter.edits.edit import Editor
from ...rewriter.edits.folding.lower import restore_deltas
from ...rewriter.edits.linear.quantise import repack
from ...rewriter.errors import ExportError, MetaTensorError, NonFiniteError, ParityError, refused
from ...rewriter.files.leftovers import clean, temporary
from ...rewriter.graph.sharded import require_whole
from ...rewriter.graph.turns import alone
from ...rewriter.measure.compare import keyed_leaves
from ...rewriter.measure.trials import described, left_out, measured
from ...rewriter.verify.verify import bound, evaluation, is_meta
from .parity import gap, masks_of, padded, require, session
from .precision import (
    HALF,
    ROUNDINGS,
    TOLERANCE,
    check_target,
    converted,
    dtypes_of,
    floor_of,
    in_dtype,
)
from .quantised import LAYOUTS, flatten_codes, left_dense, translations
from .slots import Slots, as_inputs, slotted
from .translate import Exported, reexport, rename_sizes, silence, translate

OPSETS = (24, 20)
"""Tried in order: 24 has a real Attention operator, 5 to 11 % faster in a BERT on a CPU; 20 runs on
older runtimes."""

ATTENTION = (
    "to quantise it, give quantize_dynamic op_types_to_quantize=['MatMul'] (by default it takes "
    "the Attention operator for another one), or export with opset 20"
)

LIMIT = 1_800_000_000
"""Bytes of stored tensors in one file; beyond, they go to a data file beside it, because one
protobuf file cannot hold more than 2 GB."""


@dataclass(frozen=True)
class OnnxReport:
    """What was written and how far ONNX Runtime is from the program.

    Attributes:
        path: the file.
        opset: its operator set.
        nodes: number of graph nodes.
        size: bytes, with the data file.
        inputs, outputs: names.
        parity: {"batch=2, sequence=12": largest difference relative to the largest output}, for
            all sizes that were run; the key is `fixed sizes` where none is dynamic.
        tolerance: the largest difference that was allowed.
        transposed: stored tensors whose axes are permuted, because products read them so; the
            file's metadata lists them, too.
        data: the file beside it that holds the large tensors, if they are not inside.
        rounding: where `dtype` was given: how far the program in that dtype is from the program
            itself, relative to the largest output.
        limits: what the program's spec says of sizes: ranges, relations and fixed ones; the file
            has them as its metadata `peftfx.limits`.
        notes: sizes that were left out of `parity`, and why; what ONNX Runtime's quantiser needs;
            weights in few bits that the file makes dense.
    """

    path: Path
    opset: int
    nodes: int
    size: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parity: Mapping[str, float]
    tolerance: float = TOLERANCE
    transposed: tuple[str, ...] = ()
    data: Path | None = None
    rounding: float | None = None
    limits: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The worst parity figure."""
        return max(self.parity.values())

    def __str__(self) -> str:
        text = (
            f"{self.path}: opset {self.opset}, {self.nodes} nodes, {self.size / 1e6:.1f} MB, "
            f"parity {self.error:.1e} of the largest output at {'; '.join(self.parity)}"
        )
        return "; ".join((text, *self.limits, *self.notes))


@dataclass(frozen=True)
class _Prepared:
    """A program ready to be translated, to any operator set.

    Attributes:
        program: the fork that is exported, in the dtype that was asked for.
        exported: its graph.
        outputs: names of its outputs.
        masks: for each, the input that says which rows are padding.
        table: translations that torch.onnx lacks.
        wide: the same program in float32, if it computes in half precision.
        tolerance: the difference allowed in any case.
        rounding, notes: see `OnnxReport`.
        slots: which of its parameters become inputs.
    """

    program: Program
    exported: Exported
    outputs: tuple[str, ...]
    masks: tuple[str | None, ...]
    table: Mapping[Any, Any]
    wide: Program | None
    tolerance: float
    rounding: float | None
    notes: tuple[str, ...]
    slots: Slots | None = None


def export_onnx(
    program: Program,
    path: str | Path,
    *,
    opset: int | None = None,
    tolerance: float | None = None,
    dtype: torch.dtype | None = None,
    limit: int = LIMIT,
    slots: str | bool = False,
) -> OnnxReport:
    """Writes a program, folded or not, as one ONNX file and verifies it in ONNX Runtime.

    Stored tensors keep their names. Matrices lie as products read them, `[in, out]`
    (`OnnxReport.transposed`), so that ONNX Runtime's quantisers find them; a matrix that is also
    an embedding table stays as it is. `quantize_dynamic` takes the Attention operator of opset 23
    and later for another one: give it `op_types_to_quantize=["MatMul"]`, or export with opset 20.

    Args:
        program: not changed; its mode is irrelevant (evaluation is exported).
        path: of the file; replaced atomically.
        opset: operator set; the newest of `OPSETS` that passes by default.
        tolerance: largest difference allowed, relative to the largest output (default: 1e-5; in
            half precision what the program's own rounding explains, measured against the same
            graph in float32).
        dtype: torch.float32 or torch.float16: what half precision in the program becomes. The
            program in that dtype is what ONNX Runtime has to agree with, and has itself to agree
            with the program as far as its rounding goes.
        limit: bytes; larger weights go to `<name>.<hash>.data` beside the file, which refers to it
            by that name.
        slots: the adapter (True: the only one) whose factors become inputs, for `.onnx_adapter`
            files of any rank; without one, the model runs as if it had no adapter.

    Raises:
        ExportError: an operator has no translation, the checker or ONNX Runtime refuses the
            file, or results differ; no file is left and an old one is kept.
        NonFiniteError: a stored value is NaN or infinite, or becomes so in `dtype`.
    """
    check_opset(opset)
    require_whole(program.module, "export_onnx")
    if is_meta(program):
        raise MetaTensorError("parameters are on the meta device; load weights before exporting.")
    for name, parameter in program.module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(f"{name} holds NaN or infinity; nothing was exported.")
    path = Path(path)
    if not path.parent.is_dir():
        raise ExportError(f"the folder {path.parent} does not exist.")
    if path.is_dir():
        raise ExportError(f"{path} is a folder; give the name of a file.")
    opened = slotted(program, "" if slots is True else slots) if slots else None
    prepared = replace(_prepare(opened.program if opened else program, dtype), slots=opened)
    failures: dict[str, int] = {}
    last: ExportError | None = None
    for version in (opset,) if opset is not None else OPSETS:
        try:
            return _attempt(prepared, path, version, tolerance, limit)
        except ExportError as error:
            failures.setdefault(str(error), version)
            last = error
    texts = " | ".join(f"opset {version}: {text}" for text, version in failures.items())
    raise type(last or ExportError())(f"the program cannot be exported. {texts}") from last


def check_opset(opset: int | None) -> None:
    """Raises ExportError where a package is missing, or does not have that operator set."""
    onnx, *_ = [require(name) for name in ("onnx", "onnxscript", "onnxruntime")]
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not 1 <= opset <= newest:
        raise ExportError(f"there is no opset {opset}; the onnx package installed has 1..{newest}.")


def _prepare(program: Program, dtype: torch.dtype | None) -> _Prepared:
    fork = program.fork()
    with alone():
        plain = Editor(fork)
        restore_deltas(plain)
        layouts, left = repack(plain, LAYOUTS)
        plain.finish()
    dtypes = dtypes_of(fork)
    check_target(dtypes, dtype)
    names = _output_names(fork)
    rounding = None
    if dtype is not None and dtypes & set(HALF) - {dtype}:
        original, fork = fork, in_dtype(fork, dtype)
        rounding = _conversion(original, fork, names, dtype)
        dtypes = dtypes - set(HALF) | {dtype}
    wide = in_dtype(fork, torch.float32) if dtypes & set(HALF) else None
    with alone(), evaluation(fork), silence():
        exported = reexport(fork, next(iter(_feeds(fork).values())))
    from .operators import operators  # needs onnxscript

    table = {**operators(), **(translations() if layouts else {})}
    masks, least, notes = masks_of(fork, exported), floor_of(dtypes), left_dense(left)
    return _Prepared(fork, exported, names, masks, table, wide, least, rounding, notes)


def _conversion(
    program: Program, other: Program, names: Sequence[str], dtype: torch.dtype
) -> float:
    """How far a program in another dtype is from the program, of the largest output."""
    worst = 0.0
    for feed in _feeds(program).values():
        want = _outputs(program, feed)
        got = _computed(other, converted(feed, dtype), dtype)
        for name, w, g in zip(names, want, got, strict=True):
            if w.is_floating_point():
                worst = max(worst, gap(name, w, g, None))
    allowed = bound(program, {"max_rel": worst})
    if not worst <= allowed:
        raise ParityError(
            f"in {dtype} the program differs from itself by {worst:.3g} of the largest output; "
            f"its own rounding explains {allowed:.3g}. Its values leave the range of {dtype}, or "
            "it depends on its dtype: capture the model in the dtype that it is to have."
        )
    return worst


def _outputs(program: Program, feed: Mapping[str, Tensor]) -> list[Tensor]:
    with evaluation(program):
        leaves = pytree.tree_leaves(program.module(**feed))
    return [t for t in leaves if isinstance(t, Tensor)]


def _computed(other: Program, feed: Mapping[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    try:
        return _outputs(other, feed)
    except (RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines() or [""]
        raise ExportError(
            f"the program cannot be computed in {dtype}: {reason[0]} Capture the model in it "
            f"(peftfx.capture(model, ..., dtype={dtype})), or give a tolerance, if none is given."
        ) from error


def _attempt(
    prepared: _Prepared, path: Path, opset: int, tolerance: float | None, limit: int
) -> OnnxReport:
    from . import weights  # needs onnx

    onnx: Any = require("onnx")
    inputs, outputs = prepared.program.spec.names, prepared.outputs
    with alone(), silence():
        model = translate(prepared.exported, opset, inputs, outputs, prepared.table)
    flatten_codes(model)
    transposed = weights.store_as_read(model)
    weights.strip(model)
    if prepared.slots:
        transposed = as_inputs(model, prepared.slots.inputs, transposed)
    with _folder_beside(path) as folder:
        data = None
        if weights.size_of(model) > limit:
            data = path.parent / weights.externalise(model, folder, path.name).name
        proto = weights.to_proto(model)
        rename_sizes(proto, prepared.exported.symbols)
        if limits := prepared.program.spec.limits:
            note = proto.metadata_props.add()
            note.key, note.value = "peftfx.limits", "; ".join(limits)
        onnx.save_model(proto, str(folder / path.name))
        size = sum(f.stat().st_size for f in folder.iterdir())
        parity, allowed = _verify(prepared, str(folder / path.name), tolerance)
        weights.place(folder, path)
    nodes = proto.graph.node
    attention = any(n.op_type == "Attention" and not n.domain for n in nodes)
    attention_notes = (ATTENTION,) if attention else ()
    notes = (*left_out(prepared.program), *prepared.notes, *attention_notes)
    return OnnxReport(
        path, opset, len(nodes), size, inputs, outputs, parity, allowed, transposed, data,
        prepared.rounding, limits, notes,
    )  # fmt: skip


@contextlib.contextmanager
def _folder_beside(path: Path) -> Generator[Path]:
    """A folder on the same disk that is gone afterwards."""
    try:
        clean(path.parent)
        folder = temporary(path, "new")
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise refused(error, f"{path} cannot be written: {error}.", ExportError) from error


def _feeds(program: Program) -> dict[str, dict[str, Tensor]]:
    """Example inputs at those sizes, by what they are called in the report."""
    return {
        described(sizes): program.spec.resize(program.sample, **sizes)
        for sizes in measured(program)
    }


def _output_names(program: Program) -> tuple[str, ...]:
    with evaluation(program):
        output = program.module(**next(iter(_feeds(program).values())))
    names: list[str] = []
    for path, leaf in keyed_leaves(output):
        if isinstance(leaf, Tensor):
            text = "_".join(s for p in path if (s := _key(p)))
            names.append(text if text and not text[0].isdigit() else f"output_{text or 0}")
    return tuple(names)


def _key(part: Any) -> str:
    keys = (getattr(part, n) for n in ("key", "name", "idx") if hasattr(part, n))
    return str(next(keys, ""))


def _verify(
    prepared: _Prepared, path: str, tolerance: float | None
) -> tuple[dict[str, float], float]:
    """The parity at each size, and the largest difference that was allowed."""
    onnx: Any = require("onnx")
    try:
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:
        raise ExportError(f"the ONNX checker refuses the model: {error}") from error
    running = session(path)
    names, masks = prepared.outputs, prepared.masks
    wanted = {i.name for i in running.get_inputs()}
    parity: dict[str, float] = {}
    limits: list[float] = []
    for key, program, example, factors in _runs(prepared):
        feed = padded(example, masks)
        given = {n: t for n, t in feed.items() if n in wanted} | factors
        arrays = {n: t.cpu().numpy() for n, t in given.items()}
        try:
            outputs = running.run(None, arrays)
        except Exception as error:
            raise ExportError(f"ONNX Runtime fails at {key}: {error}") from error
        expected = _outputs(program, feed)
        padding = [None if m is None else feed[m] for m in masks]
        parity[key] = _worst(names, expected, outputs, padding)
        limits.append(prepared.tolerance if tolerance is None else tolerance)
        if tolerance is None and prepared.wide is not None:
            wide = _computed(prepared.wide, converted(feed, torch.float32), torch.float32)
            limits[-1] = max(limits[-1], ROUNDINGS * _worst(names, wide, expected, padding))
        if not parity[key] <= limits[-1]:
            raise ParityError(
                f"ONNX Runtime differs by {parity[key]:.3g} of the largest output at {key}; "
                f"allowed is {limits[-1]:.3g}."
            )
    return parity, max(limits)


def _runs(prepared: _Prepared) -> Iterator[tuple[str, Program, dict[str, Tensor], Any]]:
    """Sizes, what computes there, its inputs and the factors that are fed, if any."""
    slots = prepared.slots
    for key, example in _feeds(prepared.program).items():
        yield key, prepared.program, example, slots.values if slots else {}
        if slots:
            yield f"{key}, no adapter", slots.bare, example, {}


def _worst(
    names: Sequence[str], want: Sequence[Tensor], got: Sequence[Any], pads: Sequence[Tensor | None]
) -> float:
    items = zip(names, want, got, pads, strict=True)
    return max((gap(*item) for item in items), default=0.0)
