"""The checkpoints that `write_mergekit` merged, and what it made of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
ABOUT: Mapping[str, Any] = json.loads((HERE / "mergekit.json").read_text())


@functools.cache
def stored() -> Mapping[str, Tensor]:
    return load_file(HERE / "mergekit.safetensors")


def tensors(name: str) -> dict[str, Tensor]:
    """Those of a model or a merge."""
    return {n.partition("/")[2]: t for n, t in stored().items() if n.startswith(f"{name}/")}


def write(
    folder: Path, name: str, held: Mapping[str, Tensor] | None = None, shards: int = 1
) -> Path:
    """A model as a directory, in some shards."""
    held = tensors(name) if held is None else held
    place = folder / name
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(ABOUT["model"]))
    (place / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "added_tokens": []}')
    (place / "README.md").write_text(f"about {name}")
    (place / "pytorch_model.bin").write_bytes(b"stale")
    names = list(held)
    if shards == 1:
        save_file(dict(held), place / "model.safetensors", {"format": "pt"})
        return place
    listed: dict[str, str] = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        own = {n: held[n] for n in names[index::shards]}
        save_file(own, place / file, {"format": "pt"})
        listed |= dict.fromkeys(own, file)
    index_ = {"metadata": {}, "weight_map": listed}
    (place / "model.safetensors.index.json").write_text(json.dumps(index_))
    return place


def three(folder: Path, shards: int = 1) -> Path:
    for name in ("base", "a", "b"):
        write(folder, name, shards=shards)
    return folder


def config(folder: Path, merge: str | Mapping[str, Any] | None = None, text: str = "") -> Path:
    """A configuration beside the models."""
    about = ABOUT["merges"][merge] if isinstance(merge, str) else merge
    path = folder / "merge.yml"
    path.write_text(text or yaml.safe_dump(about))
    return path
