"""Batches from a file, for passes that decide from data on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .rewriter.errors import OptionError
from .rewriter.files.files import parse_tensors, read_file


def read_batches(path: str | Path, size: int) -> list[Mapping[str, Tensor]]:
    """The inputs that a safetensors file holds, cut into batches.

    Args:
        path: of a file with a tensor for each input of the model by its name, `[samples, ...]`.
        size: samples in a batch; the last one has what is left.

    Raises:
        ArtifactError: (CorruptFileError) it is missing or damaged. OptionError: it holds nothing,
            or its tensors have different numbers of samples.
    """
    tensors = parse_tensors(read_file(path), str(path))
    counts = {n: len(t) if t.dim() else 0 for n, t in tensors.items()}
    samples = set(counts.values())
    if len(samples) != 1 or 0 in samples:
        have = ", ".join(f"{n} {c}" for n, c in counts.items()) or "nothing"
        raise OptionError(
            f"{path}: a file of batches has as many samples of each input, and this one has {have}."
            " Give a safetensors file with a tensor [samples, ...] for each input."
        )
    if size < 1:
        raise OptionError(f"--batch {size} is no number of samples. Give at least 1.")
    return [
        {n: t[begin : begin + size] for n, t in tensors.items()}
        for begin in range(0, samples.pop(), size)
    ]
