"""Whole programs as files: a directory that loads without the model's code or any method's.

`manifest.json` (strict JSON: sites, input spec, hashes of everything), `graph.json` (operators by
name, see `capture/graphfile.py`) and `tensors.safetensors` (what the graph reads, the model's
unread tensors, and the example inputs, which verification runs on). Inserted branches are written
as the operators that they run and stay ordinary parameters under their names, trainable as before.

Classes of outputs become `Outputs`, a dict with attributes.

What is not kept: the history, hence unfolding, `only` and `without`; and a lowering, which depends
on the machine. A loaded program is a base of its own: passes run on it as on a captured one.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..api import Program
from ..capture.graphfile import decode, encode, read_graph, write_graph
from ..edits.edit import Editor
from ..edits.folding.lower import restore_deltas
from ..edits.structure.inline import inline_calls
from ..errors import (
    CorruptFileError,
    ExportError,
    MetaTensorError,
    ParityError,
    RewriteError,
    VerifyError,
)  # fmt: skip
from ..files.directory import Folder, reading, write_directory
from ..files.files import JSON_LIMIT, parse_json, tensors_of, write_json
from ..files.files import write_tensors as tensor_file
from ..files.identity import tensor_digest
from ..files.sealed import compare_versions, sealed, unsealed
from ..graph.aten import attribute, shape
from ..graph.output_class import OUTPUTS, portable
from ..graph.outside import outside_modes
from ..graph.sharded import require_whole
from ..graph.turns import alone
from ..inputs.specfile import read_spec
from ..program.site_table import Sites
from ..program.sites import LinearSite
from ..program.tensors import Tensors
from ..program.unchanged import require_unchanged
from ..tracing.propagate import propagate
from ..verify.verify import bound, check_graph, is_meta, measure
from .artifact import VERSION, require_finite

FORMAT = 2
MANIFEST = "program.json"
GRAPH = "graph.json"
TENSORS = "tensors.safetensors"
GRAPH_LIMIT = 256 * 2**20
_SAMPLE = "sample:"
_PACKAGES = frozenset({"peftfx"})
_DAMAGE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    SyntaxError,
)  # fmt: skip; the last two are torch's

_KEYS = {
    "format_version": int, "name": str, "graph": str, "tensors": dict, "trainable": list,
    "transient": list, "parameters": list, "extras": list, "aliases": dict, "symbols": dict,
    "sites": list, "inputs": dict, "state_names": list, "added": list, "untied": list,
    "generation": dict, "recipe": list, "versions": dict,
}  # fmt: skip


def save_program(program: Program, directory: str | Path) -> None:
    """Saves a whole program, folded or not, pruned or not, atomically.

    Args:
        program: not changed.
        directory: new, empty, or a saved program to replace.

    Raises:
        MetaTensorError: it has tensors without values.
        PassError: its weights are sharded over ranks.
        NonFiniteError: a parameter holds NaN or infinity.
        ExportError: it holds something that has no written form (an operator of another library,
            a region that runs in training only), or what was written computes something else.
        ArtifactError: the directory cannot be written; what was there stays.
    """
    if is_meta(program):
        raise MetaTensorError("the program has no values; load weights before saving it.")
    require_whole(program.module, "save_program")
    require_unchanged(program)
    flat = flattened(program)
    gm = flat.module
    state: dict[str, Tensor] = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}
    for name, parameter in gm.named_parameters():
        require_finite(name, parameter)
    try:
        graph = write_json(_portable(write_graph(gm, frozenset(state), _PACKAGES)))
        sites = encode(tuple(flat.sites), {})
    except (ValueError, NotImplementedError) as error:
        raise ExportError(f"the program cannot be saved: {error}.") from error
    sample = {f"{_SAMPLE}{n}": t for n, t in program.sample.items()}
    tensors = {**state, **flat.extras, **sample}
    manifest = _manifest(program, flat, graph, tensors, sites)
    try:
        check_graph(_assembled(manifest, parse_json(graph, GRAPH, GRAPH_LIMIT), tensors))
    except (*_DAMAGE, RewriteError) as error:
        raise ExportError(f"the program cannot be saved: it does not read back: {error}") from error
    files = {GRAPH: graph, TENSORS: tensor_file(tensors), MANIFEST: sealed(manifest)}
    write_directory(directory, files, MANIFEST)


def _manifest(
    program: Program, flat: Program, graph: bytes, tensors: Mapping[str, Tensor], sites: Any
) -> dict[str, Any]:
    """What is said of a program beside its graph and its tensors."""
    gm = flat.module
    lasting = set(gm.state_dict())
    buffers = {n for n, _ in gm.named_buffers()}
    parameters = sorted(n for n, _ in gm.named_parameters())
    return {
        "format_version": FORMAT,
        "name": type(gm).__name__,
        "graph": hashlib.sha256(graph).hexdigest(),
        "tensors": {n: tensor_digest(t) for n, t in tensors.items()},
        "trainable": sorted(n for n, p in gm.named_parameters() if p.requires_grad),
        "transient": sorted(({*parameters} | buffers) - lasting),
        "parameters": parameters,
        "extras": sorted(flat.extras),
        "aliases": dict(flat.aliases),
        "symbols": dict(flat.symbols),
        "sites": sites,
        "inputs": flat.spec.to_json(),
        "state_names": _state_names(program, flat),
        "added": list(flat.added),
        "untied": list(flat.untied),
        "generation": dict(flat.generation),
        "recipe": [r.text for r in program.history],
        "versions": {
            "peftfx": VERSION, "torch": torch.__version__, "python": platform.python_version(),
        },
    }  # fmt: skip


def flattened(program: Program) -> Program:
    """The program with every inserted module as plain operators, proven on its example inputs.

    Raises:
        ExportError: it cannot be, or computes something else.
    """
    flat = program.fork()
    try:
        with alone():
            edit = Editor(flat)
            restore_deltas(edit)
            edit.finish()
            propagate(flat)
            inline_calls(flat)
        check_graph(flat)
    except RewriteError as error:
        raise ExportError(f"the program cannot be written as operators: {error}") from error
    measured = measure(program, flat)
    if measured["max_rel"] > bound(program, measured):
        raise ParityError(
            f"the program as operators computes something else (off by {measured['max_rel']:.3g} "
            "of the largest output). Nothing was saved."
        )
    return flat


def _portable(graph: dict[str, Any]) -> dict[str, Any]:
    """The graph without source lines of this machine, and without classes of the model's."""
    blank = {"traces": ["" for _ in graph["traces"]]}
    return {**graph, **blank, "output": portable(graph["output"])}


def _state_names(program: Program, flat: Program) -> list[str]:
    """The original model's names while the tensors still fit it, else the program's own."""
    try:
        program.export_state_dict()
    except ExportError:
        return [*flat.module.state_dict(), *flat.extras]
    return list(program.state_names)


@outside_modes
def load_program(directory: str | Path) -> Program:
    """Loads what `save_program` wrote; needs neither the model's code nor the methods'.

    Returns:
        A program in evaluation mode without a history; what trained, trains.

    Raises:
        ArtifactError: there is none.
        CorruptFileError: truncated, altered or malformed.
        FormatTooNewError: written by a newer version.
    """
    return reading(directory, f"a directory with a {MANIFEST}", _read)


def _read(folder: Folder) -> Program:
    where = str(folder.path / MANIFEST)
    data = parse_json(folder.read(MANIFEST, JSON_LIMIT), where)
    manifest = unsealed(data, _KEYS, FORMAT, where)
    compare_versions(manifest["versions"], VERSION, where)
    raw, place = folder.read(GRAPH, GRAPH_LIMIT), str(folder.path / GRAPH)
    if hashlib.sha256(raw).hexdigest() != manifest["graph"]:
        raise CorruptFileError(f"{place} was altered or is truncated (sha256 differs).")
    graph = parse_json(raw, place, GRAPH_LIMIT)
    tensors = tensors_of(folder.read(TENSORS), manifest["tensors"], str(folder.path / TENSORS))
    try:
        program = _assembled(manifest, graph, tensors)
        check_graph(program)
    except VerifyError as error:
        raise CorruptFileError(f"{folder.path}: {error}") from error
    except _DAMAGE as error:
        by = manifest["versions"].get("torch")
        raise CorruptFileError(
            f"{folder.path}: {str(error).rstrip('.')}. It is malformed, or needs what torch "
            f"{torch.__version__} lacks (it was written with torch {by})."
        ) from error
    return program


def _assembled(manifest: dict[str, Any], graph: Any, tensors: dict[str, Tensor]) -> Program:
    trainable, transient = set(manifest["trainable"]), set(manifest["transient"])
    parameters, extras = set(manifest["parameters"]), set(manifest["extras"])
    values: dict[str, tuple[Tensor, bool]] = {}
    for name, tensor in tensors.items():
        if name not in extras and not name.startswith(_SAMPLE):
            if name in parameters:
                tensor = nn.Parameter(tensor, name in trainable)
            values[name] = tensor, name not in transient
    gm = read_graph(graph, values, _PACKAGES, manifest["name"], (OUTPUTS,)).eval()
    sites = Sites(decode(manifest["sites"], []))
    _must_fit(gm, sites, values)
    spec = read_spec(manifest["inputs"])
    return Program(
        module=gm,
        spec=spec,
        sites=sites,
        symbols=dict(manifest["symbols"]),
        extras={n: tensors[n] for n in sorted(extras)},
        state_names=tuple(manifest["state_names"]),
        sample={n: tensors[f"{_SAMPLE}{n}"] for n in spec.names if f"{_SAMPLE}{n}" in tensors},
        generation=dict(manifest["generation"]),
        tensors=Tensors(
            aliases=dict(manifest["aliases"]),
            untied=tuple(manifest["untied"]),
            added=tuple(manifest["added"]),
        ),
    )


def _must_fit(gm: GraphModule, sites: Sites, state: dict[str, tuple[Tensor, bool]]) -> None:
    """ValueError unless tensors have the recorded shapes and sites name nodes of the graph."""
    names = {n.name for n in gm.graph.nodes}
    stored = {n for n, (t, _) in state.items() if isinstance(t, nn.Parameter)}
    for site in sites:
        if isinstance(site, LinearSite) and site.weight in set(state) - stored:
            raise ValueError(f"the weight {site.weight} of a site is no parameter")
        if missing := [n for n in site.nodes if n not in names]:
            raise ValueError(f"the site {site.id} names the node {missing[0]}, which is missing")
    for node in gm.graph.nodes:
        recorded = shape(node) if node.op == "get_attr" else None
        if recorded is not None and tuple(attribute(gm, str(node.target)).shape) != recorded:
            raise ValueError(f"{node.target} has not the shape that the graph records")
    read = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    if unread := sorted(set(state) - read):
        raise ValueError(f"the tensor {unread[0]} is read by nothing")
