"""The main job: adapt a real embedding model to a code base for semantic search, and ship it.

MiniLM learns, from (first docstring paragraph, function source) pairs, to find the function that
a sentence describes; LoRA is folded, exported to ONNX, checked, and answers queries.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..exporters.onnx.export import OnnxReport, export_onnx
from ..rewriter.api import Program
from ..rewriter.capture.capture import capture
from ..rewriter.files.files import write_file, write_json
from ..rewriter.run.run import run
from ..rewriter.storage.artifact import save
from . import report
from .corpus import Corpus, Split, make_splits, read_corpus
from .encoder import QUERY_TOKENS, load_model, load_tokenizer, model_directory
from .evaluation import mrr, recall
from .experiment import (
    METHODS,
    Method,
    Outcome,
    asked_of,
    compare,
    encoder_of,
    prepare,
    side_by_side,
    zero_shot,
)
from .search import Answer, Encoder, build_index, find, search

__all__ = ["demo", "search"]

STEPS = 30


def demo(
    source: str | Path | None = None,
    all_methods: bool = False,
    output: str | Path = "demo-output",
    steps: int = STEPS,
    json: bool = False,
) -> dict[str, Any]:
    """Runs the whole job and writes `report.html`, `results.json`, the adapter and the model.

    Args:
        source: a Python source tree; the running interpreter's standard library by default.
        all_methods: compare all methods instead of LoRA with zero-shot only.
        output: folder for the results.
        steps: training steps of 32 pairs.
        json: print nothing.

    Raises:
        RewriteError: the source tree is too small or missing, or a package is not installed.
    """
    begun = time.perf_counter()
    console = Console(quiet=json)
    folder = Path(output)
    corpus = read_corpus(source)
    splits = make_splits(corpus)
    console.print(_about(corpus, splits), highlight=False)
    folder.mkdir(parents=True, exist_ok=True)
    methods = METHODS if all_methods else (replace(METHODS[0], rates=METHODS[0].rates[:1]),)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=json) as bar:
        task = bar.add_task("zero-shot", total=_steps_of(methods, len(splits), steps))

        def advance(text: str) -> None:
            bar.update(task, advance=1, description=escape(text))

        outcomes: list[Outcome] = []
        for outcome in _outcomes(methods, splits, steps, advance):
            outcomes.append(outcome)
            if outcome.rate is not None:
                line = f"{outcome.name}: MRR {outcome.mrr:.3f}, recall@1 {outcome.recall:.3f}"
                bar.console.print(line)
        bar.update(task, description="folding and exporting to ONNX")
        shutil.copyfile(model_directory() / "tokenizer.json", folder / "tokenizer.json")
        shipped = _ship(outcomes[1], folder)
        bar.update(task, description="embedding every function with ONNX Runtime")
        build_index(folder, corpus.pairs)
    queries = [splits[0].test[i].query for i in asked_of(splits[0].test)]
    answers = list(zip(queries, find(Encoder(folder), folder, queries, 3), strict=True))
    console.print(_table(outcomes))
    console.print(shipped["text"], highlight=False)
    _print_answers(console, answers)
    seconds = time.perf_counter() - begun
    results = _results(corpus, splits, outcomes, shipped, seconds)
    write_file(folder / "results.json", write_json(results))
    examples = _examples(outcomes[1], splits[0])
    page = _page(corpus, splits, outcomes, shipped, examples, seconds)
    write_file(folder / "report.html", page.encode())
    report_file = folder / "report.html"
    console.print(f"\n{report_file} ({seconds:.0f} s). Now try: ", end="", highlight=False)
    command = f'[bold]peftfx search "open a file and lock it" --out {folder}[/]'
    console.print(command, highlight=False)
    return results


def _steps_of(methods: Sequence[Method], splits: int, steps: int) -> int:
    """Training steps in all: every rate on the first split, one on each of the others."""
    return sum(steps * (len(m.rates) + splits - 1) * (1 + len(m.members)) for m in methods)


def _outcomes(
    methods: Sequence[Method], splits: Sequence[Split], steps: int, advance: Callable[[str], None]
) -> Iterator[Outcome]:
    """Zero-shot, then each method; all are inserted first, before anything slow."""
    tokenizer = load_tokenizer()
    model = load_model().requires_grad_(False)
    ids = torch.arange(32).view(2, 16)
    base = capture(model, kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    programs = [prepare(method, base) for method in methods]
    yield zero_shot(base, tokenizer, splits)
    for method, program in zip(methods, programs, strict=True):
        yield compare(method, program, tokenizer, splits, steps, advance)


def _examples(outcome: Outcome, split: Split) -> list[tuple[str, str, str]]:
    """What the model finds before and after training, among functions that it has not seen."""
    if outcome.program is None:
        return []
    both = outcome.program.base, outcome.program
    return side_by_side(*both, load_tokenizer(), split.test)


def _print_answers(console: Console, answers: Sequence[tuple[str, Sequence[Answer]]]) -> None:
    for query, hits in answers:
        console.print(f"\n[bold]{escape(query)}[/]", highlight=False)
        for answer in hits:
            console.print(f"  {answer.score:.3f}  {escape(answer.title)}", highlight=False)


def _about(corpus: Corpus, splits: Sequence[Split]) -> str:
    text = (
        f"{corpus.root}: {len(corpus.pairs):,} documented functions in {corpus.files:,} files "
        f"({corpus.duplicates:,} duplicates left out). {len(splits)} splits by top-level module, "
        f"each {len(splits[0].train):,} to train, {len(splits[0].validation)} to choose, "
        f"{len(splits[0].test)} to test."
    )
    if corpus.skipped:
        path, reason = corpus.skipped[0]
        text += f" {len(corpus.skipped)} files skipped, first: {path}: {reason}."
    return escape(text)


def _ship(best: Outcome, folder: Path) -> dict[str, Any]:
    """Folds, exports and measures the first split's LoRA."""
    if best.program is None:
        raise ValueError("nothing was trained")
    save(best.program, folder / "adapter")
    folded = run(best.program, "fold")
    written = export_onnx(folded, folder / "model.onnx")
    latency = _latency(folded, folder)
    text = (
        f"fold: {folded.history[-1].certificate}\n"
        f"ONNX: {written.size / 1e6:.1f} MB, parity {written.error:.1e} of the largest output in "
        f"ONNX Runtime; one query takes {latency['onnxruntime']:.1f} ms, eager PyTorch "
        f"{latency['eager']:.1f} ms (CPU time, one thread, medians)"
    )
    return {"text": text, "onnx": written, "latency": latency, "folded": folded}


def _latency(program: Program, folder: Path, rounds: int = 15) -> dict[str, float]:
    """CPU milliseconds of one query, one thread, interleaved; medians."""
    encoder = Encoder(folder, threads=1)
    tokens = encoder.tokenizer(
        ["Return the path of the file that holds the settings."], QUERY_TOKENS
    )
    ids, mask = tokens.tensors()
    feed = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    model = load_model()
    threads = torch.get_num_threads()
    runs: dict[str, Callable[[], object]] = {
        "eager": lambda: model(input_ids=ids, attention_mask=mask),
        "graph": lambda: encoder_of(program)(ids, mask),
        "onnxruntime": lambda: encoder.session.run(None, feed),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for index in range(rounds):
                names = list(runs)
                for name in names[index % 3 :] + names[: index % 3]:
                    begun = time.process_time()
                    runs[name]()
                    times[name].append(1000 * (time.process_time() - begun))
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(seconds[2:]) for name, seconds in times.items()}


def _rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    rows: list[list[str]] = []
    for outcome in outcomes:
        low, high = outcome.spread
        trained = outcome.rate is not None
        rows.append([
            outcome.name, f"{outcome.mrr:.3f}", f"{outcome.recall:.3f}", f"{low:.3f}-{high:.3f}",
            "" if outcome.untrained is None else f"{outcome.untrained:.3f}",
            str(outcome.gain(outcomes[0])) if trained else "", f"{outcome.parameters:,}",
            f"{outcome.step_seconds:.2f} s" if trained else "",
            f"{outcome.memory / 2**20:.0f} MB" if trained else "",
            f"{outcome.rate:g}" if trained else "",
        ])  # fmt: skip
    return rows


HEAD = (
    "method", "MRR", "recall@1", "MRR of splits", "untrained", "MRR gain [95 %]", "trained", "step",
    "memory", "lr",
)  # fmt: skip


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    shown = [i for i, head in enumerate(HEAD) if head not in ("MRR of splits", "untrained", "lr")]
    for index in shown:
        table.add_column(HEAD[index], justify="left" if index == 0 else "right", no_wrap=True)
    for row in _rows(outcomes):
        table.add_row(*(escape(row[i]) for i in shown))
    return table


def environment() -> str:
    """One line that says what the figures were measured on."""
    return (
        f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def _results(
    corpus: Corpus,
    splits: Sequence[Split],
    outcomes: Sequence[Outcome],
    shipped: Any,
    seconds: float,
) -> dict[str, Any]:
    written: OnnxReport = shipped["onnx"]
    return {
        "environment": environment(),
        "seconds": round(seconds, 1),
        "pairs": len(corpus.pairs),
        "splits": [
            {"seed": s.seed, "train": len(s.train), "validation": len(s.validation),
             "test": len(s.test)} for s in splits
        ],
        "methods": [
            {
                "name": o.name, "recipe": o.recipe, "parameters": o.parameters, "lr": o.rate,
                "mrr": o.mrr, "untrained mrr": o.untrained, "recall@1": o.recall,
                "mrr of splits": [mrr(f) for f in o.found],
                "recall@1 of splits": [recall(f) for f in o.found],
                "validation": {str(k): v for k, v in o.validation.items()},
                "gain": [g.mean, g.low, g.high] if (g := o.gain(outcomes[0])) else None,
                "step seconds": o.step_seconds, "memory bytes": o.memory,
            }
            for o in outcomes
        ],
        "onnx": {"bytes": written.size, "parity": dict(written.parity), "opset": written.opset},
        "latency ms": shipped["latency"],
    }  # fmt: skip


def _page(
    corpus: Corpus, splits: Sequence[Split], outcomes: Sequence[Outcome], shipped: Any,
    examples: Sequence[tuple[str, str, str]], seconds: float,
) -> str:  # fmt: skip
    trained = outcomes[1:]
    points = [(o.name, o.parameters, o.mrr) for o in trained]
    curves = [(o.name, o.runs[0].losses) for o in trained]
    plots = (
        '<div class="plots"><figure>' + report.quality_plot(points, outcomes[0].mrr)
        + f"<figcaption>Quality against parameters: {len(outcomes[0].ranks):,} test queries of "
        "all splits.</figcaption></figure><figure>" + report.loss_plot(curves)
        + "<figcaption>Loss per step of 32 pairs (light) and its running mean over a third of the "
        "run, first split; one scale for all.</figcaption>"
        "</figure></div>"
    )  # fmt: skip
    program = trained[0].program
    diff = _around_one_layer(program.diff()) if program is not None else ""
    method = (
        "<p>Three splits hold out whole top-level modules: no function of a test module is "
        "trained on. Learning rates were chosen on the first split's validation part (by "
        "<code>peftfx demo --all</code>; the short demo takes that choice) and then fixed; each "
        "test set was read once after training. The interval is a paired bootstrap over queries "
        "(2,000 resamples). Step times are CPU seconds of all threads. Memory is what a training "
        "step keeps for backward, plus gradients and optimiser state; the frozen model comes on "
        "top. Untrained is the MRR before training where the rewriting itself moves the outputs; "
        "the others start as the model.</p>"
    )
    shipping = "".join(f"<p>{line}</p>" for line in shipped["text"].splitlines())
    size = sum(p.numel() for p in program.base.module.parameters()) if program else 0
    lead = (
        f"MiniLM ({size / 1e6:.1f} M parameters) adapted to {len(corpus.pairs):,} functions of "
        f"{escape(corpus.root.name)}, then folded, exported and searched. {seconds:.0f} seconds."
    )
    return report.page(
        "Semantic code search with peftfx",
        lead,
        [
            ("Results", report.table(HEAD, _rows(outcomes)) + method),
            ("Plots", plots),
            ("Shipped", shipping),
            ("Three queries: what is found among the first split's test functions",
             report.table(("query", "zero-shot", trained[0].name), examples, wide=(0, 1, 2))
             + "<p><small>✓ is the function that the query was written for; numbers are "
             "cosines.</small></p>"),
            ("The graph before and after, around one attention", report.diff_block(diff)),
        ],
        environment(),
    )  # fmt: skip


def _around_one_layer(diff: str, lines: int = 26) -> str:
    return "\n".join([*diff.splitlines()[:lines], "...", diff.splitlines()[-1]])
