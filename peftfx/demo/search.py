"""Search with the exported model: ONNX Runtime, a tokenizer file and a table of vectors.

The folder that the demo writes is all there is: `model.onnx`, `tokenizer.json`,
`functions.json`, `vectors.npy`. Neither torch weights nor transformers are read.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..rewriter.errors import PathError
from ..rewriter.files.files import parse_json, read_file, write_file, write_json
from .corpus import Pair
from .encoder import CODE_TOKENS, QUERY_TOKENS, DemoError, Tokenizer, pool_array

LIMIT = 64 * 2**20


@dataclass(frozen=True)
class Answer:
    """One function that was found."""

    score: float
    title: str
    line: int
    about: str


class Encoder:
    """The exported model and its tokenizer."""

    def __init__(self, folder: Path, threads: int = 0) -> None:
        try:
            ort: Any = importlib.import_module("onnxruntime")
        except ImportError as error:
            raise DemoError(
                "search needs ONNX Runtime. Install the extra: pip install 'peftfx[onnx]'."
            ) from error
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        path = str(folder / "model.onnx")
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.tokenizer = Tokenizer(folder / "tokenizer.json")

    def __call__(self, texts: Sequence[str], length: int, batch: int = 32) -> NDArray[np.float32]:
        """Normalised embeddings `[len(texts), hidden]`, in order."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows: list[Any] = [None] * len(texts)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            tokens = self.tokenizer([texts[i] for i in chosen], length)
            feed = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
            hidden = self.session.run(["last_hidden_state"], feed)[0]
            for i, row in zip(chosen, pool_array(hidden, tokens.attention_mask), strict=True):
                rows[i] = row
        return np.stack(rows)


def build_index(folder: Path, pairs: Sequence[Pair]) -> None:
    """Writes the vectors of all functions beside the model."""
    vectors = Encoder(folder)([p.code for p in pairs], CODE_TOKENS)
    np.save(folder / "vectors.npy", vectors, allow_pickle=False)
    listed = [{"title": p.title, "line": p.line, "about": p.query} for p in pairs]
    write_file(folder / "functions.json", write_json(listed))


def find(
    encoder: Encoder, folder: Path, queries: Sequence[str], count: int = 5
) -> list[list[Answer]]:
    """The best functions for each query.

    Raises:
        ArtifactError: the folder is not complete.
    """
    listed = parse_json(
        read_file(folder / "functions.json", LIMIT), str(folder / "functions.json"), LIMIT
    )
    vectors = np.load(folder / "vectors.npy", allow_pickle=False)
    scores = encoder(queries, QUERY_TOKENS) @ vectors.T
    answers: list[list[Answer]] = []
    for row in scores:
        best = np.argsort(-row)[:count]
        answers.append([
            Answer(float(row[i]), listed[i]["title"], listed[i]["line"], listed[i]["about"])
            for i in best
        ])  # fmt: skip
    return answers


def search(query: str, folder: str | Path, count: int = 5) -> list[dict[str, Any]]:
    """Answers one query from a folder that the demo wrote, and prints the answers.

    Raises:
        PathError: the folder is missing or incomplete.
    """
    folder = Path(folder)
    needed = ("model.onnx", "tokenizer.json", "functions.json", "vectors.npy")
    missing = [n for n in needed if not (folder / n).is_file()]
    if missing:
        raise PathError(f"{folder} lacks {', '.join(missing)}. Run `peftfx demo` first.")
    if not query.strip():
        raise DemoError("the query is empty; say in words what the function does.")
    (answers,) = find(Encoder(folder), folder, [query], count)
    return [
        {"score": round(a.score, 4), "function": a.title, "line": a.line, "about": a.about}
        for a in answers
    ]
