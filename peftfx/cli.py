"""The command line: `peftfx sites|methods|memory|print|diff|run|fold|convert|export|verify|...`.

A user error is one readable line on stderr and exit code 2. `--json` prints one JSON document
instead of tables, for machines.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .arguments import parser
from .commands import combine, extract, merge
from .directories import to_directory
from .drawing import check_drawing, draw_sites
from .exporters.formats import convert as convert_files
from .exporters.formats import format_of, load_adapter, save_adapter
from .exporters.plain_lora import worst
from .method_table import print_methods
from .methods import methods
from .models import is_gguf_model, load_model
from .rewriter.api import Program
from .rewriter.capture.capture import capture
from .rewriter.errors import OptionError, RewriteError
from .rewriter.files.files import write_file, write_tensors
from .rewriter.pipeline.passes import REGISTRY
from .rewriter.program.site_table import Sites
from .rewriter.run.run import run
from .rewriter.storage.artifact import save

ERR = Console(stderr=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = parser(ACTIONS).parse_args(argv)
    try:
        result = options.command(options)
    except RewriteError as error:
        return _fail(options, str(error))
    except KeyboardInterrupt:
        return _fail(options, "interrupted", 130)
    except BrokenPipeError:
        return 0
    if options.json:
        print(json.dumps(result, indent=1, default=str))
    return 0


def _fail(options: Any, message: str, code: int = 2) -> int:
    line = " ".join(message.split())
    if options.json:
        print(json.dumps({"error": line}))
    else:
        ERR.print(f"[bold red]error:[/] {escape(line)}", soft_wrap=True, highlight=False)
    return code


@contextlib.contextmanager
def progress(options: Any, text: str) -> Generator[None]:
    """A moving bar with the elapsed time while something runs (terminals only)."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(20),
        TimeElapsedColumn(),
    )
    quiet = options.json or not ERR.is_terminal
    with Progress(*columns, console=ERR, transient=True, disable=quiet) as bar:
        bar.add_task(escape(text), total=None)
        yield


def _say(options: Any, text: str) -> None:
    if not options.json:
        print(text)


def _program(options: Any, passes: str | None = None, hollow: bool = False) -> Program:
    with progress(options, f"loading {options.model}"):
        named = load_model(options.model, hollow)
    with progress(options, "capturing the model as a graph"):
        program = capture(named.model, kwargs=named.example)
    adapter = getattr(options, "adapter", None)
    if adapter:
        with progress(options, f"loading {adapter}"):
            component = getattr(options, "component", "")
            program = load_adapter(program, adapter, component=component)
    if passes:
        with progress(options, f"running {passes}"):
            program = run(program, passes)
    return program


def _report(options: Any, program: Program) -> list[dict[str, Any]]:
    for record in program.history:
        _say(options, str(record))
    return [
        {
            "pass": r.text, "adapter": r.adapter, "edited": r.edited, "skipped": r.skipped,
            "certificate": {"kind": r.certificate.kind, **r.certificate.measured},
            "seconds": dict(r.seconds),
        }
        for r in program.history
    ]  # fmt: skip


def sites(options: Any) -> Any:
    """`peftfx sites MODEL [--where SELECTOR] [--draw FILE.svg|FILE.png]`"""
    if options.draw:
        check_drawing(options.draw)
    program = _program(options)
    chosen = program.sites.select(options.where) if options.where else list(program.sites)
    _say(options, str(Sites(tuple(chosen))))
    _say(options, f"{len(chosen)} of {len(program.sites)} sites; inputs: {program.spec}")
    if options.draw:
        draw_sites(program, options.draw, options.where)
        _say(options, f"drawn to {options.draw}")
    return [
        {"id": s.id, "kind": s.kind, "role": s.role, "layer": s.layer, "about": s.describe()}
        for s in chosen
    ]


def show(options: Any) -> Any:
    """`peftfx print MODEL [PASSES] [--adapter DIR]`"""
    text = _program(options, options.passes).text()
    _say(options, text)
    return {"text": text}


def diff(options: Any) -> Any:
    """`peftfx diff MODEL [PASSES] [--adapter DIR]`"""
    if not options.passes and not options.adapter:
        raise OptionError("diff needs passes or --adapter: peftfx diff MODEL 'lora{rank=8}'.")
    text = _program(options, options.passes).diff()
    _say(options, text)
    return {"diff": text}


def run_passes(options: Any) -> Any:
    """`peftfx run MODEL PASSES [--out DIR]`"""
    program = _program(options, options.passes)
    records = _report(options, program)
    count = sum(p.numel() for p in program.trainable_parameters())
    _say(options, f"{count:,} trainable parameters")
    if options.out:
        save(program, options.out)
        _say(options, f"saved to {options.out}")
    return {"records": records, "trainable": count, "out": options.out}


def fold(options: Any) -> Any:
    """`peftfx fold MODEL ADAPTER --out FILE.safetensors`, or with `--stream` a directory"""
    if options.stream:
        return _fold_stream(options)
    if options.weights:
        raise OptionError("--weights goes with --stream; without, MODEL has its own weights.")
    program = _program(options, f"fold{{tied={options.tied}}}")
    records = _report(options, program)
    state = program.export_state_dict()
    write_file(options.out, write_tensors(state))
    _say(options, f"{len(state)} tensors under their original names: {options.out}")
    return {"records": records, "tensors": len(state), "out": options.out}


def _fold_stream(options: Any) -> Any:
    """Shard by shard, for models that memory does not hold; the new directory is a model again."""
    source = options.weights or options.model
    if not Path(source).is_dir() and not is_gguf_model(source):
        raise OptionError(
            f"fold --stream reads the weights from a directory with safetensors files, which "
            f"{source!r} is not. Add --weights DIR: the checkpoint of the model that "
            f"{options.model} makes."
        )
    return _directory(options, options.weights)


def _directory(options: Any, weights: str | None = None) -> Any:
    """A base and an adapter, if there is one, as a Hugging Face directory."""
    with progress(options, f"writing {options.out} file by file"):
        done = to_directory(options.model, options.out, options.adapter, weights=weights)
    _say(options, f"{len(done.changed)} tensors folded: {options.out}")
    for name in done.left_out:
        _say(options, f"not copied (other weights): {name}")
    for note in done.notes:
        _say(options, note)
    return {**asdict(done), "out": options.out}


def convert(options: Any) -> Any:
    """`peftfx convert ADAPTER OUT --to FORMAT [--base MODEL [--capture]] [--rank N]`"""
    if options.to == "hf":
        return _whole_model(options)
    whole = {"peftfx", "adapterhub"} & {options.to, format_of(options.adapter)}
    if whole or options.capture or ":" in (options.base or ""):
        lost = _convert_captured(options)
    else:
        lost = convert_files(
            options.adapter, options.out, options.to, options.base, options.rank, options.component
        )
    _say(options, f"{options.adapter} as {options.to}: {options.out}")
    if lost:
        most = ", ".join(f"{name} {share:.2g}" for name, share in worst(lost))
        _say(options, f"{len(lost)} changes lost a share of their norm, most of all {most}")
    return {"out": options.out, "to": options.to, "lost": dict(lost)}


def _whole_model(options: Any) -> Any:
    """The adapter folded into its base, or a GGUF model, as a Hugging Face directory."""
    if options.base is None and not is_gguf_model(options.adapter):
        raise OptionError(
            f"--to hf writes a whole model, and {options.adapter} is an adapter. Add --base MODEL: "
            "the model that it is folded into."
        )
    whole = options.base is None
    options.model = options.adapter if whole else options.base
    options.adapter = None if whole else options.adapter
    return _directory(options)


def _convert_captured(options: Any) -> Mapping[str, float]:
    """With the model as a program, which our own format and stacks of experts need."""
    if options.base is None:
        raise OptionError(
            f"converting {options.adapter} to {options.to} needs its model. Add --base MODEL: a "
            "Hugging Face model directory, or module:function."
        )
    options.model = options.base
    program = _program(options)
    return save_adapter(program, options.out, options.to, rank=options.rank)


def export(options: Any) -> Any:
    """`peftfx export MODEL [PASSES] [--adapter DIR] --out FILE.onnx`"""
    from .exporters.onnx_export import export_onnx

    program = _program(options, options.passes)
    with progress(options, "exporting to ONNX and running it"):
        report = export_onnx(
            program, options.out, opset=options.opset, tolerance=options.tolerance,
            dtype=getattr(torch, options.dtype) if options.dtype else None, slots=options.slots,
        )  # fmt: skip
    _say(options, str(report))
    if report.data is not None:
        _say(options, f"its weights are in {report.data}; keep the two together")
    return {
        "out": str(report.path), "opset": report.opset, "nodes": report.nodes,
        "bytes": report.size, "parity": dict(report.parity), "tolerance": report.tolerance,
        "data": str(report.data) if report.data else None, "rounding": report.rounding,
        "notes": list(report.notes),
    }  # fmt: skip


def verify(options: Any) -> Any:
    """`peftfx verify MODEL [ADAPTER | PASSES]`"""
    program = _program(options, options.passes)
    with progress(options, "measuring every contract again"):
        certificates = program.verify()
    lines = [str(c) for c in certificates] or ["the captured graph is well formed"]
    for line in lines:
        _say(options, f"ok  {line}")
    return {"certificates": lines}


def passes(options: Any) -> Any:
    """`peftfx passes`"""
    listed: dict[str, str] = {}
    for name, cls in sorted(REGISTRY.items()):
        listed[name] = (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()[0]
        _say(options, f"{name:16}{listed[name]}")
    return listed


def list_methods(options: Any) -> Any:
    """`peftfx methods [MODEL]`"""
    program = _program(options) if options.model else None
    with progress(options, "running every method"):
        entries = methods(program)
    if not options.json:
        print_methods(entries, program is not None)
        for entry in entries:
            if entry.refused:
                print(f"{entry.name}: {entry.refused}")
    return [entry.to_json() for entry in entries]


def memory(options: Any) -> Any:
    """`peftfx memory MODEL [PASSES] [--batch N] [--seq N]`"""
    program = _program(options, options.passes, hollow=True).train()
    sizes = {n: s for n, s in (("batch", options.batch), ("seq", options.seq)) if s is not None}
    memory_report = program.memory(**sizes, optimizer=options.optimizer)
    _say(options, str(memory_report))
    return memory_report.to_json()


def demo(options: Any) -> Any:
    """`peftfx demo [--source DIR] [--all] [--out DIR]`"""
    from .demo import demo as run_demo

    return run_demo(
        source=options.source, all_methods=options.all, output=options.out, json=options.json
    )


def search(options: Any) -> Any:
    """`peftfx search QUERY [--out DIR]`"""
    from .demo import search as run_search

    result = run_search(options.query, options.out, count=options.count)
    for answer in result:
        _say(
            options,
            f"{answer['score']:.3f}  {answer['function']}:{answer['line']}  {answer['about']}",
        )
    return result


ACTIONS = {
    "sites": sites, "print": show, "diff": diff, "verify": verify, "run": run_passes, "fold": fold,
    "combine": combine.command, "merge": merge.command, "extract": extract.command,
    "convert": convert, "export": export, "passes": passes, "methods": list_methods,
    "memory": memory, "demo": demo, "search": search,
}  # fmt: skip
"""What runs each command."""


if __name__ == "__main__":
    sys.exit(main())
