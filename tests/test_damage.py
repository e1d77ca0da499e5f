"""Damage of every kind of file: refused with an error of ours, or without any consequence."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftfx.rewriter.errors import ArtifactError, RewriteError

from .damage import cuts, flips
from .fuzzing import TARGETS, corpus, mutations
from .writers import WRITERS

FILES = [(name, file) for name, writer in WRITERS.items() for file in writer.files]


@pytest.mark.parametrize(("name", "file"), FILES)
def test_flips_and_cuts(name: str, file: str, tmp_path: Path) -> None:
    writer = WRITERS[name]
    writer.write(tmp_path, 3)
    path = tmp_path / file
    good, want = path.read_bytes(), writer.state(tmp_path)
    refused = 0
    for bad in (*flips(good, 24), *cuts(good, 6)):
        path.write_bytes(bad)
        try:
            assert writer.state(tmp_path) == want
        except RewriteError:
            refused += 1
    assert refused >= 20
    path.unlink()
    with pytest.raises((ArtifactError, RewriteError)):
        writer.state(tmp_path)
    path.write_bytes(good)
    assert writer.state(tmp_path) == want and writer.read(tmp_path) in (1, 3)


@pytest.mark.parametrize("name", TARGETS)
def test_readers_raise_errors_of_ours(name: str) -> None:
    seeds = corpus(name)
    assert seeds
    for seed in seeds:
        TARGETS[name](seed)
    for data in mutations(seeds, 40):
        TARGETS[name](data)
